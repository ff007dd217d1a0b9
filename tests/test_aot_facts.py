"""The gate of what the compilers make of the kernels."""
import copy

import pytest

from flashvsr_kernels.aot_facts import gate_static

KERNELS = {"sm_90/forward/attend": {
    "threads": 384, "registers": 168, "stack": 0, "spilled": 0, "shared": 164_072,
    "instructions": ["wgmma", "tma"], "serialized": False}}


@pytest.mark.parametrize("change, same_compiler, worse", [
    ({}, True, None), ({"registers": 176}, True, None), ({"registers": 184}, True, "registers 184, was 168"),
    ({"registers": 184}, False, None), ({"shared": 164_073}, True, "shared"),
    ({"stack": 8}, False, "stack 8, was 0"),
    ({"spilled": 4}, False, "spilled"), ({"instructions": ["wgmma"]}, False, "lost tma"),
    ({"serialized": True}, False, "serialized"), ({"message": "ptxas died"}, False, "ptxas died")],
    ids=lambda value: str(value))
def test_static_gate(change, same_compiler, worse):
    found = copy.deepcopy(KERNELS)
    found["sm_90/forward/attend"] |= change
    lines = gate_static(found, KERNELS, same_compiler)
    assert len(lines) == (worse is not None) and all(worse in line for line in lines)


def test_static_gate_finds_what_is_gone_and_what_does_not_compile():
    assert "no such kernel" in gate_static({}, KERNELS, True)[0]
    assert gate_static(KERNELS | {"new": {"message": "aborted"}}, KERNELS, True) == ["new: aborted"]
