"""The LightningModule of one stage: a model, its loss, its optimizer with the moments it comes with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from growkit.checkpoint.reference import Reference
from growkit.config.recipe import Recipe
from growkit.data.stream import Batch
from growkit.growth.engine import added_entries
from growkit.growth.state import Moments, TrainState
from growkit.models.decoder import DecoderLM, build
from growkit.models.loss import TokenLoss
from growkit.models.spec import param_specs
from growkit.models.visible import visible
from growkit.optim.groups import param_groups
from growkit.optim.hold import HeldEntries
from growkit.schedule.lr import warmup_factor
from growkit.schedule.stage import Stage
from growkit.train.gain import PredictionGain
from growkit.train.selection import Selector


class StageModule(L.LightningModule):
    """Trains ``state`` through ``stage``; ``configure_model`` builds it, under the strategy's device mesh if any."""

    def __init__(
        self, state: TrainState, stage: Stage, recipe: Recipe, first_step: int, reference: Reference | None = None
    ) -> None:
        super().__init__()
        self.start, self.stage, self.recipe, self.stage_step = state, stage, recipe, first_step
        self.model: DecoderLM | None = None
        self.losses: list[Tensor] = []  # cross-entropy of the micro-batches of the current step
        self.gain: PredictionGain | None = None  # of every step, where a bandit wants to know
        self._norms: dict[str, Tensor] = {}  # of each parameter's gradient at the last step, before clipping
        self._held: HeldEntries | None = None
        self.lr = 0.0
        self.selector: Selector | None = None
        if (selection := stage.pace.selection) is not None:
            chunk, z_loss = recipe.trainer.loss_chunk_tokens, recipe.optim.z_loss
            self.selector = Selector(selection, reference, chunk_tokens=chunk, z_loss=z_loss)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        trainer = self.recipe.trainer
        model = build(
            self.start.config, self.start.params, backend=trainer.backend, checkpoint_layers=trainer.checkpoint_layers
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.stage.frozen)
        if self.device_mesh is not None:
            _shard(model, self.device_mesh["data_parallel"])
        if trainer.compile:
            # Graphs of an earlier stage are of another model, and count against the limit of what is compiled; a length
            # that comes a second time must find the graph that it had the first time, in a resumed run as well.
            torch.compiler.reset()
            model.compile(dynamic=False)
        self.model = model.train()

    def step_done(self) -> None:
        """Counts an optimizer step, and moves the ramp to the next one's: validation and samples see that, and what is
        saved goes on with it. Every process calls this."""
        assert self.model is not None
        self.stage_step += 1
        self.model.set_ramp(self.stage.ramp_at(self.stage_step))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.token_loss(batch) if self.gain is None else self.gain.before(batch)
        self.losses.append(loss.cross_entropy.detach() * batch.weight)
        return loss.total * batch.weight

    def token_loss(self, batch: Batch) -> TokenLoss:
        assert self.model is not None
        if self.selector is not None:
            return self.selector.loss(self.model, batch)
        loss: TokenLoss = self.model(
            batch.tokens,
            batch.targets,
            mask=visible(batch.tokens, batch.segments, batch.window),
            unscored=batch.unscored,
            z_loss=self.recipe.optim.z_loss,
            chunk_tokens=self.recipe.trainer.loss_chunk_tokens,
        )
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        optim = self.recipe.optim
        groups = param_groups(
            param_specs(self.start.config),
            self.start.born,
            self.stage.index,
            weight_decay=optim.weight_decay,
            decay_embedding=optim.decay_embedding,
            lr_scale=self.stage.lr_scale,
        )
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameters[name] for name in group.names],
                    "weight_decay": group.weight_decay,
                    "lr_scale": group.lr_scale,
                    "new": group.new,
                }
                for group in groups
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        for name in self.start.moments:
            optimizer.state[parameters[name]] = _optimizer_state(self.start.moments[name], parameters[name])
        if self.stage.held:
            self._held = HeldEntries(self._old_entries(parameters), optimizer)
        return optimizer

    def _old_entries(self, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Of the parameters of which some stand still, where (bool): what the stage's growth found there. A function of
        the schedule, so a resume in the middle of the stage finds the same."""
        added, old = added_entries(self.stage.links), {}
        for name in sorted(self.stage.held):
            parameter = parameters[name]
            still = ~added[name] if name in added else torch.ones(parameter.shape, dtype=torch.bool)
            old[parameter] = still.to(parameter.device)
        return old

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lr = self.stage.rate(self.stage_step)
        new = warmup_factor(self.stage_step, self.stage.new_warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"] * (new if group["new"] else 1.0)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        assert self.model is not None
        if self._held is not None:
            self._held.mask_gradients()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norms = torch._foreach_norm(list(gradients.values()))
        self._norms = dict(zip(gradients, norms, strict=True))
        if (limit := self.recipe.optim.clip_norm) > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, _total(norms))

    def gradient_norms(self) -> tuple[dict[str, float], float | None]:
        """Of the last step, before clipping: the norm over each component, and the share of the squared norm in
        parameters born in this stage (None if none were). Every process must call this."""
        specs, born, stage = param_specs(self.start.config), self.start.born, self.stage.index
        parts: dict[str, list[Tensor]] = {}
        for name, norm in self._norms.items():
            parts.setdefault(specs[name].component, []).append(norm)
        norms = {part: float(_full(_total(members))) for part, members in parts.items()}
        new = [norm for name, norm in self._norms.items() if stage and born.get(name, 0) == stage]
        total = math.hypot(*norms.values())
        return norms, float(_full(_total(new))) ** 2 / total**2 if new and total > 0 else None

    def current_state(self) -> TrainState:
        """The state now; tensors are the live ones (sharded ones as they are), not copies."""
        assert self.model is not None
        if isinstance(self.model, FSDPModule):  # a forward pass without a backward pass leaves the root gathered
            self.model.reshard()
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        params = {name: p.detach() for name, p in self.model.named_parameters()}
        moments = {}
        for name, p in self.model.named_parameters():
            if state := optimizer.state.get(p):
                moments[name] = Moments(state["exp_avg"], state["exp_avg_sq"], float(state["step"]))
        return TrainState(self.model.config, params, moments, self.start.born)

    def release(self) -> None:
        """Lets go of every tensor. Trainer and module refer to each other, so they stay until some later collection;
        growth needs their memory before."""
        self.trainer.strategy.optimizers = []
        self._held = None
        self.model, self.start = None, TrainState(self.start.config, {})


def _total(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all from the norm of each."""
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def full_state(state: TrainState) -> TrainState:
    """Copies on the CPU, sharded tensors gathered one at a time (every process must call this)."""
    params = {name: _full(tensor) for name, tensor in state.params.items()}
    moments = {name: Moments(_full(m.exp_avg), _full(m.exp_avg_sq), m.step) for name, m in state.moments.items()}
    return TrainState(state.config, params, moments, state.born)


def _full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


def _shard(model: DecoderLM, mesh: Any) -> None:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _optimizer_state(moments: Moments, parameter: nn.Parameter) -> dict[str, Tensor]:
    def place(tensor: Tensor) -> Tensor:
        if isinstance(parameter, DTensor):
            return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        return tensor.detach().to(parameter.device, copy=True)

    return {
        "step": torch.tensor(moments.step, dtype=torch.float32, device=parameter.device),
        "exp_avg": place(moments.exp_avg),
        "exp_avg_sq": place(moments.exp_avg_sq),
    }
