"""Every mistake a user can make ends in one message with the key, the value, the mend and a code, and leaves what was
there bitwise as it was. The table below covers every code that growkit can raise, and docs/errors.md explains each."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import growkit
from growkit import errors
from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.extension import extended_recipe
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.training import FOLDER_VARIABLE
from growkit.config.load import parse_recipe, to_yaml
from growkit.errors import ConfigError, DataError, GrowkitError
from growkit.growth.operator import OPERATORS, Exactness
from growkit.growth.path import path
from growkit.models.config import from_json, to_json
from growkit.models.presets import PRESETS
from growkit.ops.dispatch import resolve_backend
from growkit.registry import Registry
from growkit.train import hardware, loggers, trial
from tests.support import cli, held_by_another_process, model_config, recipe_dict

PACKAGE = Path(growkit.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "errors.md"
RUN = Path("runs/run")  # two stages of two steps, a checkpoint after each step
STEPS = [1, 2, 3, 4]
LAST = "runs/run/checkpoints/step-00000004"

Arrange = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Case:
    """``words``: the command line. What stderr must say: ``code``, ``key``, ``value``, and ``mend``, a word of what to
    do. ``arrange`` prepares the mistake. ``leaves``: the run may leave its folder behind (it had started)."""

    name: str
    words: str
    code: str
    key: str
    value: str
    mend: str
    arrange: Arrange | None = None
    exit_code: int = 2
    leaves: bool = False


def train(name: str, override: str, code: str, value: str, mend: str, key: str = "") -> Case:
    """A row for ``growkit train recipe.yaml OVERRIDE``; the key to name is the override's unless given."""
    words = f"train recipe.yaml run.name=new {shlex.quote(override)}"
    return Case(name, words, code, key or override.partition("=")[0], value, mend)


def recipe(name: str, text: str, code: str, value: str, mend: str, key: str = "bad.yaml") -> Case:
    """A row for ``growkit validate`` on a file with ``text``."""
    return Case(name, "validate bad.yaml", code, key, value, mend, lambda _: _write("bad.yaml", text))


def _write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def _folder(name: str) -> Arrange:
    return lambda _: Path(name).mkdir()


def _data_set(lines: str) -> Arrange:
    return lambda _: _write("data/part.jsonl", lines)


def _change_corpus(_: pytest.MonkeyPatch) -> None:
    with open("corpus.txt", "a") as file:
        file.write("one line more\n")


def _no_corpus(_: pytest.MonkeyPatch) -> None:
    Path("corpus.txt").unlink()


def _no_checkpoints(_: pytest.MonkeyPatch) -> None:
    shutil.rmtree(RUN / "checkpoints")


def _edit_saved_recipe(old: str, new: str) -> Arrange:
    def arrange(_: pytest.MonkeyPatch) -> None:
        saved = RUN / "recipe.yaml"
        assert old in saved.read_text()
        saved.write_text(saved.read_text().replace(old, new))

    return arrange


def _reseal(**changes: object) -> Arrange:
    """Changes the manifest of the last checkpoint and gives it a hash that fits."""

    def arrange(_: pytest.MonkeyPatch) -> None:
        file = Path(LAST, "manifest.json")
        body = json.loads(file.read_bytes())["body"] | changes
        file.write_bytes(manifests._seal({k: v for k, v in body.items() if v is not None}))

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


def _break_log(_: pytest.MonkeyPatch) -> None:
    log = RUN / "metrics.jsonl"
    log.write_bytes(b"{cut\n" + log.read_bytes())
    (RUN / "curve.png").unlink()  # a complete run without its picture draws it


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


