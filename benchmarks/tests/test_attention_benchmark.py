"""The attention benchmark: its masks, its order of turns, its formulas, and a run of it on a CPU."""
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from benchmarks import bench_attention, bench_decoder, cases, masks, peers, plot, roofline, spot_check, timing
from flashvsr_kernels import BlockMask, _native, local_window

SMALL = [cases.Case("128x256", .5, 0, direction, heads=2, dtype="fp32") for direction in ("fwd", "bwd")]


@pytest.fixture
def small(monkeypatch) -> list[str]:
    """The benchmark with one small case a direction, and the arguments that make it quick."""
    monkeypatch.setattr(bench_attention, "grid", lambda device, quick: SMALL)
    monkeypatch.setitem(peers.GEMM, "cpu", 256)
    return ["--device", "cpu", "--seconds", "0", "--only"]


@pytest.mark.parametrize("cv", [0, .05, .175, .3])
@pytest.mark.parametrize("density", [.06, .13, .25, .4545])
def test_masks_have_the_density_and_the_spread(density, cv):
    mask = masks.make_mask(6, 11, 12, density, cv)
    assert mask.shape == (1, 12, 66, 264) and torch.equal(mask, masks.make_mask(6, 11, 12, density, cv))
    assert mask.sum((0, 2, 3)).unique().numel() == 1  # every head has the same budget
    assert abs(mask.float().mean() - density) < .5 / 264 and abs(masks.spread(mask) - cv) < .005
    assert not (mask & ~local_window(6, 11, 11).repeat(1, 4)).any()


@pytest.mark.parametrize("picture", ["1408x2560", "2048x3840"])
def test_masks_of_larger_pictures(picture):
    case, = (case for case in cases.grid("cuda") if case.picture == picture and case.direction == "fwd")
    mask = masks.make_mask(*case.grid, 12, case.density, case.cv)
    assert mask[0].sum(-1).double().mean() == cases.MODEL_DENSITY and abs(masks.spread(mask) - .175) < .005


def test_a_full_mask_and_an_impossible_one():
    assert masks.make_mask(6, 11, 2, 1, 0).all()
    with pytest.raises(ValueError, match="cv must be one that counts of mean 264"):
        masks.make_mask(6, 11, 2, 1, .1)


@pytest.mark.parametrize("n", range(1, 10))
def test_every_contestant_follows_every_other_equally_often(n):
    orders = timing.orders(n)
    follows = Counter(pair for order in orders for pair in zip(order, order[1:]))
    places = Counter(place for order in orders for place in enumerate(order))
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(follows) == n * (n - 1) and len(set(follows.values())) <= 1
    assert len(places) == n * n and len(set(places.values())) == 1


def test_ratios_are_of_one_cycle_and_medians_of_all():
    assert timing.ratio([1, 3, 3, 1, 20, 60], [2, 2, 1, 1, 10, 10], contestants=2) == 2  # of 1, 2 and 4
    assert timing.summary([1e-6, 2e-6, 3e-6]) == {"us": 2.0, "p20": 1.4, "p80": 2.6}
    assert timing.summary([1e-6]) == {"us": 1.0, "p20": 1.0, "p80": 1.0}


class Card:
    """Stands for time on a card whose clock follows its load: a call of `thirsty` takes 2 ms at its own, slow clock."""
    def __init__(self):
        self.now, self.slow = 0.0, 0.0

    def run(self, thirsty: bool):
        duration = .001 * (1 + thirsty * (self.slow > .08))
        self.now += duration
        self.slow = min(.1, self.slow + duration) if thirsty else max(0, self.slow - duration)


@pytest.mark.parametrize("turn, slower", [("short", 1), ("settled", 2)])
def test_settled_contestants_run_at_their_own_clock(monkeypatch, turn, slower):
    card = Card()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: card.now)
    calls = {"thrifty": lambda: card.run(False), "thirsty": lambda: card.run(True)}
    times = timing.measure(calls, "cpu", 2, turn)
    assert timing.summary(times["thrifty"])["us"] == pytest.approx(1000)
    assert timing.ratio(times["thirsty"], times["thrifty"], 2) == pytest.approx(slower)
    assert len(times["thirsty"]) == len(times["thrifty"]) >= 2


def test_turns_of_thirty_calls():
    ran = []
    timing.measure({name: lambda name=name: ran.append(name) for name in "ab"}, "cpu", 0, "thirty")
    assert "".join(ran) == "aabb" + "a" * 30 + "b" * 30 + "b" * 30 + "a" * 30


