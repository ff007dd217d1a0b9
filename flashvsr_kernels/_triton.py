"""Whether Triton kernels can run here."""
import functools
import importlib.util

import torch

OLDEST = (3, 6)
PROCESSORS = 132  # multiprocessors that work is shared out for where there is no GPU: an H100's


def available() -> str | None:
    """None if Triton kernels can run on this machine's current GPU, else the reason in one line."""
    if not _installed():
        return "Triton is not installed (pip install 'triton>=3.6')"
    if not torch.cuda.is_available():
        return "no CUDA device, or this torch is built without CUDA"
    if capability() < 80:
        return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
    return _too_old()  # last: it takes a second


# Asked at each call of an op.
@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old() -> str | None:
    import triton
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < OLDEST:
        return f"needs Triton 3.6, here is {triton.__version__}"
    return None


def hopper_available() -> str | None:
    """As available, for kernels that only Hopper can run."""
    reason = available()
    if reason is None and capability() != 90:
        reason = f"needs compute capability 9.0, {torch.cuda.get_device_name()} has another"
    return reason


def capability(x: torch.Tensor | None = None) -> int:
    """Compute capability of the GPU that x is on, None: of the current one, as one number, 90 for 9.0; 80 for a tensor
    on a CPU, where kernels are interpreted and any will do.
    """
    if x is not None and x.device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(None if x is None else x.device)
    return major * 10 + minor


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, a device with its index; PROCESSORS of any other device."""
    return _processors(device) if device.type == "cuda" else PROCESSORS


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
