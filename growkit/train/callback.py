"""What happens after every optimizer step, in this order: count, log, validate, save, stop."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from growkit import faults
from growkit.data.stream import Batch, joined, padding
from growkit.errors import TrainingError
from growkit.eval.ngram import bits
from growkit.train import hardware
from growkit.train.choices import Choices
from growkit.train.module import StageModule
from growkit.train.watch import Watch

if TYPE_CHECKING:
    from growkit.train.run import Run


class StopRequest:
    """SIGTERM and SIGINT ask the run to save and stop at the next step; a second one takes the system's way."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over; called again inside ``fit``, since Lightning installs handlers of its own there."""
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.signal(number, self._handle)
            self._before.setdefault(number, previous)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None:  # a user who asks twice wants out now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


class AfterStep(L.Callback):
    """Drives a stage: everything here happens between optimizer steps, so that any of it can be resumed from."""

    def __init__(self, run: Run, module: StageModule, choices: Choices | None, *, last_step: int) -> None:
        self.run, self.module, self.choices, self.last_step = run, module, choices, last_step
        self.watch = Watch(run, module.stage) if module.stage.until is not None else None
        self._window_start, self._window_tokens, self._window_flops = 0.0, 0, 0.0
        self._losses: list[tuple[int, torch.Tensor]] = []  # of every step since the last log
        self._selected: dict[str, torch.Tensor] = {}  # what there is to say of what the last step trained on

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.run.stop.install()
        torch.set_rng_state(self.run.rng)  # building a stage must not move what dropout draws
        if self.run.cuda_rng is not None:
            torch.cuda.set_rng_state(self.run.cuda_rng)
        self._window_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, _: L.LightningModule, __: Any, batch: Batch, batch_idx: int
    ) -> None:
        run, module = self.run, self.module
        stage = module.stage
        if (batch_idx + 1) % run.accumulate(stage):
            return
        if module.stage_step == 0 and stage.links:
            faults.point("first_step_after_growth")
        length = batch.tokens.shape[1]  # what a bandit chose is in no schedule
        tokens, flops = stage.pace.shape(length).tokens, stage.pace.step_flops(length)
        data, gain = batch.state, 0.0
        if self.choices is not None:
            assert module.gain is not None and module.model is not None
            gain = module.gain.after(trainer, module.model)
            self.choices.learned(module.stage_step, batch, gain, flops)
            data = self.choices.add_to(data)
        module.step_done()
        self._window_tokens += tokens
        self._window_flops += flops
        done = run.progress
        run.progress = dataclasses.replace(
            done,
            stage_step=module.stage_step,
            step=done.step + 1,
            tokens=done.tokens + tokens,
            flops=done.flops + flops,
            data=data,
        )
        self._losses.append((run.progress.step, torch.stack(module.losses).mean()))
        module.losses = []
        if module.selector is not None:
            self._selected = run.learn(module) if run.table is not None else module.selector.step_done()
        end = module.stage_step == self.last_step
        run.stopping = run.asked_to_stop()
        if run.world_size > 1:  # a signal may reach one process only; all must save and stop at the same step
            run.stopping = trainer.strategy.reduce_boolean_decision(run.stopping, all=False)
        saving = end or run.progress.step % run.schedule.save_every == 0 or run.stopping
        regular = run.progress.step % run.recipe.monitor.log_every == 0
        if saving or regular:
            loss = self._log(trainer, batch, gain)
            if self.watch is not None and regular and not end:  # what a save or a stop logs is not in every run's log
                end = self.watch.ends_here(trainer.strategy, loss)
                saving = saving or end
        if end or (stage.validate_every and module.stage_step % stage.validate_every == 0):
            self._outside(lambda: run.validate(module, end=end))
        if end and run.recipe.monitor.sample_tokens and run.data.corpus is not None:
            self._outside(lambda: run.sample(module))
        if saving:
            run.rng = torch.get_rng_state()
            run.cuda_rng = torch.cuda.get_rng_state() if run.device == "cuda" else None
            self._outside(lambda: run.save(module.current_state()))
        if run.stopping or end:
            trainer.should_stop = True

    def _log(self, trainer: L.Trainer, batch: Batch, gain: float) -> float:
        """The loss of the step, over all processes. ``batch``: the last of it; ``gain``: what it taught, where there
        are choices. Raises TrainingError when the loss is not finite."""
        run, module = self.run, self.module
        window, self._losses = self._losses, []
        loss = float(trainer.strategy.reduce(window[-1][1], reduce_op="mean"))
        norms, new_share = module.gradient_norms()
        norm = math.hypot(*norms.values())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            first = next((step for step, value in window if not value.isfinite()), run.progress.step)
            steps = run.folder.steps()
            raise TrainingError(
                "not-finite",
                f"loss {loss}, gradient norm {norm}, not finite since step {first}",
                key=f"stages.{module.stage.index}",
                mend=f"last good checkpoint: {run.folder.checkpoint(steps[-1]) if steps else 'none'}; try a lower "
                "optim.lr, a longer warmup, optim.clip_norm, optim.z_loss=1e-4 or trainer.precision=fp32",
            )
        seconds = time.perf_counter() - self._window_start
        rate, flops_rate = self._window_tokens / seconds, self._window_flops / seconds
        run.record(
            "step",
            loss=loss,
            bits_per_byte=bits(loss, self._bytes_per_token(batch)),
            lr=module.lr,
            grad_norm=norm,
            grad_norms=norms,
            new_grad_share=new_share,
            tokens_per_second=rate,
            flops_per_second=flops_rate,
            utilisation=flops_rate / (run.peak_flops * run.world_size),
            memory_bytes=hardware.peak_memory_bytes(run.device),
            **{name: float(trainer.strategy.reduce(said, reduce_op="mean")) for name, said in self._selected.items()},
            **module.stage.moving(module.stage_step - 1, batch.tokens.shape[1]),
            **(self.choices.record(batch, gain) if self.choices is not None else {}),
            **({} if (padded := padding(run.progress.data)) is None else {"padding": padded}),
            **({} if (tails := joined(run.progress.data)) is None else {"joined_tokens": tails}),
        )
        self._window_start, self._window_tokens, self._window_flops = time.perf_counter(), 0, 0.0
        return loss

    def _bytes_per_token(self, batch: Batch) -> float:
        """Of what the step was drawn from: one source, or all by their weights."""
        data = self.run.data
        if batch.source is None or data.corpus is None:
            return data.bytes_per_token
        return data.corpus.parts[batch.source].bytes_per_token

    def _outside(self, work: Callable[[], Any]) -> None:
        """Runs ``work`` without charging its time to the throughput."""
        paused = time.perf_counter()
        work()
        self._window_start += time.perf_counter() - paused
