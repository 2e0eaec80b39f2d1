"""Growth in a loop of one's own: model and optimizer go on as those of a run do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from growkit import grow
from growkit.errors import ConfigError
from growkit.models.decoder import DecoderLM, build
from growkit.models.spec import param_specs
from tests.support import model_config, probe, trained_like

# Two ways of summing the same float64 products, through a few layers.
TOLERANCE = 1e-12
Optimizer = torch.optim.Optimizer


def trained(preset: str = "transformer", steps: int = 3) -> tuple[DecoderLM, Optimizer]:
    """A model and its AdamW, decayed and undecayed parameters apart, after some steps."""
    config = model_config(preset)
    model = build(config, trained_like(config).params)
    norms = [p for name, p in model.named_parameters() if param_specs(config)[name].role == "gain"]
    rest = [p for name, p in model.named_parameters() if param_specs(config)[name].role != "gain"]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: DecoderLM, optimizer: Optimizer) -> None:
    data = probe(model.config, rows=4)
    optimizer.zero_grad()
    model(data[:, :-1], data[:, 1:]).total.backward()
    optimizer.step()


def logits(model: DecoderLM) -> torch.Tensor:
    with torch.no_grad():
        return model(probe(model.config)[:, :-1])


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("transformer", {"num_layers": 4, "mlp_dim": 80, "num_heads": 4}),
        ("tokenformer", {"attention_tokens": 20, "head_dim": 24}),
    ],
)
def test_a_model_and_its_optimizer_go_on(preset: str, sizes: dict[str, Any]) -> None:
    model, optimizer = trained(preset)
    before, bits = logits(model), copy.deepcopy(optimizer.state_dict())
    larger, further, report = grow(model, optimizer, **sizes)
    assert report.certificate is not None and report.certificate.exact
    assert larger.config.num_params() > model.config.num_params()
    assert float((logits(larger) - before).norm() / before.norm()) <= 1e-10
    assert [{k: v for k, v in group.items() if k != "params"} for group in further.param_groups] == [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    specs = param_specs(larger.config)
    of = {id(p): index for index, group in enumerate(further.param_groups) for p in group["params"]}
    assert {name: of[id(p)] for name, p in larger.named_parameters()} == {
        name: int(spec.role == "gain") for name, spec in specs.items()
    }
    old = dict(model.named_parameters())
    for name, p in larger.named_parameters():
        assert (p in further.state) == (name in old)
        if name in old and p.shape == old[name].shape:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(further.state[p][key], optimizer.state[old[name]][key])
    assert str(bits) == str(optimizer.state_dict()) and torch.equal(logits(model), before), "the old ones are untouched"
    step(larger, further)
    assert not torch.equal(logits(larger), before)


def test_where_nothing_is_new_a_step_is_the_same_step() -> None:
    """With the new layers' writes held at zero, the grown model's old parameters move as the old model's do."""
    model, optimizer = trained()
    larger, further, _ = grow(model, optimizer, num_layers=3)
    for name, p in larger.named_parameters():
        p.requires_grad_(name in dict(model.named_parameters()))
    step(model, optimizer)
    step(larger, further)
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(larger.named_parameters())[name], p, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_stood_still_stands_still() -> None:
    model, optimizer = trained()
    model.embedding.requires_grad_(False)
    larger, _, _ = grow(model, optimizer, num_layers=3)
    standing = [name for name, p in larger.named_parameters() if not p.requires_grad]
    assert standing == ["embedding.weight"]


def test_layers_are_still_recomputed() -> None:
    model, optimizer = trained()
    model.checkpoint_layers = True
    assert grow(model, optimizer, num_layers=3)[0].checkpoint_layers


def test_what_is_no_model_of_growkits_is_named() -> None:
    model, optimizer = trained(steps=1)
    for other, words in (
        (torch.compile(model), "OptimizedModule.*is a compiled model.*pass the model that torch.compile was given"),
        (torch.nn.Linear(2, 2), "Linear.*is not a model of growkit.*pass a DecoderLM"),
        (copy.deepcopy(model).bfloat16(), r"model: embedding\.weight.*bfloat16.*model\.float\(\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            grow(other, optimizer, num_layers=3)  # type: ignore[type-var]


def test_broken_weights_are_named() -> None:
    """Nothing can be exact beside logits that are no numbers."""
    model, optimizer = trained(steps=1)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.q.weight")[0, 0] = float("nan")
    for sizes in ({"num_layers": 3}, {"num_layers": 3, "mlp_dim": 128}):
        with pytest.raises(ConfigError, match=r"layers\.1\.attention\.q\.weight holds some.*not-finite"):
            grow(model, optimizer, **sizes)


def test_mistakes_are_named() -> None:
    model, optimizer = trained(steps=1)
    tokens, vocab = probe(model.config), model.config.vocab_size
    other, _ = trained(steps=0)
    for call, code in (
        (lambda: grow(model, torch.optim.SGD(model.parameters()), num_layers=3), "unknown-optimizer"),
        (lambda: grow(model, torch.optim.AdamW(model.parameters(), amsgrad=True), num_layers=3), "unknown-optimizer"),
        (lambda: grow(other, optimizer, num_layers=3), "not-its-optimizer"),
        (lambda: grow(model, optimizer, num_layers=1), "shrinking-target"),
        (lambda: grow(model, optimizer, layers=3), "cannot-grow"),
        (lambda: grow(model, optimizer), "nothing-grows"),
        (lambda: grow(model, optimizer, num_layers=3, methods="stack"), "not-a-section"),  # type: ignore[arg-type]
        (lambda: grow(model, optimizer, num_layers=3, methods={"depth": ["stack"]}), "not-a-section"),  # type: ignore[dict-item]
        (lambda: grow(model, optimizer, num_layers=3, probe=tokens[0]), "wrong-type"),
        (lambda: grow(model, optimizer, num_layers=3, probe=tokens.float()), "wrong-type"),
        (lambda: grow(model, optimizer, num_layers=3, probe=tokens[:, :1]), "wrong-type"),
        (lambda: grow(model, optimizer, num_layers=3, probe=tokens.tolist()), "wrong-type"),  # type: ignore[arg-type]
        (lambda: grow(model, optimizer, num_layers=3, probe=tokens + vocab), "out-of-range"),
        (lambda: grow(model, optimizer, num_layers=3, probe=-1 - tokens), "out-of-range"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.code == code
