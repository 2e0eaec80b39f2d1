"""The report in a real browser: it draws, it answers to clicks, touch and keys, and it stays inside the window."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from growkit.report.page import write_report
from growkit.report.run_summary import read_runs
from tests.browser import Page, browser, missing
from tests.support import cli, recipe_dict, records, write_recipe
from tests.test_report import HOSTILE, hostile_run, made, step, validation

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PHONE = 390
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
LOSS = "document.getElementById('loss-chart')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that training left: two growths, the second with a longer context, samples."""
    folder = tmp_path_factory.mktemp("shown")
    recipe = recipe_dict(folder)
    recipe["monitor"] |= {"sample_tokens": 12, "sample_prompt": "The "}
    assert cli("train", write_recipe(folder, recipe))[0] == 0
    return folder / "runs" / "run"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """A report on the run and on another, made by hand."""
    folder = tmp_path_factory.mktemp("several")
    other = made(folder / "other", [step(1, grad_norms={"mlp": 2.0}), validation(1, 5.0), validation(9, 4.0)])
    file = folder / "report.html"
    write_report(read_runs([run, other]), file)
    return file


def test_the_arms_of_a_bandit_are_drawn(page: Page, tmp_path: Path) -> None:
    likely = [{"prediction_gain": 0.1, "arm_probabilities": {"<b>a": 1 - n / 10, "x/y": n / 10}} for n in range(1, 9)]
    folder = made(tmp_path / "run", [step(n, **one) for n, one in enumerate(likely, 1)])
    write_report(read_runs([folder]), tmp_path / "report.html")
    page.errors()
    page.open(tmp_path / "report.html")
    drawn = (
        "const chart = document.querySelector('[aria-label=\"How likely the bandit chose\"]');"
        "return chart.data.map(line => [line.name, Math.round(line.y[0])])"
    )
    assert page.run(drawn) == [["&lt;b&gt;a", 90], ["x/y", 10]]
    assert not page.errors()


def test_it_draws_every_chart_without_a_word_on_the_console(page: Page, run: Path) -> None:
    page.errors()
    page.open(run / "report.html")
    count = "[...chart.querySelectorAll('.scatterlayer .trace')].map(t => t.querySelectorAll('path').length)"
    charts = page.run(f"return [...document.querySelectorAll('.chart')].map(chart => {count})")
    assert len(charts) == 7 and all(chart and all(paths > 0 for paths in chart) for chart in charts)
    lines = page.run(
        "return [...document.querySelectorAll('#loss-chart .scatterlayer path.js-line')].map(p => p.getAttribute('d'))"
    )
    assert len(lines) == 3 and all(line.count("L") + line.count("C") + line.count("H") > 0 for line in lines)
    steps = records(run, "step")
    assert page.run(f"return {LOSS}.data[0].y") == pytest.approx([s["bits_per_byte"] for s in steps], rel=1e-5)
    figures = page.find(".figures").text
    assert "Parameters" in figures and f"{records(run, 'validation')[-1]['bits_per_byte']:.3f}" in figures
    assert "2-gram" in figures and "complete" in page.find("h1").text
    for title in ("Learning rate", "Gradient norm", "Gradient in new parameters", "Throughput", "Utilisation"):
        assert title in page.find("#course").text
    assert page.errors() == []
    assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_the_axis_can_be_chosen(page: Page, run: Path) -> None:
    page.open(run / "report.html")
    steps = records(run, "step")
    for text, key, title in (("Tokens", "tokens", "tokens"), ("Time", "seconds", "training time (seconds)"),
                             ("FLOPs", "flops", "FLOPs")):  # fmt: skip
        page.button(text).click()
        page.until(f"return {LOSS}.layout.xaxis.title.text === {json.dumps(title)}")
        assert page.run(f"return {LOSS}.data[0].x") == pytest.approx([s[key] for s in steps], rel=1e-5)
        shown = page.run("return [...document.querySelectorAll('.xtitle')].map(t => t.textContent)")
        assert shown == [title] * 7, "every chart follows"
        assert page.button(text).get_attribute("aria-pressed") == "true"
    page.button("log").click()
    page.until(f"return {LOSS}.layout.xaxis.type === 'log'")
    assert page.errors() == []


