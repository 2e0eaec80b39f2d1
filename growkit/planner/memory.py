"""What a stage holds in memory: on each device in training, in the process at growth. No torch here.

The figures follow train/run.py: a stage is tried, trained, validated and copied to the CPU; then the next one grows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from growkit.config.recipe import Recipe
from growkit.models.spec import ParamSpec, param_specs
from growkit.ops.tiling import PROVEN
from growkit.planner.activations import FLOAT, Pass
from growkit.planner.passes import evaluation_peak, layer_traces, loss_peak, scored_layers, trace
from growkit.schedule.stage import GrowthSchedule, Stage

MOMENTS = 2 * FLOAT  # bytes of AdamW's two moments of one entry
ELEMENTWISE = ("gain", "bias", "conv", "a_log", "skip")  # roles of parameters that no product reads
FLOAT64 = 8
# Multiprocessors of a GPU, for the work space of the scan's spans: an H200's. Others have up to twice as many, and need
# up to 80 MB more where few sequences of few channels are gone through.
PROCESSORS = 132
VALIDATION_ROWS = 32  # windows of a validation's forward pass: eval/validate.py, ROWS
GRADIENT_TOKENS = 32  # of the probe, for the gradients of a certificate: growth/verify.py
PART_BYTES = 8 << 20  # of a linear map's weights, converted at a time: growth/logits.py, PART_BYTES
HELD_BYTES = 64 << 20  # signs that a certificate holds in memory: growth/gradients.py, HELD_BYTES


@dataclass(frozen=True)
class StageMemory:
    """Bytes. The first four are one device's at the peak of a training step; ``step`` is their sum.

    ``trial``: peak of the first step's trial on the device; ``validation``: of a validation. ``growth``: in the
    process, while the state grows into this stage and is certified. ``host``: the most the process holds in CPU memory
    in this stage, growth included; where the CPU is what trains, that is everything.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    trial: float
    validation: float
    growth: float
    host: float
    on_cpu: bool

    @property
    def step(self) -> float:
        return self.weights + self.gradients + self.moments + self.activations

    @property
    def device(self) -> float:
        """The most that one device must hold."""
        return self.host if self.on_cpu else max(self.step, self.trial, self.validation)


@dataclass(frozen=True)
class _Held:
    """Entries in a stage's state. ``moments``: those that come with moments into it; ``trained``: those it updates.
    ``kept``: bytes of the old entries, and of their moments, that are put back after every step, and their places."""

    parameters: float
    moments: float
    trained: float
    kept: float

    @property
    def start(self) -> float:
        return self.parameters * FLOAT + self.moments * MOMENTS


def stage_memories(recipe: Recipe, schedule: GrowthSchedule, *, bf16: bool, cuda: bool) -> Iterator[StageMemory]:
    """The memory of each stage in turn."""
    old = param_specs(schedule.start_model)
    # A checkpoint that an extended run starts from brings the moments of everything.
    with_moments = frozenset(old) if recipe.start is not None else frozenset()
    for stage in schedule.stages:
        specs = param_specs(stage.model)
        frozen = stage.frozen
        with_moments &= specs.keys()
        held = _Held(
            parameters=sum(spec.numel for spec in specs.values()),
            moments=sum(specs[name].numel for name in with_moments),
            trained=sum(spec.numel for name, spec in specs.items() if name not in frozen),
            kept=sum(
                old[name].numel * (FLOAT + (MOMENTS if name in with_moments else 0)) + specs[name].numel
                for name in stage.held
            ),
        )
        states = held.start  # what the process holds when the stage is tried
        growth = 0.0
        if stage.links:
            states, growth = _growth(recipe, stage, old, with_moments)
        after = with_moments | (specs.keys() - frozen)
        lasting = sum(specs[name].numel for name in after) * MOMENTS
        yield _stage(recipe, stage, held, lasting, states, growth, bf16=bf16, cuda=cuda)
        old, with_moments = specs, frozenset(after)