def test_flop_and_lists_come_from_the_kept_blocks():
    work = cases.Work.of(cases.Case("256x384", .25, .3, "bwd", heads=2, D=64), "cpu")
    kept = work.dense.sum().item()
    assert work.flop == 2.5 * 4 * 64 * 128 * 128 * kept
    assert work.density == pytest.approx(kept / work.dense.numel())
    for (index, count), dense in ((work.lists, work.dense), (work.transposed, work.dense.transpose(2, 3))):
        assert index.dtype == count.dtype == torch.int32 and index.is_contiguous()
        assert torch.equal(BlockMask(index, count, count, dense.shape[3]).to_dense(), dense)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_spot_check_knows_right_from_wrong(direction):
    work = cases.Work.of(cases.Case("128x256", .5, 0, direction, heads=2, D=64, dtype="fp32"), "cpu")
    made = peers.contestant("sdpa-masked", work)
    right = made.call()
    assert spot_check.error(right, made.heads_first, work) < 1e-5
    for i in range(3 if direction == "bwd" else 1):
        parts = list(right) if direction == "bwd" else [right]
        parts[i] = parts[i] * 1.05
        wrong = tuple(parts) if direction == "bwd" else parts[0]
        assert spot_check.error(wrong, made.heads_first, work) == pytest.approx(.05, rel=1e-3)


def test_a_contestant_that_stopped_writing_is_found():
    """What is compared is a later run's result, in poisoned memory, not the first's."""
    work = cases.Work.of(cases.Case("128x256", .5, 0, heads=2, D=64, dtype="fp32"), "cpu")
    first = peers.contestant("sdpa-masked", work).call()
    _, result, heads_first = bench_attention.timed(peers.Contestant(lambda: first, True), work)
    assert spot_check.error(result, heads_first, work) == float("inf")


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_run_prints_and_writes_every_contestant(small, tmp_path, capsys, direction):
    path = tmp_path / "deep" / "a.json"
    ours = ["reference"] + ["cpu"] * (_native.available() is None)
    arguments = [*small, direction, "--backends", *ours, "--json", str(path),
                 "--plot", str(tmp_path / "a.png")]
    assert bench_attention.main(arguments) == 0
    document, printed = json.loads(path.read_text()), capsys.readouterr().out.splitlines()
    assert printed[0].startswith("cpu ") and "torch" in printed[0] and "commit" in printed[0]
    assert document["turn"] == "short"
    assert {"torch", "commit", "cpu"} <= document["machine"].keys()
    rows = {row["contestant"]: row for row in document["rows"]}
    expected = {"gemm", "sdpa", "sdpa-masked", *ours} - ({"cpu"} if direction == "bwd" else set())
    assert rows.keys() == expected and len(set(map(len, map(str.split, printed[1:1 + len(rows)])))) <= 3
    for row in rows.values():
        assert 0 < row["p20"] <= row["us"] <= row["p80"] and row["tflops"] > 0
        assert row["case"] == f"{direction}/128x256/h2/d128/fp32/density0.5/cv0"
    assert rows["gemm"]["of_gemm"] == pytest.approx(1, rel=1e-3)
    assert rows["sdpa"]["of_ideal"] == .5  # dense itself, where half the blocks are kept
    assert rows["reference"]["error"] < 1e-5 and rows["reference"]["lists_us"] > 0
    assert rows["reference"]["as_fast_as"]["sdpa-masked"] == pytest.approx(
        rows["sdpa-masked"]["us"] / rows["reference"]["us"], rel=.5)
    assert [row["builder"] for row in document["lists"]] == ["from_dense", "transposed", "lcsa_mask"]
    assert Image.open(tmp_path / "a.png").width > 500


@pytest.mark.parametrize("turn", timing.TURNS)
@pytest.mark.parametrize("bench", [bench_attention, bench_decoder], ids=["attention", "decoder"])
def test_turns_are_asked_for_and_written(bench, turn, tmp_path, monkeypatch):
    def measured(calls, device, seconds, asked="short"):
        return {name: [1e-3, 3e-3 if asked == turn else 1e-3] for name in calls}
    monkeypatch.setattr(bench, "measure", measured)
    only = ["fwd/256x384"] if bench is bench_attention else ["conv3x3/C-residual"]
    path = tmp_path / "a.json"
    assert bench.main(["--device", "cpu", "--quick", "--backends", "reference", f"--{turn}", "--json", str(path),
                       "--only", *only]) == 0
    document = json.loads(path.read_text())
    assert document["turn"] == turn and {row["us"] for row in document["rows"]} == {2000}


