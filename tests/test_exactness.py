"""What bf16 and the fused kernels cost: blocks, decoder and whole streams against plain PyTorch and float32."""
from importlib import resources

import av
import pytest
import torch

from flashvsr_kernels import local_window, rope_table
from flashvsr_model import PRESETS, load_upscaler
from flashvsr_model.dit import Block
from flashvsr_model.state import KVRing
from tests import plain
from tests.error_rule import check

FRAMES, SIDE = 41, 96


@pytest.fixture(scope="module")
def frames():
    """(41, 96, 96, 3) uint8, out of the clip that ships with the package."""
    with resources.as_file(resources.files("flashvsr_model") / "data" / "demo.mp4") as path, av.open(str(path)) as file:
        pictures = [frame.to_ndarray(format="rgb24") for _, frame in zip(range(FRAMES), file.decode(video=0))]
    return torch.stack([torch.from_numpy(picture)[20:20 + SIDE, 60:60 + SIDE] for picture in pictures])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def psnr(out, wanted):
    """In dB, of values between 0 and 1."""
    return -10 * (out.double() - wanted.double()).square().mean().log10().item()


def test_decoder_in_bf16(device, frames):
    """At least 50 dB, on latents that the float32 model makes of real frames."""
    upscaler = load_upscaler(device=device, dtype=torch.float32)
    calls, fine, coarse = [], upscaler.decoder, load_upscaler(device=device, dtype=torch.bfloat16).decoder
    hook = fine.register_forward_pre_hook(lambda module, call: calls.append(call[:2]))
    state = upscaler.new_state(SIDE, SIDE)
    upscaler.push(state, frames)
    hook.remove()
    memories = [[[m.to(dtype).zero_() for m in stage] for stage in state.decoder]
                for dtype in (torch.float32, torch.bfloat16)]
    pairs = []
    with torch.no_grad():
        for latent, cond in calls:
            wanted = fine(latent, cond, memories[0])
            got = coarse(latent.bfloat16(), cond, memories[1])
            pairs += [(got_frame, frame) for (got_frame, _), (frame, _) in zip(got, wanted, strict=True)]
    got, wanted = (torch.cat(side) for side in zip(*pairs))
    assert len(got) == 4 * (6 + 2 * 2) and psnr(got, wanted) >= 50


def make_block(dtype, device, layer):
    """One block, what it is given, and a ring with three slices in it. layer: of compact; None: of the official size
    with drawn weights
    """
    config, generator = PRESETS["v1.1" if layer is None else "compact"], torch.Generator().manual_seed(0)
    block = Block(config, 0)

    def drawn(shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(device, dtype)
    for name, p in block.named_parameters():
        fan_in = p.shape[-1] if p.ndim == 2 and "modulation" not in name else 1
        p.data = drawn(p.shape, 0.1 if fan_in == 1 else fan_in ** -0.5) + (1.0 if "norm" in name else 0.0)
    if layer is not None:
        trained = load_upscaler(device=device, dtype=torch.bfloat16).dit.blocks[layer]
        for p, value in zip(block.parameters(), trained.parameters(), strict=True):
            p.data = value.to(dtype)
    rows, cols, L = 16, 24, 2 * 16 * 24  # tokens of a slice
    tables = tuple(rope_table(torch.arange(n), pairs).to(device)
                   for n, pairs in zip((2, rows, cols), config.rope_split))
    ring = KVRing(drawn((1, 1, 4 * L, config.num_heads, config.head_dim)),
                  drawn((1, 1, 4 * L, config.num_heads, config.head_dim)),
                  drawn((1, 1, config.num_heads, 4 * L // 128, config.head_dim)))
    ring.written = 3
    ring.begin(1, L // 128)
    local = local_window(rows // 8, cols // 8, config.local_range, device=device)
    stream, following = [drawn((1, L, config.dim)) for _ in range(2)], (drawn(config.dim, 0.1), drawn(config.dim, 0.1))
    return block, (stream, following, tables, ring, local, 70)


def run(block, call):
    """What the block makes of the stream."""
    block(*call)
    return call[0]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [None, *range(PRESETS["compact"].num_layers)])
def test_block_in_bf16(layer):
    """All kernels of a block together: at most twice the error of plain PyTorch in bf16, against float64."""
    with torch.no_grad(), plain.references():
        block, call = make_block(torch.float64, "cuda", layer)
        with plain.masks_recorded() as masks:
            exact = run(block, call)
        block, call = make_block(torch.bfloat16, "cuda", layer)
        with plain.masks_imposed(masks):
            native = run(block, call)
    assert 0 < masks[0].density() < 1
    block, call = make_block(torch.bfloat16, "cuda", layer)
    with torch.no_grad(), plain.masks_imposed(masks):
        ours = run(block, call)
    for name, *results in zip(("stream", "normed"), ours, native, exact):
        check(*results, name)


@pytest.mark.gpu
def test_stream_in_bf16(frames):
    """At least 48 dB between our kernels and plain PyTorch, both in bf16, with the same block masks."""
    outs = []
    with plain.references(), plain.masks_recorded() as masks:
        outs.append(upscaled(frames))
    with plain.masks_imposed(masks):
        outs.append(upscaled(frames))
    assert any(mask.density() < 0.9 for mask in masks) and psnr(*outs) >= 48


def upscaled(frames):
    upscaler = load_upscaler(device="cuda", dtype=torch.bfloat16)
    state = upscaler.new_state(SIDE, SIDE, out_dtype=torch.float32, graphs=False)  # or masks would be of recordings
    return torch.cat([upscaler.push(state, frames), upscaler.flush(state)])
