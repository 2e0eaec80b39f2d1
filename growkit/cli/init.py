"""``growkit init``: a commented recipe from a few answers. No torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from growkit.cli.recipes import write_new
from growkit.config.load import parse_recipe
from growkit.duration import Duration, quantity
from growkit.errors import ConfigError
from growkit.models.presets import PRESETS
from growkit.planner.plan import TOKENS_PER_PARAMETER
from growkit.registry import closest
from growkit.schedule.plan import growth_schedule
from growkit.schedule.stage import GrowthSchedule

# Shares of the FLOPs by number of stages: the small models cost little and do the steep part of the curve.
SHARES = {1: (100.0,), 2: (12.0, 88.0), 3: (3.0, 12.0, 85.0), 4: (2.0, 6.0, 20.0, 72.0)}


@dataclass(frozen=True)
class Size:
    """The model at the end, and how it is fed then."""

    width: int
    layers: int
    heads: int
    context: int
    batch_tokens: int
    lr: float

    @property
    def mlp_dim(self) -> int:
        return round(self.width * 8 / 3 / 32) * 32


SIZES = {
    "tiny": Size(128, 2, 4, 256, 2048, 1.5e-3),
    "small": Size(256, 4, 4, 512, 8192, 1e-3),
    "medium": Size(512, 8, 8, 1024, 65536, 6e-4),
    "large": Size(768, 12, 12, 1024, 262144, 6e-4),
}


@dataclass
class Answers:
    """What ``init`` asks; None: not answered yet."""

    data: str | None = None
    preset: str | None = None
    size: str | None = None
    budget: str | None = None
    stages: int | None = None


def write_recipe(target: Path, answers: Answers, *, ask: bool | None) -> None:
    """Writes the recipe that ``answers`` describe to ``target``; ``ask``: put the open questions to the terminal
    (None: if there is one). Nothing is written unless the recipe is sound. Raises ConfigError."""
    if target.exists():
        raise ConfigError("file-exists", "is already there", key="file", value=str(target), mend="name another file")
    if ask if ask is not None else sys.stdin.isatty():
        _ask(answers)
    text, schedule = recipe_text(
        data=answers.data or "stdlib",
        preset=answers.preset or "tokenformer",
        size=answers.size or "tiny",
        budget=answers.budget,
        stages=answers.stages or 3,
    )
    write_new(target, text, key="file")
    sizes = " → ".join(quantity(stage.model.num_params()) for stage in schedule.stages)
    typer.echo(f"wrote {target}: {sizes} parameters, {quantity(schedule.tokens)} tokens, {schedule.flops:.3g} FLOPs")
    data = answers.data or "stdlib"
    if not (data == "stdlib" or data.startswith("hf:") or Path(data).expanduser().exists()):
        typer.echo(f"note: {data} is not there yet")
    typer.echo(f"next: growkit plan {target}; growkit train {target}")


def _ask(answers: Answers) -> None:
    sizes = ", ".join(f"{name} ({quantity(_parameters(size))})" for name, size in SIZES.items())
    questions = {
        "data": ("Text to learn: a file, a folder, hf:NAME, or stdlib", "stdlib"),
        "preset": (f"Model family ({', '.join(PRESETS)})", "tokenformer"),
        "size": (f"Size at the end: {sizes}", "tiny"),
        "budget": ("Budget, such as '20M tokens' or '1e15 flops' (empty: 20 tokens a parameter)", ""),
        "stages": ("Stages, 1 to 4", 3),
    }
    for name, (question, default) in questions.items():
        if getattr(answers, name) is None:
            setattr(answers, name, typer.prompt(question, default=default, show_default=default != ""))


def _parameters(size: Size) -> int:
    """Of the TokenFormer of that size; the transformer has about as many."""
    text, _ = _model("tokenformer", size, 1)
    return parse_recipe(text, [], PRESETS, name="size").model.written_out().num_params()


def recipe_text(*, data: str, preset: str, size: str, budget: str | None, stages: int) -> tuple[str, GrowthSchedule]:
    """A commented recipe and the schedule it means. Raises ConfigError for an answer that is not one."""
    PRESETS.get(preset, key="--preset")
    if size not in SIZES:
        raise ConfigError("unknown-choice", "is not a size", key="--size", value=size, mend=closest(size, SIZES))
    if stages not in SHARES:
        raise ConfigError("out-of-range", f"must be 1 to {len(SHARES)}", key="--stages", value=stages)
    shape = SIZES[size]
    model, grows = _model(preset, shape, stages)
    head = f"""# {size} {preset}, grown in {stages} stage{"s" if stages > 1 else ""}
{model}
data:
{_line(f"  source: {_quoted(data)}", "a file, a folder, hf:NAME, or stdlib (Python's own)")}

