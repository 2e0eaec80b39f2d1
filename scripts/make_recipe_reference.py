"""Writes docs/recipe-reference.md: every key of a recipe, from the dataclasses that read it.

    python scripts/make_recipe_reference.py

A key's line is the comment behind its field; ``LINES`` has those of fields whose name seemed to say it all.
tests/test_docs.py fails if the file is not up to date.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.config import recipe  # noqa: E402
from growkit.models import presets  # noqa: E402
from growkit.models.presets import PRESETS  # noqa: E402

OUTPUT = ROOT / "docs" / "recipe-reference.md"

# key: its line, where the field has no comment
LINES = {
    "model.preset": "which preset's keys the section has",
    "model.num_layers": "attention-and-MLP layers",
    "model.num_heads": "query heads of each layer",
    "model.norm_eps": "added to the mean square or variance",
    "model.rope_base": "base of the rotary angles",
    "model.qk_norm": "RMSNorm over each head of q and k, before the rotation",
    "model.tied_head": "the head reads the embedding table",
    "model.k_tokens": "as q_tokens",
    "model.v_tokens": "as q_tokens",
    "model.o_tokens": "as q_tokens",
    "optim.beta1": "AdamW's, of exp_avg; 0 or more, below 1",
    "optim.beta2": "AdamW's, of exp_avg_sq; 0 or more, below 1",
    "optim.eps": "AdamW's, added to the root of exp_avg_sq",
    "monitor.sample_prompt": "what the samples go on from",
    "stages.N.name": "of the stage; every stage has its own",
}

# key: what it is counted in, where a type alone does not say
UNITS = {
    "data.validation_fraction": "share",
    "data.block_tokens": "tokens",
    "data.bandit.exploration": "share",
    "data.screen.min_bytes": "bytes",
    "data.screen.max_bytes": "bytes",
    "data.screen.near_threshold": "share",
    "data.screen.permutations": "permutations",
    "data.select.keep": "share",
    "data.select.candidates": "rows",
    "data.select.smoothing": "share",
    "model.vocab_size": "entries",
    "model.embed_dim": "dimensions",
    "model.num_layers": "layers",
    "model.num_heads": "heads",
    "model.num_kv_heads": "heads",
    "model.head_dim": "dimensions",
    "model.rope_fraction": "share",
    "model.dropout": "share",
    "model.attention_tokens": "parameter tokens",
    "model.q_tokens": "parameter tokens",
    "model.k_tokens": "parameter tokens",
    "model.v_tokens": "parameter tokens",
    "model.o_tokens": "parameter tokens",
    "model.mlp_tokens": "parameter tokens",
    "model.mlp_dim": "hidden units",
    "model.num_experts": "experts",
    "model.experts_per_token": "experts",
    "monitor.log_every": "steps",
    "monitor.validation_tokens": "tokens",
    "monitor.probe_tokens": "tokens",
    "monitor.ngram_order": "bytes",
    "monitor.sample_tokens": "tokens",
    "monitor.peak_flops_per_second": "FLOP/s",
    "run.threads": "threads",
    "hardware.peak_flops_per_second": "FLOP/s",
    "hardware.utilisation": "share",
    "hardware.memory_gb": "GB",
    "hardware.price_per_hour": "US dollars",
    "hardware.watts": "watts",
    "trainer.devices": "processes",
    "trainer.loss_chunk_tokens": "tokens",
    "trainer.save_every": "steps",
    "trainer.keep_last": "checkpoints",
    "trainer.max_minutes": "minutes",
    "start.step": "steps",
    "start.tokens": "tokens",
    "start.flops": "FLOPs",
    "start.context_length": "tokens",
    "start.global_batch_tokens": "tokens",
    "stages.N.duration": "tokens, steps or flops",
    "stages.N.context_length": "tokens",
    "stages.N.context.start": "tokens",
    "stages.N.context.over": "tokens, steps, flops or %",
    "stages.N.context.multiple": "tokens",
    "stages.N.context.most_lengths": "lengths",
    "stages.N.global_batch_tokens": "tokens",
    "stages.N.micro_batch_size": "sequences",
    "stages.N.until.window": "tokens, steps, flops or %",
    "stages.N.until.least": "nats",
    "stages.N.until.patience": "windows",
    "stages.N.until.horizon": "share",
    "stages.N.until.size_scale": "nats",
    "stages.N.probe": "tokens, steps, flops or %",
    "stages.N.probe_least": "nats",
    "stages.N.warmup": "tokens, steps, flops or %",
    "stages.N.decay": "tokens, steps, flops or %",
    "stages.N.new_warmup": "tokens, steps, flops or %",
    "stages.N.validate_every": "tokens, steps, flops or %",
    "stages.N.min_lr_ratio": "share",
}

HEAD = """\
# Recipe reference

