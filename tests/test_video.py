"""Video in and out with a stand-in for the model: times, colours, other streams, turning, depth, threads,
memory.
"""
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from flashvsr_model import PRESETS, StreamingUpscaler
from flashvsr_model.fuse import expected_shapes
from flashvsr_model.pictures import FolderWriter
from flashvsr_model.pipeline import read_ahead, upscale
from flashvsr_model.pixels import UserError, upright
from flashvsr_model.video import open_clip
from flashvsr_model.video_out import VideoWriter, pixel_format

from .stand_in import Nearest, facts, moving, write_video

ROOT = Path(__file__).parents[1]
MATRIX = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}      # AVColorSpace -> Kr, Kb


def run(source, target, *, scale=4, codec=None, crf=None, notes=None, upscaler=None, **options):
    """source through the stand-in into target; the clip, for what was found out while reading."""
    notes = [] if notes is None else notes
    clip = open_clip(str(source), note=notes.append, **options)
    size = clip.width * scale, clip.height * scale
    writer = (VideoWriter(clip, str(target), *size, codec=codec, crf=crf, note=notes.append) if target.suffix
              else FolderWriter(clip, str(target), *size))
    upscale(upscaler or Nearest(), clip, writer)
    return clip


def yuv(rgb, space, full, depth):
    """Reference in float64: RGB in [0, 1] to the code values of Y, Cb, Cr."""
    kr, kb = MATRIX[space]
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    unit = 2 ** (depth - 8)
    if full:
        top = 2 ** depth - 1
        return y * top, (b - y) / (2 - 2 * kb) * top + 128 * unit, (r - y) / (2 - 2 * kr) * top + 128 * unit
    return ((16 + 219 * y) * unit, (128 + 224 * (b - y) / (2 - 2 * kb)) * unit,
            (128 + 224 * (r - y) / (2 - 2 * kr)) * unit)


