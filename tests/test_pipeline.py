"""Reading, upscaling and writing beside each other: what waits for what, how much is held, who is slowest."""
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from flashvsr_model import StreamingUpscaler, results
from flashvsr_model.clip import Picture
from flashvsr_model.fuse import expected_shapes
from flashvsr_model.pipeline import BEHIND, upscale
from flashvsr_model.results import CudaResults
from flashvsr_model.video import open_clip
from flashvsr_model.video_out import VideoWriter

from .cuda_on_threads import Card
from .golden import drawn
from .stand_in import Nearest, facts, moving, write_video
from .test_upscaler import SMALL
from .test_upscaler import clip as random_clip


class OnCard(Nearest):
    """The stand-in for the model on the stand-in for a GPU."""
    device = torch.device("cuda")

    def __init__(self, card, gate=None):
        super().__init__()
        self.card, self.gate, self.launched = card, gate, 0

    def warm_up(self, state, *, eight_bit):
        assert eight_bit == ("out_dtype" not in state)
        return 1.5

    def push(self, state, frames):
        return self.later(super().push(state, frames))

    def flush(self, state):
        return self.later(super().flush(state))

    def later(self, frames):
        self.launched += len(frames) > 0
        return self.card.work(frames, gate=self.gate)


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(results, "cuda", card)
    monkeypatch.setattr(results, "_pinned", card.pinned)
    yield card
    for stream in card.all:
        stream.tasks.put(None)


def numbered(first, count):
    """Frames (count, 2, 3, 3) of one value each."""
    return np.arange(first, first + count, dtype=np.uint8).repeat(18).reshape(count, 2, 3, 3)


def test_run_does_not_wait_and_frames_does(card):
    gate, fetch = threading.Event(), CudaResults(torch.device("cuda"))
    pending = [fetch.run(lambda n=n, count=count: card.work(numbered(n, count), gate=gate))
               for n, count in ((0, 21), (21, 8), (29, 0), (29, 3))]
    assert [len(result) for result in pending] == [21, 8, 0, 3] and not card.main.tasks.empty()
    threading.Timer(0.05, gate.set).start()
    seen = []
    for result in pending:
        for frame in fetch.frames(result):
            before = frame.copy()
            time.sleep(0.001)               # while the next one is copied
            assert (frame == before).all()
            seen.append(int(before[0, 0, 0]))
    assert seen == list(range(32)) and fetch.stream.tasks.unfinished_tasks == 0
    assert len(fetch.places) == 2


def test_a_gpu_is_busy_while_it_works_and_not_while_it_waits(card):
    fetch = CudaResults(torch.device("cuda"))

    def call(seconds):
        return fetch.run(lambda: card.work(numbered(0, 8), seconds))
    pending = [call(2), call(3)]                                    # one behind the other
    assert sum(1 for result in pending for _ in fetch.frames(result)) == 16
    assert fetch.busy.seconds == pytest.approx(5)
    card.now += 50                                                  # nothing to do
    fetch.run(lambda: card.work(numbered(0, 0)))                    # a frame taken, no result
    card.now += 50
    assert len(list(fetch.frames(call(4)))) == 8
    assert fetch.busy.seconds == pytest.approx(9)


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
def test_a_gpu_writes_what_a_cpu_does(card, tmp_path, pix_fmt):
    source = write_video(tmp_path / "in.mkv", moving(60), codec="ffv1", pix_fmt=pix_fmt, audio=2.4)
    seen = {}
    for name, model in (("cpu", Nearest()), ("gpu", OnCard(card))):
        clip, seen[name] = open_clip(str(source)), []
        writer = VideoWriter(clip, str(tmp_path / f"{name}.mkv"), 192, 128, codec="ffv1")
        told = []
        summary = upscale(model, clip, writer, progress=told.append,
                          watch=lambda before, after, name=name: seen[name].append((before, after)))
        assert summary.frames == sum(told) == 60 and all(told)
    cpu, gpu = (facts(tmp_path / f"{name}.mkv") for name in seen)
    assert cpu["times"] == gpu["times"] and cpu["packets"] == gpu["packets"] and cpu["pix_fmt"] == pix_fmt
    assert all((a == b).all() for a, b in zip(cpu["frames"], gpu["frames"], strict=True))
    for pair in zip(seen["cpu"], seen["gpu"], strict=True):         # kept by watch, so not in reused memory
        assert all((a == b).all() for a, b in zip(*pair))
        assert pair[1][1].dtype == (np.uint8 if pix_fmt == "yuv444p" else np.uint16)


class SlowWriter:
    """Counts what comes; the first picture waits for `gate`, each takes `seconds`."""

    def __init__(self, gate=None, seconds=0.0):
        self.gate, self.seconds, self.pictures, self.packets, self.name = gate, seconds, 0, [], "slow"

    def picture(self, picture):
        assert self.gate is None or self.gate.wait(20)
        time.sleep(self.seconds)
        self.pictures += 1

    def packet(self, packet):
        self.packets.append((self.pictures, packet))

    def finish(self, *, cut):
        self.cut = cut

    def abort(self):
        self.pictures = None


@dataclasses.dataclass
class Frames:
    """A clip of numbered frames with a packet, a string, behind each."""
    count: int
    seconds: float = 0.0
    height, width, deep, cut = 2, 3, False, False

    @property
    def items(self):
        for n, rgb in enumerate(numbered(0, self.count)):
            time.sleep(self.seconds)
            yield Picture(rgb, n, 1)
            yield f"packet {n}"


