"""The command line with a stand-in for the model: what is kept, what is refused, and in which words."""
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flashvsr_model import cli
from flashvsr_model.arguments import seconds
from flashvsr_model.doctor import report

from .stand_in import Nearest, facts, moving, write_video

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, resource, signal, sys
from flashvsr_model.cli import main
from tests.stand_in import Nearest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
at = {}
for word in sys.argv[1].split():
    name, frame = word.split("@")
    at[int(frame)] = {"int": lambda: os.kill(os.getpid(), signal.SIGINT),
                      "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
                      "small": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))}[name]
sys.exit(main(sys.argv[2:], load=Nearest(at)))
"""


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "in.mkv", moving(60), audio=2.4)


def flashvsr(*words, load=None):
    """Exit status of the command line in this process."""
    try:
        return cli.main([str(word) for word in words], load=load or Nearest())
    except SystemExit as done:
        return done.code


def program(events, *words, **options):
    """The command line in a process of its own, in which events such as "int@30" happen at a frame."""
    return subprocess.run([sys.executable, "-c", PROGRAM, events, *map(str, words)], cwd=ROOT,
                          capture_output=True, timeout=60, **options)


def one_line(text):
    """The error line, which must be the only line that is not progress."""
    lines = [line for line in text.replace("\r", "\n").splitlines()
             if line.strip() and "frames/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("flashvsr: error: "), text
    return lines[0]


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_upscale_says_what_it_wrote(clip, tmp_path, capsys):
    assert flashvsr("upscale", clip, tmp_path / "out.mp4") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert (f"wrote {tmp_path / 'out.mp4'}: 60 frames of 192x128 in " in err and "frames/s" in err
            and "GiB" in err)
    assert re.search(r"bottleneck: (read|upscal|writ)ing \(read \d+ %, upscale \d+ %, write \d+ % busy\)$",
                     err)
    assert "48x32 to 192x128" in err and "60/60" in err                                   # the progress bar
    before, after = facts(clip), facts(tmp_path / "out.mp4")
    assert [d for _, d in after["packets"][1]] == [d for _, d in before["packets"][1]]
    assert after["size"] == (192, 128) and left(tmp_path) == ["in.mkv", "out.mp4"]


def test_options_reach_the_model(clip, tmp_path):
    model = Nearest()
    assert flashvsr("upscale", clip, tmp_path / "out.mp4", "--frames", 3, load=model) == 0
    assert model.options == {"weights": "compact", "device": None, "dtype": None, "version": None}
    assert flashvsr("upscale", clip, tmp_path / "out.mp4", "--overwrite", "--frames", 3, "--weights", "w",
                    "--seed", 7, "--sparse-ratio", 1.5, "--local-range", 9, "--color", "wavelet", "--device",
                    "cpu", "--dtype", "bfloat16", "--model-version", "v1", load=model) == 0
    assert model.options == {"weights": "w", "device": torch.device("cpu"), "dtype": torch.bfloat16,
                             "version": "v1", "sparse_ratio": 1.5, "local_range": 9, "color": "wavelet",
                             "seed": 7}


@pytest.mark.parametrize("text, value", [("90", 90), ("1.5", 1.5), ("1:30", 90), ("01:01:01.5", 3661.5)])
def test_times_are_read(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("codec, suffix, name", [("libx265", "mp4", "hevc"), ("ffv1", "mkv", "ffv1"),
                                                 (None, "webm", "vp9"), (None, "mov", "h264")])
def test_codecs(tmp_path, codec, suffix, name):
    source = write_video(tmp_path / "in.mkv", moving(3))
    assert flashvsr("upscale", source, tmp_path / f"out.{suffix}",
                    *(["--codec", codec] if codec else [])) == 0
    with av.open(str(tmp_path / f"out.{suffix}")) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == name
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_crf_changes_the_size(tmp_path):
    noise = [np.random.default_rng(n).integers(0, 256, (32, 48, 3), np.uint8) for n in range(5)]
    source = write_video(tmp_path / "in.mkv", noise, codec="ffv1", pix_fmt="yuv444p")
    sizes = []
    for crf in (5, 45):
        assert flashvsr("upscale", source, tmp_path / f"{crf}.mp4", "--crf", crf) == 0
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > 2 * sizes[1]


def test_through_pipes(clip, tmp_path):
    words = ["--start", "0.4", "--frames", 30, "--codec", "ffv1"]
    done = program("", "upscale", "-", "-", *words, input=clip.read_bytes())
    assert done.returncode == 0, done.stderr
    (tmp_path / "piped.mkv").write_bytes(done.stdout)
    assert b"wrote standard output: 30 frames" in done.stderr
    assert flashvsr("upscale", clip, tmp_path / "direct.mkv", *words) == 0
    piped, direct = facts(tmp_path / "piped.mkv"), facts(tmp_path / "direct.mkv")
    assert (piped["packets"] == direct["packets"] and piped["times"] == direct["times"]
            and len(piped["times"]) == 30)
    assert all((a == b).all() for a, b in zip(piped["frames"], direct["frames"]))


def test_a_reader_that_goes_away_is_one_line(clip):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "", "upscale", str(clip), "-"], cwd=ROOT,
                          stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 1
    assert "error" in one_line(done.stderr)


def test_ctrl_c_leaves_a_playable_file(clip, tmp_path):
    done = program("int@50", "upscale", clip, tmp_path / "out.mp4")
    assert done.returncode == 130, done.stderr
    assert b"interrupted; what was done is in" in done.stderr and b"Traceback" not in done.stderr
    found = facts(tmp_path / "out.mp4")
    assert len(found["frames"]) == 45                       # 21 after frame 25, then 8 at 33, 41 and 49
    assert found["packets"][1][-1][0] < 45 / 25 < found["packets"][1][-1][0] + 0.05
    assert left(tmp_path) == ["in.mkv", "out.mp4"]


def test_ctrl_c_before_the_first_frame_leaves_nothing(clip, tmp_path):
    done = program("int@10", "upscale", clip, tmp_path / "out.mp4")
    assert (done.returncode == 130 and b"nothing was written" in done.stderr
            and b"Traceback" not in done.stderr)
    assert left(tmp_path) == ["in.mkv"]


def test_a_killed_run_leaves_nothing(clip, tmp_path):
    done = program("term@50", "upscale", clip, tmp_path / "out.mp4")
    assert done.returncode == 143 and b"Traceback" not in done.stderr
    assert left(tmp_path) == ["in.mkv"]


@pytest.mark.parametrize("target", ["out.mp4", "folder"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, target):
    noise = [np.random.default_rng(n).integers(0, 256, (32, 48, 3), np.uint8) for n in range(60)]
    source = write_video(tmp_path / "in.mkv", noise)
    done = program("small@30", "upscale", source, tmp_path / target)
    assert done.returncode == 1
    line = one_line(done.stderr.decode())
    assert "cannot write" in line and "File too large" in line
    assert left(tmp_path) == ["in.mkv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_on_standard_output_is_one_line(clip):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM, "", "upscale", str(clip), "-"], cwd=ROOT,
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "No space left on device" in one_line(done.stderr)


def no_video(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame) + stream.encode(None))
    return path


BAD = {
    "missing": (lambda p: p / "nothing.mp4", 2, "nothing.mp4: no such file or folder"),
    "text": (lambda p: (p / "a.txt").write_text("words\n" * 100) and p / "a.txt", 1, "not a readable video"),
    "text as mp4": (lambda p: (p / "a.mp4").write_text("words\n" * 100) and p / "a.mp4", 1,
                    "not a readable video"),
    "zero bytes": (lambda p: (p / "a.mp4").touch() or p / "a.mp4", 1, "the file is empty"),
    "zeros": (lambda p: (p / "a.mp4").write_bytes(bytes(5000)) and p / "a.mp4", 1, "not a readable video"),
    "no index": (lambda p: (p / "b.mp4").write_bytes(
        write_video(p / "a.mp4", moving(30)).read_bytes()[:-600]) and p / "b.mp4", 1, "not a readable video"),
    "no video": (lambda p: no_video(p / "a.mp4"), 1, "no video stream"),
    "empty folder": (lambda p: (p / "pictures").mkdir() or p / "pictures", 1, "no picture in it"),
    "broken picture": (lambda p: (p / "f").mkdir() or (p / "f" / "1.png").write_bytes(b"\x89PNG....")
                       and p / "f", 1, "1.png: not a readable picture"),
    "too small": (lambda p: write_video(p / "a.mkv", moving(2, 14, 16), codec="ffv1"), 1,
                  "is 14x16; the smallest size is 16x16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    make, status, words = BAD[name]
    source = make(tmp_path)
    assert flashvsr("upscale", source, tmp_path / "out" / "out.mp4") == status
    assert words in one_line(capsys.readouterr().err)
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("words, status, says", [
    (["{IN}", "/proc/none/out.mp4"], 2, "there is no folder /proc/none"),
    (["{IN}", "{IN}/out.mp4"], 2, "there is no folder"),
    (["{IN}", "/proc/out.mp4"], 1, "cannot write /proc/out.mp4"),
    (["{IN}", "{IN}"], 2, "IN and OUT are the same"),
    (["{IN}", "{IN}", "--overwrite"], 2, "IN and OUT are the same"),
    (["{IN}", "{OLD}"], 2, "exists; --overwrite replaces it"),
    (["{IN}", "{TMP}/out.xyz"], 2, "its suffix must be one of"),
    (["{IN}", "{TMP}/out.mp4", "--compare", "{TMP}/none/a.png"], 2,
     "must be a picture in a folder that exists"),
    (["{IN}", "{TMP}/out.mp4", "--truth", "{IN}"], 2, "need --compare"),
    (["{IN}", "{TMP}/out.mp4", "--compare", "{TMP}/c.png", "--truth", "{OLD}"], 1, "old.mp4: not a readable video"),
    (["{PNG}", "{TMP}/out.mp4", "--overwrite", "--compare", "{PNG}"], 2, "--compare and IN are the same"),
    (["{IN}", "{TMP}/out.mp4", "--start", "1:x"], 2, "'1:x' is not a time"),
    (["{IN}", "{TMP}/out.mp4", "--start", "1e30"], 2, "'1e30' is not a time"),
    (["{IN}", "{TMP}/out.ts", "--codec", "ffv1"], 1, "a .ts file cannot hold ffv1"),
    (["{IN}", "{TMP}/out.mp4", "--sparse-ratio", "1e300", "--device", "cpu"], 1, "sparse_ratio must be positive"),
    (["{IN}", "{TMP}/out.mp4", "--device", "meta"], 1, 'device must be "cpu" or "cuda"'),
    (["{IN}", "{TMP}/out.mp4", "--start", "9"], 1, "no frame could be decoded at or after 9 s"),
    (["{IN}", "{TMP}/out.mp4", "--frames", "0"], 2, "'0' is not a whole number of 1 or more"),
    (["{IN}", "{TMP}/out.mp4", "--scale", "5"], 2, "invalid choice: 5"),
    (["{IN}", "{TMP}/out.mp4", "--color", "red"], 2, "invalid choice: 'red'"),
    (["{IN}", "{TMP}/out.mp4", "--codec", "nosuch"], 1, "no encoder 'nosuch'"),
    (["{IN}", "{TMP}/out.mp4", "--codec", "mjpeg"], 1, "encoder mjpeg does not start with "),
    (["{IN}", "{TMP}/out.mp4", "--codec", "aac"], 1, "aac does not encode video"),
    (["{IN}", "{TMP}/out.webm", "--codec", "libx264"], 1, "'webm' format does not support 'libx264' codec"),
    (["{IN}", "{TMP}/out.mkv", "--codec", "ffv1", "--crf", "3"], 1, "codec ffv1 has no crf"),
    (["{IN}", "{TMP}/folder", "--crf", "3"], 2, "OUT is a folder"),
    (["{IN}", "{TMP}/out.mp4", "--device", "cuda:99"], 1, "cuda"),
    (["{IN}", "{TMP}/out.mp4", "--device", "warp"], 1, "--device warp"),
    (["{IN}", "{TMP}/out.mp4", "--weights", "{OLD}"], 1, "old.mp4"),
    (["{IN}", "{TMP}/out.mp4", "--weights", "{TMP}/none"], 1, "none"),
    (["{IN}"], 2, "the following arguments are required: OUT"),
], ids=lambda value: " ".join(value).replace("/", ".") if isinstance(value, list) else "")
def test_bad_usage_is_one_line(words, status, says, tmp_path, clip, capsys):
    (tmp_path / "old.mp4").write_bytes(b"mine")
    Image.new("RGB", (20, 18)).save(tmp_path / "a.png")
    before = left(tmp_path)
    words = [word.format(IN=clip, OLD=tmp_path / "old.mp4", PNG=tmp_path / "a.png", TMP=tmp_path) for word in words]
    real = any(word in ("--weights", "--device") for word in words)
    assert flashvsr("upscale", *words, load=cli.load_upscaler if real else None) == status
    assert says in one_line(capsys.readouterr().err)
    assert left(tmp_path) == before and (tmp_path / "old.mp4").read_bytes() == b"mine"


def test_overwrite_replaces_a_file_and_adds_to_a_folder(tmp_path, clip):
    (tmp_path / "old.mp4").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    assert flashvsr("upscale", clip, tmp_path / "old.mp4", "--overwrite", "--frames", 2) == 0
    assert len(facts(tmp_path / "old.mp4")["frames"]) == 2
    assert flashvsr("upscale", clip, tmp_path / "folder", "--frames", 2) == 2
    assert flashvsr("upscale", clip, tmp_path / "folder", "--frames", 2, "--overwrite") == 0
    assert left(tmp_path / "folder") == ["000001.png", "000002.png", "mine.txt"]


def test_an_error_in_the_middle_keeps_the_old_file(tmp_path, clip):
    (tmp_path / "old.mp4").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        flashvsr("upscale", clip, tmp_path / "old.mp4", "--overwrite", load=Nearest({30: lambda: 1 / 0}))
    assert (tmp_path / "old.mp4").read_bytes() == b"old" and left(tmp_path) == ["in.mkv", "old.mp4"]


def test_a_truncated_video_is_kept_and_said(tmp_path, capsys):
    noise = [np.random.default_rng(n).integers(0, 256, (32, 48, 3), np.uint8) for n in range(60)]
    source = write_video(tmp_path / "in.mkv", noise, options={"g": "10"})
    source.write_bytes(source.read_bytes()[:source.stat().st_size // 2])
    assert flashvsr("upscale", source, tmp_path / "out.mp4") == 1
    frames = len(facts(tmp_path / "out.mp4")["frames"])
    error = next(line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert 20 < frames < 40 and "truncated" in error and f"its {frames} frames are in" in error


@pytest.mark.parametrize("limit", [[], ["--frames", "8"]], ids=["all", "8 frames"])
def test_a_damaged_video_is_kept_and_said(tmp_path, capsys, limit):
    source = write_video(tmp_path / "in.mov", moving(12), codec="png", pix_fmt="rgb24")
    data = source.read_bytes()
    at = [found.start() for found in re.finditer(b"\x89PNG", data)][3]
    source.write_bytes(data[:at] + bytes(4) + data[at + 4:])
    assert flashvsr("upscale", source, tmp_path / "out.mp4", *limit) == 1
    frames = 8 if limit else 11
    error = next(line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "is damaged: 1 packets could not be decoded" in error and f"its {frames} frames are in" in error
    assert len(facts(tmp_path / "out.mp4")["frames"]) == frames


def test_a_folder_with_a_broken_picture_is_kept_and_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, frame in enumerate(moving(5)):
        av.VideoFrame.from_ndarray(frame).to_image().save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "2.png").write_bytes(b"\x89PNG....")
    assert flashvsr("upscale", tmp_path / "in", tmp_path / "out") == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "2.png: not a readable picture" in error and "its 4 frames are in" in error
    assert left(tmp_path / "out") == ["0.png", "1.png", "3.png", "4.png"]


@pytest.mark.parametrize("truth", [None, "video", "picture"])
def test_compare(tmp_path, truth):
    frames = moving(30)
    source = write_video(tmp_path / "in.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    large = [f.repeat(4, 0).repeat(4, 1) for f in frames]
    words = []
    if truth == "video":
        words = ["--truth", write_video(tmp_path / "truth.mkv", large, codec="ffv1", pix_fmt="yuv444p")]
    elif truth:
        Image.fromarray(large[12]).save(tmp_path / "truth.png")
        words = ["--truth", tmp_path / "truth.png"]
    assert flashvsr("upscale", source, tmp_path / "out.mp4", "--compare", tmp_path / "c.png",
                    "--compare-frame", 12, *words) == 0
    sheet = np.asarray(Image.open(tmp_path / "c.png"))[-128:].astype(int)
    assert sheet.shape == (128, 192 * (3 if truth else 2), 3)
    bicubic, ours = sheet[:, :192], sheet[:, 192:384]
    assert np.abs(ours - large[12]).max() <= 4
    want = Image.fromarray(frames[12]).resize((192, 128), Image.Resampling.BICUBIC)
    assert np.abs(bicubic - np.asarray(want)).max() <= 4
    if truth:
        assert np.abs(sheet[:, 384:] - large[12]).max() <= 4


def test_compare_takes_the_middle_frame_and_the_last_of_a_short_clip(tmp_path):
    frames = moving(9)
    source = write_video(tmp_path / "in.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    for word, number in (("4", 4), ("99", 8), (None, 4)):
        words = ["--compare-frame", word] if word else []
        words += ["--compare", tmp_path / "c.png", "--overwrite"]
        assert flashvsr("upscale", source, tmp_path / "o.mp4", *words) == 0
        ours = np.asarray(Image.open(tmp_path / "c.png"))[-128:, 192:].astype(int)
        assert np.abs(ours[::4, ::4] - frames[number]).max() <= 4


def test_demo_writes_video_and_picture(tmp_path, capsys, monkeypatch):
    # the truth that ships is of frame 60; here only sizes matter
    monkeypatch.setattr(cli, "DEMO_FRAME", 4)
    assert flashvsr("demo", "--out", tmp_path / "demo", "--frames", 6) == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "demo" / "demo_4x.mp4") in out and "frames/s" in err
    assert Image.open(tmp_path / "demo" / "demo_compare.png").size == (3 * 1280, 720 + 32)
    with av.open(str(tmp_path / "demo" / "demo_4x.mp4")) as container:
        assert container.streams.video[0].frames == 6 and len(container.streams.audio) == 1


def test_doctor_names_every_op_and_why(capsys):
    from flashvsr_kernels import backends
    assert flashvsr("doctor") == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n").splitlines() == report()
    for op, state in backends().items():
        line = next(line for line in out.splitlines() if line.startswith(f"{op} "))
        assert line.split()[1] == next((name for name, reason in state.items() if reason is None), "NONE")
        for name, reason in state.items():
            assert reason is None or f"{name}: {reason}" in out
    assert f"torch     {torch.__version__}" in out and "GPU" in out and "to change that" in out


def test_doctor_on_a_machine_that_lacks_everything(monkeypatch):
    table = {"sparse_attn": {"cpu": "not built", "reference": None}}
    monkeypatch.setattr("flashvsr_model.doctor.backends", lambda: table)
    monkeypatch.setattr("shutil.which", lambda name: None)
    lines = report()
    assert "sparse_attn           reference   cpu: not built" in lines
    assert "compiler  no c++ on PATH" in lines and "nvcc      no nvcc on PATH" in lines
    assert any("apt install g++" in line for line in lines[lines.index("to change that"):])


@pytest.mark.parametrize("reasons, says", [
    ({"hopper": "needs 9.0", "triton": "is too old"}, ["Triton kernels: is too old"]),
    ({"hopper": "needs 9.0", "triton": None}, ["nothing: the others need another GPU"]),
    ({"hopper": None, "triton": None}, ["nothing: every backend runs here"])], ids=["triton", "hopper", "all"])
def test_doctor_on_a_gpu(monkeypatch, reasons, says):
    monkeypatch.setattr("flashvsr_model.doctor.backends", lambda: {"sparse_attn": reasons, "conv3x3": reasons})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    lines = report()
    assert lines[lines.index("to change that") + 1:] == [f"- {line}" for line in says]


def test_weights_verify_says_what_is_missing(tmp_path, capsys):
    assert flashvsr("weights", "verify", tmp_path / "none") == 1
    assert "none" in one_line(capsys.readouterr().err)
    (tmp_path / "TCDecoder.ckpt").write_bytes(b"not a checkpoint")
    assert flashvsr("weights", "verify", tmp_path) == 1
    out = capsys.readouterr().out
    assert "BAD TCDecoder.ckpt" in out and "BAD LQ_proj_in.ckpt" in out and "missing" in out


@pytest.mark.parametrize("words", [["--help"], ["upscale", "--help"], ["doctor", "--help"],
                                   ["demo", "--help"], ["weights", "verify", "--help"]],
                         ids=lambda words: words[0])
def test_help(words, capsys):
    assert flashvsr(*words) == 0
    assert "usage: flashvsr" in capsys.readouterr().out
