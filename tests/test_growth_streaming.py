"""Growth streams: memory holds a few tensors, never a state, and what is measured is what the whole model measures."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from growkit.checkpoint import hashing, store
from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.shard_writer import ENTRY_BYTES
from growkit.cli import growing
from growkit.errors import CheckpointError, ConfigError, PreservationError
from growkit.growth import expand, gradients, logits, verify
from growkit.growth.engine import lazy_states
from growkit.growth.gradients import PROBE_SIZE, PROBE_STEPS, probe_gradients
from growkit.growth.logits import Pair, stream_logits
from growkit.growth.operator import OPERATORS
from growkit.growth.path import grown_config, path
from growkit.growth.state import Moments, TrainState
from growkit.models.config import ModelConfig
from growkit.models.decoder import build
from growkit.models.projections import LinearProjection
from growkit.models.spec import param_specs
from growkit.schedule.progress import Progress
from scripts import bench_growth
from tests import contract
from tests.support import context, model_config, probe, trained_like

# Float32 products in another order, through two layers and back; the steps between rounds turn a rounding of a
# gradient near zero into a step of PROBE_SIZE, so the second and third round are that much looser.
GRADIENT_TOLERANCE = 1e-5
# Of anonymous memory, in largest tensors. A layer is 2.3 of them when depth grows, 3.3 when its MLP does; in the
# gradient check it is its weights, its gradients, one tensor's signs and comparisons. 7.2 were seen of both; a whole
# state is 40 or more.
MOST_TENSORS = 10

Grown = tuple[TrainState, list[TrainState], list[Any]]


def everything(preset: str, dtype: torch.dtype = torch.float32) -> Grown:
    """A state, it after each link of a chain along all axes, and the links."""
    fields: dict[str, Any] = {"num_layers": 4, "embed_dim": 48, "num_heads": 4, "head_dim": 24}
    fields |= {"attention_tokens": 15} if preset == "tokenformer" else {"mlp_dim": 96, "num_kv_heads": 4}
    source = model_config(preset, **({} if preset == "tokenformer" else {"tied_head": False}))
    methods = {"width": "clone_noise"}
    state = trained_like(source, dtype=dtype)
    links = path(source, grown_config(source, fields, methods), methods)
    return state, lazy_states(state, links, contract.generator(), stage=1), links


def whole_gradients(
    state: TrainState, tokens: torch.Tensor, targets: torch.Tensor, of: Collection[str]
) -> list[dict[str, torch.Tensor]]:
    model = build(state.config, {name: p.float() for name, p in state.params.items()}).eval()
    rounds: list[dict[str, torch.Tensor]] = []
    for _ in range(PROBE_STEPS):
        model.zero_grad()
        model(tokens, targets).total.backward()
        rounds.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for name, p in (one for one in model.named_parameters() if one[0] in of):
                signs = sum(of[name].sign() for of in rounds)
                p.copy_(state.params[name].float().sub(signs, alpha=PROBE_SIZE))
    return rounds


@pytest.mark.parametrize("mapped", [False, True], ids=["held", "mapped"])
@pytest.mark.parametrize("family", contract.FAMILIES)
def test_gradients_are_the_whole_models(
    family: str, mapped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gradients, "HELD_BYTES", 0 if mapped else gradients.HELD_BYTES)
    state = trained_like(model_config(**contract.FAMILIES[family]), dtype=torch.float32)
    kept = {name: tensor.clone() for name, tensor in state.params.items()}
    data = probe(state.config)
    tokens, targets = data[:, :-1], data[:, 1:]
    upper = [name for name in kept if name.startswith("layers.1.attention") or name == "final_norm.weight"]
    streams: list[torch.Tensor] = []
    Pair(state, state).logits(tokens, torch.float32, streams.append)
    for of, passed in ((list(kept), []), (upper, streams)):
        expected, seen = whole_gradients(state, tokens, targets, of), set()
        for step, name, gradient in probe_gradients(state, tokens, targets, of, streams=passed):
            whole = expected[step][name]
            assert float((gradient - whole).norm()) <= GRADIENT_TOLERANCE * float(whole.norm()), (step, name)
            seen.add((step, name))
        assert seen == {(step, name) for step in range(PROBE_STEPS) for name in of}
    assert all(torch.equal(kept[name], tensor) and not tensor.requires_grad for name, tensor in state.params.items())
    assert not list(tmp_path.glob("growkit-signs-*")), "the file has no name"


def test_no_room_for_the_signs_is_said_before_the_kernel_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gradients, "HELD_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    state = trained_like(model_config("transformer"))
    with pytest.raises(ConfigError, match=r"TMPDIR.*No space left.*name another folder in TMPDIR") as error:
        next(probe_gradients(state, probe(state.config)[:, :-1], probe(state.config)[:, 1:], state.params))
    assert error.value.code == "no-room"


@pytest.mark.parametrize("preset", ["tokenformer", "transformer"])
def test_what_is_new_is_what_numbered_entries_say(preset: str) -> None:
    """Old entries, numbered from 1 and carried along as moments: new ones are zero, further clones come again."""
    state, _, links = everything(preset, torch.float64)
    numbered = {
        name: Moments(torch.arange(1.0, t.numel() + 1, dtype=torch.float64).view(t.shape), torch.ones_like(t), 0.0)
        for name, t in state.params.items()
    }
    carried = lazy_states(TrainState(state.config, state.params, numbered), links, contract.generator())[-1].moments
    marked = lazy_states(state, links, torch.Generator()).new_entries()
    for name, spec in param_specs(links[-1].target).items():
        expected = torch.ones(spec.shape, dtype=torch.bool)
        if name in carried:
            numbers = (carried[name].exp_avg / carried[name].exp_avg_sq.sqrt()).round().flatten().tolist()
            seen: set[float] = {0.0}
            flags = [number in seen or bool(seen.add(number)) for number in numbers]
            expected = torch.tensor(flags).view(spec.shape)
        assert (name in marked) == bool(expected.any()), name
        assert name not in marked or torch.equal(marked[name], expected), name


@pytest.mark.parametrize("preset", ["tokenformer", "transformer"])
def test_blocks_are_laid_as_indices_would(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, states, _ = everything(preset)
    blocks = states[-1].materialized()
    monkeypatch.setattr(expand, "MOST_BLOCKS", 0)
    for name, tensor in everything(preset)[1][-1].params.items():
        assert torch.equal(tensor, blocks.params[name]), name


def test_locked_rows_are_counted_however_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that agree where a few entries are looked at, and differ elsewhere, are different."""
    value, gradient = torch.zeros(6, 100), torch.ones(6, 100)
    value[:, 50] = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, -0.0])
    new = torch.ones(6, 100, dtype=torch.bool)
    for compared in (1, 100):
        monkeypatch.setattr(verify, "COMPARED", compared)
        assert verify._locked_rows(value, gradient, new.all(dim=1)) == 2


