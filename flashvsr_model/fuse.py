"""Official checkpoint tensors to module weights: what is constant in FlashVSR is computed here, once."""
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr_kernels import fold_repeat, fold_upsample, rms_norm

from .config import LATENT_FRAMES, PATCH, FlashVSRConfig

TIME_STEP = 1000.0  # the one step starts from pure noise
EPS = 1e-6
_BLOCK_LINEARS = [f"{attn}.{part}" for attn in ("self_attn", "cross_attn") for part in "qkvo"]
# first memory block, growth and convolution in the official numbering
_STAGES = ((5, 9, 10), (11, 15, 16), (17, 21, 22))


def expected_shapes(config: FlashVSRConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its official name behind "dit.", "lq." or "decoder.", and the prompt's
    "context".
    """
    C, hidden, channels = config.dim, config.ffn_dim, config.latent_channels
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inside: int, *kernel: int):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside, *kernel), (out,)
    linear("dit.patch_embedding", C, channels, 1, 2, 2)
    for name, inside in (("text_embedding", config.text_dim), ("time_embedding", config.freq_dim)):
        linear(f"dit.{name}.0", C, inside)
        linear(f"dit.{name}.2", C, C)
    linear("dit.time_projection.1", 6 * C, C)
    for i in range(config.num_layers):
        block = f"dit.blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, C)
        for name in _BLOCK_LINEARS:
            linear(f"{block}.{name}", C, C)
        for attn in ("self_attn", "cross_attn"):
            shapes[f"{block}.{attn}.norm_q.weight"] = shapes[f"{block}.{attn}.norm_k.weight"] = (C,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (C,)
        linear(f"{block}.ffn.0", hidden, C)
        linear(f"{block}.ffn.2", C, hidden)
    linear("dit.head.head", 4 * channels, C)
    shapes["dit.head.modulation"] = (1, 2, C)

    a, b = config.lq_hidden
    for name, out, inside in (("1", a, 3 * PATCH * PATCH), ("2", b, a)):
        linear(f"lq.conv{name}", out, inside, 4, 3, 3)
        shapes[f"lq.norm{name}.gamma"] = (out, 1, 1, 1)
    linear("lq.linear_layers.0", C, b)

    widths = config.decoder_channels
    linear("decoder.decoder.1", widths[0], 3 * LATENT_FRAMES * 64 + channels, 3, 3)
    shapes["decoder.decoder.3.weight"] = (widths[0], widths[0], 3, 3)
    for (first, grow, conv), width, out, steps in zip(_STAGES, widths, widths[1:], (1, 2, 2)):
        for i in range(first, first + 3):
            for conv_index, inside in ((0, 2 * width), (2, width), (4, width)):
                linear(f"decoder.decoder.{i}.conv.{conv_index}", width, inside, 3, 3)
        shapes[f"decoder.decoder.{grow}.conv.weight"] = (steps * width, width, 1, 1)
        shapes[f"decoder.decoder.{conv}.weight"] = (out, width, 3, 3)
    shapes["decoder.decoder.24.weight"] = (widths[3], widths[3], 3, 3)
    linear("decoder.decoder.26", 3, widths[3], 3, 3)
    shapes["context"] = (1, config.context_len, config.text_dim)
    return shapes


def fuse_dit(config: FlashVSRConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of dit.DiT: time embedding and modulation added up, prompt keys and values computed, q, k and v
    joined.

    Computed in float32 (or wider, if the tensors are); differentiable.
    """
    w = {name[4:]: _wide(t) for name, t in tensors.items() if name.startswith("dit.")}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])
    kind, device = w["head.head.weight"].dtype, w["head.head.weight"].device
    half = config.freq_dim // 2
    angle = TIME_STEP * 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    wave = torch.cat([angle.cos(), angle.sin()]).to(kind)
    time = linear(F.silu(linear(wave, "time_embedding.0")), "time_embedding.2")
    modulation = linear(F.silu(time), "time_projection.1").view(6, config.dim)
    prompt = tensors["context"].to(device, kind)
    prompt = linear(F.gelu(linear(prompt, "text_embedding.0"), approximate="tanh"), "text_embedding.2")

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (config.num_heads, config.head_dim)).transpose(1, 2)
    fused = {"patch_weight": w["patch_embedding.weight"].flatten(1), "patch_bias": w["patch_embedding.bias"],
             "head_weight": w["head.head.weight"], "head_bias": w["head.head.bias"],
             "head_modulation": w["head.modulation"][0] + time}
    for i in range(config.num_layers):
        block, own, cross = f"blocks.{i}", f"blocks.{i}.self_attn", f"blocks.{i}.cross_attn"
        prompt_k = rms_norm(linear(prompt, f"{cross}.k"), w[f"{cross}.norm_k.weight"], eps=EPS)
        parts = {
            "modulation": w[f"{block}.modulation"][0] + modulation,
            "qkv_weight": torch.cat([w[f"{own}.{x}.weight"] for x in "qkv"]),
            "qkv_bias": torch.cat([w[f"{own}.{x}.bias"] for x in "qkv"]),
            "norm_q": w[f"{own}.norm_q.weight"], "norm_k": w[f"{own}.norm_k.weight"],
            "o_weight": w[f"{own}.o.weight"], "o_bias": w[f"{own}.o.bias"],
            "cross_scale": w[f"{block}.norm3.weight"] - 1, "cross_shift": w[f"{block}.norm3.bias"],
            "cross_q_weight": w[f"{cross}.q.weight"], "cross_q_bias": w[f"{cross}.q.bias"],
            "cross_norm_q": w[f"{cross}.norm_q.weight"],
            "cross_k": heads(prompt_k), "cross_v": heads(linear(prompt, f"{cross}.v")),
            "cross_o_weight": w[f"{cross}.o.weight"], "cross_o_bias": w[f"{cross}.o.bias"],
            "ffn_in_weight": w[f"{block}.ffn.0.weight"], "ffn_in_bias": w[f"{block}.ffn.0.bias"],
            "ffn_out_weight": w[f"{block}.ffn.2.weight"], "ffn_out_bias": w[f"{block}.ffn.2.bias"],
        }
        fused |= {f"{block}.{name}": t for name, t in parts.items()}
    return fused


