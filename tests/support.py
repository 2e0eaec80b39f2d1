"""What several tests need: trained-like states, tiny recipes, the command line in this process or in a forked one."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from growkit.cli.main import main
from growkit.growth.operator import each_attention
from growkit.growth.state import Moments, TrainState
from growkit.models.config import ModelConfig
from growkit.models.decoder import build, constant, init_tensor
from growkit.models.presets import PRESETS
from growkit.models.rope import RopeScaling
from growkit.models.spec import param_specs

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. 0123456789\n"


def model_config(preset: str, *, rope_scaling: RopeScaling | None = None, **fields: Any) -> ModelConfig:
    """A tiny model: width 24, 2 layers, 2 heads, vocabulary 48. ``rope_scaling``: of every layer."""
    small = {"vocab_size": 48, "embed_dim": 24, "num_layers": 2, "num_heads": 2}
    if preset == "tokenformer":
        small |= {"attention_tokens": 10, "mlp_tokens": 14}
    config = PRESETS.get(preset, key="preset")(**(small | fields)).written_out()
    return each_attention(config, config, lambda mixer, _: replace(mixer, rope_scaling=rope_scaling))


def trained_like(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> TrainState:
    """A state as training leaves it: every parameter random, gains away from 1, logits of standard deviation ≥ 1,
    moments of the size of real gradients after many steps. Made once and copied: a test may do with it as it likes."""
    made = _trained_like(config, seed, dtype)
    moments = {n: Moments(m.exp_avg.clone(), m.exp_avg_sq.clone(), m.step) for n, m in made.moments.items()}
    return TrainState(config, {name: tensor.clone() for name, tensor in made.params.items()}, moments)


@lru_cache(maxsize=32)
def _trained_like(config: ModelConfig, seed: int, dtype: torch.dtype) -> TrainState:
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {}
    for name, spec in param_specs(config).items():
        if spec.role == "gain":
            params[name] = 1 + 0.4 * normal(spec.shape)
        elif spec.role == "bias":
            params[name] = 0.3 * normal(spec.shape)
        elif spec.role in ("embedding", "head"):
            params[name] = 0.5 * normal(spec.shape)
        elif spec.start in ("a_log", "dt_bias"):
            params[name] = init_tensor(spec, generator, torch.float64) + 0.3 * normal(spec.shape)
        elif spec.role == "skip":
            params[name] = 1 + 0.4 * normal(spec.shape)
        elif spec.constant is not None:
            params[name] = constant(spec, torch.float64) + 0.3 * normal(spec.shape)
        else:
            params[name] = 0.3 * normal(spec.shape)
    params = {name: tensor.to(dtype) for name, tensor in params.items()}
    model = build(config, {name: p.double() for name, p in params.items()})
    tokens = probe(config)
    assert float(model(tokens[:, :-1]).detach().std()) >= 1, "not a trained-like state"
    squares = dict.fromkeys(params, 0.0)
    # Of a few coefficients of blocks, one batch may have a gradient of next to nothing.
    batches = [tokens] if config.stream is None else [probe(config, seed=seed) for seed in range(1, 9)]
    for batch in batches:
        model.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).total.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            squares[name] += float(p.grad.square().mean()) / len(batches)
    moments = {}
    for name, p in model.named_parameters():
        size = torch.tensor(squares[name], dtype=torch.float64)  # every entry its own noise, none zero
        exp_avg = 0.3 * size.sqrt() * normal(p.shape)
        moments[name] = Moments(exp_avg.to(dtype), (size * (0.5 + normal(p.shape).square())).to(dtype), 1000.0)
    return TrainState(config, params, moments)


def probe(config: ModelConfig, *, rows: int = 3, context: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(seed))


def corpus_file(folder: Path, kilobytes: int = 40) -> Path:
    """A text with some structure and no two lines alike."""
    path = folder / "corpus.txt"
    lines = [f"{i} {TEXT[i % 60 :]}{i * 7919 % 1009}\n" for i in range(kilobytes * 1024 // 60)]
    path.write_text("".join(lines)[: kilobytes * 1024])
    return path


def recipe_dict(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe that grows twice in about two seconds: tokens, then depth and context. ``sections`` are merged in."""
    recipe: dict[str, Any] = {
        "run": {"name": "run", "folder": str(folder / "runs"), "threads": 1},
        "data": {"source": str(corpus_file(folder))},
        "model": {
            "preset": "tokenformer",
            "embed_dim": 16,
            "num_layers": 1,
            "num_heads": 2,
            "attention_tokens": 8,
            "mlp_tokens": 8,
            "dropout": 0.1,
        },
        "trainer": {"save_every": "4 steps", "precision": "fp32"},
        "monitor": {
            "log_every": 1,
            "validation_tokens": 256,
            "probe_tokens": 64,
            "ngram_order": 2,
            "sample_tokens": 5,
            "progress": "off",
            "peak_flops_per_second": 1e9,
        },
        "stages": [
            {
                "name": "first",
                "duration": "6 steps",
                "context_length": 16,
                "global_batch_tokens": 128,
                "micro_batch_size": 4,
                "validate_every": "3 steps",
            },
            {"name": "tokens", "duration": "6 steps", "grow": {"attention_tokens": 12, "mlp_tokens": 16}},
            {
                "name": "deeper",
                "duration": "6 steps",
                "grow": {"num_layers": 2},
                "context_length": 32,
                "micro_batch_size": 2,
            },
        ],
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section if isinstance(section, dict) else section
    return recipe


def write_recipe(folder: Path, recipe: dict[str, Any] | None = None, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe if recipe is not None else recipe_dict(folder, **sections)))
    return path


def cli(*words: object) -> tuple[int, str, str]:
    """Runs ``growkit words...`` in this process; returns (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["growkit", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The metrics log of a run folder."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if kind in (None, record["kind"])]


context = multiprocessing.get_context("forkserver")
# The server imports torch once; each child is a fork of it, so a process costs milliseconds instead of seconds.
context.set_forkserver_preload(["tests.warm"])


def in_child(*words: object, env: dict[str, str] | None = None) -> int:
    """Runs ``growkit words...`` in a process of its own; returns its exit code (negative: killed by that signal)."""
    child = start_child(*words, env=env)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_child(*words: object, env: dict[str, str] | None = None) -> multiprocessing.process.BaseProcess:
    child = context.Process(target=_child, args=([str(word) for word in words], env or {}))
    child.start()
    return child


def _child(words: list[str], env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = ["growkit", *words]
    main()


@contextlib.contextmanager
def held_by_another_process(run: Path) -> Iterator[int]:
    """The lock of a run, as a process that writes it has it; yields that process's id."""
    program = (
        "import fcntl, os, sys\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(str(os.getpid())); lock.flush()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(run / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.communicate()
