"""Loggers: what arrives is what metrics.jsonl says, each step once, across kills, stops and resumes; and whatever goes
wrong with them, the run ends with exit code 0, one warning and the same weights. The real wandb talks to a stand-in."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from growkit.checkpoint.run_folder import RunFolder
from growkit.train.loggers import wandb_process
from growkit.train.loggers.fragment import is_whole
from growkit.train.loggers.fragment import records as wandb_records
from growkit.train.loggers.rows import AXES, GROWTH_COLUMNS, METRICS, Rows
from growkit.train.loggers.workspace import PARTS
from tests.support import cli, in_child, records, write_recipe
from tests.test_resume import assert_same_run
from tests.wandb_server import StandIn, stand_in

KILL = {"GROWKIT_FAULT": "mid_validation:3"}  # at the end of the second stage: step 12 is logged, its validation is not
FULL_AT = 20_000  # bytes of a file; the run's .wandb file needs more


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key of the machine's user, and wandb's own caches in the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run folder) of a run without a logger."""
    folder = tmp_path_factory.mktemp("loggers")
    recipe = write_recipe(folder)
    assert in_child("train", recipe, "run.name=plain") == 0
    return recipe, folder / "runs" / "plain"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


def wait_for_the_process(run: Path) -> None:
    """Until the process beside a killed run has begun, if the kill came first, and sent what it had."""
    while not (run / "wandb" / "lock").exists():
        time.sleep(0.05)
    with open(run / "wandb" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def expected(run: Path) -> dict[int, dict[str, float]]:
    """Step → metrics of the records that stand in the row of their own step."""
    rows: dict[int, dict[str, float]] = {}
    for record in records(run):
        if record["kind"] in ("step", "validation"):
            names = METRICS[record["kind"]]
            norms = {f"gradients/norm/{part}": norm for part, norm in record.get("grad_norms", {}).items()}
            values = norms | {names[key]: value for key, value in record.items() if key in names and value is not None}
            rows.setdefault(record["step"], {"tokens": record["tokens"], "flops": record["flops"]}).update(values)
    return rows


def rows_of(fragments: list[Path]) -> list[dict[str, Any]]:
    """The history in offline files, one after the other."""
    items = [r.history.item for file in fragments for r in wandb_records(file) if r.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row} for row in items]


def assert_rows_are_the_log(rows: list[dict[str, Any]], run: Path) -> None:
    """``rows`` have every step once, in order, and in them what metrics.jsonl says, to the last bit."""
    assert [row["_step"] for row in rows] == list(range(19))
    wanted = expected(run)
    assert list(wanted) == list(range(1, 19))
    for row in rows[1:]:
        got = {name: value for name, value in row.items() if name in wanted[row["_step"]]}
        timing = {name for name in got if name.startswith("speed/")}  # of the first time the step was done
        assert {k: v for k, v in got.items() if k not in timing} == {
            k: v for k, v in wanted[row["_step"]].items() if k not in timing
        }
    assert [row["_step"] for row in rows if row["growth/mark"]] == [7, 13]
    assert [row["growth/parameters"] for row in rows if row["growth/mark"]] == [
        record["parameters_after"] for record in records(run, "growth")
    ]


def growth_table(file: bytes) -> list[dict[str, Any]]:
    table = json.loads(file)
    assert table["columns"] == list(GROWTH_COLUMNS)
    return [dict(zip(table["columns"], line)) for line in table["data"]]


def assert_table_is_the_log(table: list[dict[str, Any]], run: Path) -> None:
    growths = records(run, "growth")
    assert [(line["step"], line["parameters_before"], line["parameters_after"]) for line in table] == [
        (6, growths[0]["parameters_before"], growths[0]["parameters_after"]),
        (12, growths[1]["parameters_before"], growths[1]["parameters_after"]),
    ]
    assert [line["what"] for line in table] == ["param_tokens (bank)", "depth (identity)"]
    for line, growth in zip(table, growths):
        certificate = growth["certificate"]
        assert line["exact"] is True and line["dead"] == line["locked_rows"] == 0
        assert line["delta_logits_float64"] == certificate["delta_logits_float64"]
        assert line["delta_loss"] == certificate["loss_after"] - certificate["loss_before"]