def write_patches(path, colours, space, full, depth, tagged):
    """A lossless clip of one flat frame a colour, its YUV from the reference above, not from FFmpeg's
    conversion.
    """
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height = 32, 32
        stream.pix_fmt = "yuv420p" if depth == 8 else "yuv420p10le"
        context = stream.codec_context
        if tagged:
            context.colorspace, context.color_range = space, 2 if full else 1
            context.color_primaries = context.color_trc = 1
        for number, rgb in enumerate(colours):
            frame = av.VideoFrame(32, 32, stream.pix_fmt)
            for plane, value in zip(frame.planes, yuv(rgb, space, full, depth)):
                kind = np.uint8 if depth == 8 else np.uint16
                plane.update(np.full(plane.buffer_size // kind().itemsize, round(value), kind).tobytes())
            if tagged:
                frame.colorspace, frame.color_range = space, 2 if full else 1
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def codes(path):
    """Y, Cb, Cr in the middle of every frame."""
    with av.open(str(path)) as container:
        found = []
        for frame in container.decode(video=0):
            kind = np.uint8 if frame.format.components[0].bits == 8 else np.uint16
            found.append([int(np.frombuffer(plane, kind).reshape(plane.height, -1)
                              [plane.height // 2, plane.width // 2])
                          for plane in frame.planes])
        return found


COLOURS = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (0.8, 0.2, 0.2), (0.2, 0.8, 0.2), (0.2, 0.2, 0.8),
           (0.9, 0.8, 0.1)]


@pytest.mark.parametrize("depth", [8, 10], ids=["8bit", "10bit"])
@pytest.mark.parametrize("space, full, tagged", [
    (1, False, True), (1, True, True), (6, False, True), (6, True, True), (9, False, True), (9, True, True),
    (6, False, False)], ids=["bt709", "bt709-full", "bt601", "bt601-full", "bt2020", "bt2020-full",
                             "untagged"])
def test_colour_is_right_inside_and_neutral_through(tmp_path, space, full, depth, tagged):
    source = write_patches(tmp_path / "in.mkv", COLOURS, space, full, depth, tagged)
    clip = open_clip(str(source))
    top = 255 if depth == 8 else 65535
    for item, rgb in zip(clip.items, COLOURS):
        error = np.abs(item.rgb / top - np.asarray(rgb)).max()
        assert error <= 2.5 / (2 ** depth - 1) * (1 if full else 255 / 219), (rgb, item.rgb[16, 16], error)
    run(source, tmp_path / "out.mkv", codec="ffv1")
    before, after = np.asarray(codes(source)), np.asarray(codes(tmp_path / "out.mkv"))
    assert np.abs(before - after).max() <= 1, np.abs(before - after).max(axis=0)


def test_tags_are_kept_and_an_untagged_clip_keeps_the_matrix_players_take(tmp_path):
    tags = (9, 16, 9, 1)                                # BT.2020, PQ
    source = write_video(tmp_path / "hdr.mkv", [f.astype(np.uint16) * 257 for f in moving(3, 64, 64)],
                         codec="libx265", pix_fmt="yuv420p10le", tags=tags,
                         options={"x265-params": "log-level=error"})
    run(source, tmp_path / "hdr_out.mkv", codec="libx265")
    found = facts(tmp_path / "hdr_out.mkv")
    assert (found["tags"], found["pix_fmt"]) == (tags, "yuv420p10le")
    small = write_video(tmp_path / "small.mp4", moving(3))
    run(small, tmp_path / "small_out.mp4")
    assert facts(tmp_path / "small_out.mp4")["tags"] == (2, 2, 2, 0)
    # 336 -> 1344: players would change to BT.709
    grows = write_video(tmp_path / "grows.mp4", moving(2, 336, 48))
    run(grows, tmp_path / "grows_out.mp4")
    assert facts(tmp_path / "grows_out.mp4")["tags"][2] == 6


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_variable_frame_rate_keeps_every_time(tmp_path, suffix):
    pts = [0, 40, 90, 100, 250, 251, 400, 1000, 1010, 1500]
    source = write_video(tmp_path / "in.mkv", moving(10), pts=pts, time_base=Fraction(1, 1000))
    run(source, tmp_path / f"out{suffix}")
    assert np.allclose(facts(tmp_path / f"out{suffix}")["times"], np.asarray(pts) / 1000, atol=6e-4)


@pytest.mark.parametrize("count", [1, 2, 24, 25, 26, 60], ids="{} frames".format)
def test_as_many_frames_come_out_in_order(tmp_path, count):
    source = write_video(tmp_path / "in.mkv", moving(count), codec="ffv1", pix_fmt="yuv444p")
    run(source, tmp_path / "out.mkv", codec="ffv1")
    before, after = facts(source), facts(tmp_path / "out.mkv")
    assert after["times"] == before["times"] and len(after["frames"]) == count
    for a, b in zip(before["frames"], after["frames"]):
        assert np.abs(a.repeat(4, 0).repeat(4, 1).astype(int) - b).max() <= 3


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)], ids=["25", "29.97"])
def test_sound_subtitles_chapters_and_names_are_kept(tmp_path, rate):
    srt = [(0, 500, "one"), (700, 900, "two")]
    source = write_video(tmp_path / "in.mkv", moving(50), rate=rate, time_base=Fraction(1, 1000), audio=2.1,
                         srt=srt, pts=[round(1000 * n / rate) for n in range(50)], sar=Fraction(4, 3),
                         chapters=[(0, 800, "first"), (800, 2000, "second")], metadata={"title": "A name"})
    run(source, tmp_path / "out.mkv")
    before, after = facts(source), facts(tmp_path / "out.mkv")
    assert (after["packets"] == before["packets"] and len(after["packets"][1]) > 90
            and len(after["packets"][2]) == 2)
    assert after["times"] == before["times"] and abs(after["duration"] - before["duration"]) < 0.001
    assert after["rate"] == before["rate"] and after["sar"] == Fraction(4, 3)
    assert [(c["start"], c["end"], c["metadata"]) for c in after["chapters"]] == \
        [(c["start"], c["end"], c["metadata"]) for c in before["chapters"]]
    assert after["metadata"]["title"] == "A name"


