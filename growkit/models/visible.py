"""Which keys a query sees, where that is not simply all up to its own.

Legend: B rows, T tokens, H query heads, G kv heads, d head_dim.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Visible(NamedTuple):
    """What tokens see of those before them, where that is not all. ``mask`` (B or 1, 1, T, keys), bool, or blocks of
    it: the keys of each query. ``segments`` (B, T): equal numbers are one document, at whose start a state is zero;
    None: one. ``real`` (B, T), bool: no padding, which a state passes by; None: all. A window is for attention only: a
    state forgets by itself."""

    mask: Tensor | BlockMask
    segments: Tensor | None = None
    real: Tensor | None = None


def visible(
    tokens_BT: Tensor, segments_BT: Tensor | None, window: int | None, *, blocks: bool | None = None
) -> Visible | None:
    """What the tokens of a batch see, of their own document (``segments_BT``: equal numbers are one) and within the
    last ``window`` positions. None: all before them. ``blocks``: as of ``_keys``."""
    mask = _keys(tokens_BT, segments_BT, window, blocks)
    return None if mask is None else Visible(mask, segments_BT)


def _keys(
    tokens_BT: Tensor, segments_BT: Tensor | None, window: int | None, blocks: bool | None
) -> Tensor | BlockMask | None:
    """Of each query those of its own document (``segments_BT``: equal numbers are one) and of the last ``window``
    positions, its own among them. None: all up to its own, which attention has a faster path for.

    (B or 1, 1, T, T), bool, or with ``blocks`` (default: on a GPU) FlexAttention's table of blocks, which skips those
    where nothing is seen; it is only read there, since FlexAttention has no backward pass on a CPU.
    """
    length, device = tokens_BT.shape[1], tokens_BT.device
    window = None if window is None or window >= length else window
    if segments_BT is None and window is None:
        return None

    def seen(row: Any, _: Any, query: Any, key: Any) -> Any:
        age = query - key
        near = age >= 0 if window is None else (age >= 0) & (age < window)
        if segments_BT is None:
            return near
        return near & (segments_BT[row, query] == segments_BT[row, key])

    if tokens_BT.is_cuda if blocks is None else blocks:
        from torch.nn.attention.flex_attention import create_block_mask

        rows = None if segments_BT is None else len(tokens_BT)
        return create_block_mask(seen, rows, None, length, length, device=device)
    at = torch.arange(length, device=device)
    row = torch.arange(1 if segments_BT is None else len(tokens_BT), device=device)[:, None, None]
    return seen(row, None, at[:, None], at).expand(len(row), length, length)[:, None]


def attention(
    q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | BlockMask | None, *, causal: bool
) -> Tensor:
    """softmax(q kᵀ / √d) v over the keys that ``mask`` shows, or all up to the query's own if ``causal``."""
    groups = q_BHTd.shape[1] != k_BGTd.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q_BHTd, k_BGTd, v_BGTd, attn_mask=mask, is_causal=causal, enable_gqa=groups
        )
    return _flex(q_BHTd.is_cuda)(q_BHTd, k_BGTd, v_BGTd, block_mask=mask, enable_gqa=groups)


@cache
def _flex(compiled: bool) -> Any:
    """Without compilation it makes all scores: right, and for comparison only."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
