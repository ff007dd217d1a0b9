"""Times of calls that take turns: what one shape's contestants are compared by.

A GPU under load sits at its power limit, and what ran just before decides its clock: timed one after the
other, or in one fixed order, kernels differ by 8 to 10 % for no fault of theirs. So each contestant runs a
burst of calls in each round, rounds follow each other without a pause, and over a cycle of rounds every
contestant comes after every other equally often. A figure is the median over rounds of a burst's mean; a
ratio is the median of the ratios within cycles, as within a round one of the two has the better place. The L2
cache is not flushed: keys and values of 100 MB each leave little in its 50 MB from one call to the next.

The clock follows the load by a tenth of a second or so. Bursts are shorter: one clock serves all, and who
needs more energy a call than the others slows them down instead of itself, as kernels do to each other in a
model. Settled, each contestant first runs untimed until the clock is its own: what it does alone under lasting
load, where a call takes as long as its energy at the power limit. Ratios differ by up to 15 % between the two.
Turns of thirty calls, of 1 to 3 ms, lie between them: attention's goals were set in such.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch

BURST = .03  # seconds, about 30 calls of the kernels that matter most
SETTLED = .2, .1  # seconds untimed and timed: the clock needs .15 to settle and goes on swinging by a few per cent
TURNS = {"settled": "each at the clock of its own load, in turns of .3 s",
         "thirty": "in turns of thirty calls"}
Calls = dict[str, Callable[[], object]]


def orders(n: int) -> list[list[int]]:
    """Orders of n things in which each comes directly after each other equally often (a Williams design).

    n of them, or 2 n where n is odd; every thing also stands in every place equally often.
    """
    first = [(-(i // 2) if i % 2 == 0 else i // 2 + 1) % n for i in range(n)]
    rows = [[(x + shift) % n for x in first] for shift in range(n)]
    return rows if n % 2 == 0 else rows + [row[::-1] for row in rows]


def ask_turn(parser: argparse.ArgumentParser) -> None:
    """Options for measure's turn."""
    options = parser.add_mutually_exclusive_group()
    for turn, what in TURNS.items():
        options.add_argument(f"--{turn}", dest="turn", action="store_const", const=turn, default="short", help=what)


def measure(calls: Calls, device: str, seconds: float, turn: str = "short") -> dict[str, list[float]]:
    """Seconds a call of each contestant in each round: whole cycles of rounds, until seconds have passed.

    The calls must have run before: compilation is not timed.
    turn: "short", of .03 s, or one of TURNS
    """
    names, (lead, burst) = list(calls), SETTLED if turn == "settled" else (0, BURST)
    once = {name: _bursts({name: calls[name]}, {name: (0, 2)}, device)[name] for name in names}
    most = round(100 * (lead + burst) / BURST)  # very short calls take less than their turn
    turns = {name: (0, 30) if turn == "thirty" else
             (min(most, round(lead / t)), max(1, min(most, round(burst / t)))) for name, t in once.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while True:
        for order in orders(len(names)):
            for name, mean in _bursts({names[i]: calls[names[i]] for i in order}, turns, device).items():
                times[name].append(mean)
        if time.perf_counter() >= end:
            return times


def _bursts(calls: Calls, turns: dict[str, tuple[int, int]], device: str) -> dict[str, float]:
    """Mean seconds a call, one burst after the other; a GPU is waited for at the end alone.

    turns: calls before the burst, and in it
    """
    spans = {}
    for name, call in calls.items():
        for _ in range(turns[name][0]):
            call()
        start = _stamp(device)
        for _ in range(turns[name][1]):
            call()
        spans[name] = start, _stamp(device)
    if device == "cuda":
        spans[name][1].synchronize()
    return {name: _seconds(start, end) / turns[name][1] for name, (start, end) in spans.items()}


def _stamp(device: str) -> torch.cuda.Event | float:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the rounds, in us."""
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
    return {name: round(value * 1e6, 2) for name, value in
            (("us", statistics.median(times)), ("p20", p20), ("p80", p80))}


def ratio(over: list[float], under: list[float], contestants: int) -> float:
    """Median over cycles of the ratio of over's sum in a cycle to under's, where so many took turns."""
    cycle = len(orders(contestants))
    starts = range(0, len(over), cycle)
    return statistics.median(sum(over[i:i + cycle]) / sum(under[i:i + cycle]) for i in starts)
