"use strict";
// The parts of the page beside the charts.

const STATES = {
  complete: "complete",
  running: "still running",
  unfinished: "unfinished: it can be resumed",
  empty: "nothing trained yet",
};

function state(run) {
  return el("span", { class: `state ${run.state}` }, STATES[run.state]);
}

function sizes(run) {
  if (!run.parameters) return DASH;
  return run.parameters[0] === run.parameters[1] ? quantity(run.parameters[0]) : change(run.parameters);
}

function steps(run) {
  return `${run.growths} growth step${run.growths > 1 ? "s" : ""}`;
}

function headline() {
  if (MANY) {
    const best = RUNS.filter((run) => run.last !== null).sort((a, b) => a.last - b.last)[0];
    const lead = best ? `${best.name} ends lowest, at ${best.last.toFixed(3)} bits per byte of held-out text.` : "";
    return [el("h1", {}, `${RUNS.length} runs`), el("p", { class: "lead" }, lead)];
  }
  const run = RUNS[0];
  const told = [];
  if (run.parameters) {
    told.push(`${sizes(run)} parameters${run.growths ? ` in ${steps(run)}` : ""}.`);
  }
  if (run.last !== null) {
    const beside = run.ngram ? `, ${Math.abs(run.last - run.ngram[1]).toFixed(3)} ${
      run.last < run.ngram[1] ? "better" : "worse"} than a ${run.ngram[0]}-gram model` : "";
    told.push(`Held-out text at ${run.last.toFixed(3)} bits per byte${beside}.`);
  }
  return [el("h1", {}, run.name, " ", state(run)), el("p", { class: "lead" }, told.join(" "))];
}

function figures() {
  if (MANY) return runTable();
  const run = RUNS[0];
  const shown = [
    ["Parameters", sizes(run), run.growths ? `×${trimmed(run.parameters[1] / run.parameters[0], 3)}` : "static"],
    ["Validation", fixed(run.last, 3), run.best === null ? "bits per byte"
      : run.best < run.last ? `bits per byte; best ${fixed(run.best, 3)}` : "bits per byte, its best"],
    run.ngram ? [`${run.ngram[0]}-gram`, fixed(run.ngram[1], 3), "bits per byte, same text"] : null,
    ["Compute", power(run.flops, 3), "FLOPs, all stages"],
    ["Tokens", quantity(run.tokens), run.step === null ? "" : `${run.step} steps`],
    ["Time", duration(run.seconds), "training, stops left out"],
    run.growths ? ["Largest |Δlogit|", power(run.max_delta_logits), `over ${steps(run)}, float64`] : null,
  ];
  return el("dl", { class: "figures" }, shown.filter(Boolean).map(([name, value, note]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value), el("dd", { class: "under" }, note))));
}

/** A table wider than the page scrolls by itself. */
function wide(label, head, rows) {
  return el("div", { class: "wide", role: "region", "aria-label": label, tabindex: "0" }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))), el("tbody", {}, rows)));
}

function runTable() {
  const head = ["run", "parameters", "tokens", "FLOPs", "time", "last", "best", ""];
  const rows = RUNS.map((run, index) => el("tr", {},
    el("th", { scope: "row" }, swatch(index), run.name),
    [sizes(run), quantity(run.tokens), power(run.flops, 3), duration(run.seconds), fixed(run.last, 3),
      fixed(run.best, 3)].map((text) => el("td", {}, text)), el("td", {}, state(run))));
  const note = "Last and best are validation in bits per byte. Colours are the same in every chart.";
  return el("div", {}, wide("The runs", head, rows), el("p", { class: "note" }, note));
}

function differences() {
  const keys = Object.keys(REPORT.differences);
  if (!MANY || !keys.length) return null;
  const rows = keys.map((key) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, key)),
    REPORT.differences[key].map((value) => el("td", {}, value))));
  const more = REPORT.more_differences ? el("p", { class: "note" }, `and ${REPORT.more_differences} more keys`) : null;
  const head = ["key", ...RUNS.map((run, index) => [swatch(index), run.name])];
  return section("differences", "What differs between the recipes", null, wide("The recipes", head, rows), more);
}

