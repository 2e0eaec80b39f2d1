"""Banks as parts of a model: two models of one ancestor side by side, and the newer banks left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from growkit.checkpoint import store
from growkit.errors import ConfigError
from growkit.growth.banks import first_banks, merge, merge_record
from growkit.growth.engine import grow
from growkit.growth.logits import stream_logits
from growkit.growth.operator import EXACT_FLOAT64
from growkit.growth.path import grown_config
from growkit.growth.state import TrainState
from growkit.models.config import PattentionMLP
from tests.support import cli, model_config, probe, recipe_dict, records, trained_like, write_recipe


def grown(ancestor: TrainState, seed: int, *, attention: int, mlp: int, moved: float = 0.0) -> TrainState:
    """``ancestor`` with banks that have learned something, and all it had moved by ``moved``."""
    target = grown_config(ancestor.config, {"attention_tokens": attention, "mlp_tokens": mlp}, {})
    state, _ = grow(ancestor, target, {}, torch.Generator().manual_seed(seed), stage=1)
    draw = torch.Generator().manual_seed(seed)
    params = {
        name: t + (moved if name in ancestor.params else 0.3) * torch.randn(t.shape, generator=draw, dtype=t.dtype)
        for name, t in state.params.items()
    }
    return dataclasses.replace(state, params=params)


def logits(state: TrainState) -> Tensor:
    return stream_logits(state.config, state.params, probe(state.config)[:, :-1], torch.float64)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_banks_of_both_stand_beside_the_ancestors() -> None:
    ancestor = trained_like(model_config("tokenformer"))
    a = grown(ancestor, 1, attention=13, mlp=20)
    b = grown(ancestor, 2, attention=10, mlp=17)  # nothing in the attention
    merged = merge(a, b, ancestor).materialized()
    mlp, mixer = merged.config.layers[0].mlp, merged.config.layers[0].mixer
    assert isinstance(mlp, PattentionMLP) and mlp.projection.banks == (14, 6, 3)
    assert mixer.q.kind == "pattention" and mixer.q.banks == (10, 3)
    assert set(merged.params) == set(merged.moments) | {n for n in merged.params if n.endswith((".1", ".2"))}
    assert torch.equal(merged.params["layers.1.mlp.tokens.values.2"], b.params["layers.1.mlp.tokens.values.1"])
    assert torch.equal(merged.params["layers.1.mlp.tokens.values.1"], a.params["layers.1.mlp.tokens.values.1"])
    assert merged.born["layers.0.mlp.tokens.keys.2"] == 1

    # What it computes: a's without b's banks, b's without a's, and more than either with both.
    silent = {n: torch.zeros_like(t) if n.endswith("mlp.tokens.values.2") else t for n, t in merged.params.items()}
    assert distance(logits(dataclasses.replace(merged, params=silent)), logits(a)) <= EXACT_FLOAT64
    assert min(distance(logits(merged), logits(one)) for one in (a, b, ancestor)) > 0.01
    record = merge_record(a, merged, probe(a.config))
    assert record["links"][0]["delta_logits_float64"] == pytest.approx(distance(logits(merged), logits(a)), rel=1e-6)
    assert record["parameters_after"] == merged.config.num_params() and not record["certificate"]["exact"]


def test_what_both_moved_is_moved_by_both() -> None:
    ancestor = trained_like(model_config("tokenformer"))
    a = grown(ancestor, 1, attention=13, mlp=20, moved=0.1)
    b = grown(ancestor, 2, attention=13, mlp=20, moved=0.1)
    merged = merge(a, b, ancestor).materialized()
    for name, base in ancestor.params.items():
        assert torch.allclose(merged.params[name], a.params[name] + b.params[name] - base, rtol=1e-12)
        assert name not in merged.moments, "moments of a weight that is nobody's now"
    alone = merge(a, ancestor, ancestor).materialized()
    assert alone.config == a.config
    assert distance(logits(alone), logits(a)) <= EXACT_FLOAT64


def test_the_first_banks_are_the_old_model() -> None:
    ancestor = trained_like(model_config("tokenformer"))
    a = grown(ancestor, 1, attention=13, mlp=20)
    config, params = first_banks(a.config, a.params, 1)
    assert config == ancestor.config
    assert all(torch.equal(params[name], t) for name, t in ancestor.params.items())
    assert first_banks(a.config, a.params, 9)[0] == a.config


@pytest.mark.parametrize("preset", ["transformer", "tokenformer"])
def test_what_has_no_banks_cannot_leave_any_out(preset: str) -> None:
    config = model_config(preset, **({"token_norm": "shared"} if preset == "tokenformer" else {}))
    if preset == "tokenformer":
        config = grown_config(config, {"mlp_tokens": 20}, {})
    with pytest.raises(ConfigError, match=r"--banks.*no-banks"):
        first_banks(config, trained_like(config).params, 1)


def test_other_growth_is_not_merged() -> None:
    ancestor = trained_like(model_config("tokenformer"))
    a = grown(ancestor, 1, attention=13, mlp=20)
    deeper, _ = grow(ancestor, grown_config(ancestor.config, {"num_layers": 3}, {}), {}, torch.Generator())
    for pair in ((a, deeper), (deeper, a)):
        with pytest.raises(ConfigError, match=r"--ancestor.*cannot-merge"):
            merge(*pair, ancestor)


def test_train_on_one_text_grow_on_two_others_and_merge(tmp_path: Path) -> None:
    """The commands: extend with everything old frozen, eval with the old banks alone, merge."""
    recipe = recipe_dict(tmp_path)
    recipe["stages"] = recipe["stages"][:1]
    assert cli("train", write_recipe(tmp_path, recipe), "run.name=base")[0] == 0
    base = tmp_path / "runs" / "base"
    more = tmp_path / "more.yaml"
    more.write_text(
        "stages:\n"
        "  - {name: more, duration: 4 steps, grow: {attention_tokens: 12, mlp_tokens: 16}, freeze: [old], lr: 0.05}\n"
    )
    for number in (1, 2):
        text = tmp_path / f"{number}.txt"
        text.write_text("".join(f"{i * number} {'xyz'[i % 3] * (i % 7 + number)}\n" for i in range(3000)))
        code, _, err = cli("extend", base, more, f"run.name=on-{number}", f"data.source={text}")
        assert code == 0, err
    one, two = (tmp_path / "runs" / f"on-{number}" for number in (1, 2))
    words = ("eval", "--data", tmp_path / "corpus.txt", "--context", 16, "--tokens", 512, "--json")

    def loss(run: Path, *more: object) -> float:
        code, out, err = cli(*words, run, *more)
        assert code == 0, err
        return float(json.loads(out)["loss"])

    assert loss(one, "--banks", 1) == loss(base), "nothing is forgotten where the old banks were frozen"
    assert loss(one) != loss(base)

    both = tmp_path / "both"
    code, out, err = cli("merge", one, two, "--ancestor", base, "-o", both, "--data", tmp_path / "corpus.txt")
    assert code == 0, err
    assert "merge (side by side)" in out and "not exact" in out
    merged = store.read(both)
    assert merged.manifest.progress.tokens == sum(
        sign * store.read(run / "checkpoints" / f"step-{step:08d}").manifest.progress.tokens
        for run, step, sign in ((one, 10, 1), (two, 10, 1), (base, 6, -1))
    )
    assert merged.manifest.lineage[-1]["merged"]["lineage"][-1]["name"] == "more"
    assert cli("inspect", both)[0] == 0
    assert loss(both, "--banks", 1) == loss(base)
    code, _, err = cli("extend", both, more, "run.name=together", "stages.0.grow={mlp_tokens: 30}")
    assert code == 0, err
    assert records(tmp_path / "runs" / "together", "growth")[-1]["certificate"]["exact"]

    code, _, err = cli("merge", one, two, "--ancestor", both, "-o", tmp_path / "no")
    assert code == 2 and "cannot-merge" in err and not (tmp_path / "no").exists()
