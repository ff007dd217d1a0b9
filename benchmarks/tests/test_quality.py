"""The quality benchmark from its command line, on a small clip made here, with a stand-in for the model."""
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import flashvsr_model
from benchmarks import clips, quality, resize


def write_video(path: Path, frames: np.ndarray):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(25), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a clip of 26 frames, 192x256 from (8, 4) of its truth, and made-up statistics."""
    savemat = pytest.importorskip("scipy.io", reason="NIQE's statistics need scipy (extra: bench)").savemat
    pytest.importorskip("imageio_ffmpeg", reason="VMAF needs imageio-ffmpeg (extra: bench)")
    noise = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    plane = F.interpolate(noise, scale_factor=4, mode="bicubic").clamp(0, 1)[0]
    plane = (plane * 255).round().to(torch.uint8)
    truth = torch.stack([plane[:, :, t:t + 300].permute(1, 2, 0) for t in range(26)]).contiguous()
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "truth.mkv", truth.numpy())
    write_video(tmp_path / "low.mkv", resize.shrink_area(truth[:, 8:200, 4:260].contiguous()).numpy())
    savemat(tmp_path / "clips" / "frames_modelparameters.mat",
            {"mu_prisparam": np.ones((1, 36)), "cov_prisparam": np.eye(36)})
    clip = clips.Clip("made", str(tmp_path / "low.mkv"), "truth.mkv", 8, 4, "made here")
    monkeypatch.setattr(quality, "CLIPS", (clip,))
    return tmp_path


class Tinted:
    """Stands for the model: bicubic, seven steps too red."""

    def upscale(self, frames: torch.Tensor) -> torch.Tensor:
        out = resize.grow(frames, "bicubic").int()
        out[..., 0] += 7
        return out.clamp(0, 255).to(torch.uint8)


def test_quality_writes_what_it_prints(data, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(flashvsr_model, "load_upscaler", lambda *a, **k: asked.append((a, k)) or Tinted())
    quality.main(["--data", str(data), "--clips", "made", "--methods", "bicubic", "lanczos", "ours",
                  "--weights", "x", "--device", "cpu", "--out", str(data / "deep" / "q.json"),
                  "--sheet", str(data / "s.png"), "--frames-dir", str(data / "frames")])
    assert asked == [(("x",), {"device": "cpu"})]
    document = json.loads((data / "deep" / "q.json").read_text())
    made = document["clips"]["made"]
    assert (made["frames"], made["height"], made["width"]) == (26, 192, 256)
    assert {"torch", "commit", "cpu"} <= set(document["about"])
    bicubic, ours = made["methods"]["bicubic"], made["methods"]["ours"]
    assert 20 < ours["psnr_y"] < bicubic["psnr_y"] and 0 < ours["ssim_y"] <= 1 and 0 <= ours["vmaf"] <= 100
    shift = np.subtract(ours["artefacts"]["colour_shift"], bicubic["artefacts"]["colour_shift"])
    assert 6 < shift[0] <= 7 and shift[1:] == pytest.approx([0, 0])
    assert ours["artefacts"]["seams"].keys() == {"8", "16", "128"}
    printed = capsys.readouterr().out
    for name in ("bicubic", "lanczos", "ours"):
        lines = [line for line in printed.splitlines() if line.split()[:2] == ["made", name]]
        found = made["methods"][name]
        assert f"{found['psnr_y']:.2f}" in lines[0] and f"{found['vmaf']:.1f}" in lines[0]
        assert "seams" in lines[1]
    margin = ours["psnr_y"] - made["methods"]["lanczos"]["psnr_y"]
    assert f"made: PSNR-Y {margin:+.2f} dB against Lanczos" in printed
    assert len(list((data / "frames" / "made" / "ours").glob("*.png"))) == 26
    assert Image.open(data / "s.png").width == 4 + 4 * 260


def test_quality_says_what_bf16_costs(data, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(flashvsr_model, "load_upscaler", lambda *a, **k: asked.append(k["dtype"]) or Tinted())
    (data / "clips" / "frames_modelparameters.mat").unlink()  # only NIQE needs it
    quality.main(["--data", str(data), "--clips", "made", "--methods", *quality.PRECISIONS, "--metrics", "psnr_y",
                  "--commit", "abc", "--out", str(data / "q.json")])
    assert asked == [torch.float32, torch.bfloat16]
    document = json.loads((data / "q.json").read_text())
    assert document["about"]["commit"] == "abc" and "truth_niqe" not in document["clips"]["made"]
    fine, coarse = document["clips"]["made"]["methods"].values()
    assert fine["psnr_y"] == coarse["psnr_y"] > 20 and "vmaf" not in fine
    assert "made: bf16 costs +0.0000 dB of PSNR-Y against float32" in capsys.readouterr().out


def test_shipped_and_area_inputs_are_alike_where_nothing_was_compressed(data):
    clip, = quality.CLIPS
    shipped, truth = clips.load_clip(clip, data, 5)
    area, same = clips.load_clip(clip, data, 5, "area")
    assert torch.equal(truth, same) and truth.shape == (5, 192, 256, 3)
    assert torch.equal(shipped, area)


@pytest.mark.parametrize("arguments, match", [
    (["--frames", "1"], "--frames must be at least 2"), (["--data", "nowhere"], "fetch_data.sh"),
    (["--methods", "nearest"], "invalid choice")], ids=["frames", "data", "method"])
def test_quality_says_what_is_wrong_with_its_arguments(tmp_path, capsys, arguments, match):
    (tmp_path / "clips").mkdir()
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--data", str(tmp_path), *arguments])
    assert stopped.value.code == 2 and match in capsys.readouterr().err


def test_sharpening_adds_what_a_blur_removes():
    frames = torch.full((1, 24, 24, 3), 100, dtype=torch.uint8)
    assert torch.equal(resize.sharpen(frames), frames)
    frames[:, :, 12:] = 150
    out = resize.sharpen(frames)[0, 12, :, 0].int()
    assert out[11] < 100 and out[12] > 150 and (out[:5] == 100).all() and (out[-5:] == 150).all()
