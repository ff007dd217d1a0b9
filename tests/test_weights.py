"""Which file is which, strict names and shapes, no code from files, the compact format, load_upscaler."""
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvsr_model import weights
from flashvsr_model.checkpoint import NAMED, Checkpoint, check_layout
from flashvsr_model.config import PRESETS
from flashvsr_model.fuse import expected_shapes, fuse_decoder, fuse_lq, round_taps
from flashvsr_model.weights import (OFFICIAL, RUN_TIME, Known, WeightsError, load_compact, load_official,
                                    load_upscaler, save_compact, verify)
from tests import full_size_weights
from tests.full_size_weights import SMALL, random_tensors, write_official

DIT, LQ, DECODER, PROMPT, VAE = OFFICIAL
PREFIX = {name: part.prefix for name, part in OFFICIAL.items()}
PARTS = {"dit.": (825, 1_418_996_800, 4), "lq.": (8, 287_845_888, 2), "decoder.": (66, 45_338_371, 4),
         "context": (1, 512 * 4096, 2)}  # tensors, parameters (spec B.0), bytes of one
COMPACT = dataclasses.replace(PRESETS["compact"], **SMALL)


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{version: folder}: two releases with narrow layers; only DiT and projector differ."""
    root = tmp_path_factory.mktemp("releases")
    config = dataclasses.replace(PRESETS["v1.1"], **SMALL)
    write_official(root / "v1.1", config)
    shutil.copytree(root / "v1.1", root / "v1")
    save_file({k: v + 1 for k, v in load_file(root / "v1" / DIT).items()}, root / "v1" / DIT)
    projector = torch.load(root / "v1" / LQ, weights_only=True)
    torch.save({k: v + 1 for k, v in projector.items()}, root / "v1" / LQ)
    return {version: root / version for version in ("v1", "v1.1")}


@pytest.fixture(autouse=True)
def small_official(releases, monkeypatch):
    """Presets and table of known files as if the two small releases were the published ones."""
    for version in ("v1", "v1.1"):
        monkeypatch.setitem(PRESETS, version, dataclasses.replace(PRESETS[version], **SMALL))
    table = {}
    for name, part in OFFICIAL.items():
        known = []
        for version, folder in releases.items():
            if part.prefix is not None:
                data = (folder / name).read_bytes()
                versions = ("v1", "v1.1") if name in (DECODER, PROMPT) else (version,)
                known.append(Known(versions, len(data), hashlib.sha256(data).hexdigest()))
        table[name] = dataclasses.replace(part, known=tuple(known))
    monkeypatch.setattr(weights, "OFFICIAL", table)


@pytest.fixture
def folder(releases, tmp_path):
    """A copy of the v1.1 release that a test may damage."""
    return pathlib.Path(shutil.copytree(releases["v1.1"], tmp_path / "FlashVSR-v1"))  # the name says nothing


def rewrite(folder, name, change):
    """The official file `name` again, with change(its dict of tensors) applied."""
    if name == DIT:
        tensors = load_file(folder / name)
        change(tensors)
        return save_file(tensors, folder / name)
    tensors = torch.load(folder / name, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / name)


def refused(call, *words):
    """call() raises a WeightsError of one line that holds all words; returns the error."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for word in words:
        assert word in message, message
    return caught.value


# The published facts

@pytest.mark.parametrize("prefix", PARTS)
def test_official_shapes(prefix, monkeypatch):
    monkeypatch.undo()
    count, parameters, width = PARTS[prefix]
    shapes = {k: v for k, v in expected_shapes(PRESETS["v1.1"]).items() if k.startswith(prefix)}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (count, parameters)
    assert shapes == {k: v for k, v in expected_shapes(PRESETS["v1"]).items() if k.startswith(prefix)}
    known, = next(part for part in OFFICIAL.values() if part.prefix == prefix).known
    assert 0 < known.size - parameters * width < (8e6 if prefix == "decoder." else 1e5)  # the rest is headers


def test_official_shapes_are_checked_on_meta(monkeypatch):
    monkeypatch.undo()
    shapes = expected_shapes(PRESETS["v1.1"])
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    check_layout({name: (t.dtype, t.shape) for name, t in tensors.items()}, shapes, "meta")
    tensors["dit.blocks.29.ffn.2.weight"] = torch.empty(8960, 1536, device="meta")
    refused(lambda: check_layout({name: (t.dtype, t.shape) for name, t in tensors.items()}, shapes, "meta"),
            "dit.blocks.29.ffn.2.weight must be (1536, 8960), got (8960, 1536)")