/** [what changed, in a few words] */
function changes(mark) {
  const told = mark.links.map((link) => `${link.operator} (${link.method})${
    mark.links.length > 1 && Number.isFinite(link.delta_logits_float64)
      ? `, Δlogits ${link.delta_logits_float64.toExponential(1)}` : ""}`);
  if (mark.parameters) told.push(`${change(mark.parameters)} parameters`);
  if (mark.context_length) told.push(`context ${mark.context_length.join(" → ")}`);
  if (mark.global_batch_tokens) told.push(`batch ${mark.global_batch_tokens.join(" → ")} tokens`);
  return told.length ? told : ["a new stage of the same model"];
}

function verdict(mark) {
  if (!mark.certificate) return el("span", { class: "badge" }, mark.grows ? "not measured" : "nothing grew");
  const exact = mark.certificate.exact;
  return el("span", { class: `badge ${exact ? "exact" : "moved"}` },
    `${exact ? "exact" : "not exact"} · Δ ${power(mark.certificate.delta_logits_float64)}`);
}

/** The list of growth and context steps; each opens its certificate. */
function markList() {
  const rows = RUNS.flatMap((run, r) => run.marks.map((mark, m) => el("li", {},
    el("button", { type: "button", onclick: () => openCard(r, m) }, numbered(r, m),
      el("span", { class: "what" }, el("strong", {}, MANY ? `${run.name}: ${mark.stage}` : mark.stage),
        el("span", {}, changes(mark).join(" · "))), verdict(mark)))));
  return rows.length ? el("ol", { class: "marks" }, rows) : null;
}

function numbered(r, m) {
  const number = el("span", { class: MANY ? "number of-run" : "number" }, String(m + 1));
  if (MANY) number.style.background = `var(--run-${r % 8})`;
  return number;
}

function markButtons() {
  return el("div", { id: "loss-marks" }, RUNS.flatMap((run, r) => run.marks.map((mark, m) => {
    const name = `${MANY ? `${run.name}, ` : ""}step ${m + 1}, ${mark.stage}: ${changes(mark).join(", ")}`;
    const button = el("button", { type: "button", title: name, "aria-label": `${name}. Open its certificate`,
      "data-run": r, "data-mark": m, onclick: () => openCard(r, m) }, String(m + 1));
    if (MANY) button.style.background = `var(--run-${r % 8})`;
    return button;
  })));
}

function openCard(r, m) {
  const run = RUNS[r];
  const mark = run.marks[m];
  const card = document.getElementById("card");
  const where = [`step ${mark.step}`, `${quantity(mark.tokens)} tokens`, `${power(mark.flops, 3)} FLOPs`];
  card.replaceChildren(
    el("header", {}, el("div", {}, el("p", { class: "over" }, MANY ? run.name : mark.grows ? "Growth step" : "Stage"),
      el("h2", { id: "card-title" }, `${mark.before} → ${mark.stage}`)),
    el("button", { type: "button", class: "quiet", onclick: () => card.close() }, "Close")),
    el("p", { class: "note" }, where.join(" · ")),
    el("ul", { class: "changes" }, changes(mark).map((text) => el("li", {}, text))),
    ...certificate(mark));
  card.showModal();
  card.scrollTop = 0;
}

function certificate(mark) {
  if (!mark.grows) return [el("p", {}, "No parameter changed here, so there is nothing to certify.")];
  const found = mark.certificate;
  if (!found) return [el("p", {}, "This growth was not measured.")];
  const dead = found.dead || [];
  const norms = (found.new_grad_norms || []).map((value) => power(value)).join(", ");
  const rows = [
    ["Δlogits, float64", power(found.delta_logits_float64), "relative: ‖Δlogits‖ / ‖logits‖"],
    ["Largest |Δlogit|, float64", power(found.max_delta_logits_float64), "absolute"],
    [`Δlogits, ${found.training_dtype}`, power(found.delta_logits_training), "relative, in the dtype of the run"],
    ["Loss on the probe", `${fixed(found.loss_before, 4)} → ${fixed(found.loss_after, 4)}`,
      found.loss_after === found.loss_before ? "nats; unchanged" : `nats; moved by ${signed(found.loss_after - found.loss_before, 2)}`],
    ["Gradient of the new entries", norms || DASH, "its norm on three steps: alive if not zero"],
    ["Parameters without a gradient", String(dead.length), dead.length ? dead.join(", ") : "training reaches every one"],
    ["Rows locked to another", String(found.locked_rows ?? DASH), found.locked_rows
      ? "training cannot tell them apart" : "every new row can learn something of its own"],
    ...((found.tied_blocks || []).length ? [["Blocks tied to another", found.tied_blocks.map((pair) => pair.join("–")).join(", "),
      "training cannot tell them apart"]] : []),
  ];
  const said = found.exact ? "The larger model computes what the smaller one did. Measured, not assumed:"
    : "The larger model computes something else than the smaller one, as the method says. Measured:";
  return [
    el("p", { class: "verdict" }, verdict(mark), " ", said),
    el("dl", { class: "rows" }, rows.map(([name, value, note]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note))))),
    el("p", { class: "note" }, "Why: ", found.reason || DASH),
  ];
}

