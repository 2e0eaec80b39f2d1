"""Runs on tokens that are not bytes: the ids are the tokenizer's, every byte of the text is some token's, bits per byte
are of those bytes, and the run resumes to the bit with that tokenizer and no other."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from growkit.checkpoint import store
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.run_folder import RunFolder
from growkit.config.recipe import DataConfig
from growkit.data.corpus import Corpus, load_corpus, whole_text
from growkit.data.split import cut
from growkit.data.stream import validation_windows, windows
from growkit.data.tokenizer import END, FastTokenizer, load_tokenizer, tokenizer_in
from growkit.errors import ConfigError, DataError
from growkit.eval.generate import sample_text
from growkit.eval.ngram import NGram
from growkit.eval.validate import target_bytes, target_sizes, unscored
from growkit.models.decoder import build
from growkit.schedule.progress import Progress
from tests.support import TEXT, cli, in_child, model_config, recipe_dict, records, trained_like, write_recipe
from tests.test_resume import assert_same_run

STOP = "<end>"
VOCABULARY = 320
SUMMATION = 1e-5  # relative, of float32 losses in other batches and added up in another order


def train_bpe(file: Path, text: str = TEXT * 3, vocabulary: int = VOCABULARY) -> Path:
    """A byte-level BPE in ``file``, with ids for ``STOP`` and for ``<s>``."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[STOP, "<s>"], show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    bpe.save(str(file))
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def bpe(file: Path) -> FastTokenizer:
    found = load_tokenizer(DataConfig(tokenizer=str(file), end_token=STOP))
    assert isinstance(found, FastTokenizer)
    return found


def pieces(file: Path, ids: np.ndarray[Any, Any]) -> list[int]:
    """Bytes of each id, independently of the code: a byte-level token is spelled with one character for each; the end
    counts as one."""
    plain = tokenizers.Tokenizer.from_file(str(file))
    return [1 if id == plain.token_to_id(STOP) else len(plain.id_to_token(id)) for id in ids.tolist()]


# Encoding.


def test_ids_are_the_tokenizers_joined_by_its_end(file: Path, bpe: FastTokenizer) -> None:
    plain = tokenizers.Tokenizer.from_file(str(file))
    documents = [TEXT, "", "naïve 世界 😀", "x"]
    ids, ends = bpe.encode_documents([text.encode() for text in documents], ends=True)
    wanted: list[int] = []
    for text in documents:
        wanted += [*plain.encode(text).ids, plain.token_to_id(STOP)]
    assert ids.tolist() == wanted[:-1] and ids.dtype == np.uint16
    assert bpe.decode(ids.tolist()) == STOP.join(documents)
    assert len(ids) < 0.9 * sum(map(len, documents)), "it merges nothing"
    without, none = bpe.encode_documents([text.encode() for text in documents])
    assert none is None and np.array_equal(without, ids)
    assert ends is not None and ends[-1] == len(END.join(text.encode() for text in documents))


documents_of_bytes = st.lists(st.one_of(st.text(max_size=12).map(str.encode), st.binary(max_size=12)), min_size=1)


@settings(max_examples=25, deadline=None)
@given(documents_of_bytes)
def test_every_byte_is_one_tokens(bpe: FastTokenizer, documents: list[bytes]) -> None:
    """Whatever the bytes, UTF-8 or not: in order, none twice, none left out; an end is the byte between documents."""
    ids, ends = bpe.encode_documents(documents, ends=True)
    text = END.join(documents)
    assert ends is not None
    sizes = np.diff(ends, prepend=0)
    assert (sizes >= 0).all() and sizes.sum() == len(text)
    if len(ids):
        assert np.array_equal(target_bytes(np.append(0, ends), np.arange(1, len(ids) + 1)), np.arange(len(text)))
    bounds = np.cumsum([len(document) + 1 for document in documents])[:-1]
    assert ends[ids == bpe.end].tolist() == bounds.tolist()


def test_bytes_of_a_token_are_those_it_spells(file: Path, bpe: FastTokenizer) -> None:
    documents = [TEXT.encode(), b"", b"dozen liquor jugs"]
    ids, ends = bpe.encode_documents(documents, ends=True)
    assert ends is not None and np.diff(ends, prepend=0).tolist() == pieces(file, ids)
    ids, ends = bpe.encode_documents(["é".encode()], ends=True)  # two tokens: the first has the character
    assert ends is not None and len(ids) == 2 and ends.tolist() == [2, 2]


