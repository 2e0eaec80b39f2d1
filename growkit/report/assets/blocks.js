"use strict";
// AltUp's blocks: of each layer a heat map of what it reads, mixes and writes. Tables, so that they need no library.

const MOST_NUMBERS = 6; // blocks, with which a number still fits into a cell; it is in its title as well

function heatCell(value, largest, title, numbers) {
  const cell = el("td", { title: `${title}: ${value === null ? DASH : power(value, 4)}` },
    numbers ? fixed(value, 2).replace("-", "−") : "");
  const share = value === null || !largest ? 0 : Math.round(60 * Math.abs(value) / largest);
  cell.style.background = `color-mix(in srgb, var(--${value < 0 ? "run-0" : "run-1"}) ${share}%, transparent)`;
  return cell;
}

function heatMap(layer, largest) {
  const numbers = layer.mix.length <= MOST_NUMBERS;
  const name = `layer ${layer.id}`;
  const head = (text, scope) => el("th", { scope }, text);
  const rows = [
    el("tr", { class: "read" }, head("read", "row"),
      layer.read.map((value, from) => heatCell(value, largest, `${name} reads block ${from}`, numbers)), el("td", {})),
    ...layer.mix.map((row, to) => el("tr", {}, head(to, "row"),
      row.map((value, from) => heatCell(value, largest, `block ${to} from block ${from}`, numbers)),
      heatCell(layer.write[to], largest, `block ${to} from what ${name} changes`, numbers))),
  ];
  const columns = [head("", "col"), ...layer.mix.map((_, from) => head(from, "col")), head("layer", "col")];
  return el("figure", {}, el("figcaption", {}, el("strong", {}, name), ` block ${layer.block}`),
    el("table", { class: "heat" }, el("thead", {}, el("tr", {}, columns)), el("tbody", {}, rows)));
}

/** Of the two blocks that are nearest to each other; ``distances`` are of (0, 1), (0, 2), …, (1, 2), … */
function nearest(distances, blocks) {
  const pairs = [];
  for (let i = 0; i < blocks; i++) for (let j = i + 1; j < blocks; j++) pairs.push([distances[pairs.length], i, j]);
  const [distance, i, j] = pairs.filter((pair) => pair[0] !== null).sort((a, b) => a[0] - b[0])[0] || [null];
  return distance === null ? "" : ` At the end of the stack blocks ${i} and ${j} are nearest to each other: ${
    power(distance, 2)} of a block's size apart.`;
}

function blocksSection(run) {
  if (!run.blocks) return null;
  const { layers, distances, step } = run.blocks;
  const values = layers.flatMap((layer) => [...layer.read, ...layer.mix.flat(), ...layer.write]);
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const note = `Coefficients at step ${step}, of all layers on one scale, orange above zero and blue below. Row: to which ` +
    "block; column: from which. The first row is what a layer reads, the last column how much of what it changes goes to a " +
    `block.${nearest(distances, layers[0].mix.length)}`;
  return section("blocks", "Blocks of a token", note,
    el("div", { class: "heats" }, layers.map((layer) => heatMap(layer, largest))));
}