function samples(run) {
  if (!run.samples.length) return el("p", { class: "note" }, "No samples were written.");
  return el("div", { class: "samples" }, run.samples.map((sample) => {
    const begins = sample.text.startsWith(sample.prompt);
    return el("figure", {}, el("figcaption", {}, el("strong", {}, `end of ${sample.name}`),
      ` step ${sample.step}, ${quantity(sample.tokens)} tokens`),
    el("pre", { tabindex: "0" }, begins ? el("b", {}, sample.prompt) : null,
      begins ? sample.text.slice(sample.prompt.length) : sample.text));
  }));
}

function lineage(node, top = true) {
  const label = el("span", { class: node.here ? "run here" : "run" }, node.name,
    node.missing ? el("em", {}, ` (${node.missing})`) : null,
    node.from_step === null ? null : el("em", {}, ` from step ${node.from_step}`),
    node.here && node !== RUNS[view.selected].lineage ? el("em", {}, " this run") : null);
  const stages = node.stages.map((stage) => el("li", {}, el("span", { class: "stage" }, el("strong", {}, stage.name),
    stage.parameters === null ? null : ` ${quantity(stage.parameters)} parameters`,
    el("small", {}, [stage.step === null ? "no steps yet" : `${stage.ended ? "to" : "now at"} step ${stage.step}`,
      stage.tokens === null ? null : `${quantity(stage.tokens)} tokens`,
      stage.context_length === null ? null : `context ${stage.context_length}`,
      stage.bits_per_byte === null ? null : `${fixed(stage.bits_per_byte, 3)} bits per byte`].filter(Boolean).join(" · "))),
  stage.growth ? el("small", { class: "grew" }, `${stage.growth.links.join(", ")} · ${stage.growth.exact ? "exact"
    : stage.growth.exact === false ? "not exact" : "not measured"}${stage.growth.delta_logits === null ? ""
    : `, largest |Δlogit| ${power(stage.growth.delta_logits)}`}`) : null,
  stage.decided.map((sentence) => el("small", { class: "grew" }, sentence))));
  const branches = node.branches.map((branch) => lineage(branch, false));
  const inner = el("ul", {}, stages, branches);
  return top ? el("div", { class: "tree" }, label, inner) : el("li", { class: "branch" }, label, inner);
}

function recipe(run) {
  if (!run.recipe) return el("p", { class: "note" }, "The run has no recipe.yaml.");
  const text = el("pre", { class: "recipe", tabindex: "0", "aria-label": "recipe" }, run.recipe);
  const copy = el("button", { type: "button", class: "quiet copy" }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(run.recipe);
      copy.textContent = "Copied";
    } catch (refused) { // a browser that keeps the clipboard from local files: the text is selected instead
      getSelection().selectAllChildren(text);
      copy.textContent = `Selected: press Ctrl+C (${refused.name})`;
    }
  });
  return el("div", { class: "recipe-box" }, copy, text);
}

/** What belongs to one run at a time. */
function details() {
  const run = RUNS[view.selected];
  return [
    blocksSection(run),
    section("samples", "Samples over time", "What the model writes at the end of each stage; the prompt is bold.",
      samples(run)),
    section("lineage", "Lineage", "The stages and growths behind the weights, and the runs that branched off.",
      lineage(run.lineage)),
    section("recipe", "Recipe", "Every default written out; it trains this run again.", recipe(run)),
  ].filter(Boolean);
}

function footer() {
  const run = RUNS[view.selected];
  const machine = Object.entries(run.environment).filter(([, value]) => value !== null)
    .map(([name, value]) => `${name} ${value}`).join(", ");
  return el("footer", {}, el("p", {}, `Written ${REPORT.written} by growkit ${REPORT.growkit}.`),
    machine ? el("p", {}, machine) : null);
}
