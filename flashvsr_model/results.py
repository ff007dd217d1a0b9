"""Results on their way from the model to the writer, and how long they took; what a GPU needs for it is here
alone.
"""
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, cuda


class Busy:
    """A stopwatch of one stage, `with busy:` around its work. seconds: spent in it so far."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> "Busy":
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds += time.perf_counter() - self.began


class HostResults:
    """Results that are done when the call that makes them returns. busy: in these calls."""

    def __init__(self):
        self.busy = Busy()

    def run(self, call: Callable[[], Tensor | np.ndarray]) -> np.ndarray:
        with self.busy:
            result = call()
            return result if isinstance(result, np.ndarray) else result.cpu().numpy()

    def frames(self, result: np.ndarray) -> Iterator[np.ndarray]:
        return iter(result)


class CudaResult:
    """A tensor that the GPU is still to fill, with events before and behind that work."""

    def __init__(self, call: Callable[[], Tensor], device: torch.device):
        stream = cuda.current_stream(device)
        # blocking: the thread that waits sleeps, instead of spinning on a core that the encoder needs
        self.begun, self.done = (cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self.begun.record(stream)
        self.frames = call()
        self.done.record(stream)

    def __len__(self) -> int:
        return len(self.frames)


class CudaResults:
    """Results that one thread asks for with `run`, which does not wait, and another fetches with `frames`.

    busy: from when the GPU comes to a call's work, having done what it was given before, until it is done.
        So a GPU that waits for a slow host within a call is busy; one that waits between calls, for frames to
        be read or for room to write, is not. Calls that give no frames do not count.
    """

    def __init__(self, device: torch.device):
        self.busy, self.device = Busy(), device
        self.stream = cuda.Stream(device)
        self.places: list[Tensor] = []          # two frames in pinned memory: one is copied while one is used
        self.copied = [cuda.Event(blocking=True) for _ in range(2)]

    def run(self, call: Callable[[], Tensor]) -> CudaResult:
        """What call gives, (t, H, W, 3) on the GPU, of the same H, W and dtype each time."""
        result = CudaResult(call, self.device)
        if len(result) and not self.places:     # not in frames: this thread may record a CUDA graph meanwhile
            self.places = [_pinned(result.frames[0]) for _ in range(2)]
        return result

    def frames(self, result: CudaResult) -> Iterator[np.ndarray]:
        """Waits for the result and gives its frames; each stays as it is until the next is asked for.

        The memory of the result is free for other work on its own stream as soon as nobody holds the tensor:
        this holds it until the host knows that the last copy is done.
        """
        count = len(result)
        self.stream.wait_event(result.done)
        for number in range(count + 1):
            if number < count:                  # its place was used two frames ago
                self._copy(result.frames[number], number % 2)
            if number:
                self.copied[(number - 1) % 2].synchronize()
                if number == 1:                 # the copy was behind both events
                    self.busy.seconds += result.begun.elapsed_time(result.done) / 1000
                yield self.places[(number - 1) % 2].numpy()

    def _copy(self, frame: Tensor, place: int) -> None:
        with cuda.stream(self.stream):
            self.places[place].copy_(frame, non_blocking=True)
            self.copied[place].record(self.stream)


def results_of(device: torch.device) -> HostResults | CudaResults:
    """What takes the results of a model on device."""
    return CudaResults(device) if device.type == "cuda" else HostResults()


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
