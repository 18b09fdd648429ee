"use strict";
// What models and prompts say reaches the page by textContent alone, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const PER_PAGE = 50;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function colour(index) {
  return `var(--c${index % 11})`;
}

function square(fill) {
  const made = element("i");
  made.style.background = fill;
  return made;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  if (Number.isInteger(value)) return String(value);
  return value.toFixed(size < 1 ? 3 : size < 100 ? 2 : 1);
}

// --- summary, curves

function summary() {
  const last = data.last;
  const tiles = [
    ["steps", data.steps],
    ["reward of the last step", last.reward_mean],
    ["slope", last.slope],
    ["log-ratio of a response, nats", last.logratio_mean],
    ["KL a token, nats", last.kl_token],
    ["tokens spent", last.spent_tokens],
    ["seconds of the last step", data.last_seconds],
  ].filter(([, value]) => value !== undefined && value !== null);
  for (const [name, value] of tiles) {
    at("summary").append(element("div", { class: "card" }, element("b", {}, short(value)), element("span", {}, name)));
  }
  if (!data.steps) at("summary").append(element("p", {}, "No step is done yet."));
}

const LONGEST_TICK = 8;  // characters of a number without an exponent

function ticks(low, high, count = 4) {
  const rough = (high - low) / count, exponent = Math.floor(Math.log10(rough));
  const factor = [1, 2, 2.5, 5, 10].find((factor) => factor * 10 ** exponent >= rough), step = factor * 10 ** exponent;
  const first = Math.ceil(low / step), length = Math.min(count + 2, Math.floor(high / step + 1e-9) - first + 1);
  const values = Array.from({ length }, (_, number) => (first + number) * step);  // so many, however small a step is beside them
  const last = factor === 2.5 ? exponent - 1 : factor === 10 ? exponent + 1 : exponent;  // of the step's digits, a power of 10
  const largest = Math.floor(Math.log10(Math.max(...values.map(Math.abs)))), digits = (number) => Math.min(100, Math.max(0, number));
  const texts = values.map((value) => value.toFixed(digits(-last)));
  if (texts.every((text) => text.length <= LONGEST_TICK)) return values.map((value, place) => [value, texts[place]]);
  return values.map((value) => [value, value === 0 ? "0" : value.toExponential(digits(largest - last))]);
}

const pen = document.createElement("canvas").getContext("2d");
pen.font = `10px ${getComputedStyle(document.body).fontFamily}`;  // that of the ticks

function axisWidth(low, high) {  // of an axis at the left, as wide as its ticks
  return Math.max(46, 8 + Math.max(...ticks(low, high).map(([, text]) => pen.measureText(text).width)));
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values), size = Math.max(Math.abs(low), Math.abs(high));
  const margin = 0.06 * (high - low > 1e-6 * size ? high - low : size || 1);  // what differs by rounding is level
  return [low - margin, high + margin];
}

const WIDTH = 380, HEIGHT = 170, RIGHT = 8, TOP = 8, BOTTOM = 20;

function frame(svg, x, y, [xLow, xHigh], [yLow, yHigh]) {
  const left = x(xLow);
  for (const [value, text] of ticks(yLow, yHigh)) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 5, y: y(value) + 3, "text-anchor": "end" }, text));
  }
  for (const [value] of ticks(xLow, xHigh, 6).filter(([value]) => Number.isInteger(value))) {
    svg.append(drawn("text", { x: x(value), y: HEIGHT - 5, "text-anchor": "middle" }, String(value)));
  }
  if (yLow < 0 && yHigh > 0) svg.append(drawn("line", { class: "zero", x1: left, x2: WIDTH - RIGHT, y1: y(0), y2: y(0) }));
}

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function keysOf(names) {
  const box = element("div", { class: "keys" });
  const values = names.map((name, index) => {
    const value = element("b");
    box.append(element("span", {}, square(colour(index)), name, value));
    return value;
  });
  return [box, (texts) => values.forEach((value, index) => (value.textContent = texts[index]))];
}

