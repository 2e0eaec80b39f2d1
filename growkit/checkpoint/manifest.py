"""The manifest of a checkpoint: JSON that says what the folder holds, with a hash of every file and of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from growkit import __version__
from growkit.checkpoint.hashing import file_hash
from growkit.errors import CheckpointError, ConfigError
from growkit.models.config import ModelConfig, from_json, to_json
from growkit.schedule.decisions import Decision
from growkit.schedule.progress import Progress

FORMAT = 4
NAME = "manifest.json"
HASHERS = 2  # files that are hashed, and flushed, at once


def _data_state(body: dict[str, Any]) -> dict[str, Any]:
    """The cursor was all that a checkpoint said of where the data stood."""
    at = dict(body["progress"])
    at["data"] = {"cursor": at.pop("cursor")}
    return body | {"progress": at}


def _decisions(body: dict[str, Any]) -> dict[str, Any]:
    """No stage ended but by its duration."""
    return body | {"progress": dict(body["progress"]) | {"decisions": []}}


# format n → a function that turns its body into one of format n + 1; each comes with a test on a stored manifest.
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda body: body,  # its files have a sha256, which is still read
    2: _data_state,
    3: _decisions,
}


@dataclass(frozen=True)
class Manifest:
    """``adam_steps``: updates of each parameter that has moments. ``lineage``: the stages and growths so far, each with
    its certificate. ``rng``, ``cuda_rng``: random state of each process on the CPU, and on its GPU
    if it has one, hex. ``log_bytes``: length of the metrics log at the save.
    ``layout``: ``whole`` (safetensors) or ``sharded`` (torch.distributed.checkpoint's safetensors).
    ``seconds``: wall clock of training, stops left out. ``files``: name → bytes and xxh3_128."""

    model: ModelConfig
    progress: Progress
    recipe: str = ""
    born: Mapping[str, int] = field(default_factory=dict)
    adam_steps: Mapping[str, float] = field(default_factory=dict)
    lineage: tuple[dict[str, Any], ...] = ()
    rng: tuple[str, ...] = ()
    cuda_rng: tuple[str, ...] = ()
    corpus: Mapping[str, Any] = field(default_factory=dict)
    log_bytes: int = 0
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "whole"
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def encode(manifest: Manifest) -> bytes:
    body = asdict(manifest) | {"model": to_json(manifest.model), "format": FORMAT, "growkit": __version__}
    return _seal(body)


def _seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON with its own hash: any changed byte is noticed."""
    text = json.dumps(body, sort_keys=True, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"sha256": digest, "body": json.loads(text)}, sort_keys=True, indent=1).encode()


def decode(data: bytes, path: Path) -> Manifest:
    """Reads and checks a manifest, migrating older formats. Raises CheckpointError."""
    try:
        outer = json.loads(data)
        body = outer["body"]
        version = body["format"]
        sound = _seal(body) == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"is not a manifest ({type(error).__name__}: {error})") from error
    if not sound:
        raise _damaged(path, "does not match its own hash")
    if version not in (*MIGRATIONS, FORMAT):
        raise CheckpointError(
            "format-too-new",
            f"was written by growkit {body.get('growkit')} in a format this version ({FORMAT}) does not know",
            key=str(path),
            value=version,
            mend="install that version or a newer one",
        )
    while version < FORMAT:
        body, version = MIGRATIONS[version](body), version + 1
    try:
        kept = {name: body[name] for name in Manifest.__dataclass_fields__ if name in body}
        kept["model"] = from_json(body["model"], ModelConfig)
        made = tuple(Decision(**decision) for decision in body["progress"]["decisions"])
        kept["progress"] = Progress(**body["progress"] | {"decisions": made})
        kept["lineage"], kept["rng"] = tuple(body["lineage"]), tuple(body["rng"])
        kept["cuda_rng"] = tuple(body.get("cuda_rng", ()))  # not in the first manifests of this format
        return Manifest(**kept)
    except (ConfigError, KeyError, TypeError) as error:
        raise _damaged(path, f"does not say what a manifest says ({error})") from error


def read(folder: Path, *, verify: bool = True) -> Manifest:
    """The manifest in ``folder``, every file checked against its hash. Raises CheckpointError naming the file."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        mend = "name a checkpoint (…/checkpoints/step-…) or a run folder"
        problem = f"has no {NAME}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CheckpointError("not-a-checkpoint", problem, key=str(folder), mend=mend) from error
    except OSError as error:
        mend = "check its permissions and its disk"
        raise CheckpointError("unreadable", f"cannot be read ({error})", key=str(path), mend=mend) from error
    manifest = decode(data, path)
    if verify:
        check_files(folder, manifest)
    return manifest


def check_files(folder: Path, manifest: Manifest, *, unread: Collection[str] = ()) -> None:
    """Compares every file with its hash, those of parameters first; ``unread``: files that nobody reads soon. Raises
    CheckpointError naming the file."""
    files = sorted(manifest.files.items(), key=lambda item: (not item[0].startswith("params"), item[0]))
    with ThreadPoolExecutor(HASHERS) as hashers:
        sound = hashers.map(lambda item: _sound(folder / item[0], item[1], item[0] not in unread), files)
        for (name, _), matches in zip(files, sound, strict=True):
            if not matches:
                raise _damaged(folder / name, "does not match the hash in the manifest")


def _sound(file: Path, entry: Mapping[str, Any], again: bool) -> bool:
    try:
        if file.stat().st_size != entry["bytes"]:
            return False
        if "sha256" in entry:  # format 1
            with open(file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest() == entry["sha256"]
        return file_hash(file, again=again) == str(entry["xxh3_128"])
    except FileNotFoundError as error:
        raise _damaged(file, "is missing") from error
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error})") from error


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError("damaged", problem, key=str(path), mend="use an earlier checkpoint of the run")
