"""Mistakes in preparing data: sources, mixtures, the cache, a tokenizer of one's own."""

from __future__ import annotations

import os
import shlex
import shutil
import wave
from pathlib import Path

import pytest

from growkit.config.recipe import DataConfig
from growkit.data.corpus import load_corpus
from tests.bad_input.support import Arrange, Case, train, write

GOOD = '{"text": "abc", "n": 1}\n'
TWO = "data={mixture: [{source: corpus.txt}, {source: %s}]}"


def _rows(text: str, name: str = "rows.jsonl") -> Arrange:
    return lambda _: write(name, text)


def _cut_gzip(_: pytest.MonkeyPatch) -> None:
    Path("rows.json.gz").write_bytes(bytes.fromhex("1f8b0800000000000003ab562a49ad2851b2"))


def _parquet(_: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc"], "n": [1]}), "rows.parquet")


def _wav(samples: int, cut: int = 0) -> Arrange:
    """``cut``: bytes that are missing at its end."""

    def made(_: pytest.MonkeyPatch) -> None:
        with wave.open("a.wav", "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(2 * samples))
        os.truncate("a.wav", os.path.getsize("a.wav") - cut)

    return made


def _entry() -> Path:
    return load_corpus(DataConfig(source="corpus.txt", cache="cache")).parts[0].folder


def _cut_shard(_: pytest.MonkeyPatch) -> None:
    file = _entry() / "train.ids"
    os.truncate(file, file.stat().st_size - 1)


def _changed_shard(_: pytest.MonkeyPatch) -> None:
    file = _entry() / "validation.ids"
    file.write_bytes(b"?" + file.read_bytes()[1:])


def _other_version(_: pytest.MonkeyPatch) -> None:
    file = _entry() / "entry.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 0'))


def _no_shard(_: pytest.MonkeyPatch) -> None:
    (_entry() / "train.starts").unlink()


def source(name: str, file: str, code: str, key: str, value: str, mend: str, arrange: Arrange, more: str = "") -> Case:
    """A row for a run on ``file``."""
    words = f"train recipe.yaml run.name=new data.source={file} {more}".strip()
    return Case(name, words, code, key, value, mend, arrange)


def prepared(name: str, file: str, arrange: Arrange) -> Case:
    """A row for a run whose prepared text is not what it was."""
    return Case(name, "train recipe.yaml run.name=new data.cache=cache", "cache-damaged", file, file, "delete", arrange)


BUCKETS = "stages.0.context={schedule: buckets, start: 8, odds: [1, 1]}"


def decomposed(name: str, more: str, code: str, key: str, value: str, mend: str) -> Case:
    """A row for documents cut into rows of 8 and 16 tokens, unless ``more`` says otherwise."""
    words = f"train recipe.yaml run.name=new data.packing=decompose {shlex.quote(BUCKETS)} {more}".strip()
    return Case(name, words, code, key, value, mend)


PREPARE_CASES = [
    source("a broken line", "rows.jsonl", "broken-line", "data.source", "'rows.jsonl, line 3'", "mend the line",
           _rows(GOOD + "\n" + '{"text": "ab\n' + GOOD)),
    source("a line that is no row", "rows.jsonl", "broken-line", "data.source", "'rows.jsonl, line 2'", "on each line",
           _rows(GOOD + "[1, 2]\n")),
    source("a line that is not UTF-8", "rows.jsonl", "broken-line", "data.source", "'rows.jsonl, line 1'", "mend",
           lambda _: (Path("rows.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n'), None)[1]),
    source("a row without the column", "rows.jsonl", "no-text-field", "data.text_field", "'text'",
           "columns of rows.jsonl, line 2: body", _rows(GOOD + '{"body": "abc"}\n')),
    source("a row whose column is a number", "rows.jsonl", "not-text", "data.text_field", "rows.jsonl, line 2",
           "strings", _rows(GOOD + '{"text": 3}\n')),
    source("a compressed file cut short", "rows.json.gz", "corpus-unreadable", "data.source", "'rows.json.gz'",
           "its disk", _cut_gzip),
    source("Parquet that is none", "rows.parquet", "corpus-unreadable", "data.source", "'rows.parquet'", "its disk",
           _rows("abc", "rows.parquet")),
    source("Arrow that is none", "rows.arrow", "corpus-unreadable", "data.source", "'rows.arrow'", "its disk",
           _rows("abc", "rows.arrow")),
    source("Parquet without the column", "rows.parquet", "no-text-field", "data.text_field", "'body'",
           "columns of rows.parquet: text, n", _parquet, "data.text_field=body"),
    source("Parquet with a column of numbers", "rows.parquet", "not-text", "data.text_field", "rows.parquet, row 0",
           "strings", _parquet, "data.text_field=n"),
    source("an empty file", "empty.txt", "corpus-empty", "data.source", "'empty.txt'", "with text",
           _rows("", "empty.txt")),
    source("a file of one byte", "one.txt", "corpus-too-short", "data.source", "'one.txt'", "more text",
           _rows("x", "one.txt")),
    source("an empty FASTA", "genes.fa", "corpus-empty", "data.source", "'genes.fa'", "with text",
           _rows("", "genes.fa")),
    source("FASTA without a header", "genes.fa", "broken-line", "data.source", "'genes.fa, line 1'", "mend the line",
           _rows("ACGT\n", "genes.fa")),
    source("FASTA with other than letters", "genes.fa", "broken-line", "data.source", "'genes.fa, line 3'", "leave",
           _rows(">one\nACGT\nAC1GT\n", "genes.fa")),
    source("a record of nothing", "genes.fa", "broken-line", "data.source", "'genes.fa, line 1'", "mend the line",
           _rows(">one\n>two\nACGT\n", "genes.fa")),
    source("a WAV file of nothing", "a.wav", "broken-audio", "data.source", "'a.wav'", "pcm_s16le", _rows("", "a.wav")),
    source("a WAV file that is none", "a.wav", "broken-audio", "data.source", "'a.wav'", "pcm_s16le",
           _rows("RIFX" * 20, "a.wav")),
    source("a WAV file without sound", "a.wav", "corpus-empty", "data.source", "'a.wav'", "with text", _wav(0)),
    source("a WAV file cut short", "a.wav", "broken-audio", "data.source", "'a.wav'", "integer PCM", _wav(900, 150)),
    source("no rows", "rows.jsonl", "corpus-empty", "data.source", "'rows.jsonl'", "with text", _rows("\n\n")),
    # Mixtures.
    train("a source and a mixture", "data.mixture=[{source: stdlib}]", "two-sources", "'corpus.txt'", "null",
          "data.source"),
    train("a source twice", TWO % "corpus.txt", "two-sources", "'corpus.txt'", "larger weight",
          "data.mixture.1.source"),
    train("a source of no weight", TWO % "stdlib, weight: 0", "not-positive", "got 0.0", "above zero",
          "data.mixture.1.weight"),
    train("a mixture without a source", "data={mixture: [{weight: 2}]}", "missing-key", "is missing", "write source",
          "data.mixture.0.source"),
    train("a source of a mixture that is not there", TWO % "no.txt", "corpus-missing", "'no.txt'", "existing file",
          "data.mixture.1.source"),
    Case("a column of a mixture that is not there",
         "train recipe.yaml run.name=new 'data={mixture: [{source: stdlib}, {source: rows.jsonl, text_field: body}]}'",
         "no-text-field", "data.mixture.1.text_field", "'body'", "text, n", _rows(GOOD)),
    Case("a source of which nothing is new",
         "train recipe.yaml run.name=new 'data={mixture: [{source: corpus.txt}, {source: copy.txt}], "
         "screen: {deduplicate: exact}}'",
         "corpus-empty", "data.screen", "leaves nothing of copy.txt", "across_sources=false",
         lambda _: shutil.copy("corpus.txt", "copy.txt") and None),
    train("sources that are half apart", "data.screen.across_sources=half", "wrong-type", "'half'", "true"),
    # Packing.
    train("a packing there is not", "data.packing=first_fit", "unknown-choice", "'first_fit'", "best_fit, decompose"),
    train("pieces of one length", "data.packing=decompose", "pieces-do-not-fit", "rows of 16", "buckets"),
    decomposed("pieces of no multiple", "stages.1.context_length=24 stages.1.global_batch_tokens=48",
               "pieces-do-not-fit", "data.packing", "8, 16, 24", "start · 2^n"),
    decomposed("pieces of lengths by the step", "'stages.1.context={schedule: linear, start: 8}'",
               "pieces-do-not-fit", "stages.1.context.schedule", "'linear'", "buckets or discrete"),
    decomposed("pieces that are cut", "stages.0.context.how=truncate", "pieces-do-not-fit", "stages.0.context.how",
               "'truncate'", "rechunk"),
    decomposed("blocks of pieces", "data.select.kind=importance", "selection-does-not-fit", "data.select.kind",
               "data.packing=decompose", "none or documents"),
    Case("documents that are too short for a bucket",
         f"train recipe.yaml run.name=new data.source=rows.jsonl data.packing=decompose {shlex.quote(BUCKETS)}",
         "bucket-empty", "data.packing", "a piece of 16 tokens", "shorter", _rows('{"text": "0123456789"}\n' * 40)),
    # The cache.
    prepared("a shard cut short", "train.ids", _cut_shard),
    prepared("a shard that was changed", "validation.ids", _changed_shard),
    prepared("a shard that is gone", "train.starts", _no_shard),
    prepared("an entry that calls itself another version's", "entry.json", _other_version),
    train("a cache below a file", "data.cache=corpus.txt/x", "cannot-write", "Not a directory", "data.cache",
          "corpus.txt/x"),
    # A tokenizer.
    Case("a vocabulary of few", "tokenizer train corpus.txt --vocab-size 256 -o mine", "too-small", "--vocab-size",
         "256", "257 or more"),
    Case("a tokenizer onto a file", "tokenizer train corpus.txt --vocab-size 300 -o recipe.yaml", "file-exists",
         "--output", "'recipe.yaml'", "another"),
    Case("a tokenizer of nothing", "tokenizer train no.txt --vocab-size 300 -o mine", "corpus-missing", "data.source",
         "'no.txt'", "existing file"),
    Case("a tokenizer below a file", "tokenizer train corpus.txt --vocab-size 300 -o corpus.txt/x", "cannot-write",
         "corpus.txt/x", "Not a directory", "free space"),
]  # fmt: skip
