"""What is no text and yet a sequence of bytes: FASTA records and WAV files, the kinds that Mamba's paper trains on
(arXiv 2312.00752, sections 4.3 and 4.4).

No byte is 0, which stands between documents.
"""

from __future__ import annotations

import gzip
import re
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from growkit.errors import DataError

LEVELS = 127  # on either side of silence, which is byte 128: bytes 1 to 255
_LETTERS = re.compile(rb"[A-Za-z*.-]+")
_FRAMES = 1 << 20  # of a WAV file in memory together, before they are a byte each


def fasta(path: Path, _: str) -> Iterator[tuple[int, bytes]]:
    """(line of its header from 1 on, letters) of each record, also gzipped. Letters are upper case: lower case marks
    repeats, not other bases. Raises DataError naming the line that is none of FASTA."""
    header, parts = 0, list[bytes]()
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if line.startswith(b">"):
                if header:
                    yield header, _sequence(path, header, parts)
                header, parts = number, []
            elif line and not header:
                raise _broken(path, number, "stands before the first record, which begins with '>'")
            elif line and not _LETTERS.fullmatch(line):
                raise _broken(path, number, "has more than the letters of a sequence")
            elif line:
                parts.append(line.upper())
    if header:
        yield header, _sequence(path, header, parts)


def _sequence(path: Path, header: int, parts: list[bytes]) -> bytes:
    if not parts:
        raise _broken(path, header, "is the header of a record without a sequence")
    return b"".join(parts)


def _broken(path: Path, line: int, problem: str) -> DataError:
    mend = "mend the line, or leave the file out with data.pattern"
    return DataError("broken-line", problem, key="data.source", value=f"{path}, line {line}", mend=mend)


def wav(path: Path, _: str) -> Iterator[tuple[int, bytes]]:
    """One row, 0: a byte of each sample (the mean of the channels), μ-law companded to 2 ``LEVELS`` + 1 levels. Integer
    PCM of 8, 16, 24 or 32 bits; a model sees samples, whatever their rate. Raises DataError."""
    mend = "write it as integer PCM, such as `ffmpeg -i IN -c:a pcm_s16le OUT.wav`, or leave it out with data.pattern"
    pieces, left = [], 0
    try:
        with wave.open(str(path), "rb") as file:
            channels, size, left = file.getnchannels(), file.getsampwidth(), file.getnframes()
            while frames := file.readframes(_FRAMES):
                whole = frames[: len(frames) // (channels * size) * channels * size]
                pieces.append(_companded(_samples(whole, size).reshape(-1, channels).mean(1)))
                left -= len(pieces[-1])
    except (wave.Error, EOFError) as error:
        problem = f"is not a WAV file that can be read ({error or 'it ends too soon'})"
        raise DataError("broken-audio", problem, key="data.source", value=str(path), mend=mend) from error
    if left > 0:
        problem = f"ends {left} samples before it says that it does"
        raise DataError("broken-audio", problem, key="data.source", value=str(path), mend=mend)
    yield 0, b"".join(pieces)


def _samples(frames: bytes, size: int) -> np.ndarray:
    """In −1 .. 1; ``size``: bytes of a sample, one of which is unsigned, two or more little-endian."""
    if size == 1:
        return (np.frombuffer(frames, np.uint8) - 128.0) / 128
    if size == 3:  # as the upper bytes of four
        wide = np.zeros((len(frames) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(frames, f"<i{size}") / 2.0 ** (8 * size - 1)


def _companded(samples: np.ndarray) -> bytes:
    """μ-law with μ = 255 (ITU-T G.711 in its continuous form)."""
    loud = np.log1p(255 * np.abs(samples)) / np.log(256)
    return np.rint(128 + LEVELS * np.sign(samples) * loud).astype(np.uint8).tobytes()
