"""Writing and reading checkpoints: safetensors beside a manifest, complete or not there at all.

A checkpoint is written into a folder beside its final name, every file is fsynced, the folder renamed, the parent
fsynced: a crash at any point leaves the earlier checkpoints as they were and at worst a ``.writing-`` folder.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from growkit import faults
from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.hashing import file_hash
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import LOG, check_files
from growkit.checkpoint.shard_writer import ShardWriter
from growkit.errors import CheckpointError, cannot_write
from growkit.growth.state import Moments, TrainState
from growkit.models.spec import param_specs

SHARD_BYTES = 1 << 30  # of tensors in a file; files are hashed beside the writing of the next one
WRITING = ".writing-"
KINDS = ("exp_avg", "exp_avg_sq")  # moments of a parameter


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; ``state`` reads tensors from disk as they are asked for."""

    folder: Path
    manifest: Manifest
    state: TrainState


@dataclass(frozen=True)
class Kept:
    """What a checkpoint that is to be written has in common with one that is there: names of ``params``, asked for
    when there is a file to link, and names that have the same ``moments``. Files that hold nothing else are linked, not
    written again."""

    checkpoint: Checkpoint | None = None
    params: Callable[[], Collection[str]] = frozenset
    moments: Collection[str] = ()

    def files(self, group: str) -> dict[str, Collection[str]]:
        """Files of a ``group`` that hold nothing else, and the tensors in them."""
        if self.checkpoint is None:
            return {}
        folder, entries = self.checkpoint.folder, self.checkpoint.manifest.files
        hashed = [name for name in entries if name.startswith(f"{group}-") and "xxh3_128" in entries[name]]
        if not hashed:  # another layout, format 1
            return {}
        names = self.params() if group == "params" else {f"{kind}/{name}" for name in self.moments for kind in KINDS}
        tensors = {name: list(StoredTensors(folder, [name])) for name in hashed}
        return {name: of for name, of in tensors.items() if all(one in names for one in of)}

    def link(self, folder: Path, group: str) -> tuple[dict[str, str], set[str]]:
        """Links those files into ``folder``, numbered from 1 on; returns file → hash, and the tensors in them. None
        where the disk has no links or does not allow them."""
        linked, held = dict[str, str](), set[str]()
        for name, tensors in self.files(group).items():
            assert self.checkpoint is not None
            place = shard_name(group, len(linked) + 1)
            try:
                os.link((self.checkpoint.folder / name).resolve(), folder / place)  # not a symbolic link itself
            except OSError:  # they are written, as they would be without a source
                break
            linked[place] = self.checkpoint.manifest.files[name]["xxh3_128"]
            held.update(tensors)
        return linked, held


NOTHING_KEPT = Kept()


def write(
    folder: Path, state: TrainState, manifest: Manifest, *, log: bytes = b"", beside: Sequence[Path] = ()
) -> None:
    """Writes a checkpoint at ``folder``, where none is yet; ``log``: the metrics log behind one that lies in no run;
    ``beside``: files, and folders of files, that are copied in. Raises CheckpointError when the disk will not."""
    write_described(folder, state, lambda _: (manifest, log), beside=beside)


def write_described(
    folder: Path,
    state: TrainState,
    describe: Callable[[TrainState], tuple[Manifest, bytes]],
    *,
    kept: Kept = NOTHING_KEPT,
    beside: Sequence[Path] = (),
) -> None:
    """``write``, for a manifest and a log that only the written state can say: ``describe`` is given it with its
    parameters mapped from the disk, beside the writing of the moments. If it raises, nothing is left. ``kept``: what is
    on the disk already; whether its files are sound is for ``describe`` to see to."""
    with (
        writing(folder) as unfinished,
        ThreadPoolExecutor(manifests.HASHERS) as hashers,
        ThreadPoolExecutor(1) as describer,
    ):
        hashes: dict[str, Future[str]] = {}
        linked: dict[str, str] = {}
        flushed: list[Future[None]] = []
        steps: dict[str, float] = {}

        def complete(path: Path, again: bool = False) -> None:
            hashes[path.relative_to(unfinished).as_posix()] = hashers.submit(_flushed_hash, path, again)

        def write_new(group: str, tensors: Mapping[str, Tensor], again: bool) -> list[str]:
            """The files of the group that are written, not linked."""
            old, held = kept.link(unfinished, group)
            linked.update(old)
            flushed.extend(hashers.submit(fsync, unfinished / name) for name in old)
            new = Ordered([name for name in tensors if name not in held], tensors)
            done, first = partial(complete, again=again), len(old) + 1
            return list(write_group(unfinished, group, new, first=first, fault=again, complete=done))

        files = write_new("params", state.params, True)
        tables = [StoredTensors(unfinished, files)] + ([kept.checkpoint.state.params] if kept.checkpoint else [])
        params = Ordered(list(state.params), *tables)
        described = describer.submit(describe, dataclasses.replace(state, params=params))
        write_new("moments", _FlatMoments(state.moments, steps), False)
        for path in beside:
            for file in copy_in(path, unfinished):
                complete(file)
        manifest, log = described.result()
        if log:
            (unfinished / LOG).write_bytes(log)
            complete(unfinished / LOG)
        if kept.checkpoint is not None:
            known = kept.checkpoint.manifest.adam_steps
            steps.update((name, known[name]) for name in kept.moments)
        for done in flushed:
            done.result()
        sealed = dataclasses.replace(manifest, adam_steps=steps, born=dict(state.born))
        seal(unfinished, sealed, linked | {name: digest.result() for name, digest in hashes.items()})