def test_the_product_may_be_left_out(small, tmp_path, capsys):
    path = tmp_path / "a.json"
    assert bench_attention.main([*small, "fwd", "--backends", "reference", "--no-product", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert not document["product"] and {row["contestant"] for row in document["rows"]} == {"sdpa", "sdpa-masked", "reference"}
    assert not any("of_gemm" in row for row in document["rows"]) and "    - of GEMM" in capsys.readouterr().out


def test_what_cannot_run_says_why(small, capsys):
    assert bench_attention.main([*small, "fwd", "--backends", "hopper", "--peers"]) == 0
    assert "hopper       not run: NotImplementedError: sparse_attn: backend" in capsys.readouterr().out


def test_a_broken_backend_fails_the_run(small, monkeypatch, capsys):
    def broken(*call, **options):
        raise RuntimeError("out of paper")
    monkeypatch.setattr(peers, "sparse_attn", broken)
    assert bench_attention.main([*small, "fwd", "--backends", "reference", "--peers"]) == 1
    assert "WRONG: " in (printed := capsys.readouterr().out) and "RuntimeError: out of paper" in printed


@pytest.mark.parametrize("arguments, match", [
    (["--only", "nothing"], "--only fits no case of: fwd/256x384"), (["--peers", "fa5"], "invalid choice")],
    ids=["only", "peer"])
def test_wrong_arguments_are_named(capsys, arguments, match):
    with pytest.raises(SystemExit) as stopped:
        bench_attention.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2 and match in capsys.readouterr().err


def test_gpu_cases_are_the_grid_and_keys_name_them_once():
    found = cases.grid("cuda")
    assert len({case.key for case in found}) == len(found)
    main = [case for case in found if case.picture == "768x1408" and (case.D, case.dtype) == (128, "bf16")]
    assert len(main) == 2 * (4 * 4 + 1) + 1 and {case.density for case in main} == {.06, .13, .25, .4545, 1}
    assert {.05, .175, .23} < {case.cv for case in main if (case.density, case.direction) == (.4545, "fwd")}
    assert set(cases.grid("cuda", quick=True)) <= set(found)


def test_plot_panels_take_the_asked_spread_and_density():
    asked = (.13, .05), (.13, .175), (.4545, .05), (.4545, .175), (1, 0)
    rows = [{"case": f"fwd/768x1408/h12/d128/bf16/density{d}/cv{cv}", "contestant": "hopper",
             "density": d + .001, "cv": cv, "of_ideal": 1.2} for d, cv in asked]
    by_density, by_spread = plot.panels({"rows": rows})
    assert [x for x, _ in by_density[2]["hopper"]] == pytest.approx([.131, .4555, 1.001])
    assert [x for x, _ in by_spread[2]["hopper"]] == [.05, .175]


def measured(tmp_path, **cuda):
    row = {"case": "fwd/768x1408/h12/d128/bf16/density0.4545/cv0.175", "density": .4545, "tflops": 302.0}
    rows = [row | {"contestant": "gemm", "tflops": 680.0},
            row | {"contestant": "cuda", "of_ideal": .48} | cuda]
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"machine": {"gpu": "NVIDIA H100 80GB HBM3", "commit": "0"}, "rows": rows}))
    return path


def test_roofline_states_figures_and_assumptions(tmp_path, capsys):
    path = measured(tmp_path, under_load={"clocks.sm": 1600.0, "tflops": 302.0})
    assert roofline.main(["--gpu", "a100", "--measured", str(path)]) == 0
    printed = capsys.readouterr().out
    # By hand: 302e12 / (132 * 1600e6) = 1430 FLOP a clock of .629 * 4096 = 2576; 312 TFLOP/s * .555 = 173.
    assert "  173  same share of the mma.sync rate" in printed and "frames a second at 768x1408" in printed
    assert "assumed" in printed and "sparse attention           23.91" in printed


def test_model_flop_are_the_known_ones():
    flop = {name: flop / 1e12 for name, flop, _ in roofline.parts(roofline.PRESETS["v1.1"], 768, 1408)}
    assert flop["linears"] == pytest.approx(4.784 + 2.392 + 13.952, rel=1e-3)
    assert flop["sparse attention"] == pytest.approx(23.915, rel=1e-3)
    assert flop["cross attention"] == pytest.approx(.797, rel=1e-3)
    assert flop["LQ projector"] == pytest.approx(5.82, rel=1e-3)
    assert flop["decoder"] == pytest.approx(12.227, rel=1e-3)


@pytest.mark.parametrize("row", [None, {"under_load": {"unknown": "none"}}], ids=["file", "clock"])
def test_roofline_names_the_command_that_measures(tmp_path, capsys, row):
    path = tmp_path / "none.json" if row is None else measured(tmp_path, **row)
    with pytest.raises(SystemExit):
        roofline.main(["--measured", str(path)])
    assert "run: python -m benchmarks.bench_attention --json" in capsys.readouterr().err
