"""Quality of a video against its truth. Videos are uint8 RGB (T, H, W, 3); lists have one entry a frame.

Luma, everywhere: BT.601 studio swing, 16 + (65.481 R + 128.553 G + 24.966 B) / 255, in float64, not rounded.
PSNR-Y takes it as it is, peak 255. SSIM-Y and NIQE take `grey`, the same stretched to 0..255.
"""
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

STUDIO = (65.481 / 255, 128.553 / 255, 24.966 / 255)
VMAF = {"vmaf": "vmaf_v0.6.1", "vmaf_neg": "vmaf_v0.6.1neg"}


def luma(rgb: Tensor) -> Tensor:
    """BT.601 studio luma (..., H, W) float64, black 16 and white 235, of rgb (..., H, W, 3) in 0..255."""
    return rgb.double() @ torch.tensor(STUDIO, dtype=torch.float64) + 16


def grey(rgb: Tensor) -> Tensor:
    """BT.601 luma (..., H, W) float64 stretched to 0..255, of rgb (..., H, W, 3) in 0..255."""
    return (luma(rgb) - 16) * (255 / 219)


def psnr_y(out: Tensor, truth: Tensor) -> list[float]:
    """PSNR of the luma in dB, peak 255; inf for equal frames. A clip's value is the mean over frames."""
    _check_pair(out, truth)
    errors = [(luma(a) - luma(b)).square().mean() for a, b in zip(out, truth)]
    return [(10 * torch.log10(255 ** 2 / error)).item() for error in errors]