def test_offline_a_kill_and_a_resume_give_fragments_that_the_printed_command_joins(
    plain: tuple[Path, Path], server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reference = plain
    run = reference.parent / "offline"
    words = ("train", recipe, "run.name=offline", "logger.kind=wandb", "monitor.progress=plain")
    assert in_child(*words, env=KILL) == -signal.SIGKILL
    wait_for_the_process(run)
    code, out, err = cli("resume", run)
    assert (code, err) == (0, "")
    assert_same_run(run, reference)
    assert "offline, no API key was found" in out

    state = json.loads((run / "wandb.json").read_text())
    fragments = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(fragments) == 2 and all(map(is_whole, fragments))
    rows, configs, axes = rows_of(fragments), [], set()
    for fragment in fragments:
        for record in wandb_records(fragment):
            if record.HasField("run"):
                assert record.run.run_id == state["id"] and record.run.display_name == "offline"
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            elif record.HasField("metric"):
                axes.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
    assert_rows_are_the_log(rows, run)
    assert 7 <= rows.index(next(row for row in rows if row["_step"] == 12)) == 12
    assert configs[1]["stages"][2]["grow"] == {"num_layers": 2} and configs[1]["parent"] is None
    assert {("train/*", "tokens"), ("validation/*", "tokens"), ("flops", ""), ("step", "")} <= axes
    tables = sorted((run / "wandb").glob("offline-run-*/files/media/table/growth/events_13_*"))
    assert_table_is_the_log(growth_table(tables[0].read_bytes()), run)

    command = re.findall(r"to send the run: (wandb sync .*)", out)[-1]
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        f"{sys.executable} -m {command}",
        shell=True,
        cwd=run,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert list(server.runs) == [state["id"]]
    assert_rows_are_the_log(server.runs[state["id"]].history, run)
    assert_summary_is_the_log(server.runs[state["id"]].summary, run)


def assert_summary_is_the_log(summary: dict[str, Any], run: Path) -> None:
    validations = [record["bits_per_byte"] for record in records(run, "validation")]
    assert summary["final/bits_per_byte"] == validations[-1]
    assert summary["best/bits_per_byte"] == min(validations)
    assert summary["ngram/bits_per_byte"] == records(run, "ngram")[0]["bits_per_byte"]


def test_online_a_stop_and_a_resume_are_one_run(plain: tuple[Path, Path], server: StandIn) -> None:
    recipe, reference = plain
    run = reference.parent / "online"
    words = ("logger.kind=wandb", "logger.project=study", "logger.tags=[a]", "logger.artifacts=ends")
    assert in_child("train", recipe, "run.name=online", "trainer.max_minutes=1e-9", *words, env=server.env) == 3
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("max_minutes: 1.0e-09", "max_minutes: null"))
    ((identity, received),) = server.runs.items()
    assert [row["_step"] for row in received.history] == [0, 1]
    assert in_child("resume", run, env=server.env) == 0
    assert_same_run(run, reference)

    assert list(server.runs) == [identity] == [json.loads((run / "wandb.json").read_text())["id"]]
    assert (received.name, received.finished) == ("online", [0, 0])
    assert_rows_are_the_log(received.history, run)
    assert_summary_is_the_log(received.summary, run)
    (table,) = (body for name, body in received.files.items() if name.startswith("media/table/growth/events_13_"))
    assert_table_is_the_log(growth_table(table), run)
    config = json.loads(received.config)
    assert config["model"]["value"]["attention_tokens"] == 8

    checkpoints = [made for made in server.artifacts if made["artifactTypeName"] == "checkpoint"]
    assert all(made["committed"] for made in checkpoints)
    told = [json.loads(made["metadata"]) for made in checkpoints]
    name = f"checkpoint-{identity}"
    assert [(t["step"], t["parent"]) for t in told] == [
        (6, None),
        (12, f"{name}:step-00000006"),
        (18, f"{name}:step-00000012"),
    ]
    assert [entry["certificate"]["exact"] for entry in told[2]["lineage"] if entry["kind"] == "growth"] == [True, True]
    for made, t in zip(checkpoints, told):
        for file in RunFolder(run).checkpoint(t["step"]).iterdir():
            assert made["files"][file.name] == file.read_bytes()


def assert_one_warning(code: int, err: str, reason: str, run: Path) -> None:
    assert code == 0, err
    assert err.count("WARNING") == 1 and "Traceback" not in err, err
    assert reason in err and f"growkit sync {run}" in err


def with_wandb(recipe: Path, name: str) -> tuple[int, str, str]:
    return cli("train", recipe, f"run.name={name}", "logger.kind=wandb", "logger.mode=online")


