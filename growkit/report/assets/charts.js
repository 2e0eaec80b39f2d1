"use strict";
// The charts. All share one horizontal axis: choosing it, zooming and the theme act on every one of them.

const COARSE = matchMedia("(pointer: coarse)").matches; // a finger that scrolls the page must not draw a zoom box
const MARGIN = { l: 54, r: 16, t: 34, b: 44 }; // the legend is at the top
const BARE = { ...MARGIN, t: 12 };
const COMPONENTS = { embedding: "run-2", attention: "run-0", mlp: "run-1", norm: "run-5", head: "run-4",
  stream: "run-3" };
const charts = []; // {node, build}
let linking = false;

/** Seconds in the unit their length asks for: [divisor, name]. */
function timeUnit() {
  const longest = Math.max(...RUNS.map((run) => run.seconds || 0));
  return longest > 3 * 3600 ? [3600, "hours"] : longest > 180 ? [60, "minutes"] : [1, "seconds"];
}

function axisTitle() {
  if (view.axis === "seconds") return `training time (${timeUnit()[1]})`;
  return { flops: "FLOPs", tokens: "tokens" }[view.axis];
}

function hoverTitle() {
  return view.axis === "seconds" ? `%{x:.1f} ${timeUnit()[1]}` : `%{x:.3s} ${axisTitle()}`;
}

function along(place) {
  const value = place[view.axis];
  return view.axis === "seconds" && value !== null ? value / timeUnit()[0] : value;
}

/** What every chart shows until it is zoomed, so that the same place is one below the other. */
function wholeRange() {
  const values = RUNS.flatMap((run) => run.places.flatMap((places) => curveX(places))).filter((value) => value !== null);
  const high = values.reduce((a, b) => Math.max(a, b), 0);
  if (!view.logarithmic) return [-0.005 * high, 1.01 * high];
  const low = values.filter((value) => value > 0).reduce((a, b) => Math.min(a, b), Infinity);
  return low < Infinity ? [Math.log10(low / 1.05), Math.log10(1.05 * high)] : undefined;
}

function curveX(places) {
  const divisor = view.axis === "seconds" ? timeUnit()[0] : 1;
  return places[view.axis].map((value) => (value === null ? null : value / divisor));
}

function curve(run, name) {
  const found = run.curves[name];
  if (!found) return null;
  const places = run.places[found.at];
  return { x: curveX(places), y: found.value, customdata: places.step };
}

function line(run, name, label, style, options = {}) {
  const points = curve(run, name);
  if (!points) return [];
  const y = options.scale ? points.y.map((value) => (value === null ? null : value * options.scale)) : points.y;
  const shown = `${options.format || "%{y:.4g}"}${options.unit || ""}`;
  const hover = options.silent ? { hoverinfo: "skip" } : { hovertemplate: `${shown}<extra>${plain(label)}</extra>` };
  return [{ ...points, y, name: plain(label), type: "scatter", mode: "lines", line: { width: 1.3, ...style }, ...hover,
    opacity: options.opacity ?? 1, showlegend: options.legend ?? true, legendgroup: options.group }];
}

/** Plotly reads some markup in labels; names are text. */
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function lossTraces() {
  return RUNS.flatMap((run, index) => {
    const [training, held] = MANY ? [runColor(index), runColor(index)] : [color("training"), color("validation")];
    const group = MANY ? `run ${index}` : undefined;
    const called = (what) => (MANY ? `${run.name}, ${what}` : what);
    const validations = run.validations.filter((record) => record.value !== null && along(record) !== null);
    return [
      ...line(run, "bits_per_byte", called("training"), { color: training, width: 1 },
        { opacity: MANY ? 0.12 : 0.25, silent: true, legend: false, group }),
      ...line(run, "smoothed", called("training"), { color: training, width: MANY ? 1.2 : 1.8 },
        { format: "%{y:.3f}  (step %{customdata})", opacity: MANY ? 0.6 : 1, legend: !MANY, group }),
      {
        x: validations.map(along), y: validations.map((record) => record.value), type: "scatter", mode: "lines+markers",
        name: plain(MANY ? run.name : "validation"), legendgroup: group, customdata: validations.map((record) => record.context_length),
        line: { color: held, width: 1.6 }, marker: { color: held, size: 6 },
        hovertemplate: `%{y:.3f}  (context %{customdata})<extra>${plain(called("validation"))}</extra>`,
      },
    ];
  });
}

