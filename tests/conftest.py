"""One thread per process: results do not depend on the machine's core count, and processes do not fight for cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
