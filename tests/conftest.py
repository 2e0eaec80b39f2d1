"""One thread per process: results do not depend on the machine's core count, and processes do not fight for cores.
Property tests draw the same examples every time, and a slow machine does not fail them. What is kept from one start to
the next lies in a folder of this run of the tests, not in the home of who runs them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("growkit", derandomize=True, database=None, deadline=None)
settings.load_profile("growkit")

os.environ["HF_HUB_OFFLINE"] = "1"  # where there is no hub, a name on it would be asked for again and again

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of the process that started them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="growkit-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Files of a minute or more go first, or the last of them would run alone while the other process has nothing left.
LONG = (
    "test_growth_contract.py",
    "test_distributed.py",
    "test_resume.py",
    "test_loggers.py",
    "test_code_blocks.py",
    "test_mistakes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
