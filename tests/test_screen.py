"""Screening: what is kept is what the settings say, in order, the same everywhere; what is dropped is counted."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from growkit.checkpoint.run_folder import RunFolder
from growkit.config.load import keys
from growkit.config.recipe import DataConfig, ScreenConfig
from growkit.data import screen as screening
from growkit.data.corpus import Document, load_corpus
from growkit.data.duplicates import RECALL, NearDuplicates, band_rows, shingles
from growkit.data.screen import ScreenReport, screen, screen_identity, screens
from growkit.errors import ConfigError, DataError
from tests.documents import DOCS, blocks
from tests.support import cli, corpus_file, recipe_dict, write_recipe

PAGE = DOCS / "how-to" / "screen-data.md"
ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness."
GERMAN = "Es war die beste aller Zeiten und die schlechteste, das Zeitalter der Weisheit und der Torheit."


def documents(texts: dict[str, str | bytes]) -> list[Document]:
    return [Document(name, text.encode() if isinstance(text, str) else text) for name, text in texts.items()]


def screened(texts: dict[str, str | bytes], **settings: Any) -> tuple[list[str], ScreenReport]:
    """(names of what is kept, the report)"""
    report = ScreenReport()
    return [document.group for document in screen(documents(texts), ScreenConfig(**settings), report)], report


def counts(report: ScreenReport) -> dict[str, int]:
    return {reason: tally.documents for reason, tally in report.dropped.items()}


@given(st.lists(st.sampled_from([b"", b"a", b"bb", b"ccc", b"ccc ", b"dddd"]), max_size=30), st.booleans())
def test_length_and_exact_duplicates_are_what_a_plain_loop_keeps(texts: list[bytes], deduplicate: bool) -> None:
    """In order, the first of equal ones; every document and every byte is kept or dropped for one reason."""
    wanted: list[int] = []
    for i, text in enumerate(texts):
        if 1 <= len(text) <= 3 and not (deduplicate and text in [texts[j] for j in wanted]):
            wanted.append(i)
    config = ScreenConfig(min_bytes=1, max_bytes=3, deduplicate="exact" if deduplicate else "none")
    report = ScreenReport()
    given_ = [Document("same", text) for text in texts]  # rows of one group, too
    kept = list(screen(given_, config, report))
    assert [next(i for i, document in enumerate(given_) if document is k) for k in kept] == wanted
    assert report.kept.documents == len(wanted) and report.documents == len(texts)
    assert report.bytes == sum(map(len, texts)) and report.kept.bytes == sum(len(texts[i]) for i in wanted)
    assert counts(report) == {
        "min_bytes": sum(len(text) < 1 for text in texts),
        "max_bytes": sum(len(text) > 3 for text in texts),
    } | ({"exact": len(texts) - len(wanted) - sum(not 1 <= len(text) <= 3 for text in texts)} if deduplicate else {})


def test_documents_are_read_one_by_one_and_settings_at_once() -> None:
    read = []

    def source() -> Iterator[Document]:
        for i in itertools.count():
            read.append(i)
            yield Document(str(i), b"x" * i)

    found = screen(source(), ScreenConfig(min_bytes=2), ScreenReport())
    assert read == []
    assert next(iter(found)).group == "2" and read == [0, 1, 2]
    with pytest.raises(ConfigError, match="bad-function"):
        screen(source(), ScreenConfig(function="nowhere"), ScreenReport())


def test_nothing_is_asked_for_by_default() -> None:
    texts: dict[str, str | bytes] = {"a": "", "b": "x", "c": "x", "d": b"\xff"}
    assert not screens(ScreenConfig()) and not screens(ScreenConfig(near_threshold=0.5, permutations=64))
    kept, report = screened(texts)
    assert kept == list(texts) and report.dropped == {}
    assert load_corpus(DataConfig(source=__file__)).screened is None


# Near duplicates.


def pair(common: int, own: int, start: int = 0) -> tuple[str, str, float]:
    """Two texts of words that are all different, and the Jaccard similarity of their sets of 5-grams: the runs of
    ``common`` + 4 words that both begin with, over those and ``own`` more of either."""
    head = [f"w{start + i}" for i in range(common + 4)]
    texts = [" ".join([*head, *(f"{side}{start + i}" for i in range(own))]) for side in "ab"]
    return texts[0], texts[1], common / (common + 2 * own)


def tail(n: int, p: float, least: int) -> float:
    """P(Bin(n, p) ≥ least)."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))


