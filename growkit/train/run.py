"""A run: stage after stage of one growth schedule, each a ``Trainer.fit``, growth between them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growkit.checkpoint import sharded, store
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.metrics_log import MetricsLog, Record
from growkit.checkpoint.run_folder import RunFolder
from growkit.checkpoint.store import Checkpoint
from growkit.config.load import to_yaml
from growkit.config.recipe import Recipe
from growkit.data.corpus import Corpus
from growkit.data.importance import DrawnBlocks
from growkit.data.stream import Batches
from growkit.data.workers import InWorkers
from growkit.eval.generate import sample_text
from growkit.eval.ngram import ngram_bits_per_byte
from growkit.eval.validate import target_bytes, target_positions
from growkit.growth.engine import GrowthReport, grow
from growkit.growth.state import TrainState
from growkit.models.config import unmasked
from growkit.models.decoder import build, init_params
from growkit.schedule.decisions import Decision
from growkit.schedule.plan import growth_schedule
from growkit.schedule.progress import Progress
from growkit.schedule.stage import GrowthSchedule, Stage
from growkit.train import blocks, hardware
from growkit.train.callback import AfterStep, StopRequest
from growkit.train.candidates import choose
from growkit.train.choices import Choices
from growkit.train.data import RunData
from growkit.train.gain import PredictionGain
from growkit.train.module import StageModule, full_state
from growkit.train.trainer import fit, stage_trainer
from growkit.train.trial import fitting_micro_batch

log = logging.getLogger(__name__)
WHERE = ("stage", "step", "tokens", "flops")  # of the run, in every record of its log


class Run:
    """Everything a run holds between steps. ``checkpoint``: where to go on from; None starts afresh. ``schedule``: by
    the decisions in it, and changed by those that are made.

    ``listeners``: called with every record of the metrics log (display, loggers).
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: GrowthSchedule,
        folder: RunFolder,
        data: RunData,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.recipe, self.schedule, self.folder, self.data = recipe, schedule, folder, data
        self.device = hardware.accelerator(recipe.trainer)
        self.dtype = hardware.training_dtype(recipe.trainer)
        self.world_size, self.rank = recipe.trainer.devices, hardware.process_rank()
        self.stop = StopRequest()
        self.stopping = False  # decided after every step, by all processes together
        self.started = time.monotonic()
        self._seconds_before = checkpoint.manifest.seconds if checkpoint is not None else 0.0
        self.source = data.source(recipe, schedule)
        self.peak_flops = recipe.monitor.peak_flops_per_second or hardware.measure_peak_flops(self.device, self.dtype)
        self.lineage: list[dict[str, Any]] = []
        self.cuda_rng: Tensor | None = None
        if checkpoint is None:
            generator = torch.Generator().manual_seed(recipe.run.seed)
            torch.manual_seed(recipe.run.seed + self.rank)
            self.state = TrainState(schedule.start_model, init_params(schedule.start_model, generator))
            self.progress = Progress()
            self.rng = torch.get_rng_state()
            rewind = 0
        else:
            self._restore(checkpoint)
            rewind = checkpoint.manifest.log_bytes
        self.first_step = self.progress.step
        self.table = self.source.table if isinstance(self.source, DrawnBlocks) else None
        if self.table is not None:
            stored = dict(self.progress.data)
            self.table.begin(self.progress.step, stored.pop("table", None))
            self.progress = dataclasses.replace(self.progress, data=stored)
        first = self.rank == 0  # the one process that writes the log
        self.log = MetricsLog(folder.metrics if first else Path(os.devnull), rewind_to=rewind if first else None)

    def _restore(self, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        self.data.require_same(manifest.corpus)
        self.state = checkpoint.state.materialized()
        self.progress = manifest.progress
        self.lineage = [dict(entry) for entry in manifest.lineage]
        now = hardware.environment(self.device, self.dtype, self.world_size)
        different = [
            f"{key} {manifest.environment.get(key)} → {now[key]}"
            for key in now
            if manifest.environment.get(key) != now[key]
        ]
        if different and manifest.environment:
            log.warning("resuming will not be bitwise exact, since this changed: %s", ", ".join(different))
        if self.rank < len(manifest.rng):
            self.rng = store.rng_from_hex(manifest.rng[self.rank])
            if self.device == "cuda" and self.rank < len(manifest.cuda_rng):
                self.cuda_rng = store.rng_from_hex(manifest.cuda_rng[self.rank])
        else:  # more processes than before: what dropout draws starts anew
            self.rng = torch.Generator().manual_seed(self.recipe.run.seed + self.rank + self.progress.step).get_state()

    def train(self) -> bool:
        """Runs what is left of the schedule. True when it is done, False when it was asked to stop (and saved)."""
        self.stop.install()
        try:
            corpus = self.data.corpus
            if (
                corpus is not None
                and self.recipe.monitor.ngram_order
                and self.progress.step == self.schedule.start.step
            ):
                self._score_ngram(corpus)
            while True:
                stage = self.schedule.stage(self.progress.stage)
                if self.progress.stage_step < stage.steps:
                    if stage.trials:
                        decision = choose(self, stage)
                        if decision is None:  # nothing is written yet: it is tried again
                            self.stopping = True
                            return False
                        self.decide(decision)
                        stage = self.schedule.stage(stage.index)
                    self._enter(stage)
                    self._fit(stage)
                    stage = self.schedule.stage(stage.index)  # which may have been ended
                    if self.stopping and self.progress.stage_step < stage.steps:
                        return False
                if stage is self.schedule.last:
                    return True
                if self.stopping:
                    return False
                self.progress = dataclasses.replace(
                    self.progress, stage=stage.index + 1, stage_step=0, micro_batch_size=None
                )
        finally:
            self.stop.restore()
            self.log.close()

    def asked_to_stop(self) -> bool:
        """Whether this process got a signal or ran out of its time limit."""
        limit = self.recipe.trainer.max_minutes
        return self.stop.signal is not None or (limit is not None and time.monotonic() - self.started > 60 * limit)

    @property
    def stop_cause(self) -> str:
        """Why ``train`` returned False."""
        if self.stop.signal is not None:
            return signal.Signals(self.stop.signal).name
        return "trainer.max_minutes" if self.world_size == 1 else "trainer.max_minutes, or a signal to another process"

    @property
    def seconds(self) -> float:
        """Wall clock of the run's training so far; the time between a stop and a resume is not part of it."""
        return self._seconds_before + time.monotonic() - self.started

    def accumulate(self, stage: Stage) -> int:
        micro = self.progress.micro_batch_size or stage.micro_batch_size
        return stage.accumulate * stage.micro_batch_size // micro

    def record(self, kind: str, **values: Any) -> None:
        """One line of the metrics log, stamped with where the run is."""
        if self.rank == 0:
            at = self.progress
            where: Record = {name: getattr(at, name) for name in WHERE}
            self.log.write({"kind": kind} | where | {"seconds": round(self.seconds, 3)} | values)

    def decide(self, decision: Decision) -> None:
        """Writes down what was decided, and goes on with the schedule that follows from it."""
        flops, made = self.progress.flops + decision.probe_flops, (*self.progress.decisions, decision)
        self.progress = dataclasses.replace(self.progress, flops=flops, decisions=made)
        self.schedule = growth_schedule(self.recipe, self.progress.decisions)
        values = dataclasses.asdict(decision)
        self.lineage.append({"kind": "decision"} | values)
        self.record("decision", **{key: value for key, value in values.items() if key not in WHERE})

    def _enter(self, stage: Stage) -> None:
        """Grows into ``stage`` if the state is not there yet, after trying that the larger model fits."""
        if self.progress.stage_step == 0:
            grown, report = self.grown(stage)
            size = self.micro_batch(grown, stage)
            if size != stage.micro_batch_size:
                log.warning("memory is short: micro-batches of %d instead of %d", size, stage.micro_batch_size)
                self.progress = dataclasses.replace(self.progress, micro_batch_size=size)
            self.state = grown
            self.record(
                "stage",
                name=stage.name,
                parameters=stage.model.num_params(),
                context_length=stage.context_length,
                global_batch_tokens=stage.global_batch_tokens,
                planned_steps=stage.steps,
                **({} if stage.until is None else {"at_most": True}),
            )
            if report is not None:
                self._record_growth(stage, report)

    def micro_batch(self, state: TrainState, stage: Stage) -> int:
        """That fits into memory; as planned with several processes, which would have to agree on it."""
        if self.world_size > 1:
            return stage.micro_batch_size
        return fitting_micro_batch(state, stage, self.recipe, self.device, self.dtype, self.data.reference)

    def grown(self, stage: Stage) -> tuple[TrainState, GrowthReport | None]:
        """The state as ``stage`` begins with it, and what growing it did, if it grew; the state itself stays."""
        if (state := dataclasses.replace(self.state, config=unmasked(self.state.config))).config == stage.model:
            return state, None
        digest = hashlib.sha256(f"growth/{self.recipe.run.seed}/{stage.index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        probe = self.data.probe(stage.context_length, self.recipe.monitor.probe_tokens)
        return grow(self.state, stage.model, stage.methods, generator, probe, stage=stage.index, dtype=self.dtype)

    def _record_growth(self, stage: Stage, report: GrowthReport) -> None:
        event = report.record()
        self.lineage.append(
            {"kind": "growth", "stage": stage.index, "name": stage.name, "step": self.progress.step} | event
        )
        self.record("growth", name=stage.name, **event)

    def _fit(self, stage: Stage) -> None:
        remaining = stage.steps - self.progress.stage_step
        module = StageModule(self.state, stage, self.recipe, self.progress.stage_step, self.data.reference)
        choices = None
        if stage.arms is not None:
            choices = Choices(self.recipe, stage, self.progress)
            # The tokens of one micro-batch as planned, in as many as memory has made of it.
            parts = self.accumulate(stage) // stage.accumulate
            module.gain = PredictionGain(module.token_loss, parts, compiled=self.recipe.trainer.compile)
        after = AfterStep(self, module, choices, last_step=stage.steps)
        trainer = stage_trainer(self.recipe, remaining, self.accumulate(stage), [after])
        batches = Batches(
            self.source,
            self.progress.data or self.source.begin(),
            stage.shape if choices is None else choices.shape,
            self.progress.stage_step,
            self.accumulate(stage),
            rank=self.rank,
            world_size=self.world_size,
            candidates=stage.candidates,
            before=self._before_draws(),
        )
        workers, prefetch = self.recipe.data.workers, self.recipe.data.prefetch
        fit(trainer, module, InWorkers(batches, workers, prefetch) if workers else batches)
        self.stop.install()
        self.state = full_state(module.current_state())
        module.release()

    def _before_draws(self) -> Callable[[int], None] | None:
        """Tells the table of losses which step of the run the rows of a stage's step are for."""
        table, begun = self.table, self.progress.step - self.progress.stage_step
        return None if table is None else lambda stage_step: table.settle(begun + stage_step)

    def learn(self, module: StageModule) -> dict[str, Tensor]:
        """Puts the losses of the step just done, of all processes, into the table; returns what there is to say of
        it."""
        assert self.table is not None and module.selector is not None
        blocks, losses, weights = self._rows_of_all(module.selector.rows_done()).unbind(-1)
        self.table.learn(self.progress.step - 1, blocks.long().numpy(), losses.float().numpy())
        size = weights.sum().square() / (len(weights) * weights.square().sum())
        said = {"effective_rows": size, "seen_blocks": torch.tensor(self.table.seen)}
        return {name: value.to(module.device) for name, value in said.items()}

    def _rows_of_all(self, mine: Tensor) -> Tensor:
        """What every process has of its rows (micro-batches, rows, values), in the order in which they were drawn."""
        shares = [mine]
        if self.world_size > 1:
            shares = [torch.empty_like(mine) for _ in range(self.world_size)]
            torch.distributed.all_gather(shares, mine)
        return torch.stack(shares, dim=1).flatten(0, 2).cpu()

    def scores(self, module: StageModule) -> dict[str, float]:
        """What the held-out data say of the model, over all processes."""
        assert module.model is not None
        context, wanted = module.stage.context_length, self.recipe.monitor.validation_tokens
        share = {"rank": self.rank, "world_size": self.world_size}
        with torch.compiler.set_stance("force_eager"):  # not compiled for every shape that only a validation has
            sums = self.data.score_sums(module.model, context, wanted, autocast=self._autocast(), **share)
        sums = sums.to(module.device)
        sums = module.trainer.strategy.reduce(sums, reduce_op="sum") if self.world_size > 1 else sums
        return self.data.scores(sums, context, wanted)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _look_at_blocks(self, module: StageModule) -> None:
        """Logs how the layers of an AltUp stream use its blocks."""
        assert module.model is not None
        stage, links = module.stage, module.stage.links
        probe = self.data.probe(stage.context_length, self.recipe.monitor.probe_tokens)
        share = blocks.new_share(module.model, links[0].source) if links else None
        with torch.compiler.set_stance("force_eager"), self._autocast():
            figures = blocks.measure(module.model, probe[:, :-1].to(module.device))
        self.record("blocks", new_block_grad_share=share, **figures)

    def validate(self, module: StageModule, *, end: bool) -> None:
        """Logs what the held-out data say of the model."""
        scores = self.scores(module)
        self.record(
            "validation",
            **scores,
            context_length=module.stage.context_length,
            end_of_stage=end,
            name=module.stage.name,
        )
        if module.stage.model.stream is not None:
            self._look_at_blocks(module)
        if end:
            kept = {key: value if math.isfinite(value) else None for key, value in scores.items()}
            self.lineage.append(
                {
                    "kind": "stage",
                    "stage": module.stage.index,
                    "name": module.stage.name,
                    "step": self.progress.step,
                    "tokens": self.progress.tokens,
                    "flops": self.progress.flops,
                    "validation_loss": kept.pop("loss"),
                }
                | kept
            )

    def sample(self, module: StageModule) -> None:
        """Logs what the model writes after the prompt; what dropout and the data draw is left as it is."""
        assert module.model is not None and self.data.corpus is not None
        monitor, model = self.recipe.monitor, module.model
        if self.recipe.trainer.strategy != "fsdp":  # not the compiled one, which would be compiled for every length
            params = {name: parameter.detach() for name, parameter in model.named_parameters()}
            model = build(model.config, params, copy=False, backend=self.recipe.trainer.backend)
        text = sample_text(
            model,
            monitor.sample_prompt,
            monitor.sample_tokens,
            tokenizer=self.data.corpus.tokenizer,
            seed=self.recipe.run.seed,
        )
        self.record("sample", name=module.stage.name, prompt=monitor.sample_prompt, text=text)

    def _score_ngram(self, corpus: Corpus) -> None:
        """Of bytes, whatever the tokenizer: on the same text, and on the bytes behind the tokens that are scored."""
        order = self.recipe.monitor.ngram_order
        last = self.schedule.last
        wanted = self.recipe.monitor.validation_tokens
        targets = target_positions(corpus.validation, last.context_length, wanted)
        places = target_bytes(corpus.validation_ends, targets)
        score = ngram_bits_per_byte(corpus.train_text, corpus.validation_text, places, order)
        self.record("ngram", order=order, bits_per_byte=score)

    def save(self, state: TrainState) -> Path:
        """Writes the checkpoint of the current step, and drops those no longer kept."""
        at = self.progress
        folder = self.folder.checkpoint(at.step)
        data = at.data if self.table is None else {**at.data, "table": self.table.state_at(at.step)}
        manifest = Manifest(
            model=state.config,
            progress=dataclasses.replace(at, data=data),
            recipe=to_yaml(self.recipe),
            lineage=tuple(self.lineage),
            rng=self._of_all(self.rng),
            cuda_rng=self._of_all(self.cuda_rng) if self.cuda_rng is not None else (),
            corpus=self.data.record,
            log_bytes=self.log.sync() if self.rank == 0 else 0,
            seconds=self.seconds,
            environment=hardware.environment(self.device, self.dtype, self.world_size),
        )
        if self.recipe.trainer.strategy == "fsdp":
            sharded.write(folder, state, manifest)
        elif self.rank == 0:
            store.write(folder, state, manifest)
        if self.rank == 0:
            ends = {entry["step"] for entry in self.lineage if entry["kind"] == "stage"}
            self.folder.prune(self.recipe.trainer.keep_last, ends)
        return folder

    def _of_all(self, rng: Tensor) -> tuple[str, ...]:
        """The random state of every process, by rank, hex."""
        states = [rng]
        if self.world_size > 1:
            states = [torch.empty_like(rng, device=self.device) for _ in range(self.world_size)]
            torch.distributed.all_gather(states, rng.to(self.device))
        return tuple(store.rng_to_hex(state.cpu()) for state in states)
