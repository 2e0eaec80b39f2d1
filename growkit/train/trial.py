"""Trying a model's first step before committing to it: when memory is short, the micro-batch shrinks."""

from __future__ import annotations

import torch

from growkit.checkpoint.reference import Reference
from growkit.config.recipe import Recipe
from growkit.errors import TrainingError
from growkit.growth.state import TrainState
from growkit.models.decoder import build
from growkit.models.visible import visible
from growkit.schedule.stage import Stage


def fitting_micro_batch(
    state: TrainState,
    stage: Stage,
    recipe: Recipe,
    device: str,
    dtype: torch.dtype,
    reference: Reference | None = None,
) -> int:
    """The largest divisor of the planned micro-batch size, by halving, whose forward and backward pass fits beside the
    optimizer's moments and the reference that chooses what is trained on, if one does. Random state and ``state`` stay
    as they were. Raises TrainingError if one row does not fit."""
    size = stage.micro_batch_size
    with torch.random.fork_rng():
        while True:
            try:
                _try(state, stage, recipe, device, dtype, reference, size)
                return size
            except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a bare one
                if not _out_of_memory(error):
                    raise
            if size == 1 or size % 2:
                raise TrainingError(
                    "out-of-memory",
                    f"a step does not fit into memory with {size} sequence(s) at once",
                    key=f"stages.{stage.index}.micro_batch_size",
                    value=stage.micro_batch_size,
                    mend="use trainer.checkpoint_layers=true, trainer.loss_chunk_tokens, or a smaller target",
                )
            size //= 2


def _try(
    state: TrainState,
    stage: Stage,
    recipe: Recipe,
    device: str,
    dtype: torch.dtype,
    reference: Reference | None,
    rows: int,
) -> None:
    trainer = recipe.trainer
    params = {name: tensor.to(device) for name, tensor in state.params.items()}
    model = build(stage.model, params, backend=trainer.backend, checkpoint_layers=trainer.checkpoint_layers).train()
    moments = [torch.empty_like(p).fill_(0) for p in model.parameters() for _ in range(2)]
    tokens = torch.zeros(rows, stage.context_length, dtype=torch.int64, device=device)  # no shape has more of them
    mask = visible(tokens, None, stage.shape(0).window)
    passes = {"chunk_tokens": trainer.loss_chunk_tokens, "z_loss": recipe.optim.z_loss}
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if reference is not None:
            with torch.no_grad():
                reference.model.to(device)(tokens, tokens, mask=mask, each=True, **passes)
        loss = model(tokens, tokens, mask=mask, **passes).total
    loss.backward()
    del moments


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text