def agreeing(a: str, b: str, n: int) -> float:
    """The share of n permutations that agree on two texts."""
    found = NearDuplicates(0.1, n)
    assert found.first("a", a) is None
    ((_, signature),) = found._kept
    assert found.first("b", b) in (None, "a")
    found = NearDuplicates(1.0, n)
    found.first("b", b)
    return float(np.mean(signature.hashvalues == found._kept[0][1].hashvalues))


def test_shingles_are_the_sets_of_word_5_grams() -> None:
    for text in (ENGLISH * 3, "one two", "a a a a a a a a", "x", "", " ... \n", "ein zwei drei vier fünf"):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        size = max(1, min(5, len(words)))
        plain = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
        assert len(shingles(text)) == len(plain)
    a, b, similarity = pair(80, 10)
    both = np.intersect1d(shingles(a), shingles(b)).size
    assert both / np.union1d(shingles(a), shingles(b)).size == similarity == 0.8
    # The same on every machine and with every version: what a cache has kept depends on it.
    assert sorted(shingles("The quick brown fox jumps over").tolist()) == GOLDEN


GOLDEN = [2186412403, 4223475745]


@pytest.mark.parametrize(("common", "own"), [(90, 5), (80, 10), (40, 30), (10, 45)])
def test_the_estimate_is_of_the_jaccard_similarity(common: int, own: int) -> None:
    """Within five standard errors √(J(1 − J)/n): one in a million goes beyond them."""
    a, b, similarity = pair(common, own)
    error = math.sqrt(similarity * (1 - similarity) / 1024)
    assert abs(agreeing(a, b, 1024) - similarity) <= 5 * error


