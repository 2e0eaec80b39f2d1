"""Greedy stages: a new part is trained alone, then all of them together."""

from __future__ import annotations

from pathlib import Path

import torch

from growkit.checkpoint.run_folder import RunFolder
from tests.support import cli, corpus_file

STEPS = 3


def test_only_the_new_part_moves_until_all_do(tmp_path: Path) -> None:
    """Every parameter of a new layer moves in its stage and nothing else does; in the last stage everything moves."""
    options = [f"stages.{n}.{key}" for n in range(4) for key in (f"duration={STEPS} steps", "new_warmup=0 steps")]
    quiet = ["monitor.progress=off", "monitor.validation_tokens=256", "monitor.sample_tokens=0", "run.name=greedy"]
    text = [f"data.source={corpus_file(tmp_path)}", f"run.folder={tmp_path}", "model.embed_dim=16"]
    code, _, err = cli("train", "greedy-stages", *text, *quiet, *options)
    assert code == 0, err
    run = RunFolder.open(tmp_path / "greedy")
    first, second, third, together = (run.load(STEPS * n).state for n in (1, 2, 3, 4))
    for before, after in ((first, second), (second, third)):
        assert after.params.keys() > before.params.keys()
        assert all(torch.equal(before.params[name], after.params[name]) for name in before.params)
        new = after.params.keys() - before.params.keys()
        assert new <= after.moments.keys(), "they are trained"
        outputs = [name for name in new if after.params[name].count_nonzero()]
        assert outputs == list(new), "an identity layer's zeros have moved"
    assert not any(torch.equal(third.params[name], tensor) for name, tensor in together.params.items())