def ssim_y(out: Tensor, truth: Tensor) -> list[float]:
    """SSIM of `grey`: Gaussian 11x11, sigma 1.5, K1 0.01, K2 0.03, range 255, windows inside the picture."""
    _check_pair(out, truth)
    return [ssim(grey(a), grey(b)) for a, b in zip(out, truth)]


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of two planes (H, W) in 0..255, at least 11x11."""
    mean_a, mean_b, aa, bb, ab = gaussian_filter(torch.stack([a, b, a * a, b * b, a * b]), 11, 1.5)
    var_a, var_b, cov = aa - mean_a ** 2, bb - mean_b ** 2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean().item()


def gaussian_filter(planes: Tensor, size: int, sigma: float) -> Tensor:
    """Planes (N, H, W) under a normalised Gaussian of odd `size`, whole windows only: sides less size - 1."""
    weights = torch.exp(-(torch.arange(size, dtype=torch.float64) - size // 2) ** 2 / (2 * sigma ** 2))
    for dim in (1, 2):  # shifted sums: ten times as fast as conv2d is in float64
        kept = planes.shape[dim] - size + 1
        total = torch.zeros_like(planes.narrow(dim, 0, kept))
        for i, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(planes.narrow(dim, i, kept), alpha=weight)
        planes = total
    return planes


def temporal_difference(out: Tensor, truth: Tensor) -> list[float]:
    """Flicker, wrong motion: mean |(out[t+1] - out[t]) - (truth[t+1] - truth[t])| of luma; T - 1 values."""
    _check_pair(out, truth)
    result, before = [], None
    for a, b in zip(out, truth):
        error = luma(a) - luma(b)
        if before is not None:
            result.append((error - before).abs().mean().item())
        before = error
    return result


def colour_shift(out: Tensor, truth: Tensor) -> Tensor:
    """Mean of out minus mean of truth, a frame and a channel: (T, 3) float64 in 8-bit steps."""
    _check_pair(out, truth)
    return torch.stack([a.double().mean((0, 1)) - b.double().mean((0, 1)) for a, b in zip(out, truth)])


def block_seams(video: Tensor, period: int) -> float:
    """How much steeper the luma is across multiples of `period` pixels than elsewhere; about 1 without seams.

    The mean |step| between neighbouring rows and columns on the block borders, over that at all other places.
    Pictures have their own value, so compare with the truth's and a plain resize's.
    Raises ValueError if no border is inside the picture.
    """
    if not 1 < period < min(video.shape[1:3]):
        largest = min(video.shape[1:3]) - 1
        raise ValueError(f"period must be in 2..{largest} for {tuple(video.shape)}, got {period}")
    on, off = [], []
    for frame in video:
        y = luma(frame)
        for steps in ((y[1:] - y[:-1]).abs().mean(1), (y[:, 1:] - y[:, :-1]).abs().mean(0)):
            border = torch.arange(1, len(steps) + 1) % period == 0
            on.append(steps[border])
            off.append(steps[~border])
    return (torch.cat(on).mean() / torch.cat(off).mean()).item()


def chunk_jumps(difference: list[float], first: int = 21, chunk: int = 8) -> float:
    """Temporal difference where one chunk of output ends and the next begins, over that inside chunks.

    difference: from temporal_difference; entry t lies between frames t and t + 1
    Raises ValueError for a clip without a border.
    """
    border = torch.tensor([t + 1 >= first and (t + 1 - first) % chunk == 0 for t in range(len(difference))])
    if not border.any():
        raise ValueError(f"{len(difference) + 1} frames have no chunk border (first {first}, then {chunk})")
    values = torch.tensor(difference, dtype=torch.float64)
    return (values[border].mean() / values[~border].mean()).item()


def vmaf(out: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """"vmaf" and "vmaf_neg" a frame, by the ffmpeg that imageio-ffmpeg carries.

    They are libvmaf's vmaf_v0.6.1 and vmaf_v0.6.1neg; that gives nothing for contrast above the truth's.
    Both videos go in as one stream of stacked pictures; ffmpeg converts them to yuv420p (BT.601 studio).
    Height and width must be even. Raises RuntimeError with ffmpeg's last lines if it fails.
    """
    import imageio_ffmpeg  # here, so that the other metrics do without it
    _check_pair(out, truth)
    frames, height, width, _ = out.shape
    if height % 2 or width % 2:
        raise ValueError(f"VMAF needs an even height and width, got {height}x{width}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vmaf.json"
        models = "|".join(f"version={model}\\:name={name}" for name, model in VMAF.items())
        graph = (f"format=yuv420p,split[a][b];[a]crop={width}:{height}:0:0[out];"
                 f"[b]crop={width}:{height}:0:{height}[truth];"
                 f"[out][truth]libvmaf=log_fmt=json:log_path={log.name}:n_threads={torch.get_num_threads()}:"
                 f"model='{models}'")
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-f", "rawvideo",
                   "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", "25", "-i", "-", "-lavfi", graph,
                   "-f", "null", "-"]
        with open(log.with_suffix(".err"), "w+b") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors, cwd=folder)
            try:
                for a, b in zip(out, truth):
                    process.stdin.write(torch.cat([a, b]).contiguous().numpy().tobytes())
                process.stdin.close()
            except BrokenPipeError:
                pass  # ffmpeg has stopped: its exit status and last lines, just below, say why
            status = process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
        if status or not log.exists():
            raise RuntimeError(f"ffmpeg's libvmaf failed with status {status}: {said[-500:] or 'no message'}")
        scored = json.loads(log.read_text())["frames"]
    if len(scored) != frames:
        raise RuntimeError(f"ffmpeg's libvmaf scored {len(scored)} of {frames} frames")
    return {name: [frame["metrics"][name] for frame in scored] for name in VMAF}


def _check_pair(out: Tensor, truth: Tensor):
    types = {out.dtype, truth.dtype}
    if out.shape != truth.shape or out.ndim != 4 or out.shape[-1] != 3 or types != {torch.uint8}:
        raise ValueError("out and truth must be uint8 (T, H, W, 3) alike, got "
                         f"{out.dtype} {tuple(out.shape)} and {truth.dtype} {tuple(truth.shape)}")