def test_moments_do_not_grow_their_value_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    kind = type(OPERATORS.get("width", key=""))
    original = kind.grow_tensor
    monkeypatch.setattr(kind, "grow_tensor", lambda self, g: (calls.append(g.spec.local), original(self, g))[1])
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    links = path(state.config, grown_config(state.config, {"embed_dim": 48}, {}), {})
    grown = lazy_states(state, links, contract.generator())[-1]
    manifest = store.Manifest(model=grown.config, progress=bench_growth.Progress())
    store.write(tmp_path / "grown", grown, manifest)
    assert len(calls) == len(grown.params)
    back = store.read(tmp_path / "grown").state
    for name, moments in grown.moments.items():
        assert torch.equal(back.params[name], grown.params[name])
        assert torch.equal(back.moments[name].exp_avg, moments.exp_avg)
        assert torch.equal(back.moments[name].exp_avg_sq, moments.exp_avg_sq)


def as_format_1(folder: Path) -> None:
    """Its files have a sha256."""
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_bytes())["body"] | {"format": 1}
    del body["progress"]["data"], body["progress"]["decisions"]
    body["progress"]["cursor"] = 7
    for name, entry in body["files"].items():
        assert len(entry.pop("xxh3_128")) == 32
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest.write_bytes(manifests._seal(body))


