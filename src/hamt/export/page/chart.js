// Bytes that are carried from token to token: the state, which stays, and a cache, which grows.
"use strict";

const LEFT = 64, RIGHT = 560, TOP = 14, BOTTOM = 150;  // of the plot, in the units of its viewBox

/** Bytes in the unit that people read. */
export function inBytes(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes < 1e5 ? 1 : 0)} KB`;
  return `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
}

/** Two lines in an SVG element. Its parts are made once: it is drawn many times a second. */
export class Chart {
  constructor(svg) {
    this.svg = svg;
    line(svg, "axis", LEFT, BOTTOM, RIGHT, BOTTOM);
    line(svg, "axis", LEFT, TOP, LEFT, BOTTOM);
    text(svg, "", LEFT - 8, BOTTOM, "end", "0");
    text(svg, "", LEFT, BOTTOM + 20, "start", "first token");
    this.most = text(svg, "", LEFT - 8, TOP + 8, "end");
    this.last = text(svg, "", RIGHT, BOTTOM + 20, "end");
    this.cache = line(svg, "cache", LEFT, BOTTOM, RIGHT, BOTTOM);
    this.state = line(svg, "state", LEFT, BOTTOM, RIGHT, BOTTOM);
    this.cacheName = text(svg, "cache-name", RIGHT + 10, BOTTOM, "start", "key–value cache");
    this.stateName = text(svg, "state-name", RIGHT + 10, BOTTOM, "start", "state");
  }

  update(tokens, stateBytes, cacheBytes) {
    const most = Math.max(cacheBytes, 1.6 * stateBytes);
    const y = (bytes) => BOTTOM - (BOTTOM - TOP) * bytes / most;
    const state = y(stateBytes), cache = y(cacheBytes);
    this.most.textContent = inBytes(Math.round(most));
    this.last.textContent = `${tokens.toLocaleString("en")} tokens read`;
    this.state.setAttribute("y1", state);
    this.state.setAttribute("y2", state);
    this.cache.setAttribute("y2", cache);
    // Names do not lie on each other while the lines meet.
    const near = Math.abs(state - cache) < 18;
    this.stateName.setAttribute("y", state + 4);
    this.cacheName.setAttribute("y", near ? state + (cache < state ? -14 : 22) : cache + 4);
    this.svg.setAttribute("aria-label", `After ${tokens} tokens the state takes ` +
      `${inBytes(stateBytes)}, as at the beginning; a key–value cache would take ` +
      `${inBytes(cacheBytes)}.`);
  }
}

function add(svg, name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  svg.append(made);
  return made;
}

function line(svg, kind, x1, y1, x2, y2) {
  return add(svg, "line", {class: kind, x1, y1, x2, y2});
}

function text(svg, kind, x, y, anchor, content = "") {
  const made = add(svg, "text", {class: kind, x, y, "text-anchor": anchor});
  made.textContent = content;
  return made;
}
