"""growkit models in transformers: loaded by the Auto classes, the same logits, gradients and generated tokens."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from growkit.checkpoint.hf.auto import GrowkitForCausalLM
from growkit.checkpoint.hf.cache import KeptBy
from growkit.errors import ConfigError
from growkit.growth.path import grown_config
from growkit.models.config import ModelConfig, Norm
from growkit.models.decoder import DecoderLM, build
from growkit.models.spec import param_specs
from tests.support import context, model_config, probe, trained_like

# Float64 sums in another order: padded rows are longer, and cached ones are made of other products.
SAME = 1e-11
NEW = 12  # tokens to generate: enough for a wrong cache or position to change one


def configs() -> dict[str, ModelConfig]:
    """Both presets, and one with all that a transformers model may have otherwise: grouped keys, a norm on queries and
    keys, a head of its own, a logit scale, layers whose ids are not their places."""
    odd = model_config("transformer", num_heads=4, num_kv_heads=2, num_layers=3)
    layers = [
        dataclasses.replace(layer, id=number, mixer=dataclasses.replace(layer.mixer, qk_norm=Norm()))
        for layer, number in zip(odd.layers, (0, 7, 3))
    ]
    odd = dataclasses.replace(odd, layers=tuple(layers), tied_head=False, logit_scale=0.7)
    mamba: dict[str, Any] = {"preset": "mamba", "d_state": 5, "dt_rank": 3, "bias": True}
    tokens = {"projection": "pattention", "mamba_tokens": 10, "attention_tokens": 10, "mlp_tokens": 14}
    return {
        "transformer": model_config("transformer"),
        "tokenformer": model_config("tokenformer"),
        "odd": odd,
        "mamba": model_config(**mamba),
        "hybrid": model_config(**mamba, pattern="mamba+attention"),
        "hybrid-tokens": model_config(**mamba | tokens, pattern="attention+mamba"),
    }


CONFIGS = configs()


def pair(name: str) -> tuple[DecoderLM, GrowkitForCausalLM]:
    """The same tensors twice: in growkit's model, and in transformers'."""
    params = trained_like(CONFIGS[name]).params
    return build(CONFIGS[name], params).eval(), GrowkitForCausalLM.around(build(CONFIGS[name], params).eval())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, name: str) -> None:
    model, wrapped = pair(name)
    wrapped.save_pretrained(tmp_path / "one")
    assert not [path for path in (tmp_path / "one").iterdir() if path.suffix in (".bin", ".py", ".pt")]
    read, report = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values()), report
    read.save_pretrained(tmp_path / "two")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert type(read) is GrowkitForCausalLM and read.growkit.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(read.growkit.get_parameter(name), parameter), name
    close(read(probe(model.config)).logits, model(probe(model.config)))  # mapped weights lie elsewhere, sums may round
    assert (read.get_output_embeddings() is None) == model.config.tied_head
    assert sum(p.numel() for p in read.parameters()) == model.config.num_params()


@pytest.mark.parametrize("name", ["odd", "mamba"])
def test_a_model_made_from_its_configuration_starts_as_growkit_starts_it(name: str) -> None:
    config = pair(name)[1].config
    made = AutoModelForCausalLM.from_config(config).growkit
    for name, spec in param_specs(made.config).items():
        p = made.get_parameter(name)
        if spec.start == "a_log":
            torch.testing.assert_close(p, torch.arange(1, 6.0).log().expand(spec.shape).to(p.dtype))
        elif spec.start == "dt_bias":
            dt = F.softplus(p.detach())
            assert 1e-3 * 0.99 < dt.min() < 3e-3 and 0.03 < dt.max() < 0.1 * 1.01, name  # of 48 draws, log-uniform
        elif spec.init_std is None:
            assert (p == spec.starts_at()).all(), name
        else:
            assert 0.8 < float(p.detach().std() / spec.init_std) < 1.25, name  # of a hundred draws and more


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradients_are_growkits(name: str) -> None:
    model, wrapped = pair(name)
    data = probe(model.config)
    expected = model(data[:, :-1], data[:, 1:]).total
    loss = wrapped(data, labels=data).loss
    # transformers takes the logits to float32 before the loss.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    expected.backward()
    loss.backward()
    for key, p in model.named_parameters():
        grad = wrapped.growkit.get_parameter(key).grad
        assert grad is not None and p.grad is not None
        assert float((grad - p.grad).norm() / p.grad.norm()) <= 1e-5, key


def test_recomputing_layers_changes_no_gradient() -> None:
    data = probe(CONFIGS["tokenformer"])
    grads = []
    for recompute in (False, True):
        _, wrapped = pair("tokenformer")
        wrapped.train()
        if recompute:
            wrapped.activation_checkpointing_enable()
            assert wrapped.growkit.checkpoint_layers
        wrapped(data, labels=data).loss.backward()
        grads.append([p.grad for p in wrapped.parameters()])
    for one, other in zip(*grads, strict=True):
        close(one, other)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch, and its attention mask; padding is a real token, to be seen if used."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def rows_of(config: ModelConfig) -> list[Tensor]:
    tokens = probe(config)
    return [tokens[0, :5], tokens[1, :17], tokens[2, :1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_seen(name: str, side: str) -> None:
    model, wrapped = pair(name)
    rows = rows_of(model.config)
    ids, mask = padded(rows, side)
    logits = wrapped(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        close(logits[i, mask[i].bool()], model(row[None])[0])
    # The same in two pieces, the second on a cache that holds padding.
    first = wrapped(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    second = wrapped(ids[:, 9:], attention_mask=mask, past_key_values=first.past_key_values)
    both = torch.cat([first.logits, second.logits], 1)
    close(both[mask.bool()], logits[mask.bool()])


@pytest.mark.parametrize("name", ["odd", "mamba", "hybrid"])
def test_padding_between_the_pieces_of_a_row_is_not_seen(name: str) -> None:
    """Rows of several calls on one cache, padded at both sides in each; one piece is padding alone."""
    model, wrapped = pair(name)
    rows = probe(model.config)[:3, :14]
    taken = [[(0, 3), (3, 4), (4, 14)], [(0, 0), (0, 7), (7, 14)], [(0, 5), (5, 5), (5, 14)]]  # of each, in each call
    seen: list[list[Tensor]] = [[], [], []]
    cache, mask = None, torch.zeros(3, 0, dtype=torch.long)
    for call, side in enumerate(("right", "left", "left")):
        ids, new = padded([row[slice(*part[call])] for row, part in zip(rows, taken, strict=True)], side)
        mask = torch.cat((mask, new), 1)
        out = wrapped(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for i in range(3):
            seen[i].append(out.logits[i, new[i].bool()])
    for i, row in enumerate(rows):
        close(torch.cat(seen[i]), model(row[None])[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_the_same_with_a_cache_in_a_padded_batch_and_alone(name: str) -> None:
    _, wrapped = pair(name)
    rows = rows_of(wrapped.growkit.config)
    ids, mask = padded(rows, "left")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    alone = torch.cat([wrapped.generate(row[None], use_cache=False, **options)[:, len(row) :] for row in rows])
    assert len({tuple(row.tolist()) for row in alone}) == len(rows), "rows that are alike would show nothing"
    for use_cache in (True, False):
        together = wrapped.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
        assert torch.equal(together[:, ids.shape[1] :], alone)
    beams = [
        wrapped.generate(ids, attention_mask=mask, use_cache=use_cache, num_beams=3, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams) and not torch.equal(beams[0][:, ids.shape[1] :], alone), "beams find other rows"


def test_only_the_wanted_logits_are_made() -> None:
    model, wrapped = pair("odd")
    tokens = probe(model.config)
    whole = wrapped(tokens).logits
    close(wrapped(tokens, logits_to_keep=2).logits, whole[:, -2:])
    close(wrapped(tokens, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    assert wrapped(tokens, use_cache=False).past_key_values is None
    assert isinstance(wrapped(tokens, return_dict=False), tuple)


def test_a_cache_may_come_without_a_configuration() -> None:
    """transformers' own way to make one ahead; it is counted and emptied as any other."""
    model, wrapped = pair("hybrid")
    tokens, cache = probe(model.config)[:, :12], DynamicCache()
    for _ in range(2):
        parts = [wrapped(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(5, dim=1)]
        close(torch.cat(parts, 1), model(tokens))
        assert cache.get_seq_length() == 12 and cache.get_max_length() == -1
        assert cache.get_mask_sizes(3, 0) == cache.get_mask_sizes(3, 1) == (15, 0)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        more = wrapped(tokens[[1, 0], :3], past_key_values=cache).logits
        close(more, model(torch.cat((tokens, tokens[:, :3]), 1)[[1, 0]])[:, 12:])
        cache.reset()
    assert cache.get_seq_length() == 0


def test_a_state_takes_gradients_through_the_cache() -> None:
    """Two calls, and one: the same gradients."""
    model, wrapped = pair("mamba")
    tokens = probe(model.config)[:, :12]
    (wanted,) = torch.autograd.grad(model(tokens)[:, -1].square().sum(), [model.embedding.weight])
    cache = DynamicCache(config=wrapped.config)
    wrapped(tokens[:, :7], past_key_values=cache)
    loss = wrapped(tokens[:, 7:], past_key_values=cache).logits[:, -1].square().sum()
    close(torch.autograd.grad(loss, [wrapped.growkit.embedding.weight])[0], wanted)


def test_what_a_state_cannot_do_is_refused() -> None:
    model, wrapped = pair("mamba")
    tokens = probe(model.config)[:1, :8]
    cache = wrapped(tokens, use_cache=True).past_key_values
    other = pair("transformer")[1](tokens, use_cache=True).past_key_values
    short = DynamicCache(config=wrapped.config)
    short.layers.pop()
    for call, word in (
        (lambda: cache.crop(-1), "cannot be cut back"),
        (lambda: wrapped(tokens, past_key_values=other), "is of another model"),
        (lambda: wrapped(tokens, past_key_values=short), "has room for 1 layers"),
    ):
        with pytest.raises(ConfigError, match=word) as caught:
            call()
        assert (caught.value.code, caught.value.key) == ("not-in-transformers", "past_key_values")
    cache.crop(0)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        wrapped.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_layers_of_a_stride_have_no_cache_there() -> None:
    with pytest.raises(ConfigError, match="use_cache=False"):
        KeptBy(DynamicCache(), model_config("transformer", num_layers=3, altup_stride=2))


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    model, wrapped = pair("transformer")
    tokens = probe(model.config)
    static = StaticCache(config=wrapped.config, max_cache_len=40)
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    calls: list[tuple[Any, str, str]] = [
        (lambda: wrapped(), "not-in-transformers", "input_ids"),
        (lambda: wrapped(inputs_embeds=torch.zeros(1, 2, 24)), "not-in-transformers", "inputs_embeds"),
        (lambda: wrapped(tokens, output_attentions=True), "not-in-transformers", "output_attentions"),
        (lambda: wrapped(tokens, attention_mask=torch.ones(3, 4)), "not-in-transformers", "attention_mask"),
        (lambda: wrapped(tokens[:1, :5], position_ids=packed), "not-in-transformers", "position_ids"),
        (lambda: wrapped(tokens, past_key_values=static), "not-in-transformers", "past_key_values"),
        (lambda: wrapped.resize_token_embeddings(50), "cannot-grow", "resize_token_embeddings"),
        (lambda: AutoConfig.for_model("growkit"), "bad-model", "config.json: growkit"),
        (lambda: AutoConfig.for_model("growkit", growkit={"vocab_size": 3}), "bad-model", "config.json: growkit"),
        (
            lambda: AutoConfig.for_model("growkit", growkit=wrapped.config.growkit, hidden_size=25),
            "bad-model",
            "hidden_size",
        ),
    ]
    for call, code, key in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert (caught.value.code, caught.value.key) == (code, key)


def _growkit_first(folder: str) -> None:
    """In a fork of a process that has imported growkit and not transformers (tests/warm.py); this file then did."""
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is GrowkitForCausalLM
    assert not any(type(finder).__module__.startswith("growkit") for finder in sys.meta_path)
    table = sys.modules["transformers.models.auto.configuration_auto"]
    assert table.__spec__ is not None and table.__spec__.loader is table.__loader__, "as if nobody had waited for it"
    assert type(table.__loader__).__module__.startswith("_frozen")


def test_growkit_may_be_imported_first(tmp_path: Path) -> None:
    _, wrapped = pair("tokenformer")
    wrapped.save_pretrained(tmp_path)
    child = context.Process(target=_growkit_first, args=(str(tmp_path),))
    child.start()
    child.join()
    assert child.exitcode == 0


LATER = {
    "transformers first": "from transformers import AutoConfig\nimport growkit\n",
    # A look for the module, as tools do to see what is installed, must not use up the waiting finder.
    "between": "import sys, growkit\nassert not {'torch', 'transformers'} & set(sys.modules)\nimport transformers\n"
    "from importlib.util import find_spec\n"
    "assert find_spec('transformers.models.auto.configuration_auto') is not None\n",
}


@pytest.mark.parametrize("order", LATER)
def test_transformers_may_be_imported_first(order: str) -> None:
    code = LATER[order] + "from transformers import CONFIG_MAPPING\nassert 'growkit' in CONFIG_MAPPING\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_in_the_middle_of_a_ramp_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    """Masks are in no file: the configuration says where their ramp is, also after it was moved."""
    methods = dict.fromkeys(("depth", "width", "mlp", "heads"), "masked")
    sizes = {"num_layers": 3, "embed_dim": 32, "mlp_dim": 80, "num_heads": 4}
    config = grown_config(CONFIGS["transformer"], sizes, methods)
    params = trained_like(dataclasses.replace(config, ramp=1.0)).params
    wrapped = GrowkitForCausalLM.around(build(config, params).eval())
    wrapped.growkit.set_ramp(0.5)
    wrapped.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.growkit.config == dataclasses.replace(config, ramp=0.5)
    close(read(probe(config)).logits, wrapped(probe(config)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["transformer", "tokenformer", "mamba"])
def test_a_model_in_half_precision_has_gradients(preset: str, dtype: torch.dtype) -> None:
    """As from_pretrained loads what was exported in bfloat16, without autocast."""
    config = model_config(preset)
    model = GrowkitForCausalLM.around(build(config, trained_like(config, dtype=torch.float32).params)).to(dtype)
    tokens = probe(config)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
