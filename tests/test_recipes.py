"""Every recipe in the repository loads, builds every stage and states its plan; small runs keep their losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from growkit.cli.recipes import built_in, read
from growkit.config.load import apply_override
from growkit.models.decoder import DecoderLM
from scripts import mamba_tasks, synthetic_tasks
from tests.recipes import CHOOSING, EXTENSIONS, RECIPES
from tests.support import cli, corpus_file, records

# Losses of shortened runs on a fixed text, float32, to tell a silent change of the numerics. Other CPUs add in another
# order, which fifteen steps amplify to about 1e-3; a change of an initialisation or a schedule moves them by 1e-2.
GOLDEN_TOLERANCE = 3e-3
TOKENS = 1024  # of a batch, or one sequence: whole ones would take a minute
GOLDEN: dict[str, list[float]] = {
    "altup": [4.6500, 3.9620, 3.4778],
    "altup-stride": [4.4455, 3.7206],
    "altup-tokens": [3.5551, 2.5585],
    "altup-vocabulary": [5.8707, 3.4790],
    "associative-recall": [2.9240],
    "attention-window": [4.2141],
    "bandit-mixture": [4.2616],
    "choose-growth": [3.2441, 1.9440],
    "context-growth": [4.1677, 3.1391],
    "dataset-decomposition": [4.5272, 3.3847],
    "first-text": [4.8747],
    "greedy-stages": [3.8222, 3.4237, 3.2843, 2.7516],
    "grow-on-plateau": [3.2441, 2.1430, 1.4577],
    "importance": [4.5216],
    "induction": [2.8276],
    "mamba-induction": [2.9772, 2.8048, 3.0595],
    "mamba-selective-copying": [2.6930, 2.6681, 2.6560, 2.6260, 2.6733, 2.7247],
    "needle": [3.0192],
    "quickstart": [3.2696, 2.0730, 1.4655],
    "quickstart-static": [3.5976],
    "selective-copying": [2.1309],
}

TASKS = (*synthetic_tasks.RECIPES, *mamba_tasks.RECIPES)
GOLDEN_CHOSEN = {"rho-1": [4.3587], "rho-loss": [4.2388]}


def test_all_recipes_are_here() -> None:
    texts = [
        "altup",
        "altup-stride",
        "altup-tokens",
        "altup-vocabulary",
        "attention-window",
        "bandit-mixture",
        "choose-growth",
        "context-growth",
        "dataset-decomposition",
    ]
    texts += ["first-text", "greedy-stages", "grow-on-plateau", "importance", "quickstart", "quickstart-static"]
    assert sorted(RECIPES) == sorted([*texts, *TASKS])
    assert RECIPES.keys() | EXTENSIONS.keys() | CHOOSING.keys() == built_in().keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_every_stage(name: str) -> None:
    _, schedule = read(name, [])
    for stage in schedule.stages:
        with torch.device("meta"):
            model = DecoderLM(stage.model)
        assert sum(p.numel() for p in model.parameters()) == stage.model.num_params()
    code, out, err = cli("validate", name)
    assert code == 0, err
    assert all(stage.name in out for stage in schedule.stages) and "FLOPs in all" in out


@pytest.mark.parametrize("name", RECIPES)
def test_golden_losses(name: str, tmp_path: Path) -> None:
    recipe, schedule = read(name, [])
    keys = ("duration=5 steps", "new_warmup=0 steps", "until=null")
    short = [f"stages.{i}.{key}" for i in range(len(schedule.stages)) for key in keys]
    tokens = [stage.context_length * max(1, TOKENS // stage.context_length) for stage in schedule.stages]
    short += [f"stages.{i}.global_batch_tokens={of}" for i, of in enumerate(tokens)]
    short += [f"stages.{i}.probe=1 step" for i, stage in enumerate(schedule.stages) if stage.trials]
    text = [] if name in TASKS else [f"data.source={corpus_file(tmp_path)}"]
    if recipe.data.packing == "decompose":  # documents of several lengths
        (tmp_path / "texts").mkdir()
        whole = corpus_file(tmp_path).read_text()
        for number in range(40):
            (tmp_path / "texts" / f"{number:02}.txt").write_text(whole[number * 500 :][: 100 + number * 97])
        text = [f"data.source={tmp_path / 'texts'}"]
    if recipe.data.mixture:
        (tmp_path / "other").mkdir()
        text = [
            f"data.mixture=[{{source: {corpus_file(tmp_path)}}}, {{source: {corpus_file(tmp_path / 'other', 30)}}}]"
        ]
    if recipe.data.tokenizer != "bytes":
        words = ("--vocab-size", "300", "-o", tmp_path / "bpe")
        assert cli("tokenizer", "train", corpus_file(tmp_path), *words)[0] == 0
        text += [f"data.tokenizer={tmp_path / 'bpe'}", "model.vocab_size=300"]
    options = [
        *text,
        f"run.folder={tmp_path}",
        "run.name=golden",
        "run.threads=1",
        "trainer.precision=fp32",
        "monitor.progress=off",
        "monitor.log_every=5",
        "monitor.validation_tokens=256",
        "monitor.ngram_order=0",
    ]
    code, _, err = cli("train", name, *options, *short)
    assert code == 0, err
    losses = [record["loss"] for record in records(tmp_path / "golden", "step")]
    assert losses == pytest.approx(GOLDEN[name], abs=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_goes_on_with_its_run(name: str, tmp_path: Path) -> None:
    options = [f"data.source={corpus_file(tmp_path)}", f"run.folder={tmp_path}", "stages.0.duration=2 steps"]
    quiet = ["monitor.progress=off", "monitor.validation_tokens=256", "monitor.ngram_order=0"]
    code, _, err = cli("train", EXTENSIONS[name], *options, *quiet, "run.name=first")
    assert code == 0, err
    code, _, err = cli("extend", tmp_path / "first", name, *options, "run.name=second")
    assert code == 0, err
    (growth,) = records(tmp_path / "second", "growth")
    assert growth["certificate"]["exact"]


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Options of short runs, and a run of the recipe that is said to make a reference."""
    folder = tmp_path_factory.mktemp("choosing")
    options = [f"data.source={corpus_file(folder)}", f"run.folder={folder}", "stages.0.duration=5 steps"]
    options += ["monitor.progress=off", "monitor.validation_tokens=256", "monitor.ngram_order=0", "run.threads=1"]
    options += ["trainer.precision=fp32", "monitor.log_every=5"]
    (made_by,) = set(CHOOSING.values())
    code, _, err = cli("train", made_by, *options, "run.name=reference")
    assert code == 0, err
    return options, folder