def test_what_a_tokenizer_drops_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"?": 0, STOP: 1, "fox": 2, "dog": 900}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    found = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "words.json"), end_token=STOP))
    assert found.vocab_size == 901, "ids are not always as many as the highest"
    ids, ends = found.encode_documents([b"  fox   cat ", b"   ", b"dog\n\n"], ends=True)
    assert ids.tolist() == [2, 0, 1, 1, 900] and ends is not None
    assert ends.tolist() == [5, 11, 13, 17, 22], "spaces are the next token's, the last ones the last token's"
    (tmp_path / "text.txt").write_text(TEXT * 50)
    load_corpus(DataConfig(source=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "words.json"), end_token=STOP))
    assert "does not give its text back" in caplog.text


def test_many_documents_are_encoded_in_groups(bpe: FastTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [TEXT[i:].encode() for i in range(40)]
    ids, ends = bpe.encode_documents(documents, ends=True)
    monkeypatch.setattr("growkit.data.tokenizer._AT_ONCE", 300)
    again, ends_again = bpe.encode_documents(documents, ends=True)
    assert np.array_equal(ids, again) and ends is not None and np.array_equal(ends, ends_again)


# Corpora.


def both(source: Path, file: Path, **fields: Any) -> tuple[Corpus, Corpus]:
    """The corpus in bytes, and in the tokenizer's ids."""
    data = DataConfig(source=str(source), **fields)
    plain = load_corpus(data)
    data.tokenizer, data.end_token = str(file), STOP
    return plain, load_corpus(data)


@pytest.mark.parametrize("files", [1, 40])
def test_the_split_is_that_of_bytes(files: int, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of documents, and of one that is cut, here inside a character."""
    for i in range(files):
        (tmp_path / f"{i}.txt").write_text("é" * 501 if files == 1 else f"{i} {TEXT}é")
    source = tmp_path / "0.txt" if files == 1 else tmp_path
    plain, tokenised = both(source, file, validation_fraction=0.1 if files > 1 else 101 / 1002)
    assert tokenised.train_text.tobytes() == plain.train.tobytes()
    assert tokenised.validation_text.tobytes() == plain.validation.tobytes()
    assert tokenised.text_sha256 == plain.text_sha256 == plain.sha256 != tokenised.sha256
    assert tokenised.documents == plain.documents == files
    assert tokenised.validation_ends is not None and tokenised.validation_ends[-1] == len(plain.validation)
    assert plain.validation_ends is None and plain.bytes_per_token == 1.0
    assert tokenised.bytes_per_token == len(plain.train) / len(tokenised.train)
    assert not caplog.records, "this tokenizer gives its text back"
    assert plain.record["tokenizer"] == "bytes" and len(tokenised.record["tokenizer"]) == 64


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=5), st.data())
def test_documents_are_cut_where_their_text_is(texts: list[bytes], data: st.DataObject) -> None:
    """One document or several, also just before and behind the byte between two."""
    whole = END.join(texts)
    wanted = data.draw(st.integers(0, len(whole)))
    stops = np.cumsum([len(text) for text in texts])
    spans = np.stack([np.append(0, stops[:-1]), stops], axis=1)
    text, at = b"".join(texts), len(whole) - wanted
    sides = [END.join(text[first:stop] for first, stop in side) for side in cut(spans, wanted)]
    assert sides == [whole[:at], whole[at:]]


def test_bytes_load_no_tokenizer_library() -> None:
    code = (
        "import sys\nfrom growkit.config.recipe import DataConfig\nfrom growkit.data.corpus import load_corpus\n"
        f"load_corpus(DataConfig(source={__file__!r}))\n"
        "assert not {'tokenizers', 'transformers', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# A run.


def tokenised(folder: Path, file: Path) -> Path:
    """A recipe of two stages, the second grown."""
    data = {"tokenizer": str(file), "end_token": STOP}
    recipe = recipe_dict(folder, model={"vocab_size": VOCABULARY}, monitor={"ngram_order": 3, "validation_tokens": 512})
    recipe["data"] |= data
    recipe["stages"] = recipe["stages"][:2]
    return write_recipe(folder, recipe)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenised")
    assert in_child("train", tokenised(folder, file), "run.name=run") == 0
    return folder / "runs" / "run"


def corpus_of(run: Path, file: Path) -> Corpus:
    return load_corpus(DataConfig(source=str(run.parent.parent / "corpus.txt"), tokenizer=str(file), end_token=STOP))


def test_a_run_learns_grows_and_counts_bytes(run: Path, file: Path) -> None:
    """Its last validation by a plain loop, its bytes by how the tokens are spelled."""
    steps = records(run, "step")
    assert all(math.isfinite(r["loss"]) for r in steps) and steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert [g["certificate"]["exact"] for g in records(run, "growth")] == [True]
    corpus, checkpoint = corpus_of(run, file), RunFolder.open(run).load()
    model = build(checkpoint.manifest.model, checkpoint.state.params).eval()
    skip = unscored(16)
    starts, count = validation_windows(corpus.validation, 16, 512, skip)
    x, y = windows(corpus.validation, starts, 16)
    nats = -torch.log_softmax(model(x).detach(), -1).gather(-1, y[..., None])[..., 0][:, skip:].double()
    size = sum(pieces(file, y[:, skip:].numpy().ravel()))
    assert 1.2 * count < size < 8 * count, "tokens are bytes"
    logged, entry = records(run, "validation")[-1], checkpoint.manifest.lineage[-1]
    assert logged["loss"] == pytest.approx(float(nats.mean()), rel=SUMMATION)
    assert logged["bits_per_byte"] == pytest.approx(float(nats.sum()) / size / math.log(2), rel=SUMMATION)
    assert entry["bits_per_byte"] == logged["bits_per_byte"]
    per_token = len(corpus.train_text) / len(corpus.train)
    assert steps[0]["bits_per_byte"] == pytest.approx(steps[0]["loss"] / math.log(2) / per_token, rel=1e-12)
    assert steps[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.1), "a fresh model spreads over all ids"
    assert checkpoint.manifest.corpus == corpus.record


def test_the_ngram_reads_the_bytes_behind_what_is_scored(run: Path, file: Path) -> None:
    corpus = corpus_of(run, file)
    text = corpus.validation_text
    places, at = [], 0
    starts, _ = validation_windows(corpus.validation, 16, 512, unscored(16))
    scored = {int(start) + i + 1 for start in starts for i in range(unscored(16), 16)}
    for index, size in enumerate(pieces(file, corpus.validation)):
        places += list(range(at, at + size)) if index in scored else []
        at += size
    assert at == len(text)
    wanted = NGram(corpus.train_text, 3).bits_per_byte(text, np.array([place for place in places if place >= 2]))
    assert records(run, "ngram")[0]["bits_per_byte"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("point", "nth"), [("mid_growth", 1), ("after_rename", 2)])
def test_a_killed_run_resumes_to_the_bit(point: str, nth: int, run: Path) -> None:
    recipe = run.parent.parent / "recipe.yaml"
    name = f"killed-{point}"
    assert in_child("train", recipe, f"run.name={name}", env={"GROWKIT_FAULT": f"{point}:{nth}"}) == -signal.SIGKILL
    assert in_child("resume", run.parent / name) == 0
    assert_same_run(run.parent / name, run)


def test_eval_scores_what_the_run_logged(run: Path, file: Path, tmp_path: Path) -> None:
    code, out, err = cli("eval", run, "--tokens", 512, "--json")
    assert code == 0, err
    found, logged = json.loads(out), records(run, "validation")[-1]
    assert found["loss"] == pytest.approx(logged["loss"], rel=SUMMATION)
    assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=SUMMATION)
    (tmp_path / "other.txt").write_text(TEXT * 9)
    code, out, err = cli("eval", run, "--data", tmp_path / "other.txt", "--tokens", 10**6, "--json")
    assert code == 0, err
    found = json.loads(out)
    ids, ends = whole_text(
        DataConfig(source=str(tmp_path / "other.txt")),
        load_tokenizer(DataConfig(tokenizer=str(file), end_token=STOP)),
    )
    starts, _ = validation_windows(ids, 16, 10**6, 2)
    sizes = np.array(pieces(file, ids))[starts[:, None] + np.arange(2, 16) + 1]
    assert found["bytes_per_token"] == pytest.approx(sizes.mean(), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / sizes.mean() / math.log(2), rel=1e-12)
    assert np.array_equal(target_sizes(ends, starts + 1), np.array(pieces(file, ids))[starts + 1])


def test_what_it_writes_is_text_of_its_tokenizer(run: Path, bpe: FastTokenizer) -> None:
    code, out, err = cli("generate", run, "--prompt", "The lazy", "--tokens", 12, "--temperature", 0)
    assert code == 0 and out.startswith("The lazy"), err
    sample = records(run, "sample")[-1]
    state = RunFolder.open(run).load()
    model = build(state.manifest.model, state.state.params)
    assert sample["text"] == sample_text(model, sample["prompt"], 5, tokenizer=bpe)
    assert sample_text(model, "", 3, tokenizer=bpe) and sample_text(model, "\udcff", 0, tokenizer=bpe) == "\ufffd"


def test_its_end_stops_it(bpe: FastTokenizer) -> None:
    """Id 0 here; with the end elsewhere the same draws go on, and ids that only the model has are left out."""
    config = model_config("transformer", vocab_size=VOCABULARY + 80, num_layers=1)
    lm = build(config, trained_like(config).params)
    options = {"temperature": 3.0, "top_k": 0}
    texts = [sample_text(lm, "fox", 40, tokenizer=bpe, seed=seed, **options) for seed in range(16)]
    assert not any(STOP in text for text in texts)
    other = FastTokenizer("other", bpe._fast, end=VOCABULARY + 79)
    longer = [sample_text(lm, "fox", 40, tokenizer=other, seed=seed, **options) for seed in range(16)]
    assert sum(STOP in text for text in longer) > 0
    stopped = [text for text, on in zip(texts, longer) if STOP in on and on.startswith(text + STOP)]
    assert stopped, "an end did not stop the text"


def test_the_tables_of_a_run_are_in_bits_per_byte(run: Path) -> None:
    wanted = f"{records(run, 'validation')[-1]['bits_per_byte']:.3f}"
    for words in (("inspect", run), ("lineage", run), ("lineage", RunFolder.open(run).checkpoint(12))):
        code, out, err = cli(*words)
        assert code == 0 and wanted in out, (words, out, err)


def test_a_run_in_bytes_is_compared_on_the_same_text(run: Path) -> None:
    recipe = run.parent.parent / "recipe.yaml"
    assert in_child("train", recipe, "run.name=bytes", "data.tokenizer=bytes", "data.end_token=null") == 0
    code, out, _ = cli("compare", run, run.parent / "bytes", "--by", "tokens")
    assert code == 0 and "different texts" not in out and "data.tokenizer" in out


def test_an_extension_has_the_checkpoints_tokenizer(run: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("stages: [{name: more, duration: 2 steps, grow: {num_layers: 2}}]")
    assert in_child("extend", run, more, "run.name=longer") == 0
    manifest = RunFolder.open(run.parent / "longer").load().manifest
    assert manifest.corpus == RunFolder.open(run).load().manifest.corpus
    assert manifest.progress.cursor == 14 * 128, "the data go on"


def test_a_changed_tokenizer_is_refused(run: Path, file: Path, tmp_path: Path) -> None:
    """Under the same name; nothing is written."""
    mine = tmp_path / "tokenizer.json"
    shutil.copy(file, mine)
    recipe = tokenised(tmp_path, mine)
    env = {"GROWKIT_FAULT": "after_rename:2"}
    assert in_child("train", recipe, "run.name=run", env=env) == -signal.SIGKILL
    here = tmp_path / "runs" / "run"
    before = records(here)
    (tmp_path / "more.yaml").write_text("stages: [{name: more, duration: 2 steps}]")
    words = json.loads(mine.read_text())
    words["added_tokens"].append(words["added_tokens"][1] | {"id": VOCABULARY - 1, "content": "<new>"})
    del words["model"]["merges"][-1]
    last = max(words["model"]["vocab"], key=words["model"]["vocab"].get)
    del words["model"]["vocab"][last]
    mine.write_text(json.dumps(words))
    for command in (("resume", here), ("generate", here), ("eval", here), ("extend", here, tmp_path / "more.yaml")):
        code, _, err = cli(*command)
        assert code == 2 and "[tokenizer-changed]" in err and str(mine) in err, (command, err)
    assert records(here) == before and not (tmp_path / "runs" / "more").exists()
    mine.unlink()
    code, _, err = cli("generate", here)
    assert code == 2 and "[tokenizer-unavailable]" in err


# Folders that AutoTokenizer loads.


def folder_of(folder: Path, **config: Any) -> Path:
    train_bpe(folder / "tokenizer.json")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_a_folder_says_its_end_and_whether_a_text_begins(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path / "plain", eos_token=STOP)
    found = load_tokenizer(DataConfig(tokenizer=str(folder)))
    auto = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert found.encode(TEXT) == auto.encode(TEXT, add_special_tokens=False) and found.end == auto.eos_token_id
    assert found.prompt("fox") == found.encode("fox") and found.prompt("") == [found.end]
    asks = load_tokenizer(DataConfig(tokenizer=str(folder_of(tmp_path / "bos", eos_token=STOP, add_bos_token=True))))
    ids, ends = asks.encode_documents([b"fox", b"", b"dog"], ends=True)
    assert ids.tolist() == [1, *asks.encode("fox"), 0, 1, 0, 1, *asks.encode("dog")]
    assert ends is not None and np.diff(ends, prepend=0)[ids == 1].tolist() == [0, 0, 0] and ends[-1] == 8
    assert asks.prompt("fox") == [1, *asks.encode("fox")] and asks.prompt("") == [1]
    assert asks.identity != found.identity
    other = load_tokenizer(DataConfig(tokenizer=str(folder), end_token="<s>"))
    assert other.end == 1 and other.identity != found.identity


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(folder: Path, code: str, part: str) -> None:
        with pytest.raises(DataError) as caught:
            load_tokenizer(DataConfig(tokenizer=str(folder)))
        assert caught.value.code == code and part in str(caught.value)

    refused(folder_of(tmp_path / "endless"), "no-end-token", "data.end_token")
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    folder = folder_of(tmp_path / "own", **own)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    refused(folder, "tokenizer-unavailable", "code")
    assert not (tmp_path / "ran").exists(), "code of a tokenizer was run"
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "tokenizer-unavailable", "whole")
    broken = folder_of(tmp_path / "broken", eos_token=STOP)
    (broken / "tokenizer.json").write_text("{")
    refused(broken, "tokenizer-unavailable", "whole")


def test_a_foreign_checkpoint_brings_its_tokenizer(tmp_path: Path) -> None:
    """A folder with weights that no recipe of growkit made, and a tokenizer beside them: extend, eval and generate use
    it."""
    model = model_config("transformer", vocab_size=VOCABULARY)
    folder = tmp_path / "foreign"
    store.write(folder, trained_like(model, dtype=torch.float32), Manifest(model=model, progress=Progress()))
    assert tokenizer_in(folder) is None
    folder_of(folder, eos_token=STOP)
    assert tokenizer_in(folder) == str(folder)
    stage = {"name": "on", "duration": "2 steps", "context_length": 16, "global_batch_tokens": 64}
    small = recipe_dict(tmp_path, stages=[stage])
    del small["model"]
    words = ("extend", folder, write_recipe(tmp_path, small), "run.name=on")
    assert cli(*words)[0] == 0
    manifest = RunFolder.open(tmp_path / "runs" / "on").load().manifest
    assert f"tokenizer: {folder}" in manifest.recipe and manifest.corpus["tokenizer"] != "bytes"
    assert cli("generate", folder, "--tokens", 3)[0] == 0
    code, out, err = cli("eval", folder, "--data", tmp_path / "corpus.txt", "--context", 16, "--tokens", 64, "--json")
    assert code == 0 and json.loads(out)["bytes_per_token"] > 1.2, err


# Mistakes that need a tokenizer to be made; the others are in bad_input.


def test_validate_knows_the_tokenizer(run: Path, file: Path) -> None:
    recipe = run.parent.parent / "recipe.yaml"
    code, out, err = cli("validate", recipe)
    assert (code, err) == (0, "") and "but to train" not in out
    code, out, err = cli("validate", recipe, "model.vocab_size=319")
    assert code == 2 and "model.vocab_size: got 319" in err and "320 or more" in err
    code, out, err = cli("validate", recipe, "data.tokenizer=elsewhere/tokenizer.json")
    assert code == 0 and "but to train it here: data.tokenizer" in out


def test_room_for_every_id(bpe: FastTokenizer) -> None:
    bpe.require_room(VOCABULARY)
    with pytest.raises(ConfigError, match=r"reach 319; use 320 or more.*vocab-too-small"):
        bpe.require_room(VOCABULARY - 1)


def test_identity_is_of_the_content(file: Path, bpe: FastTokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(DataConfig(tokenizer=str(shutil.copy(file, tmp_path / "other.json")), end_token=STOP))
    assert again.identity == bpe.identity
    less = load_tokenizer(DataConfig(tokenizer=str(train_bpe(tmp_path / "t.json", vocabulary=319)), end_token=STOP))
    assert less.identity != bpe.identity


def test_an_export_takes_the_tokenizer_along(run: Path, bpe: FastTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    code, _, err = cli("export", run, tmp_path / "out")
    assert code == 0, err
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The quick brown fox, étude 12"
    assert theirs(text, add_special_tokens=False)["input_ids"] == bpe.encode(text)
    assert theirs.eos_token_id == theirs.pad_token_id == bpe.end
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["eos_token_id"] == bpe.end
