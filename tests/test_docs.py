"""The documents say what the code does: every operator has a card, links lead somewhere, the references and pictures
that are made from the code are up to date. Their code blocks: test_code_blocks.py; the site: test_site.py."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from growkit.cli.main import app
from growkit.growth.operator import OPERATORS
from growkit.growth.path import ORDER
from scripts import continual_learning, operator_examples
from tests import documents
from tests.documents import DOCS, FENCE, ROOT, Block, blocks, pages, schedule_of

CARDS = DOCS / "operators"
SCRIPTS = ROOT / "scripts"
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")


def fragments() -> list[Block]:
    """The YAML of the cards that is part of a recipe."""
    return list(blocks(sorted(CARDS.glob("*.md")), "yaml"))


@pytest.mark.parametrize("name", ORDER)
def test_every_operator_has_a_card(name: str) -> None:
    """The card and the table name every method and every key."""
    operator = OPERATORS.get(name, key="operator")
    table = (CARDS / "README.md").read_text(encoding="utf-8")
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert f"[`{name}`]({name}.md)" in table
    for word in (*operator.methods, *operator.fields, *operator.options):
        assert f"`{word}`" in table, word
        assert f"`{word}`" in card, word
    for paper in re.findall(r"\d{4}\.\d{5}", operator.source):
        assert paper in card, f"{name}: the source {paper} is not named"


def test_every_card_is_an_operators() -> None:
    assert {path.stem for path in CARDS.glob("*.md")} == set(OPERATORS) | {"README"}


def test_the_table_says_what_the_operators_say() -> None:
    """Rows in the order of the chain, the default method first."""
    table = (CARDS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:\[`(\w+)`\]\(\w+\.md\))? ?\| [^|]*\| ([^|]*)\|", table, re.MULTILINE)
    listed: dict[str, list[str]] = {}
    for name, methods in rows:
        listed.setdefault(name or list(listed)[-1], []).extend(re.findall(r"`(\w+)`", methods))
    assert list(listed) == list(ORDER)
    for name, methods in listed.items():
        assert list(dict.fromkeys(methods)) == list(OPERATORS.get(name, key="operator").methods)


def test_every_way_to_grow_is_measured() -> None:
    """The examples know every method, and what the pages print is what was measured: the table has all rows, each card
    those of its own operator."""
    growths = {f"{case.operator} ({case.method})" for of in operator_examples.cases().values() for case in of}
    measured = json.loads((DOCS / "results" / "operator_examples.json").read_text())
    assert growths == {row["growth"] for row in measured["rows"]} - {"not grown"}
    lines = operator_examples.table(measured["rows"], measured["steps"]).splitlines()
    assert "\n".join(lines) in (CARDS / "README.md").read_text(encoding="utf-8")
    for name in OPERATORS:
        card = (CARDS / f"{name}.md").read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if f"| {name} `" in line]
        assert rows and set(rows) <= set(card), name


def test_what_is_said_of_continual_learning_was_measured() -> None:
    measured = json.loads((DOCS / "results" / "continual_learning.json").read_text())
    page = (DOCS / "how-to" / "continual-learning.md").read_text(encoding="utf-8")
    assert continual_learning.table(measured["bits_per_byte"]) in page


def test_every_benchmark_is_on_its_page() -> None:
    """Every script that measures, and every file that one has written."""
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    results = {path.name for path in (DOCS / "results").glob("*.json")}
    assert results == set(re.findall(r"\(results/(\w+\.json)\)", page))
    writing = {path.name for path in SCRIPTS.glob("*.py") if "results" in path.read_text(encoding="utf-8")}
    measuring = {path.name for path in SCRIPTS.glob("bench_*.py")} | writing
    others = {"screenshot_report.py", "gpu_figures.py"}  # a picture of a report; a part of bench_gpu.py
    assert measuring - others == set(re.findall(r"^\| `(\w+\.py)`", page, re.MULTILINE))


def test_what_the_page_of_benchmarks_says_was_measured() -> None:
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1].removesuffix(".py"): line for line in page.splitlines() if line.startswith("| `")}

    def said(name: str, *figures: str) -> None:
        for figure in figures:
            assert figure in rows[name], f"{name}: {figure} was measured"

    def result(name: str) -> Any:
        return json.loads((DOCS / "results" / f"{name}.json").read_text())

    overhead = [model["ratio"]["median"] for model in result("bench_overhead")["models"]]
    said("bench_overhead", f"{min(overhead):.2f} to {max(overhead):.2f}")
    data = [cores["ratio_of_seconds"] for cores in result("bench_data")["preparation"]["cores"]]
    said("bench_data", f"{data[0]:.2f} of the library's rate on one core, {data[1]:.2f} on two")
    growing = {f"{row['size']}:{row['growth']}": row for row in result("bench_growth")["models"]}
    for row in (growing["1.3B:depth"], growing["1.3B:mlp"]):
        said("bench_growth", f"{row['peak_anonymous_bytes'] / 1e9:.2f} GB", f"{row['seconds']['all']:.0f} s")
        said("bench_growth", f"{row['share_of_copy_speed']:.2f} of copy speed")
    said(
        "bench_logger",
        " and ".join(str(m["arms"]["wandb"]["step_time_ratio"])[:5] for m in result("bench_logger")["models"]),
    )
    blocks_cost = [result("bench_altup")["arms"][f"recycled, K = {k}"]["eager"]["ratio"]["median"] for k in (2, 4)]
    said("bench_altup", f"K = 2: {blocks_cost[0]:.2f}", f"K = 4: {blocks_cost[1]:.2f}")
    faster = {peer: of["times"] for peer, of in result("bench_scan")["peers on 1"]["faster"].items()}
    said("bench_scan", f"{faster['mambapy']} and {round(faster['transformers'], -1):,.0f} times")
    said("bench_scan", f"{faster['mambapy, by the loop']} times mambapy's")
    best: dict[str, float] = {}
    for run in result("quickstart")["results"]:
        arm = run["arm"].partition(",")[0]
        best[arm] = min(best.get(arm, 9.0), run["bits_per_byte"])
    said("quickstart_study", *(f"{best[arm]:.3f}" for arm in ("grown", "middle", "middle-1024")))
    said("bench_nanogpt", *(f"{arm['mean']:.3f}" for arm in result("bench_nanogpt")["final_bits_per_byte"].values()))
    grown = {(row["model"], row["growth"]): row for row in result("operator_examples")["rows"]}
    padded, alone = grown["transformer", "width (pad)"], grown["transformer", "not grown"]
    said(
        "operator_examples",
        f"{padded['after']['mean']:.3f}",
        *(f"{row['later']['mean']:.3f}" for row in (padded, alone)),
    )
    decided = [row["bits_per_byte"] for row in result("decisions")["rows"]]
    said("decisions", f"{min(decided):.3f} to {max(decided):.3f}")
    forgotten = {arm: of["code"]["mean"] for arm, of in result("continual_learning")["bits_per_byte"].items()}
    said("continual_learning", f"{forgotten['code alone']:.2f} to {forgotten['no growth, everything trains']:.2f}")
    said("continual_learning", f"{forgotten['new banks, everything old frozen']:.2f}")
    one = next(row for row in result("altup_study")["rows"] if row["arm"] == "one block throughout")
    said("altup_study", f"−{abs(one['recipe_minus_this']):.3f} ± {one['interval']:.3f}")
    apart = [row["distance"] for row in result("stream_distances")["rows"]]
    said("stream_distances", f"{len(apart)} ways", f"{min(apart):.2f} to {max(apart):.2f}")
    tasks = {row["recipe"]: row["scores"] for row in result("synthetic_tasks")["rows"] + result("mamba_tasks")["rows"]}
    right = {(name, at["context_length"]): at["sequence_accuracy"] for name, of in tasks.items() for at in of}
    said("synthetic_tasks", f"{100 * right['induction', 64]:.0f} % at 64")
    said("mamba_tasks", f"{100 * right['mamba-selective-copying', 4096]:.0f} % of")
    assert right["induction", 32] == right["mamba-induction", 2**20] == 1
    soak = result("soak")
    assert soak["identical"]
    said("soak", f"{soak['kills']} kills in {soak['runs']} runs", f"at most {soak['steps_recomputed']['max']} steps")
    said("check_compilations", f"| {result('compilations')['graphs']} for eight")
    goal = result("bench_growth")["goal"]["share_of_copy_speed"]
    missed = any(row["share_of_copy_speed"] < goal for row in growing.values() if row["size"] == "1.3B")
    assert ("missed" in rows["bench_growth"]) == missed and page.count("missed") == 1


@pytest.mark.parametrize("block", fragments(), ids=str)
def test_a_fragment_is_a_recipe(block: Block) -> None:
    schedule = schedule_of(block)
    grown = {link.operator for stage in schedule.stages for link in stage.links}
    assert grown, "nothing grows"
    assert block.path.stem in (*grown, "README"), "the fragment does not show its card's operator"


def test_every_card_has_a_fragment() -> None:
    assert {block.path.stem for block in fragments()} == set(OPERATORS) | {"README"}


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", pages(), ids=documents.name)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_the_recipe_reference_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPTS / "make_recipe_reference.py"))
    written = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == script["render"](), "run scripts/make_recipe_reference.py"


def test_the_command_reference_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPTS / "make_cli_reference.py"))
    written = (DOCS / "cli-reference.md").read_text(encoding="utf-8")
    assert written == script["render"](), "run scripts/make_cli_reference.py"


def real_commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
    else:
        for word, sub in command.commands.items():
            yield from real_commands(sub, f"{path} {word}")


def test_the_command_reference_knows_what_the_parser_takes() -> None:
    """It is made from declarations; the parser, made by typer, has the same commands, options and arguments."""
    reference = (DOCS / "cli-reference.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", reference, flags=re.MULTILINE)[1:]}
    parser = dict(real_commands(typer.main.get_command(app), "growkit"))
    assert set(sections) == set(parser)
    for path, command in parser.items():
        rows = re.findall(r"^\| `([^`]+)` \|", sections[path], re.MULTILINE)
        spelled = {word for row in rows for word in re.split(r", |/", row)}
        taken = {word for p in command.params for word in (*p.opts, *p.secondary_opts) if word != "--help"}
        assert {word for word in spelled if word[0] == "-"} == {word for word in taken if word[0] == "-"}, path
        assert len(rows) == len(command.params), path


def test_the_pictures_are_up_to_date(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPTS / "make_concept_pictures.py"))["draw"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()}
    assert kept == drawn, "run scripts/make_concept_pictures.py"
