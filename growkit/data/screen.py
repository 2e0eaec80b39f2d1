"""Which documents of a corpus are kept: those of the right length, that a function of one's own lets through, in the
right languages, and each once. What is dropped is counted, with the reason.

No numpy and no other library at the top: ``growkit validate`` checks the settings without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import FunctionType
from typing import TYPE_CHECKING, Any

from growkit.config.recipe import ScreenConfig
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError, GrowkitError, require
from growkit.registry import closest

if TYPE_CHECKING:
    from rich.table import Table

    from growkit.data.corpus import Document

DEDUPLICATE = ("none", "exact", "near")
# reason, in the order in which documents are asked: what it is called
REASONS = {
    "min_bytes": "shorter than min_bytes",
    "max_bytes": "longer than max_bytes",
    "function": "refused by function",
    "languages": "not in languages",
    "exact": "exact duplicates",
    "near": "near duplicates",
}
UNDETERMINED = "und"  # the language of a text that nothing can be told of
_RULES = 1  # raised when the same settings come to keep other documents
_EXAMPLES = 3  # documents named for each reason
_LANGUAGE_CHARACTERS = 4096  # of a document's beginning, by which its language is told

# A document and what later ones are told of it; None: kept; else what the report calls the dropped document
Filter = Callable[["Document", str], str | None]


@dataclass
class Tally:
    """``examples``: names of a few of the documents, a duplicate's with that of the one it is a duplicate of."""

    documents: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, size: int, example: str) -> None:
        self.documents += 1
        self.bytes += size
        if len(self.examples) < _EXAMPLES and example not in self.examples:
            self.examples.append(example)

    def join(self, other: Tally) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples += other.examples[: _EXAMPLES - len(self.examples)]