def copy_in(path: Path, folder: Path) -> list[Path]:
    """Copies a file, or a folder of files, into ``folder``; returns the files that are there then. They are not
    flushed."""
    copy = folder / path.name
    if not path.is_dir():
        shutil.copyfile(path, copy)
        return [copy]
    shutil.copytree(path, copy, copy_function=shutil.copyfile)
    return sorted(file for file in copy.rglob("*") if file.is_file())


def beside(final: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return final.parent / f"{WRITING}{final.name}"


class writing:
    """Context: a folder beside ``final`` to write into; renamed to it on success, removed on failure."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.beside = beside(final)

    def __enter__(self) -> Path:
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.beside, ignore_errors=True)
            self.beside.mkdir()
        except OSError as error:
            raise cannot_write(self.final, error) from error
        return self.beside

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None:
            shutil.rmtree(self.beside, ignore_errors=True)
            if isinstance(error, OSError) or "I/O error" in str(error):
                raise cannot_write(self.final, error) from error
            return
        try:
            fsync(self.beside)
            faults.point("before_rename")
            os.rename(self.beside, self.final)  # fails if a checkpoint of that name is there
            faults.point("after_rename")
            fsync(self.final.parent)
        except OSError as failure:
            raise cannot_write(self.final, failure) from failure


def seal(folder: Path, manifest: Manifest, hashes: Mapping[str, str]) -> None:
    """Writes the manifest, with the size of each file whose hash ``hashes`` has."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "xxh3_128": digest} for name, digest in hashes.items()}
    path = folder / manifests.NAME
    path.write_bytes(manifests.encode(dataclasses.replace(manifest, files=entries)))
    fsync(path)


def read(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Opens the checkpoint at ``folder``. Raises CheckpointError if it is damaged, naming the file."""
    manifest = manifests.read(folder, verify=verify)
    params: TensorTable
    flat: TensorTable
    if manifest.layout == "sharded":
        from growkit.checkpoint import sharded  # it builds on this module

        params, flat = sharded.tensors(folder, manifest)
    else:
        names = list(manifest.files)
        params = StoredTensors(folder, [name for name in names if name.startswith("params-")])
        flat = StoredTensors(folder, [name for name in names if name.startswith("moments-")])
    expected = {name: spec.shape for name, spec in param_specs(manifest.model).items()}
    shapes = {name: tuple(params.shape(name)) for name in params}
    if shapes != expected:
        odd = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise CheckpointError(
            "damaged", f"does not hold the model its manifest describes (first: {odd[0]})", key=str(folder)
        )
    # Tables of names come back in the model's order, so that whatever walks them is reproducible.
    ordered = Ordered(list(expected), params)
    moments = _StoredMoments(
        flat, {name: manifest.adam_steps[name] for name in expected if name in manifest.adam_steps}
    )
    return Checkpoint(folder, manifest, TrainState(manifest.model, ordered, moments, dict(manifest.born)))


@contextmanager
def checked_beside(checkpoint: Checkpoint, *, unread: Collection[str] = ()) -> Iterator[Callable[[], None]]:
    """Context: the files of a checkpoint that was read without it are compared with their hashes, beside what is done
    with them; ``unread``: with those nothing is. Gives a function that waits for the end of that. Raises
    CheckpointError for a damaged file, in the place of whatever error it led to."""
    with ThreadPoolExecutor(1) as checker:
        checked = checker.submit(check_files, checkpoint, unread=unread)
        try:
            yield checked.result
        finally:
            checked.result()


def write_group(
    folder: Path,
    group: str,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    first: int = 1,
    metadata: Mapping[str, str] | None = None,
    fault: bool = False,
    complete: Callable[[Path], None] | None = None,
) -> dict[str, dict[str, int]]:
    """Writes ``tensors``, one at a time, into files GROUP-NNNNN.safetensors, numbered from ``first`` on, of at most
    ``shard_bytes`` (but one tensor at least); returns file → name → bytes. ``complete`` is called with each file once
    it is written, and is to see to it that it is on the disk; None does just that."""
    files: dict[str, dict[str, int]] = {}
    names = list(tensors)
    shard: ShardWriter | None = None

    def close(shard: ShardWriter) -> None:
        files[shard.path.name] = shard.close()
        if fault:
            faults.point("mid_shard")
        (complete or fsync)(shard.path)

    try:
        for number, name in enumerate(names):
            tensor = tensors[name].detach().to("cpu").contiguous()
            if shard is not None and shard.bytes + tensor.nbytes > shard_bytes:
                close(shard)
                shard = None
            if shard is None:
                path = folder / shard_name(group, first + len(files))
                shard = ShardWriter(path, names[number:], metadata or {})
            shard.add(name, tensor)
            del tensor  # before the next one is there
        if shard is not None:
            close(shard)
    finally:
        if shard is not None:
            shard.abandon()
    return files


def shard_name(group: str, number: int) -> str:
    return f"{group}-{number:05d}.safetensors"


def _flushed_hash(path: Path, again: bool) -> str:
    """Of a file that is on the disk then; unless it is read ``again``, its pages make room for what is."""
    fsync(path)
    digest = file_hash(path)
    if not again:
        forget(path)
    return digest


def forget(path: Path) -> None:
    """Tells the kernel, where it can be told, that the file's pages will not be read soon."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _FlatMoments(Mapping[str, Tensor]):
    """Moments as one flat table: ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, which are made together once when they are
    asked for in order. ``steps``, if given, gets the updates of each parameter that was asked for."""

    def __init__(self, moments: Mapping[str, Moments], steps: dict[str, float] | None = None) -> None:
        self.moments, self.steps = moments, steps
        self._ahead: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        if self._ahead is not None and self._ahead[0] == key:
            (_, tensor), self._ahead = self._ahead, None
            return tensor
        kind, _, name = key.partition("/")
        moments = self.moments[name]
        if self.steps is not None:
            self.steps[name] = moments.step
        if kind == "exp_avg":
            self._ahead = f"exp_avg_sq/{name}", moments.exp_avg_sq
        return getattr(moments, kind)

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}/{name}" for name in self.moments for kind in KINDS)

    def __len__(self) -> int:
        return 2 * len(self.moments)


flat_moments = _FlatMoments


class TensorTable(Mapping[str, Tensor]):
    """Tensors read from disk when asked for, their shapes known beforehand."""

    def shape(self, name: str) -> list[int]:
        raise NotImplementedError


class StoredTensors(TensorTable):
    """Tensors of several safetensors files, mapped rather than read: a tensor's pages are the file's until they are
    written to. Raises CheckpointError for a file that is none."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self._where: dict[str, Any] = {}  # safe_open, which has no types
        self._mapped: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            path = folder / file
            try:
                handle: Any = safe_open(path, framework="pt")  # open as long as this table is
                self._where.update(dict.fromkeys(handle.keys(), handle))
                self._files.update(dict.fromkeys(handle.keys(), path))
            except (SafetensorError, OSError) as error:
                problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged or cut off ({error})"
                raise CheckpointError("damaged", problem, key=str(path), mend="copy or fetch it again") from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._mapped:  # the same one each time, which is how it is seen that two are the same
            self._mapped[name] = self._where[name].get_tensor(name)
        return self._mapped[name]

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._where[name].get_slice(name).get_shape()
        return shape

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        dtype: str = self._where[name].get_slice(name).get_dtype()
        return dtype

    def file(self, name: str) -> Path:
        """Where the tensor lies."""
        return self._files[name]

    def __contains__(self, name: object) -> bool:
        return name in self._where  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class Ordered(Mapping[str, Tensor]):
    """The tensors called ``names``, in that order, each from the first of ``tables`` that has it."""

    def __init__(self, names: list[str], *tables: Mapping[str, Tensor]) -> None:
        self._names, self._tables = dict.fromkeys(names), tables

    def __getitem__(self, name: str) -> Tensor:
        if name in self._names:
            for table in self._tables:
                if name in table:
                    return table[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _StoredMoments(Mapping[str, Moments]):
    def __init__(self, flat: Mapping[str, Tensor], steps: Mapping[str, float]) -> None:
        self._flat, self._steps = flat, steps

    def __getitem__(self, name: str) -> Moments:
        step = self._steps[name]
        return Moments(self._flat[f"exp_avg/{name}"], self._flat[f"exp_avg_sq/{name}"], step)

    def __contains__(self, name: object) -> bool:
        return name in self._steps

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def rng_from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
