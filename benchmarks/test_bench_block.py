"""The ops of bench_block: `pytest benchmarks/test_bench_block.py --benchmark-only`.

For pytest-benchmark's tables, histograms and saved runs. A contestant runs alone here, so figures of different ones are
not to be compared closely: python -m benchmarks.bench_block takes turns.
"""
import pytest
import torch

from flashvsr_kernels import backends

from .bench_block import grid
from .decoder_peers import captured
from .test_bench_attention import DEVICE, now
from .timing import measure

PAIRS = [(case, name) for case in grid(DEVICE) for name, reason in backends()[case.op].items() if reason is None]


@pytest.mark.benchmark(timer=now)
@pytest.mark.parametrize("case, name", PAIRS, ids=[f"{case.key.replace('/', '-')}-{name}" for case, name in PAIRS])
def test_call(benchmark, case, name):
    with torch.no_grad():
        call = case.call(name, 0, DEVICE)
        try:
            call()
        except NotImplementedError as refusal:
            pytest.skip(" ".join(str(refusal).split()))
        made = captured(call, DEVICE)
        benchmark.group = case.key
        benchmark.extra_info["gigaflop" if case.op == "linear_gelu" else "gigabyte"] = case.amount / 1e9
        calls = max(1, min(100, round(.03 / measure({name: made.call}, DEVICE, 0)[name][0])))
        benchmark.pedantic(made.call, rounds=10, iterations=calls, warmup_rounds=1)