@pytest.mark.parametrize("stuck", ["writer", "gpu"])
def test_few_results_wait(card, stuck):
    """While the writer is stuck, or the GPU: one result in its hands, BEHIND of them waiting, one offered."""
    gate = threading.Event()
    writer = SlowWriter(gate if stuck == "writer" else None)
    model = OnCard(card, gate if stuck == "gpu" else None)
    done = []
    thread = threading.Thread(target=lambda: done.append(upscale(model, Frames(150), writer)))
    thread.start()
    for _ in range(200):
        time.sleep(0.005)
        if model.launched == BEHIND + 2:
            break
    time.sleep(0.2)
    assert (model.launched, writer.pictures) == (BEHIND + 2, 0)
    gate.set()
    thread.join(20)
    assert done[0].frames == writer.pictures == 150 and not writer.cut
    assert [packet for _, packet in writer.packets] == [f"packet {n}" for n in range(150)]
    assert all(0 <= n - before < 25 for n, (before, _) in enumerate(writer.packets))    # before their frames


@pytest.mark.parametrize("slow", ["read", "upscale", "write"])
def test_the_bottleneck_is_named(slow):
    class Model(Nearest):
        def push(self, state, frames):
            time.sleep(0.004 if slow == "upscale" else 0)
            return super().push(state, frames)
    summary = upscale(Model(), Frames(60, 0.004 if slow == "read" else 0),
                      SlowWriter(seconds=0.004 if slow == "write" else 0))
    assert summary.bottleneck == slow
    assert 60 * 0.004 <= summary.busy[slow] <= summary.seconds
    assert all(spent < summary.busy[slow] / 2 for stage, spent in summary.busy.items() if stage != slow)


def test_stages_work_beside_each_other():
    """Each stage takes 4 ms for a frame; in turn they would take 12."""
    class Model(Nearest):
        def push(self, state, frames):
            time.sleep(0.004)
            return super().push(state, frames)
    summary = upscale(Model(), Frames(300, 0.004), SlowWriter(seconds=0.004))
    assert summary.seconds < 0.75 * sum(summary.busy.values())


def test_what_a_writer_raises_while_the_gpu_works_ends_the_run(card):
    writer = SlowWriter()
    writer.picture = lambda picture: 1 / 0
    with pytest.raises(ZeroDivisionError):
        upscale(OnCard(card), Frames(400), writer)
    assert writer.pictures is None and threading.active_count() < 20
    assert not any(thread.name in ("read", "write") for thread in threading.enumerate())


@pytest.mark.parametrize("at", [30, 90])
def test_ctrl_c_writes_what_was_launched(card, at):
    class Model(OnCard):
        def push(self, state, frames):
            if state["taken"] == at:
                raise KeyboardInterrupt
            return super().push(state, frames)
    writer = SlowWriter()
    summary = upscale(Model(card), Frames(150), writer)
    assert summary.interrupted and writer.cut
    assert summary.frames == 21 + (at - 25) // 8 * 8 and len(writer.packets) == at


@pytest.mark.gpu
def test_run_does_not_wait_for_a_gpu():
    fetch = CudaResults(torch.device("cuda", 0))
    frames = torch.randint(256, (21, 96, 128, 3), dtype=torch.uint8, device="cuda")

    def launch(*counts):
        def call(count):
            torch.cuda._sleep(400_000_000)                          # cycles: 0.2 s
            return frames[:count].clone()
        return [fetch.run(lambda count=count: call(count)) for count in counts]

    def frames_of(pending):
        return [torch.from_numpy(frame.copy()) for result in pending for frame in fetch.frames(result)]
    frames_of(launch(21, 8, 3))                                     # takes the memory; that may wait
    before, began = fetch.busy.seconds, time.perf_counter()
    pending = launch(21, 8, 3)
    launched = time.perf_counter() - began
    seen = frames_of(pending)
    took = time.perf_counter() - began
    assert launched < took / 3 and 0.8 * took < fetch.busy.seconds - before < 1.02 * took
    assert torch.equal(torch.stack(seen), torch.cat([frames, frames[:8], frames[:3]]).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["8 bits", "deep"])
def test_the_model_on_a_gpu_writes_what_it_computes(dtype):
    """All of it."""
    tensors = {name: drawn(name, shape, 3) for name, shape in expected_shapes(SMALL).items()}
    model = StreamingUpscaler.from_tensors(SMALL, tensors, device="cuda", dtype=torch.bfloat16)
    frames = random_clip(25 + 8 * 9 + 3, 32, 48).numpy()
    frames = frames if dtype == torch.uint8 else frames.astype(np.uint16) * 257
    written = []

    class Writer(SlowWriter):
        def picture(self, picture):
            written.append(picture.rgb.copy())
            super().picture(picture)

    class Source(Frames):
        height, width, deep = 32, 48, dtype == torch.float32

        @property
        def items(self):
            yield from (Picture(rgb, n, 1) for n, rgb in enumerate(frames))
    summary = upscale(model, Source(len(frames)), Writer())
    state = model.new_state(32, 48, out_dtype=dtype)
    pushed = frames if dtype == torch.uint8 else frames.astype(np.float32) / 65535
    want = torch.cat([model.push(state, pushed), model.flush(state)]).cpu().numpy()
    want = want if dtype == torch.uint8 else (want * 65535 + 0.5).astype(np.uint16)
    assert np.array_equal(np.stack(written), want)
    assert 0 < summary.busy["upscale"] <= 1.02 * summary.seconds
