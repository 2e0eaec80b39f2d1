"""The report, the comparison and the lineage: what they take from a run folder, whatever state it is in."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from growkit.checkpoint.manifest import read
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.reports import plain
from growkit.errors import ConfigError
from growkit.report import page as pages
from growkit.report.comparison import compare, differing, reached
from growkit.report.history import History, kept, labels, smoothed
from growkit.report.lineage import stages_of, stages_of_manifest, tree
from growkit.report.page import curves, marks, page, run_data
from growkit.report.run_summary import RunSummary, read_runs
from tests.support import cli, held_by_another_process, recipe_dict, records, write_recipe

HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'><b>b</b> & ${x} {{data}}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/run (grown twice, with samples), its branch runs/branch from step 8, and runs/static."""
    folder = tmp_path_factory.mktemp("report")
    recipe = recipe_dict(folder)
    recipe["monitor"] |= {"sample_tokens": 12, "sample_prompt": "The "}
    recipe["trainer"]["keep_last"] = 9
    file = write_recipe(folder, recipe)
    assert cli("train", file)[0] == 0
    assert cli("resume", folder / "runs/run", "--from", 8, "--as", "branch")[0] == 0
    static = recipe | {"stages": [recipe["stages"][0] | {"duration": "18 steps"}]}
    assert cli("train", write_recipe(folder, static), "run.name=static", "run.seed=1")[0] == 0
    return folder / "runs"


def step(number: int, **values: Any) -> dict[str, Any]:
    place = {"stage": 0, "step": number, "tokens": 10 * number, "flops": 1e3 * number, "seconds": 0.5 * number}
    return {"kind": "step"} | place | {"bits_per_byte": 8 / (number + 1)} | values


def validation(number: int, score: float, **values: Any) -> dict[str, Any]:
    return step(number, bits_per_byte=score, end_of_stage=False, context_length=16, **values) | {"kind": "validation"}


def made(folder: Path, lines: list[dict[str, Any]], recipe: str = "stages: [{name: a}]\n") -> Path:
    """A run folder as ``growkit train`` leaves it, with this log."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"growkit": "run", "parent": null}')
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def data_of(html: bytes) -> dict[str, Any]:
    """The JSON in a page."""
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_columns_hold_what_the_log_says() -> None:
    late = {"grad_norms": {"head": 3.0}, "lr": None, "tokens_per_second": "fast"}
    history = History.of("run", [step(1), validation(1, 2.0), step(2, **late), step(3, loss=10**400)])
    assert history.steps["flops"].tolist() == [1e3, 2e3, 3e3]
    assert np.array_equal(history.steps["grad_norm.head"], [math.nan, 3.0, math.nan], equal_nan=True)
    assert np.isnan(history.steps["lr"]).all() and np.isnan(history.steps["tokens_per_second"]).all()
    assert math.isnan(history.steps["loss"][2])
    assert [event["kind"] for event in history.events] == ["validation"]
    assert history.place == {"step": 3, "tokens": 30, "flops": 3e3, "seconds": 1.5}


def test_a_log_without_seconds_has_none() -> None:
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in (step(1), validation(1, 2.0))]
    history = History.of("run", lines)
    assert history.place["seconds"] is None and not len(history.validations("seconds")[0])
    assert curves(history)["places"][0]["seconds"] == [None]


def test_a_long_curve_keeps_its_shape_and_its_spikes() -> None:
    values = np.sin(np.arange(100_000) / 9e3)
    values[[12_345, 77_777]] = 40, -40
    values[500:600] = np.nan
    at = kept(values, 2000)
    assert len(at) <= 2000 and np.isfinite(values[at]).all() and (np.diff(at) > 0).all()
    assert {0, 12_345, 77_777, 99_999} <= set(at)
    apart = np.abs(np.interp(np.arange(100_000), at, values[at]) - values)
    close = (np.abs(np.arange(100_000) - 12_345) > 200) & (np.abs(np.arange(100_000) - 77_777) > 200)
    assert np.nanmax(apart[close]) < 0.05  # a stretch of 100 steps of this sine rises by 0.011
    assert kept(np.array([1.0, math.nan, 2.0]), 2000).tolist() == [0, 2]
    assert not len(kept(np.array([]), 2000)) and not len(kept(np.full(9, math.nan), 2000))


def test_arms_of_a_bandit_have_a_curve_each() -> None:
    """In a stage that has them."""
    likely = {"arm": "b", "prediction_gain": 0.5, "arm_probabilities": {"a <b>": 0.25, "b": 0.75}}
    history = History.of("run", [step(1), step(2, **likely), step(3)])
    assert np.array_equal(history.steps["arm_probability.a <b>"], [math.nan, 0.25, math.nan], equal_nan=True)
    told = curves(history)["curves"]
    assert told["arm_probability.b"]["value"] == [0.75] and told["prediction_gain"]["value"] == [0.5]


def test_smoothing_is_a_mean_over_the_last_values() -> None:
    values = np.random.default_rng(0).normal(size=50)
    values[7] = math.nan
    expected = [np.nanmean(values[max(0, i - 4) : i + 1]) for i in range(50)]
    assert np.allclose(smoothed(values, 5), expected, atol=1e-12)
    assert np.isnan(smoothed(np.array([math.nan, 1.0]), 1)[0])


def test_a_page_does_not_grow_with_the_run(tmp_path: Path) -> None:
    lines = [step(i, lr=1e-3, grad_norm=1.0 + i % 7, grad_norms={"mlp": 1.0}) for i in range(1, 12_001)]
    run = RunSummary.read(made(tmp_path / "run", lines))
    found = curves(run.history)
    assert {"bits_per_byte", "smoothed", "lr", "grad_norm.mlp"} <= set(found["curves"])
    for curve in found["curves"].values():
        assert len(curve["value"]) == len(found["places"][curve["at"]]["step"]) <= pages.POINTS


def test_an_extended_run_is_scored_from_its_extension_on(tmp_path: Path) -> None:
    """Before, it may have been validated on another text, beside that text's n-gram."""
    ngram = {"kind": "ngram", "order": 2, "bits_per_byte": 1.5}
    before = [step(0) | ngram, step(4), validation(4, 1.0)]
    recipe = "start: {stage: 1, step: 4}\nstages: [{name: b}]\n"
    run = RunSummary.read(made(tmp_path / "begun", before, recipe))
    assert (run.last, run.best, run.ngram) == (1.0, 1.0, None)
    after = [step(4) | ngram | {"bits_per_byte": 3.5}, step(6), validation(6, 2.0), validation(8, 2.5)]
    run = RunSummary.read(made(tmp_path / "on", before + after, recipe))
    assert (run.last, run.best, run.ngram) == (2.5, 2.0, (2, 3.5))
    assert RunSummary.read(made(tmp_path / "alone", before + after)).best == 1.0


