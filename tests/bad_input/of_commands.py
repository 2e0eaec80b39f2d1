"""Mistakes with the commands around training: plan, loggers, eval, init, profile, report, compare, lineage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from growkit.train import loggers
from tests.bad_input.support import (
    LAST,
    MORE,
    RUN,
    Arrange,
    Case,
    bare_checkpoint,
    break_log,
    flip,
    no_corpus,
    reseal,
    train,
    write,
)


def _measured(text: str | None) -> Arrange:
    """A user's configuration folder of its own, with ``text`` as the measurement of this machine, if there is one."""

    def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CONFIG_HOME", "config")
        if text is not None:
            write("config/growkit/hardware.json", text)

    return arrange


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def _folder(**changes: object) -> Arrange:
    """A Hugging Face folder with too few tensors."""

    def arrange(_: pytest.MonkeyPatch) -> None:
        write("model/config.json", json.dumps(LLAMA | changes))
        save_file({"model.embed_tokens.weight": torch.zeros(256, 16)}, "model/model.safetensors")

    return arrange


FOLDER_CASES = [
    Case(
        "a folder of a family growkit does not know",
        "inspect model",
        "unknown-architecture",
        "config.json: architectures",
        "RwkvForCausalLM",
        "known: ",
        _folder(architectures=["RwkvForCausalLM"]),
    ),
    Case(
        "a folder with quantized weights",
        "grow model num_layers=2 -o grown",
        "not-supported",
        "config.json: quantization_config",
        "{'bits': 4}",
        "before",
        _folder(quantization_config={"bits": 4}),
    ),
    Case(
        "a folder that lacks tensors",
        "grow model num_layers=2 -o grown",
        "wrong-tensors",
        "model",
        "model.layers.0.input_layernorm.weight",
        "published",
        _folder(),
    ),
    Case(
        "growth that looks, at nothing",
        f"grow {RUN} mlp_tokens=2 methods.param_tokens=shrink -o grown",
        "needs-a-probe",
        "methods.param_tokens",
        "'shrink'",
        "--data",
    ),
    Case(
        "a ramp beyond its stage",
        "train recipe.yaml run.name=new stages.1.methods.param_tokens=masked 'stages.1.grow_time=90 steps'",
        "ramp-too-long",
        "stages.1.grow_time",
        "'90 steps'",
        "the next one starts",
    ),
]
PLANNER_CASES = [
    train("hardware of no price", "hardware.price_per_hour=0", "not-positive", "0", "above zero"),
    train("hardware beyond its peak", "hardware.utilisation=1.5", "out-of-range", "1.5", "at most 1"),
    train("unknown figure of hardware", "hardware.speed=3", "unknown-key", "is not a key", "memory_gb"),
    Case("plan of no recipe", "plan nope", "no-such-recipe", "recipe", "'nope'", "quickstart"),
    Case("plan of a recipe that cannot be", "plan recipe.yaml stages.0.duration=5", "bad-duration",
         "stages.0.duration", "'5'", "'500 steps'"),
    Case("plan of stages on nothing", "plan more.yaml --extend runs/none", "not-a-checkpoint", "runs/none",
         "does not exist", "run folder", lambda _: write("more.yaml", MORE)),
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
         lambda _: write("runs/run/metrics.jsonl", "{}\n{}\n")),
    Case("sync an empty log", "sync runs/run", "not-synced", "runs/run", "nothing yet", "train it",
         lambda _: write("runs/run/metrics.jsonl", "")),
    Case("sync without a key", "sync runs/run", "not-synced", "runs/run", "No API key", "wandb login", _no_key,
         leaves=True),
    Case("sync with a key that is none", "sync runs/run", "not-synced", "runs/run", "API key must", "wandb login",
         _key_of_a_word, leaves=True),
]  # fmt: skip