optim:
{_line(f"  lr: {shape.lr:g}", "peak; the first thing to try other values of")}

stages:"""

    def whole(durations: list[str]) -> tuple[str, GrowthSchedule]:
        text = head + "".join(_stage(i, grows[i], durations[i], shape, stages) for i in range(stages))
        return text, growth_schedule(parse_recipe(text, [], PRESETS, name="the recipe"))

    _, one_step = whole(["1 steps"] * stages)
    last = one_step.last
    per_token = last.flops_per_step / last.global_batch_tokens
    if budget:
        wanted = Duration.parse(budget, key="--budget")
        flops = wanted.amount
        if wanted.unit != "flops":  # tokens and steps as the largest model would take them
            flops *= per_token * (last.global_batch_tokens if wanted.unit == "steps" else 1)
    else:
        flops = TOKENS_PER_PARAMETER * last.model.num_params() * per_token
    return whole([f"{flops * share / 100:.3g} flops".replace("e+", "e") for share in SHARES[stages]])


def _model(preset: str, size: Size, stages: int) -> tuple[str, list[dict[str, int]]]:
    """(the model section of the first stage, what each stage grows to)."""

    def projections(quarters: int) -> dict[str, int]:
        if preset == "tokenformer":
            return {"attention_tokens": size.width * quarters // 8, "mlp_tokens": size.width * quarters // 2}
        if preset == "mamba":
            return {"d_state": 4 * quarters}
        return {"mlp_dim": size.mlp_dim * quarters // 4}

    narrow, half, wide = (projections(quarters) for quarters in (1, 2, 4))
    shallow, deep = {"num_layers": max(1, size.layers // 2)}, {"num_layers": size.layers}
    chains: dict[int, list[dict[str, int]]] = {
        1: [{}],
        2: [{}, wide | deep],
        3: [{}, wide, deep],
        4: [{}, half, wide, deep],
    }
    first = (wide if stages == 1 else narrow) | (deep if stages == 1 else shallow)
    notes = {
        "attention_tokens": "parameter tokens of each of q, k, v and o",
        "mlp_tokens": "parameter tokens of the feed-forward block",
        "mlp_dim": "hidden units of the feed-forward block",
        "d_state": "states of each channel",
        "num_layers": "at first" if stages > 1 else "",
    }
    values: list[tuple[str, Any, str]] = [
        ("preset", preset, ""),
        ("embed_dim", size.width, "width of the residual stream"),
        ("num_heads", size.heads, ""),
        *((key, value, notes[key]) for key, value in first.items()),
    ]
    lines = [_line(f"  {key}: {value}", note) for key, value, note in values]
    return "\n".join(["model:", *lines, ""]), chains[stages]


def _stage(index: int, grow: dict[str, int], duration: str, size: Size, stages: int) -> str:
    last = index == stages - 1
    lines = [
        _line(f"  - name: stage-{index + 1}", ""),
        _line(f"    duration: {duration}", "or '20M tokens', '500 steps'" if index == 0 else ""),
    ]
    if grow:
        sizes = ", ".join(f"{key}: {value}" for key, value in grow.items())
        lines.append(_line(f"    grow: {{{sizes}}}", "sizes to reach, all knowledge kept"))
        lines.append(_line("    new_warmup: 2%", "of the new parameters' learning rate; the old ones go on"))
    if index == 0 or (last and stages > 1):
        context = size.context if last else size.context // 2
        lines.append(_line(f"    context_length: {context}", "tokens of a sequence"))
        lines.append(
            _line(f"    global_batch_tokens: {size.batch_tokens if last else size.batch_tokens // 2}", "a step")
        )
    if last:
        lines.append(_line("    decay: 40%", "the learning rate falls over the end"))
    return "\n" + "\n".join(lines) + "\n"


def _line(text: str, note: str) -> str:
    return f"{text:<35} # {note}" if note else text


def _quoted(text: str) -> str:
    """``text`` as YAML reads it back."""
    return "'" + text.replace("'", "''") + "'" if not text.replace("/", "").replace(".", "").isalnum() else text