/** From just below the best to where the curves come down from the first steps, which say little. */
function lossRange() {
  const values = RUNS.flatMap((run) => [
    ...run.validations.map((record) => record.value), ...(run.curves.smoothed ? run.curves.smoothed.value : []),
  ]).filter((value) => value !== null);
  if (!values.length) return undefined;
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  const beside = ngrams().map(([, score]) => score).filter((score) => score > 0.7 * low && score < low);
  return [0.95 * Math.min(low, ...beside), Math.min(high * 1.03, low * 2.2)];
}

function ngrams() {
  const found = new Map(RUNS.filter((run) => run.ngram).map((run) => [run.ngram.join(), run.ngram]));
  return [...found.values()];
}

function lossChart() {
  const shapes = ngrams().map(([, score]) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: score, y1: score, line: { color: color("soft"), width: 1, dash: "dash" },
  }));
  const annotations = ngrams().map(([order, score]) => ({
    xref: "paper", x: 1, xanchor: "right", y: score, yanchor: "bottom", text: `${order}-gram ${score.toFixed(3)}`,
    showarrow: false, font: { size: 11, color: color("soft") },
  }));
  return { data: lossTraces(), layout: { ...layout("bits per byte", shapes), annotations, yaxis: {
    ...yAxis("bits per byte"), range: lossRange() } } };
}

function yAxis(title, extra = {}) {
  return { title: { text: title, standoff: 8 }, gridcolor: color("line"), zeroline: false, linecolor: "transparent",
    exponentformat: "SI", fixedrange: false, nticks: 6, ...extra };
}

function markLines() {
  return RUNS.flatMap((run, index) => run.marks.filter((mark) => along(mark) !== null).map((mark) => ({
    type: "line", yref: "paper", y0: 0, y1: 1, x0: along(mark), x1: along(mark), layer: "below",
    line: { color: MANY ? runColor(index) : color("accent"), width: 1.2, dash: mark.grows ? "solid" : "dot" },
    opacity: 0.55,
  })));
}

function layout(title, shapes = []) {
  return {
    margin: MARGIN, paper_bgcolor: "transparent", plot_bgcolor: "transparent", hovermode: "x unified",
    font: { family: "inherit", size: 12, color: color("soft") }, dragmode: COARSE ? false : "zoom",
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", font: { size: 12 },
      itemclick: "toggle", itemdoubleclick: "toggleothers" },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink"), size: 12 } },
    shapes: [...shapes, ...markLines()], separators: ".\u2009", yaxis: yAxis(title),
    xaxis: {
      title: { text: axisTitle(), standoff: 6 }, range: view.range || wholeRange(), gridcolor: "transparent", linecolor: color("line"), ticks: "outside",
      tickcolor: color("line"), ticklen: 4, zeroline: false, type: view.logarithmic ? "log" : "linear", nticks: 7,
      exponentformat: view.axis === "flops" ? "power" : "SI", unifiedhovertitle: { text: hoverTitle() },
      showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "solid", spikecolor: color("line"),
    },
  };
}

/** A chart with one line for each run, or with what ``traces`` says. */
function simple(title, name, options = {}) {
  return () => {
    const data = options.traces ? options.traces() : RUNS.flatMap((run, index) =>
      line(run, name, MANY ? run.name : title, { color: MANY ? runColor(index) : color("training") }, options));
    const shown = layout(title);
    shown.yaxis = yAxis(options.unit ? options.unit.trim() : "", { rangemode: options.fromZero ? "tozero" : "normal" });
    shown.showlegend = Boolean(options.traces); // what the colours of the runs mean is said above
    if (!shown.showlegend) shown.margin = BARE;
    return { data, layout: shown };
  };
}

function componentTraces() {
  const run = RUNS[view.selected];
  const parts = Object.keys(COMPONENTS).filter((part) => run.curves[`grad_norm.${part}`]);
  const total = MANY ? [] : line(run, "grad_norm", "total", { color: color("ink"), width: 1.4 });
  return [...total, ...parts.flatMap((part) =>
    line(run, `grad_norm.${part}`, part, { color: color(COMPONENTS[part]), width: 1.1 }))];
}

/** How likely each arm of the bandit was, of the run chosen below. */
function armTraces() {
  const run = RUNS[view.selected];
  const prefix = "arm_probability.";
  return Object.keys(run.curves).filter((name) => name.startsWith(prefix)).flatMap((name, index) =>
    line(run, name, name.slice(prefix.length), { color: runColor(index), width: 1.2 },
      { scale: 100, unit: " %", format: "%{y:.0f}" }));
}