def test_a_stream_the_container_cannot_hold_is_named(tmp_path):
    source = write_video(tmp_path / "in.mkv", moving(5), audio=0.2, srt=[(0, 100, "one")])
    notes = []
    run(source, tmp_path / "out.mp4", notes=notes)
    assert notes == ["subtitle stream 2 (subrip) is left out: mp4 cannot hold it; .mkv may"]
    assert list(facts(tmp_path / "out.mp4")["packets"]) == [1]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_start_and_frames_cut_sound_and_subtitles_too(tmp_path, suffix):
    source = write_video(tmp_path / "in.mkv", moving(100), audio=4.0, options={"g": "30"},
                         srt=[(0, 1500, "across"), (2200, 100, "inside"), (3500, 100, "after")],
                         chapters=[(0, 1500, "a"), (1500, 4000, "b")])
    clip = run(source, tmp_path / f"out{suffix}", start=1.2, frames=40)
    before, after = facts(source), facts(tmp_path / f"out{suffix}")
    assert (clip.cut and len(after["frames"]) == 40
            and np.allclose(after["times"], np.arange(40) / 25, atol=1e-3))
    assert np.abs(after["frames"][0][::4, ::4].astype(int) - before["frames"][30]).mean() < 6
    sound = [data for _, data in before["packets"][1]]
    kept = after["packets"][1]
    first = sound.index(kept[0][1])
    assert [data for _, data in kept] == sound[first:first + len(kept)]
    assert abs(before["packets"][1][first][0] - kept[0][0] - 1.2) < 2e-3  # not moved against the picture
    assert 0 <= kept[0][0] < 0.03 and 1.6 - 0.05 < kept[-1][0] + 1024 / 48000 < 1.6 + 0.03
    assert ([c["metadata"]["title"] for c in after["chapters"]] == ["a", "b"]
            and abs(after["duration"] - 1.6) < 0.05)
    assert after["chapters"][0]["end"] * after["chapters"][0]["time_base"] == pytest.approx(0.3)
    if suffix == ".mkv":
        assert [(round(t, 3), d) for t, d in after["packets"][2]] == [(0, b"across"), (1.0, b"inside")]


@pytest.mark.parametrize("start, count", [(0.2, 115), (3.33, 36), (4.6, 5)])
@pytest.mark.parametrize("suffix", [".ts", ".avi", ".mkv", ".mp4", ".nut"])
def test_start_finds_its_frame_wherever_seeking_ends(tmp_path, suffix, start, count):
    source = write_video(tmp_path / f"in{suffix}", moving(120), codec="libx264", options={"g": "50"})
    run(source, tmp_path / "out.mkv", start=start)
    late = 2 if suffix == ".avi" else 0  # it has no times for frames that wait for others, so FFmpeg's are late
    assert len(facts(tmp_path / "out.mkv")["frames"]) == count + late


def test_start_after_the_end_is_an_error(tmp_path):
    source = write_video(tmp_path / "in.mkv", moving(10))
    with pytest.raises(UserError, match="no frame could be decoded at or after 5 s"):
        open_clip(str(source), start=5.0)


