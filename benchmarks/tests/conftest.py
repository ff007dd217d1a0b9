"""Tests of the measurements. They stand here because tests/, which is about the packages, knows nothing of benchmarks."""
import pytest
import torch


def pytest_ignore_collect(config):
    return True if config.getoption("benchmark_only", False) else None  # pytest benchmarks --benchmark-only


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
