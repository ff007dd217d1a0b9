"""The pack and the clips made from it, on a tiny pack that the packer makes from drawn pictures and films."""
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flashvsr_model.training import pack
from flashvsr_model.training.data import ClipSource, Mix, load_video, ping_pong, trajectories, warp

FILM_ONLY = Mix(synthetic=0, film=1, real=0, shrink=(1.0,))
STILL_ONLY = Mix(synthetic=1, film=0, real=0, sprites=0, motion_blur=0, texture=0)


def draw(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Noise, detailed enough to be taken for a texture; a fourth channel is a disc."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    if channels == 4:
        y, x = np.mgrid[:height, :width]
        radius = np.hypot(y - height / 2, x - width / 2)
        pixels[..., 3] = 255 * (radius < min(height, width) / 2.2)
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_film(path: Path, levels: list, size: tuple[int, int] = (96, 64)) -> None:
    """One frame of size (width, height) for each grey level or (height, width, 3) picture."""
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=24, width=size[0], height=size[1], pix_fmt="yuv420p",
                                   options={"crf": "1"})
        for i, level in enumerate(levels):
            pixels = np.ascontiguousarray(np.broadcast_to(np.uint8(level), (size[1], size[0], 3)))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 24)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


@pytest.fixture(scope="module")
def share(tmp_path_factory) -> Path:
    """What unpacked packages look like: pictures to keep, held-out ones, technical maps, drawings."""
    share = tmp_path_factory.mktemp("raw") / "deb/x/usr/share"
    for i, name in enumerate(("Hill_by_Someone", "Lake_by_Someone", "life_by_Aitzol_Berasategi")):
        save(draw(160, 240, seed=i), share / f"backgrounds/{name}.jpg")
    for name in ("Bark", "flower"):
        save(draw(160, 240), share / f"backgrounds/mate/nature/{name}.jpg")
    for name in ("Path", "EveningGlow", "ColorfulCups"):
        save(draw(160, 240), share / f"wallpapers/{name}/contents/images/2560x1600.jpg")
    save(draw(160, 240), share / "lxqt/wallpapers/drop.png")
    save(draw(160, 240), share / "lxqt/wallpapers/logo.png")
    karts = share / "games/supertuxkart/data/textures"
    for name in ("wall", "wall_nm", "road_mask"):
        save(draw(640, 800), karts / f"{name}.png")
    save(Image.new("RGB", (800, 640), "green"), karts / "flat.png")
    save(draw(64, 64), karts / "tiny.png")
    save(draw(220, 230, 4), share / "tuxpaint/stamps/animals/fox.png")
    save(draw(220, 230, 4), share / "tuxpaint/stamps/cartoon/fox.png")
    return share


@pytest.fixture(scope="module")
def pack_dir(share, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pack")
    for kind in ("still", "tex", "sprite", "video"):
        (out / kind).mkdir()
    pack.pack_stills(pack.still_paths(share), out / "still", 90)
    pack.pack_textures(share, out / "tex", 90)
    pack.pack_sprites(share, out / "sprite", 90)
    save_film(out / "film.mp4", [10 + 8 * i for i in range(30)])   # 10, 18, ... 242
    pack.pack_video(out / "film.mp4", [(2, 5), (20, 4)], out / "video/bbb360.mp4", size=(96, 64), crf=1)
    pack.pack_video(out / "film.mp4", [(0, 8)], out / "video/road.mp4", size=(48, 32), crf=1)
    return out


def grey(clips: torch.Tensor) -> torch.Tensor:
    """Brightness of every frame, in 8-bit levels."""
    return clips.mean((-3, -2, -1)) * 255


def test_held_out_and_unsuitable_pictures_are_not_packed(pack_dir):
    names = {kind: {p.stem for p in (pack_dir / kind).iterdir()} for kind in ("still", "tex", "sprite")}
    assert names["still"] == {"Hill_by_Someone", "Lake_by_Someone", "Bark", "Path", "drop"}
    assert not names["still"] & pack.HELD_OUT_STILLS
    assert names["tex"] == {"000"} and names["sprite"] == {"000"}


def test_pictures_are_halved_and_sprites_keep_alpha(pack_dir):
    assert Image.open(pack_dir / "still/Bark.webp").size == (120, 80)
    assert Image.open(pack_dir / "tex/000.webp").size == (400, 320)
    sprite = Image.open(pack_dir / "sprite/000.webp")
    assert sprite.mode == "RGBA" and sprite.getpixel((0, 0))[3] == 0 and sprite.getpixel((115, 110))[3] == 255


@pytest.mark.parametrize("seed", range(20))
def test_film_segments_keep_off_the_held_out_shot(seed):
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted({int(x) for x in rng.integers(1, 14000, 150)}), 14315]
    segments = pack.film_segments(cuts)
    for first, length in segments:
        frames = set(range(first, first + length))
        assert frames <= set(pack.FILM_BODY) and not frames & set(pack.HELD_OUT_FRAMES)
        assert not frames & set(cuts[1:-1]) - {first}
    assert all(a + k <= b for (a, k), (b, _) in zip(segments, segments[1:]))


