"""One upscale from an open Clip to a writer: reading ahead in a thread, the model here, writing behind in a
thread.
"""
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .clip import Clip, Picture
from .pixels import UserError

AHEAD, BEHIND = 16, 8           # items read ahead, items that wait to be written


@dataclass(frozen=True)
class Summary:
    """frames: written; seconds: from the first frame read to the file's end; interrupted: Ctrl-C ended it
    early.
    """
    frames: int
    seconds: float
    interrupted: bool


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
    """A writer's calls done in a thread, at most depth of them waiting; its exceptions are raised by the next
    call.
    """

    def __init__(self, writer, depth: int):
        self.writer, self.box, self.stopped = writer, queue.Queue(depth), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="write", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                try:
                    item = self.box.get(timeout=0.05)
                except queue.Empty:
                    continue
                if item is _END:
                    return
                if isinstance(item, Picture):
                    self.writer.picture(item)
                else:
                    self.writer.packet(item)
        except BaseException as error:  # carried across and raised in put or finish
            self.error = error
            self.stopped.set()

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, item: object) -> None:
        if not _offer(self.box, item, self.stopped):
            self._raise()

    def finish(self, *, cut: bool) -> None:
        """Writes what waits and ends the file."""
        self.put(_END)
        self.thread.join()
        self._raise()
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
        or arrays; for deep clips new_state(h, w, out_dtype=torch.float32) and frames and results in [0, 1]
    writer: VideoWriter or FolderWriter    watch: called with each frame and its result, arrays as they are
    progress: called after each push with the number of frames that came out
    Ctrl-C ends the output with the frames that are done. Any other exception removes it and is raised.
    """
    began, waiting, interrupted = time.perf_counter(), deque(), False
    try:
        state = upscaler.new_state(clip.height, clip.width,
                                   **({"out_dtype": torch.float32} if clip.deep else {}))
    except BaseException as error:
        writer.abort()
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
        raise
    sink = WriteBehind(writer, BEHIND)

    def give(result) -> None:
        result = result if isinstance(result, np.ndarray) else result.cpu().numpy()
        for rgb in result:
            taken = waiting.popleft()
            if clip.deep:
                rgb = (rgb * 65535 + 0.5).astype(np.uint16)
            if watch is not None:
                watch(taken.rgb, rgb)
            sink.put(Picture(rgb, taken.pts, taken.duration, taken.name))
        progress(len(result))

    items = read_ahead(clip.items, AHEAD)
    try:
        try:
            for item in items:
                if not isinstance(item, Picture):
                    sink.put(item)
                    continue
                waiting.append(item)
                frame = item.rgb[None]
                give(upscaler.push(state, frame.astype(np.float32) / 65535 if clip.deep else frame))
            give(upscaler.flush(state))
        except KeyboardInterrupt:
            interrupted = True
        items.close()
        sink.finish(cut=interrupted or clip.cut)
    except BaseException:
        items.close()
        sink.abort()
        raise
    return Summary(writer.pictures, time.perf_counter() - began, interrupted)
