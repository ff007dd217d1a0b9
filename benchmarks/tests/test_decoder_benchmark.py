"""The decoder's benchmark: its calls and peers, its stages, and runs of it and of its check on a CPU."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import (bench_cpu_convolutions, bench_decoder, check, decoder_cases, decoder_peers, decoder_stages,
                        machine, peers, plain, plot_bars, timing)
from flashvsr_kernels import backends, conv3x3
from flashvsr_kernels.backends import _tables

PICTURE = "128x128"
SMALL = decoder_cases.grid("cpu", picture=PICTURE)
QUICK = ["--device", "cpu", "--picture", PICTURE, "--seconds", "0", "--backends", "reference"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(peers.GEMM, "cpu", 256)
    monkeypatch.setitem(decoder_peers.COPIED, "cpu", 2 ** 20)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.key.replace("/", "-"))
def test_all_contestants_compute_the_same(case):
    sets = decoder_peers.make_sets(case, "cpu")
    true = decoder_cases.exact(case, sets[0])
    for name in ["reference", *decoder_peers.peers(case, "cpu")]:
        result, made = decoder_peers.contestant(name, case, sets)
        assert result.shape == true.shape, name
        error = decoder_cases.error(result, true)
        assert error < (.03 if case.op == "enlarge" else .01 if case.op == "adain_uint8" else 1e-5), name
        assert len(made.call()) == made.runs == 1 and made.alone is None


def test_calls_are_those_of_the_official_decoder_and_projector():
    cases = {case.name: case for case in decoder_cases.grid("cuda")}
    assert len(cases) == len(decoder_cases.grid("cuda")) == len({case.key for case in cases.values()})
    assert set(decoder_cases.QUICK) <= set(cases)
    assert {case.name for case in decoder_cases.grid("cuda", quick=True)} == set(decoder_cases.QUICK)
    assert {case.name for case in decoder_cases.grid("cpu", quick=True)} == set(decoder_cases.SMALL)
    assert cases["A"].shape == (4, 768, 1408, 128) and cases["first"].shape == (2, 96, 176, 784)
    assert cases["A"].flop / 1e12 == pytest.approx(1.276, rel=1e-3)
    assert cases["F-relu"].flop / 1e12 == pytest.approx(.567, rel=1e-3)  # 1.276 if it were not folded
    assert cases["B-past"].flop == 2 * cases["B"].flop == 2 * cases["B-residual"].flop
    assert (cases["1"].shape, cases["1"].out) == ((1, 8, 48, 88, 768), 2048)
    assert (cases["2-norm"].shape, cases["2-norm"].out) == ((1, 4, 48, 88, 2048), 3072)
    assert cases["1"].flop == 2 * 4 * 48 * 88 * 36 * 768 * 2048
    assert cases["E"].bytes == 4 * 768 * 1408 * (2 * 128 + 4 * 3)
    assert cases["enlarge"].bytes == 8 * 192 * 352 * 3 * 17 and cases["enlarge"].shape == (8, 192, 352, 3)


@pytest.mark.parametrize("form", plain.DECODER)
def test_plain_decoder_is_ours(form):
    """Two chunks: the second sees the memory of the first."""
    work = decoder_stages.Work(decoder_stages.Stage("decoder", PICTURE, "compact", "fp32"), "cpu")
    ours, peer = work.ours("reference"), work.plain(form, compiled=False)
    with torch.no_grad():
        first, again = (ours(), ours())
        assert first.shape == (8, 128, 128, 3) and first.dtype == torch.uint8 and first.float().std() > 20
        assert (first[:4] != again[:4]).any()
        for true in first, again:
            assert (peer().int() - true.int()).abs().max() <= 1  # float32 has its own order of sums


@pytest.mark.parametrize("form", plain.PROJECTOR)
def test_plain_projector_is_ours(form):
    work = decoder_stages.Work(decoder_stages.Stage("projector", PICTURE, "compact", "fp32"), "cpu")
    ours, peer = work.ours("reference"), work.plain(form, compiled=False)
    with torch.no_grad():
        first, again = ours().clone(), ours()
        assert first.shape == (1, 2 * 64, 128) and not torch.equal(first[:, :64], again[:, :64])
        torch.testing.assert_close(peer(), first)
        torch.testing.assert_close(peer(), again)


def test_one_backend_is_preferred_and_what_ran_is_told():
    before = dict(_tables)
    with pytest.raises(RuntimeError, match="stop"):
        with decoder_stages.preferring("triton"):
            assert [b.name for b in _tables["conv3x3"]][0] == "triton"
            assert all(table[-1].name == "reference" for table in _tables.values())
            raise RuntimeError("stop")
    assert dict(_tables) == before
    with decoder_stages.preferring("reference", ["conv3x3"]):
        assert _tables["conv3x3"][0].name == "reference" and _tables["rgb_conv"] == before["rgb_conv"]
    work = decoder_stages.Work(decoder_stages.Stage("decoder", PICTURE, "compact", "fp32"), "cpu")
    with torch.no_grad():
        assert decoder_stages.used(work.ours("reference")) == {
            "pixel_unshuffle reference": 2, "conv3x3 reference": 2 * (2 + 9 + 9 + 2 * 9 + 4 * 3),
            "upsample_conv reference": 2 * (1 + 2 + 4 * 3), "rgb_conv reference": 8 * 3, "rgb_head apart": 8,
            "adain_uint8 reference": 8}
    assert dict(_tables) == before


def test_convolutions_on_a_cpu_take_turns(tmp_path, capsys, monkeypatch):
    """Of a stream that is one convolution."""
    if (reason := backends()["conv3x3"]["cpu"]) is not None:
        pytest.skip(reason)
    x = torch.randn(1, 16, 16, 16)
    weight = torch.randn(16, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    stream = SimpleNamespace(start=lambda: None, push=lambda: conv3x3(x, weight))
    monkeypatch.setattr(bench_cpu_convolutions, "random_model", lambda *_: None)
    monkeypatch.setattr(bench_cpu_convolutions, "Stream", lambda *_: stream)
    path, threads = tmp_path / "a.json", str(torch.get_num_threads())
    assert bench_cpu_convolutions.main(["--seconds", "0", "--threads", threads, "--json", str(path)]) == 0
    ours, peer = json.loads(path.read_text())["rows"]
    assert (ours["used"], peer["used"]) == ({"conv3x3 cpu": 1}, {"conv3x3 reference": 1})
    assert f"{ours['as_fast_as']['pytorch']:.3f} times as fast" in capsys.readouterr().out


def test_a_run_prints_and_writes_every_contestant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(timing, "orders", lambda n: [list(range(n)), list(range(n))[::-1]])
    path = tmp_path / "deep" / "a.json"
    only = ["decoder/", "projector/", "B-past/", "adain"]
    assert bench_decoder.main([*QUICK, "--compile", "--json", str(path), "--plot", str(tmp_path / "a.png"),
                               "--commit", "abc", "--only", *only]) == 0
    document, printed = json.loads(path.read_text()), capsys.readouterr().out.splitlines()
    assert printed[0].startswith("cpu ") and document["machine"]["commit"] == "abc"
    rows = {(row["case"].split("/")[0], row["contestant"]): row for row in document["rows"]}
    assert len(printed) == 1 + len(rows) == 1 + len(document["rows"])
    expected = {"decoder": ["gemm", "reference", "plain-split", "plain-buffer", "plain-split-both",
                            "plain-compiled"],
                "projector": ["gemm", "reference", "plain-conv3d", "plain-im2col", "plain-compiled"],
                "conv3x3": ["gemm", "reference", "onednn", "onednn-cat", "onednn-split", "onednn-unfused"],
                "adain_uint8": ["copy", "reference", "torch"]}
    assert list(rows) == [(case, name) for case, names in expected.items() for name in names]
    for (case, name), row in rows.items():
        assert 0 < row["p20"] <= row["us"] <= row["p80"]
        assert (row["gbs"] if case == "adain_uint8" else row["tflops"]) > 0
        assert name in ("gemm", "copy") or row["error"] < .01
        if name == "reference":
            assert list(row["of_peer"]) == expected[case][2:] and min(row["of_peer"].values()) > 0
    assert rows["decoder", "reference"]["used"]["rgb_conv reference"] == 8 * 3
    assert "form" in rows["decoder", "plain-compiled"] and rows["conv3x3", "gemm"]["of_gemm"] == 1
    assert Image.open(tmp_path / "a.png").width > 500
    assert [len(bars) for bars in plot_bars.groups(document).values()] == [5, 4, 5, 2]


@pytest.mark.gpu
def test_on_a_gpu_every_contestant_is_a_graph_and_right(tmp_path):
    path = tmp_path / "a.json"
    assert bench_decoder.main(["--quick", "--picture", "256x384", "--seconds", "0", "--no-compile",
                               "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert not [row for row in document["rows"] if "no_graph" in row]
    assert not [row for row in document["refused"] if row["contestant"] not in decoder_peers.OURS]
    stage = next(row for row in document["rows"] if row["case"].startswith("decoder/")
                 and row["contestant"] == "triton")
    assert stage["working_gib"] > 0 and not [name for name in stage["used"] if "reference" in name]


def test_what_cannot_run_says_why(capsys):
    arguments = [*QUICK[:-1], "hopper", "--only", "B/", "E/", "projector/"]
    assert bench_decoder.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "hopper          not run: NotImplementedError: conv3x3: backend 'hopper' cannot run" in printed
    assert "not run: NotImplementedError: rgb_conv has no backend hopper" in printed
    assert "not run: NotImplementedError: causal_conv3d: no CUDA device" in printed


@pytest.mark.parametrize("fault, told", [("error", "RuntimeError: out of paper"), ("wrong", "error 1.0e-01")])
def test_a_broken_backend_fails_the_run(monkeypatch, capsys, fault, told):
    right = decoder_peers.ours

    def broken(*call):
        if fault == "error":
            raise RuntimeError("out of paper")
        return lambda: 1.1 * right(*call)()
    monkeypatch.setattr(decoder_peers, "ours", broken)
    assert bench_decoder.main([*QUICK, "--only", "D/"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: " in printed and told in printed.split("WRONG: ")[1]


@pytest.mark.parametrize("arguments, match", [
    (["--only", "nothing"], "--only fits no case of: decoder/256x384/compact/fp32"),
    (["--picture", "100x128"], "multiples of 128, got 100x128"), (["--picture", "big"], "got big")],
    ids=["only", "size", "no size"])
def test_wrong_arguments_are_named(capsys, arguments, match):
    with pytest.raises(SystemExit) as stopped:
        bench_decoder.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2 and match in capsys.readouterr().err


def test_check_finds_a_planted_slowdown_and_a_wrong_result(tmp_path, monkeypatch, capsys):
    """The reference in the place of the C++ op: as recorded it passes; three times its work, and it fails."""
    case = next(case for case in decoder_cases.grid("cpu") if case.name == "B-past")
    monkeypatch.setattr(decoder_cases, "grid", lambda device, quick: [case])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    reference = decoder_peers.ours

    def plant(turns: int, factor: float):
        def planted(name, *given):
            call = reference("reference", *given)
            return lambda: [factor * call() for _ in range(turns)][-1]
        monkeypatch.setattr(decoder_peers, "ours", planted)
    path = tmp_path / "ratios.json"
    asked = ["--decoder-baseline", str(path), "--part", "decoder", "--seconds", "0.3"]
    plant(1, 1)
    assert check.main([*asked, "--update"]) == 0
    recorded = json.loads(path.read_text())[f"cpu {machine.instructions()}"]["ratios"]
    assert recorded.keys() == {f"{case.key}/cpu"} and recorded[f"{case.key}/cpu"] > .3
    assert check.main(asked) == 0
    plant(3, 1)
    assert check.main(asked) == 1
    assert f"WORSE: {case.key}/cpu" in capsys.readouterr().out
    plant(1, 1.1)
    assert check.main(asked) == 1
    assert f"WORSE: {case.key}/cpu: error 0.1" in capsys.readouterr().out


def test_check_records_nothing_where_nothing_of_ours_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(check, "decoder_ratios", lambda device, seconds: ({}, []))
    asked = ["--decoder-baseline", str(tmp_path / "ratios.json"), "--part", "decoder"]
    assert check.main([*asked, "--update"]) == 0 and not (tmp_path / "ratios.json").exists()
    assert "nothing recorded" in capsys.readouterr().out
    assert check.main(asked) == 0
    assert f"committed for cpu {machine.instructions()}: reported only" in capsys.readouterr().out


def test_committed_figures_are_those_that_are_gated():
    path = check.RESULTS / "decoder_ratios.json"
    for name, entry in (json.loads(path.read_text()) if path.exists() else {}).items():
        device = "cpu" if name.startswith("cpu ") else "cuda"
        keys = {case.key for case in decoder_cases.grid(device, quick=True)}
        assert {key.rpartition("/")[0] for key in entry["ratios"]} == keys
        assert {key.rpartition("/")[2] for key in entry["ratios"]} <= set(decoder_peers.BACKENDS[device])
        assert {"torch", "triton", "commit"} <= entry["about"].keys(), name
        assert all(ratio > 0 for ratio in entry["ratios"].values()), name


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_of_the_decoder_works_in_memory_linear_in_pixels():
    """Of the official shape, with colour and bytes, beside weights and stream state."""
    used = []
    for picture in ("384x704", "768x1408", "1536x1408"):
        step = decoder_stages.Work(decoder_stages.Stage("decoder", picture, "v1.1", "bf16"), "cuda").ours("hopper")
        step()
        used.append(decoder_stages.peak(step))
    assert used[1] < 4.2 * used[0] and used[2] < 2.1 * used[1] and used[1] < 1
