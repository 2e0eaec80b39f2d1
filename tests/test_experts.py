"""The mixture of experts against a loop over tokens and against Hugging Face's Mixtral; its balance loss; upcycling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import gelu, silu

from growkit.cli import checkpoints
from growkit.errors import ConfigError
from growkit.growth.engine import grow
from growkit.growth.path import grown_config, path
from growkit.growth.verify import Certificate
from growkit.models.config import MoEMLP, from_json, to_json
from growkit.models.decoder import build
from growkit.models.experts import MixtureFeedForward, balance_loss
from growkit.models.spec import param_specs
from tests.contract import GRADIENT_TOLERANCE, generator
from tests.support import cli, model_config, probe, recipe_dict, records, trained_like, write_recipe

# Relative, of outputs and gradients: the same sums, by expert and not by token. Sums of up to 1000 terms: some 30
# roundings of 6e-8; products under autocast read and write bf16, roundings of 4e-3.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
PARITY = 1e-5  # absolute, float32 logits of size 1 from another implementation: a few hundred roundings of 6e-8
NOISE_LEVEL = 0.25  # relative: tokens' gradients are not quite independent, gates not quite 1/k (measured: 9 %)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def mixture(spec: MoEMLP, embed: int, dtype: torch.dtype = torch.float64) -> MixtureFeedForward:
    module = MixtureFeedForward(spec, embed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator(3))
    return module.to(dtype)


def naive(module: MixtureFeedForward, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    spec, rows = module.spec, []
    inward = (module.gate_up if spec.gated else module.up).weight
    for token in x.flatten(0, -2).unbind():
        scores = module.router.weight @ token
        order = scores.detach().argsort(descending=True).tolist()
        chosen = order[: spec.experts_per_token]
        exponentials = {e: (scores[e] - scores[chosen[0]]).exp() for e in chosen}
        total = torch.zeros_like(token)
        for e in chosen:
            h = inward[e] @ token
            h = silu(h[: spec.dim]) * h[spec.dim :] if spec.gated else gelu(h)
            total = total + exponentials[e] / sum(exponentials.values()) * (module.down.weight[e] @ h)
        rows.append(total)
    return torch.stack(rows).view(x.shape)


SHAPES = [
    (MoEMLP(7, 5, 3, 0.0), 11, (63,)),
    (MoEMLP(13, 8, 2, 0.0, "moe_gelu"), 24, (3, 21)),
    (MoEMLP(5, 3, 3, 0.0), 6, (1, 1)),  # fewer tokens than experts
    (MoEMLP(9, 4, 2, 0.0), 17, (1000,)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("spec", "embed", "shape"), SHAPES, ids=["odd", "gelu", "one token", "1000"])
def test_the_mixture_is_a_loop_over_tokens(
    spec: MoEMLP, embed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Output and every gradient; bfloat16: float32 weights under autocast, against float32."""
    work = torch.float32 if dtype == torch.bfloat16 else dtype
    module = mixture(spec, embed, work)
    x = torch.randn(*shape, embed, generator=generator(), dtype=work)
    seed = torch.randn(x.shape, generator=generator(6), dtype=work)
    found = []
    for run in (module, lambda x: (naive(module, x), None)):
        module.zero_grad()
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16 and run is module):
            y, none = run(own)
        assert none is None
        (y * seed).sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        assert own.grad is not None and len(gradients) == 3
        found.append({"output": y.to(work), "x": own.grad} | gradients)
    for name, wanted in found[1].items():
        assert relative(found[0][name], wanted) <= TOLERANCE[dtype], name


def test_no_token_is_dropped_and_none_needs_every_expert() -> None:
    """All tokens choose the same two of four: each is computed, and the others' gradients are zero, not missing."""
    module = mixture(MoEMLP(7, 4, 2, 0.0), 11)
    x = torch.rand(50, 11, generator=generator(), dtype=torch.float64) + 0.1
    with torch.no_grad():
        module.router.weight.mul_(0.01)[[1, 3]] += 1.0
    y, _ = module(x)
    assert relative(y, naive(module, x)) <= TOLERANCE[torch.float64]
    y.square().sum().backward()
    for p in (module.gate_up.weight, module.down.weight):
        assert p.grad is not None and [bool(g.any()) for g in p.grad] == [False, True, False, True]


def test_under_autocast_the_router_stays_in_float32() -> None:
    """Who is chosen is decided as without autocast: rounding to bf16 would choose others for some tokens."""
    module = mixture(MoEMLP(7, 8, 2), 24, torch.float32)
    x = torch.randn(500, 24, generator=generator())
    plain = module._logits(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module._logits(x), plain)


