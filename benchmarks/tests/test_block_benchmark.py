"""bench_block on a CPU: every op is timed and compared, and a wrong result fails it."""
import json

import pytest

from benchmarks import bench_block, check


def test_every_op_has_rows(tmp_path, capsys):
    assert bench_block.main(["--device", "cpu", "--picture", "128x128", "--seconds", "0",
                             "--json", str(tmp_path / "block.json")]) == 0
    rows = json.loads((tmp_path / "block.json").read_text())["rows"]
    assert {row["case"].split("/")[0] for row in rows if row["contestant"] == "reference"} == {
        "rms_norm", "layer_norm_modulate", "gated_add", "gated_add_norm", "qk_norm_rope", "qkv_norm_rope", "linear_gelu"}
    assert all(row["us"] > 0 for row in rows)
    assert all(("tflops" in row) == row["case"].startswith("linear_gelu") for row in rows)
    assert capsys.readouterr().out.count("of copy") == 12


def test_amounts():
    amounts = {case.op: case.amount for case in bench_block.grid("cuda")}
    assert amounts["linear_gelu"] == 2 * 8448 * 1536 * 8960
    assert amounts["gated_add_norm"] == 4 * 8448 * 1536 * 2 and amounts["qkv_norm_rope"] == 6 * 8448 * 1536 * 2


@pytest.mark.parametrize("off, code", [(1, 0), (1.2, 1)])
def test_a_wrong_result_fails(monkeypatch, off, code):
    monkeypatch.setattr(bench_block, "error", lambda got, true: abs(off - 1))
    monkeypatch.setattr(bench_block, "grid", lambda *_: ONE)
    assert bench_block.main(["--device", "cpu", "--seconds", "0"]) == code


def test_check_gates_what_ran_and_what_was_wrong(monkeypatch):
    rows = [{"case": "rms_norm/1x1/bf16", "contestant": name, "us": 1.0, "p20": 1.0, "p80": 1.0, "gbs": 1.0, "of_copy": 1.0,
             "error": error} | extra
            for name, error, extra in (("copy", 0, {}), ("triton", .5, {"of_peer": {"reference": 4.0}}),
                                       ("reference", 0, {"of_peer": {"reference": 1.0}}))]
    monkeypatch.setattr(bench_block, "grid", lambda *_: ONE)
    monkeypatch.setattr(bench_block, "run", lambda *_: rows)
    found, wrong = check.block_ratios("cuda", 1)
    assert found == {"rms_norm/1x1/bf16/triton": 4.0} and wrong == ["rms_norm/1x1/bf16/triton: error 0.5"]
    assert check.block_ratios("cpu", 1) == ({}, [])


ONE = bench_block.grid("cpu", "128x128")[:1]