function chart(panel) {
  const names = Object.keys(panel.curves), columns = Object.values(panel.curves), steps = panel.x, [first, last] = data.ends;
  const numbers = columns.flat().filter((value) => value !== null);
  const xs = [first, Math.max(first + 1, last, steps.at(-1))], ys = range(numbers);
  const x = scale(...xs, axisWidth(...ys), WIDTH - RIGHT), y = scale(...ys, HEIGHT - BOTTOM, TOP);
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.title });
  frame(svg, x, y, xs, ys);
  columns.forEach((column, index) => {
    let path = "";
    const few = column.filter((value) => value !== null).length < 25;
    const joined = (place) => (column[place] ?? null) !== null && (column[place - 1] ?? null) !== null &&
      steps[place] - steps[place - 1] <= panel.apart;  // to the point before it: no value and no step is missing between
    column.forEach((value, place) => {
      if (value === null) return;
      path += `${joined(place) ? "L" : "M"}${x(steps[place]).toFixed(1)} ${y(value).toFixed(1)}`;
      if (few || !(joined(place) || joined(place + 1))) svg.append(drawn("circle", { cx: x(steps[place]), cy: y(value), r: 2.2, fill: colour(index) }));
    });
    svg.append(drawn("path", { d: path, stroke: colour(index) }));
  });
  const cursor = drawn("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const [keys, say] = keysOf(names);
  const title = element("h3", {}, panel.title);
  const show = (place) => {
    say(columns.map((column) => short(column[place])));
    title.textContent = `${panel.title}, step ${steps[place]}`;
  };
  const showLast = () => {
    say(columns.map((column) => short(column.findLast((value) => value !== null))));
    title.textContent = panel.title;
  };
  showLast();
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pointed = ((event.clientX - box.left) / box.width) * WIDTH;
    let near = 0;
    steps.forEach((step, place) => { if (Math.abs(x(step) - pointed) < Math.abs(x(steps[near]) - pointed)) near = place; });
    cursor.setAttribute("x1", x(steps[near]));
    cursor.setAttribute("x2", x(steps[near]));
    cursor.setAttribute("visibility", "visible");
    show(near);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    showLast();
  });
  return element("figure", { class: "card" }, title, element("p", { class: "note" }, panel.note), svg, keys);
}

function charts(section, panels) {
  const box = section.querySelector(".charts");
  const left = `One in ${data.every} steps is drawn, with the newest, and all evaluations and steps left out.`;
  if (data.every > 1) box.before(element("p", { class: "note" }, left));
  if (!panels.length) box.replaceWith(element("p", { class: "note" }, "Nothing is measured yet."));
  else box.append(...panels.map(chart));
}

// --- timeline

const LANES = { driver: "the run is at", engines: "engines busy", ranks: "ranks busy" };
const PARTS = ["generate", "policy", "publish", "reference", "eval", "score", "checkpoint", "train", "critic", "drain", "turns", "record"];

function partColour(name) {
  return colour(PARTS.includes(name) ? PARTS.indexOf(name) : 7);
}

