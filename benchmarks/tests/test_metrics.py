"""The benchmark's metrics and baselines against known answers and slow direct formulas; no data is needed."""
import math
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import animevideov3, clips, metrics, niqe, resize, sheet


def video(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def flat(value: int, frames: int = 3, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.full((frames, height, width, 3), value, dtype=torch.uint8)


def smooth(frames: int = 4, height: int = 192, width: int = 288) -> torch.Tensor:
    """Blurred noise that moves by a pixel a frame: detail at several scales, as pictures have."""
    noise = torch.rand(1, 3, height, width + frames, generator=torch.Generator().manual_seed(1))
    size = noise.shape[2:]
    layers = sum(F.interpolate(F.avg_pool2d(noise, k), size, mode="bicubic") * k for k in (2, 4, 8, 16))
    plane = ((layers - layers.min()) / (layers.max() - layers.min()) * 255).round().to(torch.uint8)
    return torch.stack([plane[0, :, :, t:t + width].permute(1, 2, 0) for t in range(frames)])


def blur(frames: torch.Tensor) -> torch.Tensor:
    blurred = F.avg_pool2d(frames.permute(0, 3, 1, 2).float(), 5, 1, 2)
    return blurred.permute(0, 2, 3, 1).round().to(torch.uint8)


@pytest.mark.parametrize("rgb, expected", [((0, 0, 0), 16), ((255, 255, 255), 235), ((255, 0, 0), 81.481),
                                           ((0, 255, 0), 144.553), ((0, 0, 255), 40.966)])
def test_luma_is_bt601_studio(rgb, expected):
    assert metrics.luma(torch.tensor(rgb)).item() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_a_known_offset():
    expected = 20 * math.log10(255 / (10 * 219 / 255))  # ten steps of grey are 10 * 219 / 255 of studio luma
    assert metrics.psnr_y(flat(110), flat(100)) == pytest.approx([expected] * 3, abs=1e-9)
    assert metrics.psnr_y(flat(100), flat(100)) == [math.inf] * 3


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The definition of SSIM, window by window."""
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
            m, n = (window * p).sum(), (window * q).sum()
            v, w = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
            c = (window * (p - m) * (q - n)).sum()
            below = (m * m + n * n + 6.5025) * (v + w + 58.5225)
            values.append((2 * m * n + 6.5025) * (2 * c + 58.5225) / below)
    return float(np.mean(values))


def test_ssim_equals_the_definition():
    a, b = video(1, 17, 21), video(1, 17, 21, seed=1)
    b = ((a.int() * 3 + b) // 4).to(torch.uint8)
    weights = np.array([0.299, 0.587, 0.114])
    expected = slow_ssim(a[0].numpy() @ weights, b[0].numpy() @ weights)
    assert 0.5 < expected < 0.99
    assert metrics.ssim_y(a, b) == pytest.approx([expected], abs=1e-5)


def test_ssim_of_equal_frames_is_one():
    assert metrics.ssim_y(video(2, 24, 30), video(2, 24, 30)) == pytest.approx([1, 1], abs=1e-12)


def test_temporal_difference_ignores_a_constant_error_and_sees_flicker():
    truth = smooth(4, 32, 48).clamp(20, 200)
    steady = truth + 7
    assert metrics.temporal_difference(steady, truth) == pytest.approx([0, 0, 0], abs=1e-9)
    flicker = truth.clone()
    flicker[1] += 10
    step = 10 * 219 / 255
    assert metrics.temporal_difference(flicker, truth) == pytest.approx([step, step, 0], abs=1e-9)


def test_colour_shift_is_signed_and_by_channel():
    out = flat(100)
    out[1, ..., 0], out[2, ..., 2] = 103, 95
    expected = torch.tensor([[0, 0, 0], [3, 0, 0], [0, 0, -5]], dtype=torch.float64)
    assert torch.equal(metrics.colour_shift(out, flat(100)), expected)


@pytest.mark.parametrize("period", [8, 16, 128])
def test_block_seams_of_known_steps(period):
    rows, columns = torch.arange(260)[:, None], torch.arange(390)
    texture = 100 + (rows + columns) % 2  # every step is 1; on a border it is 1 more or less than 5, in turn
    tiles = (rows // period + columns // period) % 2
    seamed = (texture + 5 * tiles).to(torch.uint8)[None, :, :, None].repeat(2, 1, 1, 3)
    assert metrics.block_seams(seamed, period) == pytest.approx(5, rel=0.01)
    assert metrics.block_seams(seamed, period + 1) < 1.2


def test_block_seams_needs_a_border_inside():
    with pytest.raises(ValueError, match="period must be in 2..31"):
        metrics.block_seams(flat(0), 32)


def test_chunk_jumps_looks_between_frames_20_and_21_then_every_eighth():
    difference = [1.0] * 40
    difference[20] = difference[28] = difference[36] = 3.0
    assert metrics.chunk_jumps(difference) == pytest.approx(3)
    with pytest.raises(ValueError, match="no chunk border"):
        metrics.chunk_jumps([1.0] * 20)


def test_vmaf_ranks_equal_above_blurred():
    pytest.importorskip("imageio_ffmpeg", reason="VMAF needs imageio-ffmpeg (extra: bench)")
    truth = smooth()
    same, worse = metrics.vmaf(truth, truth), metrics.vmaf(blur(truth), truth)
    assert len(same["vmaf"]) == len(worse["vmaf"]) == 4
    assert min(same["vmaf"]) > 95 and max(worse["vmaf"]) < 80


def test_vmaf_neg_gives_nothing_for_contrast_above_the_truths():
    pytest.importorskip("imageio_ffmpeg", reason="VMAF needs imageio-ffmpeg (extra: bench)")
    picture = smooth().int()
    truth = (128 + (picture - 128) // 3).to(torch.uint8)
    stronger = (128 + (picture - 128) // 2).to(torch.uint8)
    scores = metrics.vmaf(stronger, truth)
    assert np.mean(scores["vmaf_neg"]) < np.mean(scores["vmaf"]) - 2


@pytest.mark.parametrize("out, truth, match", [
    (flat(1), flat(1)[:2], "alike"), (flat(1).float(), flat(1).float(), "uint8"),
    (flat(1), flat(1).float(), "uint8"), (flat(1)[0], flat(1)[0], "uint8")],
    ids=["lengths", "float", "mixed", "one_frame"])
def test_metrics_refuse_what_is_not_two_like_videos(out, truth, match):
    for metric in (metrics.psnr_y, metrics.ssim_y, metrics.temporal_difference, metrics.colour_shift):
        with pytest.raises(ValueError, match=match):
            metric(out, truth)


@pytest.mark.parametrize("shape, left, right", [(2.0, 1.0, 1.0), (1.0, 0.5, 0.8), (0.7, 1.2, 0.4)])
def test_asymmetric_gaussian_finds_the_parameters_of_its_samples(shape, left, right):
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / shape, size=400_000) ** (1 / shape)  # |x| of a generalised Gaussian of scale 1
    x = np.where(rng.random(len(size)) < left / (left + right), -left * size, right * size)
    found = [v.item() for v in niqe.asymmetric_gaussian(torch.from_numpy(x)[None])]
    assert found == pytest.approx([shape, left, right], rel=0.02)


def slow_fit(x: np.ndarray) -> tuple[float, float, float]:
    """Shape and scales by search over the shapes, as the paper states it."""
    shapes = np.arange(0.2, 10.001, 0.001)
    table = np.array([math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in shapes])
    left, right = np.sqrt((x[x < 0] ** 2).mean()), np.sqrt((x[x > 0] ** 2).mean())
    side = left / right
    ratio = np.abs(x).mean() ** 2 / (x ** 2).mean() * (side ** 3 + 1) * (side + 1) / (side ** 2 + 1) ** 2
    shape = shapes[np.abs(table - ratio).argmin()]
    scale = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    return shape, left * scale, right * scale


def test_niqe_features_equal_the_definition():
    plane = metrics.grey(smooth(1, 96, 144)[0]).round().numpy()[:30, :40]
    x = np.arange(-3, 4)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    padded, normal = np.pad(plane, 3, "edge"), np.empty((30, 40))
    for i in range(30):
        for j in range(40):
            piece = padded[i:i + 7, j:j + 7]
            mean = (window * piece).sum()
            normal[i, j] = (plane[i, j] - mean) / (math.sqrt((window * (piece - mean) ** 2).sum()) + 1)
    piece = normal[10:20, 30:40]  # the eighth of 3 x 4 pieces of 10 x 10
    shape, left, right = slow_fit(piece)
    expected = [shape, (left + right) / 2]
    for down, along in ((0, 1), (1, 0), (1, 1), (-1, 1)):
        shape, left, right = slow_fit(piece * np.roll(piece, (down, along), (0, 1)))
        expected += [shape, (right - left) * math.gamma(2 / shape) / math.gamma(1 / shape), left, right]
    assert niqe.features(torch.from_numpy(plane), 10)[7].tolist() == pytest.approx(expected, abs=1e-9)


def own_statistics(frame: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    found = niqe.picture_features(frame)
    return found.mean(0), np.cov(found, rowvar=False)


def test_niqe_is_zero_for_its_own_statistics_and_grows_with_blur():
    frame = smooth(1, 192, 384)[0]
    natural = own_statistics(frame)
    natural = natural[0], natural[1] + 1e-3 * np.eye(36)
    assert niqe.niqe(frame, natural) == pytest.approx(0, abs=1e-6)
    assert niqe.niqe(blur(frame[None])[0], natural) > 5


def test_niqe_distance_equals_the_definition():
    frame, rng = smooth(1, 192, 384)[0], np.random.default_rng(0)
    mean, covariance = own_statistics(frame)
    base = rng.normal(size=(36, 36))
    natural = mean + rng.normal(size=36), base @ base.T + np.eye(36)
    difference = natural[0] - mean
    expected = math.sqrt(difference @ np.linalg.solve((natural[1] + covariance) / 2, difference))
    assert niqe.niqe(frame, natural) == pytest.approx(expected, rel=1e-6)


def test_niqe_says_what_it_cannot_judge():
    natural = np.zeros(36), np.eye(36)
    with pytest.raises(ValueError, match="two 96x96 patches"):
        niqe.niqe(video(1, 96, 100)[0], natural)
    with pytest.raises(ValueError, match="not flat"):
        niqe.niqe(flat(50, 1, 192, 192)[0], natural)


def test_bicubic_is_pytorchs():
    frames = video(2, 19, 23)
    expected = F.interpolate(frames.permute(0, 3, 1, 2).double(), scale_factor=4, mode="bicubic")
    difference = resize.grow(frames, "bicubic").double() - expected.permute(0, 2, 3, 1).clamp(0, 255)
    assert difference.abs().max() <= 0.501  # rounding to 8 bits


def test_lanczos_equals_the_definition():
    line = np.random.default_rng(0).random(20)
    found = resize.growth_matrix(20, "lanczos").double() @ torch.from_numpy(line)
    for i in (0, 1, 33, 42, 79):
        centre = (i + 0.5) / 4 - 0.5
        taps = range(math.floor(centre) - 3, math.floor(centre) + 5)
        weights = [np.sinc(centre - t) * np.sinc((centre - t) / 4) for t in taps]
        expected = sum(w * line[min(max(t, 0), 19)] for w, t in zip(weights, taps)) / sum(weights)
        assert found[i].item() == pytest.approx(expected, abs=1e-6)


def test_shrink_area_is_the_rounded_mean():
    frames = video(2, 8, 12)
    expected = F.avg_pool2d(frames.permute(0, 3, 1, 2).double(), 4).permute(0, 2, 3, 1)
    assert (resize.shrink_area(frames).double() - expected).abs().max() <= 0.5
    with pytest.raises(ValueError, match="multiples of 4"):
        resize.shrink_area(video(1, 9, 12))


PARAM = """7767517
8 9
Input        x      0 1 x
Split        split  1 2 x a b
Convolution  conv0  1 1 a c 0=5 1=3 4=1 5=1 6=135
PReLU        act    1 1 c d 0=5
Convolution  conv1  1 1 d e 0=12 1=3 4=1 6=540
PixelShuffle up     1 1 e f 0=2
Interp       near   1 1 b g 0=1 1=2.000000e+00 2=2.000000e+00
BinaryOp     add    2 1 f g y
"""


@pytest.fixture
def tiny_ncnn(tmp_path):
    """Paths of a network's files, with a float16 and a float32 convolution, and the same in PyTorch."""
    torch.manual_seed(0)
    w0, w1 = torch.randn(5, 3, 3, 3).half(), torch.randn(12, 5, 3, 3)
    b0, slope = torch.randn(5), torch.rand(5)
    half = w0.numpy().tobytes()
    blob = struct.pack("<I", 0x01306B47) + half + bytes(-len(half) % 4)
    blob += b0.numpy().tobytes() + slope.numpy().tobytes()
    blob += struct.pack("<I", 0) + w1.numpy().tobytes()
    param, weights = tmp_path / "tiny.param", tmp_path / "tiny.bin"
    param.write_text(PARAM)
    weights.write_bytes(blob)

    def network(x):
        y = F.conv2d(F.prelu(F.conv2d(x, w0.float(), b0, padding=1), slope), w1, padding=1)
        return F.pixel_shuffle(y, 2) + F.interpolate(x, scale_factor=2, mode="nearest")
    return param, weights, network


def test_ncnn_model_equals_the_same_network_in_pytorch(tiny_ncnn):
    param, weights, network = tiny_ncnn
    x = torch.rand(2, 3, 7, 9)
    y = animevideov3.run_ncnn(animevideov3.read_ncnn(param, weights), x)
    assert y.shape == (2, 3, 14, 18)
    assert torch.equal(y, network(x))


@pytest.mark.parametrize("change, match", [
    (lambda p, w: p.write_text(PARAM.replace("7767517", "42")), "must begin with 7767517"),
    (lambda p, w: p.write_text(PARAM.replace("PReLU ", "Sigmoid ")), "not a layer understood"),
    (lambda p, w: p.write_text(PARAM.replace("4=1 6=540", "4=1 3=2 6=540")), "not a layer understood"),
    (lambda p, w: w.write_bytes(w.read_bytes()[:-8]), "inside the weights"),
    (lambda p, w: w.write_bytes(w.read_bytes() + bytes(4)), "must have the"),
    (lambda p, w: w.write_bytes(b"\x4b\x4d\x0d\x00" + w.read_bytes()[4:]), "float32 or float16"),
], ids=["magic", "layer", "option", "short", "long", "int8"])
def test_ncnn_files_that_are_not_understood_are_errors(tiny_ncnn, change, match):
    param, weights, _ = tiny_ncnn
    change(param, weights)
    with pytest.raises(ValueError, match=match):
        animevideov3.read_ncnn(param, weights)


@pytest.mark.parametrize("old, new", [("2 1 f g y", "2 1 f g y 0=2"), ("1 1 b g 0=1", "1 1 b g 0=2")],
                         ids=["multiply", "bilinear"])
def test_ncnn_operations_that_are_not_understood_are_errors(tiny_ncnn, old, new):
    param, weights, _ = tiny_ncnn
    param.write_text(PARAM.replace(old, new))
    layers = animevideov3.read_ncnn(param, weights)
    with pytest.raises(ValueError, match="not understood"):
        animevideov3.run_ncnn(layers, torch.rand(1, 3, 4, 4))


def test_the_city_clip_that_ships_can_be_read():
    city, = (clip for clip in clips.CLIPS if clip.name == "city")
    frames = clips.read_frames(clips.ROOT / city.low, 97)
    assert frames.shape == (97, 96, 176, 3) and frames.dtype == torch.uint8


def test_sheet_crops_follow_the_detail_and_do_not_repeat(tmp_path):
    truth = flat(100, 6, 400, 900)
    truth[:, 64:320, 600:856] = video(6, 256, 256)
    where = sheet.pick_crops(truth)
    assert [t for t, _, _ in where] == [1, 3, 5]
    _, top, left = where[0]
    assert abs(top - 64) <= 16 and abs(left - 600) <= 16
    assert len({(top, left) for _, top, left in where}) == 3
    rows = [(str(t), [crop, crop]) for (t, _, _), crop in zip(where, sheet.crops(truth, where))]
    sheet.write_sheet(tmp_path / "made" / "sheet.png", ["truth", "ours"], rows)
    picture = np.asarray(Image.open(tmp_path / "made" / "sheet.png"))
    row = np.s_[sheet.GAP + sheet.LABEL:sheet.GAP + sheet.LABEL + 256]
    assert np.array_equal(picture[row, sheet.GAP:sheet.GAP + 256], rows[0][1][0].numpy())
