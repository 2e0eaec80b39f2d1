"""What each way to grow does to a small model: the loss before, just after, and 200 steps later, beside the same model
that was not grown.

    python scripts/operator_examples.py [--steps 200] [--seeds 3]

A small transformer and a small TokenFormer train on the standard library's text, bytes in windows of 128, AdamW at a
constant rate. Then each operator grows a copy of it, with every method, and the copy trains on with the same batches.
Larger models do more FLOPs a step; their number is in the table, and the comparison is one of equal tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
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
from growkit.growth.path import grown_config, order  # noqa: E402
from growkit.models.decoder import DecoderLM, build, init_params  # noqa: E402
from growkit.models.presets import PRESETS  # noqa: E402
from growkit.train import hardware  # noqa: E402

CONTEXT, ROWS, LR = 128, 8, 2e-3
VALIDATION_TOKENS = 16384
COMMON = {"embed_dim": 64, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "transformer": COMMON | {"mlp_dim": 128},
    "tokenformer": COMMON | {"attention_tokens": 64, "mlp_tokens": 128},
    "tokenformer, shared norm": COMMON | {"attention_tokens": 64, "mlp_tokens": 128, "token_norm": "shared"},
}
# What each operator grows to: about twice of what is there.
SIZES: dict[str, dict[str, int]] = {
    "depth": {"num_layers": 4},
    "width": {"embed_dim": 128},
    "mlp": {"mlp_dim": 256},
    "experts": {"num_experts": 4},
    "heads": {"num_heads": 4},
    "head_dim": {"head_dim": 64},
    "param_tokens": {"attention_tokens": 128, "mlp_tokens": 256},
    "vocab": {"vocab_size": 512},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=int, default=300, help="steps before growth")
    parser.add_argument("--steps", type=int, default=200, help="steps after it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "operator_examples.json")
    options = parser.parse_args()
    corpus = load_corpus(DataConfig())
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in range(options.seeds):
        stream = TokenStream(corpus.train, block_tokens=CONTEXT, seed=seed)
        for name, fields in MODELS.items():
            rows = found.setdefault(name, {})
            for key, figures in one_model(name, fields, corpus, stream, seed, options).items():
                rows.setdefault(key, []).append(figures)
    rows = [summary(model, key, runs) for model, keys in found.items() for key, runs in keys.items()]
    machine = hardware.environment("cpu", hardware.training_dtype(TrainerConfig(precision="fp32")), 1)
    scale = {"before_steps": options.before, "steps": options.steps, "seeds": options.seeds, "lr": LR}
    scale |= {"context_length": CONTEXT, "batch_tokens": CONTEXT * ROWS, "cores": os.cpu_count()}
    options.output.write_text(json.dumps(scale | {"machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def one_model(
    name: str, fields: dict[str, Any], corpus: Corpus, stream: TokenStream, seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of every method that this model can grow by, and of not growing."""
    config = PRESETS.get(name.partition(",")[0], key="preset")(**fields).expand()
    torch.manual_seed(seed)
    model = build(config, init_params(config, torch.Generator().manual_seed(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, optimizer, stream, 0, options.before)
    before = score(model, corpus)
    found = {}
    for operator in ("", *(o for o in order() if o in SIZES)):
        for method in OPERATORS.get(operator, key="").methods if operator else ("",):
            larger, further = copy.deepcopy((model, optimizer))
            if operator:
                try:
                    grown_config(config, SIZES[operator], {operator: method})
                except ConfigError:  # not for this family
                    continue
                larger, further, report = grow(
                    model, optimizer, methods={operator: method}, seed=seed, **SIZES[operator]
                )
                exact = report.certificate is not None and report.certificate.exact
            parameters, flops = larger.config.num_params(), larger.config.flops_per_token(CONTEXT)
            figures = {
                "parameters": parameters,
                "flops_per_token": flops,
                "before": before,
                "after": score(larger, corpus),
            }
            train(larger, further, stream, options.before, options.steps)
            figures |= {"later": score(larger, corpus)} | ({"exact": exact} if operator else {})
            found[f"{operator} ({method})" if operator else "not grown"] = figures
            print(seed, name, list(found)[-1], figures, flush=True)
    return found


def train(model: DecoderLM, optimizer: torch.optim.Optimizer, stream: TokenStream, start: int, steps: int) -> None:
    for step in range(start, start + steps):
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


def summary(model: str, key: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model, "what": key} | {k: runs[0][k] for k in ("parameters", "flops_per_token")}
    row |= {"exact": bool(runs[0]["exact"])} if "exact" in runs[0] else {}
    for figure in ("before", "after", "later"):
        values = [run[figure] for run in runs]
        row[figure] = {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4)}
        row[figure]["max"] = round(max(values), 4)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | growth | exact | parameters | FLOPs/token | before | after | later |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = {True: "yes", False: "no"}.get(row.get("exact"), "")
        scores = " | ".join(f"{row[f]['mean']:.3f}" for f in ("before", "after", "later"))
        sizes = f"{row['parameters'] / 1e3:.0f}k | {row['flops_per_token'] / 1e6:.2f}M"
        lines.append(f"| {row['model']} | {row['what']} | {exact} | {sizes} | {scores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
