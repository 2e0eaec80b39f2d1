"""Which keys a query sees, where that is not simply all up to its own.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(tokens_BT: Tensor, segments_BT: Tensor | None, window: int | None) -> Tensor | None:
    """(B or 1, 1, T, T), bool: those of the query's own document (``segments_BT``: equal numbers are one) and of the
    last ``window`` positions, its own among them. None: all up to its own, which attention has a faster path for."""
    length = tokens_BT.shape[1]
    window = None if window is None or window >= length else window
    if segments_BT is None and window is None:
        return None
    at = torch.arange(length, device=tokens_BT.device)
    age = at[:, None] - at
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    if segments_BT is None:
        return seen[None, None]
    return (seen & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]