function gantt(spans) {
  const rows = [];  // of each lane as many as overlap
  for (const who of Object.keys(LANES)) {
    const own = [];
    for (const [name, worker, start, end] of spans) {
      if (worker !== who) continue;
      const row = own.find((bars) => bars.at(-1).end <= start + 1e-3);
      const bar = { name, start, end };
      if (row) row.push(bar);
      else own.push([bar]);
    }
    if (!own.length) own.push([]);
    own.forEach((bars, index) => rows.push({ label: index ? "" : LANES[who], bars }));
  }
  const width = 1180, left = 104, row = 27, bottom = rows.length * row + 8;
  const low = Math.min(0, ...spans.map((span) => span[2])), high = Math.max(...spans.map((span) => span[3]));
  const x = scale(low, high, left, width - 8);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${bottom + 18}`, role: "img", "aria-label": "timeline of the step" });
  for (const [value, text] of ticks(low, high, 10)) {
    svg.append(drawn("line", { class: value ? "grid" : "zero", x1: x(value), x2: x(value), y1: 2, y2: bottom }));
    svg.append(drawn("text", { x: x(value), y: bottom + 13, "text-anchor": "middle" }, `${text} s`));
  }
  rows.forEach(({ label, bars }, index) => {
    const top = 6 + index * row;
    svg.append(drawn("text", { class: "lane", x: 0, y: top + 15 }, label));
    for (const { name, start, end } of bars) {
      const size = Math.max(1.5, x(end) - x(start));
      const bar = drawn("rect", { x: x(start), y: top, width: size, height: row - 5, rx: 3, fill: partColour(name) });
      bar.append(drawn("title", {}, `${name}: ${short(end - start)} s, from ${short(start)} to ${short(end)}`));
      svg.append(bar);
      if (size > 7 * name.length) svg.append(drawn("text", { class: "inside", x: x(start) + 5, y: top + 15 }, name));
    }
  });
  return svg;
}

function timeline(step) {
  const { spans, seconds } = data.timelines[step];  // of every such step, also of one that no curve draws
  const sums = new Map();  // of the driver's parts and the ranks'
  for (const [name, worker, start, end] of spans) {
    if (worker === "driver" || !spans.some((span) => span[0] === name && span[1] === "driver")) {
      sums.set(name, (sums.get(name) || 0) + end - start);
    }
  }
  const keys = element("div", { class: "keys" });
  for (const [name, sum] of sums) keys.append(element("span", {}, square(partColour(name)), name, element("b", {}, `${short(sum)} s`)));
  at("gantt").replaceChildren(gantt(spans), keys);
  const words = seconds.total !== undefined
    ? [`${short(seconds.total)} s`, `engines idle ${short(seconds.engines_idle)} s`, `ranks idle ${short(seconds.ranks_idle)} s`]
    : [];
  at("timeline-words").textContent = words.join(" · ");
}

function shares() {
  const names = PARTS.filter((name) => name !== "train" && data.seconds.some((seconds) => seconds[name] > 0));
  if (!names.length) return at("shares").remove();
  const width = 1180, height = 170, bottom = height - 20;
  const sums = data.seconds.map((seconds) => names.reduce((sum, name) => sum + (seconds[name] || 0), 0));
  const most = Math.max(...sums) * 1.05, y = scale(0, most, bottom, 6), left = axisWidth(0, most);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "seconds of each step by part" });
  for (const [value, text] of ticks(0, most)) {
    svg.append(drawn("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 5, y: y(value) + 3, "text-anchor": "end" }, text));
  }
  const slot = (width - left) / data.x.length, step = data.every > 1 ? `mean of ${data.every} steps to` : "step";
  data.seconds.forEach((seconds, place) => {
    let sum = 0;
    for (const name of names) {
      const size = seconds[name] || 0;
      const bar = drawn("rect", { x: left + slot * (place + 0.1), width: slot * 0.8, y: y(sum + size),
        height: Math.max(0, y(sum) - y(sum + size)), fill: partColour(name) });
      bar.append(drawn("title", {}, `${step} ${data.x[place]}, ${name}: ${short(size)} s`));
      svg.append(bar);
      sum += size;
    }
    const beside = Math.ceil(data.x.length / 24);
    if (place % beside === 0) {
      svg.append(drawn("text", { x: left + slot * (place + 0.5), y: height - 5, "text-anchor": "middle" }, data.x[place]));
    }
  });
  const keys = element("div", { class: "keys" });
  for (const name of names) keys.append(element("span", {}, square(partColour(name)), name));
  at("shares").append(element("h3", {}, `Seconds of each step, by part${data.every > 1 ? `: means of ${data.every} steps` : ""}`), svg, keys);
}

function timelines() {
  const steps = Object.keys(data.timelines).map(Number).sort((a, b) => b - a);
  const choice = at("timeline-step");
  for (const step of steps) choice.append(element("option", { value: step }, String(step)));
  choice.addEventListener("change", () => timeline(choice.value));
  if (steps.length) timeline(steps[0]);
  else at("gantt").replaceChildren("No step of this run says when its parts began and ended.");
  if (data.steps > steps.length && steps.length) {
    at("timeline-words").after(element("span", { class: "note" }, `the newest ${steps.length} of ${data.steps} steps`));
  }
  shares();
}

// --- rollouts

const { rows, pieces, prompts } = data.rollouts;
for (const row of rows) {
  row.text = row.tokens.map((token) => pieces[token]).join("");
  row.length = row.tokens.length;
  [row.promptText, row.answer] = prompts[row.prompt];
}
const largest = rows.flatMap((row) => row.ratios).map(Math.abs).sort((a, b) => a - b);
const full = [25, 50, 100, 200, 500, 1000].find((size) => size >= (largest[Math.floor(largest.length * 0.98)] || 0)) || 1000;

const NUMBERS = { step: "step", reward: "reward", length: "length" };
const ORDERS = {
  step: (a, b) => b.step - a.step,
  reward: (a, b) => (b.reward ?? -9) - (a.reward ?? -9),
  worst: (a, b) => (a.reward ?? 9) - (b.reward ?? 9),
  length: (a, b) => b.length - a.length,
  drift: (a, b) => Math.abs(b.logratio ?? Infinity) - Math.abs(a.logratio ?? Infinity),
};
const form = at("filter");
let page = 0;

function chosen() {
  const tests = [];
  for (const [name, key] of Object.entries(NUMBERS)) {
    const low = form[`${name}_min`].value, high = form[`${name}_max`].value;
    if (low !== "") tests.push((row) => row[key] !== null && row[key] >= Number(low));
    if (high !== "") tests.push((row) => row[key] !== null && row[key] <= Number(high));
  }
  for (const [name, key] of [["prompt", "promptText"], ["response", "text"]]) {
    const wanted = form[name].value.toLowerCase();
    if (wanted) tests.push((row) => row[key].toLowerCase().includes(wanted));
  }
  return rows.filter((row) => tests.every((test) => test(row))).sort(ORDERS[form.order.value]);
}

function shade(hundredths) {
  const strength = Math.min(1, Math.abs(hundredths) / full);
  return `rgba(var(--${hundredths > 0 ? "above" : "below"}), ${(0.75 * strength).toFixed(2)})`;
}

function response(row) {
  const box = element("pre", { class: "response" });
  row.tokens.forEach((token, place) => {
    const text = pieces[token], ratio = row.ratios[place];
    const ends = place === row.tokens.length - 1 && !text;
    const made = element("span", { class: ends ? "token end" : "token" }, ends ? " ■ end " : text);
    if (ratio === null) made.title = `not finite, token ${place}`;
    else {
      made.style.background = shade(ratio);
      made.title = `${ratio > 0 ? "+" : ""}${(ratio / 100).toFixed(2)} nats, token ${place}`;
    }
    box.append(made);
  });
  return box;
}

function inside(row) {
  const words = [`sample ${row.sample}`, `drawn by version ${row.version}`];
  if (row.truncated) words.push("cut by the token limit");
  return element("div", { class: "inside-row" },
    element("h4", {}, "prompt"), element("pre", { class: "prompt" }, row.promptText),
    element("h4", {}, "answer"), element("pre", {}, row.answer || "–"),
    element("h4", {}, `response · ${words.join(" · ")}`), response(row));
}

function entry(row) {
  const reward = element("span", { class: "reward" }, row.reward === null ? "failed" : short(row.reward));
  reward.style.background = row.reward > 0 ? `rgba(var(--below), ${0.35 * Math.min(1, row.reward)})` : "transparent";
  const line = element("summary", {}, element("span", {}, String(row.step)), element("span", {}, reward),
    element("span", {}, `${row.length}${row.truncated ? " cut" : ""}`), element("span", {}, short(row.logratio)),
    element("span", { class: "cut" }, row.promptText.slice(0, 300)), element("span", { class: "cut" }, row.text.slice(0, 300)));
  const made = element("details", {}, line);
  made.addEventListener("toggle", () => { if (made.open && made.children.length === 1) made.append(inside(row)); });
  return made;
}

function list(openFirst = false) {
  const matching = chosen(), pages = Math.max(1, Math.ceil(matching.length / PER_PAGE));
  page = Math.min(page, pages - 1);
  const entries = matching.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(entry);
  at("list").replaceChildren(...entries);
  const left = data.all_rollouts - rows.length;
  at("count").textContent = rows.length
    ? `${matching.length} of ${rows.length} rollouts match` +
      (left ? `; the page has one in ${data.rollouts.every} of the run's ${data.all_rollouts}, ${left} are left out` : "")
    : "This run keeps no rollouts (rollout.keep), or has no step yet.";
  at("page").textContent = `page ${page + 1} of ${pages}`;
  at("back").disabled = page === 0;
  at("next").disabled = page === pages - 1;
  at("pages").hidden = pages === 1;
  if (openFirst && entries.length) {
    entries[0].append(inside(matching[0]));
    entries[0].open = true;
  }
}

