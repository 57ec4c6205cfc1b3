// The page: what is typed is read, the model writes on, and each token tells where it comes from.
"use strict";
import {Chart, inBytes} from "./chart.js";
import {Model} from "./model.js";
import {choose} from "./sampling.js";
import {Decoder} from "./tokenizer.js";

removeEventListener("error", cannotRun);  // this and tell are those of notice.js
const SHOWN = 8;  // sources that are listed
const SLICE = 80, FOLLOWED = 300;  // milliseconds until the browser may paint, and sources are told
const LEAVING = 64;  // tokens that leave the list together: each time all of the text is laid out
const OLDER = 2000;  // characters of earlier text that stay on the page
const find = (id) => document.getElementById(id);
const chart = new Chart(find("chart")), text = find("text"), status = find("status"), writeButton = find("write");
const older = document.createElement("span");
older.className = "older";

let model, decoder, logits = null, running = false, busy = false, chosen = null;
let tokens = [];  // that can be chosen: {index, piece, element}
let unread = [];  // tokens that were given, and not read when the user paused
let loadedBytes = 0, told = 0;

// ------------------------------------------------------------------ loading

async function start() {
  try {
    model = await Model.load((bytes) => {
      loadedBytes += bytes;
      // Other files come when one has failed.
      if (find("notice").hidden) status.textContent = `Loading: ${inBytes(loadedBytes)} so far …`;
    });
  } catch (error) {
    tell(`The model cannot be loaded: ${error.message}`);
    throw error;
  }
  decoder = new Decoder(model.tokenizer);
  find("progress").hidden = true;
  text.hidden = false;
  find("loaded").textContent = inBytes(loadedBytes);
  find("state-size").textContent = `${model.stateBytes.toLocaleString("en")} bytes`;
  addLayers();
  find("kept").textContent =
    `To tell where tokens come from, this page also keeps what the memories did with the last ` +
    `${model.step.page.window} tokens: ${inBytes(model.step.page.window_bytes)}, whatever was ` +
    `read. The cache is that of ordinary attention with keys and values in float32.`;
  anew();
  status.textContent = "Ready.";
}

function addLayers() {
  const {layers, all_layers: count} = model.step.page;
  const names = ["all", ...layers.map(({layer}) => layer + 1)];
  find("layers").replaceChildren(...names.map((name, index) => {
    const label = document.createElement("label"), input = document.createElement("input");
    input.setAttribute("aria-label", index ? `layer ${name}` : "all layers");
    Object.assign(input, {type: "radio", name: "layer", value: index - 1, checked: !index});
    input.addEventListener("change", showSources);
    label.append(input, String(name));
    return label;
  }));
  if (layers.length < count) {
    find("not-shown").textContent = `${count - layers.length} of the ${count} layers are no ` +
      "memories; what those read is not told here.";
  }
}

// ------------------------------------------------------------------ reading and writing

function anew() {
  running = false;
  model.reset();
  decoder.reset();
  tokens = [];
  unread = [];
  logits = chosen = null;
  older.textContent = "";
  text.replaceChildren(older);
  find("written").textContent = "";
  find("speed").textContent = "–";
  writeButton.disabled = false;
  showButtons();
  showFigures();
  showSources();
}

async function read(id, kind) {
  logits = await model.read(id);
  const element = document.createElement("span"), piece = decoder.push(id);
  const index = model.length - 1;
  element.textContent = piece;
  element.id = `token-${index}`;
  element.className = kind;
  if (piece.includes("\n") && !piece.trim()) element.classList.add("break");
  else if (/^[\p{Cc}\p{Cf}]*$/u.test(piece)) element.classList.add("part");  // nothing to see
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", "false");
  tokens.push({index, piece, element});
  text.append(element);
  if (tokens.length > model.step.page.window) forgetOldest();
}

/** The record lets go of them soon: they stay as text. */
function forgetOldest() {
  const gone = tokens.splice(0, Math.min(LEAVING, tokens.length / 2));
  let all = older.textContent;
  for (const {index, piece, element} of gone) {
    if (chosen === index) chosen = null;
    element.remove();
    all += piece;
  }
  older.textContent = all.length > OLDER ? "… " + all.slice(-OLDER / 2) : all;
}

async function write() {
  running = true;
  showButtons();
  status.textContent = "Reading.";
  const goesOn = model.length > 0, {page} = model.step, count = find("count");
  const given = unread.concat(model.tokenizer.encode(find("prompt").value, goesOn));
  const wanted = Math.max(1, Math.floor(count.value || count.defaultValue));
  if (!goesOn && !given.length) given.push(page.start_token);
  find("prompt").value = "";
  count.value = wanted;  // where it was none, it is seen what is taken
  let done = 0, ended = false, since = performance.now(), slice = since, newText = "";
  for (const id of given) {
    if (!running) break;
    await read(id, "given");
    done += 1;
    if (performance.now() - slice > SLICE) {
      slice = await breathe(`Reading: ${done} of ${given.length} tokens.`);
    }
  }
  unread = given.slice(done);
  done = 0;
  since = slice = performance.now();
  while (running && done < wanted) {
    const id = choose(logits, Number(find("temperature").value));
    if (page.end_tokens.includes(id)) {
      ended = true;
      break;
    }
    await read(id, "written");
    newText += tokens.at(-1).piece;
    done += 1;
    if (performance.now() - slice > SLICE) {
      find("speed").textContent = Math.round(1000 * done / (performance.now() - since));
      slice = await breathe("Writing.");
    }
  }
  if (done) find("speed").textContent = Math.round(1000 * done / (performance.now() - since));
  running = false;
  show();
  showButtons();
  find("written").textContent = newText;
  status.textContent = ended
    ? "The model ended its text here. Type more for it to read, or start anew."
    : unread.length
      ? `Paused: ${unread.length} tokens are still to be read. Go on, or start anew.`
      : "Paused. Go on, type more for it to read, or start anew.";
}

