"""What is measured of AltUp's blocks at a validation, and where it is shown: beside plain computations."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from growkit.cli import recipes
from growkit.growth.engine import added_entries
from growkit.models.config import AltUp, ModelConfig
from growkit.models.decoder import DecoderLM, build, init_params
from growkit.models.spec import param_specs
from growkit.report.page import page, run_data
from growkit.report.run_summary import RunSummary
from growkit.train import blocks
from growkit.train.loggers.heat_map import heat_maps, pixels
from growkit.train.loggers.rows import COEFFICIENT_COLUMNS, Rows, coefficient_lines
from tests.support import cli, model_config, probe, recipe_dict, records, trained_like, write_recipe
from tests.test_distributed import FSDP, two_processes
from tests.test_report import data_of

TOLERANCE = 1e-4  # five digits are logged
ALIKE = 1e-3  # three steps in another order of sums, and five digits
K = 3
STREAMS = {
    "gemma": AltUp(K),
    "paper": AltUp(K, order="paper"),
    "free": AltUp(K, order="free"),
    "round_robin": AltUp(K, order="round_robin"),
    "full": AltUp(K, full=True),
    "routed": AltUp(K, routed=True, router_scale=1 / 24),
    "routed-paper": AltUp(K, order="paper", routed=True, router_scale=1 / 24),
}


def streamed(stream: AltUp) -> ModelConfig:
    config = model_config("transformer")
    layers = tuple(dataclasses.replace(layer, block=i + 1) for i, layer in enumerate(config.layers))
    return dataclasses.replace(config, layers=layers, stream=stream)


def a_m_b(order: str, j: int, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the step written out: x̂ = P x, x′ = x̂ + g (y − x̂_j) and so on, with y = z: the layer changes nothing."""
    if order == "round_robin":
        return p["read"], torch.eye(K).double(), torch.eye(K).double()[j]
    if order == "free":
        return p["read"], p["mix"], p["write"]
    P, g, e = p["mix"], p["write"], torch.eye(K).double()[j]
    a = e if order == "paper" else P[j]
    return a, P + torch.outer(g, a - P[j]), g