def test_film_segments_drop_a_touching_shot_whole():
    expected = [(382, 25), (726, 25), (1071, 25), (1437, 25)]
    assert pack.film_segments([378, 1100, 1146, 1345, 1400, 1500]) == expected


def test_cuts_are_found(tmp_path):
    save_film(tmp_path / "film.mp4", [20] * 10 + [200] * 12 + [90] * 8)
    assert pack.find_cuts(tmp_path / "film.mp4") == [0, 10, 22, 30]


def test_packed_video_holds_the_segments(pack_dir):
    video = load_video(pack_dir / "video/bbb360.mp4", torch.device("cpu"))
    assert video.segments == ((0, 5), (5, 4)) and video.frames.shape == (9, 64, 96, 3)
    expected = torch.tensor([10.0 + 8 * i for i in (2, 3, 4, 5, 6, 20, 21, 22, 23)])
    torch.testing.assert_close(video.frames.float().mean((1, 2, 3)), expected, rtol=0, atol=2)


def test_native_windows_come_from_the_four_quarters(tmp_path):
    corners = np.zeros((64, 96, 3), np.uint8)
    corners[:32, 48:], corners[32:, :48], corners[32:, 48:] = 80, 160, 240
    save_film(tmp_path / "film.mp4", [corners] * 8)
    segments = [(0, 2), (2, 1), (4, 2), (7, 1)]
    pack.pack_video(tmp_path / "film.mp4", segments, tmp_path / "out.mp4", size=(40, 24), crf=1, native=True)
    levels = load_video(tmp_path / "out.mp4", torch.device("cpu")).frames.float().mean((1, 2, 3))
    torch.testing.assert_close(levels, torch.tensor([0.0, 0, 80, 160, 160, 240]), rtol=0, atol=2)


def test_packer_refuses_segments_beyond_the_end(pack_dir, tmp_path):
    with pytest.raises(ValueError, match="must hold the frames of all segments, got only 2"):
        pack.pack_video(pack_dir / "film.mp4", [(28, 5)], tmp_path / "x.mp4", size=(96, 64), crf=20)


def test_pack_command_says_what_is_missing(tmp_path, capsys):
    assert pack.main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert "fetch_data.sh" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("first, count, length, expected", [
    (0, 9, 4, [0, 1, 2, 3, 2, 1, 0, 1, 2]), (4, 4, 4, [2, 1, 0, 1]), (1, 3, 2, [1, 0, 1]),
    (0, 3, 1, [0, 0, 0]), (3, 2, 9, [3, 4]),
], ids=["forth and back", "from the way back", "two", "one", "part"])
def test_ping_pong(first, count, length, expected):
    assert ping_pong(first, count, length).tolist() == expected


def test_batch_shape_range_and_seed(pack_dir):
    first, again, other = (ClipSource(pack_dir, "cpu", seed=seed) for seed in (1, 1, 2))
    clips = first.batch(12, 5, 32, 48)
    assert clips.shape == (12, 5, 3, 32, 48) and clips.dtype == torch.float32
    assert 0 <= clips.min() and clips.max() <= 1 and clips.isfinite().all()
    assert torch.equal(clips, again.batch(12, 5, 32, 48))
    assert not torch.equal(clips, other.batch(12, 5, 32, 48))
    assert not torch.equal(clips, first.batch(12, 5, 32, 48))


def test_film_clips_stay_in_a_segment_and_run_forth_and_back(pack_dir):
    source = ClipSource(pack_dir, "cpu", seed=0, mix=FILM_ONLY)
    number = ((grey(source.batch(40, 12, 32, 32)) - 10) / 8).round().int()
    for clip in number:
        assert {*clip.tolist()} in ({2, 3, 4, 5, 6}, {20, 21, 22, 23})
        assert (clip.diff().abs() == 1).all()
    assert (number[:, 0] < number[:, 1]).any() and (number[:, 0] > number[:, 1]).any()   # both directions


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (80, 120)], ids=["crop", "whole", "larger"])
@pytest.mark.parametrize("shrink", [1.0, 1.5, 3.0])
def test_film_clips_of_any_size(pack_dir, size, shrink):
    mix = Mix(synthetic=0, film=1, real=0, shrink=(shrink,))
    assert ClipSource(pack_dir, "cpu", seed=0, mix=mix).batch(2, 3, *size).shape == (2, 3, 3, *size)


def test_still_camera_is_still_and_another_is_not(pack_dir):
    for share, moves in ((1.0, False), (0.0, True)):
        mix = Mix(**{**vars(STILL_ONLY), "still_camera": share})
        clips = ClipSource(pack_dir, "cpu", seed=0, mix=mix).batch(4, 6, 32, 32)
        assert bool(clips.diff(dim=1).abs().amax((1, 2, 3, 4)).gt(0.02).all()) == moves