def test_full_size_header_is_read_alone(tmp_path, monkeypatch):
    monkeypatch.undo()
    shapes, header, offset = weights._expected("dit."), {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name], offset = dict(dtype="F32", shape=shape, data_offsets=(offset, end)), end
    text = json.dumps(header).encode()
    with (tmp_path / DIT).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)  # 5.7 GB that take no room on the disk
    checkpoint = Checkpoint(tmp_path / DIT)
    checkpoint.check(shapes)
    assert len(checkpoint.layout) == 825 and offset == 4 * 1_418_996_800


def test_table_of_official_files():
    hashes = [known.sha256 for part in OFFICIAL.values() for known in part.known]
    assert len(set(hashes)) == len(hashes) and all(len(bytes.fromhex(sha)) == 32 for sha in hashes)
    assert [known.versions for name in (DIT, LQ) for known in OFFICIAL[name].known] == [("v1.1",)] * 2
    assert [known.versions for n in (DECODER, VAE) for known in OFFICIAL[n].known] == [("v1", "v1.1")] * 2


# Loading an official folder

@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_version_is_told_by_hash(releases, version):
    config, tensors = load_official(releases[version])
    assert config == PRESETS[version]
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(config)
    truth = random_tensors(config)
    added = 1 if version == "v1" else 0
    assert torch.equal(tensors["dit.head.head.weight"], truth["dit.head.head.weight"] + added)
    assert torch.equal(tensors["lq.conv2.weight"], truth["lq.conv2.weight"].bfloat16() + added)
    assert torch.equal(tensors["decoder.decoder.7.conv.4.bias"], truth["decoder.decoder.7.conv.4.bias"])
    assert torch.equal(tensors["context"], truth["context"].bfloat16())


def test_tensors_do_not_hang_on_the_files(folder):
    _, tensors = load_official(folder)
    before = {name: t.clone() for name, t in tensors.items()}
    for file in folder.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(tensors[name], t) for name, t in before.items())


@pytest.mark.parametrize("name", [DIT, LQ])
@pytest.mark.parametrize("version", [None, "v1", "v1.1"])
def test_mixed_versions_are_refused(releases, folder, name, version):
    shutil.copy(releases["v1"] / name, folder / name)
    refused(lambda: load_official(folder, version), f"{name} is v1's", "is v1.1's", "must not be mixed")
    assert [r.file for r in verify(folder) if r.problem and "mixed" in r.problem] == [DIT, LQ]


@pytest.mark.parametrize("name", [DIT, LQ, DECODER])
def test_unknown_hash_needs_version(folder, name):
    rewrite(folder, name, lambda tensors: next(iter(tensors.values())).mul_(0.5))
    error = refused(lambda: load_official(folder), "unknown sha256", name, 'version="v1.1"')
    assert error.names == (name,)
    assert load_official(folder, "v1.1")[0].version == "v1.1"
    refused(lambda: load_official(folder, "v1"), "must not be mixed", 'got \'v1\'')  # other parts are v1.1's
    record = next(r for r in verify(folder) if r.file == name)
    assert "unknown sha256" in record.what and record.problem is None


def test_all_hashes_unknown_takes_the_word_of_the_caller(folder, monkeypatch):
    table = {name: dataclasses.replace(part, known=()) for name, part in OFFICIAL.items()}
    monkeypatch.setattr(weights, "OFFICIAL", table)
    refused(lambda: load_official(folder), 'version="v1" or version="v1.1"', DIT, LQ, DECODER, PROMPT)
    assert [load_official(folder, version)[0].version for version in ("v1", "v1.1")] == ["v1", "v1.1"]
    refused(lambda: load_official(folder, "1.1"), "version must be")


def test_known_version_must_agree(releases):
    refused(lambda: load_official(releases["v1"], "v1.1"), 'version must be "v1"')
    assert load_official(releases["v1"], "v1")[0].version == "v1"


