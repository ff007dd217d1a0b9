"""What the compilers made of the Triton and Gluon kernels, for machines with no GPU to time them on."""
from . import aot

FACTS = ("threads", "registers", "stack", "spilled", "shared", "instructions", "serialized")
MORE_REGISTERS = 8  # a thread's registers are handed out in eights


def static_facts(found: list[aot.Kernel | aot.Failure]) -> dict[str, dict]:
    """The FACTS of each kernel that aot.compiled found, by "sm_ARCH/launch/kernel".

    A launch that does not compile has one entry, {"message": why}.
    """
    facts: dict[str, dict] = {}
    for one in found:
        compiled = isinstance(one, aot.Kernel)
        key, again = f"sm_{one.arch}/{one.launch}/{one.name if compiled else 'failed'}", 1
        while key in facts:  # one launch may compile a kernel with several constants
            again += 1
            key = key.split("#")[0] + f"#{again}"
        facts[key] = {fact: getattr(one, fact) for fact in (FACTS if compiled else ("message",))}
    return facts


def gate_static(found: dict[str, dict], committed: dict[str, dict], same_compiler: bool) -> list[str]:
    """What became worse than committed, one line each; empty if nothing did.

    same_compiler: Triton is of the committed facts' version, so registers and shared memory count too
    """
    worse = []
    for key, before in committed.items():
        now = found.get(key)
        if now is None:
            worse.append(f"{key}: no such kernel any more; --update if that is meant")
        elif "message" in now:
            worse.append(f"{key}: does not compile: {now['message']}")
        else:
            worse += [f"{key}: {change}" for change in _changes(now, before, same_compiler)]
    return worse + [f"{key}: {now['message']}" for key, now in found.items()
                    if key not in committed and "message" in now]


def _changes(now: dict, before: dict, same_compiler: bool) -> list[str]:
    changes = [f"{fact} {now[fact]}, was {before[fact]}" for fact in ("stack", "spilled", "serialized")
               if now[fact] > before[fact]]
    if lost := set(before["instructions"]) - set(now["instructions"]):
        changes.append(f"lost {', '.join(sorted(lost))}")
    if same_compiler:
        changes += [f"{fact} {now[fact]}, was {before[fact]}"
                    for fact, more in (("registers", MORE_REGISTERS), ("shared", 0))
                    if now[fact] > before[fact] + more]
    return changes
