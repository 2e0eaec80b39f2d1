"""More stages on a checkpoint: everything goes on, and a resume of the extended run is as exact as any."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from growkit.checkpoint import store
from growkit.checkpoint.extension import extended_recipe
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import parse_recipe
from growkit.errors import ConfigError
from growkit.models.presets import PRESETS
from growkit.models.spec import param_specs
from growkit.schedule.plan import growth_schedule
from growkit.schedule.progress import Progress
from growkit.schedule.stage import GrowthSchedule
from tests.support import cli, in_child, model_config, records, trained_like, write_recipe
from tests.test_resume import assert_same_run

GROW = {"embed_dim": 32}
STAGES = [
    {"name": "wider", "duration": "4 steps", "grow": {"mlp_tokens": 20}, "new_warmup": "2 steps"},
    {"name": "last", "duration": "4 steps", "grow": {"num_layers": 3}},
]


def further(folder: Path, stages: list[dict[str, object]] | None = None, **sections: object) -> Path:
    path = folder / "further.yaml"
    path.write_text(yaml.safe_dump({"stages": stages or STAGES, **sections}))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, which every test extends."""
    folder = tmp_path_factory.mktemp("extend")
    assert in_child("train", write_recipe(folder), "run.name=source") == 0
    return folder / "runs" / "source"


@pytest.fixture(scope="module")
def extended(source: Path) -> Path:
    """The source extended by two stages, without a stop."""
    assert in_child("extend", source, further(source.parent.parent), "run.name=extended") == 0
    return source.parent / "extended"


def test_counts_lineage_log_and_moments_go_on(source: Path, extended: Path) -> None:
    before, after = RunFolder.open(source).load(), RunFolder.open(extended).load()
    assert after.manifest.lineage[: len(before.manifest.lineage)] == before.manifest.lineage
    names = [(entry["kind"], entry["stage"], entry["name"]) for entry in after.manifest.lineage[5:]]
    assert names == [("growth", 3, "wider"), ("stage", 3, "wider"), ("growth", 4, "last"), ("stage", 4, "last")]
    assert all(entry["certificate"]["exact"] for entry in after.manifest.lineage[5:] if entry["kind"] == "growth")
    first, at = before.manifest.progress, after.manifest.progress
    schedule = growth_schedule(parse_recipe((extended / "recipe.yaml").read_text(), [], PRESETS, name="recipe"))
    assert (at.step, at.tokens, at.cursor) == (first.step + 8, first.tokens + 8 * 128, first.cursor + 8 * 128)
    assert at.flops == pytest.approx(first.flops + schedule.flops, rel=1e-12)
    assert [stage.index for stage in schedule.stages] == [3, 4]
    log = records(extended)
    assert log[: len(records(source))] == records(source)
    assert [r["step"] for r in log if r["kind"] == "step"] == list(range(1, at.step + 1))
    born = {name: stage for name, stage in after.manifest.born.items() if stage >= 3}
    assert {name for name in after.state.params if name not in before.state.params} == set(born)
    old = next(iter(before.state.moments))
    assert after.state.moments[old].step == before.state.moments[old].step + 8
    assert json.loads((extended / "run.json").read_text())["parent"] == {"run": "source", "step": first.step}


def test_what_the_recipe_does_not_say_is_the_sources(source: Path, extended: Path) -> None:
    old, new = (yaml.safe_load((run / "recipe.yaml").read_text()) for run in (source, extended))
    same = ("data", "optim", "trainer", "monitor")
    assert [new[section] for section in same] == [old[section] for section in same]
    assert new["model"] is None and new["run"] == old["run"] | {"name": "extended"}
    assert [stage["context_length"] for stage in new["stages"]] == [32, 32], "the context of the source's last stage"


def test_further_stages_are_planned_and_checked_before_they_are_trained(source: Path, extended: Path) -> None:
    recipe = further(source.parent.parent)
    schedule = growth_schedule(parse_recipe((extended / "recipe.yaml").read_text(), [], PRESETS, name="recipe"))
    code, out, err = cli("plan", recipe, "--extend", source, "--json")
    stages = json.loads(out)["stages"]
    assert (code, err) == (0, "") and sum(stage["flops"] for stage in stages) == pytest.approx(schedule.flops)
    assert [stage["parameters"] for stage in stages] == [stage.model.num_params() for stage in schedule.stages]
    code, out, _ = cli("validate", recipe, "--extend", RunFolder.open(source).checkpoint(18))
    assert code == 0 and "wider" in out and f"valid: {schedule.tokens:,} tokens" in out
    code, _, err = cli("validate", recipe)
    assert code == 2 and "--extend" in err


def test_the_learning_rate_goes_on_from_where_it_was(source: Path, extended: Path) -> None:
    rates = [record["lr"] for record in records(extended, "step")]
    last, peak = rates[17], 3e-3
    assert rates[18] == pytest.approx(peak) and last < peak  # 2 % of four steps are no warm-up
    longer = further(
        source.parent.parent, [{"name": "slow", "duration": "4 steps", "warmup": "4 steps", "decay": "0%"}]
    )
    assert in_child("extend", source, longer, "run.name=slow") == 0
    rates = [record["lr"] for record in records(source.parent / "slow", "step")][18:]
    assert rates == pytest.approx([last + (peak - last) * (i + 1) / 4 for i in range(4)])