def test_sprites_move_over_a_still_background(pack_dir):
    bare = {**vars(STILL_ONLY), "still_camera": 1.0, "sprites": 1.0, "speed": 3.0}
    clips = ClipSource(pack_dir, "cpu", seed=0, mix=Mix(**bare)).batch(8, 6, 48, 48)
    moving = clips.diff(dim=1).abs().amax((1, 2)) > 0.02
    assert 0.02 < moving.float().mean() < 0.98


def test_sprites_cover_the_background_by_their_alpha(pack_dir):
    source = ClipSource(pack_dir, "cpu", seed=0, mix=Mix(**{**vars(STILL_ONLY), "sprites": 1.0}))
    white = torch.tensor([255, 255, 255, 128], dtype=torch.uint8).expand(50, 50, 4)
    source.pictures["sprite"] = [replace(source.pictures["sprite"][0], pixels=white)]
    source.pictures["still"] = [replace(p, pixels=p.pixels * 0) for p in source.pictures["still"]]
    clips = source.batch(6, 3, 48, 48)
    half, twice = 128 / 255, 1 - (127 / 255) ** 2   # one or two layers over black
    level = clips.round(decimals=2)
    assert (level == 0).any() and (level == round(half, 2)).any() and (level == round(twice, 2)).any()
    assert clips.max() < twice + 0.1   # bicubic overshoot at the edges


def test_flips_happen_half_the_time(pack_dir):
    source = ClipSource(pack_dir, "cpu", seed=0, mix=FILM_ONLY)
    firsts = [int(source._flip(torch.arange(3))[0]) for _ in range(100)]
    assert set(firsts) == {0, 2} and 30 < firsts.count(2) < 70


def test_motion_blur_averages_the_exposure(pack_dir):
    fast = {**vars(STILL_ONLY), "still_camera": 0.0, "speed": 8.0}
    sharp, blurred = (ClipSource(pack_dir, "cpu", seed=0, mix=Mix(**{**fast, "motion_blur": share}))
                      .batch(6, 4, 32, 32).diff(dim=-1).abs().mean() for share in (0.0, 1.0))
    assert blurred < 0.8 * sharp


def test_steps_of_a_path_begin_with_the_frame():
    one, four = (trajectories(np.random.default_rng(0), 3, 5, steps, Mix()) for steps in (1, 4))
    np.testing.assert_allclose(four[:, ::4], one)
    np.testing.assert_allclose(four[:, 2:17:4], 0.75 * one[:, :4] + 0.25 * one[:, 1:], atol=1e-12)


def test_warp_without_motion_copies_and_one_pixel_shifts():
    pictures = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    paths = np.zeros((2, 3, 4))
    paths[:, 1, 0], paths[:, 2, 1] = 1, 2   # one pixel to the right, two down
    seen = warp(pictures, paths, (16, 20), "reflection")
    torch.testing.assert_close(seen[:, 0], pictures, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[:, 1, :, :, :-1], pictures[..., 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[:, 2, :, :-2], pictures[:, :, 2:], rtol=0, atol=1e-5)


def test_warp_turns_and_zooms_about_the_middle():
    picture = torch.zeros(1, 1, 17, 17)
    picture[..., 8, 12] = 1   # 4 right of the middle
    paths = np.array([[[0, 0, np.pi / 2, 0]], [[0, 0, 0, -np.log(1.5)]]])
    turned, closer = warp(picture.expand(2, -1, -1, -1), paths, (17, 17), "zeros")[:, 0, 0]
    assert divmod(int(turned.argmax()), 17) == (4, 8)
    assert divmod(int(closer.argmax()), 17) == (8, 14)


@pytest.mark.parametrize("kind, mix", [("sprite", Mix()), ("real", Mix()), ("tex", Mix())])
def test_a_missing_kind_is_named_unless_unused(pack_dir, tmp_path, kind, mix):
    for name in ("still", "tex", "sprite", "video"):
        (tmp_path / name).mkdir()
        for file in (pack_dir / name).iterdir():
            if name != kind and not (kind == "real" and file.name.startswith("road")):
                (tmp_path / name / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"must hold files of kind '{kind}'"):
        ClipSource(tmp_path, "cpu", seed=0, mix=mix)
    unused = {"sprite": {"sprites": 0}, "real": {"real": 0}, "tex": {"texture": 0}}[kind]
    assert ClipSource(tmp_path, "cpu", seed=0, mix=Mix(**unused)).batch(4, 2, 16, 16).isfinite().all()


def test_a_video_unlike_its_list_is_refused(pack_dir, tmp_path):
    (tmp_path / "bbb.mp4").symlink_to(pack_dir / "video/bbb360.mp4")
    for lengths in ("5 3", "5 5"):
        (tmp_path / "bbb.mp4.txt").write_text(lengths)
        with pytest.raises(ValueError, match="frames of its segments, got 9"):
            load_video(tmp_path / "bbb.mp4", torch.device("cpu"))
