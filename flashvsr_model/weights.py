"""Weights to model: the official FlashVSR files, told apart by hash, and the package's own compact format.

Every tensor of a file is used or named in an error, and every tensor of the model comes from a file."""
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import Checkpoint, WeightsError, check_layout, listed
from .config import PRESETS, FlashVSRConfig
from .fuse import expected_shapes
from .upscaler import StreamingUpscaler

log = logging.getLogger(__name__)
VERSIONS = ("v1", "v1.1")
RUN_TIME = ("sparse_ratio", "local_range", "kv_slices", "edge", "color", "seed", "noise", "exact_upstream",
            "rope_positions", "margin")


@dataclass(frozen=True)
class Known:
    """A published file: the versions whose release holds it, its size in bytes and its sha256."""
    versions: tuple[str, ...]
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One file of an official folder.

    prefix: what our tensor names put before the file's own, or the whole name of the prompt's tensor;
    None marks a file that this model does not read
    """
    what: str
    prefix: str | None
    known: tuple[Known, ...]


# Hashes of v1.1 (JunhaoZhuang/FlashVSR-v1.1, revision 27561b18). v1 (JunhaoZhuang/FlashVSR) has the same file
# names and shapes; its DiT and LQ projector differ, but their sizes and hashes are not known here, so a v1
# folder needs version="v1". TC decoder and VAE are reported to be identical in both (by one user, in
# lihaoyun6/ComfyUI-FlashVSR_Ultra_Fast#62); the prompt is part of the official code and serves both.
OFFICIAL = {
    "diffusion_pytorch_model_streaming_dmd.safetensors": Part("DiT, 825 tensors, fp32", "dit.", (Known(
        ("v1.1",), 5_676_070_392, "bd28180edcf3446c028e32fc6b731a80bf7e4da2ab4caac3186b9499964d37be"),)),
    "LQ_proj_in.ckpt": Part("LQ projector, 8 tensors, bf16", "lq.", (Known(
        ("v1.1",), 575_694_948, "d6d011cdaaba6a52645086caa08fa04124e746f6ca568140a24007591142bfd2"),)),
    "TCDecoder.ckpt": Part("TC decoder, 66 tensors, fp32", "decoder.", (Known(
        VERSIONS, 189_018_333, "e224bdcf2f52745cbf4d393ff5374c2ba09e90285d5d19062d2bf63b915b6161"),)),
    "posi_prompt.pth": Part("prompt, one bf16 tensor (1, 512, 4096)", "context", (Known(
        VERSIONS, 4_195_504, "4601107a11e4e11a936a6b79df579e54dbc99872132bf542151f0ffd65b4b1ef"),)),
    "Wan2.1_VAE.pth": Part("Wan 2.1 VAE, 194 tensors, fp32, not read by this model", None, (Known(
        VERSIONS, 507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),)),
}


@dataclass(frozen=True)
class FileRecord:
    """What `verify` found out about one file. problem: None, or one line that says why it cannot be used."""
    file: str
    size: int | None
    sha256: str | None
    what: str
    problem: str | None


def verify(path: str | Path) -> list[FileRecord]:
    """What each file of a folder with official weights is: hashed whole, tensor names and shapes checked.

    path: the folder, or one file
    Returns a record a file, first those of OFFICIAL (also one that is needed but missing), then other files
    that look like weights. Raises WeightsError if there is nothing to verify.
    """
    path = Path(path)
    if path.is_file():
        return [_inspect(path)]
    _require_folder(path)
    files = {name: path / name for name in OFFICIAL}
    records = [_inspect(at) if at.is_file() else FileRecord(name, None, None, OFFICIAL[name].what, "missing")
               for name, at in files.items() if at.is_file() or name in _needed()]
    records += [_inspect(at) for at in sorted(path.iterdir()) if at.is_file() and at.name not in OFFICIAL
                and at.suffix in (".safetensors", ".ckpt", ".pth", ".pt", ".bin")]
    if all(record.size is None for record in records):
        raise WeightsError(f"{path} holds no weights; {listed('expected files', _needed())}")
    fitting, told, _ = _claims({record.file: record.sha256 for record in records if record.file in _needed()})
    if not fitting:
        mixed = f"mixed versions ({_said(told)}): take all files from one release"
        records = [replace(record, problem=record.problem or mixed) if record.file in told else record
                   for record in records]
    return records


def load_official(folder: str | Path, version: str | None = None, *,
                  device: torch.device | str = "cpu") -> tuple[FlashVSRConfig, dict[str, Tensor]]:
    """The config and all tensors of a folder with the official files, with the names of `expected_shapes`.

    version: "v1" or "v1.1"; None tells it by the files' hashes. Needed for files that OFFICIAL does not know.
    device: where each tensor goes as it is read, one at a time; all keep the dtype of the file
    Raises WeightsError on missing files, missing, unexpected or misshapen tensors, parts of different
    versions, unknown hashes without version=, damaged files, and pickles that ask for code.
    """
    folder = Path(folder)
    _require_folder(folder)
    if version not in (None, *VERSIONS):
        raise WeightsError(f'version must be "v1", "v1.1" or None, got {version!r}')
    missing = [name for name in _needed() if not (folder / name).is_file()]
    if missing:
        hint = "; the prompt comes with the official code, not its weights" * ("posi_prompt.pth" in missing)
        raise WeightsError(f"{folder}: {listed('missing files', missing)}; "
                           f"{listed('expected', _needed())}{hint}", missing)
    parts = {name: Checkpoint(folder / name) for name in _needed()}
    for name, checkpoint in parts.items():  # names and shapes before hashes: at once, not after seconds
        checkpoint.check(_expected(OFFICIAL[name].prefix))
    config = PRESETS[_decide_version(folder, {name: _sha256(folder / name) for name in parts}, version)]
    tensors = {}
    for name, checkpoint in parts.items():
        log.info("reading %s as %s", checkpoint.path, config.version)
        prefix = OFFICIAL[name].prefix
        tensors |= {prefix + key: checkpoint.tensor(key, device) for key in checkpoint.layout}
    return config, tensors


def load_compact(path: str | Path | None = None, *,
                 device: torch.device | str = "cpu") -> tuple[FlashVSRConfig, dict[str, Tensor]]:
    """The config and all tensors of a file of `save_compact`; path None takes the one of the package.

    device: where the tensors go; all keep the dtype of the file
    Raises WeightsError if the file is missing, damaged, of another format, or not what its config says.
    """
    if path is None:
        with resources.as_file(resources.files(__package__) / "data" / "compact.safetensors") as shipped:
            if not shipped.is_file():
                raise WeightsError(f"this installation has no compact weights ({shipped}): install it again")
            return load_compact(shipped, device=device)
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f'no file {path}; weights are "compact", a folder with the official files '
                           f"({', '.join(_needed())}), or a file of save_compact")
    checkpoint = Checkpoint(path)
    config = _config(checkpoint)
    checkpoint.check(expected_shapes(config))
    return config, {name: checkpoint.tensor(name, device) for name in checkpoint.layout}


def save_compact(path: str | Path, config: FlashVSRConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes config and tensors as one safetensors file for `load_compact`; path changes when all is written.

    tensors: all of expected_shapes(config), each stored in its own dtype (float32, bfloat16 or float16)
    Raises WeightsError on missing, unexpected or misshapen tensors and on values that are not finite.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    check_layout(layout, expected_shapes(config), str(path))
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise WeightsError(f"{path}: {listed('not finite', bad)}", bad)
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()},
                  str(part), metadata={"config": json.dumps(asdict(config), sort_keys=True)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def load_upscaler(weights: str | Path = "compact", *, device: torch.device | str | None = None,
                  dtype: torch.dtype | None = None, version: str | None = None,
                  **overrides: object) -> StreamingUpscaler:
    """A model that is ready for new_state and push.

    weights: "compact" (ships with the package), a folder with the official files, or a file of `save_compact`
    device: None takes "cuda" where there is a GPU, else "cpu"
    dtype: of weights and activations; None takes bfloat16 on cuda, float32 on the CPU
    version: "v1" or "v1.1", for official files whose hashes are not in OFFICIAL
    overrides: fields of FlashVSRConfig that RUN_TIME lists
    Raises TypeError on another override, ValueError on a bad value, WeightsError (a ValueError) on bad files.
    """
    unknown = [name for name in overrides if name not in RUN_TIME]
    if unknown:
        fixed = [name for name in unknown if name in FlashVSRConfig.__dataclass_fields__]
        raise TypeError(f"load_upscaler cannot set {', '.join(unknown)}; it can set {', '.join(RUN_TIME)}"
                        + (f" ({', '.join(fixed)}: fixed by the weights)" if fixed else ""))
    try:
        device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device must be one that PyTorch knows, got {device!r}: {why}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got "{device}"')
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device must be "cpu" where torch sees no CUDA GPU, got "{device}"')
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if weights != "compact" and Path(weights).is_dir():
        config, tensors = load_official(weights, version, device=device)
    else:
        config, tensors = load_compact(None if weights == "compact" else weights, device=device)
        if version not in (None, config.version):
            raise WeightsError(f'version must be "{config.version}" or None, which {weights} says of itself, '
                               f"got {version!r}")
    return StreamingUpscaler.from_tensors(replace(config, **overrides), tensors, device=device, dtype=dtype)


def _needed() -> list[str]:
    return [name for name, part in OFFICIAL.items() if part.prefix is not None]


def _expected(prefix: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes inside an official file; the versions do not differ in them."""
    shapes = expected_shapes(PRESETS["v1.1"])
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise WeightsError(f"there is no folder {path}; {listed('it must hold the official', _needed())}")