def fuse_lq(config: FlashVSRConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of lq_proj.LQProjector; in v1 what the second convolution does twice to its input becomes one."""
    fused = {}
    for i in "12":
        fused |= {f"conv{i}_weight": tensors[f"lq.conv{i}.weight"],
                  f"conv{i}_bias": tensors[f"lq.conv{i}.bias"],
                  f"norm{i}": tensors[f"lq.norm{i}.gamma"].flatten()}
    if config.version == "v1":
        fused["conv2_weight"] = fold_repeat(_wide(fused["conv2_weight"]))
    return fused | {"linear_weight": tensors["lq.linear_layers.0.weight"],
                    "linear_bias": tensors["lq.linear_layers.0.bias"]}


def fuse_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of decoder.Decoder: the official numbering becomes names; growth in time, nearest enlargement and the
    convolution behind them become one set of weights, computed in float32. Differentiable.
    """
    def take(name: str) -> Tensor:
        return tensors[f"decoder.decoder.{name}"]
    fused = {"in_weight": take("1.weight"), "in_bias": take("1.bias"), "mid_weight": take("3.weight"),
             "out1_weight": take("24.weight"), "out2_weight": take("26.weight"), "out2_bias": take("26.bias")}
    for i, (first, grow, conv) in enumerate(_STAGES):
        for j in range(3):
            for k in range(3):
                fused[f"stages.{i}.memory.{j}.weight{k + 1}"] = take(f"{first + j}.conv.{2 * k}.weight")
                fused[f"stages.{i}.memory.{j}.bias{k + 1}"] = take(f"{first + j}.conv.{2 * k}.bias")
        fused[f"stages.{i}.folded"] = fold_upsample(_wide(take(f"{conv}.weight")),
                                                    _wide(take(f"{grow}.conv.weight")).flatten(1))
    return fused


def _wide(t: Tensor) -> Tensor:
    """What is computed from weights is rounded once, to the model's dtype, not to the file's before."""
    return t if t.dtype == torch.float64 else t.float()


def round_taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype. The taps of decoder convolutions, (O, C, 3, 3) or folded (T, 2, 2, O, 2, 2, C), take over the
    rounding errors of the taps before them, so that their sum is right: pictures are mostly smooth. In bf16 that
    brings compact's decoder 1.3 dB nearer to the float32 one, to 50.7 dB.
    """
    if weight.ndim not in (4, 7) or dtype == weight.dtype:
        return weight.to(dtype)
    first = 2 if weight.ndim == 4 else 4
    taps = weight.movedim((first, first + 1), (0, 1)).flatten(0, 1)
    rounded, error = torch.empty_like(taps, dtype=dtype), torch.zeros_like(taps[0])
    for tap, place in zip(taps, rounded):
        place.copy_(tap + error)
        error += tap - place
    return rounded.unflatten(0, weight.shape[first:first + 2]).movedim((0, 1), (first, first + 1)).contiguous()