def test_zooming_one_chart_zooms_all_and_goes_back(page: Page, run: Path) -> None:
    page.open(run / "report.html")
    whole = page.run(f"return {LOSS}.layout.xaxis.range")
    drag = page.find("#loss-chart .nsewdrag")
    page.run("arguments[0].scrollIntoView({block: 'center'})", drag)
    ActionChains(page.driver).move_to_element_with_offset(drag, -200, -50).click_and_hold().move_by_offset(
        150, 60
    ).move_by_offset(150, 60).release().perform()
    ranges = "[...document.querySelectorAll('.chart')].map(c => JSON.stringify(c.layout.xaxis.range))"
    page.until(f"return {LOSS}.layout.xaxis.range[0] > {whole[0]} && new Set({ranges}).size === 1")
    zoomed = page.run(f"return {LOSS}.layout.xaxis.range")
    page.button("Dark").click()
    assert page.run(f"return {ranges}") == [json.dumps(zoomed, separators=(",", ":"))] * 7, "the theme changes no zoom"
    page.button("Reset zoom").click()
    page.until(f"return new Set({ranges}).size === 1 && {LOSS}.layout.xaxis.range[0] === {whole[0]}")


def test_a_mark_opens_its_certificate(page: Page, run: Path) -> None:
    page.open(run / "report.html")
    first, second = page.driver.find_elements("css selector", "#loss-marks button")
    at = page.run("const x = b => { const r = b.getBoundingClientRect(); return r.left + r.width / 2; };"
                  "return [...document.querySelectorAll('#loss-marks button')].map(x)")  # fmt: skip
    lines = page.run("return [...document.querySelectorAll('#loss-chart .shapelayer path')].map(p => "
                     "{const r = p.getBoundingClientRect(); return [r.left + r.width / 2, r.height]})")  # fmt: skip
    uprights = sorted(x for x, height in lines if height > 100)
    assert at == pytest.approx(uprights, abs=2), "a button stands on its line"
    second.click()
    card = page.find("#card")
    growth = records(run, "growth")[1]
    assert card.is_displayed() and "tokens → deeper" in card.text
    for part in ("depth (identity)", "context 16 → 32", "exact", "Δlogits, float64", "Loss on the probe"):
        assert part in card.text
    assert f"{growth['certificate']['loss_before']:.4f}" in card.text and growth["certificate"]["reason"] in card.text
    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    assert not card.is_displayed()
    page.run("arguments[0].focus()", first)
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()  # a mark is reached by keys too
    assert card.is_displayed() and "first → tokens" in card.text
    page.button("Close").click()
    page.find(".marks button").click()
    assert card.is_displayed() and "param_tokens (bank)" in card.text
    assert page.errors() == []


def test_the_theme_follows_the_system_and_the_switch(page: Page, run: Path) -> None:
    ink = "return getComputedStyle(document.body).backgroundColor"
    grid = f"return {LOSS}.layout.yaxis.gridcolor"
    page.open(run / "report.html", dark=True)
    dark = page.run(ink), page.run(grid)
    page.open(run / "report.html")
    light = page.run(ink), page.run(grid)
    assert light[0] != dark[0] and light[1] != dark[1], "the charts follow"
    page.button("Dark").click()
    assert (page.run(ink), page.run(grid)) == dark
    page.button("Light").click()
    assert (page.run(ink), page.run(grid)) == light


def test_hovering_shows_values(page: Page, run: Path) -> None:
    page.open(run / "report.html")
    drag = page.find("#loss-chart .nsewdrag")
    page.run("arguments[0].scrollIntoView({block: 'center'})", drag)
    ActionChains(page.driver).move_to_element(drag).move_by_offset(3, 3).perform()
    text = page.until("return document.querySelector('#loss-chart .hoverlayer').textContent")
    assert re.search(r"\d+[kMG]? FLOPs.*training.*\d\.\d{3}.*step \d+", text), text


