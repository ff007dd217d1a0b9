"""Which implementation runs a call of an op, or each one's reason why not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def always(*facts: Any) -> None:
    """No reason against: for a backend that runs everywhere (available) or every call (supports)."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    name: as in the op's backend argument: "cpu", "triton", "hopper", "cuda", "reference"
    run: the implementation; its signature is the op file's affair
    available: None if it can run on this machine, else the reason in one line; takes nothing
    supports: None if it can run a call, else the reason in one line; takes the facts that pick is given
    """

    name: str
    run: Callable[..., Any]
    available: Callable[[], str | None] = always
    supports: Callable[..., str | None] = always

    def refusal(self, *facts: Any) -> str | None:
        """Why this backend cannot run a call with these facts, or None."""
        return self.available() or self.supports(*facts)


_tables: dict[str, tuple[Backend, ...]] = {}


def register(op: str, *table: Backend) -> None:
    """Makes table the implementations of op, best first."""
    if op in _tables:
        raise ValueError(f"op {op} has its backends already: {', '.join(b.name for b in _tables[op])}")
    _tables[op] = table


def pick(op: str, backend: str | None, *facts: Any) -> Backend:
    """The implementation of op that runs a call.

    backend: a name in the op's table; None takes the first, best first, that can run the call
    facts: what supports of each backend is called with, such as the tensors
    Raises ValueError if op has no such backend, NotImplementedError with each backend's reason if none runs.
    """
    table = _tables[op]
    wanted = [b for b in table if backend is None or b.name == backend]
    if not wanted:
        names = ", ".join(b.name for b in table)
        raise ValueError(f"backend of {op} must be one of {names} or None, got {backend!r}")
    refusals = []
    for candidate in wanted:
        reason = candidate.refusal(*facts)
        if reason is None:
            return candidate
        refusals.append(f"{candidate.name}: {reason}")
    others = [f"{b.name}: {b.refusal(*facts) or 'can run it'}" for b in table if b not in wanted]
    head = "no backend can run this call" if backend is None else f"backend {backend!r} cannot run this call"
    raise NotImplementedError(f"{op}: {head}\n  " + "\n  ".join(refusals + others))


def backends() -> dict[str, dict[str, str | None]]:
    """For each op its backends, best first: None if one can run on this machine, else the reason why not."""
    return {op: {b.name: b.available() for b in table} for op, table in _tables.items()}