def _sha256(path: Path) -> str:
    log.info("hashing %s, %.2f GB", path, path.stat().st_size / 1e9)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _known(name: str, sha256: str | None) -> Known | None:
    return next((known for known in OFFICIAL[name].known if known.sha256 == sha256), None)


def _claims(sums: Mapping[str, str | None]) -> tuple[list[str], dict[str, str], list[str]]:
    """From {file: sha256}: versions that fit all known files, {file: version} by hash, the unknown files."""
    known = {name: _known(name, sha) for name, sha in sums.items()}
    fitting = [v for v in VERSIONS if all(v in one.versions for one in known.values() if one)]
    told = {name: one.versions[0] for name, one in known.items() if one and len(one.versions) == 1}
    return fitting, told, [name for name, one in known.items() if one is None]


def _said(told: Mapping[str, str]) -> str:
    return ", ".join(f"{name} is {version}'s by its hash" for name, version in told.items())


def _decide_version(folder: Path, sums: Mapping[str, str], version: str | None) -> str:
    """The version of all files, by their hashes; for those with unknown ones, by the caller's word."""
    fitting, told, unknown = _claims(sums)
    if not fitting:
        raise WeightsError(f"{folder}: {_said(told)}, and parts of different versions must not be mixed (the "
                           "picture would ghost): take all files from one release", list(told))
    if version is not None and version not in fitting:
        raise WeightsError(f'{folder}: {_said(told)}, so version must be "{fitting[0]}" or None, got '
                           f"{version!r}; parts of different versions must not be mixed", list(told))
    if unknown and version is None:
        hashes = [f"{name} ({sums[name][:12]}...)" for name in unknown]
        choice = " or ".join(f'version="{fit}"' for fit in fitting)
        known = f"; {_said(told)}" if told else ""
        raise WeightsError(f"{folder}: {listed('unknown sha256', hashes)}{known}; parts of v1 and v1.1 must "
                           f"not be mixed: say which with {choice}, on the command line with --model-version (v1's "
                           "hashes are unknown)", unknown)
    return version or fitting[0]


