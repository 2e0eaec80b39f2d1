"""The sources of a recipe's data, each without what the screen drops: of a mixture, by default, also what is in an
earlier source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from growkit.config.mixture import names_of, source_key, sources_of
from growkit.config.recipe import DataConfig
from growkit.data import cache
from growkit.data.document import Document
from growkit.data.screen import Screen, ScreenReport, screen_identity, screens
from growkit.data.sources import SOURCES, Source, source_kind
from growkit.errors import DataError

log = logging.getLogger(__name__)
Observe = Callable[[str, int, int], None]  # what is done, bytes of text done, bytes in all (0: not known)
_PIECE = 1 << 20  # bytes that are read between two looks at how far it is


class Sources:
    """Those of ``data``. What is screened together is the documents of all of them in a row: read in order, each
    source is read once; else those before it are read, and screened, again."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.names = names_of(data)
        self._sources: dict[int, Source] = {}
        self._keys: dict[int, str] = {}
        self._screen: Screen | None = None
        self._passed = 0  # how many sources the screen has seen
        self._together = len(self.names) > 1 and data.screen.deduplicate != "none" and data.screen.across_sources

    def content(self, index: int) -> dict[str, Any]:
        """What decides the documents of a source, as JSON. Raises ConfigError and DataError."""
        content = {"source": self._source(index).identity(), "screen": screen_identity(self.data.screen)}
        self._keys[index] = cache.key_of(content["source"])
        if self._together and index:
            content["behind"] = [self._key(earlier) for earlier in range(index)]
        return content

    def documents(
        self, index: int, report: ScreenReport | None = None, observe: Observe = lambda *_: None
    ) -> Iterator[Document]:
        """What is made use of: the documents that have text and pass the screen. ``report`` is filled as they are read.
        ``observe`` is told of what is read before. Raises DataError if there are none."""
        if not screens(self.data.screen):
            yield from self._texts(index)
            return
        report = ScreenReport() if report is None else report
        screen, passed = self._screen, self._passed
        self._screen = None  # this reading may not come to its end
        if screen is None or not self._together or passed > index:
            screen, passed = Screen(self.data.screen), 0
        for earlier in range(passed, index) if self._together else ():
            doing, done, seen = f"screen {self.names[earlier]} before", 0, 0
            for document in screen.kept(self._texts(earlier), ScreenReport(), self._called(earlier)):
                done += len(document.text)
                if done - seen >= _PIECE:
                    observe(doing, done, 0)
                    seen = done
        yield from screen.kept(self._texts(index), report, self._called(index))
        self._screen, self._passed = screen, index + 1
        of = f" of {self.names[index]}" if len(self.names) > 1 else ""
        log.info("data.screen%s: %s", of, report.summary())
        if report.documents and not report.kept.documents:
            problem = f"leaves nothing of {self.names[index]} ({report.summary()})"
            mend = "let more through"
            if self._together and index:
                mend += ", take the source out of data.mixture, or set data.screen.across_sources=false"
            raise DataError("corpus-empty", problem, key="data.screen", mend=mend)

    def settings(self, index: int) -> DataConfig:
        """``data`` as if the source were the only one."""
        same = {name: value for name, value in asdict(sources_of(self.data)[index]).items() if name != "weight"}
        return replace(self.data, mixture=[], **same)

    @contextmanager
    def named(self, index: int) -> Iterator[None]:
        """Errors of a source name it as the recipe does."""
        source = sources_of(self.data)[index]
        try:
            yield
        except DataError as error:
            value, mend, key = error.value, error.mend, error.key
            if error.code == "corpus-empty" and error.key == "data.source":
                value = source.source
                mend = "name a file or folder with text"
                mend += f" matching {source.pattern!r}" if source.pattern != "**/*" else ""
            fields = {f"data.{field}": f"{source_key(self.data, index)}.{field}" for field in asdict(source)}
            raise DataError(error.code, error.problem, key=fields.get(key, key), value=value, mend=mend) from error

    def _source(self, index: int) -> Source:
        if index not in self._sources:
            alone = self.settings(index)
            kind = source_kind(sources_of(self.data)[index].source)
            self._sources[index] = SOURCES.get(kind, key="data.source")(alone)
        return self._sources[index]

    def _key(self, index: int) -> str:
        if index not in self._keys:
            with self.named(index):
                self._keys[index] = cache.key_of(self._source(index).identity())
        return self._keys[index]

    def _texts(self, index: int) -> Iterator[Document]:
        with self.named(index):
            for document in self._source(index):
                if document.text:
                    yield document

    def _called(self, index: int) -> str:
        """What stands behind the names of its documents where another source's duplicates name them."""
        return f" of {self.names[index]}" if self._together else ""
