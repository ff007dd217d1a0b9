"""The gates of benchmarks.check: a slowdown must fail them, and so must a kernel that compiles to worse."""
import dataclasses
import json

import pytest
import torch

from benchmarks import bench_attention, bench_block, check, decoder_peers, machine, peers, timing
from flashvsr_kernels import _native, aot

CASE = "fwd/256x384/h2/d128/fp32/density0.45/cv0.175/cpu"
alone = pytest.mark.skipif(_native.available() is not None or torch.cuda.is_available(),
                           reason="needs the C++ op, and no GPU")


@pytest.mark.parametrize("found, worse", [({"a": 1.2, "b": .9}, []), ({"a": 1.12, "b": .84}, []),
                                          ({"a": 1.08, "b": .9}, ["a"]), ({"a": 2.0}, ["b"])],
                         ids=["same", "within the bound", "slower by 11 %", "gone"])
def test_gate(found, worse):
    lines = check.gate(found, {"a": 1.2, "b": .9}, 1.08)
    assert [line.split(":")[0] for line in lines] == worse


def test_bounds_find_a_planted_tenth_on_a_gpu_and_a_doubling_on_a_cpu():
    assert check.gate({"a": 1 / 1.1}, {"a": 1}, check.BOUND["cuda"])
    assert check.gate({"a": 1 / 2}, {"a": 1}, check.BOUND["cpu"])


def planted_slowdown_fails(case, name, tmp_path, monkeypatch, capsys):
    """Recorded as it is, the op passes; doing its work twice, it fails. Measured, not simulated."""
    asked = ["--baseline", str(tmp_path / "ratios.json"), "--part", "ratios", "--seconds", "0.5"]
    monkeypatch.setattr(check, "cases", lambda device: [case])
    assert check.main([*asked, "--update"]) == 0
    recorded = json.loads((tmp_path / "ratios.json").read_text())[name]["ratios"]
    assert check.main(asked) == 0
    sparse_attn = peers.sparse_attn

    def slower(*call, **options):
        sparse_attn(*call, **options)
        return sparse_attn(*call, **options)
    monkeypatch.setattr(peers, "sparse_attn", slower)
    assert check.main(asked) == 1
    assert f"WORSE: {case.key}" in capsys.readouterr().out
    return recorded


@alone
def test_a_planted_slowdown_of_the_op_fails(tmp_path, monkeypatch, capsys):
    case, = (case for case in bench_attention.grid("cpu", quick=True) if f"{case.key}/cpu" == CASE)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    recorded = planted_slowdown_fails(case, f"cpu {machine.instructions()}", tmp_path, monkeypatch, capsys)
    assert recorded.keys() == {CASE} and recorded[CASE] > .2


@pytest.mark.gpu
def test_a_planted_slowdown_of_the_op_fails_on_a_gpu(tmp_path, monkeypatch, capsys):
    planted_slowdown_fails(check.cases("cuda")[0], torch.cuda.get_device_name(), tmp_path, monkeypatch, capsys)


@alone
def test_a_wrong_result_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "cases", lambda device: [
        case for case in bench_attention.grid(device, quick=True) if f"{case.key}/cpu" == CASE])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sparse_attn = peers.sparse_attn
    monkeypatch.setattr(peers, "sparse_attn", lambda *call, **options: 1.1 * sparse_attn(*call, **options))
    path = str(tmp_path / "none.json")
    assert check.main(["--baseline", path, "--part", "ratios", "--seconds", "0"]) == 1
    printed = capsys.readouterr().out
    assert f"WORSE: {CASE}: error 0.1" in printed and f"cpu {machine.instructions()}: reported only" in printed