/** Let the browser paint and hear clicks. */
async function breathe(message) {
  status.textContent = message;
  show();
  await new Promise((resolve) => setTimeout(resolve));
  return performance.now();
}

// ------------------------------------------------------------------ showing

function show() {
  const below = text.scrollHeight - text.scrollTop - text.clientHeight;
  showFigures();
  if (chosen === null && (!running || performance.now() - told > FOLLOWED)) showSources();
  if (running || below < 80) text.scrollTop = text.scrollHeight;
}

function showButtons() {
  writeButton.textContent = running ? "Pause" : model.length ? "Go on" : "Write";
  find("anew").disabled = running || !model.length;
  find("asked").setAttribute("aria-live", running ? "off" : "polite");  // it changes all the time
}

function showFigures() {
  find("tokens").textContent = model.length.toLocaleString("en");
  find("state").textContent = inBytes(model.stateBytes);
  find("cache").textContent = inBytes(model.cacheBytes);
  chart.update(model.length, model.stateBytes, model.cacheBytes);
}

function showTemperature() {
  find("temperature-value").textContent = Number(find("temperature").value).toFixed(1);
}

/** Where the chosen token comes from; if none is, the last one. */
function showSources() {
  told = performance.now();
  text.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  find("before").textContent = "";
  text.removeAttribute("aria-activedescendant");
  const shown = tokens.find(({index}) => index === (chosen ?? model.length - 1));
  if (!shown) {
    find("asked").textContent = "No token yet.";
    find("sources").replaceChildren();
    return;
  }
  shown.element.setAttribute("aria-selected", "true");
  if (chosen !== null) text.setAttribute("aria-activedescendant", shown.element.id);
  const query = shown.index - 1, begin = tokens[0].index;
  if (query < begin) {
    tokens.forEach(({element}) => tint(element, 0, 1));
    find("sources").replaceChildren();
    find("asked").replaceChildren(quoted(shown.piece), begin > 0
      ? " is the first token that is known here: what it comes from is forgotten."
      : " is the first token: nothing was read before it.");
    return;
  }
  const layer = Number(document.querySelector("#layers :checked").value);
  const {shares, before} = layer < 0
    ? model.record.meanShares(query, begin) : model.record.shares(layer, query, begin);
  const wrote = shown.element.classList.contains("written");
  find("asked").replaceChildren(
    quoted(shown.piece), wrote
      ? " was written from what these tokens had left in the memories:"
      : " was given. Before it, the memories gave back what these tokens had left:");
  const largest = shares.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
  tokens.forEach(({element}, place) => tint(element, shares[place] ?? 0, largest));
  const order = [...shares.keys()].sort((a, b) => Math.abs(shares[b]) - Math.abs(shares[a]));
  find("sources").replaceChildren(...order.slice(0, SHOWN).map((place) =>
    source(tokens[place].piece, shown.index - begin - place, shares[place], largest)));
  if (begin > 0) {
    find("before").textContent = `What came before the ${tokens.length} tokens that can be ` +
      `chosen: ${percent(before)}`;
  }
}

/** Colour a token by its share; most have none, and are left alone. */
function tint(element, share, largest) {
  const depth = Math.round(20 * Math.sqrt(Math.abs(share) / largest)) / 20;
  if (element.depth !== depth) element.style.setProperty("--share", element.depth = depth);
  element.classList.toggle("against", share < 0 && depth > 0);
}

function source(piece, back, share, largest) {
  const item = document.createElement("li"), where = document.createElement("span");
  const value = document.createElement("span");
  where.className = "back";
  where.textContent = back === 1 ? "the token before" : `${back} tokens back`;
  value.className = "share";
  value.textContent = percent(share);
  item.classList.toggle("against", share < 0);
  item.style.setProperty("--share", Math.abs(share) / largest);
  item.append(quoted(piece), where, value);
  return item;
}

function quoted(piece) {
  const element = document.createElement("q");
  element.textContent = piece ? piece.replaceAll("\n", "↵") : "◌";
  return element;
}

function percent(share) {
  return `${share < 0 ? "−" : ""}${Math.abs(100 * share).toFixed(1)} %`;
}

// ------------------------------------------------------------------ what the user does

function select(index) {
  chosen = index;
  showSources();
  find(`token-${index}`)?.scrollIntoView({block: "nearest"});
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running = false;
  else if (!busy) {  // it may still be on its way to the end
    busy = true;
    write().catch((error) => {
      running = false;
      showButtons();
      tell(`The model cannot go on: ${error.message}`);
      throw error;
    }).finally(() => { busy = false; });
  }
});
find("anew").addEventListener("click", () => {
  anew();
  status.textContent = "Ready.";
  find("prompt").focus();
});
find("temperature").addEventListener("input", showTemperature);
text.addEventListener("click", (event) => {
  const token = tokens.find(({element}) => element === event.target);
  if (token) select(token.index);
});
text.addEventListener("keydown", (event) => {
  if (!tokens.length) return;
  const first = tokens[0].index, last = tokens.at(-1).index, now = chosen ?? last;
  const moves = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: first, End: last, Escape: null};
  if (!(event.key in moves)) return;
  event.preventDefault();
  if (event.key === "Escape") {
    chosen = null;
    showSources();
  } else if (chosen === null) select(event.key === "Home" ? first : last);
  else select(Math.min(last, Math.max(first, moves[event.key])));
});

addEventListener("pageshow", showTemperature);  // who comes back finds filled in what was chosen
start();
