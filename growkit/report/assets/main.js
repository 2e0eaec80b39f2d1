"use strict";
// Puts the page together. The charts come last: what can be read without them is there first.

const main = document.getElementById("main");
const AXIS_CHOICES = [["flops", "FLOPs"], ["tokens", "Tokens"], ["seconds", "Time"]];

function known(axis) {
  return RUNS.some((run) => run[axis] !== null);
}

function drawn() {
  return RUNS.some((run) => run.places.length);
}

function lossSection() {
  const chart = el("div", { id: "loss-chart", class: "chart tall", role: "img",
    "aria-label": "Loss and validation in bits per byte; the figures and the list of steps say the same in words" });
  addChart(chart, lossChart);
  const axes = AXIS_CHOICES.map(([axis, text]) => [axis, text, known(axis) ? null : "the log does not say"]);
  const tools = el("div", { class: "tools" },
    choice("horizontal axis", axes, view.axis, (axis) => {
      Object.assign(view, { axis, range: null });
      drawCharts();
    }),
    choice("scale of the axis", [[false, "linear"], [true, "log"]], false, (logarithmic) => {
      Object.assign(view, { logarithmic, range: null });
      drawCharts();
    }),
    COARSE ? choice("touch", [[false, "scroll"], ["zoom", "zoom"]], false, (mode) => {
      for (const { node } of charts) Plotly.relayout(node, { dragmode: mode });
    }) : null,
    el("button", { type: "button", class: "quiet", onclick: resetZoom }, "Reset zoom"),
    el("button", { type: "button", class: "quiet", onclick: () => Plotly.downloadImage(chart, {
      format: "png", width: 1200, height: 640, scale: 2, filename: "growkit-loss" }) }, "Save picture"));
  const zoom = COARSE ? "" : " Drag to zoom, double-click to go back.";
  return section("loss", "Loss", `Bits per byte: dots are validation, the line is training, smoothed.${
    RUNS.some((run) => run.marks.length) ? " A number marks where the model or its stage changed: it opens what was measured."
      : ""}${zoom}`, tools, el("div", { class: "frame" }, chart, markButtons()), markList());
}

function courseSection() {
  const boxes = courseCharts().map(([title, build]) => {
    const chart = el("div", { class: "chart", role: "img", "aria-label": title });
    addChart(chart, build);
    return el("figure", {}, el("figcaption", {}, title), chart);
  });
  return section("course", "Course of training", null, el("div", { class: "grid" }, boxes));
}

function selector(redraw) {
  if (!MANY) return null;
  return section("details", "Run by run", "Blocks, samples, lineage, recipe and the gradient's components are of one run.",
    choice("run", RUNS.map((run, index) => [index, run.name, null]), 0, (index) => {
      view.selected = index;
      redraw();
      drawCharts();
    }));
}

function build() {
  const rest = el("div", {});
  const redraw = () => rest.replaceChildren(...details(), footer());
  main.replaceChildren(el("div", { class: "head" }, ...headline(), figures()));
  if (drawn()) main.append(lossSection(), courseSection());
  else main.append(el("p", { class: "nothing" }, "There is nothing to draw yet: no step has been logged."));
  const rows = differences();
  if (rows) main.append(rows);
  const tabs = selector(redraw);
  if (tabs) main.append(tabs);
  main.append(rest);
  redraw();
}

async function start() {
  build();
  document.getElementById("card").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) event.currentTarget.close(); // beside the card
  });
  if (drawn()) {
    try {
      await loadLibrary();
    } catch (error) {
      main.prepend(el("p", { class: "nothing", role: "alert" }, "This browser cannot unpack the charts: it takes " +
        `Chrome 123, Firefox 120, Safari 17.5 or newer (${error.message}). The rest of the report is below.`));
      startTheme(() => {});
      return;
    }
  }
  startTheme(drawCharts);
  document.documentElement.dataset.ready = "";
}

start();