@pytest.mark.parametrize("name", [DIT, LQ, DECODER])
def test_every_tensor_counts(folder, name):
    layout = Checkpoint(folder / name).layout
    first, last = list(layout)[0], list(layout)[-1]

    def change(tensors):
        del tensors[first]
        tensors["ema.weight"] = torch.zeros(3)
        tensors[last] = torch.zeros(*tensors[last].shape, 2)
    rewrite(folder, name, change)
    shape = layout[last][1]
    error = refused(lambda: load_official(folder, "v1.1"), name, f"missing: {first}",
                    "unexpected: ema.weight", f"{last} must be {shape}, got {(*shape, 2)}")
    assert error.names == (first, "ema.weight", last)
    assert next(r for r in verify(folder) if r.file == name).problem == str(error)


def test_long_lists_are_shortened_but_kept(folder):
    before = set(Checkpoint(folder / DIT).layout)
    rewrite(folder, DIT, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    error = refused(lambda: load_official(folder), f"and {len(before) - 1 - NAMED} more")
    assert set(error.names) == before - set(Checkpoint(folder / DIT).layout)


def test_integers_are_refused(folder):
    name = "head.modulation"
    rewrite(folder, DIT, lambda tensors: tensors.update({name: tensors[name].int()}))
    refused(lambda: load_official(folder, "v1.1"), f"{name} must be float32, bfloat16 or float16")


@pytest.mark.parametrize("content, words", [
    ({"state_dict": {"decoder.1.weight": torch.zeros(1)}}, ("state_dict (dict)", "flat dict")),
    ({"epoch": 3}, ("epoch (int)",)), ([torch.zeros(1)], ("holds a list",)),
    (torch.zeros(3), ("unexpected",))], ids=["nested", "number", "list", "bare"])
def test_only_flat_dicts_of_tensors(folder, content, words):
    torch.save(content, folder / DECODER)
    refused(lambda: load_official(folder, "v1.1"), DECODER, *words)


def test_tensors_that_are_parts_of_larger_storages(folder):
    """A checkpoint of slices is larger than its tensors; the values must still be the slices'."""
    truth = torch.load(folder / DECODER, weights_only=True)
    torch.save({k: torch.cat([t + 9, t])[len(t):] for k, t in truth.items()}, folder / DECODER)
    assert (folder / DECODER).stat().st_size > 2 * sum(t.nbytes for t in truth.values())
    _, tensors = load_official(folder, "v1.1")
    assert all(torch.equal(tensors["decoder." + name], t) for name, t in truth.items())


class Trap:
    """Unpickled by the ordinary unpickler, it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [LQ, DECODER, PROMPT])
def test_no_code_from_pickles(folder, name, zipped):
    mark = folder / "ran"
    torch.save({"conv1.weight": Trap(mark)}, folder / name, _use_new_zipfile_serialization=zipped)
    refused(lambda: load_official(folder, "v1.1"), name, "asks for code")
    assert next(r for r in verify(folder) if r.file == name).problem and not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()  # the trap works


def test_legacy_pickle_of_tensors_loads(folder):
    torch.save(torch.load(folder / LQ, weights_only=True), folder / LQ, _use_new_zipfile_serialization=False)
    assert torch.equal(load_official(folder, "v1.1")[1]["lq.conv1.bias"],
                       random_tensors(PRESETS["v1.1"])["lq.conv1.bias"].bfloat16())


DAMAGE = {"truncated": slice(-100), "head only": slice(40), "tiny": slice(5), "empty": b"",
          "zeros": bytes(900), "text": b"<!doctype html>\n" * 90, "noise": bytes(range(255, -1, -1)) * 9,
          "pickle": b"\x80\x02garbage" + bytes(90),
          "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:bd28\nsize 5676070392\n"}


@pytest.mark.parametrize("name", [DIT, LQ, PROMPT])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(folder, name, damage):
    data = DAMAGE[damage]
    (folder / name).write_bytes((folder / name).read_bytes()[data] if isinstance(data, slice) else data)
    words = {"empty": "is empty", "text": "text file", "lfs": "git lfs pull", "truncated": "truncated or dam"}
    refused(lambda: load_official(folder, "v1.1"), name, words.get(damage, ""))
    assert [r.file for r in verify(folder) if r.problem] == [name]


def test_missing_files(folder, tmp_path):
    refused(lambda: load_official(tmp_path / "nowhere"), "there is no folder", "nowhere", DIT)
    refused(lambda: verify(tmp_path / "nowhere"), "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: verify(tmp_path / "empty"), "holds no weights", DIT)
    (folder / PROMPT).unlink()
    refused(lambda: load_official(folder), f"missing files: {PROMPT}", f"expected: {DIT}, {LQ}",
            "comes with the official code")
    assert [(r.file, r.size) for r in verify(folder) if r.problem == "missing"] == [(PROMPT, None)]


def test_verify(folder):
    records = {r.file: r for r in verify(folder)}
    assert list(records) == [DIT, LQ, DECODER, PROMPT] and not any(r.problem for r in records.values())
    for file, r in records.items():
        data = (folder / file).read_bytes()
        assert (r.size, r.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert records[DIT].what.endswith("; v1.1") and records[DECODER].what.endswith("; v1 and v1.1")
    (folder / VAE).write_bytes(b"\x80 not looked into")
    (folder / "more.pt").write_text("a note")
    save_compact(folder / "mine.safetensors", COMPACT, random_tensors(COMPACT))
    mine, more = verify(folder)[-2:]
    assert mine.what.startswith("compact format") and mine.problem is None and "text file" in more.problem
    vae = next(r for r in verify(folder) if r.file == VAE)
    assert "not read by this model" in vae.what and vae.problem is None
    assert verify(folder / LQ) == [records[LQ]]


# The compact format

def test_compact_round_trip(tmp_path):
    tensors = random_tensors(COMPACT)
    tensors |= {name: t.half() for name, t in tensors.items() if name.startswith("decoder.")}
    tensors["context"] = tensors["context"].bfloat16()
    for copy in "ab":
        save_compact(tmp_path / copy, COMPACT, dict(reversed(tensors.items())) if copy == "b" else tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    config, back = load_compact(tmp_path / "a")
    assert config == COMPACT and back.keys() == tensors.keys()
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in tensors.items())


def test_save_compact_replaces_whole_files(tmp_path, monkeypatch):
    path, tensors = tmp_path / "w.safetensors", random_tensors(COMPACT)
    path.write_bytes(b"before")
    (tmp_path / "link").hardlink_to(path)

    def full_disk(tensors, name, metadata):
        pathlib.Path(name).write_bytes(b"half")
        raise OSError("no space left")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(weights, "save_file", full_disk)
        save_compact(path, COMPACT, tensors)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
    save_compact(path, COMPACT, tensors)
    assert load_compact(path)[0] == COMPACT and (tmp_path / "link").read_bytes() == b"before"


def test_save_compact_is_strict(tmp_path):
    path, tensors = tmp_path / "w.safetensors", random_tensors(COMPACT)
    path.write_bytes(b"before")
    name = "lq.norm1.gamma"
    lacking = {k: v for k, v in tensors.items() if k != name}
    refused(lambda: save_compact(path, COMPACT, lacking), f"missing: {name}")
    refused(lambda: save_compact(path, COMPACT, tensors | {name: tensors[name] / 0}), f"not finite: {name}")
    refused(lambda: save_compact(path, COMPACT, tensors | {name: tensors[name].double()}), "torch.float64")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("config, words", [
    (None, 'no "config"'), ("{", "cannot read"), ("[]", "cannot read"), ('{"version": "v1.1"}', "dim"),
    ({"window": 3}, "window"), ({"num_heads": 0}, "cannot read"),
    ({"num_layers": 3}, "missing: dit.blocks.2."), ({"num_layers": 1}, "unexpected: dit.blocks.1."),
    ({"ffn_dim": 8}, "ffn.0.weight must be (8, 128), got (96, 128)")],
    ids=["none", "broken", "list", "incomplete", "unknown field", "no heads", "3 blocks", "1 block", "width"])
def test_compact_must_be_what_its_config_says(tmp_path, config, words):
    if isinstance(config, dict):
        config = json.dumps(dataclasses.asdict(COMPACT) | config)
    save_file(random_tensors(COMPACT), tmp_path / "w", metadata={"config": config} if config else None)
    refused(lambda: load_compact(tmp_path / "w"), words)


def test_shipped_weights():
    config, tensors = load_compact()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(PRESETS["compact"])
    assert config.version == PRESETS["compact"].version
    assert (pathlib.Path(weights.__file__).parent / "data" / "compact.safetensors").stat().st_size <= 12e6


def test_installation_without_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.resources, "files", lambda package: tmp_path)
    refused(load_upscaler, "no compact weights", "install")


# load_upscaler

@pytest.fixture(scope="module")
def compact_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "w.safetensors"
    save_compact(path, COMPACT, random_tensors(COMPACT))
    return path


def test_load_upscaler_from_file(compact_file):
    overrides = dict(sparse_ratio=1.5, local_range=5, color="wavelet", seed=4)
    upscaler = load_upscaler(str(compact_file), device="cpu", **overrides)
    assert upscaler.config == dataclasses.replace(COMPACT, **overrides)
    assert (upscaler.device, upscaler.dtype) == (torch.device("cpu"), torch.float32)


def test_load_upscaler_default_device(compact_file):
    upscaler = load_upscaler(compact_file)
    expected = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    assert (upscaler.device.type, upscaler.dtype) == expected


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_load_upscaler_from_folder(releases, version):
    upscaler = load_upscaler(releases[version], device="cpu", dtype=torch.bfloat16, kv_slices=2)
    assert upscaler.config == dataclasses.replace(PRESETS[version], kv_slices=2)
    assert upscaler.dtype == torch.bfloat16


def test_overrides(compact_file):
    with pytest.raises(TypeError, match="cannot set sparsity; it can set " + ", ".join(RUN_TIME)):
        load_upscaler(compact_file, sparsity=2)
    with pytest.raises(TypeError, match="dim: fixed by the weights"):
        load_upscaler(compact_file, dim=64)
    with pytest.raises(ValueError, match="color must be"):
        load_upscaler(compact_file, device="cpu", color="blue")
    for bad, says in ((dict(dtype=torch.int8), "dtype must be None or one of"),
                      (dict(dtype="float16"), "dtype must be"), (dict(device="tpu"), "one that PyTorch knows"),
                      (dict(device="meta"), 'must be "cpu" or "cuda"'), (dict(margin=1.5), "a whole number"),
                      (dict(sparse_ratio=float("inf")), "sparse_ratio must be")):
        with pytest.raises(ValueError, match=says):
            load_upscaler(compact_file, **{"device": "cpu"} | bad)


def test_load_upscaler_refuses(compact_file, releases, tmp_path):
    refused(lambda: load_upscaler("v1.1", device="cpu"), "no file v1.1", '"compact"', DIT)
    refused(lambda: load_upscaler(compact_file, device="cpu", version="v1"), 'version must be "v1.1"')
    refused(lambda: load_upscaler(releases["v1"] / DIT, device="cpu"), "name their folder")
    refused(lambda: load_upscaler(releases["v1"] / LQ, device="cpu"), "name their folder")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be"):
            load_upscaler(compact_file, device="cuda")


def test_written_loaded_and_run(tmp_path, capsys):
    full_size_weights.main([str(tmp_path / "weights"), "--small"])
    assert "(29, 256, 256, 3) pushed, (4, 256, 256, 3) flushed" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v1", "compact"])
def test_weights_are_folded_before_they_are_rounded(version):
    config = dataclasses.replace(PRESETS[version], **SMALL)
    tensors = {name: t.half() for name, t in random_tensors(config).items()}
    wide = {name: t.float() for name, t in tensors.items()}
    for narrow, exact in ((fuse_decoder(tensors), fuse_decoder(wide)), (fuse_lq(config, tensors), fuse_lq(config, wide))):
        for name in exact:
            torch.testing.assert_close(narrow[name].float(), exact[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("shape, taps", [((6, 5, 3, 3), (2, 3)), ((2, 2, 2, 6, 2, 2, 5), (4, 5))], ids=["3x3", "folded"])
def test_rounded_taps_keep_their_sum(shape, taps):
    weight = torch.randn(shape)
    rounded = round_taps(weight, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and rounded.shape == shape and rounded.is_contiguous()
    off = (rounded.float() - weight)
    assert (off.abs() <= 2 ** -7 * weight.abs().amax(taps, keepdim=True)).all()
    # the sum is off by the last tap's rounding alone
    assert off.sum(taps).abs().mean() < weight.bfloat16().float().sub(weight).sum(taps).abs().mean() / 2
    assert torch.equal(round_taps(rounded, torch.float32).bfloat16(), rounded)
    assert torch.equal(round_taps(rounded.float(), torch.bfloat16), rounded)
