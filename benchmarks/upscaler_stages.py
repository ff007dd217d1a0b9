"""What each stage of a steady chunk takes, run eagerly, and which kernels run."""
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flashvsr_model import StreamingUpscaler, dit, upscaler

from .peers import gemm
from .upscaler_stream import Stamp, Stream, seconds, stamp, wait

AHEAD = 1.8e14  # FLOP of products, a quarter of a second on an H100
REST = "rest"  # uploads, copies of what the next chunk needs, joins
# Functions as the model's modules name them, by stage; beside these the linears, and the modules themselves.
FUNCTIONS = {
    dit: {"sparse attention": ("sparse_attn",), "masks": ("lcsa_mask",), "linears": ("linear_gelu",),
          "norms, rotation, gates": ("gated_add_norm", "layer_norm_modulate", "qkv_norm_rope", "rms_norm",
                                     "window_order")},
    upscaler: {"enlargement": ("enlarge", "normal"),
               "colour": ("adain_uint8", "color_moments", "match_color")}}
STAGES = ("enlargement", "linears", "sparse attention", "cross attention", "norms, rotation, gates", "masks",
          "other in DiT", "LQ projector", "decoder", "colour", REST)


class Stopwatch:
    """Shares time out among stages: each moment is that of the innermost stage that runs, or of REST."""

    def __init__(self, device: str):
        self.device, self._running = device, [REST]
        self._marks: list[tuple[str, Stamp]] = [(REST, stamp(device))]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._running.append(name)
        self._mark()
        try:
            yield
        finally:
            self._running.pop()
            self._mark()

    def timed(self, name: str, call: Callable) -> Callable:
        """call, as the stage name."""
        def run(*arguments, **options):
            with self.stage(name):
                return call(*arguments, **options)
        return run

    def timed_steps(self, name: str, call: Callable[..., Iterator]) -> Callable[..., Iterator]:
        """As timed, of a call that returns an iterator: its steps are the stage, not what is done between."""
        def run(*arguments, **options):
            steps, end = call(*arguments, **options), object()
            while True:
                with self.stage(name):
                    step = next(steps, end)
                if step is end:
                    return
                yield step
        return run

    def shares(self) -> dict[str, float]:
        """Seconds of each stage since the start."""
        self._mark()
        found = defaultdict(float)
        for (name, start), (_, end) in pairwise(self._marks):
            found[name] += seconds(start, end)
        return dict(found)

    def _mark(self) -> None:
        self._marks.append((self._running[-1], stamp(self.device)))


@contextmanager
def watched(model: StreamingUpscaler, watch: Stopwatch) -> Iterator[None]:
    """The model's chunks, as long as they are not replayed, tell watch when a stage begins and ends."""
    with ExitStack() as stack:
        def put(place: object, name: str, call: object) -> None:
            stack.enter_context(mock.patch.object(place, name, call))
        for module, stages in FUNCTIONS.items():
            for stage, names in stages.items():
                for name in names:
                    put(module, name, watch.timed(stage, getattr(module, name)))
        attention = watch.timed("cross attention", F.scaled_dot_product_attention)
        put(dit, "F", SimpleNamespace(linear=watch.timed("linears", F.linear),
                                      scaled_dot_product_attention=attention))
        for name, module in (("LQ projector", model.lq_proj), ("other in DiT", model.dit)):
            put(module, "forward", watch.timed(name, module.forward))
        put(model.decoder, "forward", watch.timed_steps("decoder", model.decoder.forward))
        yield


def stage_times(stream: Stream, chunks: int) -> dict[str, float]:
    """Median seconds of each of STAGES over some eager chunks. On a GPU two replayed chunks and a quarter of a second
    of large products run ahead of each, so that it is the device's time, not the launches', and the clock is that
    of a card under load.
    """
    found, graphs = [], stream.state.graphs
    ahead = []
    if graphs is not None:
        product, flop = gemm(stream.device, stream.case.dtype)
        ahead = [stream.push] * 2 + [product] * round(AHEAD / flop)
    for _ in range(chunks):
        for call in ahead:
            call()
        stream.state.graphs = None
        watch = Stopwatch(stream.device)
        try:
            with watched(stream.model, watch):
                stream.push()
        finally:
            stream.state.graphs = graphs
        found.append(watch.shares())
    return {stage: statistics.median(times.get(stage, 0.0) for times in found) for stage in STAGES}


def kernels(stream: Stream, chunks: int, trace: Path) -> list[dict]:
    """Each kernel's runs in a chunk, us in a chunk and share of all kernels' time, longest first; operators
    and their own time on a CPU. Steady chunks as they are, replayed on a GPU. Writes a Chrome trace.
    Raises RuntimeError if the profiler saw none.
    """
    cuda = stream.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        for _ in range(chunks):
            stream.push()
        wait(stamp(stream.device))
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    times = defaultdict(list)
    for event in found.events():
        if event.device_type != (DeviceType.CUDA if cuda else DeviceType.CPU) or event.is_user_annotation:
            continue
        times[event.name].append(event.time_range.elapsed_us() if cuda else event.self_cpu_time_total)
    if not times:
        raise RuntimeError("the profiler saw no kernels: it needs leave to use the GPU's counters (CUPTI)")
    total = sum(map(sum, times.values()))
    rows = [{"kernel": name, "runs": round(len(each) / chunks, 2), "us": round(sum(each) / chunks, 2),
             "share": round(sum(each) / total, 5)} for name, each in times.items()]
    return sorted(rows, key=lambda row: -row["us"])
