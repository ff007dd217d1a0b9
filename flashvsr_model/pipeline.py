"""One upscale from an open Clip to a writer: reading ahead in a thread, the model here, and in another
thread what waits for its results: fetching them from a GPU, and writing. So a GPU always has work while there
are frames to read and room to write.
"""
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .clip import Clip, Picture
from .pixels import UserError
from .results import Busy, results_of

AHEAD, BEHIND = 32, 2           # items read ahead; results, of 21 or 8 frames, that wait to be written


@dataclass(frozen=True)
class Summary:
    """frames: written; seconds: from the first frame read to the file's end; interrupted: Ctrl-C ended it
    early.

    busy: of "read", "upscale" and "write" the seconds in which each worked and did not wait for another;
        results.CudaResults says what that is on a GPU
    ready: seconds before all that, in which kernels for a GPU were compiled or found in their cache
    """
    frames: int
    seconds: float
    interrupted: bool
    busy: dict[str, float]
    ready: float

    @property
    def bottleneck(self) -> str:
        """The stage that worked the longest: nothing gets faster unless it does."""
        return max(self.busy, key=self.busy.get)


@dataclass(frozen=True)
class _Batch:
    """What is written at once: packets, then results, with the times and names of the pictures taken."""
    packets: list
    taken: list[Picture]
    results: Iterator[np.ndarray]


class _Failed:
    def __init__(self, error: BaseException):
        self.error = error


_END = object()


def _offer(box: queue.Queue, item: object, stopped: threading.Event) -> bool:
    """Puts item when there is room; False if stopped first."""
    while not stopped.is_set():
        try:
            box.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _timed(items: Iterable, busy: Busy) -> Iterator:
    """The same items; busy while they are made."""
    items = iter(items)
    while True:
        with busy:
            item = next(items, _END)
        if item is _END:
            return
        yield item


def read_ahead(items: Iterable, depth: int) -> Iterator:
    """The same items, made in a thread that keeps at most depth of them; its exceptions are raised here."""
    box, stopped = queue.Queue(depth), threading.Event()

    def work() -> None:
        try:
            for item in items:
                if not _offer(box, item, stopped):
                    return
            _offer(box, _END, stopped)
        except BaseException as error:  # carried across and raised in the reader of the queue
            _offer(box, _Failed(error), stopped)

    thread = threading.Thread(target=work, name="read", daemon=True)
    thread.start()
    try:
        while (item := box.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join(timeout=1)          # a read from an idle pipe cannot be stopped; the thread is a daemon


class WriteBehind:
    """Batches written in a thread, at most depth of them waiting; its exceptions are raised by the next call.

    busy: in the writer's calls, not while results are waited for
    """

    def __init__(self, writer, depth: int, picture: Callable[[Picture, np.ndarray], Picture]):
        """picture: makes what is written of a frame taken and its result, an array that is used again after
        the call
        """
        self.writer, self.box, self.picture = writer, queue.Queue(depth), picture
        self.busy, self.stopped = Busy(), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="write", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                try:
                    batch = self.box.get(timeout=0.05)
                except queue.Empty:
                    continue
                if batch is _END:
                    return
                self._write(batch)
                del batch               # a result on a GPU is not kept until the next one comes
        except BaseException as error:  # carried across and raised in put or finish
            self.error = error
            self.stopped.set()

    def _write(self, batch: _Batch) -> None:
        with self.busy:
            for packet in batch.packets:
                self.writer.packet(packet)
        for result, taken in zip(batch.results, batch.taken, strict=True):
            if self.stopped.is_set():
                return
            with self.busy:
                self.writer.picture(self.picture(taken, result))

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, batch: object) -> None:
        if not _offer(self.box, batch, self.stopped):
            self._raise()

    def finish(self, *, cut: bool) -> None:
        """Writes what waits and ends the file."""
        self.put(_END)
        self.thread.join()
        self._raise()
        with self.busy:
            if self.writer.pictures:
                self.writer.finish(cut=cut)
            else:
                self.writer.abort()

    def abort(self) -> None:
        """Drops what waits and removes the unfinished file."""
        self.stopped.set()
        self.thread.join()
        self.writer.abort()


def upscale(upscaler, clip: Clip, writer, *, watch: Callable[[np.ndarray, np.ndarray], None] | None = None,
            progress: Callable[[int], None] = lambda frames: None) -> Summary:
    """Every picture of clip through upscaler into writer, packets beside them.

    upscaler: new_state(h, w) -> state, push(state, (1, h, w, 3)) and flush(state) -> (t, 4h, 4w, 3) tensors
        or arrays; for deep clips new_state(h, w, out_dtype=torch.float32) and frames and results in [0, 1].
        With a device that is a GPU push need not wait for it, and warm_up(state, eight_bit=) -> seconds is called
        first
    writer: VideoWriter or FolderWriter, used in a thread
    watch: called in that thread with each frame and its result, arrays as they are
    progress: called with the number of frames that a push gave, when it gave some
    Ctrl-C ends the output with the frames that are done. Any other exception removes it and is raised.
    """
    interrupted, ready = False, 0.0
    device = getattr(upscaler, "device", torch.device("cpu"))
    options = {"out_dtype": torch.float32} if clip.deep else {}
    try:
        results = results_of(device)
        state = upscaler.new_state(clip.height, clip.width, **options)
        if device.type == "cuda":
            ready = upscaler.warm_up(state, eight_bit=not clip.deep)
    except BaseException as error:
        writer.abort()
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
        raise

    def picture(taken: Picture, rgb: np.ndarray) -> Picture:
        if clip.deep:
            rgb = (rgb * 65535 + 0.5).astype(np.uint16)
        if watch is not None:
            watch(taken.rgb, rgb.copy())
        return Picture(rgb, taken.pts, taken.duration, taken.name)

    reading, sink, waiting, packets = Busy(), WriteBehind(writer, BEHIND, picture), deque(), []

    def give(call: Callable[[], object]) -> None:
        nonlocal packets
        result = results.run(call)
        if count := len(result):
            taken = [waiting.popleft() for _ in range(count)]
            batch, packets = _Batch(packets, taken, results.frames(result)), []
            sink.put(batch)
            progress(count)

    began = time.perf_counter()
    items = read_ahead(_timed(clip.items, reading), AHEAD)
    try:
        try:
            for item in items:
                if not isinstance(item, Picture):
                    packets.append(item)
                    continue
                waiting.append(item)
                frame = item.rgb[None]
                frame = frame.astype(np.float32) / 65535 if clip.deep else frame
                give(partial(upscaler.push, state, frame))
            give(partial(upscaler.flush, state))
        except KeyboardInterrupt:
            interrupted = True
        items.close()
        sink.put(_Batch(packets, [], iter(())))
        sink.finish(cut=interrupted or clip.cut)
    except BaseException:
        items.close()
        sink.abort()
        raise
    return Summary(writer.pictures, time.perf_counter() - began, interrupted,
                   {"read": reading.seconds, "upscale": results.busy.seconds, "write": sink.busy.seconds},
                   ready)
