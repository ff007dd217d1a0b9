"""What can be timed on a case of decoder_cases: our backends, and PyTorch's own operators on cuDNN or oneDNN.

A contestant is made from one or more sets of a case's inputs by a builder, which returns a function without
arguments; what it wants in another layout is made there, outside the clock. On a GPU it is recorded as a CUDA
graph: the model runs so too, and short calls are not the launches' own time. Where memory is what binds,
several sets of inputs take turns, more than a cache holds.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr_kernels import backends, conv3x3

from . import plain
from .decoder_cases import BYTES, Case, Inputs, inputs, ours
from .peers import gemm

OURS = ("hopper", "apart", "triton", "cublas", "cuda", "cpu", "reference")
BACKENDS = {"cuda": ["hopper", "triton", "cuda"], "cpu": ["cpu", "reference"]}
COPIED = {"cuda": 2 ** 28, "cpu": 2 ** 24}  # bytes of the copy whose rate others are held against
COLD = 2 ** 28  # bytes of a contestant's inputs and results together, at least; an L2 has 50 MB
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """call: starts runs runs    alone: why it is not a CUDA graph; None: it is one, or on a CPU
    recorded: what a graph was made of, kept because the graph reads its tensors and does not own them
    """
    call: Callable[[], object]
    runs: int = 1
    alone: str | None = None
    recorded: Callable[[], object] | None = None


def peers(case: Case, device: str) -> list[str]:
    """Of PyTorch's own, the one that ratios are of first, and another form of ours."""
    library = {"cuda": "cudnn", "cpu": "onednn"}[device]

    def applies(name: str) -> bool:
        if name == "hopper-kept":
            return device == "cuda" and case.has("past")
        return name not in ("-cat", "-split") or case.op == "causal_conv3d" or case.has("past")
    return [name if name.startswith(("torch", "im2col", "hopper")) else f"{library}{name}"
            for name in _PEERS[case.op] if applies(name)]


def contestant(name: str, case: Case, sets: list[Inputs]) -> tuple[Tensor, Contestant]:
    """One of OURS or peers, which has run, and what it gave for the first set.

    Raises NotImplementedError with the reasons if it cannot run the case.
    """
    if name in OURS:
        if name not in backends()[case.op]:
            raise NotImplementedError(f"{case.op} has no backend {name}")
        calls = [ours(name, case, given) for given in sets]
    else:
        builder = _PEERS[case.op][name.removeprefix("cudnn").removeprefix("onednn")]
        calls = [builder(*given) for given in sets]
    first = calls[0]()
    return first, captured(lambda: [call() for call in calls], first.device.type, len(calls))


def captured(call: Callable[[], object], device: str, runs: int = 1) -> Contestant:
    """call as a CUDA graph, on a GPU, if it can be one. It must have run before."""
    if device == "cpu":
        return Contestant(call, runs)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # CUDA's, or another package's, whatever it is: said in the row
        torch.cuda.synchronize()
        return Contestant(call, runs, " ".join(str(error).split())[:200])
    return Contestant(graph.replay, runs, recorded=call)


def make_sets(case: Case, device: str) -> list[Inputs]:
    """Inputs to take turns: one set where computing is what binds, and on a CPU."""
    sets = min(16, math.ceil(COLD / case.bytes)) if device == "cuda" and case.op in BYTES else 1
    return [inputs(case, device, seed) for seed in range(sets)]


def yardstick(bound: str, device: str, dtype: str) -> tuple[str, Call, float]:
    """"gemm" and its FLOP for bound "flop", "copy" and the bytes it reads and writes for "bytes"."""
    if bound == "flop":
        return "gemm", *gemm(device, dtype)
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return "copy", lambda: target.copy_(source), 2 * source.nbytes


def _conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, residual: Tensor | None) -> Call:
    """The library's fused convolution alone: what it needs in one tensor is in one."""
    whole = x if past is None else torch.cat([x, past], -1)
    return lambda: plain.conv_relu(whole, weight, bias, residual)