def _stage(
    recipe: Recipe,
    stage: Stage,
    held: _Held,
    moments: float,
    states: float,
    growth: float,
    *,
    bf16: bool,
    cuda: bool,
) -> StageMemory:
    trainer, devices = recipe.trainer, recipe.trainer.devices
    sharded = devices if trainer.strategy == "fsdp" else 1
    weights, gradients = held.parameters * FLOAT, held.trained * FLOAT
    elementwise: Counter[int | None] = Counter()
    layers: Counter[int | None] = Counter()
    for spec in param_specs(stage.model).values():
        layers[spec.layer] += spec.numel
        if spec.role in ELEMENTWISE or spec.component == "stream":
            elementwise[spec.layer] += spec.numel

    micro_batch = Pass(
        rows=stage.micro_batch_size,
        context=stage.context_length,
        bf16=bf16,
        cuda=cuda,
        triton=takes_kernels(recipe, cuda=cuda),
        processors=PROCESSORS if cuda else 1,
    )

    def passes(adds_gradients: bool) -> tuple[float, float]:
        """Most bytes beside weights and moments: on the way to the loss (gradients apart), and back."""
        at = dataclasses.replace(
            micro_batch,
            checkpoint_layers=trainer.checkpoint_layers,
            chunk_tokens=trainer.loss_chunk_tokens,
            z_loss=recipe.optim.z_loss > 0,
            adds_gradients=adds_gradients,
        )
        both = trace(stage.model, at, elementwise)
        return both.forward.peak, both.forward.change + both.backward.peak

    frozen = weights - gradients  # the passes book a gradient for everything
    if devices > 1:
        # Gradients are there all the time: buckets they are summed in (ddp), or shards with whole ones passing.
        forward, backward = passes(adds_gradients=True)
        beyond = max(forward, backward) + (gradients if trainer.strategy == "ddp" else _gathered(layers))
        peak = gradients / sharded + beyond
    elif stage.accumulate > 1:
        forward, backward = passes(adds_gradients=True)
        peak = gradients + max(forward, backward)
    else:  # the gradients of a step live until the next one's backward pass begins
        forward, backward = passes(adds_gradients=False)
        peak = max(gradients + forward, backward - frozen, gradients)
    base = (weights + moments) / sharded + held.kept
    scored = stage.context_length - unscored(stage.context_length)
    windows = max(1, recipe.monitor.validation_tokens // scored)
    rows = min(VALIDATION_ROWS, windows)
    at = dataclasses.replace(micro_batch, rows=rows)
    validation = base + gradients / sharded + evaluation_peak(stage.model, at, several=windows >= 2 * rows)
    copies = weights + moments  # of the state, on the CPU, when the stage is over
    trial = 0.0
    if devices == 1:
        forward, backward = passes(adds_gradients=False)
        trial = weights + held.parameters * MOMENTS + max(forward, backward - frozen) + (weights if cuda else 0.0)
    if cuda:
        host = max(growth, held.start + copies)
    else:
        copied = base + gradients / sharded + copies
        host = max(growth, states + trial, held.start + max(base + peak, validation, copied))
        if stage.trials:  # what the stage began with waits while its candidates are trained
            host = max(host, states + max(base + peak, validation))
    return StageMemory(
        weights=weights / sharded,
        gradients=gradients / sharded,
        moments=moments / sharded,
        activations=peak - gradients / sharded + held.kept,
        trial=trial,
        validation=validation,
        growth=growth,
        host=host,
        on_cpu=not cuda,
    )


def takes_kernels(recipe: Recipe, *, cuda: bool) -> bool:
    """Whether the ops run as Triton's kernels: ops/dispatch.py."""
    return recipe.trainer.backend == "triton" or (recipe.trainer.backend == "auto" and cuda and PROVEN)


def unscored(context_length: int) -> int:
    """Targets of a validation's window that are only context: eval/validate.py, unscored."""
    return context_length // 8


def _gathered(layers: Mapping[int | None, float]) -> float:
    """What FSDP holds besides its shards: the root's weights, those of two layers, a layer's gradients twice."""
    largest = max((size for layer, size in layers.items() if layer is not None), default=0.0)
    return FLOAT * (layers[None] + 4 * largest)


def _growth(
    recipe: Recipe, stage: Stage, old: Mapping[str, ParamSpec], with_moments: frozenset[str]
) -> tuple[float, float]:
    """(the states before and after, those and the certificate's work) in bytes of CPU memory. A parameter that keeps
    its axes keeps its tensors. The certificate holds parts of one layer of each kind in float64 beside both residual
    streams, and one layer at a time in float32 with its gradients, over fewer tokens; then also logits before and
    after, in two precisions, the stream at every layer and the signs of earlier gradients, a byte for each entry
    (growth/gradients.py)."""
    specs = param_specs(stage.model)
    before = sum(spec.numel * (FLOAT + (MOMENTS if name in with_moments else 0)) for name, spec in old.items())
    made = {name: spec.numel for name, spec in specs.items() if name not in old or old[name].axes != spec.axes}
    new = sum(size * (FLOAT + (MOMENTS if name in with_moments else 0)) for name, size in made.items())
    context = stage.context_length
    rows = max(1, recipe.monitor.probe_tokens // context)
    model = dataclasses.replace(stage.model, dropout=0.0)
    read = Pass(rows=rows, context=context)
    at = Pass(rows=min(rows, max(1, GRADIENT_TOKENS // context)), context=min(context, GRADIENT_TOKENS))
    logits = read.tokens * model.vocab_size * FLOAT64  # of one model; all are three times that
    signs = sum(made.values())
    signs = signs if signs <= HELD_BYTES else 0  # of more they are in a file
    blocks = model.stream.blocks if model.stream is not None else 1
    streams = len(model.layers) * at.wide(blocks * model.embed_dim)
    sizes, kept = Counter[int | None](), Counter[int | None]()
    for name, spec in specs.items():
        sizes[spec.layer] += spec.numel
        kept[spec.layer] += 0 if name in made else spec.numel  # without a gradient
    head = model.vocab_size * model.parts * model.embed_dim * FLOAT
    work = loss_peak(model, at) + (0.0 if kept[None] else head)
    for layer in model.layers:
        passes = layer_traces(layer, model, at)
        weights = (sizes[layer.id] - kept[layer.id]) * FLOAT
        work = max(work, weights + passes.forward.change + passes.backward.peak)
    named = (one for one in (*old.items(), *specs.items()) if one[1].layer is not None)
    places: dict[tuple[str, tuple[int, ...]], int] = {}  # growth/gradients.py, Room
    for name, spec in named:
        if spec.role == "weight" and len(spec.shape) == 2:  # of a linear map, a few rows at a time
            rows_of = min(spec.shape[0], max(1, PART_BYTES // (FLOAT * spec.shape[1])))
            places["part", (rows_of, spec.shape[1])] = rows_of * spec.shape[1]
        else:
            places[name.split(".", 2)[2], spec.shape] = spec.numel
    wide = sum(places.values()) * FLOAT64 + 2 * scored_layers(model, read)
    passing = max(spec.numel for spec in specs.values()) * FLOAT  # one tensor's copy while it is looked at
    wide += read.tokens * blocks * model.embed_dim * FLOAT64  # the other model's stream, gone through beside
    return before + new, before + new + passing + max(3 * logits + signs + streams + work, wide)