EVAL_CASES = [
    Case("evaluate nothing", "eval nope", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint"),
    Case("evaluate a recipe", "eval recipe.yaml", "not-a-checkpoint", "recipe.yaml", "is a file", "name a checkpoint"),
    Case("evaluate on no text", "eval runs/run --data nope.txt", "corpus-missing", "data.source", "nope.txt", "name"),
    Case("evaluate on a short text", "eval runs/run --data one.txt", "corpus-too-short", "--data", "'one.txt'",
         "shorter --context", lambda _: write("one.txt", "x")),
    Case("evaluate on an empty text", "eval runs/run --data one.txt", "corpus-empty", "data.source", "one.txt", "name",
         lambda _: write("one.txt", "")),
    Case("evaluate what says no text", "eval bare --context 16", "missing-key", "--data", "no recipe", "name a file",
         bare_checkpoint(MORE)),
    Case("evaluate without a context", "eval bare --data corpus.txt", "missing-key", "--context", "no recipe", "long",
         bare_checkpoint(MORE)),
    Case("evaluate when the corpus is gone", "eval runs/run", "corpus-missing", "data.source", "corpus.txt", "name",
         no_corpus),
    Case("tasks in no folder", "eval runs/run --tasks mine --tasks-path nope", "no-such-folder", "--tasks-path",
         "'nope'", "your task YAMLs"),
    Case("a text and tasks at once", "eval runs/run --tasks mine --data corpus.txt", "bad-command-line", "--data",
         "'corpus.txt'", "one after the other"),
    Case("sequences of a text", "eval runs/run --sequences 9", "bad-command-line", "--sequences", "got 9", "leave it"),
    Case("scoring a text with settings", "eval runs/run --setting a=3", "bad-command-line", "--setting", "a=3",
         "leave it out"),
    Case("a picture of a task", "eval runs/run --data synthetic/needle --png p.png", "bad-command-line", "--png",
         "'p.png'", "leave it out"),
    Case("tokens of a task", "eval runs/run --data synthetic/needle --tokens 9", "bad-command-line", "--tokens",
         "got 9", "leave it out"),
    Case("evaluate on no such task", "eval runs/run --data synthetic/needles", "unknown-choice", "--data",
         "'synthetic/needles'", "did you mean 'synthetic/needle'"),
    Case("evaluate with a strange setting", "eval runs/run --data synthetic/needle --setting size=3", "unknown-key",
         "--setting.size", "is not a key", "fillers"),
    Case("evaluate in too short a context", "eval runs/run --data synthetic/needle --context 8", "context-too-short",
         "--context", "got 8", "9 or more"),
    Case("evaluate a task beyond the vocabulary", "eval runs/run --data synthetic/associative-recall --context 32",
         "vocab-too-small", "model.vocab_size", "got 256", "8193 or more"),
    Case("a picture of positions onto the corpus", "eval runs/run --png corpus.txt", "file-exists", "--png",
         "'corpus.txt'", "another"),
    Case("several contexts and tasks", "eval runs/run --tasks mine --context 16 --context 32", "bad-command-line",
         "--context", "[16, 32]", "leave it out"),
    Case("a limit of no tasks", "eval runs/run --limit 3", "bad-command-line", "--limit", "'3'", "--tasks"),
]  # fmt: skip

EXPORT_CASES = [
    Case("export nothing", "export nope out", "not-a-checkpoint", "nope", "does not exist", "name a checkpoint"),
    Case("export onto a folder", "export runs/run runs", "file-exists", "runs", "already there", "does not exist"),
    Case("export as no format", "export runs/run out --as lama", "unknown-choice", "--as", "'lama'", "growkit"),
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


def _log_is_a_folder(_: pytest.MonkeyPatch) -> None:
    (RUN / "metrics.jsonl").unlink()
    (RUN / "metrics.jsonl").mkdir()


def _second_run(_: pytest.MonkeyPatch) -> None:
    shutil.copytree(RUN, "runs/other")


def _second_run_and_broken_log(patch: pytest.MonkeyPatch) -> None:
    _second_run(patch)
    break_log(patch)


REPORT_CASES = [
    Case("report on nothing", "report runs/none", "not-a-run", "runs/none", "does not exist", "growkit train"),
    Case("report on a folder", "report runs", "not-a-run", "runs", "not a run", "growkit train"),
    Case("report on a checkpoint", f"report {LAST}", "not-a-run", LAST, "is a checkpoint", "name its run"),
    Case("report on a damaged log", "report runs/run", "damaged-log", "metrics.jsonl", "line 1", "delete", break_log),
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
    Case("lineage of a folder", "lineage runs/run/checkpoints", "not-a-checkpoint", "checkpoints",
         "manifest.json", "run folder"),
    Case("lineage of a file", "lineage corpus.txt", "not-a-checkpoint", "corpus.txt", "is a file", "run folder"),
    Case("lineage by a damaged log", "lineage runs/run", "damaged-log", "metrics.jsonl", "line 1", "delete",
         break_log),
    Case("lineage of a damaged checkpoint", f"lineage {LAST}", "damaged", "manifest.json", "manifest", "earlier",
         lambda _: flip(Path(LAST, "manifest.json"))),
    Case("lineage of a future checkpoint", f"lineage {LAST}", "format-too-new", LAST, "99", "newer",
         reseal(format=99)),
]  # fmt: skip
