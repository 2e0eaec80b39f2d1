"""Mistakes in what is chosen of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growkit.checkpoint import manifest as manifests
from tests.bad_input.support import LAST, RUN, Arrange, Case, flip, reseal, train
from tests.support import cli


def select(name: str, words: str, key: str, code: str, value: str, mend: str, *more: str) -> Case:
    """A row for ``data.select``; ``key``: below it. ``more``: further overrides."""
    quoted = " ".join(f"'{override}'" for override in (f"data.select={{{words}}}", *more))
    return Case(name, f"train recipe.yaml run.name=new {quoted}", code, f"data.select.{key}", value, mend)


def arranged(case: Case, arrange: Arrange) -> Case:
    return Case(case.name, case.words, case.code, case.key, case.value, case.mend, arrange)


def _other_tokens(_: pytest.MonkeyPatch) -> None:
    reseal(corpus={"name": "corpus.txt", "sha256": "1", "tokenizer": "2"})(_)


def _of_a_task(_: pytest.MonkeyPatch) -> None:
    reseal(corpus={"name": "synthetic/induction", "sha256": "1"})(_)


def _damaged(_: pytest.MonkeyPatch) -> None:
    flip(next(Path(LAST).glob("params-*.safetensors")))


def _other_weights(_: pytest.MonkeyPatch) -> None:
    """A run whose reference has been trained on since."""
    choose = f"data.select={{kind: rho_1, reference: {LAST}}}"
    assert cli("train", "recipe.yaml", "run.name=chosen", choose)[0] == 0
    file = Path("runs/chosen/checkpoints/step-00000004/manifest.json")
    body = json.loads(file.read_bytes())["body"]
    body["corpus"]["reference"] = "0"
    file.write_bytes(manifests._seal(body))


REFERENCE = f"reference: {RUN}"
SELECT_CASES = [
    select("a kind there is not", "kind: loudest", "kind", "unknown-choice", "'loudest'", "importance"),
    select("a selection of no kind", f"{REFERENCE}", "kind", "missing-key", "is missing", "write kind"),
    select("a bandit beside", "kind: importance", "kind", "selection-does-not-fit", "'importance'", "data.bandit",
           "data.source=null", "data.mixture=[{source: corpus.txt}, {source: stdlib}]", "data.bandit={over: sources}"),
    Case("workers that run ahead", "train recipe.yaml run.name=new data.workers=2 'data.select={kind: importance}'",
         "workers-too-early", "data.workers", "data.select", "data.workers=0"),
    train("workers below none", "data.workers=-1", "too-small", "-1", "0"),
    train("nothing made ahead", "data.prefetch=0", "too-small", "0", "1"),
    select("a key of another kind", "kind: importance, keep: 0.5", "keep", "unused-key", "0.5", "smoothing"),
    select("rho without a reference", "kind: rho_1", "reference", "missing-key", "is missing", "checkpoint"),
    select("a reference that is not there", "kind: rho_1, reference: no", "reference", "reference-missing", "'no'",
           "hard-samples"),
    select("a reference that is a file", "kind: rho_loss, reference: corpus.txt", "reference", "reference-missing",
           "'corpus.txt'", "checkpoint"),
    Case("a reference that is no model", "train recipe.yaml run.name=new 'data.select={kind: rho_1, reference: runs}'",
         "not-a-checkpoint", "runs", "has no manifest.json", "run folder"),
    arranged(Case("a reference that is damaged",
                  f"train recipe.yaml run.name=new 'data.select={{kind: rho_1, reference: {LAST}}}'",
                  "damaged", "params-", "does not match", "earlier"), _damaged),
    select("a reference of a larger vocabulary", f"kind: rho_1, {REFERENCE}", "reference", "other-vocabulary",
           "a vocabulary of 256", "same tokenizer", "model.vocab_size=300"),
    select("a vocabulary that outgrows the reference", f"kind: rho_1, {REFERENCE}", "reference", "other-vocabulary",
           "stages.1", "same tokenizer", "stages.1.grow={vocab_size: 300}"),
    arranged(select("a reference of other tokens", f"kind: rho_1, reference: {LAST}", "reference", "other-tokenizer",
                    "step-00000004", "this tokenizer"), _other_tokens),
    arranged(select("a reference of no text", f"kind: rho_1, reference: {LAST}", "reference", "other-tokenizer",
                    "step-00000004", "this tokenizer"), _of_a_task),
    select("no token kept", f"kind: rho_1, keep: 0, {REFERENCE}", "keep", "out-of-range", "0.0", "at most 1"),
    select("more than all tokens kept", f"kind: rho_1, keep: 1.5, {REFERENCE}", "keep", "out-of-range", "1.5",
           "at most 1"),
    select("one candidate", f"kind: rho_loss, candidates: 1, {REFERENCE}", "candidates", "too-small", "1",
           "at least 2"),
    select("draws without a floor", "kind: importance, smoothing: 0", "smoothing", "out-of-range", "0.0", "above 0"),
    select("a temperature of zero", "kind: importance, temperature: 0", "temperature", "not-positive", "0.0", "above"),
    select("rows with padding compared", f"kind: rho_loss, {REFERENCE}", "kind", "selection-does-not-fit",
           "'rho_loss'", "documents", "data.packing=best_fit"),
    select("blocks of several sources", "kind: importance", "kind", "selection-does-not-fit", "'importance'",
           "one source", "data.source=null", "data.mixture=[{source: stdlib}]"),
    select("random draws in order", "kind: importance", "kind", "selection-does-not-fit", "'importance'",
           "drop data.shuffle", "data.shuffle=false"),
    select("blocks shorter than a row", "kind: importance", "kind", "selection-does-not-fit", "data.block_tokens=8",
           "16 or more", "data.block_tokens=8"),
    select("blocks that are cut", "kind: importance", "kind", "selection-does-not-fit", "how=reshape", "rechunk",
           "stages.0.context={schedule: linear, start: 8, how: reshape}"),
    select("twice too many lengths", f"kind: rho_loss, {REFERENCE}", "kind", "selection-does-not-fit", "6 lengths",
           "compile=false", "trainer.compile=true", "stages.0.context_length=64", "stages.0.global_batch_tokens=256",
           "stages.0.duration=40 steps", "stages.0.context={schedule: linear, start: 8}"),
    Case("a text of no whole block",
         "train recipe.yaml run.name=new data.select.kind=importance data.block_tokens=100000",
         "corpus-too-short", "data.source",
         "'corpus.txt'", "more text"),
    Case("a reference of other weights", "resume runs/chosen", "reference-changed", "data.select.reference",
         "step-00000004", "restore it", _other_weights),
    train("a task that is selected of", "data={source: synthetic/induction, select: {kind: importance}}",
          "not-for-a-task", "importance", "leave it", "data.select"),
]  # fmt: skip