def test_gradients_are_the_same_bits_every_time() -> None:
    """On several threads: what a resumed run rests on."""
    module = mixture(MoEMLP(9, 4, 3, 0.0), 17, torch.float32)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    for _ in range(3):
        x = torch.randn(4000, 17, generator=generator()).requires_grad_()
        module(x)[0].square().sum().backward()
        found.append(x.grad)
    torch.set_num_threads(before)
    assert found[0] is not None and all(torch.equal(found[0], again) for again in found[1:])


def test_compiled_it_is_the_same() -> None:
    """The sizes of the experts' shares break the graph; the result is that of eager code, gradients included."""
    torch.compiler.reset()
    config = model_config("transformer", num_layers=1, mlp_dim=20, num_experts=4)
    tokens = probe(config)
    results = []
    for compiled in (False, True):
        model = build(config, trained_like(config).params)
        if compiled:
            model.compile(backend="eager")
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.total.backward()
        results.append([loss.total.detach()] + [p.grad for p in model.parameters()])
    for eager, compiled_one in zip(*results, strict=True):
        assert relative(compiled_one, eager) <= TOLERANCE[torch.float64]


def test_logits_and_balance_are_hugging_faces() -> None:
    """Mixtral, from the same weights. Its auxiliary loss is over all layers' tokens at once and k times as large."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model_config("transformer", num_heads=4, num_kv_heads=2, mlp_dim=28, num_experts=5, experts_per_token=3)
    config = dataclasses.replace(config, tied_head=True)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=48,
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            sliding_window=None,
        )
    )
    params = trained_like(config, dtype=torch.float32).params
    state = {"model.embed_tokens.weight": params["embedding.weight"], "model.norm.weight": params["final_norm.gain"]}
    state["lm_head.weight"] = params["embedding.weight"]
    names = {
        "attention_norm.gain": "input_layernorm.weight",
        **{f"attention.{p}.weight": f"self_attn.{p}_proj.weight" for p in "qkvo"},
        "mlp_norm.gain": "post_attention_layernorm.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.gate_up.weight": "mlp.experts.gate_up_proj",
        "mlp.down.weight": "mlp.experts.down_proj",
    }
    for name, spec in param_specs(config).items():
        if spec.layer is not None:
            state[f"model.layers.{spec.layer}.{names[spec.local]}"] = params[name]
    theirs.load_state_dict(state, strict=True)
    tokens = probe(config, rows=2, context=40)
    with torch.no_grad():
        ours, logits = build(config, params).eval()(tokens), theirs.eval()(tokens).logits
    scale = float(logits.std())
    assert scale >= 0.5, "logits too small to compare"
    assert float((ours - logits).abs().max()) <= PARITY * max(1.0, scale)
    scores = torch.randn(100, 5, generator=generator())
    counts = scores.topk(3).indices.flatten().bincount(minlength=5)
    wanted = load_balancing_loss_func((scores,), 5, 3) / 3
    assert float(balance_loss(scores, counts)) == pytest.approx(float(wanted), rel=TOLERANCE[torch.float32])


def test_the_balance_loss_by_hand() -> None:
    """E Σ f P; 1 where both are uniform, E where all of both is on one expert, k or not; its gradient is P's alone."""
    scores = torch.randn(9, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    chosen = [row.argsort(descending=True).tolist()[:2] for row in scores.detach()]
    f = [sum(e in pair for pair in chosen) / (9 * 2) for e in range(4)]
    P = [float(scores.detach().softmax(-1)[:, e].mean()) for e in range(4)]
    counts = torch.tensor([sum(e in pair for pair in chosen) for e in range(4)])
    found = balance_loss(scores, counts)
    assert found.item() == pytest.approx(4 * sum(a * b for a, b in zip(f, P, strict=True)), rel=1e-13)
    found.backward()
    pulled = torch.autograd.grad((torch.tensor(f) * scores.softmax(-1)).sum() * 4 / 9, scores)[0]
    assert scores.grad is not None and relative(scores.grad, pulled) <= 1e-6  # f was rounded to float32
    zeros = torch.zeros(6, 4)
    assert float(balance_loss(zeros, torch.full((4,), 3))) == pytest.approx(1.0)
    assert float(balance_loss(torch.tensor([[80.0, 0, 0, 0]] * 5), torch.tensor([5, 0, 0, 0]))) == pytest.approx(4.0)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_balance_loss_is_in_the_total_of_training_alone(recompute: bool) -> None:
    """Once for each layer and weighted, recomputed or not; never in the cross-entropy, never in evaluation."""
    config = model_config("transformer", mlp_dim=20, num_experts=4, balance_loss=0.5)
    tokens = probe(config)
    model = build(config, trained_like(config).params, checkpoint_layers=recompute)
    wanted = []

    def collect(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        logits = module._logits(inputs[0].flatten(0, -2))
        counts = module._gates(logits)[1].flatten().bincount(minlength=4)
        wanted.append(0.5 * float(balance_loss(logits, counts).detach()))

    hooks = [layer.mlp.register_forward_hook(collect) for layer in model.layers.values()]
    loss = model(tokens[:, :-1], tokens[:, 1:])
    for hook in hooks:
        hook.remove()
    assert len(wanted) == 2 and float(loss.total - loss.cross_entropy) == pytest.approx(sum(wanted), rel=1e-9)
    assert min(wanted) > 0.5
    quiet = model.eval()(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(quiet.total, quiet.cross_entropy)
    assert float(quiet.cross_entropy) == pytest.approx(float(loss.cross_entropy), rel=1e-12)


def test_counts_by_hand() -> None:
    """Width 24, two layers: 4 experts of 3·24·20, a router of 4·24, and the rest as without; 2 of 4 in FLOPs."""
    dense, mixed = (model_config("transformer", mlp_dim=20, num_experts=n) for n in (None, 4))
    assert mixed.num_params() - dense.num_params() == 2 * (3 * 3 * 480 + 4 * 24)
    more = mixed.forward_flops_per_token(16) - dense.forward_flops_per_token(16)
    assert more == 2 * 2 * (3 * 480 + 4 * 24)
    assert from_json(json.loads(json.dumps(to_json(mixed)))) == mixed


@pytest.mark.parametrize(
    ("fields", "code", "key"),
    [
        ({"num_experts": 4, "experts_per_token": 1}, "too-small", "model.experts_per_token"),
        ({"num_experts": 2, "experts_per_token": 3}, "too-small", "model.num_experts"),
        ({"num_experts": 4, "balance_loss": -0.1}, "out-of-range", "model.balance_loss"),
        ({"num_experts": 4, "balance_loss": float("nan")}, "out-of-range", "model.balance_loss"),
    ],
)
def test_what_a_model_may_not_say(fields: dict[str, Any], code: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config("transformer", **fields)
    assert (caught.value.code, caught.value.key) == (code, key)


@pytest.mark.parametrize(
    ("source", "fields", "method", "code", "key"),
    [
        ({}, {"experts_per_token": 2}, "copy", "bad-target", "grow.experts_per_token"),
        ({}, {"num_experts": 1}, "copy", "too-small", "grow.num_experts"),
        ({}, {"num_experts": 4, "experts_per_token": 1}, "copy", "too-small", "grow.experts_per_token"),
        ({}, {"num_experts": 4, "balance_loss": "much"}, "copy", "bad-target", "grow.balance_loss"),
        ({}, {"num_experts": 4}, "clone_noise", "method-does-not-fit", "methods.experts"),
        ({"num_experts": 4}, {"num_experts": 3}, "copy", "shrinking-target", "grow.num_experts"),
        ({"num_experts": 4}, {"num_experts": 6}, "copy", "bad-target", "grow.num_experts"),
        ({"num_experts": 4}, {"num_experts": 8}, "clone_noise", "method-does-not-fit", "methods.experts"),
        ({"num_experts": 4, "experts_per_token": 3}, {"num_experts": 8, "experts_per_token": 2}, "copy",
         "shrinking-target", "grow.experts_per_token"),
    ],
)  # fmt: skip
def test_what_a_stage_may_not_say(
    source: dict[str, Any], fields: dict[str, Any], method: str, code: str, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        grown_config(model_config("transformer", **source), fields, {"experts": method})
    assert (caught.value.code, caught.value.key) == (code, key)


def test_a_tokenformer_has_no_block_to_copy() -> None:
    with pytest.raises(ConfigError, match="nothing-to-grow"):
        grown_config(model_config("tokenformer"), {"num_experts": 4}, {})


def certificate(source: dict[str, Any], fields: dict[str, Any], method: str = "copy") -> Certificate:
    state = trained_like(model_config("transformer", mlp_dim=20, **source))
    target = grown_config(state.config, fields, {"experts": method})
    found = grow(state, target, {"experts": method}, generator(), probe(state.config))[1].certificate
    assert found is not None
    return found


def test_which_copies_stay_alike() -> None:
    """Copies of a block see different tokens. Clones that are always chosen together are locked: 4 experts in both of
    their weights and 4 rows of the router, in each of two layers; noise sets them apart."""
    upcycled = certificate({}, {"num_experts": 4})
    assert upcycled.exact and upcycled.locked_rows == 0 and not upcycled.dead
    clones = {"num_experts": 8, "experts_per_token": 4}
    locked = certificate({"num_experts": 4}, clones)
    assert locked.exact and locked.locked_rows == 2 * (4 + 4 + 4)
    apart = certificate({"num_experts": 4}, clones, "clone_noise")
    assert apart.exact and apart.locked_rows == 0 and not apart.dead
    sparse = certificate({"num_experts": 4}, {"num_experts": 8})
    assert not sparse.exact and sparse.locked_rows == 0 and not sparse.dead


def test_a_chain_goes_through_a_mixture() -> None:
    """Depth, width, hidden units and experts at once, exactly, inserted layers and their copies included."""
    state = trained_like(model_config("transformer", mlp_dim=20))
    sizes = {"num_layers": 4, "embed_dim": 32, "mlp_dim": 28, "num_experts": 4, "num_heads": 4}
    target = grown_config(state.config, sizes, {})
    assert [link.operator for link in path(state.config, target, {})] == ["depth", "width", "mlp", "experts", "heads"]
    grown, report = grow(state, target, {}, generator(), probe(state.config))
    assert report.certificate is not None and report.certificate.exact and len(report.deltas) == 5
    further = grown_config(target, {"num_layers": 5, "mlp_dim": 30, "embed_dim": 40}, {})
    again = grow(grown, further, {}, generator(), probe(state.config))[1].certificate
    assert again is not None and again.exact and not again.dead


def test_moments_of_copies_are_shares_of_the_blocks() -> None:
    """exp_avg 1/E of it: the experts' gradients add up to the block's. exp_avg_sq 1/(E·k): over many small batches a
    square that is mostly noise goes by the tokens an expert sees and its gates, not by 1/E²."""
    experts, k, batches = 8, 2, 60
    state = trained_like(model_config("transformer", mlp_dim=20))
    target = grown_config(state.config, {"num_experts": experts, "experts_per_token": k}, {})
    grown, _ = grow(state, target, {}, generator())
    name = "layers.1.mlp.down.weight"
    old, now = state.moments[name], grown.moments[name]
    torch.testing.assert_close(now.exp_avg, (old.exp_avg / experts).expand(experts, -1, -1))
    torch.testing.assert_close(now.exp_avg_sq, (old.exp_avg_sq / (experts * k)).expand(experts, -1, -1))
    sums = []
    for model, config in ((build(state.config, state.params), state.config), (build(target, grown.params), target)):
        model.eval()
        squares = torch.zeros(param_specs(config)[name].shape, dtype=torch.float64)
        gradients = []
        for seed in range(batches):
            tokens = probe(config, seed=seed)
            model.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).total.backward()
            gradient = dict(model.named_parameters())[name].grad
            assert gradient is not None
            gradients.append(gradient.clone())
            squares += gradient.square()
        sums.append((gradients, squares))
    (dense, dense_squares), (shares, squares) = sums
    for whole, parts in zip(dense, shares, strict=True):
        assert relative(parts.sum(0), whole) <= GRADIENT_TOLERANCE
    ratio = float(squares.mean() / dense_squares.mean())
    assert ratio == pytest.approx(1 / (experts * k), rel=NOISE_LEVEL)
    assert ratio > 2 / experts**2, "as if all were signal"


def test_a_run_that_becomes_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, experts, more layers: trained, certified, written, shown by inspect, and able to write text."""
    recipe = recipe_dict(tmp_path)
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24, "dropout": 0.1}
    recipe["model"] = {"preset": "transformer"} | sizes
    recipe["stages"][1]["grow"] = {"num_experts": 4, "balance_loss": 0.02}
    assert cli("train", write_recipe(tmp_path, recipe))[0] == 0
    run = tmp_path / "runs" / "run"
    first, second = records(run, "growth")
    assert [link["operator"] for link in first["links"] + second["links"]] == ["experts", "depth"]
    assert first["certificate"]["exact"] and second["certificate"]["exact"]
    monkeypatch.setattr(checkpoints, "console", Console(highlight=False, width=160))
    code, out, _ = cli("inspect", run)
    assert code == 0 and out.count("4 experts of swiglu 24, 2 per token") == 2
    assert cli("generate", run, "--tokens", 5)[0] == 0