def test_a_report_tells_what_the_run_did(world: Path) -> None:
    run = RunSummary.read(world / "run")
    told = run_data(run)
    assert (told["state"], told["growths"], told["step"]) == ("complete", 2, 18)
    log = records(world / "run")
    sizes = [record["parameters"] for record in log if record["kind"] == "stage"]
    scores = [record["bits_per_byte"] for record in log if record["kind"] == "validation"]
    assert told["parameters"] == (sizes[0], sizes[-1])
    assert (told["last"], told["best"]) == (scores[-1], min(scores))
    assert [point["value"] for point in told["validations"]] == scores
    assert told["flops"] == log[-1]["flops"] and told["seconds"] == log[-1]["seconds"]
    deltas = [r["certificate"]["max_delta_logits_float64"] for r in log if r["kind"] == "growth"]
    assert told["max_delta_logits"] == max(deltas)
    assert [sample["name"] for sample in told["samples"]] == ["first", "tokens", "deeper"]
    assert told["environment"]["device"] == "cpu" and "sample_prompt" in told["recipe"]
    first, second = told["marks"]
    assert first["links"][0]["operator"] == "param_tokens" and first["certificate"]["exact"] is True
    assert second["context_length"] == [16, 32] and second["parameters"] == sizes[1:]
    assert {"lr", "grad_norm", "grad_norm.mlp", "new_grad_share", "utilisation", "smoothed"} <= set(told["curves"])


def test_a_context_step_without_a_growth_is_a_mark() -> None:
    stage = {"kind": "stage", "parameters": 5, "global_batch_tokens": 8}
    lines = [step(0) | stage | {"stage": i, "name": f"s{i}", "context_length": context}
             for i, context in enumerate((16, 32, 32))]  # fmt: skip
    first, second = marks(History.of("run", lines))
    assert first["context_length"] == [16, 32] and first["parameters"] is None and not first["grows"]
    assert second["context_length"] is None and second["certificate"] is None


