"""From a recipe to what each stage does, in numbers: the growth schedule. No torch here.

Everything that can be wrong with a recipe is found here, before a run folder exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from growkit.config.recipe import BYTES, SYNTHETIC, DataConfig, Recipe, StageConfig, StartConfig
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.growth.path import grown_config, path
from growkit.models.config import ModelConfig, from_json, is_masked
from growkit.models.spec import param_specs
from growkit.optim.groups import OLD_ENTRIES, check_selector, is_part, require_some
from growkit.schedule.arms import arms_of, check_bandit
from growkit.schedule.candidates import check_choosing, check_outcomes, planned_stage
from growkit.schedule.checks import at_least, blamed, check_sections, whole_steps
from growkit.schedule.curriculum import CONSTANT, HOW, Pace, Rising, curricula
from growkit.schedule.decisions import Decision, end_of
from growkit.schedule.lr import LRSchedule
from growkit.schedule.pieces import check_pieces
from growkit.schedule.selection import Selection, check_block, check_stage, selection_of
from growkit.schedule.stage import GrowthSchedule, Stage
from growkit.schedule.strides import check_strides
from growkit.schedule.until import trigger_of

MOST_TOKENS = 2**62  # of a stage: positions in the data are 64-bit integers
SCHEDULES = ("wsd", "cosine", "constant")


def growth_schedule(recipe: Recipe, decisions: Iterable[Decision] = ()) -> GrowthSchedule:
    """The schedule a recipe means, after what the run has decided. Raises ConfigError for whatever cannot be carried
    out."""
    decisions = tuple(decisions)
    check_sections(recipe)
    check_bandit(recipe)
    check_choosing(recipe)
    schedule = _schedule(recipe, decisions)
    check_outcomes(schedule, lambda made: _schedule(recipe, made), decisions)
    return schedule


def _schedule(recipe: Recipe, decisions: tuple[Decision, ...]) -> GrowthSchedule:
    start = recipe.start or StartConfig()
    first: ModelConfig = (
        recipe.model.written_out() if recipe.start is None else from_json(start.model, key="start.model")
    )
    model = first
    _check_vocabulary(recipe.data, model)
    selection = selection_of(recipe)
    if not recipe.stages:
        raise ConfigError("no-stages", "is empty", key="stages", mend="write at least one stage with name and duration")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) != len(names):
        mend = "give every stage a name of its own"
        raise ConfigError("duplicate-name", "two stages have the same name", key="stages", value=names, mend=mend)
    stages: list[Stage] = []
    for position, config in enumerate(recipe.stages):
        stage = planned_stage(
            config,
            f"stages.{position}",
            start.stage + position,
            decisions,
            lambda one: _stage(recipe, one, position, start, model, stages, selection),  # noqa: B023
        )
        ended = end_of(decisions, stage.index)
        stages.append(stage if ended is None else dataclasses.replace(stage, steps=ended))
        model = stages[-1].model_at(stages[-1].steps)
    following: list[Stage | None] = [*stages[1:], None]
    for position, (stage, after) in enumerate(zip(stages, following, strict=True)):
        if (trigger := trigger_of(recipe, position, stage, after)) is not None and stage.steps == stage.lr.steps:
            stages[position] = dataclasses.replace(stage, until=trigger)
    _find_parts(recipe, stages)
    _check_graphs(recipe, stages)
    _check_lengths(recipe, stages)
    check_pieces(recipe, stages)
    check_strides(recipe, stages)
    own, longest = recipe.data.block_tokens, max(stage.context_length for stage in stages)
    block = own if own is not None else longest
    save_every = whole_steps(recipe.trainer.save_every, "trainer.save_every")
    at_least(block, 1, "data.block_tokens")
    if selection is not None:
        check_block(selection, block, longest)
    return GrowthSchedule(tuple(stages), block, save_every, start, first)


def _check_vocabulary(data: DataConfig, model: ModelConfig) -> None:
    """Raises ConfigError when the data are a task that cannot be, or the model lacks some of their tokens. A tokenizer
    other than bytes is asked when it is loaded."""
    if (data.source or "").startswith(SYNTHETIC) or data.task:
        from growkit.data.synthetic.tasks import task_of  # numpy, which a plan of text does without

        task = task_of(data)
        assert task is not None, "settings without a task are refused"
        task.require_room(model.vocab_size)
    elif model.vocab_size < 256 and data.tokenizer == BYTES:
        mend = "data.tokenizer is bytes: use 256 or more"
        raise ConfigError(
            "vocab-too-small", "cannot hold a byte", key="model.vocab_size", value=model.vocab_size, mend=mend
        )


def _check_lengths(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a stage whose sequences, or the shortest of them, are too short for the task."""
    if (recipe.data.source or "").startswith(SYNTHETIC):
        from growkit.data.synthetic.tasks import task_of

        task = task_of(recipe.data)
        assert task is not None
        for position, (config, stage) in enumerate(zip(recipe.stages, stages, strict=True)):
            name = "context_length" if config.context is None else "context.start"
            task.require_length(min(stage.lengths.values), f"stages.{position}.{name}")


