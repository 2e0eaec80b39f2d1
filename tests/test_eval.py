"""``growkit eval``: its loss is the one the run logged, and by position it is the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from growkit.data.stream import validation_windows, windows
from growkit.eval.measure import Score, cache_bytes_per_token, score
from growkit.models.decoder import Cache, build
from tests.support import cli, in_child, model_config, records, trained_like, write_recipe

SUMMATION = 1e-6  # relative, of float32 losses added up in another order


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    assert in_child("train", write_recipe(folder), "run.name=run") == 0
    return folder / "runs" / "run"


def test_the_loss_is_what_the_run_logged(run: Path) -> None:
    code, out, err = cli("eval", run, "--tokens", 256, "--json")
    assert code == 0, err
    found, logged = json.loads(out), records(run, "validation")[-1]
    assert found["loss"] == pytest.approx(logged["loss"], rel=SUMMATION)
    assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=SUMMATION)
    assert found["context_length"] == logged["context_length"] == len(found["loss_by_position"])
    assert found["reads_tokens_per_second"] > 0 and found["writes_tokens_per_second"] > 0


def test_another_text_is_scored_whole(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("nothing like what it was trained on: ÄÖÜ ¿? " * 40)
    code, out, err = cli("eval", run, "--data", text, "--context", 64, "--tokens", 10**6)
    assert code == 0, err
    size = len(text.read_bytes())
    assert f"over {(size - 1 - 8) // 56 * 56:,} tokens in windows of 64" in out
    assert "loss by position" in out and "32–63" in out and "tokens/s" in out


def test_by_position_beside_a_plain_loop() -> None:
    config = model_config("transformer")
    model = build(config, trained_like(config, dtype=torch.float32).params).eval()
    tokens = np.random.default_rng(0).integers(0, 48, 500).astype(np.uint8)
    found = score(model, tokens, 16, 200)
    starts, count = validation_windows(tokens, 16, 200, 2)
    x, y = windows(tokens, starts, 16)
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(model(x)[:, t], y[:, t]) for t in range(16)])
    assert found.by_position == pytest.approx(losses.tolist(), rel=SUMMATION)
    assert found.tokens == count and found.loss == pytest.approx(float(losses[2:].mean()), rel=SUMMATION)


def test_buckets_double_and_leave_nothing_out() -> None:
    rows = Score(0.0, tuple(map(float, range(11))), 1).buckets()
    assert rows == [(0, 0, 0.0), (1, 1, 1.0), (2, 3, 2.5), (4, 7, 5.5), (8, 10, 9.0)]


@pytest.mark.parametrize("stream", [{}, {"altup_blocks": 3}, {"num_layers": 3, "altup_stride": 4}], ids=str)
def test_cache_bytes_are_what_the_cache_holds(stream: dict[str, Any]) -> None:
    """Blocks keep nothing of their own; a layer with a stride has keys and values of every so many tokens."""
    config = model_config("transformer", num_kv_heads=1, **stream)
    model = build(config, trained_like(config, dtype=torch.float32).params).eval()
    cache = Cache(config)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    held = [layer.append(k := torch.zeros(1, 1, 0, 12), k) for layer in cache.layers.values()]
    assert sum(tensor.nbytes for pair in held for tensor in pair) == 8 * cache_bytes_per_token(config)