@pytest.mark.parametrize("degrees", [90, 180, -90], ids="{} degrees".format)
@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.ts", "folder"])
def test_a_turned_video_shows_the_same(tmp_path, degrees, target):
    source = write_video(tmp_path / "in.mp4", moving(3), matrix=degrees, sar=Fraction(3, 2))
    run(source, tmp_path / target)
    before = facts(source)
    shown = np.rot90(before["frames"][1], before["rotation"] // 90)
    assert before["rotation"] == (degrees if degrees != 180 else before["rotation"])
    if target == "folder":
        with av.open(str(tmp_path / target / "000002.png")) as picture:
            after = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    else:
        found = facts(tmp_path / target)
        after = np.rot90(found["frames"][1], found["rotation"] // 90)
        assert found["rotation"] == (0 if target.endswith("ts") else before["rotation"])
        if target.endswith("ts"):
            assert found["sar"] == (Fraction(3, 2) if degrees == 180 else Fraction(2, 3))
    assert after.shape == (shown.shape[0] * 4, shown.shape[1] * 4, 3)
    assert np.abs(after[2::4, 2::4].astype(int) - shown).mean() < 6


def test_upright_knows_the_eight_ways_and_refuses_others():
    picture = np.arange(6).reshape(2, 3, 1)
    for a, b, c, d in [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                       (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)]:
        turned = upright(picture, tuple(65536 * v for v in (a, b, 0, c, d, 0, 0, 0, 0)))
        # the centre of pixel (x, y), seen from the picture's middle, goes to (a x + c y, b x + d y)
        for y in range(2):
            for x in range(3):
                u, v = x - 1, y - 0.5
                height, width = turned.shape[:2]
                x2, y2 = a * u + c * v + (width - 1) / 2, b * u + d * v + (height - 1) / 2
                assert turned[round(y2), round(x2), 0] == picture[y, x, 0], (a, b, c, d)
    with pytest.raises(UserError, match="quarter turns"):
        upright(picture, (46341, 46341, 0, -46341, 46341, 0, 0, 0, 0))


def test_deep_colour_goes_through_the_model_as_floats_and_stays_deep(tmp_path):
    ramp = np.linspace(0, 60000, 64 * 32 * 3).astype(np.uint16).reshape(32, 64, 3)
    source = write_video(tmp_path / "in.mkv", [ramp] * 3, codec="ffv1", pix_fmt="yuv444p10le",
                         tags=(1, 1, 1, 1))
    model = Nearest()
    run(source, tmp_path / "out.mkv", codec="ffv1", upscaler=model)
    run(source, tmp_path / "png")
    assert model.dtypes == {"float32"}
    with av.open(str(source)) as a, av.open(str(tmp_path / "out.mkv")) as b:
        before, after = (next(c.decode(video=0)) for c in (a, b))
        assert after.format.name == "yuv444p10le"
        for p, q in zip(before.planes, after.planes):
            p, q = (np.frombuffer(v, np.uint16).reshape(v.height, -1)[:, :v.width].astype(int)
                    for v in (p, q))
            assert np.abs(p.repeat(4, 0).repeat(4, 1) - q).max() <= 1
    with av.open(str(tmp_path / "png" / "000001.png")) as picture:
        frame = next(picture.decode(video=0))
        assert frame.format.name == "rgb48be"
        # 10-bit YUV
        assert np.abs(frame.to_ndarray(format="rgb48le")[::4, ::4].astype(int) - ramp).max() < 400


@pytest.mark.parametrize("size", [(49, 33), (48, 33), (49, 32)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("scale", [2, 3, 4], ids="x{}".format)
def test_odd_sizes_are_never_cropped(tmp_path, size, scale):
    source = write_video(tmp_path / "in.mkv", moving(3, *size), pix_fmt="yuv444p")
    run(source, tmp_path / "out.mp4", scale=scale)
    found = facts(tmp_path / "out.mp4")
    assert found["size"] == (size[0] * scale, size[1] * scale) and len(found["frames"]) == 3
    assert found["frames"][0].shape == (size[1] * scale, size[0] * scale, 3)


def test_scale_is_the_large_result_made_smaller(tmp_path):
    source = write_video(tmp_path / "in.mkv", moving(3), codec="ffv1", pix_fmt="yuv444p")
    run(source, tmp_path / "out.mkv", codec="ffv1", scale=2)
    before, after = (facts(source)["frames"][1].astype(int),
                     facts(tmp_path / "out.mkv")["frames"][1].astype(int))
    assert after.shape == (64, 96, 3)
    assert np.abs(after[::2, ::2] - before).mean() < 6


@pytest.mark.parametrize("codec, chroma, depth, size, want", [
    ("libx264", "420", 8, (64, 64), "yuv420p"), ("libx264", "420", 10, (64, 64), "yuv420p10le"),
    ("libx264", "420", 12, (64, 64), "yuv420p10le"), ("libx264", "420", 8, (63, 64), "yuv444p"),
    ("libx264", "420", 8, (64, 63), "yuv422p"), ("libx264", "rgb", 8, (64, 64), "yuv420p"),
    ("libx265", "422", 12, (64, 64), "yuv422p12le"), ("ffv1", "rgb", 8, (64, 64), "bgr0"),
    ("ffv1", "rgb", 16, (64, 64), "rgb48le"), ("ffv1", "420", 8, (64, 64), "yuv420p"),
    ("libvpx-vp9", "420", 10, (64, 64), "yuv420p"), ("prores_ks", "420", 8, (64, 64), "yuv422p10le")])
def test_pixel_format_keeps_depth_and_chroma_where_the_codec_can(codec, chroma, depth, size, want):
    assert pixel_format(av.Codec(codec, "w"), chroma, depth, *size) == want


def test_folder_to_folder_and_video(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, rgb in enumerate(moving(12)):
        av.VideoFrame.from_ndarray(rgb).to_image().save(folder / f"shot {number}.png")  # natural: 9 before 10
    (folder / "notes.txt").write_text("not a picture")
    run(folder, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"shot {n}.png" for n in range(12))
    with av.open(str(tmp_path / "out" / "shot 11.png")) as picture:
        after = next(picture.decode(video=0)).to_ndarray(format="rgb24")
    assert (after[::4, ::4] == moving(12)[11]).all()
    run(folder, tmp_path / "out.mp4", rate=Fraction(10), crf=1)
    found = facts(tmp_path / "out.mp4")
    assert (np.allclose(found["times"], np.arange(12) / 10) and found["rate"] == 10
            and found["pix_fmt"] == "yuv420p")
    assert found["tags"] == (1, 1, 1, 1)
    assert np.abs(found["frames"][10][2::4, 2::4].astype(int) - moving(12)[10]).mean() < 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_pictures_with_exif_are_upright(tmp_path, suffix, orientation):
    """As a camera writes them: PyAV has no name for what FFmpeg hands on of it."""
    exif, folder = Image.Exif(), tmp_path / "in"
    exif[0x112] = orientation
    folder.mkdir()
    Image.fromarray(moving(1, 48, 32)[0]).save(folder / f"a{suffix}", exif=exif)
    with Image.open(folder / f"a{suffix}") as saved:
        upright = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    run(folder, tmp_path / "out")
    after = np.asarray(Image.open(tmp_path / "out" / "a.png"))[::4, ::4].astype(int)
    assert after.shape == upright.shape and np.abs(after - upright).mean() < 4
    run(folder / f"a{suffix}", tmp_path / "one.mkv")
    assert len(facts(tmp_path / "one.mkv")["frames"]) == 1


def test_pictures_of_different_depth(tmp_path):
    """The first one's depth is all pictures'; no bits are dropped without a word. Grey may be deep too."""
    Image.fromarray(np.full((32, 48), 40000, np.uint16)).save(tmp_path / "0.png")
    Image.fromarray(np.full((32, 48, 3), 150, np.uint8)).save(tmp_path / "1.png")
    run(tmp_path, tmp_path / "out")
    for name, level in (("0.png", 40000), ("1.png", 150 * 257)):
        with av.open(str(tmp_path / "out" / name)) as picture:
            after = next(picture.decode(video=0)).to_ndarray(format="rgb48le")
        assert after.shape == (128, 192, 3) and np.abs(after.astype(int) - level).max() <= 257
    (tmp_path / "0.png").rename(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"2\.png has 16 bits a colour, the pictures before it have 8"):
        run(tmp_path, tmp_path / "again")


def test_a_folder_of_different_sizes_names_the_picture(tmp_path):
    for number, size in enumerate([(48, 32), (48, 33)]):
        av.VideoFrame.from_ndarray(moving(1, *size)[0]).to_image().save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"1\.png is 48x33, the pictures before it are 48x32"):
        run(tmp_path, tmp_path / "out.mkv")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95], ids="{:.0%}".format)
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_truncated_video_gives_what_it_holds_and_says_so(tmp_path, suffix, keep):
    noise = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(100)]
    source = write_video(tmp_path / f"in{suffix}", noise, audio=4.0, options={"g": "10"})
    if suffix == ".mp4":                                # the index in front, or nothing could be read
        with av.open(str(source)) as a, av.open(str(tmp_path / "front.mp4"), "w",
                                                options={"movflags": "faststart"}) as b:
            streams = {s.index: b.add_stream_from_template(s, opaque=True) for s in a.streams}
            for packet in a.demux():
                if packet.size:
                    packet.stream = streams[packet.stream_index]
                    b.mux(packet)
        source = tmp_path / "front.mp4"
    whole = source.read_bytes()
    assert not run(source, tmp_path / f"whole{suffix}").problems
    source.write_bytes(whole[:int(len(whole) * keep)])
    clip = run(source, tmp_path / f"out{suffix}")
    frames = len(facts(tmp_path / f"out{suffix}")["frames"])
    assert clip.problems and all("truncated" in p or "breaks off" in p or "damaged" in p
                                 for p in clip.problems)
    assert 0.5 * keep * 100 < frames < 100


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_the_real_model_takes_and_gives_what_is_read_and_written(tmp_path, pix_fmt):
    torch.manual_seed(0)
    config = PRESETS["compact"]
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in expected_shapes(config).items()}
    source = write_video(tmp_path / "in.mkv", moving(27), pix_fmt=pix_fmt)
    run(source, tmp_path / "out.mkv", upscaler=StreamingUpscaler.from_tensors(config, tensors))
    found = facts(tmp_path / "out.mkv")
    assert (len(found["frames"]), found["size"], found["pix_fmt"]) == (27, (192, 128), pix_fmt)


