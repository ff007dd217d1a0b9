"""The cases of bench_attention under pytest-benchmark: `pytest benchmarks --benchmark-only`.

For its tables, histograms and saved runs. A contestant runs alone here, so figures of different ones are not
to be compared closely: python -m benchmarks.bench_attention and check take turns.
"""
import time

import pytest
import torch

from . import spot_check
from .bench_attention import BACKENDS, OTHERS
from .cases import Case, Work, grid
from .peers import DENSE, EXACT, contestant, missing
from .timing import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [DENSE[DEVICE], *BACKENDS[DEVICE], *(name for name in OTHERS[DEVICE] if not missing(name))]


def now() -> float:
    """Seconds, after what was launched has run: a round of several launches is timed as a whole."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="module")
def works() -> dict[Case, Work]:
    """The inputs of the case at hand, kept from one contestant to the next."""
    return {}


@pytest.mark.benchmark(timer=now)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", grid(DEVICE), ids=lambda case: case.key.replace("/", "-"))
def test_attention(benchmark, works, case, name):
    if case not in works:
        works.clear()
        works[case] = Work.of(case, DEVICE)
    work = works[case]
    try:
        made = contestant(name, work)
    except NotImplementedError as refusal:
        pytest.skip(" ".join(str(refusal).split()))
    result = made.call()
    if name not in EXACT:
        assert spot_check.error(result, made.heads_first, work) < spot_check.WORST
    calls = max(1, min(100, round(.03 / measure({name: made.call}, DEVICE, 0)[name][0])))
    benchmark.group = case.key
    benchmark.extra_info["gigaflop"] = work.flop / 1e9
    benchmark.pedantic(made.call, rounds=10, iterations=calls, warmup_rounds=1)