def test_training_writes_its_report(world: Path) -> None:
    html = (world / "run" / "report.html").read_bytes()
    assert html.startswith(pages.MARK) and data_of(html)["runs"][0]["state"] == "complete"
    code, out, err = cli("report", world / "run")
    assert code == 0 and str(world / "run" / "report.html") in out, err


def test_several_runs_make_one_page(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("report", world / "run", world / "static")
    assert code == 0 and "report.html" in out, err
    told = data_of(Path("report.html").read_bytes())
    assert [run["name"] for run in told["runs"]] == ["run", "static"]
    assert told["differences"]["run.seed"] == ["0", "1"]
    assert cli("report", world / "static", "-o", "report.html")[0] == 0, "a report is replaced"
    assert data_of(Path("report.html").read_bytes())["runs"][0]["name"] == "static"
    assert not list(tmp_path.glob(".writing-*"))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def hostile_run(folder: Path) -> RunSummary:
    """A run whose every text is markup and script."""
    place = step(3)
    links = [{"operator": HOSTILE, "method": HOSTILE, "kind": "exact", "reason": HOSTILE}]
    certificate = {"exact": True, "reason": HOSTILE, "training_dtype": HOSTILE, "dead": [HOSTILE], "locked_rows": 0}
    sizes = {"parameters": 9, "context_length": 16, "planned_steps": 2, "name": HOSTILE}
    lines = [
        place | sizes | {"kind": "stage"},
        step(1, grad_norm=1.0, grad_norms={HOSTILE: 1.0}),
        validation(2, 3.0, name=HOSTILE),
        place | sizes | {"kind": "stage", "stage": 1, "parameters": 12},
        place | {"kind": "growth", "stage": 1, "links": links, "certificate": certificate, "name": HOSTILE},
        place | {"kind": "sample", "name": HOSTILE, "prompt": HOSTILE, "text": HOSTILE + "\ud800"},
        step(4, stage=1),
    ]
    run = made(folder / "<b onclick=x>run", lines, f"run: {{name: '{HOSTILE}'}}\n")
    return RunSummary.read(run, HOSTILE)


def test_text_from_a_run_never_becomes_markup(tmp_path: Path) -> None:
    html = page([hostile_run(tmp_path)]).decode()
    parser = Tags()
    parser.feed(html)
    tags = [tag for tag, _ in parser.seen]
    assert tags.count("script") == 3 and not {"img", "b"} & set(tags)
    assert data_of(html.encode())["runs"][0]["name"] == HOSTILE
    assert not [name for _, attributes in parser.seen for name in attributes if name.startswith("on")]


def test_a_page_needs_no_network(world: Path) -> None:
    html = page(read_runs([world / "run"])).decode()
    parser = Tags()
    parser.feed(html)
    links = [value for _, attributes in parser.seen for name, value in attributes.items() if name in ("src", "href")]
    assert links == ["#main"]
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in parser.seen}
    ours = re.sub(r'<script type="text/plain" id="library">.*?</script>', "", html, flags=re.DOTALL)
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|\bimport\b\s*[({'\"]|@import|url\(|WebSocket", ours)
    policy = next(a["content"] for t, a in parser.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "connect-src" not in policy and "unsafe-eval" not in policy and "http" not in policy


def test_a_run_that_is_being_written_is_told_as_it_is(world: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(world / "run", live)
    log = (live / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (live / "metrics.jsonl").write_bytes(b"".join(log[:12]) + log[12][:20])  # cut inside a line
    (live / "report.html").unlink()
    with held_by_another_process(live):
        code, out, err = cli("report", live)
        assert code == 0 and "live is running" in out, err
        told = data_of((live / "report.html").read_bytes())["runs"][0]
        assert told["state"] == "running" and told["step"] == json.loads(log[11])["step"]
        code, out, err = cli("compare", world / "static", live)
        assert code == 0 and "live is running" in out, err
        code, out, err = cli("lineage", live)
        assert code == 0 and "now at step" in out, err
    assert cli("report", live)[0] == 0
    assert data_of((live / "report.html").read_bytes())["runs"][0]["state"] == "unfinished"


def test_a_run_without_a_step_says_that_there_is_nothing(world: Path, tmp_path: Path) -> None:
    empty = made(tmp_path / "empty", [step(0) | {"kind": "ngram", "order": 2, "bits_per_byte": 3.0}])
    (made(tmp_path / "bare", []) / "metrics.jsonl").unlink()
    (tmp_path / "bare" / "recipe.yaml").unlink()
    for run in (empty, tmp_path / "bare"):
        code, out, err = cli("report", run)
        assert code == 0 and "no step has been logged" in out, err
        told = data_of((run / "report.html").read_bytes())["runs"][0]
        assert told["state"] == "empty" and told["places"] == [] and told["last"] is None
        code, out, err = cli("compare", world / "run", run)
        assert code == 0 and "has not been validated yet" in out and "share no stretch" in out, err
        assert cli("compare", run, world / "run")[0] == 0
        assert cli("lineage", run)[0] == 0


def test_commands_on_runs_load_no_torch(world: Path, tmp_path: Path) -> None:
    runs = [str(world / "run"), str(world / "static")]
    program = (
        "import sys\nfrom growkit.cli.main import app\n"
        f"for words in (['report', *{runs}, '-o', {str(tmp_path / 'r.html')!r}],\n"
        f"              ['compare', *{runs}, '--png', {str(tmp_path / 'c.png')!r}],\n"
        f"              ['lineage', {runs[0]!r}]):\n"
        "    app(words, standalone_mode=False)\n"
        "assert not {'torch', 'lightning', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "r.html").exists()


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert labels([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(ConfigError, match="same-run"):
        labels([tmp_path / "a", tmp_path / "b/../a"])


def test_where_a_curve_gets_down_to_a_score() -> None:
    x, y = np.array([10.0, 20.0, 30.0, 40.0]), np.array([4.0, 3.0, 3.5, 1.5])
    assert reached(x, y, 3.5) == 15 and reached(x, y, 3.0) == 20 and reached(x, y, 2.5) == 35
    assert reached(x, y, 4.5) == 10 and reached(x, y, 1.0) is None and reached(x[:0], y[:0], 1.0) is None


def test_runs_are_aligned_on_an_axis(tmp_path: Path) -> None:
    """The reference gets to 2.0 at step 40; the fast run passes 2.0 halfway between 10 and 20; the slow never does."""
    slow = [validation(5, 4.0), validation(30, 2.5)]
    points = {
        "reference": [validation(10, 4.0), validation(40, 2.0)],
        "fast": [validation(10, 3.0), validation(20, 1.0)],
        "slow": slow,
        "at-once": [validation(20, 1.5), validation(60, 1.0)],
    }
    runs = read_runs([made(tmp_path / name, lines) for name, lines in points.items()])
    found = compare(runs, "tokens")
    rows = {row.name: row for row in found.aligned}
    assert found.target == 2.0 and found.places == (200.0,), "the only place that all cover"
    assert [row.at for row in found.aligned] == [(pytest.approx(10 / 3),), (1.0,), (pytest.approx(3.1),), (1.5,)]
    assert (rows["reference"].needed, rows["reference"].saving) == (400, 1)
    assert (rows["fast"].needed, rows["fast"].saving) == (150, pytest.approx(400 / 150))
    assert (rows["slow"].needed, rows["slow"].saving) == (None, None)
    assert rows["at-once"].before_first and rows["at-once"].needed == 200
    by_seconds = compare(runs, "seconds")
    assert by_seconds.aligned[1].needed == 7.5 and any("seconds depend" in note for note in by_seconds.notes)
    code, out, _ = cli("compare", *(run.folder.path for run in runs), "--by", "tokens")
    assert code == 0 and "never reached" in out and "×2.67" in out and "≥ ×2.00" in out


def test_recipes_differ_in_keys() -> None:
    one = {"run": {"name": "a", "seed": 0}, "stages": [{"lr": 1}], "data": {}}
    other = {"run": {"name": "b", "seed": 0}, "stages": [{"lr": 2}, {"lr": 3}], "data": {}}
    assert differing([one, other]) == {"stages.0.lr": (1, 2), "stages.1.lr": ("not set", 3)}
    assert differing([one, one]) == {}


def test_a_comparison_says_what_makes_runs_differ(world: Path, tmp_path: Path) -> None:
    png = tmp_path / "curves.png"
    code, out, err = cli("compare", world / "static", world / "run", "--by", "flops", "--png", png)
    assert code == 0, err
    text = " ".join(out.split())
    assert "different seeds" in text and "different contexts (static 16, run 32)" in text
    assert "run.seed: 1 | 0" in text and str(png) in out.replace("\n", "")
    assert "different texts" not in text and png.read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("compare", world / "static", world / "run", "--json", "--png", png)
    assert code == 0, err
    told = json.loads(out)
    assert told == json.loads(json.dumps(plain(compare(read_runs([world / "static", world / "run"]), "flops"))))
    assert told["runs"][1]["parameters"] == [r["parameters"] for r in records(world / "run", "stage")][::2]


def test_a_comparison_of_different_texts_says_so(world: Path, tmp_path: Path) -> None:
    runs = read_runs([world / "static", world / "run"])
    other = RunSummary(**(vars(runs[1]) | {"corpus": "another hash"}))
    assert any("different texts" in note for note in compare([runs[0], other], "flops").notes)
    unknown = RunSummary(**(vars(runs[1]) | {"corpus": None}))
    assert any("no checkpoint that says" in note for note in compare([runs[0], unknown], "flops").notes)


def test_the_lineage_is_a_tree(world: Path) -> None:
    top = tree(RunFolder.open(world / "branch"))
    assert (top.name, top.here, [stage.name for stage in top.stages]) == ("run", False, ["first", "tokens", "deeper"])
    (branch,) = top.branches
    assert (branch.name, branch.here, branch.from_step) == ("branch", True, 8)
    assert [stage.name for stage in branch.stages] == ["tokens", "deeper"], "what came before belongs to the parent"
    growth = top.stages[1].growth
    assert growth is not None and growth.exact and growth.links == ("param_tokens (bank)",)
    ends = [r for r in records(world / "run", "validation") if r["end_of_stage"]]
    assert [(s.step, s.tokens, s.flops, s.bits_per_byte) for s in top.stages] == [
        (r["step"], r["tokens"], r["flops"], r["bits_per_byte"]) for r in ends
    ]
    code, out, _ = cli("lineage", world / "run")
    assert code == 0 and "branch branched at step 8" in out and "largest |Δlogit|" in out and "to step 18" in out
    code, out, _ = cli("lineage", world)  # a folder of runs: all their families
    assert code == 0 and "branch branched at step 8" in out and "\nstatic\n" in out
    code, out, _ = cli("lineage", world, "--json")
    assert [node["name"] for node in json.loads(out)] == ["run", "static"]
    assert json.loads(out)[0]["branches"][0]["from_step"] == 8


def test_the_lineage_of_a_checkpoint_agrees_with_the_log(world: Path, tmp_path: Path) -> None:
    log = stages_of(History.read("run", world / "run/metrics.jsonl"))
    for at in (12, 18):
        manifest = read(world / f"run/checkpoints/step-{at:08d}", verify=False)
        for stage, logged in zip(stages_of_manifest(manifest), log):
            same = ("index", "name", "parameters", "step", "tokens", "flops", "growth", "ended")
            assert [getattr(stage, key) for key in same] == [getattr(logged, key) for key in same]
            assert stage.bits_per_byte == pytest.approx(logged.bits_per_byte, rel=1e-12)
    manifest = read(world / "static/checkpoints/step-00000018", verify=False)
    assert [stage.parameters for stage in stages_of_manifest(manifest)] == [manifest.model.num_params()]
    code, out, _ = cli("lineage", world / "run/checkpoints/step-00000016")
    assert code == 0 and "now at step 16" in out and "to step 12" in out
    assert cli("grow", world / "run", "num_layers=3", "-o", tmp_path / "grown")[0] == 0
    code, out, _ = cli("lineage", tmp_path / "grown")
    assert code == 0 and "no steps yet" in out and out.count("grew by depth") == 2


def test_a_lineage_survives_lost_and_circular_parents(world: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(world / "branch", runs / "branch")
    code, out, _ = cli("lineage", runs / "branch")
    assert code == 0 and "run (its folder is not beside)" in out
    assert "first, " in out, "the stages of a lost parent are in the branch's log"
    log = runs / "branch" / "metrics.jsonl"
    whole = log.read_bytes()
    made(runs / "run", [step(1)])
    log.write_bytes(b"{\n")
    code, out, _ = cli("lineage", runs / "run")
    assert code == 0 and "branch branched at step 8 (its log is damaged)" in out
    assert cli("report", runs / "run")[0] == 0, "a relative's log is not this run's affair"
    log.write_bytes(whole)
    (runs / "run" / "run.json").write_text(json.dumps({"parent": {"run": "branch", "step": 1}}))
    made(runs / "new", [])
    (runs / "new" / "run.json").write_text("")  # a run that is just being created
    code, out, _ = cli("lineage", runs / "branch")
    assert code == 0 and "branch" in out and "new" not in out
