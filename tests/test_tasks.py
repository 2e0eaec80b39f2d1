"""`growkit eval --tasks`: lm-evaluation-harness's scores are those that growkit's own logits give. The tasks and
their data are made here, without network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from growkit.checkpoint import store
from growkit.checkpoint.manifest import Manifest
from growkit.errors import DataError
from growkit.eval.generate import sample_tokens
from growkit.eval.tasks import check_tasks, load_folder, score_tasks
from growkit.models.decoder import DecoderLM, build
from growkit.schedule.progress import Progress
from tests.support import cli, model_config, trained_like

QUESTIONS = ["Q", "2 + 2 =", "The capital of é", "a", "once upon a time there was a", "def f(x):", "ß", "no", "x = 1;"]
CHOICES = [" yes", " nö", " four"]
WRITTEN = 6  # tokens of an answer that is generated


def log_likelihood(model: DecoderLM, question: str, answer: str) -> float:
    """Of the answer's bytes behind the question's."""
    start, whole = len(question.encode()), list((question + answer).encode())
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]]))[0]
    return -float(F.cross_entropy(logits[start - 1 :], torch.tensor(whole[start:]), reduction="sum"))


def greedy(model: DecoderLM, question: str) -> str:
    """What the model writes, up to a line's end."""
    prompt = torch.tensor(list(question.encode()))
    written = sample_tokens(model, prompt, WRITTEN, generator=torch.Generator(), temperature=0)
    return bytes(written).decode(errors="replace").partition("\n")[0]


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "metadata": {"version": 3.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | fields))


@pytest.fixture(scope="module", params=[("tokenformer", {}), ("mamba", {"pattern": "mamba+attention"})], ids=str)
def model(request: pytest.FixtureRequest) -> DecoderLM:
    preset, fields = request.param
    config = model_config(preset, vocab_size=256, **fields)
    return build(config, trained_like(config, dtype=torch.float32).params).eval()


@pytest.fixture(scope="module")
def places(model: DecoderLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a checkpoint, a folder with the tasks ``choose`` and ``write``, whose answers are right for some documents)"""
    folder = tmp_path_factory.mktemp("tasks")
    choose = [{"question": q, "choices": CHOICES, "answer": i % 3} for i, q in enumerate(QUESTIONS)]
    write_task(
        folder,
        "choose",
        choose,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    write = [{"question": q, "answer": greedy(model, q) if i % 2 else "other"} for i, q in enumerate(QUESTIONS)]
    write_task(
        folder,
        "write",
        write,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": WRITTEN, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "step"
    params = {name: p.detach() for name, p in model.named_parameters()}
    store.write(
        checkpoint, trained_like(model.config).__class__(model.config, params), Manifest(model.config, Progress())
    )
    return checkpoint, folder


def right(model: DecoderLM, questions: list[str]) -> float:
    found = [max(range(3), key=lambda i: log_likelihood(model, q, CHOICES[i])) for q in questions]
    return sum(choice == i % 3 for i, choice in enumerate(found)) / len(questions)


def test_the_scores_are_those_of_growkits_own_logits(model: DecoderLM, places: tuple[Path, Path]) -> None:
    checkpoint, tasks = places
    code, out, err = cli("eval", checkpoint, "--tasks", "choose,write", "--tasks-path", tasks, "--json")
    assert code == 0, err
    scores = {row["task"]: row for row in json.loads(out)["scores"]}
    assert set(scores) == {"choose", "write"}
    assert 0 < right(model, QUESTIONS) < 1, "a score that any model has would show nothing"
    assert scores["choose"]["value"] == pytest.approx(right(model, QUESTIONS))
    assert scores["write"]["value"] == pytest.approx(4 / 9), "greedy writing, in padded batches"
    assert (scores["choose"]["metric"], scores["choose"]["version"], scores["choose"]["documents"]) == ("acc", "3.0", 9)


def test_a_folder_gives_the_same_and_a_limit_is_kept(
    model: DecoderLM, places: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint, tasks = places
    assert cli("export", checkpoint, tmp_path / "out")[0] == 0
    code, out, err = cli("eval", tmp_path / "out", "--tasks", "choose", "--tasks-path", tasks, "--limit", "5")
    assert code == 0, err
    expected = right(model, QUESTIONS[:5])
    assert "choose" in out and "acc ↑" in out and f"{expected:.4f}" in out and " 5 " in out


def test_mistakes_are_named(places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tasks = places
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    of_tasks = ("--tasks", "choose", "--tasks-path", tasks)
    for words, code in (
        ((checkpoint, "--tasks", "choose", "--tasks-path", tmp_path / "nowhere"), "no-such-folder"),
        ((checkpoint, "--tasks", ",", "--tasks-path", tasks), "missing-key"),
        ((checkpoint, *of_tasks, "--data", "my.txt"), "bad-command-line"),
        ((checkpoint, "--limit", "3"), "bad-command-line"),
        ((tmp_path / "empty", *of_tasks), "not-a-checkpoint"),
        ((tmp_path / "nowhere", *of_tasks), "not-a-checkpoint"),
    ):
        status, out, err = cli("eval", *words)
        assert status == 2 and f"[{code}]" in err and not out, err
    (tasks / "choose.jsonl").rename(tasks / "gone")
    assert cli("export", checkpoint, tmp_path / "out")[0] == 0
    manager = check_tasks(["choose"], tasks)
    with pytest.raises(DataError) as caught:
        score_tasks(*load_folder(tmp_path / "out", "cpu"), ["choose"], manager)
    assert caught.value.code == "dataset-unavailable"
    (tasks / "gone").rename(tasks / "choose.jsonl")
    monkeypatch.setattr("growkit.errors.find_spec", lambda name: None if name == "lm_eval" else object())
    status, _, err = cli("eval", checkpoint, *of_tasks)
    assert status == 2 and "pip install 'growkit[tasks]'" in err and "lm_eval" in err


def test_an_unknown_task_is_answered_with_near_names(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in tasks are not read here, which takes long: a folder stands for them."""
    import lm_eval.tasks

    checkpoint, tasks = places
    whole = lm_eval.tasks.TaskManager

    def small(include_path: str | None = None, include_defaults: bool = True) -> Any:
        return whole(include_path=str(tasks), include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    status, out, err = cli("eval", checkpoint, "--tasks", "chose")
    assert status == 2 and not out
    assert "got 'chose'" in err and "did you mean choose?" in err and "[unknown-choice]" in err
