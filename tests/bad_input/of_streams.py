"""Mistakes in AltUp's streams, fresh and grown."""

from __future__ import annotations

from tests.bad_input.support import Case, train


def model(name: str, words: str, at: str, code: str, value: str, mend: str) -> Case:
    """A row for a model with ``words`` (key: value); ``at``: the key to name, below ``model``."""
    said = " ".join(f"model.{word.replace(': ', '=')}" for word in words.split(", "))
    return Case(name, f"train recipe.yaml run.name=new {said}", code, f"model.{at}", value, mend)


def grow(name: str, words: str, at: str, code: str, value: str, mend: str, before: str = "") -> Case:
    """A row for a second stage that grows by ``words`` the model that ``before`` describes."""
    section, _, field = at.rpartition(".")
    case = train(name, f"stages.1={{name: b, duration: 2 steps, {words}}}", code, value, mend)
    command = f"{case.words} {before}".strip()
    return Case(name, command, code, f"stages.1.{section or 'grow'}.{field}", value, mend)


FOUR = "model.altup_blocks=4"
MAMBA = "model.preset=mamba model.attention_tokens=8 model.mlp_tokens=8"
MAMBA_CASES = [
    model("a pattern that does not fit", "preset: mamba, pattern: mamba+attention, num_layers: 3", "pattern",
          "bad-layers", "'mamba+attention'", "num_layers=4"),
    model("a pattern of what is not", "preset: mamba, pattern: mamba+moe", "pattern", "bad-layers", "'mamba+moe'",
          "mamba*7+attention"),
    model("a pattern of no number", "preset: mamba, pattern: mamba*x", "pattern", "bad-layers", "'mamba*x'",
          "how often"),
    model("no states", "preset: mamba, d_state: 0", "d_state", "not-positive", "0", "above zero"),
    model("channels that forget at once", "preset: mamba, dt_min: 0", "dt_min", "not-positive", "0", "above zero"),
    model("least above most", "preset: mamba, dt_min: 0.5", "dt_max", "too-small", "0.1", "dt_max=0.5"),
    model("maps that are not", "preset: mamba, projection: dense", "projection", "unknown-choice", "'dense'",
          "linear, pattention"),
    grow("fewer states", "grow: {d_state: 8}", "d_state", "shrinking-target", "8", "choose 16 or more", MAMBA),
    grow("fewer channels", "grow: {expand: 1}", "expand", "shrinking-target", "16", "choose 32 or more", MAMBA),
    grow("channels said twice", "grow: {expand: 3, d_inner: 48}", "d_inner", "bad-target", "48", "leave one", MAMBA),
    grow("a lower rank", "grow: {dt_rank: 0}", "dt_rank", "bad-target", "0", "whole number", MAMBA),
    grow("fewer taps", "grow: {d_conv: 2}", "d_conv", "shrinking-target", "2", "choose 4 or more", MAMBA),
    grow("states of attention", "grow: {d_state: 32}", "d_state", "nothing-to-grow", "32", "preset=mamba"),
    grow("heads of Mamba", "grow: {num_heads: 4}", "num_heads", "nothing-to-grow", "4", "grow d_state", MAMBA),
]  # fmt: skip
STREAM_CASES = [
    model("no block", "altup_blocks: 0", "altup_blocks", "not-positive", "0", "above zero"),
    model("blocks without end", "altup_blocks: 65", "altup_blocks", "too-large", "65", "at most 64"),
    model("an order there is not", "altup_order: late", "altup_order", "unknown-choice", "'late'", "round_robin"),
    model("a variant there is not", "altup_variant: wide", "altup_variant", "unknown-choice", "'wide'",
          "recycled, full"),
    model("a turn there is not", "altup_active: other", "altup_active", "unknown-choice", "'other'",
          "alternating"),
    model("routes of one block", "altup_coefficients: routed", "altup_coefficients", "nothing-to-route", "'routed'",
          "altup_blocks to 2"),
    model("routes of a free stream", "altup_blocks: 2, altup_coefficients: routed, altup_order: free",
          "altup_coefficients", "nothing-to-route", "'routed'", "gemma or paper"),
    model("a round over too few layers", "altup_blocks: 3, altup_order: round_robin", "altup_blocks", "too-large", "3",
          "use 1 or fewer"),
    model("a stride of no tokens", "altup_stride: 0", "altup_stride", "not-positive", "0", "above zero"),
    model("a stride of blocks", "altup_blocks: 2, altup_stride: 2", "altup_stride", "streams-exclude", "2",
          "one of the"),
    Case("a stride that does not divide", "train recipe.yaml run.name=new model.num_layers=3 model.altup_stride=3",
         "not-a-multiple", "stages.0.context_length", "16", "use 15 or 18"),
    Case("a stride over documents", "train recipe.yaml run.name=new model.num_layers=3 model.altup_stride=4 "
         "data.packing=documents", "streams-exclude", "data.packing", "'documents'", "decompose"),
    Case("a stride in a window", "train recipe.yaml run.name=new model.num_layers=3 model.altup_stride=4 "
         "'stages.0.window={schedule: linear, start: 8}'", "streams-exclude", "stages.0.window", "stride", "leave it"),
    grow("fewer blocks", "grow: {altup_blocks: 2}", "altup_blocks", "shrinking-target", "2", "choose 4 or more", FOUR),
    grow("blocks that are no number", "grow: {altup_blocks: many}", "altup_blocks", "bad-target", "'many'", "number"),
    grow("too many blocks", "grow: {altup_blocks: 100}", "altup_blocks", "too-large", "100", "at most 64"),
    grow("parts thrown away", "grow: {altup_variant: recycled}", "altup_variant", "shrinking-target", "'recycled'",
         "stays full", f"{FOUR} model.altup_variant=full"),
    grow("parts of one block", "grow: {altup_variant: full}", "altup_variant", "nothing-to-grow", "one",
         "altup_blocks"),
    grow("a variant grown that is not", "grow: {altup_blocks: 2, altup_variant: x}", "altup_variant", "unknown-choice",
         "'x'", "recycled, full"),
    grow("an order grown that is not", "grow: {altup_blocks: 2, altup_order: free}", "altup_order", "unknown-choice",
         "'free'", "gemma"),
    grow("another order", "grow: {altup_blocks: 8, altup_order: paper}", "altup_order", "unknown-choice", "'paper'",
         "gemma", FOUR),
    grow("coefficients that are not", "grow: {altup_blocks: 2, altup_coefficients: x}", "altup_coefficients",
         "unknown-choice", "'x'", "static, routed"),
    grow("routes from block to block", "grow: {altup_blocks: 2, altup_coefficients: routed}", "altup_coefficients",
         "nothing-to-route", "'routed'", "same or copies"),
    grow("routes later", "grow: {altup_blocks: 8, altup_coefficients: routed}", "altup_coefficients", "bad-target",
         "'routed'", "leave it out", FOUR),
    grow("a clone of nothing", "grow: {altup_blocks: 2}, methods: {altup: clone}", "methods.altup",
         "method-does-not-fit", "'clone'", "use pull"),
    grow("a second start", "grow: {altup_blocks: 8}, methods: {altup: pull}", "methods.altup", "method-does-not-fit",
         "'pull'", "use clone", FOUR),
    grow("clones that do not come out", "grow: {altup_blocks: 6}", "altup_blocks", "bad-target", "6", "multiple of 4",
         FOUR),
    grow("blocks nobody writes", "grow: {altup_blocks: 4}, methods: {altup: passive}", "methods.altup",
         "method-does-not-fit", "'passive'", "clone",
         "model.num_layers=4 model.altup_order=round_robin model.altup_blocks=2"),
    grow("blocks over a stride", "grow: {altup_blocks: 2}", "altup_blocks", "streams-exclude", "2", "altup_stride",
         "model.num_layers=3 model.altup_stride=2"),
]  # fmt: skip
