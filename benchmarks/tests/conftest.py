"""Tests of the measurements. They stand here because tests/, which is about the packages, knows nothing of benchmarks."""
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """As in tests/: torch.empty gives NaN, so an element that nobody wrote cannot pass for a right one."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_ignore_collect(config):
    return True if config.getoption("benchmark_only", False) else None  # pytest benchmarks --benchmark-only


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