@dataclass
class ScreenReport:
    """What was kept, and what was dropped for each reason that was asked for, none left out."""

    kept: Tally = field(default_factory=Tally)
    dropped: dict[str, Tally] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """All that were looked at."""
        return self.kept.documents + sum(tally.documents for tally in self.dropped.values())

    @property
    def bytes(self) -> int:
        """Of all that were looked at."""
        return self.kept.bytes + sum(tally.bytes for tally in self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScreenReport:
        dropped = data["dropped"]  # whose order a file may have lost
        asked = {reason: Tally(**dropped[reason]) for reason in REASONS if reason in dropped}
        return cls(Tally(**data["kept"]), asked)

    @classmethod
    def sum(cls, reports: Iterable[ScreenReport]) -> ScreenReport:
        """Of all that several looked at."""
        total = cls()
        for report in reports:
            for reason, tally in report.dropped.items():
                total.dropped.setdefault(reason, Tally()).join(tally)
            total.kept.join(report.kept)
        return total

    def summary(self) -> str:
        """One line."""
        reasons = [f"{tally.documents} {REASONS[reason]}" for reason, tally in self.dropped.items()]
        return (
            f"kept {self.kept.documents} of {self.documents} documents, {quantity(self.kept.bytes)} of "
            f"{quantity(self.bytes)} bytes; dropped: {', '.join(reasons) or 'none'}"
        )

    def table(self) -> Table:
        """A row for each reason, and for what was kept."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("", "documents", "bytes", "share", "such as"):
            table.add_column(header, justify="left" if header in ("", "such as") else "right")
        rows = [(REASONS[reason], tally) for reason, tally in self.dropped.items()]
        for name, tally in [*rows, ("kept", self.kept)]:
            share = f"{tally.bytes / max(1, self.bytes):.1%}"
            examples = escape(", ".join(tally.examples))
            table.add_row(name, str(tally.documents), quantity(tally.bytes), share, examples)
        return table


def screens(config: ScreenConfig) -> bool:
    """Whether anything is asked for."""
    return bool(_active(config))


def check_screen(config: ScreenConfig) -> None:
    """Raises ConfigError for a setting that cannot be, as far as can be told without its libraries."""
    key = "data.screen"
    if config.min_bytes < 0:
        raise ConfigError("too-small", "must be at least 0", key=f"{key}.min_bytes", value=config.min_bytes)
    least = max(1, config.min_bytes)
    if config.max_bytes is not None and config.max_bytes < least:
        problem, mend = f"is below {least}: nothing would be kept", "raise it, or lower data.screen.min_bytes"
        raise ConfigError("too-small", problem, key=f"{key}.max_bytes", value=config.max_bytes, mend=mend)
    if config.deduplicate not in DEDUPLICATE:
        mend = f"allowed: {', '.join(DEDUPLICATE)}"
        raise ConfigError(
            "unknown-choice", "is not allowed", key=f"{key}.deduplicate", value=config.deduplicate, mend=mend
        )
    if not 0.1 <= config.near_threshold <= 1:  # below, 64 permutations find no candidates
        raise ConfigError("out-of-range", "must be in 0.1..1", key=f"{key}.near_threshold", value=config.near_threshold)
    if not 64 <= config.permutations <= 4096:
        raise ConfigError("out-of-range", "must be in 64..4096", key=f"{key}.permutations", value=config.permutations)
    if config.function is not None:
        module, sign, name = config.function.partition(":")
        if not sign or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise _bad_function(config.function, "is not the name of a function", "write package.module:name")


def screen(documents: Iterable[Document], config: ScreenConfig, report: ScreenReport) -> Iterator[Document]:
    """Those of ``documents`` that ``config`` keeps, in their order; of duplicates the first. ``report`` is filled as
    they are read. The settings are checked at once, the documents as they come. Raises ConfigError and DataError."""
    return Screen(config).kept(documents, report)


class Screen:
    """What ``config`` asks for, and what it remembers of the documents that it has seen. Raises ConfigError."""

    def __init__(self, config: ScreenConfig) -> None:
        check_screen(config)
        self._filters = {reason: FILTERS[reason](config) for reason in _active(config)}

    def kept(self, documents: Iterable[Document], report: ScreenReport, behind: str = "") -> Iterator[Document]:
        """As ``screen``, of duplicates in what was seen before too. ``behind``: what stands behind the name of one of
        ``documents`` where a later duplicate names it."""
        report.dropped |= {reason: Tally() for reason in self._filters}
        return self._kept(documents, report, behind)

    def _kept(self, documents: Iterable[Document], report: ScreenReport, behind: str) -> Iterator[Document]:
        for document in documents:
            told = _name(document) + behind
            for reason, drops in self._filters.items():
                called = drops(document, told)
                if called is not None:
                    report.dropped[reason].add(len(document.text), called)
                    break
            else:
                report.kept.add(len(document.text), _name(document))
                yield document


def screen_identity(config: ScreenConfig) -> str:
    """A hash of all that decides what is kept: the settings that are in force, the libraries' versions, the source of
    the module with the function. Raises ConfigError."""
    check_screen(config)
    active: dict[str, Any] = _active(config)
    if config.function is not None:
        active["function"] = [config.function, _source(config.function)]
    if "languages" in active:
        require("py3langid", extra="data", key="data.screen.languages")
        active["languages"] = [sorted(set(config.languages)), version("py3langid")]
    if "near" in active:
        require("datasketch", extra="data", key="data.screen.deduplicate")
        active["near"] = [config.near_threshold, config.permutations, version("datasketch")]
    return hashlib.sha256(json.dumps([_RULES, active], sort_keys=True).encode()).hexdigest()


def _active(config: ScreenConfig) -> dict[str, Any]:
    """Reason: the setting that asks for it; in the order of ``REASONS``."""
    settings = {
        "min_bytes": config.min_bytes,
        "max_bytes": config.max_bytes,
        "function": config.function,
        "languages": config.languages,
        "exact": config.deduplicate in ("exact", "near"),
        "near": config.deduplicate == "near",
    }
    assert list(settings) == list(REASONS)
    return {reason: setting for reason, setting in settings.items() if setting}


def _name(document: Document) -> str:
    return document.group or "all of the source"


def _too_short(config: ScreenConfig) -> Filter:
    return lambda document, _: _name(document) if len(document.text) < config.min_bytes else None


def _too_long(config: ScreenConfig) -> Filter:
    most = config.max_bytes
    assert most is not None
    return lambda document, _: _name(document) if len(document.text) > most else None


def _in_other_languages(config: ScreenConfig) -> Filter:
    key = "data.screen.languages"
    require("py3langid", extra="data", key=key)
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from growkit.data.tokenizer import decoded

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.min_confidence = 2 / len(identifier.labels)  # twice what a text without a letter has for every language
    known = {*identifier.labels, UNDETERMINED}
    for language in config.languages:
        if language not in known:
            problem, mend = "is not a language that can be told", closest(language, known)
            raise ConfigError("unknown-choice", problem, key=key, value=language, mend=mend)

    def drops(document: Document, _: str) -> str | None:
        language = identifier.classify(decoded(document.text[: 4 * _LANGUAGE_CHARACTERS])[:_LANGUAGE_CHARACTERS])[0]
        return None if language in config.languages else f"{_name(document)} ({language})"

    return drops


def _seen_before(_: ScreenConfig) -> Filter:
    from growkit.data.duplicates import ExactDuplicates

    seen = ExactDuplicates()
    return lambda document, told: _beside(document, seen.first(told, document.text))


def _like_one_before(config: ScreenConfig) -> Filter:
    require("datasketch", extra="data", key="data.screen.deduplicate")
    from growkit.data.duplicates import NearDuplicates
    from growkit.data.tokenizer import decoded

    seen = NearDuplicates(config.near_threshold, config.permutations)
    return lambda document, told: _beside(document, seen.first(told, decoded(document.text)))


def _beside(document: Document, earlier: str | None) -> str | None:
    return None if earlier is None else f"{_name(document)} (as {earlier})"


def _refused(config: ScreenConfig) -> Filter:
    name = config.function
    assert name is not None
    function = _function(name)
    from growkit.data.tokenizer import decoded

    def failed(document: Document, problem: str) -> DataError:
        mend = "mend the function: text in, True (keep it) or False out"
        problem = f"{problem} for the document {_name(document)!r}"
        return DataError("function-failed", problem, key="data.screen.function", value=name, mend=mend)

    def drops(document: Document, _: str) -> str | None:
        with _blame(lambda said: failed(document, f"raises {said}")):
            keeps = function(decoded(document.text))
        if not isinstance(keeps, bool):  # a forgotten return would drop everything
            raise failed(document, f"returns {keeps!r:.100}")
        return None if keeps else _name(document)

    return drops


FILTERS: dict[str, Callable[[ScreenConfig], Filter]] = {
    "min_bytes": _too_short,
    "max_bytes": _too_long,
    "function": _refused,
    "languages": _in_other_languages,
    "exact": _seen_before,
    "near": _like_one_before,
}


def _function(name: str) -> FunctionType:
    """The function ``package.module:name``, from the working folder or wherever Python looks. Raises ConfigError."""
    module_name, _, attribute = name.partition(":")
    mend = "the module must lie in the working folder or on PYTHONPATH"
    here = os.getcwd()
    with _blame(lambda said: _bad_function(name, f"cannot be imported ({said})", mend)):
        sys.path.insert(0, here)  # which a console script lacks, unlike `python -m`
        try:
            module = importlib.import_module(module_name)
        finally:
            sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not inspect.isfunction(found):
        problem = "is not there" if found is None else "is not a function written with def or lambda"
        raise _bad_function(name, problem, "write one with def in a .py file, and name that")
    return found


def _source(name: str) -> list[str]:
    """The source of the module that is named, and of the one that the function comes from. Raises ConfigError."""
    function = _function(name)
    modules = sorted({name.partition(":")[0], function.__module__})
    try:
        return [inspect.getsource(sys.modules[module]) for module in modules]
    except (OSError, TypeError) as error:
        problem = f"has no source that can be read ({error}), so that a change of it would go unseen"
        raise _bad_function(name, problem, "use a function of a .py file") from error


def _bad_function(name: str, problem: str, mend: str) -> ConfigError:
    return ConfigError("bad-function", problem, key="data.screen.function", value=name, mend=mend)


class _blame:
    """Makes of whatever the user's own code raises, ``sys.exit`` too, the error that ``said`` gives for its first line:
    no ``except`` could name them all."""

    def __init__(self, said: Callable[[str], GrowkitError]) -> None:
        self.said = said

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception | SystemExit):
            first = (str(error).splitlines() or [""])[0][:200]
            raise self.said(f"{type(error).__name__}: {first}") from error