Every key of a recipe. Written by `scripts/make_recipe_reference.py` from the code; do not edit it by hand.

A recipe is read strictly: an unknown key, a wrong type or a value out of range ends in one message that names the key
([errors](errors.md)). `growkit validate RECIPE` checks a recipe and shows its stages without training. On the command
line, `section.key=value` overrides a key; items of a list count from 0: `stages.0.duration='200 steps'`. In a recipe,
`${section.key}` stands for another key's value.

A default of `null` means that the value is worked out, as the line says, or that there is none. What the keys mean
together is in [concepts](concepts.md).

A duration is a number, an optional `k`, `M`, `G` or `B`, `T`, `P`, and a unit: `20M tokens`, `500 steps`, `3e15 flops`.
Where the unit column has `%`, a share of the stage's steps is allowed too: `2%`.
"""

_PRESETS = ", ".join(f"`{name}`" for name in PRESETS)

# heading, prefix of the keys, module and class of the fields, what to say first
SECTIONS: tuple[tuple[str, str, ModuleType, str, str], ...] = (
    ("run", "run", recipe, "RunConfig", ""),
    (
        "model, every preset",
        "model",
        presets,
        "_Common",
        f"`model.preset` must be given: {_PRESETS}. These keys belong to all of them.",
    ),
    *(
        (
            f"model, preset {name}",
            "model",
            presets,
            PRESETS.get(name, key="").__name__,
            "The keys above, and:",
        )
        for name in PRESETS
    ),
    ("data", "data", recipe, "DataConfig", "What the sources are: [use your own data](how-to/own-data.md)."),
    (
        "data.mixture",
        "data.mixture.N",
        recipe,
        "SourceConfig",
        "A list of sources, in place of `data.source` and of the keys of the same names above.",
    ),
    (
        "data.bandit",
        "data.bandit",
        recipe,
        "BanditConfig",
        "An automated curriculum: [let a bandit choose](how-to/bandit.md).",
    ),
    (
        "data.screen",
        "data.screen",
        recipe,
        "ScreenConfig",
        "Which documents are left out: [screen your data](how-to/screen-data.md).",
    ),
    (
        "data.select",
        "data.select",
        recipe,
        "SelectConfig",
        "What a step trains on, by losses: [train on what is worth learning](how-to/hard-samples.md).",
    ),
    ("optim", "optim", recipe, "OptimConfig", "The optimizer is AdamW."),
    ("trainer", "trainer", recipe, "TrainerConfig", ""),
    ("monitor", "monitor", recipe, "MonitorConfig", ""),
    (
        "start",
        "start",
        recipe,
        "StartConfig",
        "Only in the saved recipe of an extended run, in place of `model`; `growkit extend` fills it in.",
    ),
    (
        "logger",
        "logger",
        recipe,
        "LoggerConfig",
        "What is logged, and what happens without a network: [logging](logging.md).",
    ),
    (
        "hardware",
        "hardware",
        recipe,
        "HardwareConfig",
        "What [`growkit plan`](plan.md) reckons with; training does not read it. A figure given here stands in the "
        "place of the preset's.",
    ),
    (
        "stages",
        "stages.N",
        recipe,
        "StageConfig",
        "A list, run in order. The first stage must give `context_length` and `global_batch_tokens`; a later one keeps "
        "both, and `lr`, from the stage before. What `grow` and `methods` take is in [operators](operators/README.md).",
    ),
    (
        "stages: context and window",
        "stages.N.context",
        recipe,
        "CurriculumConfig",
        "What they do: [grow the context](how-to/context-curricula.md). `stages.N.window` has these keys too.",
    ),
    ("stages: context", "stages.N.context", recipe, "ContextConfig", "The keys above, and:"),
    (
        "stages: candidates",
        "stages.N.candidates.N",
        recipe,
        "CandidateConfig",
        "A list, in place of `grow`: [growth that decides](how-to/growth-that-decides.md).",
    ),
    (
        "stages: until",
        "stages.N.until",
        recipe,
        "UntilConfig",
        "When a stage may end before its duration: [growth that decides](how-to/growth-that-decides.md).",
    ),
)


@dataclass(frozen=True)
class Key:
    name: str
    type: str
    default: str
    line: str


def keys(module: ModuleType, owner: str, prefix: str) -> Iterator[Key]:
    """The fields of class ``owner`` as its source writes them, in order."""
    source = inspect.getsource(module)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "type: ignore" not in token.string
    }
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == owner)
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name = f"{prefix}.{field.target.id}"
        if name == "model.preset" and owner != "_Common":
            continue
        if name in {prefix for _, prefix, *_ in SECTIONS}:  # has a table of its own
            continue
        comment = comments.get(field.lineno, "")
        if bool(comment) == (name in LINES):
            raise SystemExit(f"{name}: give it a comment in {module.__name__} or a line in {__file__}, and not both")
        yield Key(name, _type(field.annotation), _default(field.value), comment or LINES[name])


def _type(annotation: ast.expr) -> str:
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    text = ast.unparse(annotation).removesuffix(" | None")
    kind = {"list[str]": "list of text", "list[SourceConfig]": "list of sources", "dict[str, str]": "mapping of text"}
    kind |= {"dict[str, int]": "mapping of whole numbers", "list[int]": "list of whole numbers"}
    kind |= {"ContextConfig": "section", "CurriculumConfig": "section", "SelectConfig": "section"}
    kind |= {"ContextConfig": "section", "CurriculumConfig": "section", "UntilConfig": "section"}
    kind |= {"list[CandidateConfig]": "list of candidates"}
    kind |= {"dict[str, float]": "mapping of numbers", "dict[str, Any]": "mapping"}
    return (words | kind)[text]


def _default(value: ast.expr | None) -> str:
    if value is None or ast.unparse(value) == "MISSING":
        return "must be given"
    if isinstance(value, ast.Constant):
        literal = value.value
        if literal == "":
            return "must be given"  # the preset, which chooses the class
        if isinstance(literal, bool) or literal is None:
            return f"`{str(literal).lower().replace('none', 'null')}`"
        return f"`{literal!r}`" if isinstance(literal, str) and literal != literal.strip() else f"`{literal!s}`"
    factory = {"field(default_factory=dict)": "`{}`", "field(default_factory=list)": "`[]`"}
    return factory[ast.unparse(value)]


def render() -> str:
    parts, seen = [HEAD], set()
    for heading, prefix, module, owner, said in SECTIONS:
        parts.append(f"## {heading}\n")
        if said:
            parts.append(f"{said}\n")
        rows = ["| key | type | default | unit | what it is |", "|---|---|---|---|---|"]
        for key in keys(module, owner, prefix):
            seen.add(key.name)
            line = key.line.replace("|", "\\|")
            rows.append(f"| `{key.name}` | {key.type} | {key.default} | {UNITS.get(key.name, '–')} | {line} |")
        parts.append("\n".join(rows) + "\n")
    stale = (LINES.keys() | UNITS.keys()) - seen
    if stale:
        raise SystemExit(f"no such key: {', '.join(sorted(stale))}")
    return "\n".join(parts)


def main() -> None:
    OUTPUT.write_text(render(), encoding="utf-8")
    print(f"wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
