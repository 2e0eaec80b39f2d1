"""What a recipe means in numbers: durations, learning rates, what stages inherit, optimizer groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from growkit.config.load import parse_recipe, to_yaml
from growkit.config.recipe import Recipe
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.growth.path import grown_config
from growkit.models.presets import PRESETS
from growkit.models.spec import param_specs
from growkit.optim.groups import check_selector, frozen_names, param_groups
from growkit.schedule.lr import LRSchedule, warmup_factor
from growkit.schedule.plan import growth_schedule, settled
from growkit.schedule.stage import GrowthSchedule
from tests.support import model_config, recipe_dict

ROUNDING = 1e-12  # relative: a few operations on floats

# Durations.


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("20M tokens", 20e6, "tokens"),
        ("1 token", 1, "tokens"),
        ("500 steps", 500, "steps"),
        ("  1.5k   steps ", 1500, "steps"),
        ("1step", 1, "steps"),
        ("16.1k tokens", 16100, "tokens"),  # 16.1 · 1000 is 16100.000000000002
        ("2.01M tokens", 2_010_000, "tokens"),
        ("3e15 flops", 3e15, "flops"),
        ("2.5P flops", 2.5e15, "flops"),
        (".5 flops", 0.5, "flops"),
        ("1G tokens", 1e9, "tokens"),
        ("1B tokens", 1e9, "tokens"),
        ("1T tokens", 1e12, "tokens"),
        ("2%", 0.02, "share"),
        ("100 %", 1.0, "share"),
    ],
)
def test_durations(text: str, amount: float, unit: str) -> None:
    assert Duration.parse(text, key="k", share=True) == Duration(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        *("", "20", "20M", "tokens", "-1 steps", "1.5 steps", "0.5 tokens", "1.0000000001G tokens", "3 hours"),
        *("1e400 flops", "1e19 tokens", "1 2 steps", "5 m tokens", "2k%", "101%", "nan steps", "inf flops"),
        *(20, None, 2.0, ["1 steps"]),
    ],
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Duration.parse(text, key="stages.0.duration", share=True)
    assert (caught.value.code, caught.value.key, caught.value.value) == ("bad-duration", "stages.0.duration", text)
    assert caught.value.mend


def test_a_share_only_where_there_is_a_whole() -> None:
    with pytest.raises(ConfigError, match="a share is not allowed here"):
        Duration.parse("2%", key="k")


@given(
    st.builds("{} {}".format, st.integers(0, 10**15), st.sampled_from(["tokens", "steps"]))
    | st.builds("{} flops".format, st.floats(0, 1e30))
    | st.builds("{}%".format, st.integers(0, 10**6).map(lambda n: n / 10**4))
)
def test_a_duration_is_its_own_text(text: str) -> None:
    duration = Duration.parse(text, key="k", share=True)
    assert Duration.parse(str(duration), key="k", share=True) == duration


@given(st.integers(1, 10**6), st.integers(0, 6), st.sampled_from([("k", 3), ("M", 6), ("G", 9), ("T", 12)]))
def test_decimals_of_a_unit_are_exact(digits: int, point: int, scale: tuple[str, int]) -> None:
    """``2.01k tokens`` is 2010 tokens: its digits decide whether an amount is whole, not a binary fraction."""
    whole, part = divmod(digits, 10**point)
    text = f"{whole}.{part:0{point}d}{scale[0]} tokens" if point else f"{whole}{scale[0]} tokens"
    exact, rest = divmod(digits * 10 ** scale[1], 10**point)
    if rest:
        with pytest.raises(ConfigError):
            Duration.parse(text, key="k")
    else:
        assert Duration.parse(text, key="k").amount == exact


def test_steps_of_a_duration() -> None:
    size = {"tokens_per_step": 1000, "flops_per_step": 1e6}
    assert [Duration(n, "tokens").steps(**size) for n in (0, 1, 1000, 1001)] == [0, 1, 1, 2]
    assert [Duration(n, "flops").steps(**size) for n in (0.4e6, 0.6e6, 7.4e6)] == [0, 1, 7]
    assert Duration(7, "steps").steps(**size) == 7
    assert Duration(0.02, "share").steps(**size, whole=124) == 2


# Learning rates.

spans = st.tuples(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
rates = st.floats(1e-4, 1.0)


@given(st.sampled_from(["wsd", "cosine", "constant"]), st.floats(0, 1), rates, st.floats(0, 1), spans)
def test_learning_rates(kind: str, start: float, peak: float, ratio: float, span: tuple[int, int, int]) -> None:
    steps, warmup, decay = span
    assume(warmup + decay <= steps)
    schedule = LRSchedule(kind, start, peak, peak * ratio, steps, warmup, decay if kind == "wsd" else 0)
    rate = [schedule.lr(step) for step in range(steps)]
    assert schedule.last == rate[-1]
    low, high = min(start, peak * ratio), max(start, peak)
    assert all(low * (1 - ROUNDING) <= lr <= high * (1 + ROUNDING) for lr in rate)
    # Warm-up: equal strides from the rate before the stage, which is not repeated, to the peak.
    for before, after in itertools.pairwise([start, *rate[:warmup]]):
        assert math.isclose(after - before, (peak - start) / warmup, rel_tol=1e-6, abs_tol=ROUNDING)
    if warmup:
        assert math.isclose(rate[warmup - 1], peak, abs_tol=ROUNDING)
    rest = rate[warmup:]
    assert all(after <= before * (1 + ROUNDING) for before, after in itertools.pairwise(rest)), "it rises again"
    if kind == "constant":
        assert set(rest) <= {peak}
    elif kind == "cosine" and rest:
        assert math.isclose(rest[-1], peak * ratio, rel_tol=ROUNDING, abs_tol=ROUNDING * peak)
        middle = schedule.lr(warmup + (len(rest) - 1) // 2)
        if len(rest) % 2 == 0:  # as far above the middle at one step as below at its mirror image
            assert math.isclose(middle, peak * (1 + ratio) / 2, rel_tol=1e-9)
    elif kind == "wsd":
        assert set(rest[: len(rest) - decay]) <= {peak}
        # The fall is a straight line that meets the final rate one step after the last: no step is spent at rate 0.
        for before, after in itertools.pairwise([peak, *rest[len(rest) - decay :], peak * ratio] if decay else []):
            assert math.isclose(before - after, peak * (1 - ratio) / (decay + 1), rel_tol=1e-6, abs_tol=ROUNDING)


def test_learning_rates_by_hand() -> None:
    wsd = LRSchedule("wsd", 0.0, 1.0, 0.1, 10, 2, 4)
    assert [wsd.lr(i) for i in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28], rel=ROUNDING)
    cosine = LRSchedule("cosine", 0.5, 1.0, 0.0, 6, 2, 0)
    root = math.sqrt(0.5) / 2
    assert [cosine.lr(i) for i in range(6)] == pytest.approx([0.75, 1, 0.5 + root, 0.5, 0.5 - root, 0], abs=ROUNDING)
    assert [LRSchedule("constant", 0.0, 2.0, 0.0, 3, 0, 0).lr(i) for i in range(3)] == [2, 2, 2]
    assert [warmup_factor(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup_factor(0, 0) == 1


# From recipe to schedule.


def recipe(folder: Path, *overrides: str, stages: list[dict[str, Any]] | None = None) -> Recipe:
    raw = recipe_dict(folder)
    if stages is not None:
        raw["stages"] = [raw["stages"][0] | stages[0], *stages[1:]]
    return parse_recipe(yaml.safe_dump(raw), overrides, PRESETS, name="test")


def schedule(folder: Path, *overrides: str, stages: list[dict[str, Any]] | None = None) -> GrowthSchedule:
    return growth_schedule(recipe(folder, *overrides, stages=stages))


def test_what_stages_inherit(tmp_path: Path) -> None:
    """Context, batch and peak rate; not the micro-batch, the growth, the shape of the rate, or who is frozen."""
    first = {
        "context_length": 8,
        "global_batch_tokens": 64,
        "micro_batch_size": 2,
        "lr": 5e-4,
        "schedule": "cosine",
        "min_lr_ratio": 0.1,
        "warmup": "2 steps",
        "new_warmup": "3 steps",
        "freeze": ["embedding"],
        "lr_scale": {"norm": 0.5},
        "validate_every": "2 steps",
    }
    plain = {"name": "second", "duration": "6 steps"}
    other = {"name": "third", "duration": "6 steps", "context_length": 16, "lr": 1e-4, "grow": {"mlp_tokens": 9}}
    a, b, c, d = schedule(tmp_path, stages=[first, plain, other, plain | {"name": "fourth"}]).stages
    assert [s.context_length for s in (a, b, c, d)] == [8, 8, 16, 16]
    assert [s.global_batch_tokens for s in (a, b, c, d)] == [64] * 4
    assert [s.lr.peak for s in (a, b, c, d)] == [5e-4, 5e-4, 1e-4, 1e-4]
    assert [(s.micro_batch_size, s.accumulate) for s in (a, b, c, d)] == [(2, 4), (8, 1), (4, 1), (4, 1)]
    assert [s.lr.kind for s in (a, b, c, d)] == ["cosine", "wsd", "wsd", "wsd"]
    assert [s.lr.final for s in (a, b, c, d)] == [5e-5, 0, 0, 0]
    assert [(s.freeze, s.lr_scale, s.new_warmup_steps, s.validate_every) for s in (a, b)] == [
        (("embedding",), {"norm": 0.5}, 3, 2),
        ((), {}, 0, None),
    ]
    assert a.model == b.model != c.model == d.model
    both = schedule(tmp_path, "optim.lr_scale={norm: 3.0, keys: 2.0}", stages=[first, plain])
    assert [s.lr_scale for s in both.stages] == [{"norm": 1.5, "keys": 2.0}, {"norm": 3.0, "keys": 2.0}]
    assert [len(s.links) for s in (a, b, c, d)] == [0, 0, 1, 0]
    assert [s.index for s in (a, b, c, d)] == [0, 1, 2, 3]


def test_defaults_of_warm_up_and_decay(tmp_path: Path) -> None:
    """2 % at the start of a run, 20 % at its end, nothing at the borders between."""
    names = [{"name": name, "duration": "200 steps"} for name in ("a", "b", "c")]
    spans = [(s.lr.warmup_steps, s.lr.decay_steps) for s in schedule(tmp_path, stages=names).stages]
    assert spans == [(4, 0), (0, 0), (0, 40)]
    assert [(s.lr.warmup_steps, s.lr.decay_steps) for s in schedule(tmp_path, stages=names[:1]).stages] == [(4, 40)]
    cosine = schedule(tmp_path, stages=[names[0] | {"schedule": "cosine"}]).stages[0]
    assert (cosine.lr.warmup_steps, cosine.lr.decay_steps) == (4, 0)
    assert schedule(tmp_path, "optim.lr=0.25", stages=names).stages[0].lr.peak == 0.25


def test_rates_go_on_over_stage_borders(tmp_path: Path) -> None:
    """A warm-up starts from the last rate, whatever shape it had."""
    kinds = [
        {"schedule": "cosine", "min_lr_ratio": 0.2},
        {"warmup": "10 steps", "decay": "30%", "min_lr_ratio": 0.5},
        {"warmup": "5 steps", "lr": 1e-4},
    ]
    stages = [{"name": f"s{i}", "duration": "50 steps", **kind} for i, kind in enumerate(kinds)]
    plan = schedule(tmp_path, stages=stages)
    assert plan.stages[0].lr.start == 0
    for before, after in itertools.pairwise(plan.stages):
        assert after.lr.start == before.lr.last > 0
        stride = (after.lr.peak - before.lr.last) / after.lr.warmup_steps
        assert math.isclose(after.lr.lr(0), before.lr.last + stride, rel_tol=ROUNDING)


def test_sums_and_sizes(tmp_path: Path) -> None:
    plan = schedule(tmp_path)
    assert [s.steps for s in plan.stages] == [6, 6, 6]
    assert plan.tokens == 18 * 128 and plan.max_context_length == plan.block_tokens == 32 and plan.save_every == 4
    assert [s.accumulate for s in plan.stages] == [2, 1, 2]
    flops = sum(6 * 128 * s.model.flops_per_token(s.context_length) for s in plan.stages)
    assert math.isclose(plan.flops, flops, rel_tol=ROUNDING)
    assert schedule(tmp_path, "data.block_tokens=7").block_tokens == 7
    per_step = plan.stages[0].flops_per_step
    for duration, steps in (("129 tokens", 2), ("128 tokens", 1), (f"{per_step * 3.4} flops", 3), ("7 steps", 7)):
        assert schedule(tmp_path, f"stages.0.duration={duration}").stages[0].steps == steps


_stage = st.fixed_dictionaries(
    {"duration": st.sampled_from(["20 steps", "5k tokens", "41 steps"])},
    optional={
        "context_length": st.sampled_from([8, 16, 32]),
        "global_batch_tokens": st.sampled_from([64, 128]),
        "lr": st.floats(1e-5, 1e-2),
        "schedule": st.sampled_from(["wsd", "cosine", "constant"]),
        "warmup": st.sampled_from(["0%", "12%", "3 steps", "130 tokens"]),
        "decay": st.sampled_from(["0%", "33%", "4 steps"]),
        "min_lr_ratio": st.sampled_from([0.0, 0.1]),
        "new_warmup": st.sampled_from(["10%", "2 steps"]),
        "freeze": st.lists(st.sampled_from(["old_banks", "embedding", "layer:0"]), max_size=2),
        "lr_scale": st.dictionaries(st.sampled_from(["new", "keys", "bank:1"]), st.floats(0, 4), max_size=2),
        "validate_every": st.sampled_from(["50%", "5 steps"]),
    },
)


@settings(max_examples=20)
@given(st.lists(_stage, min_size=1, max_size=4))
def test_a_settled_recipe_means_the_same(
    tmp_path_factory: pytest.TempPathFactory, stages: list[dict[str, Any]]
) -> None:
    """What is saved with a run, written and read, gives the same schedule; settling it again changes nothing."""
    grow: list[dict[str, Any]] = [{}, {"mlp_tokens": 12}, {"num_layers": 2}, {"attention_tokens": 20, "embed_dim": 24}]
    raw = [{"name": f"s{i}", "grow": grow[i], **stage} for i, stage in enumerate(stages)]
    raw[0] = {"micro_batch_size": None} | raw[0]
    given_recipe = recipe(tmp_path_factory.getbasetemp(), stages=raw)
    plan = growth_schedule(given_recipe)
    written = settled(given_recipe, plan)
    back = parse_recipe(to_yaml(written), [], PRESETS, name="saved")
    assert back == written
    assert growth_schedule(back) == plan
    assert settled(back, growth_schedule(back)) == written
    for stage in back.stages:
        settled_ones = ("context_length", "global_batch_tokens", "micro_batch_size", "lr", "warmup", "decay")
        assert all(getattr(stage, name) is not None for name in settled_ones)


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("stages.0.grow={num_layers: 2}", "grow-at-start", "stages.0.grow"),
        ("stages.1.grow={mlp_tokens: 4}", "shrinking-target", "stages.1.grow.mlp_tokens"),
        ("stages.1.name=first", "duplicate-name", "stages"),
        ("stages.0.context_length=24", "batch-not-whole", "stages.0.global_batch_tokens"),
        ("stages.0.micro_batch_size=3", "batch-not-whole", "stages.0.micro_batch_size"),
        ("stages.0.context_length=null", "missing-key", "stages.0.context_length"),
        ("stages.1.duration=0 steps", "empty-stage", "stages.1.duration"),
        ("stages.1.warmup=7 steps", "lr-too-long", "stages.1.warmup"),
        ("stages.1.schedule=linear", "unknown-choice", "stages.1.schedule"),
        ("stages.1.freeze=[banks]", "bad-selector", "stages.1.freeze"),
        ("stages.1.freeze=['attention.gate']", "selects-nothing", "stages.1.freeze"),
        ("stages.0.freeze=[new]", "selects-nothing", "stages.0.freeze"),
        ("stages.1.lr_scale={'mlp.down': 2}", "selects-nothing", "stages.1.lr_scale"),
        ("optim.lr_scale={'mlp.down': 2}", "selects-nothing", "optim.lr_scale"),
        ("optim.lr_scale={old_entries: 2}", "bad-selector", "optim.lr_scale"),
        ("stages.0.freeze=[old]", "all-frozen", "stages.0.freeze"),
        ("stages.0.freeze=[old_entries]", "all-frozen", "stages.0.freeze"),
        ("stages.1.lr_scale={new: -1}", "too-small", "stages.1.lr_scale.new"),
        ("optim.lr_scale={old: -1}", "too-small", "optim.lr_scale.old"),
        ("optim.lr_scale={heart: 2}", "bad-selector", "optim.lr_scale"),
        ("stages=[]", "no-stages", "stages"),
        ("trainer.save_every=1k tokens", "bad-duration", "trainer.save_every"),
    ],
)
def test_what_no_schedule_can_do(override: str, code: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule(tmp_path, override)
    assert (caught.value.code, caught.value.key) == (code, key)


# Optimizer groups.

OLD = model_config("tokenformer", norm="layernorm", tied_head=False)
NEW = grown_config(OLD, {"mlp_tokens": 20, "num_layers": 3}, {})
SPECS = param_specs(NEW)
BORN = {name: 2 for name in SPECS if name not in param_specs(OLD)}
SELECTORS = [
    *("embedding", "head", "attention", "mlp", "norm", "keys", "values", "old", "new", "old_banks", "old_layers"),
    *("bank:0", "bank:1", "layer:0", "layer:2", "layer:9", "attention.q", "mlp.tokens.keys"),
]


def groups(stage: int = 2, **options: Any) -> list[Any]:
    defaults = {"weight_decay": 0.1, "decay_embedding": False, "lr_scale": {}}
    return param_groups(SPECS, BORN, stage, **(defaults | options))


@given(
    st.integers(0, 3),
    st.booleans(),
    st.dictionaries(st.sampled_from(SELECTORS), st.sampled_from([0.0, 0.5, 2.0]), max_size=4),
)
def test_every_parameter_is_in_one_group(stage: int, decay_embedding: bool, lr_scale: dict[str, float]) -> None:
    """With its own decay, the product of the scales that select it, and its age."""
    found = groups(stage, decay_embedding=decay_embedding, lr_scale=lr_scale)
    members = [name for group in found for name in group.names]
    assert sorted(members) == sorted(SPECS)
    assert len({(g.weight_decay, g.lr_scale, g.new) for g in found}) == len(found)
    selecting = {selector: frozen_names(SPECS, BORN, stage, [selector]) for selector in lr_scale}
    for group in found:
        for name in group.names:
            assert group.lr_scale == math.prod(f for selector, f in lr_scale.items() if name in selecting[selector])
            assert group.new == (stage == 2 and name in BORN)
            role = SPECS[name].role
            decayed = role in ("weight", "keys", "values") or (decay_embedding and role in ("embedding", "head"))
            assert group.weight_decay == (0.1 if decayed else 0.0)


def test_no_decay_on_norms_biases_and_embeddings() -> None:
    tables = {"embedding.weight", "head.weight"}
    still = {name for group in groups() if group.weight_decay == 0 for name in group.names}
    assert still == {name for name in SPECS if name.endswith((".gain", ".bias"))} | tables
    assert len(groups(0)) == 2 and len(groups(2)) == 4
    embedding = {n for g in groups(decay_embedding=True) if g.weight_decay for n in g.names} - set(_decayed(groups()))
    assert embedding == tables


def _decayed(found: Iterable[Any]) -> list[str]:
    return [name for group in found if group.weight_decay for name in group.names]


def test_who_is_frozen() -> None:
    """By name, on a model that gained a bank of MLP tokens and a layer in stage 2."""
    inserted = ({layer.id for layer in NEW.layers} - {layer.id for layer in OLD.layers}).pop()
    expected = {
        "embedding": lambda n: n == "embedding.weight",
        "head": lambda n: n == "head.weight",
        "attention": lambda n: ".attention." in n,
        "mlp": lambda n: ".mlp." in n,
        "norm": lambda n: "norm." in n,
        "keys": lambda n: ".keys." in n,
        "values": lambda n: ".values." in n,
        "bank:0": lambda n: n.endswith((".keys.0", ".values.0")),
        "bank:1": lambda n: n.endswith((".keys.1", ".values.1")),
        "layer:0": lambda n: n.startswith("layers.0."),
        "layer:9": lambda _: False,
        "attention.q": lambda n: ".attention.q." in n,
        "attention.q.keys": lambda n: ".attention.q.keys." in n,
        "attention.q.values.0": lambda n: n.endswith(".attention.q.values.0"),
        "mlp.tok": lambda _: False,
        "old_layers": lambda n: (
            n.startswith(("layers.0.", "layers.1."))
            and not n.startswith(f"layers.{inserted}.")
            and not n.endswith((".keys.1", ".values.1"))
        ),
        "new": lambda n: n.startswith(f"layers.{inserted}.") or n.endswith((".keys.1", ".values.1")),
        "old": lambda n: not (n.startswith(f"layers.{inserted}.") or n.endswith((".keys.1", ".values.1"))),
        "old_banks": lambda n: n.endswith((".keys.0", ".values.0")) and not n.startswith(f"layers.{inserted}."),
    }
    for selector, rule in expected.items():
        assert frozen_names(SPECS, BORN, 2, [selector]) == {name for name in SPECS if rule(name)}, selector
        assert check_selector(selector, "k") == selector
    assert check_selector("mamba.A_log", "k") == "mamba.A_log"
    assert frozen_names(SPECS, BORN, 2, ["old", "new"]) == set(SPECS)
    assert frozen_names(SPECS, BORN, 2, []) == set()
    assert frozen_names(SPECS, BORN, 2, ["old_entries"]) == set(SPECS) - set(BORN)
    enlarged = frozenset({"embedding.weight", "head.weight"})
    assert frozen_names(SPECS, BORN, 2, ["old_entries"], enlarged) == set(SPECS) - set(BORN) - enlarged
    assert frozen_names(SPECS, BORN, 2, ["old_entries", "head"], enlarged) == set(SPECS) - set(BORN) - {
        "embedding.weight"
    }
    assert frozen_names(SPECS, BORN, 3, ["new"]) == set(), "a stage later they are old"
    assert frozen_names(SPECS, {}, 0, ["new"]) == set() and frozen_names(SPECS, {}, 0, ["old"]) == set(SPECS)


@pytest.mark.parametrize(
    "selector",
    ["", "bank", "bank:", "bank:x", "bank:-1", "layer:1.0", "OLD", "weights", "new:1", "a.", ".a", "a..b", "A.b"],
)
def test_what_selects_nothing_known(selector: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.1\.freeze.*bad-selector"):
        check_selector(selector, "stages.1.freeze")
