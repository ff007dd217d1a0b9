"""Streaming: any number of frames, any size, any split, without end."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from flashvsr_model import StreamingUpscaler, StreamState
from flashvsr_model.config import PRESETS
from flashvsr_model.fuse import expected_shapes
from flashvsr_model.state import Places
from flashvsr_model.upscaler import enlarge, framed
from tests.golden import drawn

SMALL = dataclasses.replace(PRESETS["v1.1"], dim=128, num_heads=2, num_layers=2, ffn_dim=96,
                            text_dim=8, freq_dim=16, context_len=3, lq_hidden=(8, 12),
                            decoder_channels=(16, 12, 8, 8), sparse_ratio=0.2, local_range=3)


def make(**changes) -> StreamingUpscaler:
    config = dataclasses.replace(SMALL, **changes)
    return StreamingUpscaler.from_tensors(config,
                                          {n: drawn(n, s, 3) for n, s in expected_shapes(config).items()})


def clip(frames: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=rng)


def stream(upscaler: StreamingUpscaler, frames: torch.Tensor, piece: int) -> torch.Tensor:
    state = upscaler.new_state(*frames.shape[1:3])
    out = [upscaler.push(state, part) for part in frames.split(piece)]
    return torch.cat([*out, upscaler.flush(state)])


@pytest.fixture(scope="module")
def upscaler() -> StreamingUpscaler:
    return make()


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 20, 21, 22, 25, 26, 29, 33, 34, 41])
def test_as_many_frames_out_as_in(upscaler, frames):
    out = upscaler.upscale(clip(frames))
    assert out.shape == (frames, 128, 128, 3) and out.dtype == torch.uint8


@pytest.mark.parametrize("piece", [1, 3, 40])
def test_any_split_gives_the_same_bits(upscaler, piece):
    frames = clip(43)
    assert torch.equal(stream(upscaler, frames, piece), upscaler.upscale(frames))


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_frames_come_as_soon_as_they_can(version):
    upscaler, frames = make(version=version), clip(41)
    state = upscaler.new_state(32, 32)
    counts = [len(upscaler.push(state, frame[None])) for frame in frames]
    assert {i + 1: n for i, n in enumerate(counts) if n} == {25: 21, 33: 8, 41: 8}
    assert len(upscaler.flush(state)) == 4


def test_the_future_does_not_change_the_past(upscaler):
    frames = clip(49)
    other = torch.cat([frames[:33], clip(16, seed=9)])
    assert torch.equal(upscaler.upscale(frames)[:29], upscaler.upscale(other)[:29])
    assert not torch.equal(upscaler.upscale(frames)[29:], upscaler.upscale(other)[29:])


def test_interleaved_streams_of_different_sizes(upscaler):
    clips = [clip(34, 32, 64), clip(35, 64, 32, seed=1), clip(33, 40, 17, seed=2)]
    alone = [upscaler.upscale(c) for c in clips]
    states = [upscaler.new_state(*c.shape[1:3]) for c in clips]
    outs = [[] for _ in clips]
    for start in range(0, 40, 5):
        for c, state, out in zip(clips, states, outs):
            out.append(upscaler.push(state, c[start:start + 5]))
    for expected, state, out in zip(alone, states, outs):
        assert torch.equal(torch.cat([*out, upscaler.flush(state)]), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (31, 70), (64, 32)], ids=lambda s: f"{s[1]}x{s[0]}")
def test_any_size_gives_four_times_that(upscaler, size):
    assert upscaler.upscale(clip(2, *size)).shape == (2, 4 * size[0], 4 * size[1], 3)


def test_a_state_can_be_used_again(upscaler):
    frames = clip(30)
    state = upscaler.new_state(32, 32)
    upscaler.push(state, clip(30, seed=5)), upscaler.flush(state)
    state.reset()
    again = torch.cat([upscaler.push(state, frames), upscaler.flush(state)])
    assert torch.equal(again, upscaler.upscale(frames))


@pytest.mark.parametrize("slices", [1, 2, 3, 5])
def test_any_number_of_cached_slices(slices):
    out = make(kv_slices=slices).upscale(clip(60))
    assert len(out) == 60
    # One slice acts as two, as in the official code; more of them see more and differ.
    assert torch.equal(out, make(kv_slices=2).upscale(clip(60))) == (slices <= 2)


@pytest.mark.parametrize("edge", ["truncate", "shift"])
@pytest.mark.parametrize("local_range", [1, 2, 4, 9])
def test_windows(edge, local_range):
    assert make(edge=edge, local_range=local_range).upscale(clip(26, 64, 96)).float().std() > 0


def test_rebased_positions_give_the_same_stream():
    """With a table of 16 latents positions are rebased every few chunks; with 1024 never in this clip."""
    frames = clip(25 + 8 * 20)
    often, never = (make(rope_positions=n, color="none") for n in (16, 1024))
    states = [u.new_state(32, 32, out_dtype=torch.float32) for u in (often, never)]
    a, b = (u.push(s, frames) for u, s in zip((often, never), states))
    assert states[0].time <= 16 < states[1].time
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_chunk_600(monkeypatch):
    """Past the official table's end (chunk 510), in constant memory, and still the function it was at chunk
    100. The decoder, which does not know the time, runs for the chunks that are looked at and three before.
    """
    upscaler = make(num_layers=1, color="none")
    state = upscaler.new_state(16, 16, out_dtype=torch.float32)
    before, loop, decode = state.memory(), clip(8, 16, 16), upscaler.decoder.forward
    looked_at = 100, 505, 506, 507, 600

    def seldom(latent, cond, memory, box):
        if any(0 <= chunk - state.chunk <= 3 for chunk in looked_at):
            return decode(latent, cond, memory, box)
        return [(torch.full((1, 64, 64, 3), float("nan")), None)] * 4
    monkeypatch.setattr(upscaler.decoder, "forward", seldom)
    upscaler.push(state, loop.repeat(4, 1, 1, 1)[:25].roll(-7, 0))
    seen = {}
    for chunk in range(1, 601):
        out = upscaler.push(state, loop)
        if chunk in looked_at:
            seen[chunk] = out
    assert (state.chunk == 601
            and state.memory() == before == sum(StreamState.plan(upscaler.config, 16, 16).values()))
    assert all(out.isfinite().all() for out in seen.values())
    assert 0.5 < seen[600].std() / seen[100].std() < 2


def test_a_periodic_stream_stays_periodic_past_the_rebase():
    upscaler = make(num_layers=1, color="none", noise=0.0, rope_positions=64)
    state = upscaler.new_state(16, 16, out_dtype=torch.float32)
    loop = clip(8, 16, 16)
    upscaler.push(state, loop.repeat(4, 1, 1, 1)[:25])
    outs = [upscaler.push(state, loop.roll(-1, 0)) for _ in range(80)]
    for later in (28, 29, 30, 31, 60, 79):
        torch.testing.assert_close(outs[later], outs[20], rtol=0, atol=1e-4)


def test_a_margin_moves_the_zero_padding_away_from_the_picture():
    """A constant picture stays constant up to its border only with a margin as wide as what the decoder sees.
    """
    grey = torch.full((25, 32, 32, 3), 200, dtype=torch.uint8)
    spread = []
    for margin in (0, 128):
        out = make(margin=margin, color="none", noise=0.0).upscale(grey)[20].float()
        assert out.shape == (128, 128, 3)
        spread.append((out[0] - out[64]).abs().mean())
    assert spread[1] < spread[0] / 4


def test_memory_is_told_before_it_is_taken(upscaler):
    plan = StreamState.plan(SMALL, 180, 320)
    assert plan.keys() == {"frames", "keys", "values", "means", "lq", "decoder"}
    assert upscaler.new_state(180, 320).memory() == sum(plan.values())
    official = StreamState.plan(PRESETS["v1.1"], 192, 352, dtype=torch.bfloat16)
    # spec.: 6.229 GB with 4 slices live
    assert official["keys"] + official["values"] == 30 * 2 * 4 * 66 * 128 * 1536 * 2
    assert official["decoder"] == 168 * 768 * 1408 * 2
    assert official["lq"] == 2 * (768 + 2048) * 48 * 88 * 2


def test_eight_bit_input_is_enlarged_as_pillow_does():
    frames = clip(3, 16, 20)
    large, _ = enlarge(frames)
    for frame, result in zip(frames, large):
        pillow = np.asarray(Image.fromarray(frame.numpy()).resize((80, 64), Image.Resampling.BICUBIC))
        assert np.array_equal(result.numpy(), pillow)


@pytest.mark.parametrize("border", [(0, 0, 0, 0), (3, 0, 0, 5), (8, 40, 8, 120)], ids=str)
def test_pictures_are_continued_by_their_border(border):
    frames = clip(2, 20, 30)
    wanted = torch.nn.functional.pad(frames.permute(0, 3, 1, 2).float(), border, mode="replicate").permute(0, 2, 3, 1)
    assert torch.equal(framed(frames, border).float(), wanted)


def test_float_input_is_as_good_as_eight_bit(upscaler):
    frames = clip(26)
    state = upscaler.new_state(32, 32, out_dtype=torch.float32)
    out = torch.cat([upscaler.push(state, frames.float() / 255), upscaler.flush(state)])
    assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
    assert (out * 255 - upscaler.upscale(frames).float()).abs().mean() < 2


def test_rounding_and_truncation():
    frames = torch.tensor([-1.1, -1.0, 0.5 / 127.5 - 1 + 1e-4, 0.9 / 127.5 - 1, 1.0, 1.2])
    assert make()._finish(frames, torch.uint8).tolist() == [0, 0, 1, 1, 255, 255]
    assert make(exact_upstream=True)._finish(frames, torch.uint8).tolist() == [0, 0, 0, 0, 255, 255]


def test_seed_matters_and_repeats():
    frames = clip(25)
    assert torch.equal(make(seed=1).upscale(frames), make(seed=1).upscale(frames))
    assert not torch.equal(make(seed=1).upscale(frames), make(seed=2).upscale(frames))


@pytest.mark.parametrize("bad, message", [
    (clip(3, 32, 48), r"frames must be \(32, 32, 3\) for this state, got \(32, 48, 3\)"),
    (clip(3).to(torch.int32), "frames must be uint8 or float, got torch.int32"),
    (clip(3)[0], r"frames must be \(T, h, w, 3\), got \(32, 32, 3\)"),
], ids=["size", "dtype", "one frame"])
def test_bad_frames_are_named(upscaler, bad, message):
    state = upscaler.new_state(32, 32)
    upscaler.push(state, clip(2))
    with pytest.raises(ValueError, match=message):
        upscaler.push(state, bad)
    assert len(upscaler.flush(state)) == 2  # what was there before is not lost


def test_nothing_is_lost_when_a_push_fails(upscaler):
    frames = list(clip(40))
    state = upscaler.new_state(32, 32)
    with pytest.raises(ValueError, match="for this state"):
        upscaler.push(state, [*frames[:35], clip(1, 16, 16)[0], *frames[35:]])
    rest = torch.cat([upscaler.push(state, frames[35:]), upscaler.flush(state)])
    assert torch.equal(rest, upscaler.upscale(torch.stack(frames)))


def test_a_chunk_that_fails_leaves_no_stream(upscaler, monkeypatch):
    """Its memories would be of two times: that is said until the stream begins again."""
    state, frames = upscaler.new_state(32, 32), clip(40)
    upscaler.push(state, frames[:30])

    def broken(*_):
        yield from ()
        raise RuntimeError("out of memory")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(upscaler.decoder, "forward", broken)
        upscaler.push(state, frames[30:])
    for call in lambda: upscaler.push(state, frames[:1]), lambda: upscaler.flush(state):
        with pytest.raises(RuntimeError, match="start the stream again with state.reset()"):
            call()
    state.reset()
    again = torch.cat([upscaler.push(state, frames), upscaler.flush(state)])
    assert torch.equal(again, upscaler.upscale(frames))


def test_noise_is_drawn_ahead(monkeypatch):
    """The first chunk's with the state, the others' while the device works; the same in every stream."""
    upscaler, drawn_for = make(noise=1.0), []
    noise = upscaler.noise

    def watched(chunk, shape):
        drawn_for.append(chunk)
        return noise(chunk, shape)
    monkeypatch.setattr(upscaler, "noise", watched)
    state, frames = upscaler.new_state(32, 32), clip(40)
    assert drawn_for == [0]
    first = torch.cat([upscaler.push(state, frames), upscaler.flush(state)])
    assert drawn_for == [0, 1, 2, 3, 4]
    state.reset()
    assert torch.equal(torch.cat([upscaler.push(state, frames), upscaler.flush(state)]), first)
    assert drawn_for == [0, 1, 2, 3, 4, 1, 2, 3, 4]


def test_places_turn_without_copies():
    """Four rounds of three places bring every tensor back; what is in them is what was put there last."""
    places = Places(torch.zeros(1) for _ in range(3))
    home = list(places)
    with places.turning():
        for number in range(1, 13):
            x = places.spare.fill_(number)
            places[(number - 1) % 3] = x
            assert places[(number - 1) % 3] is x and x.item() == number
        assert [x.item() for x in places] == [10, 11, 12]
    assert all(map(lambda a, b: a is b, places, home)) and places.spare is None
    places[0] = torch.ones(1)
    assert places[0] is home[0] and home[0].item() == 1
    with pytest.raises(RuntimeError, match="3 places must be put in a multiple of 4 rounds"), places.turning():
        places[0] = places.spare
    places.zero_()
    assert all(map(lambda a, b: a is b, places, home)) and not any(x.item() for x in places)


def test_frames_flipped_by_numpy_are_taken_and_lists_are_named(upscaler):
    rgb = clip(25).numpy()
    flipped = np.ascontiguousarray(rgb[..., ::-1])[..., ::-1]  # as of a picture that OpenCV has read
    assert flipped.strides[-1] < 0 and torch.equal(upscaler.upscale(flipped), upscaler.upscale(rgb))
    with pytest.raises(ValueError, match="frames must be a tensor or an array .* got list; push takes"):
        upscaler.upscale([rgb[0]])


def test_mixed_depths_are_named(upscaler):
    state = upscaler.new_state(32, 32)
    upscaler.push(state, clip(2))
    with pytest.raises(ValueError, match="the stream began with uint8 frames, got torch.float32"):
        upscaler.push(state, clip(1).float() / 255)


def test_sizes_and_settings_are_named(upscaler):
    with pytest.raises(ValueError, match="at least 16x16, got 20x15"):
        upscaler.new_state(15, 20)
    with pytest.raises(ValueError, match="sparse_ratio 0.001 leaves no attention"):
        make(sparse_ratio=0.001).new_state(32, 32)
    with pytest.raises(ValueError, match="margin must be a whole number of 0 or more, got -1"):
        make(margin=-1)
    with pytest.raises(ValueError, match='edge must be "truncate" or "shift", got \'wrap\''):
        make(edge="wrap")


def test_push_after_flush_is_an_error(upscaler):
    state = upscaler.new_state(32, 32)
    assert len(upscaler.flush(state)) == 0
    with pytest.raises(ValueError, match="was flushed"):
        upscaler.push(state, clip(1))


@pytest.mark.gpu
def test_gpu_equals_cpu():
    config, frames = dataclasses.replace(SMALL, color="none"), clip(41)
    tensors = {n: drawn(n, s, 3) for n, s in expected_shapes(config).items()}
    outs = [StreamingUpscaler.from_tensors(config, tensors, device=d).upscale(frames).cpu()
            for d in ("cpu", "cuda")]
    assert (outs[0].float() - outs[1].float()).abs().mean() < 0.01


def test_graphs_need_a_gpu(upscaler):
    with pytest.raises(ValueError, match="graphs need a CUDA device, the model is on cpu"):
        upscaler.new_state(32, 32, graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("color", ["adain", "wavelet"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=["8 bits", "deep"])
def test_graphs_give_the_same_bits(color, kind):
    """A stream whose ring goes round more than once, and another in the same memory after it."""
    config = dataclasses.replace(SMALL, color=color, noise=1.0)
    tensors = {n: drawn(n, s, 3) for n, s in expected_shapes(config).items()}
    model = StreamingUpscaler.from_tensors(config, tensors, device="cuda", dtype=torch.bfloat16)
    state, plain = (model.new_state(32, 48, graphs=graphs) for graphs in (True, False))
    for _ in range(2):
        frames = clip(25 + 8 * (config.ring_slices * 2 + 2), 32, 48)
        frames = frames if kind == torch.uint8 else frames.float() / 255
        outs = [torch.cat([model.push(s, frames), model.flush(s)]) for s in (state, plain)]
        assert torch.equal(*outs)
        state.reset(), plain.reset()
    assert state.graphs.seconds > 0


def test_warm_up_leaves_no_trace(upscaler):
    frames = clip(30)
    state = upscaler.new_state(32, 32)
    assert upscaler.warm_up(state) > 0 and state.pushed == 0
    assert torch.equal(torch.cat([upscaler.push(state, frames), upscaler.flush(state)]), upscaler.upscale(frames))
