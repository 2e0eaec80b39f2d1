"""growkit's ``transformer`` preset beside a nanoGPT-style GPT of the same size, on the same tokens in the same order.

    python scripts/bench_nanogpt.py [--seeds 2] [--quick]

Both arms go through the same loop: the same batches, warm-up and cosine, AdamW, clipping, the same three learning
rates, the same seeds. Each arm is judged at the rate that is best for it on average over the seeds. Writes every
trial's numbers (JSON) and the curves at the best rates (PNG).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkit.config.recipe import DataConfig
from growkit.data.corpus import Corpus, load_corpus
from growkit.data.shape import StepShape
from growkit.data.stream import Batches, TokenStream
from growkit.data.tokenizer import VOCAB_SIZE
from growkit.eval.ngram import bits
from growkit.eval.validate import mean_loss
from growkit.models.decoder import build, init_params
from growkit.models.loss import TokenLoss, chunked_cross_entropy
from growkit.models.presets import PRESETS
from growkit.models.spec import param_specs
from growkit.optim.groups import param_groups
from growkit.report.curve import draw_curves
from growkit.report.history import History
from growkit.schedule.lr import LRSchedule
from growkit.train import hardware

ROOT = Path(__file__).resolve().parent.parent
EMBED_DIM, NUM_LAYERS, NUM_HEADS = 128, 3, 4  # about 0.64M parameters
CONTEXT, BATCH_TOKENS = 128, 1024
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
WARMUP_SHARE, FINAL_LR_SHARE = 0.05, 0.1
WEIGHT_DECAY, BETAS, CLIP_NORM = 0.1, (0.9, 0.95), 1.0
SIZE_TOLERANCE = 0.03

Groups = list[dict[str, Any]]  # AdamW's
Arm = Callable[[int], tuple[nn.Module, Groups]]  # seed → a fresh model and its parameter groups


class GPT(nn.Module):
    """GPT-2 as nanoGPT trains it: learned positions, LayerNorm and linear maps without bias, GELU, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, EMBED_DIM)
        self.positions = nn.Embedding(CONTEXT, EMBED_DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(EMBED_DIM, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what writes the residual stream starts smaller: two writes a block
                std = 0.02 / math.sqrt(2 * NUM_LAYERS) if name.endswith("_out.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor, targets: Tensor) -> TokenLoss:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        h = self.norm(self.blocks(x)).flatten(0, 1)
        return chunked_cross_entropy(
            h, self.tokens.weight, targets.flatten(), logit_scale=1.0, z_loss=0.0, chunk_tokens=0
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(EMBED_DIM, bias=False)
        self.qkv = nn.Linear(EMBED_DIM, 3 * EMBED_DIM, bias=False)
        self.attention_out = nn.Linear(EMBED_DIM, EMBED_DIM, bias=False)
        self.mlp_norm = nn.LayerNorm(EMBED_DIM, bias=False)
        self.mlp_in = nn.Linear(EMBED_DIM, 4 * EMBED_DIM, bias=False)
        self.mlp_out = nn.Linear(4 * EMBED_DIM, EMBED_DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, NUM_HEADS, width // NUM_HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


def nanogpt(seed: int) -> tuple[nn.Module, Groups]:
    """Decays everything with two dimensions, embeddings included, as nanoGPT does."""
    torch.manual_seed(seed)
    model = GPT()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return model, [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def growkit(seed: int) -> tuple[nn.Module, Groups]:
    """The ``transformer`` preset with growkit's own initialisation and parameter groups."""
    preset = PRESETS.get("transformer", key="preset")
    config = preset(embed_dim=EMBED_DIM, num_layers=NUM_LAYERS, num_heads=NUM_HEADS).written_out()
    model = build(config, init_params(config, torch.Generator().manual_seed(seed)))
    parameters = dict(model.named_parameters())
    groups = param_groups(param_specs(config), {}, 0, weight_decay=WEIGHT_DECAY, decay_embedding=False, lr_scale={})
    return model, [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups
    ]


ARMS: dict[str, Arm] = {"growkit transformer": growkit, "nanoGPT-style": nanogpt}


@dataclass(frozen=True)
class Trial:
    """``curve``: records as report/history.py reads them."""

    arm: str
    lr: float
    seed: int
    bits_per_byte: float
    seconds: float
    curve: list[dict[str, Any]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=2, help="runs at each learning rate (default: 2)")
    arguments.add_argument("--steps", type=int, default=1300, help=f"of {BATCH_TOKENS} tokens (default: 1300)")
    arguments.add_argument("--validation-tokens", type=int, default=131072, help="at the end (default: 131072)")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: PyTorch's")
    arguments.add_argument("--quick", action="store_true", help="a minute: one seed, 30 steps")
    arguments.add_argument("--output", type=Path, default=ROOT / "docs/results/bench_nanogpt", help="without suffix")
    options = arguments.parse_args()
    if options.quick:
        options.seeds, options.steps, options.validation_tokens = 1, 30, 16384
    torch.set_num_threads(options.threads)

    corpus = load_corpus(DataConfig())
    sizes = {arm: sum(p.numel() for p in fresh(0)[0].parameters()) for arm, fresh in ARMS.items()}
    assert max(sizes.values()) <= (1 + SIZE_TOLERANCE) * min(sizes.values()), sizes
    print(", ".join(f"{arm}: {size:,} parameters" for arm, size in sizes.items()), flush=True)

    trials = []
    for seed in range(options.seeds):
        for lr in LEARNING_RATES:
            for arm in ARMS:
                trials.append(train(arm, lr, seed, corpus, options))
                last = trials[-1]
                print(
                    f"{arm:<22}lr {lr:g}  seed {seed}  {last.bits_per_byte:.4f} bits/byte  {last.seconds:.0f} s",
                    flush=True,
                )

    best = {arm: [t for t in trials if t.arm == arm and t.lr == best_lr(trials, arm)] for arm in ARMS}
    summary = {arm: summarise(chosen, sizes[arm]) for arm, chosen in best.items()}
    curves = {f"{t.arm}, seed {t.seed}": t.curve for chosen in best.values() for t in chosen}
    report(summary, options.seeds)
    ours, peer = (summary[arm]["mean"] for arm in ARMS)
    result = {
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "tokens": options.steps * BATCH_TOKENS,
        "batch_tokens": BATCH_TOKENS,
        "context_length": CONTEXT,
        "learning_rates": LEARNING_RATES,
        "seeds": options.seeds,
        "validation_tokens": options.validation_tokens,
        "quick": options.quick,
        "machine": {"cores": os.cpu_count()} | hardware.environment("cpu", torch.float32, 1),
        "final_bits_per_byte": summary,
        "difference": round(ours - peer, 4),
        "trials": [{k: v for k, v in vars(t).items() if k != "curve"} for t in trials],
        "curves": curves,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    histories = [History.of(name, curve) for name, curve in curves.items()]
    draw_curves(histories, options.output.with_suffix(".png"), x="tokens")
    print(f"wrote {options.output}.json and .png")


def train(arm: str, peak: float, seed: int, corpus: Corpus, options: argparse.Namespace) -> Trial:
    """One trial; the batches depend on the seed alone."""
    began = time.perf_counter()
    model, groups = ARMS[arm](seed)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    warmup = max(1, round(WARMUP_SHARE * options.steps))
    schedule = LRSchedule("cosine", 0.0, peak, FINAL_LR_SHARE * peak, options.steps, warmup, 0)
    stream, shape = (
        TokenStream(corpus.train, block_tokens=CONTEXT, seed=seed),
        StepShape(BATCH_TOKENS // CONTEXT, CONTEXT),
    )
    batches = iter(Batches(stream, stream.begin(), lambda _: shape))
    curve: list[dict[str, Any]] = []

    def record(kind: str, step: int, nats: float) -> None:
        curve.append({"kind": kind, "step": step, "tokens": step * BATCH_TOKENS, "bits_per_byte": round(bits(nats), 5)})

    for step in range(options.steps):
        batch = next(batches)
        loss = model(batch.tokens, batch.targets).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.step()
        if (step + 1) % 10 == 0:
            record("step", step + 1, loss.item())
        if (step + 1) % max(1, options.steps // 8) == 0 and step + 1 < options.steps:
            record("validation", step + 1, held_out(model, corpus, options.validation_tokens // 4))
    final = held_out(model, corpus, options.validation_tokens)
    record("validation", options.steps, final)
    return Trial(arm, peak, seed, round(bits(final), 5), round(time.perf_counter() - began, 1), curve)


def held_out(model: nn.Module, corpus: Corpus, tokens: int) -> float:
    """Mean nats per byte of the validation split."""
    total, count = mean_loss(model, corpus.validation, CONTEXT, tokens)
    return total / count


def best_lr(trials: list[Trial], arm: str) -> float:
    def mean(lr: float) -> float:
        return statistics.mean(t.bits_per_byte for t in trials if t.arm == arm and t.lr == lr)

    return min(LEARNING_RATES, key=mean)


def summarise(chosen: list[Trial], parameters: int) -> dict[str, Any]:
    values = [trial.bits_per_byte for trial in chosen]
    return {
        "parameters": parameters,
        "best_lr": chosen[0].lr,
        "mean": round(statistics.mean(values), 4),
        "min": min(values),
        "max": max(values),
        "std": round(statistics.stdev(values), 5) if len(values) > 1 else None,
        "seconds": round(statistics.mean(trial.seconds for trial in chosen), 1),
    }


def report(summary: dict[str, dict[str, Any]], seeds: int) -> None:
    print(f"\nvalidation bits per byte at the best learning rate, {seeds} seed(s)")
    print(f"{'arm':<22}{'best lr':>9}{'mean':>9}{'min':>9}{'max':>9}{'std':>9}")
    for arm, s in summary.items():
        std = "–" if s["std"] is None else f"{s['std']:.4f}"
        print(f"{arm:<22}{s['best_lr']:>9g}{s['mean']:>9.4f}{s['min']:>9.4f}{s['max']:>9.4f}{std:>9}")


if __name__ == "__main__":
    main()
