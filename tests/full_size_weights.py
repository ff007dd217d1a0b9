"""python -m tests.full_size_weights DIR [--device cuda] [--small]: random weights of the official sizes.

Writes 6.4 GB of files with the official names, shapes and types to DIR, loads them with load_upscaler, and
upscales two chunks of a small picture. --small does it with narrow layers, to try the script itself.
"""
import argparse, dataclasses, math, resource, time, zlib
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from flashvsr_model.config import PRESETS, FlashVSRConfig
from flashvsr_model.fuse import expected_shapes
from flashvsr_model.weights import load_upscaler

SMALL = dict(dim=128, num_heads=2, num_layers=2, ffn_dim=96, text_dim=16, freq_dim=32, context_len=5,
             lq_hidden=(24, 40), decoder_channels=(16, 12, 8, 8))


def random_tensors(config: FlashVSRConfig) -> dict[str, torch.Tensor]:
    """Every official tensor in float32, scaled to keep activations near 1: one random block, tiled."""
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # prime: rows do not repeat
    tensors = {}
    for name, shape in expected_shapes(config).items():
        size, start = math.prod(shape), zlib.crc32(name.encode()) % len(block)
        z = block.roll(-start).repeat(-(-size // len(block)))[:size].reshape(shape)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight", "gamma")):
            tensors[name] = 1 + 0.1 * z
        else:
            small = name.endswith("bias") or "modulation" in name
            tensors[name] = z * (0.05 if small else 1 if name == "context" else math.prod(shape[1:]) ** -0.5)
    return tensors


def write_official(folder: Path, config: FlashVSRConfig) -> None:
    """The four files that load_official reads, of random values."""
    tensors = random_tensors(config)
    parts = {prefix: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
             for prefix in ("dit.", "lq.", "decoder.")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parts["dit."], folder / "diffusion_pytorch_model_streaming_dmd.safetensors")
    torch.save({name: t.bfloat16() for name, t in parts["lq."].items()}, folder / "LQ_proj_in.ckpt")
    torch.save(parts["decoder."], folder / "TCDecoder.ckpt")
    torch.save(tensors["context"].bfloat16(), folder / "posi_prompt.pth")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args(arguments)
    config = dataclasses.replace(PRESETS["v1.1"], **(SMALL if args.small else {}))
    with mock.patch.dict(PRESETS, {"v1.1": config}):
        start = time.perf_counter()
        write_official(args.folder, config)
        size = sum(file.stat().st_size for file in args.folder.iterdir())
        print(f"written  {size:,} bytes, {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        upscaler = load_upscaler(args.folder, version="v1.1", device=args.device, dtype=torch.bfloat16)
        print(f"loaded   {upscaler.device} {upscaler.dtype}, {time.perf_counter() - start:.1f} s")
    state = upscaler.new_state(64, 64, out_dtype=torch.float32)
    frames = torch.rand(33, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    out = [upscaler.push(state, frames).cpu(), upscaler.flush(state).cpu()]
    seconds = time.perf_counter() - start
    print(f"upscaled {tuple(out[0].shape)} pushed, {tuple(out[1].shape)} flushed, {seconds:.1f} s")
    out = torch.cat(out)
    finite = bool(out.isfinite().all())
    print(f"result   {tuple(out.shape)}, finite {finite}, mean {out.mean():.3f}, std {out.std():.3f}")
    gpu = torch.cuda.max_memory_allocated() / 1e9 if upscaler.device.type == "cuda" else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak     {host:.2f} GB on the host, {gpu:.2f} GB on the GPU")
    if out.shape != (33, 256, 256, 3) or not finite or out.std() < 0.01:
        raise SystemExit("wrong result")


if __name__ == "__main__":
    main()