def test_near_duplicates_on_both_sides_of_the_threshold() -> None:
    """Twenty pairs with J = 0.92 are all found, twenty with J = 0.66 all kept. How often would chance have it
    otherwise? Of 256 permutations 205 must agree, and one of the bands: the binomial tails say."""
    n, least = 256, math.ceil(0.8 * 256)
    rows = band_rows(0.8, n)
    (*_, high), (*_, low) = pair(460, 20), pair(330, 85)
    missed = 1 - tail(n, high, least) + (1 - high**rows) ** (n // rows)
    assert (high, low) == (0.92, 0.66) and 20 * (missed + tail(n, low, least)) < 1e-4
    texts: dict[str, str | bytes] = {}
    for i in range(20):
        texts[f"high {i}"], texts[f"high {i} again"], _ = pair(460, 20, start=10_000 * i)
        texts[f"low {i}"], texts[f"low {i} again"], _ = pair(330, 85, start=10_000 * i + 5_000)
    kept, report = screened(texts, deduplicate="near", permutations=n)
    assert kept == [name for name in texts if not (name.startswith("high") and name.endswith("again"))]
    assert counts(report) == {"exact": 0, "near": 20}
    assert report.dropped["near"].examples == [f"high {i} again (as high {i})" for i in range(3)]
    assert screened(texts, deduplicate="near", permutations=n)[0] == kept
    assert len(screened(texts, deduplicate="near", permutations=n, near_threshold=0.5)[0]) == 40
    assert len(screened(texts, deduplicate="exact")[0]) == 80


@given(st.floats(0.1, 1), st.integers(64, 4096))
def test_bands_find_what_is_at_the_threshold(threshold: float, n: int) -> None:
    def found(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (n // rows)

    rows = band_rows(threshold, n)
    assert found(rows) >= RECALL and 1 <= rows <= n // 2
    assert rows == n // 2 or all(found(more) < RECALL for more in range(rows + 1, n // 2 + 1))


def test_what_near_means() -> None:
    story = " ".join(f"word{i} and" for i in range(100))
    han = "x" + "".join(map(chr, range(0x4E00, 0x4E00 + 200)))
    texts: dict[str, str | bytes] = {
        "story": story,
        "shouted": story.upper().replace(" ", "!\n"),
        "changed": story.replace("word50", "other"),
        "stray": story.encode().replace(b"word10 ", b"word10\xff "),
        "han": han,
        "han again": han[:100] + "。" + han[101:],
        "other han": han[::-1],
        "dots": "...",
        "more dots": "!!!",
        "same dots": "...",
    }
    kept, report = screened(texts, deduplicate="near")
    assert kept == ["story", "han", "other han", "dots", "more dots"]
    assert counts(report) == {"exact": 1, "near": 4}


# Languages and functions.


def test_languages() -> None:
    texts: dict[str, str | bytes] = {
        "english": ENGLISH,
        "german": GERMAN,
        "stray": b"\xff" + ENGLISH.encode() + b"\xc3",
        "marks": "!!! ...",
        "german at length": (GERMAN + " ") * 45 + (DOCS / "concepts.md").read_text(encoding="utf-8")[:12000],
    }
    kept, report = screened(texts, languages=["en"])
    assert kept == ["english", "stray"]
    assert report.dropped["languages"].examples == ["german (de)", "marks (und)", "german at length (de)"]
    assert screened(texts, languages=["de", "und"])[0] == ["german", "marks", "german at length"]
    with pytest.raises(ConfigError, match=r"data.screen.languages: got 'english'; .*allowed: ") as caught:
        screened(texts, languages=["en", "english"])
    assert caught.value.code == "unknown-choice"


def module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


def test_a_function_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "screen_parts").mkdir()
    module(tmp_path / "screen_parts", "mine", "def keep(text):\n    return '\\ufffd' not in text and text > 'b'\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    kept, report = screened({"a": "a", "b": "bé", "c": b"c\xff"}, function="screen_parts.mine:keep")
    assert kept == ["b"] and counts(report) == {"function": 2} and report.dropped["function"].bytes == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("screen_absent:keep", None, "cannot be imported (ModuleNotFoundError: No module named 'screen_absent')"),
        ("screen_broken:keep", "import nowhere_at_all", "cannot be imported (ModuleNotFoundError"),
        ("screen_syntax:keep", "def keep(:", "cannot be imported (SyntaxError"),
        ("screen_exits:keep", "raise SystemExit(0)", "cannot be imported (SystemExit: 0)"),
        ("screen_empty:keep", "", "is not there"),
        ("screen_value:keep", "keep = 3", "is not a function"),
        ("builtins:len", None, "is not a function"),
        ("keep", None, "is not the name of a function"),
        ("a/b:keep", None, "is not the name of a function"),
        ("a.b:c.d", None, "is not the name of a function"),
        ("a:", None, "is not the name of a function"),
    ],
)
def test_a_function_that_is_none_is_refused(
    name: str, text: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        module(tmp_path, name.partition(":")[0], text)
    for call in (lambda: screened({}, function=name), lambda: screen_identity(ScreenConfig(function=name))):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.code == "bad-function" and says in str(caught.value)
        assert caught.value.key == "data.screen.function" and caught.value.value == name


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return text.nope", "raises AttributeError: 'str' object has no attribute 'nope' for the document 'b.txt'"),
        ("raise Exception", "raises Exception:  for the document 'b.txt'"),
        ("raise SystemExit(0)", "raises SystemExit: 0 for the document 'b.txt'"),
        ("return None", "returns None for the document 'b.txt'"),
        ("return 1", "returns 1 for the document 'b.txt'"),
    ],
)
def test_a_function_that_fails_names_the_document(
    body: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"screen_fails_{abs(hash(body))}"
    module(tmp_path, name, f"def keep(text):\n    if text == 'a':\n        return True\n    {body}\n")
    with pytest.raises(DataError) as caught:
        screened({"a.txt": "a", "b.txt": "b"}, function=f"{name}:keep")
    assert caught.value.code == "function-failed" and says in str(caught.value)


# The report, the identity.


def test_the_report_says_it_all() -> None:
    texts: dict[str, str | bytes] = {f"[b{i}].txt": "x" * i for i in range(1, 8)} | {"again": "xxxxx"}
    _, report = screened(texts, min_bytes=5, max_bytes=1000, deduplicate="exact")
    assert report.summary() == (
        "kept 3 of 8 documents, 18 of 33 bytes; dropped: 4 shorter than min_bytes, 0 longer than max_bytes, "
        "1 exact duplicates"
    )
    data = report.to_json()
    assert data["dropped"]["exact"] == {"documents": 1, "bytes": 5, "examples": ["again (as [b5].txt)"]}
    assert ScreenReport.from_json(data) == report
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["shorter", "than", "min_bytes", "4", "10", "30.3%", "[b1].txt,", "[b2].txt,", "[b3].txt"] in rows
    assert ["longer", "than", "max_bytes", "0", "0", "0.0%"] in rows
    assert ["exact", "duplicates", "1", "5", "15.2%", "again", "(as", "[b5].txt)"] in rows
    assert rows[-1][:4] == ["kept", "3", "18", "54.5%"]


def test_the_identity_is_of_what_decides() -> None:
    plain = ScreenConfig()
    distinct = [
        plain,
        ScreenConfig(min_bytes=3),
        ScreenConfig(max_bytes=3),
        ScreenConfig(languages=["en"]),
        ScreenConfig(languages=["en", "de"]),
        ScreenConfig(deduplicate="exact"),
        ScreenConfig(deduplicate="near"),
        ScreenConfig(deduplicate="near", near_threshold=0.7),
        ScreenConfig(deduplicate="near", permutations=256),
    ]
    assert len(set(map(screen_identity, distinct))) == len(distinct)
    for same in (
        (plain, ScreenConfig(near_threshold=0.5, permutations=64)),
        (ScreenConfig(deduplicate="exact"), ScreenConfig(deduplicate="exact", near_threshold=0.5)),
        (ScreenConfig(languages=["en", "de"]), ScreenConfig(languages=["de", "en", "en"])),
    ):
        assert len(set(map(screen_identity, same))) == 1


def test_the_identity_follows_libraries_and_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [ScreenConfig(), ScreenConfig(languages=["en"]), ScreenConfig(deduplicate="near")]
    before = [screen_identity(config) for config in configs]
    with monkeypatch.context() as patch:
        patch.setattr(screening, "version", lambda _: "0.0")
        assert [screen_identity(config) == old for config, old in zip(configs, before)] == [True, False, False]
    monkeypatch.setattr(screening, "_RULES", 0)
    assert not any(screen_identity(config) == old for config, old in zip(configs, before))


def test_the_identity_follows_the_source_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole module, since a function uses what is beside it, and of the one that it is imported from."""
    module(tmp_path, "screen_base", "def keep(text):\n    return True\n")
    module(tmp_path, "screen_front", "from screen_base import keep\n")
    monkeypatch.chdir(tmp_path)
    found = set()
    for name in ("screen_base", "screen_front"):
        config = ScreenConfig(function=f"{name}:keep")
        found |= {screen_identity(config), screen_identity(config)}
        with open("screen_base.py", "a") as file:
            file.write("MOST = 3\n")
        found.add(screen_identity(config))
    assert len(found) == 4


def without(packages: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growkit.errors.find_spec", lambda name: None if name in packages else object())


@pytest.mark.parametrize(
    ("package", "settings"), [("datasketch", {"deduplicate": "near"}), ("py3langid", {"languages": ["en"]})]
)
def test_a_library_that_is_not_there(package: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    without([package], monkeypatch)
    for call in (lambda: screened({}, **settings), lambda: screen_identity(ScreenConfig(**settings))):
        with pytest.raises(ConfigError, match=rf"needs the package {package}; .*'growkit\[data\]'"):
            call()
    screened({}, deduplicate="exact", min_bytes=3)


# In a corpus, in a run.


def folder_of(folder: Path, texts: dict[str, str | bytes]) -> Path:
    for document in documents(texts):
        (folder / document.group).parent.mkdir(parents=True, exist_ok=True)
        (folder / document.group).write_bytes(document.text)
    return folder


def test_a_corpus_is_screened_before_it_is_split(tmp_path: Path) -> None:
    """As if what is dropped were not there; the same for a whole text."""
    texts: dict[str, str | bytes] = {f"{i}.txt": f"text {i} " * 40 for i in range(20)}
    plain = load_corpus(DataConfig(source=str(folder_of(tmp_path / "plain", texts))))
    more = texts | {f"z/{name}": text for name, text in texts.items()} | {"z.txt": "short"}
    data = DataConfig(source=str(folder_of(tmp_path / "more", more)), screen=ScreenConfig(10, deduplicate="exact"))
    corpus = load_corpus(data)
    assert (corpus.sha256, corpus.documents) == (plain.sha256, 20)
    assert corpus.screened is not None and corpus.record["screened"] == corpus.screened
    assert counts(ScreenReport.from_json(corpus.screened)) == {"min_bytes": 1, "exact": 20}
    assert corpus.screened["dropped"]["exact"]["examples"][0] == "z/0.txt (as 0.txt)"
    assert "screened" not in plain.record
    data.screen.min_bytes = 10_000
    with pytest.raises(DataError, match=r"data.screen: .*leaves nothing .*41 shorter than min_bytes.*corpus-empty"):
        load_corpus(data)


def test_a_run_trains_on_what_is_kept_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = corpus_file(tmp_path, 12).read_text()
    halves: dict[str, str | bytes] = {"texts/a.txt": text[:6000], "texts/b.txt": text[6000:]}
    folder_of(tmp_path, halves | {"texts/c.txt": text[:6000], "texts/d.txt": text[6000:].replace("lazy", "idle", 1)})
    small = recipe_dict(tmp_path, data={"source": "texts", "screen": {"deduplicate": "near"}})
    small["stages"] = [small["stages"][0] | {"duration": "2 steps"}]
    path = write_recipe(tmp_path, small)
    code, out, err = cli("train", path, "monitor.progress=plain", "data.screen.min_bytes=10")
    assert (code, err) == (0, "")
    said = "dropped: 0 shorter than min_bytes, 1 exact duplicates, 1 near duplicates"
    assert "data.screen: kept 2 of 4 documents" in out and said in out
    manifest = RunFolder.open(tmp_path / "runs/run").load().manifest
    assert manifest.corpus["screened"]["dropped"]["near"]["examples"] == ["d.txt (as b.txt)"]
    code, out, _ = cli("resume", tmp_path / "runs/run")
    assert code == 0 and "nothing is left to train" in out
    code, out, err = cli("data", "prepare", path, "data.screen.min_bytes=10")
    assert (code, err) == (0, "") and "was there" in out and "near duplicates" in out and "d.txt (as b.txt)" in out
    for name in ("texts/c.txt", "texts/d.txt"):
        (tmp_path / name).unlink()
    assert cli("resume", tmp_path / "runs/run")[0] == 0, "the text that is trained on is the same"


def test_settings_are_known_and_checked_without_numpy() -> None:
    assert {"data.screen.min_bytes", "data.source", "optim.lr"} <= set(keys())
    code = (
        "import sys\nfrom growkit.schedule.checks import check_screen\nfrom growkit.config.recipe import ScreenConfig\n"
        "check_screen(ScreenConfig(deduplicate='near', languages=['en']))\n"
        "assert not {'numpy', 'torch', 'datasketch', 'py3langid'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_worked_example_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    said = io.StringIO()
    for block in blocks([PAGE]):
        if block.title is not None:
            Path(block.title).write_text(block.text)
        if block.language == "python":
            with contextlib.redirect_stdout(said):
                exec(compile(block.text, str(block), "exec"), names)
    (shown,) = [block.text for block in blocks([PAGE], "text")]
    lines = [line.rstrip() for line in said.getvalue().splitlines() if line.strip()]
    assert lines == [line.rstrip() for line in shown.splitlines() if line.strip()]
