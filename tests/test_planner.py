"""Plans: counts against built models, costs by hand, hardware, the picture, the command; test_planner_memory has the
rest."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growkit.cli.recipes import read
from growkit.config.recipe import HardwareConfig, TrainerConfig
from growkit.models.config import STREAM_ORDERS
from growkit.models.decoder import DecoderLM
from growkit.models.presets import PRESETS
from growkit.planner.hardware import HARDWARE, THIS_MACHINE, Hardware, hardware, keep, this_machine
from growkit.planner.plan import COMPONENTS, parameters, plan, to_json
from growkit.report.schedule_picture import draw_schedule, points, schedule_lines
from growkit.train import measure
from scripts.bench_plan import RECIPES as LARGE
from tests.recipes import RECIPES
from tests.support import cli, recipe_dict, write_recipe

SIMPLE = Hardware("simple", {"fp32": 1e12}, {"fp32": 0.5}, 1e12, 3.6, 100.0, "a test", automatic="fp32")
ROUNDING = 1e-12  # relative: the same few products in another order


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def by_name(model: DecoderLM) -> dict[str, int]:
    """Parameters by component, told from the module tree's names alone."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        part = next(
            p
            for p in ("norm", "attention", "mamba", "mlp", "embedding", "head", "stream")
            if p in name.replace("_norm.", ".norm.")
        )
        counts[part] += parameter.numel()
    return counts


def stages() -> list[Any]:
    models = [(f"recipe {name}, {stage.name}", stage.model) for name in RECIPES for stage in read(name, [])[1].stages]
    models += [(f"preset {name}", kind().written_out()) for name, kind in PRESETS.items()]
    odd = {"qk_norm": True, "num_kv_heads": 2, "tied_head": False, "norm": "layernorm", "vocab_size": 300}
    models += [(f"preset {name}, odd", kind(**odd).written_out()) for name, kind in PRESETS.items()]
    experts = {"num_experts": 5, "experts_per_token": 3, "mlp": "gelu", "mlp_dim": 33}
    models += [("experts", PRESETS.get("transformer", key="")(**experts).written_out())]
    for order in STREAM_ORDERS:
        stream = {"altup_blocks": 3, "altup_order": order, "altup_variant": "full"}
        models += [(f"blocks, {order}", PRESETS.get("tokenformer", key="")(**stream).written_out())]
        if order in ("gemma", "paper"):
            stream |= {"altup_coefficients": "routed", "altup_variant": "recycled"}
            models += [(f"blocks, {order}, routed", PRESETS.get("transformer", key="")(**stream).written_out())]
    return [pytest.param(model, id=name) for name, model in models]


