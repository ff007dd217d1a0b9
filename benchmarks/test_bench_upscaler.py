"""A steady chunk of the whole model: `pytest benchmarks/test_bench_upscaler.py --benchmark-only`.

For pytest-benchmark's tables, histograms and saved runs. It does not load the card for a minute: what is
sustained python -m benchmarks.bench_upscaler tells.
"""
import pytest
import torch

from . import roofline
from .cases import DTYPES
from .test_bench_attention import DEVICE, now
from .upscaler_stream import FEWEST, Stream, random_model, usual


@pytest.mark.benchmark(timer=now)
def test_steady_chunk(benchmark):
    case = usual(DEVICE)
    stream = Stream(case, random_model(case.config, case.dtype, DEVICE), FEWEST)
    stream.start()
    parts = roofline.floor(case.config, case.geometry, DTYPES[case.dtype].itemsize)
    benchmark.group = case.key
    benchmark.extra_info |= {"gigaflop": sum(flop for _, flop, _ in parts) / 1e9,
                             "gigabyte": sum(size for *_, size in parts) / 1e9}
    frames = benchmark.pedantic(stream.push, rounds=10, iterations=1, warmup_rounds=1)
    assert frames.dtype == torch.uint8 and frames[-1].float().std() > 1