def _inspect(path: Path) -> FileRecord:
    """The record of one file that exists."""
    part, sha, size, problem = OFFICIAL.get(path.name), _sha256(path), path.stat().st_size, None
    known = _known(path.name, sha) if part else None
    if known:
        what = f"{part.what}; {' and '.join(known.versions)}"
    elif part:
        sizes = " or ".join(f"{one.size:,} in {' and '.join(one.versions)}" for one in part.known)
        what = f"{part.what}; unknown sha256, loads only with version= or --model-version (bytes: {size:,}; {sizes})"
    else:
        what = "not an official file"
    try:
        if part and part.prefix is not None:
            Checkpoint(path).check(_expected(part.prefix))
        elif not part:
            checkpoint = Checkpoint(path)
            config = _config(checkpoint)
            count = len(checkpoint.layout)
            what = f"compact format, {count} tensors, {config.version} projector, dim {config.dim}"
            checkpoint.check(expected_shapes(config))
    except WeightsError as error:
        problem = str(error)
    return FileRecord(path.name, size, sha, what, problem)


def _config(checkpoint: Checkpoint) -> FlashVSRConfig:
    """The config in a compact file's metadata."""
    path = checkpoint.path
    if "config" not in checkpoint.metadata:
        part = "; it is one of the official files: name their folder" * (path.name in OFFICIAL)
        raise WeightsError(f'{path} has no "config" in its metadata, so is not a file of save_compact{part}')
    try:
        values = json.loads(checkpoint.metadata["config"])
        return FlashVSRConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise WeightsError(f"{path} has a config that this version cannot read ({error})") from error
