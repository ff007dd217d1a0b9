"""The calls of bench_decoder: `pytest benchmarks/test_bench_decoder.py --benchmark-only`.

For pytest-benchmark's tables, histograms and saved runs. A contestant runs alone here, so figures of
different ones are not to be compared closely: python -m benchmarks.bench_decoder and check take turns.
"""
import pytest
import torch

from .bench_decoder import WORST
from .decoder_cases import BYTES, Case, error, exact, grid
from .decoder_peers import BACKENDS, contestant, make_sets, peers
from .test_bench_attention import DEVICE, now
from .timing import measure

PAIRS = [(case, name) for case in grid(DEVICE) for name in (*BACKENDS[DEVICE], *peers(case, DEVICE))]


@pytest.fixture(scope="module")
def sets() -> dict[Case, tuple]:
    """The inputs of the case at hand and its result, kept from one contestant to the next."""
    return {}


@pytest.mark.benchmark(timer=now)
@pytest.mark.parametrize("case, name", PAIRS,
                         ids=[f"{case.key.replace('/', '-')}-{name}" for case, name in PAIRS])
def test_call(benchmark, sets, case, name):
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        if case not in sets:
            sets.clear()
            made = make_sets(case, DEVICE)
            sets[case] = made, exact(case, made[0])
        inputs, true = sets[case]
        try:
            result, made = contestant(name, case, inputs)
        except NotImplementedError as refusal:
            pytest.skip(" ".join(str(refusal).split()))
        assert error(result, true) < WORST
        benchmark.group = case.key
        amount = case.bytes if case.op in BYTES else case.flop
        benchmark.extra_info["gigabyte" if case.op in BYTES else "gigaflop"] = amount * made.runs / 1e9
        calls = max(1, min(100, round(.03 / measure({name: made.call}, DEVICE, 0)[name][0])))
        benchmark.pedantic(made.call, rounds=10, iterations=calls, warmup_rounds=1)
