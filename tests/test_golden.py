"""The model is the official one: its streams, reproduced."""
from pathlib import Path

import pytest
import torch

from tests.golden import BOUNDS, compare

FILES = sorted((Path(__file__).parent / "golden_streams").glob("*.safetensors"))


def test_all_streams_are_here():
    assert [f.stem for f in FILES] == ["stream_rows", "stream_tiny", "stream_v1", "stream_v1_1"]


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_stream(path):
    errors = compare(path)
    assert errors.keys() == BOUNDS.keys()
    assert {kind: error for kind, error in errors.items() if not error <= BOUNDS[kind]} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
def test_stream_on_gpu(path):
    errors = compare(path, device="cuda")
    assert {kind: error for kind, error in errors.items() if not error <= BOUNDS[kind]} == {}


def test_a_wrong_model_fails(monkeypatch):
    """The bounds bite: an exact instead of a tanh GELU is over them."""
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr("flashvsr_model.dit.F.gelu", lambda x, approximate: gelu(x))
    assert compare(FILES[1])["velocity"] > BOUNDS["velocity"]