function legend() {
  const box = at("legend");
  if (!rows.length) return;
  const cells = element("span");
  cells.append(`−${full / 100}`);
  for (const share of [-1, -0.5, -0.2, 0, 0.2, 0.5, 1]) cells.append(square(shade(share * full)));
  cells.append(`+${full / 100}`);
  box.append("colour of a token: ln pi - ln pi_ref, nats", cells, "likelier under the policy: orange; under the reference: blue");
}

// A link holds what is filtered: #step=3&reward>=1&length<=200&prompt=eggs&response=12&order=worst&open

function decoded(word) {
  try {
    return decodeURIComponent(word);
  } catch {
    return word;  // a percent sign that somebody typed
  }
}

function readHash() {
  const words = location.hash.slice(1);  // without any of these it is a part of the page
  if (!/[=]|open/.test(words)) return false;
  for (const field of form.querySelectorAll("input")) field.value = "";
  form.order.value = "step";
  let opens = false;
  for (const word of words.split("&")) {
    const [, name, sign, wanted] = /^(\w+)(>=|<=|=)?(.*)$/s.exec(decoded(word)) || [];
    if (name === "open") opens = true;
    else if (name === "theme") setTheme(wanted);
    else if (name === "timeline" && Object.hasOwn(data.timelines, wanted)) { at("timeline-step").value = wanted; timeline(wanted); }
    else if (Object.hasOwn(NUMBERS, name)) {
      if (sign !== "<=") form[`${name}_min`].value = wanted;
      if (sign !== ">=") form[`${name}_max`].value = wanted;
    } else if (["prompt", "response", "order"].includes(name)) form[name].value = wanted;
  }
  page = 0;
  list(opens);
  return true;
}

