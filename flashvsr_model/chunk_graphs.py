"""A stream's steady chunk as CUDA graphs: a thousand kernels started by one call."""
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class ChunkGraphs:
    """Recordings of functions of tensors, by a key. All use the same memory beside their inputs, so one must not run
    beside another; results have one shape and dtype for all keys, and what a call returns is a copy.

    seconds: spent on recording
    """

    def __init__(self):
        self.seconds = 0.0
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool = None
        self._result: Tensor | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def run(self, key: Hashable, compute: Callable[..., list[Tensor]], *inputs: Tensor) -> Tensor:
        """torch.cat(compute(*inputs)), recorded at the first call with the key. Whatever else compute reads or writes
        must stay where it is, and compute must have run before: what is compiled or allocated once cannot be
        recorded. inputs have the same shapes and dtypes in all calls with the key.
        """
        if key not in self._graphs:
            self._graphs[key] = self._record(compute, inputs)
        graph, places = self._graphs[key]
        for place, value in zip(places, inputs):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return self._result.clone()

    def _record(self, compute: Callable[..., list[Tensor]],
                inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        began = time.perf_counter()
        places, graph = [torch.empty_like(value) for value in inputs], torch.cuda.CUDAGraph()
        # thread_local: a thread that fetches earlier results meanwhile is not in the recording's way
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            parts = compute(*places)
            if self._result is None:
                self._result = torch.cat(parts)
            else:
                torch.cat(parts, out=self._result)
        self._pool = graph.pool()
        self.seconds += time.perf_counter() - began
        return graph, places
