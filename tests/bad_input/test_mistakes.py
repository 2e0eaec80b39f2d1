"""Every mistake a user can make ends in one message with the key, the value, the mend and a code, and leaves what was
there bitwise as it was. The table below covers every code that growkit can raise, and docs/errors.md explains each."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import growkit
from growkit import errors, grow
from growkit.checkpoint.hf.export import FAMILIES
from growkit.errors import ConfigError, GrowkitError
from growkit.growth import gradients
from growkit.growth.banks import first_banks, merge
from growkit.growth.path import path
from growkit.growth.state import TrainState
from growkit.models.config import from_json, unmasked
from growkit.models.decoder import build
from growkit.ops.dispatch import resolve_backend
from growkit.ops.selective_scan import selective_scan
from growkit.registry import Registry
from growkit.train import hardware
from tests.bad_input.of_bandit import BANDIT_CASES
from tests.bad_input.of_commands import (
    EVAL_CASES,
    EXPORT_CASES,
    FOLDER_CASES,
    INIT_CASES,
    LOGGER_CASES,
    PLANNER_CASES,
    PROFILE_CASES,
    REPORT_CASES,
)
from tests.bad_input.of_curricula import CURRICULUM_CASES
from tests.bad_input.of_data import PREPARE_CASES
from tests.bad_input.of_decisions import DECISION_CASES
from tests.bad_input.of_recipes import DATA_CASES, RECIPE_CASES, TASK_CASES
from tests.bad_input.of_runs import CHECKPOINT_CASES, EXTEND_CASES, RUN_CASES
from tests.bad_input.of_selection import SELECT_CASES
from tests.bad_input.of_streams import MAMBA_CASES, STREAM_CASES
from tests.bad_input.support import Case, assert_one_message, contents
from tests.bad_input.test_damage import BUSY
from tests.support import cli, model_config, trained_like

PACKAGE = Path(growkit.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "errors.md"

CASES = [
    *RECIPE_CASES,
    *CURRICULUM_CASES,
    *STREAM_CASES,
    *MAMBA_CASES,
    *SELECT_CASES,
    *BANDIT_CASES,
    *DECISION_CASES,
    *DATA_CASES,
    *TASK_CASES,
    *PREPARE_CASES,
    *RUN_CASES,
    *CHECKPOINT_CASES,
    *EXTEND_CASES,
    *EVAL_CASES,
    *EXPORT_CASES,
    *INIT_CASES,
    *PROFILE_CASES,
    *LOGGER_CASES,
    *FOLDER_CASES,
    *PLANNER_CASES,
    *REPORT_CASES,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_named_and_nothing_is_half_written(
    case: Case, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if case.arrange is not None:
            case.arrange(patch)
        before = contents(world)
        code, _, err = cli(*shlex.split(case.words))
    assert_one_message(case, code, err)
    after = contents(world)
    assert not [name for name in after if ".writing-" in name]
    if case.leaves:  # a run that had started may leave its folder, and no part of a checkpoint in it
        assert {name: after.get(name) for name in before} == before
        assert not list(Path("runs/new").glob("checkpoints/*/*")) or case.code == "not-finite"
    else:
        assert after == before


def test_the_names_of_the_cases_are_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 40


def _grow_with(optimizer: Callable[[torch.nn.Module, torch.nn.Module], torch.optim.Optimizer]) -> object:
    """``optimizer`` is made of the model that grows and of another one."""
    model, other = (build(config, trained_like(config).params) for config in [model_config("transformer")] * 2)
    return grow(model, optimizer(model, other), num_layers=3)


def _scan(**optional: torch.Tensor) -> object:
    tokens, states = torch.zeros(1, 4, 2), torch.zeros(1, 4, 3)
    return selective_scan("reference")(tokens, tokens, -torch.ones(2, 3), states, states, torch.ones(2), **optional)


def _kernels_take(tokens: torch.Tensor, interpreted: bool = False) -> object:
    from growkit.ops.pattention import triton  # which loads it

    with mock.patch.object(triton, "INTERPRETED", interpreted):
        return triton._check(torch.zeros(1), [tokens])


def _through_transformers(**arguments: object) -> object:
    from growkit.checkpoint.hf.auto import GrowkitForCausalLM  # which loads transformers

    config = model_config("transformer")
    return GrowkitForCausalLM.around(build(config, trained_like(config).params))(**arguments)


def _state(layers: int) -> TrainState:
    return TrainState(model_config("tokenformer", num_layers=layers), {})


CALLS: list[tuple[str, Callable[[], object], str, str, str]] = [
    (
        "no chain leads there",
        lambda: path(model_config("tokenformer"), model_config("tokenformer", tied_head=False), {}),
        "unreachable-target",
        "grow",
        "tied_head",
    ),
    ("a model that is a number", lambda: from_json(3), "bad-model", "model", "mapping"),
    ("a model with a strange field", lambda: from_json({"wings": 2}), "bad-model", "model", "'wings'"),
    ("a model without layers", lambda: from_json({"vocab_size": 3}), "bad-model", "model", "'embed_dim'"),
    (
        "a model in mid-ramp",
        lambda: unmasked(replace(model_config("tokenformer"), ramp=0.5)),
        "still-ramping",
        "grow",
        "train on",
    ),
    ("signs without room", lambda: gradients._unnamed_file(2**62), "no-room", "TMPDIR", "free"),
    (
        "a Llama of tokens",
        lambda: FAMILIES.get("llama", key="").fields(model_config("tokenformer")),
        "not-expressible",
        "layers",
        "--as growkit",
    ),
    (
        "no banks to leave out",
        lambda: first_banks(model_config("transformer"), {}, 1),
        "no-banks",
        "--banks",
        "leave it out",
    ),
    (
        "a merge of other growth",
        lambda: merge(_state(3), _state(3), _state(2)),
        "cannot-merge",
        "--ancestor",
        "param_tokens (bank)",
    ),
    ("a CPU for the kernels", lambda: _kernels_take(torch.zeros(1)), "no-triton", "trainer.backend", "to a GPU"),
    (
        "tokens of another dtype",
        lambda: _kernels_take(torch.zeros(1).half(), interpreted=True),
        "mixed-dtypes",
        "trainer.backend",
        "autocast",
    ),
    (
        "tokens on another device",
        lambda: _kernels_take(torch.zeros(1, device="meta"), interpreted=True),
        "mixed-devices",
        "trainer.backend",
        "one device",
    ),
    ("a backend", lambda: resolve_backend("pattention", "magic"), "unknown-choice", "trainer.backend", "compiled"),
    (
        "a state of another shape",
        lambda: _scan(h0_BDN=torch.zeros(1, 3, 2)),
        "scan-misfit",
        "selective_scan.h0",
        "give it (1, 2, 3)",
    ),
    ("a choice", lambda: Registry("colour").get("red", key="paint"), "unknown-choice", "paint", "colour"),
    (
        "an optimizer whose moments do not grow",
        lambda: _grow_with(lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1)),
        "unknown-optimizer",
        "optimizer",
        "SGD",
    ),
    (
        "another model's optimizer",
        lambda: _grow_with(lambda _, other: torch.optim.AdamW(other.parameters())),
        "not-its-optimizer",
        "optimizer",
        "not the model's",
    ),
    (
        "what a model in transformers does not give",
        lambda: _through_transformers(input_ids=torch.ones(1, 2, dtype=torch.long), output_attentions=True),
        "not-in-transformers",
        "output_attentions",
        "model.growkit",
    ),
]


@pytest.mark.parametrize(("call", "code", "key", "part"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_a_call_with_bad_input_names_it(call: Callable[[], object], code: str, key: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert (caught.value.code, caught.value.key) == (code, key)
    assert part in str(caught.value)


USAGE = [
    ("no command", "", ""),
    ("no such command", "nope", "nope"),
    ("no recipe", "train", "recipe"),
    ("no run", "resume", "run"),
    ("no run to sync", "sync", "run"),
    ("step is a word", "resume runs/run --from x", "--from"),
    ("no targets", "grow runs/run -o grown", "targets"),
    ("no output", "grow runs/run num_layers=2", "--output"),
    ("negative seed", "grow runs/run num_layers=2 -o grown --seed -1", "--seed"),
    ("seed too large", f"generate runs/run --seed {2**63}", "--seed"),
    ("no probe", "grow runs/run num_layers=2 -o grown --probe-tokens 0", "--probe-tokens"),
    ("no tokens", "generate runs/run --tokens 0", "--tokens"),
    ("not a temperature", "generate runs/run --temperature nan", "--temperature"),
    ("unknown option", "train recipe.yaml --fast", "--fast"),
    ("extend by nothing", "extend runs/run", "recipe"),
    ("extend from a word", "extend runs/run recipe.yaml --from x", "--from"),
    ("no tokens to score", "eval runs/run --tokens 0", "--tokens"),
    ("a context of none", "eval runs/run --context 0", "--context"),
    ("no sequences", "eval runs/run --sequences 0", "--sequences"),
    ("stages in words", "init new.yaml --stages three", "--stages"),
    ("profile no steps", "profile recipe.yaml --steps 0", "--steps"),
    ("the doctor and a patient", "doctor now", "now"),
    ("the doctor in haste", "doctor --fast", "--fast"),
    ("the doctor in no folder", "doctor --folder", "--folder"),
    ("the doctor with a value", "doctor --json=yes", "--json"),
    ("the doctor misspelt", "docter", "docter"),
    ("data to do nothing with", "data", "data"),
    ("no threads to prepare with", "data prepare recipe.yaml --workers 0", "--workers"),
    ("no size of a vocabulary", "tokenizer train corpus.txt -o mine", "--vocab-size"),
    ("no run to report on", "report", "runs"),
    ("no run to compare", "compare", "runs"),
    ("an axis there is not", "compare runs/run runs/run --by steps", "--by"),
    ("no run to tell the lineage of", "lineage", "run"),
    ("two runs to tell the lineage of", "lineage runs/run runs/run", "unexpected"),
]


@pytest.mark.parametrize(("words", "part"), [u[1:] for u in USAGE], ids=[u[0] for u in USAGE])
def test_a_wrong_command_line_exits_with_2_and_says_what_is_wrong(words: str, part: str, world: Path) -> None:
    before = contents(world)
    code, out, err = cli(*shlex.split(words))
    assert code == 2
    assert part in err and "Traceback" not in err and "Usage" in out + err
    assert "[bad-command-line]" in err
    assert contents(world) == before


def raised_codes() -> dict[str, list[str]]:
    """Code → where it is raised, from the syntax trees of the whole package."""
    kinds = {name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, GrowkitError)}
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name not in kinds:
                continue
            where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.setdefault(first.value, []).append(where)
            else:  # an error passed on under its own code
                assert isinstance(first, ast.Attribute) and first.attr == "code", f"{where}: the code is not literal"
    return found


def test_every_code_is_documented_and_every_documented_code_is_raised() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    codes = [row[0] for row in rows]
    assert codes == sorted(set(codes))
    assert set(codes) == set(raised_codes())


def test_every_code_is_exercised() -> None:
    exercised = {case.code for case in (*CASES, BUSY)} | {call[2] for call in CALLS} | {"bad-command-line"}  # USAGE
    assert exercised == set(raised_codes())


def test_the_collector_sees_every_kind_of_error() -> None:
    codes = raised_codes()
    assert {"bad-duration", "corpus-empty", "damaged", "not-finite", "not-preserved"} <= set(codes)
    assert sum(map(len, codes.values())) > 90
    assert hardware.accelerator.__module__  # the package under test is the one that is imported