@alone
@pytest.mark.parametrize("update", [[], ["--update"]], ids=["gated", "recorded"])
def test_an_error_of_ours_fails(tmp_path, monkeypatch, capsys, update):
    """One that does not say that the backend cannot run the case."""
    def broken(*call, **options):
        raise RuntimeError("out of order")
    monkeypatch.setattr(check, "cases", lambda device: [
        case for case in bench_attention.grid(device, quick=True) if f"{case.key}/cpu" == CASE])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(peers, "sparse_attn", broken)
    path = tmp_path / "none.json"
    assert check.main(["--baseline", str(path), "--part", "ratios", "--seconds", "0", *update]) == 1
    assert f"WORSE: {CASE}: RuntimeError: out of order" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize("about, outcome, said", [
    ({"torch": "2.11", "triton": "3.6"}, 1, "WORSE: x"),
    ({"torch": "2.12", "triton": "3.6"}, 0, "reported only"),
    (None, 0, "no figures are committed for NVIDIA H100")], ids=["known", "other versions", "unknown GPU"])
def test_only_a_known_gpu_is_gated(tmp_path, monkeypatch, capsys, about, outcome, said):
    figures = {"about": (about or {}) | {"cpu": "c", "commit": "0"}, "ratios": {"x": 1.2}}
    (tmp_path / "ratios.json").write_text(json.dumps({"NVIDIA H100": figures} if about else {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(check, "versions", lambda: {"torch": "2.11", "triton": "3.6"})
    monkeypatch.setattr(check, "ratios", lambda device, seconds: ({"x": 1.0}, []))
    assert check.main(["--baseline", str(tmp_path / "ratios.json"), "--part", "ratios"]) == outcome
    assert said in capsys.readouterr().out


def test_the_static_part_records_and_gates(tmp_path, monkeypatch, capsys):
    kernel = aot.Kernel(90, "forward", "attend", 384, 168, 0, 0, 1000, 0, ("wgmma",), False, 1.0, "hash")
    found, asked = [kernel], ["--part", "static", "--static", str(tmp_path / "static.json")]
    monkeypatch.setattr(check.aot, "compiled", lambda archs: found)
    monkeypatch.setattr(check, "versions", lambda: {"torch": "2.11", "triton": "3.6"})
    assert check.main([*asked, "--update"]) == 0 and check.main(asked) == 0
    found[0] = dataclasses.replace(kernel, spilled=8)
    assert check.main(asked) == 1
    assert "WORSE: sm_90/forward/attend: spilled 8, was 0" in capsys.readouterr().out


def test_committed_figures_are_those_that_are_gated():
    figures = json.loads((check.RESULTS / "attention_ratios.json").read_text())
    for instructions in "avx2", "avx512", "avx512bf16":
        assert {f"{case.key}/cpu" for case in check.cases("cpu")} == set(figures[f"cpu {instructions}"]["ratios"])
    for name, entry in figures.items():
        assert {"torch", "triton", "commit"} <= entry["about"].keys(), name
        assert all(ratio > 0 for ratio in entry["ratios"].values()), name


KINDS = {"upscaler": lambda row: {"whole", "steady", "memory", "floor"} <= row.keys(),
         "attention": lambda row: row["case"].startswith(("fwd/", "bwd/")) and row["us"] > 0,
         "decoder": lambda row: row["case"].split("/")[0] in {*decoder_peers._PEERS, "decoder", "projector"} and row["us"] > 0,
         "block": lambda row: row["case"] in {case.key for case in bench_block.grid("cuda")} and row["us"] > 0}
FIGURES = [path for path in check.RESULTS.glob("*_h[0-9]*.json")]


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_committed_figures_are_of_what_their_name_says(path):
    """A kind, a GPU, and perhaps a picture's size, a sparse ratio, or which turns, with a product or not; the commit is told."""
    kind, gpu, *what = path.stem.split("_")[0:1] + path.stem.partition("_h")[2].split("_")
    document = json.loads(path.read_text())
    assert document["rows"] and all(map(KINDS[kind], document["rows"]))
    assert document["machine"]["gpu"].startswith(f"NVIDIA H{gpu}") and document["machine"]["commit"]
    for word in what:
        if word in timing.TURNS:
            assert document["turn"] == word
        elif word == "no-product":
            assert document["product"] is False and all(row["contestant"] != "gemm" for row in document["rows"])
        else:
            assert word == "large" or all(word in row["case"] for row in document["rows"])
