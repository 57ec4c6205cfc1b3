// Bytes that are carried from token to token: the state, which stays, and a cache, which grows.
"use strict";

const LEFT = 64, RIGHT = 560, TOP = 14, BOTTOM = 150;  // of the plot, in the units of its viewBox

/** Bytes in the unit that people read. */
export function inBytes(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes < 1e5 ? 1 : 0)} KB`;
  return `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
}

export function draw(svg, tokens, stateBytes, cacheBytes) {
  const most = Math.max(cacheBytes, 1.6 * stateBytes), last = Math.max(tokens, 1);
  const y = (bytes) => BOTTOM - (BOTTOM - TOP) * bytes / most;
  const parts = [
    line("axis", LEFT, BOTTOM, RIGHT, BOTTOM),
    line("axis", LEFT, TOP, LEFT, BOTTOM),
    text("", LEFT - 8, BOTTOM, "0", "end"),
    text("", LEFT - 8, TOP + 8, inBytes(Math.round(most)), "end"),
    text("", LEFT, BOTTOM + 20, "first token", "start"),
    text("", RIGHT, BOTTOM + 20, `${last.toLocaleString("en")} tokens read`, "end"),
  ];
  const state = y(stateBytes), cache = y(cacheBytes);
  if (tokens) parts.push(line("cache", LEFT, BOTTOM, RIGHT, cache));
  parts.push(line("state", LEFT, state, RIGHT, state));
  // Names do not lie on each other while the lines meet.
  const apart = Math.abs(state - cache) < 18 ? (cache < state ? -1 : 1) * 18 : 0;
  parts.push(text("state-name", RIGHT + 10, state + 4, "state", "start"));
  if (tokens) {
    const at = apart ? state + apart : cache;
    parts.push(text("cache-name", RIGHT + 10, at + 4, "key–value cache", "start"));
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `After ${tokens} tokens the state takes ${inBytes(stateBytes)}, ` +
    `as at the beginning; a key–value cache would take ${inBytes(cacheBytes)}.`);
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  return made;
}

function line(kind, x1, y1, x2, y2) {
  return element("line", {class: kind, x1, y1, x2, y2});
}

function text(kind, x, y, content, anchor) {
  const made = element("text", {class: kind, x, y, "text-anchor": anchor});
  made.textContent = content;
  return made;
}