def _conv_cat(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, residual: Tensor | None) -> Call:
    return lambda: plain.conv_relu(torch.cat([x, past], -1), weight, bias, residual)


def _conv_split(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, residual: None) -> Call:
    now, before = (half.contiguous(memory_format=torch.channels_last) for half in weight.chunk(2, 1))
    return lambda: plain.conv_relu(x, now, bias, plain.conv(past, before))


def _conv_kept(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor, residual: None) -> Call:
    """Ours in the other form: not past is kept but its half of the sum, so that this step makes its own half too."""
    now, before = (half.contiguous(memory_format=torch.channels_last) for half in weight.chunk(2, 1))
    kept = conv3x3(past, before, backend="hopper")

    def run() -> Tensor:
        conv3x3(x, before, backend="hopper")
        return conv3x3(x, now, bias, residual=kept, relu=True, backend="hopper")
    return run


def _conv_unfused(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None,
                  residual: Tensor | None) -> Call:
    """As a module is usually written."""
    def run() -> Tensor:
        y = plain.conv(x if past is None else torch.cat([x, past], -1), weight, bias)
        return (y if residual is None else y.add_(residual)).relu_()
    return run


def _grown(x: Tensor, weight: Tensor, grow: Tensor, relu: bool) -> Call:
    return lambda: plain.grown(x, grow, weight, relu)


def _grown_conv(x: Tensor, weight: Tensor, grow: Tensor, relu: bool) -> Call:
    """The 3x3 convolution alone, of enlarged pictures."""
    large = plain.enlarged(x, grow)
    return lambda: plain.conv_relu(large, weight, None, None) if relu else plain.conv(large, weight)


def _behind(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else plain.norm(y, gamma)


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, gamma: Tensor | None) -> Call:
    whole = plain.padded(x, tail)
    return lambda: _behind(plain.conv3d(whole, weight, bias), gamma)


def _conv3d_cat(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, gamma: Tensor | None) -> Call:
    return lambda: _behind(plain.conv3d(plain.padded(x, tail), weight, bias), gamma)


def _im2col(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, gamma: Tensor | None) -> Call:
    return lambda: _behind(plain.im2col(plain.padded(x, tail), weight, bias), gamma)


def _rgb(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    return lambda: plain.conv(x, weight, bias)


def _head(x: Tensor, weight: Tensor, hidden: Tensor, last: Tensor, bias: Tensor) -> Call:
    """Enlarged by nearest neighbour, then three convolutions."""
    def run() -> Tensor:
        large = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
        y = plain.conv_relu(large, weight, None, None)
        return plain.conv(plain.conv_relu(y, hidden, None, None), last, bias)
    return run


def _matched(rgb: Tensor, moments: Tensor, source_moments: Tensor) -> Call:
    source = plain.mean_std(source_moments)
    return lambda: plain.matched(rgb, *source)


def _resized(frames: Tensor) -> Call:
    """Bicubic in float32, which does not round between rows and columns as Pillow does."""
    def run() -> Tensor:
        planes = frames.permute(0, 3, 1, 2).float()
        large = F.interpolate(planes, scale_factor=4.0, mode="bicubic", antialias=True)
        large = large.round_().clamp_(0, 255).permute(0, 2, 3, 1)
        return large.to(torch.uint8, memory_format=torch.contiguous_format)
    return run


# Names are behind the library's, but for those of PyTorch's other operators.
_PEERS: dict[str, dict[str, Callable[..., Call]]] = {
    "conv3x3": {"": _conv, "-cat": _conv_cat, "-split": _conv_split, "-unfused": _conv_unfused,
                "hopper-kept": _conv_kept},
    "upsample_conv": {"": _grown, "-conv": _grown_conv},
    "causal_conv3d": {"": _conv3d, "-cat": _conv3d_cat, "im2col": _im2col},
    "rgb_conv": {"": _rgb}, "rgb_head": {"": _head}, "adain_uint8": {"torch": _matched}, "enlarge": {"torch": _resized}}
