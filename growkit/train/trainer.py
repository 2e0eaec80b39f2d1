"""Lightning's Trainer as a stage of a run uses it: it executes, and owns no progress."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from growkit.config.recipe import Recipe, TrainerConfig
from growkit.data.stream import Batch
from growkit.train import hardware
from growkit.train.module import StageModule


def stage_trainer(recipe: Recipe, steps: int, accumulate: int, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer of ``steps`` optimizer steps, ``accumulate`` micro-batches each; logging, validation and checkpoints
    are the callbacks' affair."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they announce themselves at every stage
        logging.getLogger(name).setLevel(logging.ERROR)
    return L.Trainer(
        accelerator=hardware.accelerator(recipe.trainer),
        devices=recipe.trainer.devices,
        strategy=_strategy(recipe.trainer),
        # Under SLURM, Lightning would requeue by itself on SIGUSR1, write a pickle into its root folder and load what
        # lies there as hpc_ckpt_*. growkit saves and resumes, on a cluster as anywhere.
        plugins=[] if TorchElasticEnvironment.detect() else [LightningEnvironment()],
        default_root_dir=os.devnull,
        precision="bf16-mixed" if hardware.training_dtype(recipe.trainer) == torch.bfloat16 else "32-true",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=recipe.optim.clip_norm or None,
    )


def fit(trainer: L.Trainer, module: StageModule, batches: Iterable[Batch]) -> None:
    with warnings.catch_warnings():
        # An endless iterable needs neither workers nor a length; Lightning warns about both.
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(module, batches)


def _strategy(trainer: TrainerConfig) -> str | Strategy:
    if trainer.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=trainer.devices, tensor_parallel_size=1)
    return "auto" if trainer.strategy == "single" else trainer.strategy