def _check_graphs(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a run that torch.compile would compile more often than is allowed."""
    graphs, most = sum(stage.graphs for stage in stages), at_least(recipe.trainer.most_graphs, 1, "trainer.most_graphs")
    if recipe.trainer.compile and graphs > most:
        each = ", ".join(f"{stage.name} {stage.graphs}" for stage in stages)
        problem = f"is less than the {graphs} graphs that torch.compile makes, one for each length ({each})"
        mend = f"raise it to {graphs}, use fewer stages or lengths (context.most_lengths), or trainer.compile=false"
        raise ConfigError("too-many-graphs", problem, key="trainer.most_graphs", value=most, mend=mend)


def _find_parts(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ConfigError for a part of a layer in optim.lr_scale that no stage's model has."""
    for selector in filter(is_part, recipe.optim.lr_scale):
        specs = {name: spec for stage in stages for name, spec in param_specs(stage.model).items()}
        require_some([selector], "optim.lr_scale", specs, {}, 0)


def _stage(
    recipe: Recipe,
    config: StageConfig,
    position: int,
    start: StartConfig,
    model: ModelConfig,
    before: Sequence[Stage],
    selection: Selection | None,
) -> Stage:
    key, index, optim = f"stages.{position}", start.stage + position, recipe.optim
    last = before[-1] if before else None
    if config.grow and last is None and recipe.start is None:
        mend = "set the sizes in model, and grow from the second stage on"
        raise ConfigError("grow-at-start", "has nothing to grow from", key=f"{key}.grow", value=config.grow, mend=mend)
    with blamed(key):
        target = grown_config(model, config.grow, config.methods)
        links = tuple(path(model, target, config.methods))
    inherited = last or start
    context = _settle(config.context_length, inherited.context_length, f"{key}.context_length")
    batch = _settle(config.global_batch_tokens, inherited.global_batch_tokens, f"{key}.global_batch_tokens")
    if batch % context:
        mend = f"use a multiple of {context}, such as {max(1, round(batch / context)) * context}"
        problem = f"is not a multiple of context_length = {context}"
        raise ConfigError("batch-not-whole", problem, key=f"{key}.global_batch_tokens", value=batch, mend=mend)
    rows, world = batch // context, recipe.trainer.devices
    micro = config.micro_batch_size if config.micro_batch_size is not None else max(1, rows // world)
    at_least(micro, 1, f"{key}.micro_batch_size")
    if rows % (micro * world):
        mend = f"a step has {rows} sequences: micro_batch_size × trainer.devices must divide that"
        problem = f"× {world} devices does not divide the {rows} sequences of a step"
        raise ConfigError("batch-not-whole", problem, key=f"{key}.micro_batch_size", value=micro, mend=mend)
    grows, opens = curricula(config, key, context, f"{recipe.run.seed}/{index}")
    accumulate = rows // (micro * world)
    arms = arms_of(recipe, config.context)
    how, constant = (grows.how, grows.constant) if grows else (HOW[0], CONSTANT[0])
    again = 1 / accumulate if arms else 0.0  # the first micro-batch of each process, after the update
    pace = Pace(target, rows, context, rows // micro, how, constant, selection, again)
    full = Rising((0,), (context,))
    flops = pace.step_flops(context)
    duration = Duration.parse(config.duration, key=f"{key}.duration")
    steps = pace.steps(duration, (lambda whole: grows.lengths(whole, pace)) if grows else full)
    if steps * batch > MOST_TOKENS:
        mend = f"a step is {batch} tokens and {flops:.3g} FLOPs: ask for fewer"
        problem = "is more than can be counted"
        raise ConfigError("bad-duration", problem, key=f"{key}.duration", value=config.duration, mend=mend)
    if steps < 1:
        mend = f"a step is {batch} tokens and {flops:.3g} FLOPs: ask for at least one"
        raise ConfigError(
            "empty-stage", "is less than one step", key=f"{key}.duration", value=config.duration, mend=mend
        )
    lengths = grows.require(steps, pace) if grows else full
    if selection is not None:
        check_stage(selection, key, target, context, how, len(lengths.values), recipe.trainer.compile)
    windows = opens.require(steps, pace, full) if opens else None

    def span(text: str, name: str) -> int:
        return pace.steps(Duration.parse(text, key=f"{key}.{name}", share=True), lengths, steps)

    def fall(text: str) -> int:
        return pace.last_steps(Duration.parse(text, key=f"{key}.decay", share=True), lengths, steps, optim.lr_by)

    ramp_steps = max(1, span(config.grow_time, "grow_time")) if is_masked(target) else 0
    if ramp_steps > steps:
        mend = f"the stage has {steps} steps, and the next one starts from the whole model"
        problem = f"is {ramp_steps} steps, longer than the stage"
        raise ConfigError("ramp-too-long", problem, key=f"{key}.grow_time", value=config.grow_time, mend=mend)
    for selector in config.freeze:
        check_selector(selector, f"{key}.freeze")
    stage = Stage(
        index=index,
        name=config.name,
        model=target,
        links=links,
        methods=dict(config.methods),
        context_length=context,
        global_batch_tokens=batch,
        micro_batch_size=micro,
        accumulate=accumulate,
        steps=steps,
        lr=_lr(recipe, config, position, steps, last, span, fall),
        new_warmup_steps=span(config.new_warmup, "new_warmup"),
        ramp_steps=ramp_steps,
        freeze=tuple(config.freeze),
        lr_scale=_lr_scale(recipe, config, key),
        validate_every=None if config.validate_every is None else span(config.validate_every, "validate_every") or None,
        flops_per_step=flops,
        pace=pace,
        lengths=lengths,
        windows=windows,
        lr_by=optim.lr_by,
        grown_by_hand=frozenset(start.new) if last is None else frozenset(),
        arms=arms,
    )
    _check_freeze(recipe, stage, key, by_hand=last is None and (start.by_hand or bool(start.new)))
    parts = [selector for selector in config.lr_scale if is_part(selector)]
    require_some(parts, f"{key}.lr_scale", param_specs(target), stage.born, index)
    return stage


def _check_freeze(recipe: Recipe, stage: Stage, key: str, *, by_hand: bool) -> None:
    """Raises ConfigError for a freeze that cannot be carried out. ``by_hand``: the stage goes on from a growth that its
    links do not hold."""
    key, specs, value = f"{key}.freeze", param_specs(stage.model), list(stage.freeze)
    require_some(stage.freeze, key, specs, stage.born, stage.index)
    if OLD_ENTRIES in stage.freeze:
        if by_hand:
            problem = "asks which entries are old, which a model that was grown by hand does not say"
            mend = "grow it in this stage, or freeze whole parameters (old)"
            raise ConfigError("no-old-entries", problem, key=key, value=value, mend=mend)
        if recipe.trainer.strategy == "fsdp":
            problem = "freezes parts of tensors, which trainer.strategy=fsdp cuts up"
            mend = "use trainer.strategy=ddp, or freeze whole parameters (old)"
            raise ConfigError("no-old-entries", problem, key=key, value=value, mend=mend)
    added = stage.held and stage.model.num_params() > stage.links[0].source.num_params()
    if stage.frozen | (frozenset() if added else stage.held) == specs.keys():
        mend = "leave something to train, or leave the stage out"
        if stage.enlarged and not stage.held:
            mend += f"; {OLD_ENTRIES} freezes all but what this stage adds to old parameters"
        raise ConfigError("all-frozen", "freezes every parameter", key=key, value=value, mend=mend)


def _lr(
    recipe: Recipe,
    config: StageConfig,
    position: int,
    steps: int,
    last: Stage | None,
    span: Callable[[str, str], int],
    fall: Callable[[str], int],
) -> LRSchedule:
    key = f"stages.{position}"
    if config.schedule not in SCHEDULES:
        mend = f"allowed: {', '.join(SCHEDULES)}"
        raise ConfigError(
            "unknown-choice", "is not a schedule", key=f"{key}.schedule", value=config.schedule, mend=mend
        )
    peak = config.lr if config.lr is not None else last.lr.peak if last else recipe.optim.lr
    if not peak > 0:
        raise ConfigError("not-positive", "must be above zero", key=f"{key}.lr", value=peak)
    if not 0 <= config.min_lr_ratio <= 1:
        raise ConfigError("out-of-range", "must be in [0, 1]", key=f"{key}.min_lr_ratio", value=config.min_lr_ratio)
    rise, down = _lr_spans(recipe, config, position)
    warmup, decay = span(rise, "warmup"), fall(down)
    decay = decay if config.schedule == "wsd" else 0
    if warmup + decay > steps:
        mend = f"the stage has {steps} steps"
        problem = f"warm-up ({warmup} steps) and decay ({decay} steps) are longer than the stage"
        raise ConfigError("lr-too-long", problem, key=f"{key}.warmup", value=config.warmup, mend=mend)
    start = last.rate(last.steps - 1) if last else recipe.start.lr if recipe.start else 0.0
    return LRSchedule(config.schedule, start, peak, peak * config.min_lr_ratio, steps, warmup, decay)


def _lr_spans(recipe: Recipe, config: StageConfig, position: int) -> tuple[str, str]:
    """How long warm-up and decay of a stage are, as durations."""
    warmup, decay = "2%" if position == 0 else "0%", "20%" if position == len(recipe.stages) - 1 else "0%"
    return warmup if config.warmup is None else config.warmup, decay if config.decay is None else config.decay


def _lr_scale(recipe: Recipe, config: StageConfig, key: str) -> dict[str, float]:
    """The recipe's factors and the stage's, multiplied where they name the same."""
    factors: dict[str, float] = {}
    for where, scale in (("optim", recipe.optim.lr_scale), (key, config.lr_scale)):
        for selector, factor in scale.items():
            if check_selector(selector, f"{where}.lr_scale") == OLD_ENTRIES:
                problem, mend = "is for freeze: a tensor has one learning rate", "scale new, old or components"
                raise ConfigError("bad-selector", problem, key=f"{where}.lr_scale", value=selector, mend=mend)
            at_least(factor, 0, f"{where}.lr_scale.{selector}")
            factors[selector] = factors.get(selector, 1.0) * factor
    return factors


def _settle(own: int | None, inherited: int | None, key: str) -> int:
    value = own if own is not None else inherited
    if value is None:
        raise ConfigError("missing-key", "is missing", key=key, mend="the first stage must say it")
    return at_least(value, 1, key)


def settled(recipe: Recipe, schedule: GrowthSchedule) -> Recipe:
    """The recipe with every inherited value of its stages written out, as it is saved with a run."""
    stages = []
    undecided = False  # from the first choice on, how many steps a stage has depends on what is chosen
    for position, (config, stage) in enumerate(zip(recipe.stages, schedule.stages, strict=True)):
        undecided = undecided or bool(config.candidates)
        warmup, decay = _lr_spans(recipe, config, position)
        stages.append(
            dataclasses.replace(
                config,
                context_length=stage.context_length,
                global_batch_tokens=stage.global_batch_tokens,
                micro_batch_size=stage.micro_batch_size,
                lr=stage.lr.peak,
                warmup=warmup if undecided else f"{stage.lr.warmup_steps} steps",
                decay=decay if undecided else f"{stage.lr.decay_steps} steps",
            )
        )
    data = dataclasses.replace(recipe.data, block_tokens=schedule.block_tokens)
    return dataclasses.replace(recipe, stages=stages, data=data)
