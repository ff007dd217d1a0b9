"""One file of tensors, read strictly and without running anything in it: safetensors, or a torch pickle."""
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS_FLOATS = dict(zip(("F32", "BF16", "F16"), FLOATS))
NAMED = 8  # names an error message spells out before it only counts


class WeightsError(ValueError):
    """One line: what is wrong with a file of weights, and what would be right.

    names: every tensor or file the message is about, also those that it only counts
    """
    def __init__(self, message: str, names: list[str] | tuple[str, ...] = ()):
        super().__init__(" ".join(message.split()))
        self.names = tuple(names)


class Checkpoint:
    """A file's tensor names, shapes and dtypes; the values stay on disk until `tensor` is called.

    path: a safetensors file, or a torch pickle of a flat dict of tensors or of one bare tensor (named "")
    layout: {name: (dtype, shape)}; metadata: a safetensors file's {str: str}
    Raises WeightsError if the file is neither, cannot be read, is damaged, or is a pickle that asks for code.
    """
    def __init__(self, path: Path):
        self.path, self.metadata, self._tensors = path, {}, None
        head = _head(path)
        if head[:2] == b"PK" or head[0] == 0x80:  # a zip of torch.save, or a pickle without one
            self._tensors = _unpickle(path, zipped=head[:2] == b"PK")
            self.layout = {name: (t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
            return
        try:
            self._file = safe_open(str(path), "pt")
        except SafetensorError as error:
            kind = "truncated or damaged safetensors" if head[8:9] == b"{" else "no safetensors or torch file"
            raise WeightsError(f"{path} ({path.stat().st_size:,} bytes) is {kind} ({error})") from error
        self.metadata, self.layout = self._file.metadata() or {}, {}
        for name in self._file.keys():
            part = self._file.get_slice(name)
            kind = part.get_dtype()
            self.layout[name] = SAFETENSORS_FLOATS.get(kind, kind), tuple(part.get_shape())

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises WeightsError unless the file holds exactly the tensors of expected (name: shape)."""
        check_layout(self.layout, expected, str(self.path))

    def tensor(self, name: str, device: torch.device | str) -> Tensor:
        """A contiguous copy of one tensor on device, in the file's dtype; it does not refer to the file."""
        tensor = self._file.get_tensor(name) if self._tensors is None else self._tensors[name]
        return tensor.detach().to(device, copy=True).contiguous()


def check_layout(layout: Mapping[str, tuple], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises WeightsError naming each missing, unexpected, misshapen or non-float tensor.

    layout: {name: (dtype, shape)}; expected: {name: shape}; where: what the message begins with
    """
    missing = [name for name in expected if name not in layout]
    extra = [name for name in layout if name not in expected]
    both = [(name, *layout[name]) for name in expected if name in layout]
    shapes = {name: f"{name} must be {tuple(expected[name])}, got {tuple(shape)}"
              for name, _, shape in both if tuple(shape) != tuple(expected[name])}
    types = {name: f"{name} must be float32, bfloat16 or float16, got {dtype}" for name, dtype, _ in both
             if dtype not in FLOATS}
    faults = [listed("missing", missing), listed("unexpected", extra),
              listed("wrong shapes", list(shapes.values())), listed("wrong types", list(types.values()))]
    if any(faults):
        raise WeightsError(f"{where}: {'; '.join(filter(None, faults))} ({len(expected)} tensors expected, "
                           f"{len(layout)} found)", [*missing, *extra, *shapes, *types])


def listed(title: str, names: list[str]) -> str:
    """'title: a, b, c and 9 more', or '' if there are no names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{title}: {', '.join(names[:NAMED])}{more}" if names else ""


def _head(path: Path) -> bytes:
    """The first bytes of a file that can hold tensors."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise WeightsError(f"{path} is empty, not a file of weights")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if b"\0" not in head and head[0] < 0x80:
        raise WeightsError(f"{path} is a text file, not a file of weights")
    return head


def _unpickle(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    """The tensors of a torch pickle, memory-mapped if it is a zip; a bare tensor is named ""."""
    if zipped and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path} ({path.stat().st_size:,} bytes) is a truncated or damaged torch file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:  # an unpickler fed with damaged bytes raises nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise WeightsError(f"{path} is a pickle that asks for code ({code[1]}) and was not loaded: "
                               "it may hold plain tensors only") from error
        raise WeightsError(f"{path} is not a torch file of plain tensors, or is damaged "
                           f"({type(error).__name__}: {str(error)[:100]})") from error
    tensors = {"": content} if isinstance(content, Tensor) else content
    if not isinstance(tensors, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; it must hold a flat dict of tensors")
    other = {str(name): f"{name} ({type(value).__name__})" for name, value in tensors.items()
             if not isinstance(value, Tensor) or not isinstance(name, str)}
    if other:
        raise WeightsError(f"{path}: {listed('not tensors', list(other.values()))}; it must hold a flat dict "
                           "of tensors", list(other))
    return tensors
