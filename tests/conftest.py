"""One thread per process: results do not depend on the machine's core count, and processes do not fight for cores.
Property tests draw the same examples every time, and a slow machine does not fail them."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("growkit", derandomize=True, database=None, deadline=None)
settings.load_profile("growkit")