@pytest.mark.parametrize("name", STREAMS)
def test_coefficients_and_distances_are_those_of_a_plain_computation(name: str) -> None:
    stream = STREAMS[name]
    config = streamed(stream)
    state = trained_like(config)
    model, tokens = build(config, state.params).train(), probe(config)[:, :-1]
    before = torch.get_rng_state()
    found = blocks.measure(model, tokens)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    inputs: list[Tensor] = []
    made: list[Tensor] = []
    for layer in model.layers.values():
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        layer.mlp.register_forward_hook(lambda module, _, out: made.append(out))
    ends: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: ends.append(out[0]))
    outputs: list[Tensor] = []
    for layer in model.layers.values():
        layer.mlp_norm.register_forward_hook(lambda _, given, __: outputs.append(given[0]))
    model.eval()(tokens)
    for index, (spec, entry) in enumerate(zip(config.layers, found["layers"], strict=True)):
        prefix, j = f"layers.{spec.id}.stream.", spec.block
        p = {key.removeprefix(prefix): value for key, value in state.params.items() if key.startswith(prefix)}
        every = []
        if stream.routed:
            y_BTD = outputs[index] + made[index]
            for b, t in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):

                def routes(x: Tensor, p: dict[str, Tensor] = p) -> Tensor:
                    normed = x * (x.square().mean() + config.norm.eps) ** -0.5 * p["router_norm.gain"]
                    return torch.tanh(p["router"] @ normed / 24)

                P = torch.eye(K).double() + (p["mix"] @ routes(inputs[index][j, b, t])).view(K, K)
                own = {"mix": P, "write": 1 + p["write"] @ routes(y_BTD[b, t])}
                every.append(a_m_b(stream.order, j, own))
        else:
            every.append(a_m_b(stream.order, j, p))
        for key, values in zip(("read", "mix", "write"), zip(*every, strict=True), strict=True):
            plain = torch.stack(values).mean(0)
            assert torch.tensor(entry[key]).double() == pytest.approx(plain.detach(), rel=TOLERANCE, abs=TOLERANCE), key
        assert (entry["id"], entry["block"]) == (spec.id, j)
    norms = [float(block.norm()) for block in ends[0]]
    apart = [float((ends[0][i] - ends[0][j]).norm()) * K / sum(norms) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["distances"] == pytest.approx(apart, rel=TOLERANCE)
    assert found["distance"] == pytest.approx(min(apart), rel=TOLERANCE) and min(apart) > 0.01


GROWTHS = {
    "blocks": [{"altup_blocks": 2}],
    "lift": [{"altup_blocks": 2}, {"altup_blocks": 4}],
    "parts": [{"altup_blocks": 2}, {"altup_variant": "full"}],
}


@pytest.mark.parametrize("name", GROWTHS)
def test_the_gradients_share_of_new_blocks_is_that_of_the_entries_that_growth_adds(name: str, tmp_path: Path) -> None:
    first, *_ = recipe_dict(tmp_path)["stages"]
    stages = [first, *({"name": f"s{i}", "duration": "1 step", "grow": grow} for i, grow in enumerate(GROWTHS[name]))]
    _, schedule = recipes.read(str(write_recipe(tmp_path, stages=stages)), [])
    stage = schedule.stages[-1]
    model = with_gradients(stage.model)
    specs, added = param_specs(stage.model), added_entries(stage.links)
    new = total = 0.0
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        squares = parameter.grad.double().square()
        total += float(squares.sum())
        mine = {axis for axes in specs[parameter_name].axes for axis in axes.names} & {"blocks", "parts"}
        new += float(squares[added[parameter_name]].sum()) if mine and parameter_name in added else 0.0
    share = blocks.new_share(model, stage.links[0].source)
    assert share == pytest.approx(new / total, rel=1e-9) and 0 < new < total  # sums of float64
    for parameter in model.parameters():
        parameter.grad = None
    assert blocks.new_share(model, stage.links[0].source) is None


def with_gradients(config: ModelConfig) -> Any:
    model = build(config, init_params(config, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_what_else_grew_is_not_of_new_blocks(tmp_path: Path) -> None:
    """A wider part and an inserted layer of the blocks there were; with no more blocks there is no share at all."""
    source = streamed(AltUp(K, full=True))
    deeper = tuple(dataclasses.replace(source.layers[0], id=i) for i in (0, 2, 1))
    target = dataclasses.replace(source, embed_dim=30, layers=deeper)
    assert blocks.new_share(with_gradients(target), source) is None
    target = dataclasses.replace(target, stream=AltUp(K + 1, full=True))
    model = with_gradients(target)
    grads = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    total = sum(float(grad.square().sum()) for grad in grads.values())
    new = float(grads["embedding.weight"][:, 30 * K :].square().sum())
    new += float(grads["final_norm.gain"][30 * K :].square().sum())
    for name, grad in grads.items():
        if "stream" in name:
            new += float(grad.square().sum() - grad[(slice(K),) * grad.ndim].square().sum())
    assert blocks.new_share(model, source) == pytest.approx(new / total, rel=1e-9)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a stage without a stream, one that grew four blocks, one that goes on with them."""
    folder = tmp_path_factory.mktemp("grown")
    recipe = recipe_dict(folder, model={"num_layers": 2}, logger={"kind": "wandb", "mode": "offline"})
    stages = [
        recipe["stages"][0],
        {"name": "blocks", "duration": "6 steps", "grow": {"altup_blocks": 4}, "validate_every": "3 steps"},
        {"name": "on", "duration": "3 steps"},
    ]
    assert cli("train", write_recipe(folder, recipe | {"stages": stages}))[0] == 0
    return folder / "runs" / "run"


def test_a_run_logs_blocks_at_every_validation_of_a_model_that_has_them(grown: Path) -> None:
    logged, validated = records(grown, "blocks"), records(grown, "validation")
    assert [r["step"] for r in logged] == [r["step"] for r in validated if r["stage"] > 0] == [9, 12, 15]
    assert [r["step"] for r in validated if r["stage"] == 0] == [3, 6], "nothing without a stream"
    assert all(len(r["layers"]) == 2 and len(r["distances"]) == 6 for r in logged)
    shares = [r["new_block_grad_share"] for r in logged]
    assert all(0 < share < 1 for share in shares[:2]) and shares[2] is None, "only where blocks are new"


def test_loggers_get_the_figures_and_a_table_of_cells(grown: Path) -> None:
    rows = Rows()
    complete = [*rows.gather(records(grown)), rows.open]
    with_blocks = {row.step: row for row in complete if row is not None and row.coefficients is not None}
    assert list(with_blocks) == [9, 12, 15]
    last = records(grown, "blocks")[-1]
    row = with_blocks[15]
    assert row.values["blocks/distance"] == last["distance"] and "gradients/new_block_share" not in row.values
    assert with_blocks[9].values["gradients/new_block_share"] == records(grown, "blocks")[0]["new_block_grad_share"]
    cells = {tuple(line[:3]): line[3] for line in row.coefficients or ()}
    for layer in last["layers"]:
        for j in range(4):
            assert cells.pop((layer["id"], "layer", str(j))) == layer["read"][j]
            assert cells.pop((layer["id"], str(j), "layer")) == layer["write"][j]
            for i in range(4):
                assert cells.pop((layer["id"], str(i), str(j))) == layer["mix"][i][j]
    assert not cells
    media = grown / "wandb"
    (table,) = media.glob("offline-run-*/files/media/table/blocks/coefficients_15_*")
    assert json.loads(table.read_text()) == {"columns": [*COEFFICIENT_COLUMNS], "data": row.coefficients}
    pictures = sorted(media.glob("offline-run-*/files/media/images/blocks/heat_maps_*"))
    assert [picture.name.split("_")[2] for picture in pictures] == ["12", "15", "9"]
    assert (255 * imread(pictures[1])).round().tolist() == pixels(heat_maps(row.coefficients or ())).tolist()


def test_a_heat_map_has_the_coefficients_of_each_layer_around_zero() -> None:
    """Read above, written on the right, the corner empty; one scale for all layers; one that is no number is empty."""
    layers = [
        {"id": "a", "read": [1.0, 0.0], "mix": [[0.5, -2.0], [0.25, None]], "write": [1.0, 0.5]},
        {"id": "b", "read": [0.0, 1.0], "mix": [[1.0, 0.0], [0.0, 1.0]], "write": [0.0, 1.0]},
    ]
    figure = heat_maps(coefficient_lines({"layers": layers}))
    first, second = [axes.images[0] for axes in figure.axes]
    nan = float("nan")
    expected = [[1.0, 0.0, nan], [0.5, -2.0, 1.0], [0.25, nan, 0.5]]
    assert numpy.array_equal(first.get_array().filled(nan), expected, equal_nan=True)
    assert first.get_clim() == second.get_clim() == (-2.0, 2.0)
    assert [axes.get_title() for axes in figure.axes] == ["layer a", "layer b"]
    shown = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert shown == "1.00 0.00 0.50 -2.00 1.00 0.25 0.50"


def test_the_report_has_the_last_coefficients_and_the_course_of_the_distance(grown: Path, tmp_path: Path) -> None:
    summary = RunSummary.read(grown)
    shown = data_of(page([summary]))["runs"][0]
    logged = records(grown, "blocks")
    assert shown["blocks"]["step"] == 15 and shown["blocks"]["distances"] == logged[-1]["distances"]
    assert shown["blocks"]["layers"] == logged[-1]["layers"]
    curve = shown["curves"]["distance"]
    assert shown["places"][curve["at"]]["step"] == [9, 12, 15]
    assert curve["value"] == pytest.approx([r["distance"] for r in logged], rel=1e-5)  # six digits are shown
    assert len(shown["curves"]["new_block_grad_share"]["value"]) == 2
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("run.json", "recipe.yaml"):
        (plain / name).write_bytes((grown / name).read_bytes())
    lines = [json.dumps(r) + "\n" for r in records(grown) if r["kind"] != "blocks"]
    (plain / "metrics.jsonl").write_text("".join(lines))
    without = run_data(RunSummary.read(plain))
    assert without["blocks"] is None and not {"distance", "new_block_grad_share"} & without["curves"].keys()


WAYS = {"sharded": [*FSDP, "trainer.precision=fp32"], "compiled": ["trainer.compile=true"]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("coefficients", ["static", "routed"])
def test_however_a_model_is_trained_its_blocks_are_measured_alike(
    way: str, coefficients: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_dict(tmp_path, model={"num_layers": 2, "dropout": 0.0})
    grow = {"altup_blocks": 2, "altup_variant": "full"}
    method = {}
    if coefficients == "routed":
        grow |= {"altup_coefficients": "routed"}
        method = {"methods": {"altup": "copies"}}
    first = recipe["stages"][0] | {"micro_batch_size": 2, "duration": "3 steps"}
    stages = [first, {"name": "blocks", "duration": "3 steps", "micro_batch_size": 2, "grow": grow, **method}]
    path, runs = write_recipe(tmp_path, recipe | {"stages": stages}), tmp_path / "runs"
    assert cli("train", path, "run.name=plain")[0] == 0
    if way == "sharded":
        assert two_processes("train", path, *WAYS[way], f"run.name={way}", run=runs / way) == [0, 0]
    else:
        compiled = torch.nn.Module.compile
        monkeypatch.setattr(DecoderLM, "compile", lambda self, **_: compiled(self, backend="eager"))
        assert cli("train", path, *WAYS[way], f"run.name={way}")[0] == 0
    (plain,), (other,) = records(runs / "plain", "blocks"), records(runs / way, "blocks")
    for key in ("distances", "new_block_grad_share"):
        assert other[key] == pytest.approx(plain[key], rel=ALIKE), key
    for one, two in zip(plain["layers"], other["layers"], strict=True):
        for key in ("read", "mix", "write"):
            assert torch.allclose(torch.tensor(one[key]), torch.tensor(two[key]), rtol=ALIKE, atol=ALIKE), key
