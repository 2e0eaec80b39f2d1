"""Mistakes in recipes and in data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bad_input.support import RUN, Arrange, Case, recipe, reseal, train, write


def _folder(name: str) -> Arrange:
    return lambda _: Path(name).mkdir()


TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"a": 0, "z": 300}, "unk_token": "a"}}"""


def _tokenizer(_: pytest.MonkeyPatch) -> None:
    write("t.json", TOKENIZER)


def _failing_function(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "dont_write_bytecode", True)  # Python's own files beside it are no doing of growkit's
    write("screen_failing.py", "def keep(text):\n    return len(text) / 0\n")


def _no_datasketch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("growkit.errors.find_spec", lambda name: None)


def _no_library(patch: pytest.MonkeyPatch) -> None:
    _tokenizer(patch)
    patch.setattr("growkit.data.tokenizer.find_spec", lambda name: None)


def _data_set(lines: str) -> Arrange:
    return lambda _: write("data/part.jsonl", lines)


RECIPE_CASES = [
    # The file.
    Case("no such recipe", "train nope", "no-such-recipe", "recipe", "'nope'", "quickstart"),
    Case("recipe is a folder", "train runs", "no-such-recipe", "recipe", "'runs'", "built-in"),
    Case("name of a recipe too long", f"train {'n' * 300}", "no-such-recipe", "recipe", "nnn", "built-in"),
    Case(
        "recipe is not text",
        "train bad.yaml",
        "recipe-unreadable",
        "bad.yaml",
        "0xff",
        "growkit recipes list",
        lambda _: Path("bad.yaml").write_bytes(b"\xff\xfe\x00") and None,
    ),
    recipe("broken YAML", "run: [", "recipe-not-yaml", "line 1", "mend the YAML"),
    recipe("key written twice", "run: {}\nmodel: {}\nrun: {}\n", "recipe-not-yaml", "'run' is written twice", "line 3"),
    recipe("key is not text", "1: 2", "recipe-not-yaml", "a key is not text", "quote"),
    recipe("two documents", "a: 1\n---\nb: 2", "recipe-not-yaml", "another document", "line 2"),
    recipe("Python in YAML", "run: !!python/name:os.system", "recipe-not-yaml", "python/name", "line 1"),
    recipe("too deep", "[" * 1200, "recipe-not-yaml", "recursion", "mend the YAML"),
    recipe("alias of itself", "run: &a {name: *a}", "recipe-not-yaml", "contains itself", "alias", "recipe"),
    recipe("a number too long", f"run: {'9' * 5000}", "recipe-not-yaml", "5000 digits", "mend the YAML"),
    recipe("empty file", "", "recipe-not-mapping", "is not a mapping", "sections"),
    recipe("a list", "- run", "recipe-not-mapping", "['run']", "sections"),
    recipe("a long text", "word " * 1000, "recipe-not-mapping", "word word", "sections"),
    recipe("no model", "run: {name: x}", "no-model", "is missing", "model.preset", "model"),
    recipe("a YAML set", "run: !!set {a}", "wrong-type", "'set'", "plain YAML", "run"),
    # Overrides.
    train("override without =", "optim.lr", "bad-override", "optim.lr", "key=value"),
    train("override without key", "=3", "bad-override", "=3", "key=value"),
    train("override with an empty part", "optim..lr=3", "bad-override", "optim..lr", "key=value"),
    train("list item missing", "stages.7.name=x", "bad-override", "'7' is not an item", "0..1"),
    train("list item negative", "stages.-1.name=x", "bad-override", "'-1' is not an item", "0..1"),
    train("list item not a number", "stages.²=x", "bad-override", "'²' is not an item", "0..1"),
    train("override below a value", "run.folder.x=3", "bad-override", "'3'", "run.folder=VALUE"),
    train("interpolation of nothing", "optim.lr=${model.x}", "bad-interpolation", "'${model.x}'", "${section.key}"),
    train("broken interpolation", "optim.lr=${", "bad-interpolation", "'${'", "\\${"),
    train("unset environment", "run.folder=${oc.env:NOPE_}", "bad-interpolation", "'${oc.env:NOPE_}'", "exists"),
    # Keys.
    train("unknown section", "modle.x=3", "unknown-key", "is not a key", "did you mean 'model'", "modle"),
    train("unknown key", "optim.lrr=3", "unknown-key", "is not a key", "did you mean 'lr'"),
    train("unknown model key", "model.num_layer=3", "unknown-key", "is not a key", "did you mean 'num_layers'"),
    train("another preset's key", "model.mlp_dim=3", "unknown-key", "is not a key", "mlp_tokens"),
    train("unknown stage key", "stages.1.durations=3", "unknown-key", "is not a key", "did you mean 'duration'"),
    train("unknown preset", "model.preset=nope", "unknown-choice", "'nope'", "tokenformer"),
    train("preset is a number", "model.preset=3", "no-model", "3", "name a preset"),
    train("model is a number", "model=3", "no-model", "3", "model.preset"),
    train("section is a number", "optim=3", "not-a-section", "3", "mapping"),
    train("section is a list", "run=[1, 2]", "not-a-section", "[1, 2]", "mapping"),
    train("section is null", "optim=null", "not-a-section", "not null", "leave it out"),
    train("stage is a list", "stages.0=[]", "not-a-section", "[]", "mapping"),
    train("grow is a number", "stages.1.grow=3", "not-a-section", "3", "mapping"),
    train("stages is a number", "stages=3", "not-a-list", "3", "must be a list"),
    train("freeze is a word", "stages.0.freeze=old", "not-a-list", "'old'", "[a, b]"),
    train("no stages", "stages=[]", "no-stages", "is empty", "name and duration"),
    train("stage without name", "stages.1.name=", "missing-key", "is missing", "name and duration"),
    train("stage without duration", "stages.1.duration=null", "missing-key", "is missing", "name and duration"),
    train("no context", "stages.0.context_length=null", "missing-key", "is missing", "first stage"),
    # Types.
    train("word for a number", "optim.lr=fast", "wrong-type", "'fast'", "a finite number"),
    train("not finite", "optim.lr=.inf", "wrong-type", "inf", "a finite number"),
    train("not a number", "optim.clip_norm=nan", "wrong-type", "'nan'", "a finite number"),
    train("truth value for a number", "model.num_layers=true", "wrong-type", "True", "a whole number"),
    train("fraction for a whole number", "model.num_layers=2.5", "wrong-type", "2.5", "a whole number"),
    train("null for a number", "model.num_layers=null", "wrong-type", "not null", "a whole number"),
    train("number for a truth value", "data.shuffle=3", "wrong-type", "3", "true or false"),
    train("truth value for text", "run.folder=true", "wrong-type", "True", "text"),
    train("list for text", "stages.0.duration=[1]", "wrong-type", "[1]", "text"),
    # Values.
    train("folder name with a slash", "run.name=a/b", "bad-name", "'a/b'", "run.folder"),
    train("folder name above", "run.name=..", "bad-name", "'..'", "run.folder"),
    train("no folder name", "run.name=", "bad-name", "''", "run.folder"),
    train("folder name with a control character", "run.name=a\x07", "bad-name", "'a\\x07'", "run.folder"),
    train("negative rate", "optim.lr=-1", "not-positive", "-1", "above zero"),
    train("zero layers", "model.num_layers=0", "not-positive", "0", "above zero"),
    train("zero parameter tokens", "model.attention_tokens=0", "not-positive", "0", "above zero"),
    train("zero speed", "monitor.peak_flops_per_second=0", "not-positive", "0", "above zero"),
    train("too many layers", "model.num_layers=99999999999", "too-large", "99999999999", "at most"),
    train("keep none", "trainer.keep_last=0", "too-small", "0", "at least 1"),
    train("empty blocks", "data.block_tokens=0", "too-small", "0", "at least 1"),
    train("negative scale", "stages.1.lr_scale.old=-1", "too-small", "-1", "at least 0"),
    train("negative context", "stages.0.context_length=-16", "too-small", "-16", "at least 1"),
    train("beta of one", "optim.beta1=1", "out-of-range", "1.0", "[0, 1)"),
    train("all validation", "data.validation_fraction=0.9", "out-of-range", "0.9", "at most 0.5"),
    train("huge seed", f"run.seed={10**30}", "out-of-range", "1000000", "0..2^63-1"),
    train("long n-gram", "monitor.ngram_order=9", "out-of-range", "9", "0..7"),
    train("unknown accelerator", "trainer.accelerator=tpu", "unknown-choice", "'tpu'", "cuda"),
    train("unknown schedule", "stages.0.schedule=linear", "unknown-choice", "'linear'", "cosine"),
    train("one device, ddp", "trainer.strategy=ddp", "strategy-devices", "'ddp'", "single"),
    train("a rate by hours", "optim.lr_by=hours", "unknown-choice", "'hours'", "tokens"),
    train("small vocabulary", "model.vocab_size=10", "vocab-too-small", "10", "256"),
    train("width not divisible", "model.embed_dim=15", "heads-do-not-divide", "15", "multiple of 2"),
    train("kv heads", "model.num_kv_heads=3", "kv-heads-do-not-divide", "3", "divisor of 2"),
    train("odd rotation", "model.head_dim=5", "odd-rotation", "5 of 5", "even", "model.rope_fraction"),
    train("same name twice", "stages.1.name=first", "duplicate-name", "['first', 'first']", "own", "stages"),
    train("freeze an unknown part", "stages.1.freeze=[heart]", "bad-selector", "'heart'", "embedding"),
    train("freeze a bank of no number", "stages.1.freeze=['bank:²']", "bad-selector", "'bank:²'", "bank:N"),
    train("scale an unknown part", "stages.1.lr_scale.heart=2", "bad-selector", "'heart'", "embedding", "lr_scale"),
    train("freeze all", "stages.0.freeze=[old]", "all-frozen", "['old']", "something to train"),
    train(
        "freeze a part that is not there", "stages.1.freeze=[mlp.down]", "selects-nothing", "'mlp.down'", "mlp.tokens"
    ),
    train("freeze a layer that is not there", "stages.1.freeze=['layer:7']", "selects-nothing", "'layer:7'", "layer:0"),
    train("freeze what is not new", "stages.0.freeze=[new]", "selects-nothing", "'new'", "old_layers"),
    train("scale a part that is not there", "optim.lr_scale={mlp.up: 2}", "selects-nothing", "'mlp.up'", "mlp.tokens"),
    train(
        "scale old entries",
        "stages.1.lr_scale.old_entries=2",
        "bad-selector",
        "'old_entries'",
        "one learning rate",
        "stages.1.lr_scale",
    ),
    Case(
        "freeze old entries of shards",
        "train recipe.yaml run.name=new trainer.strategy=fsdp trainer.devices=2 stages.1.freeze=[old_entries]",
        "no-old-entries",
        "stages.1.freeze",
        "fsdp",
        "ddp",
    ),
    train("warm-up longer than the stage", "stages.0.warmup=7 steps", "lr-too-long", "'7 steps'", "2 steps"),
    # Durations and batches.
    train("no unit", "stages.0.duration=5", "bad-duration", "'5'", "'500 steps'"),
    train("unknown unit", "stages.0.duration=5 days", "bad-duration", "'5 days'", "'500 steps'"),
    train("negative duration", "stages.0.duration=-5 steps", "bad-duration", "'-5 steps'", "'500 steps'"),
    train("half a step", "stages.0.duration=1.5 steps", "bad-duration", "'1.5 steps'", "whole number"),
    train("share of nothing", "stages.0.duration=50%", "bad-duration", "'50%'", "'500 steps'"),
    train("more than all", "stages.0.warmup=200%", "bad-duration", "'200%'", "0%..100%"),
    train("empty duration", "stages.0.warmup=", "bad-duration", "''", "'500 steps'"),
    train("infinite duration", "stages.0.duration=1e400 steps", "bad-duration", "'1e400 steps'", "smaller"),
    train("endless duration", "stages.0.duration=9e17 steps", "bad-duration", "'9e17 steps'", "fewer"),
    train("save by tokens", "trainer.save_every=5 tokens", "bad-duration", "'5 tokens'", "'200 steps'"),
    train("zero tokens", "stages.0.duration=0 tokens", "empty-stage", "'0 tokens'", "at least one"),
    train("less than a step", "stages.0.duration=1 flops", "empty-stage", "'1 flops'", "at least one"),
    train("ragged batch", "stages.0.global_batch_tokens=100", "batch-not-whole", "100", "multiple of 16"),
    train("ragged micro batch", "stages.0.micro_batch_size=3", "batch-not-whole", "3", "must divide"),
    # Growth targets.
    train("grow at the start", "stages.0.grow.num_layers=2", "grow-at-start", "'num_layers': 2", "second", "0.grow"),
    train("grow what does not", "stages.1.grow.dropout=1", "cannot-grow", "1", "num_layers"),
    train("shrink", "stages.1.grow.attention_tokens=4", "shrinking-target", "4", "8 or more"),
    train("fewer kv heads", "stages.1.grow.num_kv_heads=1", "shrinking-target", "1", "2 or more"),
    train("grow to a word", "stages.1.grow.attention_tokens=big", "bad-target", "'big'", "whole number"),
    train("grow to true", "stages.1.grow.attention_tokens=true", "bad-target", "True", "whole number"),
    train("insert nothing", "stages.1.grow.insert_at=end", "bad-target", "nothing to insert", "num_layers"),
    train("insert nowhere", "stages.1.grow={num_layers: 2, insert_at: top}", "bad-target", "'top'", "end", "insert_at"),
    train("insert outside", "stages.1.grow={num_layers: 2, insert_at: [9]}", "bad-target", "[9]", "0..0", "insert_at"),
    train("grow too deep", "stages.1.grow.num_layers=99999999999", "too-large", "99999999999", "at most"),
    train("grow what is not there", "stages.1.grow.mlp_dim=64", "nothing-to-grow", "64", "mlp_tokens"),
    train("grow nothing", "stages.1.grow={num_layers: 1}", "nothing-grows", "{'num_layers': 1}", "larger", "1.grow"),
    train("heads beside groups", "stages.1.grow={num_heads: 3, num_kv_heads: 2}", "kv-heads-do-not-divide", "3", "2"),
    train("unknown operator", "stages.1.methods.nope=x", "unknown-choice", "'nope'", "param_tokens"),
    train("unknown method", "stages.1.methods.param_tokens=x", "unknown-method", "'x'", "bank"),
    train("method of nothing", "stages.1.methods.width=pad", "unused-method", "'pad'", "embed_dim"),
    train(
        "method of the other norm", "stages.1.methods.param_tokens=held", "method-does-not-fit", "'held'", "use bank"
    ),
]
DATA_CASES = [
    train("no such file", "data.source=nope.txt", "corpus-missing", "'nope.txt'", "existing file"),
    train("no source", "data.source=", "corpus-missing", "''", "existing file"),
    train("source with a NUL", "data.source=a\x00b", "corpus-missing", "'a\\x00b'", "existing file"),
    train("empty corpus", "data.source=/dev/null", "corpus-empty", "'/dev/null'", "with text"),
    train("nothing matches", "data={source: runs, pattern: '*.md'}", "corpus-empty", "'runs'", "'*.md'", "data.source"),
    train("bad pattern", "data={source: runs, pattern: /x}", "bad-pattern", "'/x'", "relative", "data.pattern"),
    train("no pattern", "data={source: runs, pattern: ''}", "bad-pattern", "''", "relative", "data.pattern"),
    # The operating system refuses to read this one, even to root.
    train("unreadable file", "data.source=/proc/self/mem", "corpus-unreadable", "'/proc/self/mem'", "permissions"),
    Case(
        "corpus shorter than the context",
        "train recipe.yaml run.name=new data.source=short.txt",
        "corpus-too-short",
        "data.source",
        "'short.txt'",
        "more text",
        lambda _: write("short.txt", "too short"),
    ),
    Case(
        "empty folder as a data set",
        "train recipe.yaml run.name=new data.source=hf:data",
        "dataset-unavailable",
        "data.source",
        "'hf:data'",
        "data.split",
        _folder("data"),
    ),
    Case(
        "no such data set",
        "train recipe.yaml run.name=new data.source=hf:/nowhere/nothing",
        "dataset-unavailable",
        "data.source",
        "'hf:/nowhere/nothing'",
        "network",
    ),
    Case(
        "broken data set",
        "train recipe.yaml run.name=new data.source=hf:data",
        "dataset-unavailable",
        "data.source",
        "'hf:data'",
        "data.split",
        _data_set('{"text": "abc"\n{{{'),
    ),
    Case(
        "no such split",
        "train recipe.yaml run.name=new data.source=hf:data data.split=test",
        "dataset-unavailable",
        "data.source",
        'Unknown split "test"',
        "data.split",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
    Case(
        "no such column",
        "train recipe.yaml run.name=new data.source=hf:data data.text_field=body",
        "no-text-field",
        "data.text_field",
        "'body'",
        "text, n",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
    Case(
        "column of numbers",
        "train recipe.yaml run.name=new data.source=hf:data data.text_field=n",
        "not-text",
        "data.text_field",
        "'n'",
        "strings",
        _data_set('{"text": "abc", "n": 1}\n'),
    ),
    # The screen.
    train("negative length", "data.screen.min_bytes=-1", "too-small", "-1", "at least 0"),
    train("lengths that exclude each other", "data.screen={min_bytes: 9, max_bytes: 5}", "too-small", "5",
          "lower data.screen.min_bytes", "data.screen.max_bytes"),
    train("unknown duplicates", "data.screen.deduplicate=fuzzy", "unknown-choice", "'fuzzy'", "near"),
    train("more alike than the same", "data.screen.near_threshold=1.5", "out-of-range", "1.5", "0.1..1"),
    train("few permutations", "data.screen.permutations=8", "out-of-range", "8", "64..4096"),
    train("unknown key of the screen", "data.screen.minimum=3", "unknown-key", "is not a key", "min_bytes"),
    train("a language alone", "data.screen.languages=en", "not-a-list", "'en'", "[a, b]"),
    train("a language of no code", "data.screen.languages=[english]", "unknown-choice", "'english'", "allowed: ace, "),
    train("a function of no module", "data.screen.function=keep", "bad-function", "'keep'", "package.module:name"),
    train("a module that is not there", "data.screen.function=nowhere:keep", "bad-function", "'nowhere'", "PYTHONPATH"),
    train("a module without the function", "data.screen.function=json:keep", "bad-function", "is not there", "a .py"),
    train("a screen that drops all", "data.screen.min_bytes=1000000", "corpus-empty", "1 shorter than min_bytes",
          "let more through", "data.screen"),
    Case("a function that is not there, validated", "validate recipe.yaml data.screen.function=nowhere:keep",
         "bad-function", "data.screen.function", "'nowhere:keep'", "PYTHONPATH"),
    Case("few permutations, planned", "plan recipe.yaml data.screen.permutations=8",
         "out-of-range", "data.screen.permutations", "8", "64..4096"),
    Case("a function that fails", "train recipe.yaml run.name=new data.screen.function=screen_failing:keep",
         "function-failed", "data.screen.function", "ZeroDivisionError", "mend the function", _failing_function),
    Case("near duplicates and no library", "train recipe.yaml run.name=new data.screen.deduplicate=near",
         "not-installed", "data.screen.deduplicate", "datasketch", "growkit[data]", _no_datasketch),
    train("no such tokenizer", "data.tokenizer=nope.json", "tokenizer-unavailable", "'nope.json'", "tokenizer.json"),
    train("no tokenizer", "data.tokenizer=", "tokenizer-unavailable", "''", "tokenizer.json"),
    train("a file that is no tokenizer", "data.tokenizer=corpus.txt", "tokenizer-unavailable", "'corpus.txt'", "whole"),
    train("an end of bytes", "data.end_token=x", "no-end-token", "'x'", "leave it out"),
    Case("a tokenizer that does not say its end", "train recipe.yaml run.name=new data.tokenizer=t.json",
         "no-end-token", "data.tokenizer", "'t.json'", "data.end_token", _tokenizer),
    Case("an end that is no token", "train recipe.yaml run.name=new data.tokenizer=t.json data.end_token=b",
         "no-end-token", "data.end_token", "'b'", "name one of", _tokenizer),
    Case("a vocabulary below the tokenizer's", "train recipe.yaml run.name=new data.tokenizer=t.json data.end_token=z",
         "vocab-too-small", "model.vocab_size", "got 256", "301 or more", _tokenizer),
    Case("a vocabulary below the tokenizer's, validated", "validate recipe.yaml data.tokenizer=t.json data.end_token=z",
         "vocab-too-small", "model.vocab_size", "got 256", "301 or more", _tokenizer),
    Case("a tokenizer and no library", "train recipe.yaml run.name=new data.tokenizer=t.json data.end_token=z",
         "not-installed", "data.tokenizer", "'t.json'", "growkit[hf]", _no_library),
    Case("a run of another tokenizer", "resume runs/run", "tokenizer-changed", "data.tokenizer", "'bytes'", "restore",
         reseal(corpus={"name": "corpus.txt", "sha256": "0", "tokenizer": "0" * 64})),
    Case("text of another tokenizer", "generate runs/run", "tokenizer-changed", "data.tokenizer", "'bytes'", "restore",
         reseal(corpus={"name": "corpus.txt", "sha256": "0", "tokenizer": "0" * 64})),
]  # fmt: skip
TASK_CASES = [
    train("no such task", "data.source=synthetic/inducton", "unknown-choice", "'synthetic/inducton'",
          "did you mean 'synthetic/induction'"),
    train("unknown setting of a task", "data={source: synthetic/induction, task: {size: 3}}", "unknown-key",
          "is not a key", "values", "data.task.size"),
    train("a task of no values", "data={source: synthetic/induction, task: {values: 0}}", "too-small", "got 0",
          "at least 1", "data.task.values"),
    train("a needle beyond the hay", "data={source: synthetic/needle, task: {depth: 2}}", "out-of-range", "2.0",
          "[0, 1]", "data.task.depth"),
    train("a task's settings", "data.task={values: 3}", "not-a-task", "'values': 3", "synthetic/needle", "data.task"),
    train("a task in a tokenizer's ids", "data={source: synthetic/needle, tokenizer: t.json}", "not-for-a-task",
          "'t.json'", "'bytes'", "data.tokenizer"),
    train("a task held out", "data={source: synthetic/needle, validation_fraction: 0.1}", "not-for-a-task", "0.1",
          "0.05", "data.validation_fraction"),
    train("a task beyond the vocabulary", "data={source: synthetic/needle, task: {fillers: 300}}", "vocab-too-small",
          "got 256", "332 or more", "model.vocab_size"),
    train("a context below the task", "data={source: synthetic/selective-copying, task: {memorise: 9}}",
          "context-too-short", "got 16", "18 or more", "stages.0.context_length"),
    Case("a task validated in too short a context", "validate recipe.yaml 'data={source: synthetic/selective-copying}'",
         "context-too-short", "stages.0.context_length", "got 16", "32 or more"),
    Case("growth measured on a task", f"grow {RUN} num_layers=2 -o grown --data synthetic/needle", "not-text",
         "data.source", "'synthetic/needle'", "name a file"),
]  # fmt: skip