RECIPE_CASES = [
    # The file.
    Case("no such recipe", "train nope", "no-such-recipe", "recipe", "'nope'", "quickstart"),
    Case("recipe is a folder", "train runs", "no-such-recipe", "recipe", "'runs'", "built-in"),
    Case("name of a recipe too long", f"train {'n' * 300}", "no-such-recipe", "recipe", "nnn", "built-in"),
    Case(
        "recipe is not text",
        "train bad.yaml",
        "recipe-unreadable",
        "bad.yaml",
        "0xff",
        "growkit recipes list",
        lambda _: Path("bad.yaml").write_bytes(b"\xff\xfe\x00") and None,
    ),
    recipe("broken YAML", "run: [", "recipe-not-yaml", "line 1", "mend the YAML"),
    recipe("key written twice", "run: {}\nmodel: {}\nrun: {}\n", "recipe-not-yaml", "'run' is written twice", "line 3"),
    recipe("key is not text", "1: 2", "recipe-not-yaml", "a key is not text", "quote"),
    recipe("two documents", "a: 1\n---\nb: 2", "recipe-not-yaml", "another document", "line 2"),
    recipe("Python in YAML", "run: !!python/name:os.system", "recipe-not-yaml", "python/name", "line 1"),
    recipe("too deep", "[" * 1200, "recipe-not-yaml", "recursion", "mend the YAML"),
    recipe("alias of itself", "run: &a {name: *a}", "recipe-not-yaml", "contains itself", "alias", "recipe"),
    recipe("a number too long", f"run: {'9' * 5000}", "recipe-not-yaml", "5000 digits", "mend the YAML"),
    recipe("empty file", "", "recipe-not-mapping", "is not a mapping", "sections"),
    recipe("a list", "- run", "recipe-not-mapping", "['run']", "sections"),
    recipe("a long text", "word " * 1000, "recipe-not-mapping", "word word", "sections"),
    recipe("no model", "run: {name: x}", "no-model", "is missing", "model.preset", "model"),
    recipe("a YAML set", "run: !!set {a}", "wrong-type", "'set'", "plain YAML", "run"),
    # Overrides.
    train("override without =", "optim.lr", "bad-override", "optim.lr", "key=value"),
    train("override without key", "=3", "bad-override", "=3", "key=value"),
    train("override with an empty part", "optim..lr=3", "bad-override", "optim..lr", "key=value"),
    train("list item missing", "stages.7.name=x", "bad-override", "'7' is not an item", "0..1"),
    train("list item negative", "stages.-1.name=x", "bad-override", "'-1' is not an item", "0..1"),
    train("list item not a number", "stages.²=x", "bad-override", "'²' is not an item", "0..1"),
    train("override below a value", "run.folder.x=3", "bad-override", "'3'", "run.folder=VALUE"),
    train("interpolation of nothing", "optim.lr=${model.x}", "bad-interpolation", "'${model.x}'", "${section.key}"),
    train("broken interpolation", "optim.lr=${", "bad-interpolation", "'${'", "\\${"),
    train("unset environment", "run.folder=${oc.env:NOPE_}", "bad-interpolation", "'${oc.env:NOPE_}'", "exists"),
    # Keys.
    train("unknown section", "modle.x=3", "unknown-key", "is not a key", "did you mean 'model'", "modle"),
    train("unknown key", "optim.lrr=3", "unknown-key", "is not a key", "did you mean 'lr'"),
    train("unknown model key", "model.num_layer=3", "unknown-key", "is not a key", "did you mean 'num_layers'"),
    train("another preset's key", "model.mlp_dim=3", "unknown-key", "is not a key", "mlp_tokens"),
    train("unknown stage key", "stages.1.durations=3", "unknown-key", "is not a key", "did you mean 'duration'"),
    train("unknown preset", "model.preset=nope", "unknown-choice", "'nope'", "tokenformer"),
    train("preset is a number", "model.preset=3", "no-model", "3", "name a preset"),
    train("model is a number", "model=3", "no-model", "3", "model.preset"),
    train("section is a number", "optim=3", "not-a-section", "3", "mapping"),
    train("section is a list", "run=[1, 2]", "not-a-section", "[1, 2]", "mapping"),
    train("section is null", "optim=null", "not-a-section", "not null", "leave it out"),
    train("stage is a list", "stages.0=[]", "not-a-section", "[]", "mapping"),
    train("grow is a number", "stages.1.grow=3", "not-a-section", "3", "mapping"),
    train("stages is a number", "stages=3", "not-a-list", "3", "must be a list"),
    train("freeze is a word", "stages.0.freeze=old", "not-a-list", "'old'", "[a, b]"),
    train("no stages", "stages=[]", "no-stages", "is empty", "name and duration"),
    train("stage without name", "stages.1.name=", "missing-key", "is missing", "name and duration"),
    train("stage without duration", "stages.1.duration=null", "missing-key", "is missing", "name and duration"),
    train("no context", "stages.0.context_length=null", "missing-key", "is missing", "first stage"),
    # Types.
    train("word for a number", "optim.lr=fast", "wrong-type", "'fast'", "a finite number"),
    train("not finite", "optim.lr=.inf", "wrong-type", "inf", "a finite number"),
    train("not a number", "optim.clip_norm=nan", "wrong-type", "'nan'", "a finite number"),
    train("truth value for a number", "model.num_layers=true", "wrong-type", "True", "a whole number"),
    train("fraction for a whole number", "model.num_layers=2.5", "wrong-type", "2.5", "a whole number"),
    train("null for a number", "model.num_layers=null", "wrong-type", "not null", "a whole number"),
    train("number for a truth value", "data.shuffle=3", "wrong-type", "3", "true or false"),
    train("truth value for text", "run.folder=true", "wrong-type", "True", "text"),
    train("list for text", "stages.0.duration=[1]", "wrong-type", "[1]", "text"),
    # Values.
    train("folder name with a slash", "run.name=a/b", "bad-name", "'a/b'", "run.folder"),
    train("folder name above", "run.name=..", "bad-name", "'..'", "run.folder"),
    train("no folder name", "run.name=", "bad-name", "''", "run.folder"),
    train("folder name with a control character", "run.name=a\x07", "bad-name", "'a\\x07'", "run.folder"),
    train("negative rate", "optim.lr=-1", "not-positive", "-1", "above zero"),
    train("zero layers", "model.num_layers=0", "not-positive", "0", "above zero"),
    train("zero parameter tokens", "model.attention_tokens=0", "not-positive", "0", "above zero"),
    train("zero speed", "monitor.peak_flops_per_second=0", "not-positive", "0", "above zero"),
    train("too many layers", "model.num_layers=99999999999", "too-large", "99999999999", "at most"),
    train("keep none", "trainer.keep_last=0", "too-small", "0", "at least 1"),
    train("empty blocks", "data.block_tokens=0", "too-small", "0", "at least 1"),
    train("negative scale", "stages.1.lr_scale.old=-1", "too-small", "-1", "at least 0"),
    train("negative context", "stages.0.context_length=-16", "too-small", "-16", "at least 1"),
    train("beta of one", "optim.beta1=1", "out-of-range", "1.0", "[0, 1)"),
    train("all validation", "data.validation_fraction=0.9", "out-of-range", "0.9", "at most 0.5"),
    train("huge seed", f"run.seed={10**30}", "out-of-range", "1000000", "0..2^63-1"),
    train("long n-gram", "monitor.ngram_order=9", "out-of-range", "9", "0..7"),
    train("unknown accelerator", "trainer.accelerator=tpu", "unknown-choice", "'tpu'", "cuda"),
    train("unknown schedule", "stages.0.schedule=linear", "unknown-choice", "'linear'", "cosine"),
    train("one device, ddp", "trainer.strategy=ddp", "strategy-devices", "'ddp'", "single"),
    train("small vocabulary", "model.vocab_size=10", "vocab-too-small", "10", "256"),
    train("width not divisible", "model.embed_dim=15", "heads-do-not-divide", "15", "multiple of 2"),
    train("kv heads", "model.num_kv_heads=3", "kv-heads-do-not-divide", "3", "divisor of 2"),
    train("odd rotation", "model.head_dim=5", "odd-rotation", "5 of 5", "even", "model.rope_fraction"),
    train("same name twice", "stages.1.name=first", "duplicate-name", "['first', 'first']", "own", "stages"),
    train("freeze an unknown part", "stages.1.freeze=[heart]", "bad-selector", "'heart'", "embedding"),
    train("freeze a bank of no number", "stages.1.freeze=['bank:²']", "bad-selector", "'bank:²'", "bank:N"),
    train("scale an unknown part", "stages.1.lr_scale.heart=2", "bad-selector", "'heart'", "embedding", "lr_scale"),
    train("freeze all", "stages.0.freeze=[old]", "all-frozen", "['old']", "something to train"),
    train("warm-up longer than the stage", "stages.0.warmup=7 steps", "lr-too-long", "'7 steps'", "2 steps"),
    # Durations and batches.
    train("no unit", "stages.0.duration=5", "bad-duration", "'5'", "'500 steps'"),
    train("unknown unit", "stages.0.duration=5 days", "bad-duration", "'5 days'", "'500 steps'"),
    train("negative duration", "stages.0.duration=-5 steps", "bad-duration", "'-5 steps'", "'500 steps'"),
    train("half a step", "stages.0.duration=1.5 steps", "bad-duration", "'1.5 steps'", "whole number"),
    train("share of nothing", "stages.0.duration=50%", "bad-duration", "'50%'", "'500 steps'"),
    train("more than all", "stages.0.warmup=200%", "bad-duration", "'200%'", "0%..100%"),
    train("empty duration", "stages.0.warmup=", "bad-duration", "''", "'500 steps'"),
    train("infinite duration", "stages.0.duration=1e400 steps", "bad-duration", "'1e400 steps'", "smaller"),
    train("endless duration", "stages.0.duration=9e17 steps", "bad-duration", "'9e17 steps'", "fewer"),
    train("save by tokens", "trainer.save_every=5 tokens", "bad-duration", "'5 tokens'", "'200 steps'"),
    train("zero tokens", "stages.0.duration=0 tokens", "empty-stage", "'0 tokens'", "at least one"),
    train("less than a step", "stages.0.duration=1 flops", "empty-stage", "'1 flops'", "at least one"),
    train("ragged batch", "stages.0.global_batch_tokens=100", "batch-not-whole", "100", "multiple of 16"),
    train("ragged micro batch", "stages.0.micro_batch_size=3", "batch-not-whole", "3", "must divide"),
    # Growth targets.
    train("grow at the start", "stages.0.grow.num_layers=2", "grow-at-start", "'num_layers': 2", "second", "0.grow"),
    train("grow what does not", "stages.1.grow.dropout=1", "cannot-grow", "1", "num_layers"),
    train("shrink", "stages.1.grow.attention_tokens=4", "shrinking-target", "4", "8 or more"),
    train("fewer kv heads", "stages.1.grow.num_kv_heads=1", "shrinking-target", "1", "2 or more"),
    train("grow to a word", "stages.1.grow.attention_tokens=big", "bad-target", "'big'", "whole number"),
    train("grow to true", "stages.1.grow.attention_tokens=true", "bad-target", "True", "whole number"),
    train("insert nothing", "stages.1.grow.insert_at=end", "bad-target", "nothing to insert", "num_layers"),
    train("insert nowhere", "stages.1.grow={num_layers: 2, insert_at: top}", "bad-target", "'top'", "end", "insert_at"),
    train("insert outside", "stages.1.grow={num_layers: 2, insert_at: [9]}", "bad-target", "[9]", "0..0", "insert_at"),
    train("grow too deep", "stages.1.grow.num_layers=99999999999", "too-large", "99999999999", "at most"),
    train("grow what is not there", "stages.1.grow.mlp_dim=64", "nothing-to-grow", "64", "mlp_tokens"),
    train("grow nothing", "stages.1.grow={num_layers: 1}", "nothing-grows", "{'num_layers': 1}", "larger", "1.grow"),
    train("heads beside groups", "stages.1.grow={num_heads: 3, num_kv_heads: 2}", "kv-heads-do-not-divide", "3", "2"),
    train("unknown operator", "stages.1.methods.nope=x", "unknown-choice", "'nope'", "param_tokens"),
    train("unknown method", "stages.1.methods.param_tokens=x", "unknown-method", "'x'", "bank"),
    train("method of nothing", "stages.1.methods.width=pad", "unused-method", "'pad'", "embed_dim"),
    train(
        "method of the other norm", "stages.1.methods.param_tokens=held", "method-does-not-fit", "'held'", "use bank"
    ),
]
DATA_CASES = [
    train("no such file", "data.source=nope.txt", "corpus-missing", "'nope.txt'", "existing file"),
    train("no source", "data.source=", "corpus-missing", "''", "existing file"),
    train("source with a NUL", "data.source=a\x00b", "corpus-missing", "'a\\x00b'", "existing file"),
    train("empty corpus", "data.source=/dev/null", "corpus-empty", "'/dev/null'", "with text"),
    train("nothing matches", "data={source: runs, pattern: '*.md'}", "corpus-empty", "'runs'", "'*.md'", "data.source"),
    train("bad pattern", "data={source: runs, pattern: /x}", "bad-pattern", "'/x'", "relative", "data.pattern"),
    train("no pattern", "data={source: runs, pattern: ''}", "bad-pattern", "''", "relative", "data.pattern"),
    # The operating system refuses to read this one, even to root.
    train("unreadable file", "data.source=/proc/self/mem", "corpus-unreadable", "'/proc/self/mem'", "permissions"),
    Case(
        "corpus shorter than the context",
        "train recipe.yaml run.name=new data.source=short.txt",
        "corpus-too-short",
        "data.source",
        "'short.txt'",
        "more text",
        lambda _: _write("short.txt", "too short"),
    ),
    Case(
        "empty folder as a data set",
        "train recipe.yaml run.name=new data.source=hf:data",
        "dataset-unavailable",
        "data.source",
        "'hf:data'",
        "data.split",
        _folder("data"),
    ),
    Case(
        "no such data set",
        "train recipe.yaml run.name=new data.source=hf:/nowhere/nothing",
        "dataset-unavailable",
        "data.source",
        "'hf:/nowhere/nothing'",
        "network",
    ),
    Case(
        "broken data set",
        "train recipe.yaml run.name=new data.source=hf:data",
        "dataset-unavailable",
        "data.source",
        "'hf:data'",
        "data.split",
        _data_set('{"text": "abc"\n{{{'),
    ),
    Case(
        "no such split",
        "train recipe.yaml run.name=new data.source=hf:data data.split=test",
        "dataset-unavailable",
        "data.source",
        'Unknown split "test"',
        "data.split",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
    Case(
        "no such column",
        "train recipe.yaml run.name=new data.source=hf:data data.text_field=body",
        "no-text-field",
        "data.text_field",
        "'body'",
        "text, n",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
    Case(
        "column of numbers",
        "train recipe.yaml run.name=new data.source=hf:data data.text_field=n",
        "not-text",
        "data.text_field",
        "'n'",
        "strings",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
]

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
         "existing file", _no_corpus),
    Case("saved recipe gone", "resume runs/run", "recipe-unreadable", "runs/run/recipe.yaml", "No such file", "YAML",
         lambda _: (RUN / "recipe.yaml").unlink()),
    Case("saved recipe of another model", "resume runs/run", "recipe-changed", "runs/run/recipe.yaml",
         "step-00000004", "undo", _edit_saved_recipe("embed_dim: 16", "embed_dim: 32")),
    Case("saved recipe with a shorter past", "resume runs/run", "recipe-changed", "runs/run/recipe.yaml",
         "step-00000004", "undo", _edit_saved_recipe("duration: 2 steps", "duration: 1 steps")),
    Case("log on a full disk", "resume runs/run", "cannot-write", "runs/run/metrics.jsonl", "No space", "free space",
         _log_on_a_full_disk),
    Case("log with a broken line", "resume runs/run", "damaged-log", "runs/run/metrics.jsonl", "line 1",
         "delete that line", _break_log),
]  # fmt: skip


def _further_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    _write("more.yaml", MORE)
    _full_disk("params-")(monkeypatch)


def _extended_recipe(_: pytest.MonkeyPatch) -> None:
    """What ``growkit extend`` would save."""
    manifest = manifests.read(Path(LAST))
    _write("more.yaml", to_yaml(extended_recipe(manifest, "runs/run", MORE, [], name="more.yaml")))


CHECKPOINT_CASES = [
    Case("inspect nothing", "inspect nope", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint"),
    Case("inspect a foreign folder", "inspect .", "not-a-checkpoint", ".", "manifest.json", "name a checkpoint"),
    Case("generate from a file", "generate recipe.yaml", "not-a-checkpoint", "recipe.yaml", "is a file",
         "name a checkpoint"),
    Case("manifest cannot be read", f"inspect {LAST}", "unreadable", "manifest.json", "Is a directory", "permissions",
         _manifest_is_a_folder),
    Case("manifest of a newer format", f"inspect {LAST}", "format-too-new", "manifest.json", "99", "install",
         _reseal(format=99)),
    Case("manifest of no format", f"inspect {LAST}", "damaged", "manifest.json", "format", "earlier",
         _reseal(format=None)),
    Case("manifest of another program", f"inspect {LAST}", "damaged", "manifest.json", "bad-model", "earlier",
         _reseal(model={"layers": 3})),
    Case("manifest of another model", f"inspect {LAST}", "damaged", "step-00000004", "embedding.weight",
         "does not hold the model", _reseal(model=to_json(model_config("tokenformer")))),
    Case("cold and not zero", "generate runs/run --temperature 1e-40", "out-of-range", "--temperature", "1e-40",
         "must be 0"),
    Case("hot without end", "generate runs/run --temperature inf", "out-of-range", "--temperature", "inf", "must be 0"),
    Case("grow onto something", "grow runs/run num_layers=2 -o runs", "file-exists", "--output", "'runs'",
         "does not exist"),
    Case("grow below a file", "grow runs/run num_layers=2 -o corpus.txt/x", "cannot-write", "corpus.txt/x",
         "corpus.txt", "free space"),
    Case("grow on a full disk", "grow runs/run num_layers=2 -o grown", "cannot-write", "grown", "No space",
         "free space", _full_disk("moments-")),
    Case("grow to what it is", "grow runs/run num_layers=1 -o grown", "nothing-grows", "grow", "1", "larger"),
    Case("grow by no size", "grow runs/run num_layers -o grown", "bad-override", "num_layers", "num_layers",
         "key=value"),
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


def _measured(text: str | None) -> Arrange:
    """A user's configuration folder of its own, with ``text`` as the measurement of this machine, if there is one."""

    def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", "config")
        if text is not None:
            _write("config/growkit/hardware.json", text)

    return arrange


PLANNER_CASES = [
    train("hardware of no price", "hardware.price_per_hour=0", "not-positive", "0", "above zero"),
    train("hardware beyond its peak", "hardware.utilisation=1.5", "out-of-range", "1.5", "at most 1"),
    train("unknown figure of hardware", "hardware.speed=3", "unknown-key", "is not a key", "memory_gb"),
    Case("plan of no recipe", "plan nope", "no-such-recipe", "recipe", "'nope'", "quickstart"),
    Case("plan of a recipe that cannot be", "plan recipe.yaml stages.0.duration=5", "bad-duration",
         "stages.0.duration", "'5'", "'500 steps'"),
    Case("plan on unknown hardware", "plan recipe.yaml --hardware h100-sxn", "unknown-choice", "--hardware",
         "'h100-sxn'", "did you mean 'h100-sxm'"),
    Case("plan on the recipe's unknown hardware", "plan recipe.yaml hardware.preset=abacus", "unknown-choice",
         "hardware.preset", "'abacus'", "this-machine"),
    Case("plan on a machine never measured", "plan recipe.yaml --hardware this-machine", "not-measured", "--hardware",
         "'this-machine'", "--measure", _measured(None)),
    Case("plan on a damaged measurement", "plan recipe.yaml", "bad-measurement", "config/growkit/hardware.json",
         "JSONDecodeError", "delete it", _measured("{cut")),
    Case("plan on a measurement of nothing", "plan recipe.yaml", "bad-measurement", "config/growkit/hardware.json",
         "KeyError", "delete it", _measured("{}")),
    Case("plan in a precision the hardware lacks", "plan recipe.yaml --hardware t4 trainer.precision=bf16", "no-peak",
         "trainer.precision", "'bf16'", "trainer.precision=fp32"),
    Case("plan measured elsewhere", "plan recipe.yaml --hardware l4 --measure", "not-this-machine", "--hardware",
         "'l4'", "drop --measure"),
    Case("plan drawn into no folder", "plan recipe.yaml --hardware l4 --png no/where.png", "cannot-write",
         "no/where.png", "No such file", "another place"),
    Case("plan drawn onto a folder", "plan recipe.yaml --hardware l4 --png runs", "cannot-write", "runs",
         "Is a directory", "another place"),
]  # fmt: skip


def _grow_to_two_layers() -> None:
    assert cli("grow", RUN, "num_layers=2", "-o", "runs/grown")[0] == 0


def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def _key_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_key(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "secret")


def _no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)


LOGGER_CASES = [
    train("no such logger", "logger.kind=mlflow", "unknown-choice", "'mlflow'", "tensorboard"),
    train("no such mode", "logger.mode=later", "unknown-choice", "'later'", "offline"),
    train("no such artifacts", "logger.artifacts=best", "unknown-choice", "'best'", "ends"),
    train("empty project", "logger.project=", "bad-name", "''", "name without"),
    train("project with a slash", "logger.project=a/b", "bad-name", "'a/b'", "name without"),
    train("entity with a colon", "logger.entity='a:b'", "bad-name", "'a:b'", "name without"),
    train("tags that are no list", "logger.tags=3", "not-a-list", "3", "[a, b]"),
    Case("no tensorboard", "train recipe.yaml run.name=new logger.kind=tensorboard", "not-installed", "logger.kind",
         "'tensorboard'", "growkit[tensorboard]", _no_tensorboard),
    Case("sync nothing", "sync nope", "not-a-run", "nope", "does not exist", "growkit train"),
    Case("sync a file", "sync recipe.yaml", "not-a-run", "recipe.yaml", "is not a run", "growkit train"),
    Case("sync a checkpoint", f"sync {LAST}", "not-a-run", LAST, "is a checkpoint", "name its run"),
    Case("sync a damaged log", "sync runs/run", "damaged-log", "metrics.jsonl", "line 1", "delete that line",
         lambda _: _write("runs/run/metrics.jsonl", "{}\n{}\n")),
    Case("sync an empty log", "sync runs/run", "not-synced", "runs/run", "nothing yet", "train it",
         lambda _: _write("runs/run/metrics.jsonl", "")),
    Case("sync without a key", "sync runs/run", "not-synced", "runs/run", "No API key", "wandb login", _no_key,
         leaves=True),
    Case("sync with a key that is none", "sync runs/run", "not-synced", "runs/run", "API key must", "wandb login",
         _key_of_a_word, leaves=True),
]  # fmt: skip


def _further(text: str) -> Arrange:
    return lambda _: _write("more.yaml", text)


def _bare_checkpoint(text: str) -> Arrange:
    """The last checkpoint as one that no recipe of growkit made."""

    def arrange(patch: pytest.MonkeyPatch) -> None:
        _reseal(recipe="")(patch)
        shutil.move(LAST, "bare")
        _write("more.yaml", text)

    return arrange


MORE = "stages: [{name: more, duration: 2 steps}]\n"

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
         "must say it", _bare_checkpoint(MORE)),
    Case("extend with a broken start", "validate more.yaml", "bad-model", "start.model", "lacks the field", "",
         _further("start: {step: 3}\n" + MORE)),
    Case("train what was extended", "train more.yaml run.name=new", "needs-a-checkpoint", "start", "extended run",
         "growkit extend", _extended_recipe),
]  # fmt: skip

