"""A stand-in for CUDA in results.py: streams that are threads, so what is not waited for is not there yet."""
import dataclasses
import queue
import threading
from contextlib import contextmanager

import torch


class Card:
    """Takes the place of torch.cuda in results: streams that do their tasks in order, each in a thread; time
    passes only in `work`.
    """

    def __init__(self):
        self.now, self.local, self.all = 0.0, threading.local(), []
        card = self

        class Stream:
            def __init__(self, device=None):
                self.tasks = queue.Queue()
                card.all.append(self)
                threading.Thread(target=self.loop, daemon=True).start()

            def loop(self):
                while (task := self.tasks.get()) is not None:
                    task()
                    self.tasks.task_done()

            def wait_event(self, event):
                reached = event.reached
                self.tasks.put(lambda: reached.wait(20))

        class Event:
            def __init__(self, enable_timing=False, blocking=False):
                self.timed = enable_timing

            def record(self, stream):
                self.reached = reached = threading.Event()

                def reach():
                    self.time = card.now
                    reached.set()
                stream.tasks.put(reach)

            def synchronize(self):
                assert self.reached.wait(20)

            def elapsed_time(self, end):
                assert self.timed and end.timed and self.reached.is_set() and end.reached.is_set()
                return 1000 * (end.time - self.time)

        self.Stream, self.Event, self.main = Stream, Event, Stream()

    def current_stream(self, device):
        return self.main

    @contextmanager
    def stream(self, stream):
        self.local.stream = stream
        yield
        del self.local.stream

    def pinned(self, like):
        return Pinned(self, torch.zeros(like.shape, dtype=like.dtype))

    def work(self, frames, seconds=0.0, gate=None):
        """A tensor in which frames will be when the main stream has come to them and the gate is open."""
        frames = torch.from_numpy(frames.copy())
        result = frames.flip(-1) + 1

        def fill():
            assert gate is None or gate.wait(20)
            self.now += seconds
            result.copy_(frames)
        if len(frames):
            self.main.tasks.put(fill)
        return result


@dataclasses.dataclass
class Pinned:
    card: Card
    memory: torch.Tensor

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.card.local.stream.tasks.put(lambda: self.memory.copy_(source))

    def numpy(self):
        return self.memory.numpy()
