"use strict";
// What the rest builds with: elements, the data, the theme. Text from a run only ever becomes text.

const REPORT = JSON.parse(document.getElementById("data").textContent);
const RUNS = REPORT.runs;
const MANY = RUNS.length > 1;
/** ``axis``: what the charts run over; ``range``: the part of it that is zoomed to, or null; ``selected``: whose samples,
    recipe, lineage and gradient components are shown. */
const view = { axis: "flops", logarithmic: false, range: null, selected: 0 };

/** An element; ``attributes`` may hold class, on* listeners, and attributes; children are nodes or text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A colour of the style sheet as it is in the present theme; the charts cannot read ``light-dark``. */
function color(name) {
  const probe = document.getElementById("theme");
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.style.color = "";
  return found;
}

function runColor(index) {
  return color(`run-${index % 8}`);
}

function swatch(index) {
  const dot = el("span", { class: "swatch", "aria-hidden": "true" });
  dot.style.background = `var(--run-${index % 8})`;
  return dot;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** The switch names the theme it leads to; until it is used, the page follows the system. */
function startTheme(changed) {
  const button = document.getElementById("theme");
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} theme`);
    changed();
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

/** Buttons of which one is pressed. ``choices``: [value, text, why it cannot be chosen or null]. */
function choice(label, choices, current, chosen) {
  const buttons = choices.map(([value, text, why]) => {
    const button = el("button", { type: "button", "aria-pressed": String(value === current), title: why }, text);
    button.disabled = Boolean(why);
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      chosen(value);
    });
    return button;
  });
  return el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

function section(id, title, note, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  return el("section", { id, "aria-labelledby": `${id}-title` }, heading, note ? el("p", { class: "note" }, note) : null,
    ...children);
}