EVAL_CASES = [
    Case("evaluate nothing", "eval nope", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint"),
    Case("evaluate a recipe", "eval recipe.yaml", "not-a-checkpoint", "recipe.yaml", "is a file", "name a checkpoint"),
    Case("evaluate on no text", "eval runs/run --data nope.txt", "corpus-missing", "data.source", "nope.txt", "name"),
    Case("evaluate on a short text", "eval runs/run --data one.txt", "corpus-too-short", "--data", "'one.txt'",
         "shorter --context", lambda _: _write("one.txt", "x")),
    Case("evaluate on an empty text", "eval runs/run --data one.txt", "corpus-empty", "data.source", "one.txt", "name",
         lambda _: _write("one.txt", "")),
    Case("evaluate what says no text", "eval bare --context 16", "missing-key", "--data", "no recipe", "name a file",
         _bare_checkpoint(MORE)),
    Case("evaluate without a context", "eval bare --data corpus.txt", "missing-key", "--context", "no recipe", "long",
         _bare_checkpoint(MORE)),
    Case("evaluate when the corpus is gone", "eval runs/run", "corpus-missing", "data.source", "corpus.txt", "name",
         _no_corpus),
]  # fmt: skip

INIT_CASES = [
    Case("init onto a file", "init corpus.txt", "file-exists", "file", "'corpus.txt'", "another"),
    Case("init into no folder", "init no/where.yaml", "cannot-write", "no/where.yaml", "No such file", "name a file"),
    Case("init of no family", "init new.yaml --preset rnn", "unknown-choice", "--preset", "'rnn'", "tokenformer"),
    Case("init of no size", "init new.yaml --size huge", "unknown-choice", "--size", "'huge'", "large"),
    Case("init with too many stages", "init new.yaml --stages 9", "out-of-range", "--stages", "got 9", "1 to 4"),
    Case("init without a unit", "init new.yaml --budget 20M", "bad-duration", "--budget", "'20M'", "20M tokens"),
    Case("init with a small budget", "init new.yaml --budget '1 steps' --stages 3", "empty-stage", "stages.0.duration",
         "less than one step", "at least one"),
]  # fmt: skip

PROFILE_CASES = [
    Case("profile no recipe", "profile nope", "no-such-recipe", "recipe", "'nope'", "built-in recipe"),
    Case("profile no stage", "profile recipe.yaml --stage 9", "out-of-range", "--stage", "got 9", "2 stages"),
    Case("profile stage zero", "profile recipe.yaml --stage 0", "out-of-range", "--stage", "got 0", "2 stages"),
    Case("profile onto a file", "profile recipe.yaml -o corpus.txt", "file-exists", "--output", "corpus.txt", "other"),
    Case("profile into no folder", "profile recipe.yaml -o no/t.json", "cannot-write", "no/t.json", "No such", "name"),
    Case("profile no text", "profile recipe.yaml data.source=x.txt", "corpus-missing", "data.source", "x.txt", "name"),
    Case("profile several devices",
         "profile recipe.yaml trainer.devices=2 trainer.strategy=ddp stages.0.micro_batch_size=1",
         "out-of-range", "trainer.devices", "got 2", "trainer.devices=1"),
]  # fmt: skip

CASES = [
    *RECIPE_CASES,
    *DATA_CASES,
    *RUN_CASES,
    *CHECKPOINT_CASES,
    *EXTEND_CASES,
    *EVAL_CASES,
    *INIT_CASES,
    *PROFILE_CASES,
    *LOGGER_CASES,
    *PLANNER_CASES,
]


def _log_is_a_folder(_: pytest.MonkeyPatch) -> None:
    (RUN / "metrics.jsonl").unlink()
    (RUN / "metrics.jsonl").mkdir()


def _second_run(_: pytest.MonkeyPatch) -> None:
    shutil.copytree(RUN, "runs/other")


def _second_run_and_broken_log(patch: pytest.MonkeyPatch) -> None:
    _second_run(patch)
    _break_log(patch)


REPORT_CASES = [
    Case("report on nothing", "report runs/none", "not-a-run", "runs/none", "does not exist", "growkit train"),
    Case("report on a folder", "report runs", "not-a-run", "runs", "not a run", "growkit train"),
    Case("report on a checkpoint", f"report {LAST}", "not-a-run", LAST, "is a checkpoint", "name its run"),
    Case("report on a damaged log", "report runs/run", "damaged-log", "metrics.jsonl", "line 1", "delete", _break_log),
    Case("report on no log file", "report runs/run", "unreadable", "metrics.jsonl", "directory", "permissions",
         _log_is_a_folder),
    Case("report twice on one", "report runs/run runs/../runs/run", "same-run", "runs", "runs/run", "once"),
    Case("report onto the corpus", "report runs/run -o corpus.txt", "file-exists", "--output", "'corpus.txt'",
         "another"),
    Case("report onto a folder", "report runs/run -o runs", "cannot-write", "runs", "directory", "--output"),
    Case("report into no folder", "report runs/run -o no/where.html", "cannot-write", "no/where.html", "No such file",
         "another place"),
    Case("report below a file", "report runs/run -o corpus.txt/r.html", "cannot-write", "corpus.txt/r.html",
         "Not a directory", "another place"),
    Case("compare one", "compare runs/run", "too-few-runs", "runs", "'runs/run'", "at least one other"),
    Case("compare a run with itself", "compare runs/run runs/run", "same-run", "runs", "runs/run", "once"),
    Case("compare with nothing", "compare runs/run runs/none", "not-a-run", "runs/none", "does not exist", "train"),
    Case("compare a damaged log", "compare runs/other runs/run", "damaged-log", "run/metrics.jsonl", "line 1", "delete",
         _second_run_and_broken_log),
    Case("a picture onto the corpus", "compare runs/run runs/other --png corpus.txt", "file-exists", "--png",
         "'corpus.txt'", "another", _second_run),
    Case("a picture into no folder", "compare runs/run runs/other --png no/where.png", "cannot-write", "no/where.png",
         "No such file", "another place", _second_run),
    Case("lineage of nothing", "lineage runs/none", "not-a-checkpoint", "runs/none", "does not exist", "run folder"),
    Case("lineage of a folder", "lineage runs", "not-a-checkpoint", "runs", "manifest.json", "run folder"),
    Case("lineage of a file", "lineage corpus.txt", "not-a-checkpoint", "corpus.txt", "is a file", "run folder"),
    Case("lineage by a damaged log", "lineage runs/run", "damaged-log", "metrics.jsonl", "line 1", "delete",
         _break_log),
    Case("lineage of a damaged checkpoint", f"lineage {LAST}", "damaged", "manifest.json", "manifest", "earlier",
         lambda _: flip(Path(LAST, "manifest.json"))),
    Case("lineage of a future checkpoint", f"lineage {LAST}", "format-too-new", LAST, "99", "newer",
         _reseal(format=99)),
]  # fmt: skip

CASES += REPORT_CASES


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its corpus and its finished run, all named relative to it."""
    folder = tmp_path_factory.mktemp("bad_input")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = recipe_dict(Path(), trainer={"save_every": "1 steps", "keep_last": 9})
        small["stages"] = small["stages"][:2]
        for stage in small["stages"]:
            stage["duration"] = "2 steps"
        Path("recipe.yaml").write_text(yaml.safe_dump(small))
        code, _, err = cli("train", "recipe.yaml")
        assert (code, err) == (0, "")
        assert RunFolder.open(RUN).steps() == STEPS
        os.environ.pop(FOLDER_VARIABLE, None)
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the template as the working folder."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    monkeypatch.setenv(FOLDER_VARIABLE, "")  # put back what a run leaves in the environment
    monkeypatch.delenv(FOLDER_VARIABLE)
    yield Path()
    datasets.enable_progress_bars()


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file and the name of every folder, the lock apart (it holds the last writer's process)."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in sorted(folder.rglob("*"))
        if file.name != "run.lock" and not file.is_char_device()
    }


def assert_one_message(case: Case, code: int, err: str) -> None:
    assert code == case.exit_code, err
    assert "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith(f" [{case.code}]\n"), err
    for part in (case.key, case.value, case.mend):
        assert part in err, (part, err)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_named_and_nothing_is_half_written(
    case: Case, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if case.arrange is not None:
            case.arrange(patch)
        before = contents(world)
        code, _, err = cli(*shlex.split(case.words))
    assert_one_message(case, code, err)
    after = contents(world)
    assert not [name for name in after if ".writing-" in name]
    if case.leaves:  # a run that had started may leave its folder, and no part of a checkpoint in it
        assert {name: after.get(name) for name in before} == before
        assert not list(Path("runs/new").glob("checkpoints/*/*")) or case.code == "not-finite"
    else:
        assert after == before


def test_the_names_of_the_cases_are_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40


CALLS: list[tuple[str, Callable[[], object], str, str, str]] = [
    (
        "no chain leads there",
        lambda: path(model_config("tokenformer"), model_config("tokenformer", vocab_size=99), {}),
        "unreachable-target",
        "grow",
        "vocab_size",
    ),
    ("a model that is a number", lambda: from_json(3), "bad-model", "model", "mapping"),
    ("a model with a strange field", lambda: from_json({"wings": 2}), "bad-model", "model", "'wings'"),
    ("a model without layers", lambda: from_json({"vocab_size": 3}), "bad-model", "model", "'embed_dim'"),
    ("a backend", lambda: resolve_backend("pattention", "magic"), "unknown-choice", "trainer.backend", "compiled"),
    ("a choice", lambda: Registry("colour").get("red", key="paint"), "unknown-choice", "paint", "colour"),
]


@pytest.mark.parametrize(("call", "code", "key", "part"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_a_call_with_bad_input_names_it(call: Callable[[], object], code: str, key: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert (caught.value.code, caught.value.key) == (code, key)
    assert part in str(caught.value)


USAGE = [
    ("no command", "", ""),
    ("no such command", "nope", "nope"),
    ("no recipe", "train", "recipe"),
    ("no run", "resume", "run"),
    ("no run to sync", "sync", "run"),
    ("step is a word", "resume runs/run --from x", "--from"),
    ("no targets", "grow runs/run -o grown", "targets"),
    ("no output", "grow runs/run num_layers=2", "--output"),
    ("negative seed", "grow runs/run num_layers=2 -o grown --seed -1", "--seed"),
    ("seed too large", f"generate runs/run --seed {2**63}", "--seed"),
    ("no probe", "grow runs/run num_layers=2 -o grown --probe-tokens 0", "--probe-tokens"),
    ("no tokens", "generate runs/run --tokens 0", "--tokens"),
    ("not a temperature", "generate runs/run --temperature nan", "--temperature"),
    ("unknown option", "train recipe.yaml --fast", "--fast"),
    ("extend by nothing", "extend runs/run", "recipe"),
    ("extend from a word", "extend runs/run recipe.yaml --from x", "--from"),
    ("no tokens to score", "eval runs/run --tokens 0", "--tokens"),
    ("a context of none", "eval runs/run --context 0", "--context"),
    ("stages in words", "init new.yaml --stages three", "--stages"),
    ("profile no steps", "profile recipe.yaml --steps 0", "--steps"),
    ("the doctor and a patient", "doctor now", "now"),
    ("the doctor in haste", "doctor --fast", "--fast"),
    ("the doctor in no folder", "doctor --folder", "--folder"),
    ("the doctor with a value", "doctor --json=yes", "--json"),
    ("the doctor misspelt", "docter", "docter"),
    ("no run to report on", "report", "runs"),
    ("no run to compare", "compare", "runs"),
    ("an axis there is not", "compare runs/run runs/run --by steps", "--by"),
    ("no run to tell the lineage of", "lineage", "run"),
    ("two runs to tell the lineage of", "lineage runs/run runs/run", "unexpected"),
]


@pytest.mark.parametrize(("words", "part"), [u[1:] for u in USAGE], ids=[u[0] for u in USAGE])
def test_a_wrong_command_line_exits_with_2_and_says_what_is_wrong(words: str, part: str, world: Path) -> None:
    before = contents(world)
    code, out, err = cli(*shlex.split(words))
    assert code == 2
    assert part in err and "Traceback" not in err and "Usage" in out + err
    assert "[bad-command-line]" in err
    assert contents(world) == before


def files_of_a_checkpoint(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, cut, empty, remove])
@pytest.mark.parametrize("name", ["manifest.json", "params-00001.safetensors", "moments-00001.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_offered(
    name: str, damage: Callable[[Path], None], world: Path
) -> None:
    last = Path(LAST)
    assert files_of_a_checkpoint(last) == ["manifest.json", "moments-00001.safetensors", "params-00001.safetensors"]
    damage(last / name)
    before = contents(world)
    key = name if (name, damage) != ("manifest.json", remove) else LAST
    offer = "growkit resume runs/run --from 3"
    for words in ("resume runs/run", "resume runs/run --as new", "inspect runs/run", "generate runs/run"):
        code, _, err = cli(*words.split())
        assert_one_message(Case("", "", "damaged", key, LAST, offer), code, err)
    grow = Case("", "", "damaged", key, LAST, offer)
    code, _, err = cli("grow", "runs/run", "num_layers=2", "-o", "grown")
    assert_one_message(grow, code, err)
    assert contents(world) == before
    # What is offered works.
    assert cli(*shlex.split(offer)[1:])[0] == 0
    assert RunFolder.open(RUN).steps() == STEPS
    assert RunFolder.open(RUN).load().manifest.progress.step == 4


def test_when_every_checkpoint_is_damaged_none_is_offered(world: Path) -> None:
    for step in STEPS:
        flip(RUN / f"checkpoints/step-{step:08d}/params-00001.safetensors")
    code, _, err = cli("resume", RUN, "--from", 1)
    assert_one_message(Case("", "", "damaged", "params-00001", "step-00000001", "start the run again"), code, err)


def test_a_flip_of_any_byte_of_a_manifest_is_noticed(world: Path) -> None:
    file = Path(LAST) / "manifest.json"
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(GrowkitError) as caught:
            manifests.read(Path(LAST))
        assert caught.value.code == "damaged", at


# A process of its own holds the lock, so this row has a test to itself.
BUSY = Case("run is being written", "resume runs/run", "run-busy", "runs/run", "by process", "--as NEW")


def test_a_run_that_another_process_writes_is_left_alone(world: Path) -> None:
    with held_by_another_process(RUN) as process:
        before = contents(world)
        code, _, err = cli(*BUSY.words.split())
        assert_one_message(BUSY, code, err)
        assert f"by process {process}" in err
        assert contents(world) == before
        code, _, err = cli("resume", RUN, "--from", 2, "--as", "branch")  # the mend it names works meanwhile
        assert (code, err) == (0, "")
    assert cli("resume", RUN)[0] == 0


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """The operating system itself refuses to write more (EFBIG), as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "words", "key", "leaves"),
    [
        (100, "train recipe.yaml run.name=new", "runs/new", False),
        (6000, "train recipe.yaml run.name=new", "step-00000001", True),
        (6000, "resume runs/run --as new", "runs/new", False),
        (6000, "grow runs/run num_layers=2 -o grown", "grown", False),
        (100, "recipes copy quickstart mine.yaml", "mine.yaml", False),
    ],
)
def test_writes_that_the_system_cuts_short_leave_nothing_half_written(
    limit: int, words: str, key: str, leaves: bool, world: Path
) -> None:
    before = contents(world)
    with files_no_larger_than(limit):
        code, _, err = cli(*words.split())
    assert_one_message(Case("", words, "cannot-write", key, "too large", ""), code, err)
    after = contents(world)
    assert not [name for name in after if ".writing-" in name]
    assert not [name for name in after.keys() - before.keys() if name.endswith(".safetensors")]
    assert {name: after.get(name) for name in before} == before
    assert leaves or after == before