def test_a_checkpoint_of_format_1_is_read_and_its_damage_seen(tmp_path: Path) -> None:
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    store.write(tmp_path / "old", state, store.Manifest(model=state.config, progress=bench_growth.Progress()))
    moments = tmp_path / "old" / "moments-00001.safetensors"
    as_format_1(tmp_path / "old")
    back = store.read(tmp_path / "old")
    assert back.manifest.progress.cursor == 7
    assert all(torch.equal(back.state.params[name], tensor) for name, tensor in state.params.items())
    changed = bytearray(moments.read_bytes())
    changed[-1] ^= 1
    moments.write_bytes(changed)
    with pytest.raises(CheckpointError, match="moments-00001"):
        store.read(tmp_path / "old")


def test_a_checkpoint_is_described_by_what_is_on_the_disk(tmp_path: Path) -> None:
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    seen = {}

    def describe(written: TrainState) -> tuple[manifests.Manifest, bytes]:
        seen.update(written.params)
        assert list(tmp_path.glob(".writing-*/params-*.safetensors"))
        return manifests.Manifest(model=written.config, progress=bench_growth.Progress(), log_bytes=3), b"{}\n"

    store.write_described(tmp_path / "described", state, describe)
    assert all(torch.equal(seen[name], tensor) for name, tensor in state.params.items())
    assert store.read(tmp_path / "described").manifest.log_bytes == 3

    def refuse(_: TrainState) -> tuple[manifests.Manifest, bytes]:
        raise PreservationError("not-preserved", "moved", key="grow", mend="none")

    with pytest.raises(PreservationError):
        store.write_described(tmp_path / "refused", state, refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["described"]


def test_a_streamed_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    """Dtypes mixed, a scalar, an empty tensor, odd sizes; in files of at most so many bytes, or of one tensor."""
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64),
        'näme "quoted"': torch.randn(7).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "not contiguous": torch.randn(6, 4).T,
        "eight": torch.arange(2**8, dtype=torch.uint8).view(*[2] * 8),
    }
    files = store.write_group(tmp_path, "group", tensors, shard_bytes=130, metadata={"format": "pt"})
    assert [list(sizes) for sizes in files.values()] == [
        ["a"],
        ['näme "quoted"', "mask", "scalar", "none", "not contiguous"],
        ["eight"],
    ]
    read: dict[str, torch.Tensor] = {}
    for file, sizes in files.items():
        found = load_file(tmp_path / file)
        assert sizes == {name: tensor.nbytes for name, tensor in found.items()}
        read |= found
        assert (tmp_path / file).stat().st_size <= sum(sizes.values()) + len(tensors) * (ENTRY_BYTES + 64) + 64
    assert {name: t.dtype for name, t in read.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


DEEP = {"vocab_size": 256, "embed_dim": 256, "num_layers": 8, "num_heads": 4}


def grow_and_report(source: Path, target: str, folder: Path, pipe: Connection) -> None:
    """In a process of its own: what growing adds to anonymous memory at its peak, once all is imported."""
    torch.set_num_threads(1)
    tiny = folder / "tiny"
    bench_growth.write_source(tiny, model_config("transformer"))
    gradients.HELD_BYTES = 0  # as a large model's
    growing.MAPPED_BYTES = 1 << 17  # what is in use, without what the heap keeps for the next tensor
    for size, at in (("num_layers=4", tiny), (target, source)):
        before = bench_growth.status("RssAnon")
        with bench_growth.Peak() as peak:
            growing.grow_checkpoint(at, [size], folder / f"{at.name}-grown", 0, 32)
    pipe.send(peak.bytes - before)


@pytest.mark.parametrize("target", ["num_layers=16", "mlp_dim=2048"])
def test_memory_holds_a_few_tensors_never_a_state(target: str, tmp_path: Path) -> None:
    config: ModelConfig = bench_growth.PRESETS.get("transformer", key="")(**DEEP).written_out()
    bench_growth.write_source(tmp_path / "deep", config)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=grow_and_report, args=(tmp_path / "deep", target, tmp_path, theirs))
    child.start()
    theirs.close()
    peak = ours.recv()
    child.join()
    state = bench_growth.size_of(tmp_path / "deep-grown")
    grown = store.read(tmp_path / "deep-grown").manifest.model
    largest = max(4 * spec.numel for spec in param_specs(grown).values())
    assert state >= 4 * MOST_TENSORS * largest
    assert peak <= MOST_TENSORS * largest, f"{peak / largest:.1f} largest tensors"


