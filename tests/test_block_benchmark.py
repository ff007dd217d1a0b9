"""bench_block on a CPU: every op is timed and compared, and a wrong result fails it."""
import json

import pytest

from benchmarks import bench_block


def test_every_op_has_rows(tmp_path, capsys):
    assert bench_block.main(["--device", "cpu", "--picture", "128x128", "--seconds", "0",
                             "--json", str(tmp_path / "block.json")]) == 0
    rows = json.loads((tmp_path / "block.json").read_text())["rows"]
    assert {row["case"].split("/")[0] for row in rows if row["contestant"] == "reference"} == {
        "rms_norm", "layer_norm_modulate", "gated_add_norm", "qkv_norm_rope", "linear_gelu"}
    assert all(row["us"] > 0 for row in rows)
    assert all(("tflops" in row) == row["case"].startswith("linear_gelu") for row in rows)
    assert capsys.readouterr().out.count("of copy") == 8


def test_amounts():
    amounts = {case.op: case.amount for case in bench_block.grid("cuda")}
    assert amounts["linear_gelu"] == 2 * 8448 * 1536 * 8960
    assert amounts["gated_add_norm"] == 4 * 8448 * 1536 * 2 and amounts["qkv_norm_rope"] == 6 * 8448 * 1536 * 2


@pytest.mark.parametrize("off, code", [(1, 0), (1.2, 1)])
def test_a_wrong_result_fails(monkeypatch, off, code):
    monkeypatch.setattr(bench_block, "error", lambda got, true: abs(off - 1))
    monkeypatch.setattr(bench_block, "grid", lambda *_: ONE)
    assert bench_block.main(["--device", "cpu", "--seconds", "0"]) == code


ONE = bench_block.grid("cpu", "128x128")[:1]