@pytest.fixture
def warnings_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of its own shows them: under pytest, logging goes elsewhere."""
    monkeypatch.setattr(wandb_process.log, "warning", lambda text, *a: sys.stderr.write(f"WARNING {text % a}\n"))


@pytest.mark.parametrize(("mood", "reason"), [("refuses", "not logged in"), ("hangs", "deadline exceeded")])
@pytest.mark.usefixtures("warnings_on_stderr")
def test_a_server_that_refuses_or_hangs_is_one_warning(
    mood: str, reason: str, plain: tuple[Path, Path], server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reference = plain
    run = reference.parent / mood
    server.mood = mood
    monkeypatch.setattr(wandb_process, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 1.0)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    code, _, err = with_wandb(recipe, mood)
    assert_one_warning(code, err, reason, run)
    assert_same_run(run, reference)


@pytest.mark.usefixtures("warnings_on_stderr")
def test_what_a_server_that_died_lacks_is_sent_by_sync_and_nothing_twice(
    plain: tuple[Path, Path], server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reference = plain
    run = reference.parent / "died"
    server.dies_at = 10
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 2.0)  # the first rows arrive, then nothing is answered
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    code, _, err = with_wandb(recipe, "died")
    assert_one_warning(code, err, "Timed out", run)
    assert_same_run(run, reference)
    (received,) = server.runs.values()
    assert len(received.history) > 0
    server.mood, server.dies_at = "well", sys.maxsize
    for _ in range(2):
        assert cli("sync", run)[0] == 0
        assert_rows_are_the_log(received.history, run)
    assert_summary_is_the_log(received.summary, run)


@pytest.mark.usefixtures("warnings_on_stderr")
def test_a_killed_wandb_core_is_one_warning(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, reference = plain
    run = reference.parent / "core"
    listen, killed = wandb_process.WandbProcess.__call__, []

    def kill_at_step_10(self: wandb_process.WandbProcess, record: dict[str, Any]) -> None:
        if record["step"] == 10 and record["kind"] == "step":
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            while not (list((run / "wandb").glob("offline-run-*/*.wandb")) and children.read_text().split()):
                time.sleep(0.05)
            killed.append(int(children.read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)
        listen(self, record)

    monkeypatch.setattr(wandb_process.WandbProcess, "__call__", kill_at_step_10)
    code, _, err = cli("train", recipe, "run.name=core", "logger.kind=wandb")
    assert killed
    assert_one_warning(code, err, "", run)
    assert_same_run(run, reference)


@pytest.mark.usefixtures("warnings_on_stderr")
def test_a_full_disk_for_wandb_is_one_warning(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, reference = plain
    run = reference.parent / "full"

    class Limited(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, preexec_fn=fill, **options)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, resource.RLIM_INFINITY))

    monkeypatch.setattr(subprocess, "Popen", Limited)
    code, _, err = cli("train", recipe, "run.name=full", "logger.kind=wandb")
    assert_one_warning(code, err, "the disk may be full", run)
    assert_same_run(run, reference)
    assert json.loads((run / "wandb.json").read_text())["held"] == -1, "what is not on disk counts as held"


@pytest.mark.usefixtures("warnings_on_stderr")
def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    recipe["stages"] = recipe["stages"][:1]
    folder = RunFolder.create(tmp_path / "runs" / "run", yaml.safe_dump(recipe | {"logger": {"kind": "wandb"}}))
    (folder.path / "wandb").write_text("in the way")
    folder.unlock()
    code, _, err = cli("resume", folder.path)
    assert_one_warning(code, err, "could not be started", folder.path)


@pytest.mark.parametrize("kind", ["tensorboard", "csv"])
def test_local_loggers_hold_each_step_once_across_a_kill(kind: str, plain: tuple[Path, Path]) -> None:
    recipe, reference = plain
    run = reference.parent / kind
    assert in_child("train", recipe, f"run.name={kind}", f"logger.kind={kind}", env=KILL) == -signal.SIGKILL
    assert in_child("resume", run) == 0
    assert_same_run(run, reference)
    if kind == "csv":
        with open(run / "csv" / "metrics.csv") as file:
            lines = [{name: float(v) for name, v in line.items() if v} for line in csv.DictReader(file)]
        assert_rows_are_the_log([line | {"_step": int(line["step"])} for line in lines], run)
        return
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for step_kind, names in METRICS.items():
        if step_kind == "stage":
            continue
        for key, metric in names.items():
            wanted = [(r["step"], r[key]) for r in records(run, step_kind) if r.get(key) is not None]
            got = [(event.step, event.value) for event in events.Scalars(metric)] if wanted else []
            assert [step for step, _ in got] == [step for step, _ in wanted]
            assert [value for _, value in got] == pytest.approx([value for _, value in wanted])  # stored as float32
    assert [e.step for e in events.Scalars("growth/mark") if e.value] == [7, 13]
    _, more = events.Tensors("growth/events/text_summary")
    assert more.tensor_proto.string_val[0].decode().count("\n") == 3 and "depth (identity)" in str(more)


def test_rows_gather_what_belongs_to_a_step_and_leave_out_what_is_not_there() -> None:
    def at(kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "stage": 0, "step": step, "tokens": 10 * step, "flops": 100 * step} | values

    log = [
        at("ngram", 0, order=5, bits_per_byte=2.0),
        at("stage", 0, name="a", parameters=7, context_length=8, planned_steps=2),
        at("step", 1, seconds=0.5, loss=None, grad_norms={"attention": 3.0}, new_grad_share=None),
        at("validation", 1, loss=0.7, bits_per_byte=1.0),
        at("sample", 1, name="a", prompt="x", text="xyz"),
        at("stage", 1, parameters=9),
        at("step", 5, loss=0.25, new_grad_share=0.5),
    ]
    rows = Rows()
    complete = list(rows.gather(log))
    assert rows.open is not None and rows.open.values["gradients/new_share"] == 0.5
    assert [row.step for row in [*complete, rows.open]] == [0, 1, 2, 5]
    assert complete[1].values == {
        "growth/mark": 0.0,
        "growth/stage": 0,
        "growth/parameters": 7,
        "growth/context_length": 8,
        "step": 1,
        "tokens": 10,
        "flops": 100,
        "seconds": 0.5,
        "gradients/norm/attention": 3.0,
        "validation/loss": 0.7,
        "validation/bits_per_byte": 1.0,
        "validation/ngram_bits_per_byte": 2.0,
    }
    assert complete[1].samples == [[0, 1, 10, "a", "x", "xyz"]]
    assert complete[2].values["growth/parameters"] == 9 and complete[2].values["tokens"] == 10
    assert rows.summary() == {"final/bits_per_byte": 1.0, "best/bits_per_byte": 1.0, "ngram/bits_per_byte": 2.0}


def test_a_branch_is_a_run_of_its_own_that_names_its_parent(plain: tuple[Path, Path], server: StandIn) -> None:
    _, reference = plain
    branch = RunFolder.open(reference).branch(12, reference.parent / "branch")
    branch.unlock()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        assert cli("sync", branch.path)[0] == 0
    ((identity, received),) = server.runs.items()
    assert not (reference / "wandb.json").exists()
    assert identity == json.loads((branch.path / "wandb.json").read_text())["id"]
    assert received.notes == "branched from plain at step 12"
    assert json.loads(received.config)["parent"]["value"] == {"run": "plain", "step": 12}
    assert [row["_step"] for row in received.history] == list(range(13)), "the branch has its past"


def test_the_prepared_workspace_shows_metrics_that_are_logged(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script saves it at the stand-in; every plot names axes and metrics that rows have."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    script = Path(__file__).parent.parent / "scripts" / "make_wandb_workspace.py"
    monkeypatch.setattr(sys, "argv", [str(script), "someone", "study"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        wandb.teardown()  # or this process stays logged in at the stand-in
    assert f"{server.url}/someone/study" in capsys.readouterr().out
    (view,) = server.views
    sections = view["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Quality", "Growth", "Gradients", "Speed", "Blocks", "Samples"]
    plots = [p["config"] for s in sections for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
    logged = {metric for names in METRICS.values() for metric in names.values()}
    logged |= {"growth/mark", "validation/ngram_bits_per_byte"} | {f"gradients/norm/{part}" for part in PARTS}
    assert all(set(plot["metrics"]) <= logged for plot in plots)
    drawn = {(plot["xAxis"], metric) for plot in plots for metric in plot["metrics"]}
    for axis in ("tokens", "flops"):
        assert {(axis, "validation/bits_per_byte"), (axis, "growth/mark")} <= drawn
    assert ("tokens", "gradients/new_share") in drawn and ("tokens", "speed/utilisation") in drawn
    assert {axis for axis, _ in drawn} <= set(AXES)