def test_a_metrics_log_that_lost_its_end_does_not_stop_the_run(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RUN / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    shutil.rmtree(LAST)
    code, _, err = cli("resume", RUN)
    assert code == 0, err
    assert "lacks records" in caplog.text + err
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_folder_with_a_strange_name_among_the_checkpoints_is_no_checkpoint(world: Path) -> None:
    (RUN / "checkpoints/step-backup").mkdir()
    (RUN / "checkpoints/.writing-step-00000005").mkdir()
    assert RunFolder.open(RUN).steps() == STEPS


def test_text_that_looks_like_something_else_survives_the_saved_recipe(world: Path) -> None:
    text = Path("recipe.yaml").read_text()
    for prompt in (
        "${x}",
        "\\${x}",
        "a: b",
        "1e3",
        "off",
        "null",
        "~",
        "???",
        " x ",
        "é",
        "\x01",
        "\udcff",
        "2026-01-01",
    ):
        recipe = parse_recipe(text, [], PRESETS, name="recipe")
        recipe.monitor.sample_prompt = prompt
        assert parse_recipe(to_yaml(recipe), [], PRESETS, name="saved") == recipe


def test_numbers_and_words_mean_what_they_say(world: Path) -> None:
    overrides = [
        "monitor.progress=off",
        "optim.lr='3e-4'",
        "model.num_layers='2'",
        "run.name=7",
        "data.block_tokens=32",
    ]
    recipe = parse_recipe(Path("recipe.yaml").read_text(), overrides, PRESETS, name="recipe")
    assert (recipe.monitor.progress, recipe.optim.lr, recipe.model.num_layers) == ("off", 3e-4, 2)
    assert (recipe.run.name, recipe.data.block_tokens) == ("7", 32)


def test_a_prompt_that_is_not_unicode_is_taken_as_its_bytes(world: Path) -> None:
    code, out, err = cli("generate", RUN, "--prompt", "\udcff", "--tokens", 3)
    assert (code, err) == (0, "")
    assert out.startswith("\N{REPLACEMENT CHARACTER}")


def test_names_with_brackets_are_shown_as_they_are(world: Path) -> None:
    code, out, err = cli("validate", "recipe.yaml", "stages.0.name='[/b]'")
    assert code == 0 and "[/b]" in out, err
    code, out, err = cli("train", "recipe.yaml", "run.name='[b]new'", "stages.1.name='[/b]'", "monitor.progress=plain")
    assert code == 0 and "[b]new" in out and "growth into [/b]" in out, err
    code, out, err = cli("inspect", "runs/[b]new")
    assert code == 0 and "[b]new" in out and "growth into [/b]" in out, err


def test_data_errors_name_the_split_that_is_short(world: Path) -> None:
    from growkit.config.recipe import DataConfig
    from growkit.data.corpus import load_corpus
    from growkit.data.stream import TokenStream

    corpus = load_corpus(DataConfig(source="corpus.txt", validation_fraction=0.001))
    with pytest.raises(DataError, match="validation split") as caught:
        corpus.require(1000)
    assert caught.value.code == "corpus-too-short"
    with pytest.raises(DataError, match="no pair of tokens"):
        TokenStream(corpus.train[:1], block_tokens=1, seed=0)


def raised_codes() -> dict[str, list[str]]:
    """Code → where it is raised, from the syntax trees of the whole package."""
    kinds = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, GrowkitError)}
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name not in kinds:
                continue
            where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.setdefault(first.value, []).append(where)
            else:  # an error passed on under its own code
                assert isinstance(first, ast.Attribute) and first.attr == "code", f"{where}: the code is not literal"
    return found


def test_every_code_is_documented_and_every_documented_code_is_raised() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    codes = [row[0] for row in rows]
    assert codes == sorted(set(codes))
    assert set(codes) == set(raised_codes())


def test_every_code_is_exercised() -> None:
    exercised = {case.code for case in (*CASES, BUSY)} | {call[2] for call in CALLS} | {"bad-command-line"}  # USAGE
    assert exercised == set(raised_codes())


def test_the_collector_sees_every_kind_of_error() -> None:
    codes = raised_codes()
    assert {"bad-duration", "corpus-empty", "damaged", "not-finite", "not-preserved"} <= set(codes)
    assert sum(map(len, codes.values())) > 90
    assert hardware.accelerator.__module__  # the package under test is the one that is imported