def test_it_fits_a_phone_and_answers_to_touch(page: Page, run: Path, several: Path) -> None:
    for file in (run / "report.html", several):
        page.open(file, width=PHONE, height=844)
        assert page.run(OVERFLOW) <= 0
        assert page.run("return [...document.querySelectorAll('.chart')].every(c => c.clientWidth <= innerWidth)")
    page.open(run / "report.html", width=PHONE, height=844)
    assert page.run(f"return {LOSS}.layout.dragmode") is False, "a finger over a chart scrolls the page"
    page.button("zoom").click()
    page.until(f"return {LOSS}.layout.dragmode === 'zoom'")
    box = "const r = document.querySelectorAll('#loss-marks button')[1].getBoundingClientRect();"
    page.run("document.getElementById('loss').scrollIntoView()")
    x, y = page.run(box + "return [r.left + r.width / 2, r.top + r.height / 2]")
    for event, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": event, "touchPoints": points})
    page.until("return document.getElementById('card').open")
    assert page.run(OVERFLOW) <= 0
    assert page.errors() == []


def test_several_runs_share_the_charts(page: Page, several: Path) -> None:
    page.open(several)
    assert page.find("h1").text == "2 runs"
    assert page.run("return [...document.querySelectorAll('#loss-chart .legendtext')].map(t => t.textContent)") == [
        "run",
        "other",
    ]
    assert "What differs" in page.find("#differences").text
    assert "end of deeper" in page.find("#samples").text
    page.button("other").click()
    page.until("return document.querySelector('#samples').textContent.includes('No samples')")
    assert page.find("#lineage .here").text == "other"
    assert page.errors() == []


def test_text_of_a_run_stays_text(page: Page, tmp_path: Path) -> None:
    write_report([hostile_run(tmp_path)], tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    page.find(".marks button").click()
    assert HOSTILE in page.find("#card").text
    page.run("document.getElementById('card').close()")
    assert page.find("h1").text.startswith(HOSTILE)
    assert page.run("return typeof window.stolen") == "undefined"
    assert not page.driver.find_elements("css selector", "img, main b b")
    assert page.errors() == []


def test_without_a_step_it_says_so(page: Page, tmp_path: Path) -> None:
    write_report(read_runs([made(tmp_path / "empty", [])]), tmp_path / "report.html")
    page.open(tmp_path / "report.html", width=PHONE)
    assert "nothing to draw yet" in page.find("main").text and "stages: [{name: a}]" in page.find("#recipe").text
    assert page.errors() == []


def test_the_blocks_of_a_stream_are_a_heat_map_for_each_layer(page: Page, run: Path, tmp_path: Path) -> None:
    mix = [[1.0, -0.5], [0.25, None]]
    layers = [{"id": i, "block": i, "read": [1.0, 0.0], "mix": mix, "write": [1.0, 0.125]} for i in (0, 3)]
    said = {"kind": "blocks", "distance": 0.5, "distances": [0.5], "layers": layers, "new_block_grad_share": 0.1}
    folder = made(tmp_path / "run", [step(1, loss=1.0), step(2) | said, step(3, loss=1.0)])
    write_report(read_runs([folder]), tmp_path / "report.html")
    page.errors()
    shades = (
        "return [...document.querySelectorAll('.heat')].map(map => [...map.querySelectorAll('td')].map("
        "cell => [cell.textContent, cell.title, getComputedStyle(cell).backgroundColor]))"
    )
    found = {}
    for dark in (False, True):
        page.open(tmp_path / "report.html", dark=dark)
        found[dark] = page.run(shades)
        assert len(found[dark]) == 2 and page.run("return document.querySelectorAll('.heats figure').length") == 2
        numbers = ["1.00", "0.00", "", "1.00", "−0.50", "1.00", "0.25", "–", "0.13"]
        assert [cell[0] for cell in found[dark][1]] == numbers
    assert found[False][1][4][1] == "block 0 from block 1: -0.5" and found[False][1][0][1] == "layer 3 reads block 0: 1"
    shades_of = {cell[2] for cell in found[False][1]}
    assert len(shades_of) == 6, "a shade for each value, none for 0 and no value"
    assert found[False][0][0][2] != found[True][0][0][2], "the theme's colours"
    assert "blocks 0 and 1 are nearest to each other: 0.5" in page.find("#blocks").text
    assert page.run("return document.querySelectorAll('[aria-label^=\"Nearest two blocks\"]').length") == 1
    page.open(tmp_path / "report.html", width=PHONE, height=844)
    assert page.run(OVERFLOW) <= 0 and not page.errors()
    page.open(run / "report.html")
    assert not page.driver.find_elements("css selector", "#blocks, .heat"), "nothing without a stream"
