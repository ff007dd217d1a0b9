"""What a CUDA graph captured is replayed for other values in the same memory."""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def check_replays(launch: Callable[[], tuple[Tensor, ...]], inputs: Iterable[Tensor]) -> None:
    """Three times: inputs, which launch reads, become random, and a replay must give what launch then gives."""
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch()
    for _ in range(3):
        for x in inputs:
            x.normal_()
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, launch(), strict=True))
