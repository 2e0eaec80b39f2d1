"""Duplicates across the sources of a mixture: what is kept is what one screen keeps of all of them in a row."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from growkit.config.recipe import DataConfig, ScreenConfig, SourceConfig
from growkit.data import prepare
from growkit.data.corpus import Corpus, load_corpus, load_part, whole_text
from growkit.data.reading import Sources
from growkit.data.screen import ScreenReport
from growkit.data.sources import Files
from growkit.data.tokenizer import Tokenizer
from growkit.errors import DataError
from tests.support import cli, recipe_dict, write_recipe

WORDS = ("a quick brown fox jumps over one lazy dog while " * 2).split()


def mixture(folder: Path, sources: Iterable[Iterable[str]], **screen: Any) -> DataConfig:
    """Each source is a folder; each document a file."""
    found = []
    for number, texts in enumerate(sources):
        (folder / f"s{number}").mkdir(parents=True, exist_ok=True)
        for place, text in enumerate(texts):
            (folder / f"s{number}" / f"{place:02}.txt").write_text(text)
        found.append(SourceConfig(str(folder / f"s{number}")))
    rules = ScreenConfig(**({"deduplicate": "exact"} | screen))
    return DataConfig(mixture=found, screen=rules, cache=str(folder / "cache"), validation_fraction=0.3)


def texts_of(corpus: Corpus) -> list[list[str]]:
    both = [[part.train.tobytes(), part.validation.tobytes()] for part in corpus.parts]
    return [sorted(text.decode() for side in sides for text in side.split(b"\0")) for sides in both]


def doc(number: int) -> str:
    return f"document {number} " + " ".join(WORDS[number % 7 :])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(0, 11), max_size=8), min_size=1, max_size=4),
    st.sampled_from([(), (0,), (1,), (0, 1), (2,)]),
    st.booleans(),
)
def test_what_is_kept_is_what_a_plain_loop_keeps(
    tmp_path_factory: pytest.TempPathFactory, sources: list[list[int]], there: tuple[int, ...], across: bool
) -> None:
    """The first in the order of the recipe stays, whichever sources were prepared before, in whatever order. Each has
    two documents of its own, so that neither side of it is empty."""
    texts = [[f"own {n} {i}" * 3 for i in range(2)] + [doc(one) for one in of] for n, of in enumerate(sources)]
    seen: set[str] = set()
    wanted = []
    for of in texts:
        seen = seen if across else set()
        wanted.append(sorted({text for text in of if text not in seen}))
        seen |= set(of)
    data = mixture(tmp_path_factory.mktemp("across"), texts, across_sources=across)
    for index in there:
        if index < len(sources):
            load_part(Sources(data), index, Tokenizer())
    corpus = load_corpus(data)
    assert texts_of(corpus) == wanted
    screened = [ScreenReport.from_json(part.screened or {}) for part in corpus.parts]
    assert [report.kept.documents for report in screened] == [len(of) for of in wanted]
    assert [report.documents for report in screened] == [len(of) for of in texts]
    ids, _ = whole_text(data, Tokenizer())
    assert sorted(ids.tobytes().decode().split("\0")) == sorted(text for of in wanted for text in of)


def test_near_duplicates_too_and_the_report_names_the_source(tmp_path: Path) -> None:
    story = " ".join(f"word{i} and" for i in range(100))
    texts = [
        [story, doc(1), doc(2)],
        [story.replace("word50", "other"), doc(3), doc(2)],
        [doc(3), doc(4), "x y z " * 9],
    ]
    data = mixture(tmp_path, texts, deduplicate="near")
    corpus = load_corpus(data)
    assert [part.documents for part in corpus.parts] == [3, 1, 2]
    dropped = (corpus.parts[1].screened or {})["dropped"]
    assert dropped["near"]["examples"] == [f"00.txt (as 00.txt of {tmp_path / 's0'})"]
    assert dropped["exact"]["examples"] == [f"02.txt (as 02.txt of {tmp_path / 's0'})"]
    last = (corpus.parts[2].screened or {})["dropped"]["exact"]
    assert last["examples"] == [f"00.txt (as 01.txt of {tmp_path / 's1'})"]
    recipe = write_recipe(tmp_path, recipe_dict(tmp_path))
    sources = "[" + ", ".join(f"{{source: {one.source}}}" for one in data.mixture) + "]"
    words = ("data.source=null", f"data.mixture={sources}", f"data.cache={data.cache}", "data.screen.deduplicate=near")
    code, out, err = cli("data", "prepare", recipe, *words, "data.validation_fraction=0.3", "stages.0.context_length=8",
                         "stages.2.context_length=8")  # fmt: skip
    assert (code, err) == (0, "")
    assert f"{tmp_path / 's1'}: kept 1 of 3 documents" in out and "1 exact duplicates, 1 near duplicates" in out


def entries(data: DataConfig) -> set[str]:
    return {part.folder.name for part in load_corpus(data).parts}


def test_an_entry_is_known_by_what_it_was_screened_against(tmp_path: Path) -> None:
    """What comes later, weights and, without duplicates to drop, what comes earlier are no part of it."""
    texts = [[doc(1), doc(2), doc(3)], [doc(2), doc(4), doc(5)], [doc(5), doc(6), doc(7)]]
    data = mixture(tmp_path, texts)
    first = [part.folder.name for part in load_corpus(data).parts]
    alone = DataConfig(source=data.mixture[0].source, screen=data.screen, cache=data.cache, validation_fraction=0.3)
    assert entries(alone) == {first[0]}, "the first one is as if it were alone"
    fewer = DataConfig(mixture=data.mixture[:2], screen=data.screen, cache=data.cache, validation_fraction=0.3)
    assert entries(fewer) == set(first[:2])
    fewer.mixture = [data.mixture[1], data.mixture[0]]
    assert not entries(fewer) & set(first)
    data.screen.across_sources = False
    apart = entries(data)
    assert first[0] in apart and not set(first[1:]) & apart
    data.mixture.reverse()
    assert entries(data) == apart
    data.mixture.reverse()
    data.screen.across_sources = True
    (tmp_path / "s0" / "00.txt").write_text(doc(9))
    changed = [part.folder.name for part in load_corpus(data).parts]
    assert not set(changed) & set(first), "another text before it is another entry"


def test_each_source_is_read_once_and_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[doc(i) for i in range(start, start + 6)] for start in (0, 3, 6)]
    whole = mixture(tmp_path, texts)
    real, read = Files.__iter__, []

    def reading(self: Files) -> Any:
        read.append(self.files[0].path.parent.name)
        return real(self)

    monkeypatch.setattr(Files, "__iter__", reading)
    kept = load_corpus(whole)
    assert read == ["s0", "s1", "s2"]
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        real_side, sides = prepare._tokenise, []

        def stopping(*arguments: Any) -> None:
            sides.append(arguments[1])
            if len(sides) == 4:  # the held-out side of the second source
                raise KeyboardInterrupt
            real_side(*arguments)

        patch.setattr(prepare, "_tokenise", stopping)
        with pytest.raises(KeyboardInterrupt):
            load_corpus(whole)
    read.clear()
    again = load_corpus(whole)
    assert read == ["s0", "s1", "s2"], "the second was copied already; the third needs to know both"
    assert texts_of(again) == texts_of(kept) and again.record == kept.record
    read.clear()
    assert load_corpus(whole).record == kept.record and read == []


def test_an_earlier_source_that_fails_is_named(tmp_path: Path) -> None:
    """When it is read again, too, for the sake of a later one."""
    data = mixture(tmp_path, [[doc(1), doc(2)], [doc(1), doc(3), doc(4)]])
    sources = Sources(data)
    load_part(sources, 0, Tokenizer())
    fresh = Sources(data)
    content = fresh.content(1)
    assert len(content["behind"]) == 1
    (tmp_path / "s0" / "01.txt").write_text("another text")
    with pytest.raises(DataError, match=r"s0/01.txt'; changed while it was read.*corpus-changed") as caught:
        list(fresh.documents(1))
    assert caught.value.key == "data.mixture.0.source"
    assert [document.group for document in Sources(data).documents(1)] == ["00.txt", "01.txt", "02.txt"][1:]


def test_a_source_of_which_nothing_is_new(tmp_path: Path) -> None:
    data = mixture(tmp_path, [[doc(1), doc(2)], [doc(2), doc(1)]])
    with pytest.raises(
        DataError, match=r"data.screen: leaves nothing of .*s1 .*2 exact duplicates.*across_sources=false"
    ):
        load_corpus(data)
    data.screen.across_sources = False
    assert [part.documents for part in load_corpus(data).parts] == [2, 2]
