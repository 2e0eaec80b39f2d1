"""Steps of batches made ahead by processes of their own, in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from growkit.data.stream import Batch, Batches


@dataclass
class InWorkers:
    """``batches``, the same ones in the same order, made by ``workers`` processes, ``prefetch`` steps ahead each. What
    a batch is follows from the state before it, and that state from the one before without making its rows: worker w
    makes every step w, w + workers, ... and passes over the others."""

    batches: Batches
    workers: int
    prefetch: int

    def __iter__(self) -> Iterator[Batch]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # how many there are is the user's choice
            loader = DataLoader(
                _Steps(self.batches),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch,
                collate_fn=_as_it_is,
                multiprocessing_context="fork",  # the corpus stays mapped; it would be copied into others
                generator=torch.Generator(),  # its seeds; from torch's own they would move what dropout draws
            )
            steps = iter(loader)
        for step in steps:
            yield from step


class _Steps(IterableDataset[list[Batch]]):
    """In a worker: the steps that are its own. DataLoader takes one of each worker in turn."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        assert info is not None
        first, workers, mine = self.batches.first_step, info.num_workers, info.id
        return self.batches.steps(lambda step: (step - first) % workers == mine)


def _as_it_is(step: list[Batch]) -> list[Batch]:
    return step
