"""Mistakes with runs and checkpoints: train, resume, grow, inspect, generate, extend."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.extension import extended_recipe
from growkit.cli.training import FOLDER_VARIABLE
from growkit.config.load import to_yaml
from growkit.growth.operator import OPERATORS, Exactness
from growkit.models.config import to_json
from growkit.train import trial
from tests.bad_input.support import (
    LAST,
    MORE,
    RUN,
    Arrange,
    Case,
    bare_checkpoint,
    break_log,
    no_corpus,
    reseal,
    write,
)
from tests.support import cli, model_config


def _grow_to_two_layers() -> None:
    assert cli("grow", RUN, "num_layers=2", "-o", "runs/grown")[0] == 0


def _change_corpus(_: pytest.MonkeyPatch) -> None:
    with open("corpus.txt", "a") as file:
        file.write("one line more\n")


def _no_checkpoints(_: pytest.MonkeyPatch) -> None:
    shutil.rmtree(RUN / "checkpoints")


def _edit_saved_recipe(old: str, new: str) -> Arrange:
    def arrange(_: pytest.MonkeyPatch) -> None:
        saved = RUN / "recipe.yaml"
        assert old in saved.read_text()
        saved.write_text(saved.read_text().replace(old, new))

    return arrange


def _manifest_is_a_folder(_: pytest.MonkeyPatch) -> None:
    file = Path(LAST, "manifest.json")
    file.unlink()
    file.mkdir()


def _read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root ignores permission bits, so the refusal is played at the system call."""

    def refuse(name: object, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

    monkeypatch.setattr(os, "mkdir", refuse)


def _full_disk(at_file: str) -> Arrange:
    """No space is left when ``at_file`` is forced to disk."""

    def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.fsync

        def fsync(handle: int) -> None:
            if re.search(at_file, os.readlink(f"/proc/self/fd/{handle}")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    return arrange


def _log_on_a_full_disk(_: pytest.MonkeyPatch) -> None:
    shutil.rmtree(LAST)  # so that there is something left to train
    (RUN / "metrics.jsonl").unlink()
    (RUN / "metrics.jsonl").symlink_to("/dev/full")


def _memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "_try", refuse)


def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _liar(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Exactness("exact", "so it says")
    monkeypatch.setattr(type(OPERATORS.get("depth", key="")), "exactness", lambda *_: claim)


def _further_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


RUN_CASES = [
    Case("run exists", "train recipe.yaml", "run-exists", "run.name", "runs/run", "growkit resume"),
    Case("no GPU", "train recipe.yaml run.name=new trainer.accelerator=cuda", "no-such-device", "trainer.accelerator",
         "'cuda'", "cpu", _no_gpu),
    Case("run folder below a file", "train recipe.yaml run.name=new run.folder=corpus.txt", "cannot-write",
         "corpus.txt/new", "Not a directory", "run.folder"),
    Case("run name too long", f"train recipe.yaml run.name={'n' * 300}", "cannot-write", "nnn", "too long",
         "run.folder"),
    Case("read-only disk", "train recipe.yaml run.name=new", "cannot-write", "runs/new", "Read-only", "run.folder",
         _read_only_disk),
    Case("disk fills at a checkpoint", "train recipe.yaml run.name=new", "cannot-write", "step-00000001", "No space",
         "free space", _full_disk(r"params-.*safetensors$"), leaves=True),
    Case("disk fills at the manifest", "train recipe.yaml run.name=new", "cannot-write", "step-00000001", "No space",
         "free space", _full_disk(r"manifest\.json$"), leaves=True),
    Case("disk fills at the log", "train recipe.yaml run.name=new", "cannot-write", "metrics.jsonl", "No space",
         "free space", _full_disk(r"metrics\.jsonl$"), leaves=True),
    Case("no memory", "train recipe.yaml run.name=new", "out-of-memory", "stages.0.micro_batch_size", "4",
         "checkpoint_layers", _memory_is_short, exit_code=3, leaves=True),
    Case("loss explodes", "train recipe.yaml run.name=new optim.lr=1e30 optim.clip_norm=0", "not-finite", "stages.0",
         "nan", "lower optim.lr", exit_code=3, leaves=True),
    Case("further process on its own", "train recipe.yaml run.name=new", "no-run-folder", FOLDER_VARIABLE, "not set",
         "trainer.devices", _further_process),
    Case("resume nothing", "resume nope", "not-a-run", "nope", "does not exist", "growkit train"),
    Case("resume a foreign folder", "resume .", "not-a-run", ".", "not a run", "growkit train"),
    Case("resume a path too long", f"resume {'n' * 300}", "not-a-run", "nnn", "does not exist", "growkit train"),
    Case("resume from a step never saved", "resume runs/run --from 9", "no-such-step", "--from", "9", "1, 2, 3, 4"),
    Case("resume from below zero", "resume runs/run --from -1", "no-such-step", "--from", "-1", "1, 2, 3, 4"),
    Case("resume would lose work", "resume runs/run --from 2", "would-lose-work", "--from", "2", "--as NEW"),
    Case("branch onto a run", "resume runs/run --as run", "run-exists", "--as", "runs/run", "growkit resume"),
    Case("branch of a run without checkpoints", "resume runs/run --as new", "no-checkpoint", "runs/run",
         "no checkpoint", "growkit resume", _no_checkpoints),
    Case("branch on a read-only disk", "resume runs/run --as new", "cannot-write", "runs/new", "Read-only",
         "run.folder", _read_only_disk),
    Case("corpus changed", "resume runs/run", "corpus-changed", "data.source", "'corpus.txt'", "restore",
         _change_corpus),
    Case("corpus changed before a branch", "resume runs/run --as new", "corpus-changed", "data.source", "'corpus.txt'",
         "restore", _change_corpus),
    Case("corpus gone before a branch", "resume runs/run --as new", "corpus-missing", "data.source", "'corpus.txt'",
         "existing file", no_corpus),
    Case("saved recipe gone", "resume runs/run", "recipe-unreadable", "runs/run/recipe.yaml", "No such file", "YAML",
         lambda _: (RUN / "recipe.yaml").unlink()),
    Case("saved recipe of another model", "resume runs/run", "recipe-changed", "runs/run/recipe.yaml",
         "step-00000004", "undo", _edit_saved_recipe("embed_dim: 16", "embed_dim: 32")),
    Case("saved recipe with a shorter past", "resume runs/run", "recipe-changed", "runs/run/recipe.yaml",
         "step-00000004", "undo", _edit_saved_recipe("duration: 2 steps", "duration: 1 steps")),
    Case("log on a full disk", "resume runs/run", "cannot-write", "runs/run/metrics.jsonl", "No space", "free space",
         _log_on_a_full_disk),
    Case("log with a broken line", "resume runs/run", "damaged-log", "runs/run/metrics.jsonl", "line 1",
         "delete that line", break_log),
]  # fmt: skip


def _further_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write("more.yaml", MORE)
    _full_disk("params-")(monkeypatch)


def _extended_recipe(_: pytest.MonkeyPatch) -> None:
    """What ``growkit extend`` would save."""
    manifest = manifests.read(Path(LAST))
    write("more.yaml", to_yaml(extended_recipe(manifest, "runs/run", MORE, [], name="more.yaml")))


CHECKPOINT_CASES = [
    Case("inspect nothing", "inspect nope", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint"),
    Case("inspect a foreign folder", "inspect .", "not-a-checkpoint", ".", "manifest.json", "name a checkpoint"),
    Case("generate from a file", "generate recipe.yaml", "not-a-checkpoint", "recipe.yaml", "is a file",
         "name a checkpoint"),
    Case("manifest cannot be read", f"inspect {LAST}", "unreadable", "manifest.json", "Is a directory", "permissions",
         _manifest_is_a_folder),
    Case("manifest of a newer format", f"inspect {LAST}", "format-too-new", "manifest.json", "99", "install",
         reseal(format=99)),
    Case("manifest of no format", f"inspect {LAST}", "damaged", "manifest.json", "format", "earlier",
         reseal(format=None)),
    Case("manifest of another program", f"inspect {LAST}", "damaged", "manifest.json", "bad-model", "earlier",
         reseal(model={"layers": 3})),
    Case("manifest of another model", f"inspect {LAST}", "damaged", "step-00000004", "embedding.weight",
         "does not hold the model", reseal(model=to_json(model_config("tokenformer")))),
    Case("cold and not zero", "generate runs/run --temperature 1e-40", "out-of-range", "--temperature", "1e-40",
         "must be 0"),
    Case("hot without end", "generate runs/run --temperature inf", "out-of-range", "--temperature", "inf", "must be 0"),
    Case("grow onto something", "grow runs/run num_layers=2 -o runs", "file-exists", "--output", "'runs'",
         "does not exist"),
    Case("grow below a file", "grow runs/run num_layers=2 -o corpus.txt/x", "cannot-write", "corpus.txt/x",
         "corpus.txt", "free space"),
    Case("grow on a full disk", "grow runs/run num_layers=2 -o grown", "cannot-write", "grown", "No space",
         "free space", _full_disk("params-")),
    Case("grow to what it is", "grow runs/run num_layers=1 -o grown", "nothing-grows", "grow", "1", "larger"),
    Case("grow by no size", "grow runs/run num_layers -o grown", "bad-override", "num_layers", "num_layers",
         "key=value"),
    Case("grow by two methods", "grow runs/run num_layers=2 methods.depth=stack methods.depth=midas -o grown",
         "bad-override", "methods.depth", "methods.depth=midas", "say it once"),
    Case("grow to two sizes", "grow runs/run num_layers=2 num_layers=3 -o grown", "bad-override", "num_layers",
         "num_layers=3", "say it once"),
    Case("grow to a mapping", "grow runs/run num_layers.x=3 -o grown", "bad-target", "grow.num_layers", "{'x': 3}",
         "whole number"),
    Case("grow by a number's method", "grow runs/run num_layers=2 methods.depth=3 -o grown", "not-a-section",
         "methods", "{'depth': 3}", "methods.OPERATOR=METHOD"),
    Case("grow nothing by a method", "grow runs/run methods.depth=stack -o grown", "unused-method", "methods.depth",
         "'stack'", "num_layers"),
    Case("interleave an uneven number", "grow runs/grown num_layers=3 methods.depth=interleave -o g", "bad-target",
         "grow.num_layers", "3", "use 4", lambda _: _grow_to_two_layers()),
    Case("a promise that does not hold", "grow runs/run num_layers=2 methods.depth=stack -o grown", "not-preserved",
         "grow", "so it says", "please report", _liar),
    Case("copy no recipe", "recipes copy nope", "no-such-recipe", "recipe", "'nope'", "quickstart"),
    Case("copy onto a file", "recipes copy quickstart corpus.txt", "file-exists", "target", "'corpus.txt'", "another"),
    Case("copy into no folder", "recipes copy quickstart no/where.yaml", "cannot-write", "no/where.yaml",
         "No such file", "exists"),
    Case("show what is not text", "recipes show bad.yaml", "recipe-unreadable", "bad.yaml", "0xff", "recipes list",
         lambda _: Path("bad.yaml").write_bytes(b"\xff") and None),
]  # fmt: skip


def _further(text: str) -> Arrange:
    return lambda _: write("more.yaml", text)


EXTEND_CASES = [
    Case("resume a checkpoint", f"resume {LAST}", "not-a-run", LAST, "is a checkpoint", "extend take checkpoints"),
    Case("extend nothing", "extend nope more.yaml", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint",
         _further(MORE)),
    Case("extend by no recipe", "extend runs/run nope.yaml", "no-such-recipe", "recipe", "'nope.yaml'", "YAML file"),
    Case("extend by a whole recipe", "extend runs/run recipe.yaml", "model-in-extension", "model", "'tokenformer'",
         "drop model"),
    Case("extend by a recipe with a start", "extend runs/run more.yaml", "start-given", "start", "not for a recipe",
         "drop start", _further("start: {step: 3}\n" + MORE)),
    Case("extend by no stages", "extend runs/run more.yaml", "no-stages", "stages", "is empty", "at least one stage",
         _further("optim: {lr: 1e-3}\n")),
    Case("extend to less", "extend runs/run more.yaml stages.0.grow.mlp_tokens=1", "shrinking-target",
         "stages.0.grow.mlp_tokens", "got 1", "only enlarges", _further(MORE)),
    Case("extend from no step", "extend runs/run more.yaml --from 9", "no-such-step", "--from", "got 9", "there are",
         _further(MORE)),
    Case("extend a checkpoint from a step", f"extend {LAST} more.yaml --from 4", "no-such-step", "--from", "got 4",
         "name a run folder", _further(MORE)),
    Case("extend onto a run", "extend runs/run more.yaml run.name=run", "run-exists", "run.name", "runs/run",
         "growkit resume", _further(MORE)),
    Case("extend on a full disk", "extend runs/run more.yaml run.name=new", "cannot-write", "step-00000004", "No space",
         "free space", _further_on_a_full_disk),
    Case("extend what says no context", "extend bare more.yaml", "missing-key", "stages.0.context_length", "is missing",
         "must say it", bare_checkpoint(MORE)),
    Case("extend with a broken start", "validate more.yaml", "bad-model", "start.model", "lacks the field", "",
         _further("start: {step: 3}\n" + MORE)),
    Case("train what was extended", "train more.yaml run.name=new", "needs-a-checkpoint", "start", "extended run",
         "growkit extend", _extended_recipe),
]  # fmt: skip
