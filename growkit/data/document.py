"""What a source gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """``group``: documents of one group are never split between training and validation."""

    group: str
    text: bytes