def test_exceptions_cross_the_threads_and_nothing_stays(tmp_path):
    def broken():
        yield 1
        raise KeyError("from the reader")
    items = read_ahead(broken(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="from the reader"):
        next(items)

    source = write_video(tmp_path / "in.mkv", moving(60))
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path / "out.mkv", upscaler=Nearest({30: lambda: 1 / 0}))
    clip = open_clip(str(source))
    writer = VideoWriter(clip, str(tmp_path / "out.mkv"), 192, 128)
    writer.picture = lambda picture: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        upscale(Nearest(), clip, writer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]


MEMORY = """
import resource, sys
from tests.stand_in import Nearest
from tests.test_video import run
from pathlib import Path
peaks = {}
def note(n):
    peaks[n] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
model = Nearest({n: (lambda n=n: note(n)) for n in (500, 1000, 2000, 2999)})
run(Path(sys.argv[1]), Path(sys.argv[2]), upscaler=model, codec="ffv1")
print(*(peaks[n] for n in sorted(peaks)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_length(tmp_path):
    source = write_video(tmp_path / "in.mp4", moving(100, 32, 32) * 30, audio=120.0,
                         options={"preset": "ultrafast"})
    done = subprocess.run([sys.executable, "-c", MEMORY, source, tmp_path / "out.mkv"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    held = [int(v) / 2**20 for v in done.stdout.split()]
    # MiB; 2,500 results at this size are 117 MiB
    assert len(held) == 4 and max(held[1:]) - held[0] < 12, held
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) == 3000
