"""Where a model comes from: its stages and growths, the run it was branched from, and the runs branched from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import MARK, RunFolder
from growkit.errors import CheckpointError
from growkit.eval.ngram import bits
from growkit.report.history import History, finite, number
from growkit.schedule.decisions import decided

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Growth:
    """``links``: operator and method of each step of the chain. ``delta_logits``: largest absolute change of a logit,
    in float64; None without a certificate."""

    links: tuple[str, ...]
    parameters_before: float | None
    parameters_after: float | None
    exact: bool | None
    delta_logits: float | None

    @classmethod
    def of(cls, record: Record) -> Growth:
        links = tuple(f"{link.get('operator')} ({link.get('method')})" for link in record.get("links") or ())
        certificate = record.get("certificate") or {}
        before, after = finite(number(record.get("parameters_before"))), finite(number(record.get("parameters_after")))
        delta = finite(number(certificate.get("max_delta_logits_float64")))
        return cls(links, before, after, certificate.get("exact"), delta)


@dataclass(frozen=True)
class Stage:
    """Where a stage ended (or is now, if it has not ``ended``): step, tokens, FLOPs, and its last validation.
    ``decided``: what the run decided in it, a sentence each."""

    index: int
    name: str
    parameters: float | None
    context_length: float | None
    growth: Growth | None = None
    step: float | None = None
    tokens: float | None = None
    flops: float | None = None
    bits_per_byte: float | None = None
    ended: bool = False
    decided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Node:
    """A run (or a checkpoint) in the tree. ``from_step``: where it left the run above it. ``here``: it was asked for.
    ``missing``: why a relative's stages are not shown, if they are not: its folder may have been moved or deleted."""

    name: str
    stages: tuple[Stage, ...] = ()
    from_step: float | None = None
    here: bool = False
    missing: str = ""
    branches: tuple[Node, ...] = ()


def stages_of(history: History) -> tuple[Stage, ...]:
    """The stages a log knows of, the last one perhaps unfinished."""
    stages: dict[Any, Stage] = {}
    for event in history.events:
        index = event.get("stage")
        if event["kind"] == "stage":
            size, context = finite(number(event.get("parameters"))), finite(number(event.get("context_length")))
            stages[index] = Stage(
                index if isinstance(index, int) else len(stages), str(event.get("name", "")), size, context
            )
        elif event["kind"] == "growth" and index in stages:
            stages[index] = replace(stages[index], growth=Growth.of(event))
        elif event["kind"] == "validation" and index in stages:
            score, ended = finite(number(event.get("bits_per_byte"))), event.get("end_of_stage") is True
            stages[index] = replace(stages[index], bits_per_byte=score, ended=ended, **_place(event))
    for event in history.kind("decision"):
        if (at := event.get("stage")) in stages:
            stages[at] = replace(stages[at], decided=(*stages[at].decided, decided(event)))
    if stages:
        last = list(stages)[-1]
        if not stages[last].ended:
            stages[last] = replace(stages[last], **_place(history.place))
    return tuple(stages.values())


def stages_of_manifest(manifest: Manifest) -> tuple[Stage, ...]:
    """The stages in a checkpoint's lineage; what a checkpoint grew into without training is a stage of no steps."""
    stages: dict[int, Stage] = {}
    parameters: float | None = None
    for entry in manifest.lineage:
        index, name = int(number(entry.get("stage"))), str(entry.get("name", ""))
        if entry.get("kind") == "growth":
            growth = Growth.of(entry)
            parameters = growth.parameters_after
            for before in stages:
                if stages[before].parameters is None:
                    stages[before] = replace(stages[before], parameters=growth.parameters_before)
            stages[index] = Stage(index, name, parameters, None, growth)
        elif entry.get("kind") == "stage":
            stage = stages.get(index, Stage(index, name, parameters, None))
            score = finite(number(entry.get("bits_per_byte", bits(number(entry.get("validation_loss"))))))
            stages[index] = replace(stage, bits_per_byte=score, ended=True, **_place(entry))
    at = manifest.progress
    if at.stage not in stages and (at.stage_step or not stages):
        stages[at.stage] = Stage(at.stage, f"stage {at.stage + 1}", parameters, None)
    if at.stage in stages and not stages[at.stage].ended:
        stages[at.stage] = replace(stages[at.stage], step=at.step, tokens=at.tokens, flops=at.flops)
    for entry in manifest.lineage:
        if entry.get("kind") == "decision" and (index := int(number(entry.get("stage")))) in stages:
            stages[index] = replace(stages[index], decided=(*stages[index].decided, decided(entry)))
    final = max(stages)
    stages[final] = replace(stages[final], parameters=manifest.model.num_params())
    return tuple(stages.values())


def tree(folder: RunFolder, *, history: History | None = None) -> Node:
    """The whole family of the run at ``folder``: from its first known parent down to every branch in the same folder
    of runs. ``history``: of ``folder``, if it has been read already. Raises CheckpointError if its log is damaged."""
    here = folder.path.resolve()
    family = _family(here.parent)
    known = {here.name: history} if history is not None else {}
    return _node(_top(here.name, family), family, known, here.name, None, frozenset())


def forest(place: Path) -> tuple[Node, ...]:
    """The families of all runs in the folder ``place``; none of them is ``here``."""
    family = _family(place)
    tops = dict.fromkeys(_top(name, family) for name in family)
    return tuple(_node(top, family, {}, "", None, frozenset()) for top in tops)


def _family(place: Path) -> dict[str, RunFolder]:
    return {path.parent.name: RunFolder(path.parent) for path in sorted(place.glob(f"*/{MARK}"))}


def _top(name: str, family: Mapping[str, RunFolder]) -> str:
    """The first known parent's parent's ... name."""
    top, seen = name, {name}
    while (above := _parent(family.get(top))) is not None and above not in seen:
        top = above
        seen.add(top)
    return top


def _parent(folder: RunFolder | None) -> str | None:
    parent = folder.parent if folder is not None else None
    return None if parent is None or not isinstance(parent.get("run"), str) else parent["run"]


def _node(
    name: str,
    family: Mapping[str, RunFolder],
    known: Mapping[str, History],
    here: str,
    from_step: float | None,
    above: frozenset[str],
) -> Node:
    stages: Sequence[Stage] = ()
    missing = "" if name in family else "its folder is not beside"
    if name in family:
        try:
            stages = stages_of(known[name] if name in known else History.read(name, family[name].metrics))
        except CheckpointError as error:
            if name == here:
                raise
            missing = f"its log is {error.code.removesuffix('-log')}"
        manifest = family[name].last_manifest()
        if manifest is not None and stages and stages[0].index > 0:  # extends a checkpoint that came without a log
            before = [stage for stage in stages_of_manifest(manifest) if stage.index < stages[0].index]
            stages = [*before, *stages]
    branches = []
    for child, folder in family.items():
        if _parent(folder) == name and child != name and child not in above:
            step = finite(number((folder.parent or {}).get("step")))
            branch = _node(child, family, known, here, step, above | {name})
            if stages:  # a branch's log begins with its parent's, and these are shown here
                own = [stage for stage in branch.stages if stage.step is None or stage.step > (step or 0)]
                branch = replace(branch, stages=tuple(own))
            branches.append(branch)
    return Node(name, tuple(stages), from_step, name == here, missing, tuple(branches))


def _place(record: Record) -> dict[str, Any]:
    return {key: finite(number(record.get(key))) for key in ("step", "tokens", "flops")}
