"""What aot compiles: calls of every Triton and Gluon launcher, on tensors without memory."""
import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .block_mask import BLOCK

CALLS = (("bf16 D 128", torch.bfloat16, 128, 8448, 33792), ("fp16 D 128", torch.float16, 128, 8448, 33792),
         ("bf16 D 64", torch.bfloat16, 64, 8448, 33792), ("fp16 D 64", torch.float16, 64, 8448, 33792),
         ("bf16 D 128, partial blocks", torch.bfloat16, 128, 8447, 33791))


def launches(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each launcher, at the size the model runs most: 12 heads, 8448 queries, 33792 keys."""
    for what, dtype, D, Lq, Lk in CALLS:
        q, k = (meta(dtype, 1, L, 12, D) for L in (Lq, Lk))
        lists, lse = _lists(-(-Lq // BLOCK), -(-Lk // BLOCK)), meta(torch.float32, 1, 12, Lq)
        forward, backward = (q, k, k, *lists, D ** -0.5), (q, q, k, k, q, lse, *lists, D ** -0.5)
        yield f"forward {what}", partial(_launch, "sparse_attn_triton", "forward", *forward)
        yield f"backward {what}", partial(_launch, "sparse_attn_backward", "backward", *backward)
        if arch == 90:
            yield f"hopper {what}", partial(_launch, "sparse_attn_hopper", "forward", *forward)
            yield (f"hopper backward {what}",
                   partial(_launch, "sparse_attn_backward_hopper", "backward", *backward))
    index, count = _lists(66, 264)[:2]
    for dtype, S, slices, D in ((torch.bfloat16, 66, 1, 128), (torch.bfloat16, 66, 3, 64),
                                (torch.bfloat16, 480, 1, 128), (torch.float16, 66, 1, 128),
                                (torch.float32, 66, 1, 128)):
        means, local = [meta(dtype, 1, 12, n * S, D) for n in (slices, 4)], meta(torch.bool, S, S)
        yield (f"selection {dtype} {slices * S}x{4 * S} D {D}",
               partial(_launch, "block_mask_triton", "lcsa_mask", *means, local, slices, 120 * S))
    yield "lists", partial(_launch, "block_mask_triton", "block_lists", meta(torch.bool, 1, 12, 66, 264))
    yield "transposed lists", partial(_launch, "block_mask_triton", "transpose_lists", index, count, 264)
    yield from _convolutions("conv3x3", "conv3x3_triton")
    yield from _projector("conv3d", "conv3d_triton")
    if arch == 90:
        yield from _convolutions("hopper conv3x3", "conv3x3_hopper")
        yield from _projector("hopper conv3d", "conv3d_hopper")
        yield from _head("hopper rgb_head", "rgb_head_hopper")
    yield from _pixels("pixels_triton")
    yield from _around_attention("norm_triton", "rope_triton")


def _convolutions(op: str, module: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of the decoder: with all that can be fused, some of it and none, whole chunks of channels and parts."""
    for what, dtype, height, width, C, O, biased, fused in (
            ("128 fused", torch.bfloat16, 768, 1408, 128, 128, True, True),
            ("128 biased", torch.bfloat16, 768, 1408, 128, 128, True, False),
            ("64 fused", torch.float16, 180, 320, 64, 64, True, True),
            ("136 to 64", torch.float16, 90, 160, 136, 64, False, False),
            ("784 to 512", torch.float16, 96, 176, 784, 512, False, False)):
        x, out = (meta(dtype, 2, height, width, channels) for channels in (C, O))
        bias, past, residual = meta(dtype, O) if biased else None, *((x, out) if fused else (None, None))
        weight = meta(dtype, O, 3, 3, C if past is None else 2 * C).permute(0, 3, 1, 2)
        call = x, weight, bias, past, residual, biased
        yield f"{op} {what}", partial(_launch, module, "conv3x3", *call)
    for what, dtype, C, O, T in (("512 to 256 enlarged", torch.bfloat16, 512, 256, 1),
                                 ("32 to 16 grown", torch.bfloat16, 32, 16, 2)):
        if O % 64 and module == "conv3x3_hopper":
            continue
        call = meta(dtype, 2, 96, 176, C), meta(dtype, T, 2, 2, O, 2, 2, C), T == 2
        yield f"{op} {what}", partial(_launch, module, "upsample_conv", *call)


def _head(op: str, module: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The decoder's end, and a narrower one of more channels inside."""
    for dtype, D, E in ((torch.bfloat16, 128, 128), (torch.float16, 128, 64)):
        folded, weights = meta(dtype, 1, 2, 2, D, 2, 2, 128), [meta(dtype, O, 3, 3, C) for O, C in ((E, D), (3, E))]
        call = meta(dtype, 1, 384, 704, 128), folded, *(w.permute(0, 3, 1, 2) for w in weights), meta(dtype, 3)
        yield f"{op} {D} to {E}", partial(_launch, module, "rgb_head", *call, (0, 0, 768, 1408), torch.float32, True)


def _projector(op: str, module: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """One of the projector's layers and one of the compact projector's, without the norm."""
    for dtype, C, O, norm in ((torch.bfloat16, 768, 2048, True), (torch.float16, 48, 48, False)):
        x, tail = (meta(dtype, 1, T, 96, 176, C) for T in (4, 2))
        weight = meta(dtype, O, 4, 3, 3, C).permute(0, 4, 1, 2, 3)
        call = x, weight, meta(dtype, O), tail, meta(dtype, O) if norm else None
        yield f"{op} {C} to {O}", partial(_launch, module, "forward", *call)


def _pixels(module: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Both ends of the model, and the compact one's, whose picture is part of what is decoded."""
    for dtype, T, size, bound in ((torch.uint8, 1, 16, None), (torch.uint8, 4, 8, 3.0), (torch.bfloat16, 4, 8, 3.0)):
        out = meta(torch.bfloat16, 1, 768 // size, 1408 // size, 3 * T * size ** 2 + 16)[..., :-16]
        yield (f"pixel_unshuffle {dtype} {size}",
               partial(_launch, module, "pixel_unshuffle", meta(dtype, 1, T, 768, 1408, 3), size, bound, out))
    yield "enlarge", partial(_launch, module, "enlarge", meta(torch.uint8, 8, 192, 352, 3))
    moments = meta(torch.float64, 4, 2, 3)
    for dtype, C, height, width in ((torch.bfloat16, 128, 768, 1408), (torch.float16, 128, 768, 1408),
                                    (torch.bfloat16, 16, 720, 1280)):
        x, weight, bias = meta(dtype, 4, 768, 1408, C), meta(dtype, 3, C, 3, 3), meta(dtype, 3)
        call = x, weight.contiguous(memory_format=torch.channels_last), bias, (0, 0, height, width), dtype
        yield f"rgb_conv {dtype} C {C}", partial(_launch, module, "rgb_conv", *call)
        rgb = meta(dtype, 4, 768, 1408, 3)[:, :height, :width]
        for out_dtype in (torch.uint8, torch.float32):
            yield (f"adain_uint8 {dtype} {height} rows {out_dtype}",
                   partial(_launch, module, "adain_uint8", rgb, moments, moments, out_dtype, False))


def _around_attention(norm: str, rope: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Norms, adds and rotary position: of the official model, as wide as can be, and of the compact model."""
    for dtype, H, D in ((torch.bfloat16, 12, 128), (torch.float32, 12, 128), (torch.bfloat16, 16, 128),
                        (torch.bfloat16, 2, 64)):
        C, side, what = H * D, D // 6, f"{dtype} {H} x {D}"
        x, vector, out = meta(dtype, 1, 8448, C), meta(dtype, C), meta(dtype, 1, 8448, H, D)
        qkv, slot = meta(dtype, 1, 8448, 3 * C), meta(dtype, 1, 4 * 8448, H, D)[:, 8448:2 * 8448]
        tables = [meta(torch.complex64, *shape) for shape in ((2, D // 2 - 2 * side), (48, side), (88, side))]
        yield (f"qkv_norm_rope {what}",
               partial(_launch, rope, "qkv_norm_rope", qkv, vector, vector, tables, D, 1e-6, out, slot, slot))
        yield f"rms_norm {what}", partial(_launch, norm, "rms_norm", x, vector, 1e-6)
        yield f"layer_norm_modulate {what}", partial(_launch, norm, "layer_norm_modulate", x, vector, vector, 1e-6)
        yield (f"gated_add_norm {what}",
               partial(_launch, norm, "gated_add_norm", x, x, vector, vector, vector, 1e-6))
    yield "qk_norm_rope", partial(_launch, rope, "qk_norm_rope", qkv[..., C:2 * C], vector, tables, D, 1e-6, slot)
    x, vector = meta(torch.float16, 1001, 5000), meta(torch.float16, 5000)
    yield "gated_add", partial(_launch, norm, "gated_add", x, x, vector)
    yield "gated_add_norm wide", partial(_launch, norm, "gated_add_norm", x, x, None, vector, vector, 1e-6)


def _launch(module: str, function: str, *arguments: object) -> None:
    getattr(importlib.import_module(f"{__package__}.{module}"), function)(*arguments)


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor for launches: shape and strides, no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _lists(Mq: int, Mk: int) -> tuple[Tensor, Tensor, Tensor]:
    """index, count and order of 12 heads."""
    return meta(torch.int32, 1, 12, Mq, Mk), meta(torch.int32, 1, 12, Mq), meta(torch.int32, 12 * Mq)