@pytest.mark.parametrize("name", CHOOSING)
def test_a_reference_chooses(name: str, choosing: tuple[list[str], Path]) -> None:
    """The reference is found where it is, and where it is missing, the recipe says so."""
    options, folder = choosing
    assert "[reference-missing]" in cli("validate", name, f"data.select.reference={folder / 'no'}")[2]
    reference = f"data.select.reference={folder / 'reference'}"
    code, out, err = cli("plan", name, reference)
    assert code == 0 and "choosing what to train on" in out, err
    code, _, err = cli("train", name, *options, reference, f"run.name={name}")
    assert code == 0, err
    losses = [record["loss"] for record in records(folder / name, "step")]
    assert losses == pytest.approx(GOLDEN_CHOSEN[name], abs=GOLDEN_TOLERANCE)


def test_the_quickstart_is_what_it_says() -> None:
    """Three stages, tokens then depth, four times the parameters, twice the context; the static run has its FLOPs."""
    (_, grown), (_, static) = read("quickstart", []), read("quickstart-static", [])
    assert [[link.operator for link in stage.links] for stage in grown.stages] == [[], ["param_tokens"], ["depth"]]
    assert grown.stages[-1].model.num_params() >= 4 * grown.stages[0].model.num_params()
    assert [stage.context_length for stage in grown.stages] == [128, 128, 256]
    assert static.flops == pytest.approx(grown.flops, rel=1e-3) and len(static.stages) == 1


def test_an_override_is_text_unless_it_has_brackets() -> None:
    raw: dict[str, object] = {}
    for override in ("prompt=ROMEO:", "dash=- a", "flow={a: 1}", "items=[1, x]", "number=2e-3"):
        apply_override(raw, override)
    assert raw == {"prompt": "ROMEO:", "dash": "- a", "flow": {"a": 1}, "items": [1, "x"], "number": 2e-3}