function writeHash() {
  const words = [];
  for (const name of Object.keys(NUMBERS)) {
    const low = form[`${name}_min`].value, high = form[`${name}_max`].value;
    if (low !== "" && low === high) words.push(`${name}=${low}`);
    else {
      if (low !== "") words.push(`${name}>=${low}`);
      if (high !== "") words.push(`${name}<=${high}`);
    }
  }
  for (const name of ["prompt", "response"]) if (form[name].value) words.push(`${name}=${encodeURIComponent(form[name].value)}`);
  if (form.order.value !== "step") words.push(`order=${form.order.value}`);
  history.replaceState(null, "", `#${words.join("&")}`);
}

function filtered() {
  page = 0;
  writeHash();
  list();
}

function turn(by) {
  page += by;
  list();
  at("rollouts").scrollIntoView();
}

// --- light and dark

const THEMES = ["system", "light", "dark"];

function setTheme(name) {
  const theme = THEMES.includes(name) ? name : "system";
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `theme: ${theme}`;
  at("theme").dataset.name = theme;
}

at("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(at("theme").dataset.name || "system") + 1) % 3]);
});
at("run").textContent = data.run;
summary();
charts(at("health"), data.health);
charts(at("curves"), data.curves);
timelines();
const head = element("div", { id: "head" });
for (const name of ["step", "reward", "tokens", "log-ratio, nats", "prompt", "response"]) head.append(element("span", {}, name));
at("list").before(head);
legend();
form.addEventListener("input", filtered);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filtered));
at("back").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
addEventListener("hashchange", readHash);
if (!readHash()) list();
