"""What every test stands on: fresh memory is NaN, and tests that need a GPU or Triton's interpreter say so."""
import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    # It compiles on all cores: last, when the interpreted run that make test has beside it is done with its own.
    items.sort(key=lambda item: item.path.stem == "test_aot")
    # Triton decides when a kernel's module is imported whether it is compiled or interpreted, for the whole process.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and (interpreted or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("interpret") and not interpreted:
            item.add_marker(pytest.mark.skip(reason="runs in the interpreter: TRITON_INTERPRET=1 pytest -m interpret"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so an element that nobody wrote cannot pass for a right one."""
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    if torch.cuda.is_available():  # several processes may share the card
        torch.cuda.empty_cache()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
