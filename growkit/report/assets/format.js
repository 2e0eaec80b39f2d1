"use strict";
// Numbers as people read them. Every function takes a number or null; null is a dash.

const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const SUFFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const DASH = "–";

/** 1234567 → 1.23M */
function quantity(value) {
  if (value === null || value === undefined) return DASH;
  const size = Math.abs(value);
  for (const [limit, suffix] of SUFFIXES) {
    if (size >= limit) return trimmed(value / limit, 3) + suffix;
  }
  return trimmed(value, 3);
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

/** 2.1e-16 → 2.1 × 10⁻¹⁶ */
function power(value, digits = 2) {
  if (value === null || value === undefined) return DASH;
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const places = Number(exponent);
  if (places >= -3 && places < 4) return trimmed(value, digits + 1);
  const raised = [...String(Math.abs(places))].map((digit) => SUPERSCRIPT[digit]).join("");
  return `${mantissa} × 10${places < 0 ? "⁻" : ""}${raised}`;
}

function fixed(value, digits) {
  return value === null || value === undefined ? DASH : value.toFixed(digits);
}

function signed(value, digits) {
  return value === null || value === undefined ? DASH : `${value < 0 ? "−" : "+"}${power(Math.abs(value), digits)}`;
}

/** 3725 → 1 h 2 min */
function duration(seconds) {
  if (seconds === null || seconds === undefined) return DASH;
  if (seconds < 60) return `${trimmed(seconds, 3)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function change(pair) {
  return `${quantity(pair[0])} → ${quantity(pair[1])}`;
}