@pytest.mark.parametrize("model", stages())
def test_parameters_and_flops_are_those_of_the_built_model(model: Any) -> None:
    """The counter sees attention only as the math backend's products, and of Mamba's scans and taps nothing."""
    with torch.device("meta"):
        assert parameters(model) == by_name(DecoderLM(model))
    built, tokens = DecoderLM(model), torch.zeros(1, 64, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        built(tokens, tokens).total.backward()
    unseen = 3 * model.scan_flops_per_token()
    assert counter.get_total_flops() == 64 * (model.flops_per_token(64) - unseen)


def test_what_the_flop_counter_does_not_see() -> None:
    """As docs/plan.md says: fused attention on a CPU counts as nothing."""
    model = PRESETS.get("transformer", key="")(num_layers=2).written_out()
    built, tokens = DecoderLM(model), torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(tokens)
    attention = 4 * 64 * sum(layer.mixer.num_heads * layer.mixer.head_dim for layer in model.layers)
    assert counter.get_total_flops() == 64 * (model.forward_flops_per_token(64) - attention)


def test_costs_by_hand(tmp_path: Path) -> None:
    """5e11 FLOP/s at 3.6 dollars an hour and 100 watts, on two devices, which halve the time and nothing else."""
    recipe, schedule = read(str(write_recipe(tmp_path)), [])
    one = plan(recipe, schedule, SIMPLE)
    seconds = schedule.flops / 5e11
    assert one.total.seconds == pytest.approx(seconds, rel=ROUNDING)
    assert one.total.dollars == pytest.approx(seconds / 1000, rel=ROUNDING)
    assert one.total.joules == pytest.approx(100 * seconds, rel=ROUNDING)
    assert one.tokens_per_joule == pytest.approx(schedule.tokens / (100 * seconds), rel=ROUNDING)
    assert one.tokens_per_dollar == pytest.approx(schedule.tokens / (seconds / 1000), rel=ROUNDING)
    parts = [stage.cost for stage in one.stages]
    for name in ("seconds", "dollars", "joules"):
        total = sum(getattr(part, name) for part in parts)
        assert total == pytest.approx(getattr(one.total, name), rel=ROUNDING)
    twice = dataclasses.replace(recipe, trainer=dataclasses.replace(recipe.trainer, devices=2, strategy="ddp"))
    two = plan(twice, schedule, SIMPLE)
    assert two.total.seconds == pytest.approx(seconds / 2, rel=ROUNDING)
    assert (two.total.dollars, two.total.joules) == pytest.approx((one.total.dollars, one.total.joules), rel=ROUNDING)


def test_measured_steps_cost_what_they_took(tmp_path: Path) -> None:
    """Each stage its own time, not its share of the FLOPs."""
    recipe, schedule = read(str(write_recipe(tmp_path)), [])
    made = plan(recipe, schedule, HARDWARE.get("l4", key="test"), step_seconds=(0.5, 0.1, 0.2))
    assert [stage.cost.seconds for stage in made.stages] == pytest.approx([6 * 0.5, 6 * 0.1, 6 * 0.2])
    assert made.total.seconds == pytest.approx(6 * 0.8)


def test_the_same_budget_from_scratch(tmp_path: Path) -> None:
    recipe, schedule = read(str(write_recipe(tmp_path)), [])
    made, last = plan(recipe, schedule, None), schedule.last
    assert made.total.seconds is None and made.fits is None
    steps = made.final_model.steps
    assert steps is not None and steps * last.flops_per_step <= schedule.flops < (steps + 1) * last.flops_per_step
    assert made.final_model.tokens == steps * last.global_batch_tokens
    best = made.compute_optimal
    assert best.tokens == 20 * best.parameters
    assert 6 * best.parameters * best.tokens == pytest.approx(schedule.flops, rel=ROUNDING)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, out, _ = cli("plan", path, "--hardware", "l4")
    assert code == 0 and "does not fit" not in out
    code, out, _ = cli("plan", path, "--hardware", "l4", "hardware.memory_gb=0.0001")
    assert code == 0 and "does not fit: a device has 0GB" in out and "deeper" in out


def test_devices_share_what_fsdp_shards(tmp_path: Path) -> None:
    whole, shared = (
        plan(*read(str(write_recipe(tmp_path)), trainer), SIMPLE).stages[-1].memory
        for trainer in (
            ["trainer.devices=2", "trainer.strategy=ddp", "stages.2.micro_batch_size=1"],
            ["trainer.devices=2", "trainer.strategy=fsdp", "stages.2.micro_batch_size=1"],
        )
    )
    for part in ("weights", "gradients", "moments"):
        assert getattr(shared, part) == getattr(whole, part) / 2


def test_frozen_parameters_have_no_gradients(tmp_path: Path) -> None:
    recipe, schedule = read(str(write_recipe(tmp_path)), ["stages.1.freeze=[old]"])
    first, second, third = (stage.memory for stage in plan(recipe, schedule, None).stages)
    old, new = (schedule.stages[i].model.num_params() for i in (0, 1))
    assert first.gradients == 4 * old and second.gradients == 4 * (new - old) < second.weights == 4 * new
    assert second.moments == 8 * new, "the frozen ones' moments wait"
    assert third.gradients == third.weights


@pytest.mark.parametrize("name", list(HARDWARE))
def test_presets_are_complete(name: str) -> None:
    preset = HARDWARE.get(name, key="")
    assert preset.source and preset.memory_bytes and preset.price_per_hour and preset.watts
    assert preset.peaks.keys() <= {"bf16", "fp32"} and preset.automatic in preset.peaks
    assert 1e12 < preset.peaks["fp32"] < preset.peaks.get("bf16", 1e18) and preset.cuda


def test_the_recipes_figures_stand_in_the_place_of_the_presets() -> None:
    said = HardwareConfig("l4", peak_flops_per_second=1e12, utilisation=0.3, memory_gb=2, price_per_hour=1, watts=10)
    made = hardware(said)
    assert made is not None
    assert made.flops_per_second("bf16") == made.flops_per_second("fp32") == pytest.approx(3e11)
    assert (made.memory_bytes, made.price_per_hour, made.watts) == (2e9, 1, 10)
    alone = hardware(HardwareConfig(peak_flops_per_second=1e12))
    assert alone is not None and alone.memory_bytes is None and alone.flops_per_second("bf16") == pytest.approx(4e11)
    assert hardware(HardwareConfig()) is None
    assert hardware(HardwareConfig("l4"), "t4") == hardware(HardwareConfig("t4"))
    t4 = HARDWARE.get("t4", key="")
    assert t4.precision(TrainerConfig()) == "fp32" and t4.precision(TrainerConfig(precision="bf16")) == "bf16"


def test_a_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--measure`` times the recipe's stages; later plans use it; another precision is added to it."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    path = write_recipe(tmp_path)
    assert this_machine() is None
    code, out, err = cli("plan", path, "--measure")
    assert code == 0, err
    assert all(f"measured {name}" in out for name in ("first", "tokens", "deeper")) and "on this-machine" in out
    found = this_machine()
    assert found is not None and found.name == THIS_MACHINE and set(found.peaks) == {"fp32"}
    assert 0 < found.utilisations["fp32"] < 1 and not found.cuda and found.memory_bytes
    assert "on this-machine" in cli("plan", path)[1], "the default, once there is one"
    kept = tmp_path / "config" / "growkit" / "hardware.json"
    assert [file.name for file in kept.parent.iterdir()] == ["hardware.json"]
    assert keep(found) == kept and this_machine() == found
    assert cli("plan", path, "--measure", "trainer.precision=bf16", "--hardware", THIS_MACHINE)[0] == 0
    after = this_machine()
    assert after is not None and after.peaks["fp32"] == found.peaks["fp32"] and set(after.peaks) == {"fp32", "bf16"}
    kept.write_text("damaged")
    assert cli("plan", path, "--measure")[0] == 0, "what cannot be read is replaced"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("width", [80, 100])
def test_the_command_shows_every_stage(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, schedule = read(name, [])
    code, out, err = cli("plan", name, "--hardware", "h100-sxm")
    assert code == 0, err
    assert all(stage.name in out for stage in schedule.stages)
    for word in ("parameters", "FLOPs", "moments", "US dollars", "kWh", "per joule", "per dollar", "from scratch"):
        assert word in out, word
    assert "\x1b" not in out, "colours without a terminal"
    tables = out.partition("per joule")[0].splitlines()[1:-1]
    assert max(map(len, tables)) <= width


def test_json_has_what_the_tables_have(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, out, _ = cli("plan", path, "--json", "--hardware", "a100-80gb")
    assert code == 0
    recipe, schedule = read(str(path), [])
    said, made = json.loads(out), plan(recipe, schedule, HARDWARE.get("a100-80gb", key=""))
    schedule_points = said.pop("schedule")
    assert schedule_points == json.loads(json.dumps([asdict(point) for point in points(schedule)]))
    assert said == json.loads(json.dumps(to_json(made)))
    assert [stage["name"] for stage in said["stages"]] == ["first", "tokens", "deeper"]
    assert said["total"]["flops"] == sum(stage["flops"] for stage in said["stages"])
    assert said["stages"][1]["grows"] == ["param_tokens bank"] and said["hardware"]["name"] == "a100-80gb"


def test_streams_are_said(tmp_path: Path) -> None:
    """Bytes moved by hand: of 3 layers on 2 blocks of 16, 12 K + 6 values each, and 3 (K + 1) at either end, twice."""
    recipe = recipe_dict(tmp_path)
    recipe["model"] |= {"embed_dim": 16, "num_heads": 2, "num_layers": 3, "altup_blocks": 2}
    recipe["stages"] = [recipe["stages"][0]]
    path = write_recipe(tmp_path, recipe)
    assert "streams" not in cli("plan", path, "model.altup_blocks=1")[1]
    _, out, _ = cli("plan", path)
    assert re.search(r"2 +recycled +gemma +1 +6\.91kB", out), out
    (stage,) = json.loads(cli("plan", path, "--json")[1])["stages"]
    assert stage["stream"]["blocks"] == 2 and stage["strides"] == [1]
    assert stage["stream_bytes_per_token"] == 4 * 16 * (3 * (12 * 2 + 6) + 2 * 3 * (2 + 1))


def test_the_picture_in_characters() -> None:
    """A column is a share of the tokens: growth and context step up where their stage begins, the rate falls last."""
    _, schedule = read("quickstart", [])
    for width in (60, 80, 100):
        lines = schedule_lines(schedule, width)
        assert max(map(len, lines)) <= width
        rows = {line[:14].strip(): line[14:].split()[0] for line in lines}
        assert Counter(mark for mark in rows["stage"] if mark != "·") == {"1": 1, "2": 1, "3": 1}
        second, third = rows["stage"].index("2"), rows["stage"].index("3")
        for mark, before in ((second, schedule.stages[:1]), (third, schedule.stages[:2])):
            share = sum(stage.tokens for stage in before) / schedule.tokens
            assert mark / len(rows["stage"]) == pytest.approx(share, abs=0.03)  # a column, at the smallest width
        sizes = rows["parameters"]
        assert sizes[second - 1] < sizes[second] == sizes[third - 1] < sizes[third] == sizes[-1] == "█"
        assert rows["context"][third - 1] < rows["context"][third] == "█"
        assert rows["learning rate"][third] == "█" > rows["learning rate"][-1]
    assert schedule_lines(schedule, 80)[1].endswith(" 73.1k–296k")


def test_the_picture_as_png(tmp_path: Path) -> None:
    path = tmp_path / "schedule.png"
    draw_schedule(read("quickstart", [])[1], path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 10_000
    code, out, _ = cli("plan", "quickstart", "--png", tmp_path / "other.png")
    assert code == 0 and (tmp_path / "other.png").is_file() and "other.png" in out.replace("\n", "")


def test_large_recipes_are_planned_without_torch(tmp_path: Path) -> None:
    """Beyond 100 billion parameters and 100 layers, both presets; scripts/bench_plan.py shows how long it takes."""
    for name, text in LARGE.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        last = read(str(tmp_path / f"{name}.yaml"), [])[1].last.model
        assert last.num_params() > 100e9 and len(last.layers) > 100
    code = (
        "import sys\nfrom growkit.cli.plan import show_plan\n"
        f"for name in {list(LARGE)!r}:\n"
        f"    path = {str(tmp_path)!r} + '/' + name + '.yaml'\n"
        "    show_plan(path, [], 'h100-sxm', extends=None, measure=False, png=None, as_json=False)\n"
        "assert not {'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("does not fit") == 2