const COURSE = [
  ["Learning rate", "lr", { fromZero: true }],
  ["Gradient norm", "grad_norm", { fromZero: true, single: componentTraces }],
  ["Gradient norm by component, of the run chosen below", "grad_norm", { fromZero: true, traces: componentTraces, onlyMany: true }],
  ["Gradient in new parameters", "new_grad_share", { fromZero: true, scale: 100, unit: " %", format: "%{y:.1f}" }],
  ["Gradient in new blocks", "new_block_grad_share", { fromZero: true, scale: 100, unit: " %", format: "%{y:.2g}" }],
  ["Nearest two blocks, apart by a block's size", "distance", { fromZero: true }],
  ["Mask of new parts", "ramp", { fromZero: true, scale: 100, unit: " %", format: "%{y:.0f}" }],
  ["Context length", "context_length", { fromZero: true, unit: " tokens" }],
  ["Attention window", "window", { fromZero: true, unit: " tokens" }],
  ["How likely the bandit chose", "prediction_gain", { fromZero: true, unit: " %", traces: armTraces }],
  ["Throughput", "tokens_per_second", { fromZero: true, unit: " tokens/s", format: "%{y:.3s}" }],
  ["Utilisation", "utilisation", { fromZero: true, scale: 100, unit: " %", format: "%{y:.1f}" }],
  ["Memory", "memory_bytes", { fromZero: true, scale: 1e-9, unit: " GB", format: "%{y:.3g}" }],
];

/** The small charts this report has data for: [title, what builds it]. */
function courseCharts() {
  return COURSE.filter(([, name, options]) => (MANY || !options.onlyMany) && RUNS.some((run) => run.curves[name]))
    .map(([title, name, options]) => [title, simple(title, name,
      options.single && !MANY ? { ...options, traces: options.single } : options)]);
}

function addChart(node, build) {
  charts.push({ node, build });
}

function drawCharts() {
  const settings = { displayModeBar: false, responsive: true, doubleClick: false, scrollZoom: false };
  for (const chart of charts) {
    const { data, layout: shown } = chart.build();
    Plotly.react(chart.node, data, shown, settings);
    if (!chart.linked) {
      chart.linked = true;
      chart.node.on("plotly_relayout", (event) => link(chart.node, event));
      chart.node.on("plotly_doubleclick", resetZoom);
      chart.node.on("plotly_afterplot", () => { if (chart.node.id === "loss-chart") placeMarks(chart.node); });
    }
  }
  const loss = document.getElementById("loss-chart");
  if (loss) placeMarks(loss);
}

/** Zooming one chart along the axis zooms all. */
function link(from, event) {
  if (linking) return;
  const range = event["xaxis.range"] || (event["xaxis.range[0]"] !== undefined &&
    [event["xaxis.range[0]"], event["xaxis.range[1]"]]);
  if (!range) return;
  linking = true;
  view.range = range; // it outlives a change of theme
  const wanted = { "xaxis.range": range };
  Promise.all(charts.filter((chart) => chart.node !== from).map((chart) => Plotly.relayout(chart.node, wanted)))
    .finally(() => { linking = false; });
}

function resetZoom() {
  linking = true;
  view.range = null;
  Promise.all(charts.map((chart) => Plotly.relayout(chart.node, { "xaxis.range": wholeRange(),
    ...(chart.node.id === "loss-chart" ? { "yaxis.range": lossRange() } : { "yaxis.autorange": true }) })))
    .finally(() => { linking = false; });
}

/** Puts the numbered buttons of the loss chart over their lines; neighbours that would overlap go one row down. */
function placeMarks(chart) {
  if (!chart.layout || !chart.layout.xaxis.range) return;
  const [start, end] = chart.layout.xaxis.range;
  const width = chart.clientWidth - MARGIN.l - MARGIN.r;
  const size = 30;
  const rows = []; // where the last button of each row ends
  const buttons = [...document.querySelectorAll("#loss-marks button")].map((button) => {
    const mark = RUNS[button.dataset.run].marks[button.dataset.mark];
    const value = view.logarithmic ? Math.log10(along(mark)) : along(mark);
    return { button, at: along(mark) === null ? NaN : (value - start) / (end - start) };
  });
  for (const { button, at } of buttons.sort((a, b) => a.at - b.at)) {
    button.hidden = !(at >= 0 && at <= 1);
    if (button.hidden) continue;
    const x = MARGIN.l + at * width;
    let row = rows.findIndex((last) => x - last >= size);
    if (row < 0) row = rows.length;
    rows[row] = x;
    button.style.left = `${x}px`;
    button.style.top = `${MARGIN.t + row * size}px`;
  }
}

/** Unpacks the library that travels in the page. Rejects in a browser that cannot. */
async function loadLibrary() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (char) => char.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(el("script", {}, await new Response(unpacked).text()));
}
