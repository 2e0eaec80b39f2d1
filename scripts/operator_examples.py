"""What each way to grow does to a small model: the loss before, just after, and 200 steps later, beside the same model
that was not grown.

    python scripts/operator_examples.py [--steps 200] [--seeds 2] [--only MODEL]

Small transformers and small TokenFormers train on the standard library's text, bytes in windows of 128, AdamW at a
constant rate. Then each operator grows a copy of the model, with every method, and the copy trains on with the same
batches; where a method comes in under a ramp, the ramp rises over the first half of these steps. Larger models do more
FLOPs a step; their number is in the table, and the comparison is one of equal tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit import grow  # noqa: E402
from growkit.config.recipe import DataConfig, TrainerConfig  # noqa: E402
from growkit.data.corpus import Corpus, load_corpus  # noqa: E402
from growkit.data.stream import TokenStream  # noqa: E402
from growkit.errors import ConfigError  # noqa: E402
from growkit.eval.ngram import bits  # noqa: E402
from growkit.eval.validate import mean_loss  # noqa: E402
from growkit.growth.operator import OPERATORS  # noqa: E402
from growkit.growth.path import grown_config  # noqa: E402
from growkit.models.config import ModelConfig, is_masked  # noqa: E402
from growkit.models.decoder import DecoderLM, build, init_params  # noqa: E402
from growkit.models.presets import PRESETS  # noqa: E402
from growkit.train import hardware  # noqa: E402

CONTEXT, ROWS, LR = 128, 8, 2e-3
VALIDATION_TOKENS = 16384
Sizes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model, and what it is grown to: sizes, each by every method that reaches them, or by those named with it.
    ``halfway``: what it was grown to already, after half of its steps, where an operator starts from that."""

    preset: str
    fields: dict[str, Any]
    growths: list[tuple[Sizes, tuple[str, ...]]]
    halfway: Sizes = field(default_factory=dict)

    def source(self) -> ModelConfig:
        return PRESETS.get(self.preset, key="preset")(embed_dim=64, num_heads=2, **self.fields).written_out()


TOKENS, MORE_TOKENS, FEWER_TOKENS = ({"attention_tokens": n, "mlp_tokens": 2 * n} for n in (64, 128, 32))
SHARED: dict[str, Any] = {"num_layers": 2, "token_norm": "shared"} | TOKENS
ALL: tuple[str, ...] = ()
FAMILIES = {
    "transformer": Family(
        "transformer",
        {"num_layers": 2, "mlp_dim": 128},
        [
            ({"embed_dim": 128}, ALL),
            ({"mlp_dim": 256}, ALL),
            ({"num_experts": 4}, ALL),
            ({"num_heads": 4}, ALL),
            ({"head_dim": 64}, ALL),
            ({"vocab_size": 512}, ALL),
        ],
    ),
    "transformer, 4 layers": Family(  # of two, the ways to stack would all be the same one
        "transformer",
        {"num_layers": 4, "mlp_dim": 128},
        [({"num_layers": 6}, ALL), ({"num_layers": 8}, ("interleave",))],
    ),
    "transformer, blocks": Family(
        "transformer",
        {"num_layers": 4, "mlp_dim": 128},
        [
            ({"altup_blocks": 2}, ALL),
            ({"altup_blocks": 2, "altup_variant": "full"}, ("pull",)),
            ({"altup_blocks": 4}, ("pull", "copies")),
            ({"altup_blocks": 4, "altup_order": "free"}, ("copies",)),
            ({"altup_blocks": 4, "altup_coefficients": "routed"}, ("same",)),
        ],
    ),
    "transformer, two blocks": Family(
        "transformer",
        {"num_layers": 4, "mlp_dim": 128, "altup_blocks": 2},
        [({"altup_blocks": 4}, ALL), ({"altup_variant": "full"}, ("clone",))],
    ),
    "mamba": Family(
        "mamba",
        {"num_layers": 4, "d_state": 8},
        [
            ({"expand": 3}, ALL),
            ({"d_state": 16}, ALL),
            ({"dt_rank": 8}, ALL),
            ({"d_conv": 8}, ALL),
            ({"num_layers": 6}, ("identity",)),
        ],
    ),
    "transformer, other angles": Family(
        "transformer",
        {"num_layers": 2, "mlp_dim": 128},
        [
            ({"rope_base": 500000}, ALL),
            ({"rope_factor": 4}, ALL),
            ({"rope_factor": 4, "rope_context": CONTEXT}, ALL),
        ],
    ),
    "transformer, 4 experts": Family(
        "transformer",
        {"num_layers": 2, "mlp_dim": 64, "num_experts": 4, "experts_per_token": 2},
        [({"num_experts": 8, "experts_per_token": 4}, ALL), ({"num_experts": 8}, ALL)],
    ),
    "tokenformer": Family(
        "tokenformer",
        {"num_layers": 2} | TOKENS,
        [
            ({"num_layers": 4}, ("identity",)),
            ({"embed_dim": 128}, ("pad",)),
            ({"num_heads": 4}, ("zero_out",)),
            ({"head_dim": 64}, ALL),
            (MORE_TOKENS, ALL),
            (FEWER_TOKENS, ALL),
        ],
    ),
    "tokenformer, two banks": Family(
        "tokenformer", {"num_layers": 2} | TOKENS, [({"token_banks": 1}, ALL)], halfway=MORE_TOKENS
    ),
    "tokenformer, shared norm": Family("tokenformer", SHARED, [(MORE_TOKENS, ALL), (FEWER_TOKENS, ALL)]),
    "tokenformer, shared norm, two banks": Family("tokenformer", SHARED, [({"token_banks": 1}, ALL)], MORE_TOKENS),
}