# What depth does to a model, and what of the old layers then is computed once; other hidden units are other layers.
SHARED = {"depth": ({"num_layers": 4}, 2), "mlp": ({"mlp_dim": 96}, 0)}


@pytest.mark.parametrize("growth", SHARED)
def test_layers_that_did_not_change_are_gone_through_once(growth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, shared = SHARED[growth]
    before = trained_like(model_config("transformer"), dtype=torch.float64)
    target = grown_config(before.config, fields, {})
    links = path(before.config, target, {})
    after = lazy_states(before, links, torch.Generator().manual_seed(0))[-1].materialized()
    tokens = probe(before.config)[:, :-1]
    wanted = [stream_logits(state.config, state.params, tokens, torch.float64) for state in (before, after)]
    gone_through = []
    through = logits._Pass.through

    def counted(self: Any, spec: Any) -> None:
        gone_through.append(spec.id)
        through(self, spec)

    monkeypatch.setattr(logits._Pass, "through", counted)
    both = Pair(before, after).logits(tokens, torch.float64)
    assert torch.equal(both[0], wanted[0]) and torch.equal(both[1], wanted[1])
    assert len(gone_through) == len(before.config.layers) + len(after.config.layers) - shared
    # One weight that is another one, in a layer of the same shape and name: it and all after it are the new model's.
    name = "layers.0.mlp_norm.gain"
    changed = TrainState(after.config, {**after.params, name: after.params[name] * 1.5})
    both = Pair(before, changed).logits(tokens, torch.float64)
    assert torch.equal(both[0], wanted[0])
    assert torch.equal(both[1], stream_logits(changed.config, changed.params, tokens, torch.float64))
    assert not torch.equal(both[1], wanted[1])


@pytest.mark.parametrize("size", [0, 1, 4096, hashing.READ_BYTES, 2 * hashing.READ_BYTES + 77])
def test_however_it_is_read_a_file_has_the_hash_of_its_bytes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    wanted = xxhash.xxh3_128(content).hexdigest()
    assert hashing.file_hash(tmp_path / "file") == wanted
    assert hashing.file_hash(tmp_path / "file", again=False) == wanted
    read = os.preadv

    def refused(*_: Any) -> int:
        raise OSError(errno.EINVAL, "not past the cache")

    for answer in (refused, lambda file, blocks, start: min(start + 4096, read(file, blocks, start))):
        monkeypatch.setattr(os, "preadv", answer)
        assert hashing.file_hash(tmp_path / "file", again=False) == wanted
    monkeypatch.setattr(hashing, "MADV_POPULATE_READ", 12345)  # as a kernel that has none answers
    assert hashing.file_hash(tmp_path / "file") == wanted


def test_damage_that_is_found_beside_a_growth_leaves_nothing(tmp_path: Path) -> None:
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    store.write(tmp_path / "source", state, manifests.Manifest(state.config, Progress()))
    moments = tmp_path / "source/moments-00001.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    with pytest.raises(CheckpointError, match="moments-00001"):
        growing.grow_checkpoint(tmp_path / "source", ["num_layers=4"], tmp_path / "grown", 0, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    # A weight that is no number fails the certificate; what is said is that the file is damaged.
    params = tmp_path / "source/params-00001.safetensors"
    content = bytearray(params.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"
    params.write_bytes(content)
    with pytest.raises(CheckpointError, match="params-00001"):
        growing.grow_checkpoint(tmp_path / "source", ["num_layers=4"], tmp_path / "grown", 0, 16)


# Targets, and whether any file, or all of them, then are what they were.
KEPT_BY = {
    "depth": (["num_layers=4"], True, True),
    "vocabulary": (["vocab_size=64"], True, False),
    "depth and mlp": (["num_layers=4", "mlp_dim=96"], True, False),
    "width": (["embed_dim=48", "methods.width=clone"], False, False),
}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.write_group.__kwdefaults__["shard_bytes"] == store.SHARD_BYTES
    monkeypatch.setitem(store.write_group.__kwdefaults__, "shard_bytes", 1 << 13)


def all_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    return {**state.params, **store.flat_moments(state.moments)}


def links(source: Path, grown: Path) -> dict[str, bool]:
    """Of each file of ``source``, whether it is one of ``grown`` as well."""
    of = {path.stat().st_ino for path in grown.iterdir()}
    return {path.name: path.stat().st_ino in of for path in source.glob("*.safetensors")}


@pytest.mark.parametrize("growth", KEPT_BY)
def test_files_that_stay_what_they_were_are_linked(
    growth: str, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, some, whole = KEPT_BY[growth]
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    source, grown, written = (tmp_path / name for name in ("source", "grown", "written"))
    store.write(source, state, manifests.Manifest(state.config, Progress()))
    flushed = set[str]()
    flush = store.fsync
    monkeypatch.setattr(store, "fsync", lambda path: (flushed.add(path.name), flush(path))[1])
    growing.grow_checkpoint(source, targets, grown, 0, 16)
    assert {path.name for path in grown.glob("*.safetensors")} <= flushed
    flat = all_tensors(store.read(grown).state)
    for name, linked in links(source, grown).items():
        same = all(
            name in flat and torch.equal(flat[name], tensor) for name, tensor in load_file(source / name).items()
        )
        assert linked == same, name
    assert (any(links(source, grown).values()), all(links(source, grown).values())) == (some, whole)
    # A disk that has no links, or another one, gets the same checkpoint, written.
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
    growing.grow_checkpoint(source, targets, written, 0, 16)
    assert not any(links(source, written).values())
    shutil.rmtree(source)  # what is linked stays
    other = store.read(written)
    assert other.manifest.adam_steps == store.read(grown).manifest.adam_steps
    here, there = all_tensors(store.read(grown).state), all_tensors(other.state)
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_files_that_are_symbolic_links_are_linked_for_what_they_point_at(tmp_path: Path, small_files: None) -> None:
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    store.write(tmp_path / "source", state, manifests.Manifest(state.config, Progress()))
    (tmp_path / "files").mkdir()
    for file in (tmp_path / "source").glob("*.safetensors"):
        file.rename(tmp_path / "files" / file.name)
        file.symlink_to(Path("../files") / file.name)
    grown = tmp_path / "deeper" / "grown"
    grown.parent.mkdir()
    growing.grow_checkpoint(tmp_path / "source", ["num_layers=4"], grown, 0, 16)
    assert all(links(tmp_path / "files", grown).values())
    assert not any(file.is_symlink() for file in grown.iterdir())


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """It may be linked, and another checkpoint's as well."""
    store.write_group(tmp_path, "params", {"a": torch.zeros(3)})
    with pytest.raises(FileExistsError):
        store.write_group(tmp_path, "params", {"a": torch.ones(3)})
    assert torch.equal(load_file(tmp_path / "params-00001.safetensors")["a"], torch.zeros(3))


def test_weights_do_not_outlive_their_layer() -> None:
    """Of a folder of Hugging Face's they are made when they are read, and lie in memory."""
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(one, LinearProjection) for one in gc.get_objects())
        stream_logits(state.config, state.params, probe(state.config)[:, :-1], torch.float64)
        assert sum(isinstance(one, LinearProjection) for one in gc.get_objects()) == before
    finally:
        gc.enable()


def test_what_has_no_hash_of_today_is_written_again(tmp_path: Path) -> None:
    state = trained_like(model_config("transformer"), dtype=torch.float32)
    store.write(tmp_path / "old", state, manifests.Manifest(state.config, Progress()))
    as_format_1(tmp_path / "old")
    kept = store.Kept(store.read(tmp_path / "old"), params=lambda: pytest.fail("all weights are made for nothing"))
    assert not kept.files("params")
    growing.grow_checkpoint(tmp_path / "old", ["num_layers=4"], tmp_path / "grown", 0, 16)
    assert not any(links(tmp_path / "old", tmp_path / "grown").values())
    assert all("xxh3_128" in entry for entry in store.read(tmp_path / "grown").manifest.files.values())