@pytest.mark.parametrize(("point", "nth"), [("mid_growth", 1), ("after_rename", 2), ("first_step_after_growth", 2)])
def test_an_extended_run_killed_anywhere_resumes_to_the_bit(point: str, nth: int, extended: Path, source: Path) -> None:
    name = f"killed-{point}"
    words = ("extend", source, further(source.parent.parent), f"run.name={name}")
    assert in_child(*words, env={"GROWKIT_FAULT": f"{point}:{nth}"}) == -signal.SIGKILL
    assert in_child("resume", source.parent / name) == 0
    assert_same_run(source.parent / name, extended)


def test_an_extension_can_be_extended_and_begin_at_an_earlier_step(source: Path, extended: Path) -> None:
    more = further(source.parent.parent, [{"name": "more", "duration": "2 steps"}])
    assert in_child("extend", extended, more, "run.name=again", "--from", 22) == 0
    again = RunFolder.open(source.parent / "again").load().manifest
    assert (again.progress.stage, again.progress.step) == (4, 24)
    assert [entry["name"] for entry in again.lineage if entry["kind"] == "stage"][-2:] == ["wider", "more"]


def test_a_checkpoint_grown_by_hand_is_trained_on(source: Path, tmp_path: Path) -> None:
    """Its new parameters are new in the first stage: frozen apart, the old ones stand still."""
    grown = tmp_path / "grown"
    assert cli("grow", source, "num_layers=4", "-o", grown)[0] == 0
    recipe = further(tmp_path, [{"name": "on", "duration": "3 steps", "freeze": ["old"]}])
    assert in_child("extend", grown, recipe, "run.name=by-hand") == 0
    before, after = store.read(grown), RunFolder.open(source.parent / "by-hand").load()
    assert after.manifest.model == before.manifest.model and after.manifest.lineage[:6] == before.manifest.lineage
    for name, tensor in before.state.params.items():
        assert torch.equal(tensor, after.state.params[name]) == (
            name not in before.manifest.born or before.manifest.born[name] < 3
        ), name
    run = source.parent / "by-hand"
    assert [r["step"] for r in records(run, "step")] == list(range(1, 22)), "the log goes on through the growth by hand"
    assert [r["name"] for r in records(run, "growth")] == ["tokens", "deeper", "grown"]
    assert json.loads((run / "run.json").read_text())["parent"] == {"run": "source", "step": 18}


def test_what_is_new_after_a_growth_by_hand(source: Path, tmp_path: Path) -> None:
    """Its parameters are, in the first stage, and old in the next; which entries of old ones are, nobody knows."""
    grown = tmp_path / "grown"
    assert cli("grow", source, "num_layers=3", "embed_dim=24", "-o", grown)[0] == 0

    def schedule(*freeze: str, grow: dict[str, int] | None = None) -> GrowthSchedule:
        stages = [{"name": "on", "duration": "3 steps", "freeze": list(freeze)}]
        stages += [{"name": "and on", "duration": "3 steps", "freeze": ["old"], "grow": grow or {"num_layers": 4}}]
        text, checkpoint = yaml.safe_dump({"stages": stages}), store.read(grown)
        return growth_schedule(extended_recipe(checkpoint.manifest, str(grown), text, [], name="further"))

    first, second = schedule("old").stages
    by_hand = {name for name, stage in store.read(grown).manifest.born.items() if stage == first.index}
    assert by_hand and first.frozen == param_specs(first.model).keys() - by_hand
    assert second.frozen == param_specs(first.model).keys(), "a stage later they are old"
    with pytest.raises(ConfigError, match=r"stages\.0\.freeze: .*grown by hand.*\[no-old-entries\]"):
        schedule("old_entries")
    wide = tmp_path / "wide"
    assert cli("grow", source, "embed_dim=24", "-o", wide)[0] == 0
    assert store.read(wide).manifest.born == store.read(RunFolder.open(source).checkpoint(18)).manifest.born
    for folder in (wide, source):  # no parameter is new in either, and only one of them was grown by hand
        recipe = further(tmp_path, [{"name": "on", "duration": "1 steps", "freeze": ["old_entries"], "grow": GROW}])
        code, _, err = cli("validate", recipe, "--extend", folder)
        assert (code, "[no-old-entries]" in err) == ((2, True) if folder == wide else (0, False)), err


def test_a_bare_checkpoint_needs_what_a_recipe_would_say(tmp_path: Path, source: Path) -> None:
    model = model_config("transformer", vocab_size=256)
    folder = tmp_path / "bare"
    store.write(folder, trained_like(model, dtype=torch.float32), Manifest(model=model, progress=Progress()))
    stage: dict[str, object] = {"name": "on", "duration": "2 steps", "context_length": 16, "global_batch_tokens": 64}
    data = {"source": str(source.parent.parent / "corpus.txt")}
    sections = {"data": data, "run": {"folder": str(tmp_path / "runs"), "name": "bare"}, "monitor": {"progress": "off"}}
    assert in_child("extend", folder, further(tmp_path, [stage], **sections)) == 0
    manifest = RunFolder.open(tmp_path / "runs" / "bare").load().manifest
    assert (manifest.progress.step, manifest.progress.cursor, manifest.progress.stage) == (2, 128, 1)


def test_other_text_begins_at_its_beginning(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} another text\n" for i in range(3000)))
    recipe = further(tmp_path, [{"name": "on", "duration": "2 steps"}])
    assert in_child("extend", source, recipe, f"data.source={other}", "run.name=other") == 0
    log = records(source.parent / "other")
    assert RunFolder.open(source.parent / "other").load().manifest.progress.cursor == 2 * 128
    assert len([r for r in log if r["kind"] == "ngram"]) == 2, "the yardstick is of the new text"