@dataclass(frozen=True)
class Case:
    operator: str
    method: str
    sizes: Sizes


def cases() -> dict[str, list[Case]]:
    """By family, every growth that its model can do. All operators are among them, each with all of its methods."""
    found = {name: [case for growth in of.growths for case in reached(of, *growth)] for name, of in FAMILIES.items()}
    measured = {(case.operator, case.method) for of in found.values() for case in of}
    missing = {(name, method) for name, of in OPERATORS.items() for method in of.methods} - measured
    assert not missing, f"no family of FAMILIES shows {sorted(missing)}"
    return found


def reached(family: Family, sizes: Sizes, methods: tuple[str, ...]) -> list[Case]:
    name, operator = next((name, of) for name, of in OPERATORS.items() if set(of.fields) & set(sizes))
    source = grown_config(family.source(), family.halfway, {})
    found = []
    for method in methods or operator.methods:
        try:
            grown_config(source, sizes, {name: method})
        except ConfigError:  # not for this family
            continue
        found.append(Case(name, method, sizes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=int, default=300, help="steps before growth")
    parser.add_argument("--steps", type=int, default=200, help="steps after it")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", choices=FAMILIES, help="this model; the rows of others stay as they were measured")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "operator_examples.json")
    options = parser.parse_args()
    corpus = load_corpus(DataConfig())
    rows: list[dict[str, Any]] = []
    kept = json.loads(options.output.read_text())["rows"] if options.only else []
    for name, growths in cases().items():
        if options.only not in (None, name):
            rows += [row for row in kept if row["model"] == name]
            continue
        runs = [one_seed(FAMILIES[name], growths, corpus, seed, options) for seed in range(options.seeds)]
        for of_row in zip(*runs, strict=True):
            rows.append({"model": name} | summary(of_row))
            print(json.dumps(rows[-1]), flush=True)
    machine = hardware.environment("cpu", hardware.training_dtype(TrainerConfig(precision="fp32")), 1)
    scale = {"before_steps": options.before, "steps": options.steps, "seeds": options.seeds, "lr": LR}
    scale |= {"context_length": CONTEXT, "batch_tokens": CONTEXT * ROWS, "cores": os.cpu_count()}
    options.output.write_text(json.dumps(scale | {"machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows, options.steps))


def one_seed(
    family: Family, growths: list[Case], corpus: Corpus, seed: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Of not growing, and of every growth of a copy of the same model, in this order."""
    stream = TokenStream(corpus.train, block_tokens=CONTEXT, seed=seed)
    tokens, targets = stream.read(options.before * ROWS * CONTEXT, ROWS, CONTEXT)
    probe = torch.cat([tokens, targets[:, -1:]], dim=1)  # of the text that is trained on next
    torch.manual_seed(seed)
    config = family.source()
    model = build(config, init_params(config, torch.Generator().manual_seed(seed)))
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    half = options.before // 2
    train(model, optimizer, stream, range(half))
    if family.halfway:
        model, optimizer, _ = grow(model, optimizer, probe=probe, seed=seed, **family.halfway)
    train(model, optimizer, stream, range(half, options.before))
    before = score(model, corpus)
    steps = range(options.before, options.before + options.steps)
    rows = []
    for case in (None, *growths):
        row: dict[str, Any] = {"growth": "not grown", "before": before}
        larger, further = copy.deepcopy((model, optimizer))
        if case is not None:
            larger, further, report = grow(
                model, optimizer, methods={case.operator: case.method}, probe=probe, seed=seed, **case.sizes
            )
            assert report.certificate is not None
            row |= {"growth": f"{case.operator} ({case.method})", "sizes": case.sizes}
            row |= {"exact": report.certificate.exact}
        size, flops = larger.config.num_params(), larger.config.flops_per_token(CONTEXT)
        row |= {"parameters": size, "flops_per_token": flops, "after": score(larger, corpus)}
        train(larger, further, stream, steps, ramp_steps=options.steps // 2 if is_masked(larger.config) else 0)
        rows.append(row | {"later": score(larger, corpus)})
        rows[-1]["against_not_grown"] = rows[-1]["later"] - rows[0]["later"]
    return rows


def train(
    model: DecoderLM, optimizer: torch.optim.Optimizer, stream: TokenStream, steps: range, *, ramp_steps: int = 0
) -> None:
    for step in steps:
        if ramp_steps:
            model.set_ramp(min(1.0, (step - steps.start) / ramp_steps))
        tokens, targets = stream.read(step * ROWS * CONTEXT, ROWS, CONTEXT)
        optimizer.zero_grad()
        model(tokens, targets).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def score(model: DecoderLM, corpus: Corpus) -> float:
    """Validation in bits per byte."""
    with torch.no_grad():
        total, count = mean_loss(model, corpus.validation, CONTEXT, VALIDATION_TOKENS)
    return bits(total / count)


def summary(runs: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One row of all seeds: what they have in common, and mean, least and largest of what they scored."""
    row = dict(runs[0])
    for figure in ("before", "after", "later", "against_not_grown"):
        values = [run[figure] for run in runs]
        row[figure] = {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4)}
        row[figure]["max"] = round(max(values), 4)
    return row


def table(rows: list[dict[str, Any]], steps: int) -> str:
    titles = "model", "growth", "to", "parameters", "FLOPs a token", "just after", f"{steps} steps later"
    lines = [f"| {' | '.join(titles)} | against not grown (least, largest) |", "|---" * 8 + "|"]
    for row in rows:
        operator, _, method = row["growth"].rstrip(")").partition(" (")
        growth = f"{operator} `{method}`" if "sizes" in row else row["growth"]
        to = ", ".join(f"`{key}` {value}" for key, value in row.get("sizes", {}).items())
        sizes = f"{row['parameters'] / 1e3:.0f}k | {row['flops_per_token'] / 1e6:.2f}M"
        scores = " | ".join(f"{row[figure]['mean']:.3f}" for figure in ("after", "later"))
        against = "{mean:+.3f} ({min:+.3f}, {max:+.3f})".format_map(row["against_not_grown"]) if "sizes" in row else ""
        lines.append(f"| {row['model']} | {growth} | {to} | {sizes} | {scores} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
