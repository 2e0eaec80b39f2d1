"""Whether kernels are interpreted is fixed when they are loaded, so files ``interpreted_*.py`` have a process of their
own: ``test_interpreter.py`` starts it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_scan.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if not (file_path.name.startswith("interpreted_") and parent.session.isinitpath(file_path)):
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(f"{file_path.name} runs in Triton's interpreter: set TRITON_INTERPRET=1")
    return None  # pytest itself collects a file that is named


@pytest.fixture
def poisoned() -> Iterator[None]:
    """``torch.empty`` is full of NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
