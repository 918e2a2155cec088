// The cache page: counts come as server-sent events, conversations every few seconds while the page is seen.
import { Refused, ask, askForKey, element } from "./key.js";

const KINDS = [
  ["kv", "KV pages"],
  ["checkpoint", "states"],
  ["prompt_end", "prompt ends"],
  ["message", "messages"],
  ["layer_inputs", "layer inputs"],
  ["working", "running requests"],
  ["free", "free"],
];
const MOST_SAMPLES = 600;
const OUTLINE_MS = 5000;
const WIDTH = 640;
const HEIGHT = 150;
const samples = [];
const $ = (name) => document.getElementById(name);
const opened = new Set();

const count = (value) => Math.round(value).toLocaleString("en");
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "none yet");

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

function flops(value) {
  const units = ["", "k", "M", "G", "T", "P", "E"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}FLOPs`;
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function rows(table, lines) {
  const body = $(table).tBodies[0];
  body.replaceChildren(
    ...lines.map(([head, ...cells]) =>
      element("tr", {}, element("th", { scope: "row" }, head), ...cells.map((cell) => element("td", { class: "number" }, cell))),
    ),
  );
  if (!lines.length) body.append(element("tr", {}, element("td", { class: "soft" }, "nothing yet")));
}

const x = (index) => (samples.length < 2 ? 0 : (WIDTH * index) / (samples.length - 1));

function drawBudget() {
  const budget = samples.at(-1).budget;
  const base = samples.map(() => 0);
  const areas = KINDS.map(([kind, title], color) => {
    const lower = samples.map((_, index) => base[index]);
    samples.forEach((sample, index) => (base[index] += sample.bytes[kind]));
    const point = (value, index) => `${x(index).toFixed(1)},${(HEIGHT * (1 - value / budget)).toFixed(1)}`;
    const points = [...base.map(point), ...lower.map(point).reverse()];
    return shape("polygon", { points: points.join(" "), fill: `var(--c${color})` }, shape("title", {}, title));
  });
  $("budget").replaceChildren(...areas);
  const now = samples.at(-1).bytes;
  $("budget").setAttribute("aria-label", KINDS.map(([kind, title]) => `${title} ${bytes(now[kind])}`).join(", "));
  $("legend").replaceChildren(
    ...KINDS.map(([kind, title], color) => {
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `var(--c${color})`;
      return element("li", {}, swatch, `${title} ${bytes(now[kind])}`);
    }),
  );
}

const hitsOf = (sample) => sample.tokens.hit / (sample.tokens.hit + sample.tokens.kv_only + sample.tokens.miss);

function drawHits() {
  const points = samples
    .map((sample, index) => [x(index), hitsOf(sample)])
    .filter(([, share]) => Number.isFinite(share))
    .map(([place, share]) => `${place.toFixed(1)},${(HEIGHT * (1 - share)).toFixed(1)}`);
  const line = { points: points.join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 2 };
  const grid = [0, 0.5, 1].map((share) =>
    shape("text", { x: 2, y: Math.min(HEIGHT - 2, Math.max(10, HEIGHT * (1 - share) + 4)) }, `${100 * share} %`),
  );
  $("hits").replaceChildren(...grid, shape("polyline", line));
  $("hits").setAttribute("aria-label", `cached share of all prompt tokens: ${percent(hitsOf(samples.at(-1)))}`);
}

function show(sample) {
  samples.push(sample);
  if (samples.length === 1) samples.push(sample); // a picture from the first one on
  if (samples.length > MOST_SAMPLES) samples.shift();
  $("share").textContent = percent(hitsOf(sample));
  $("saved").textContent = flops(sample.flops_saved);
  $("used").textContent = percent(1 - sample.bytes.free / sample.budget);
  $("running").textContent = `${sample.running} + ${sample.waiting}`;
  $("paused").textContent = count(sample.paused);
  drawBudget();
  drawHits();
  const reasons = Object.entries(sample.missed_tokens).sort((a, b) => b[1] - a[1]);
  rows("misses", reasons.map(([reason, tokens]) => [reason.replaceAll("_", " "), count(sample.misses[reason] ?? 0), count(tokens)]));
  const kinds = [...new Set([...Object.keys(sample.admissions), ...Object.keys(sample.evictions), ...Object.keys(sample.declines)])];
  const of = (counts, kind) => count(counts[kind] ?? 0);
  rows(
    "evictions",
    kinds.sort().map((kind) => [kind.replaceAll("_", " "), of(sample.admissions, kind), of(sample.declines, kind), of(sample.evictions, kind)]),
  );
  $("tiers").textContent = sample.host.loads || sample.host.stores || sample.host.bytes
    ? `Second tier: ${bytes(sample.host.bytes)}, ${count(sample.host.stores)} stored, ${count(sample.host.loads)} loaded.`
    : "No second tier is in use.";
  $("state").textContent = `live, ${new Date(sample.time * 1000).toLocaleTimeString()}`;
}

// A prefix that two conversations share is a state with the same name in both: that makes the tree.
function forest(conversations) {
  const roots = new Map();
  for (const conversation of conversations) {
    let level = roots;
    const shared = conversation.states.filter((state) => state.name !== conversation.name);
    for (const state of [...shared, conversation]) {
      if (!level.has(state.name)) level.set(state.name, { state, below: new Map() });
      const node = level.get(state.name);
      if (state === conversation) node.conversation = conversation;
      level = node.below;
    }
  }
  return roots;
}

function branches(level, before = 0) {
  const list = element("ul");
  for (const { state, conversation, below } of level.values()) {
    const score = state.score === null ? "may not go now" : `score ${state.score.toPrecision(3)}`;
    const words = `${count(state.tokens)} tokens (${count(state.tokens - before)} more), ${state.kind.replaceAll("_", " ")}, `;
    const facts = `${words}${bytes(state.bytes)}, ${count(state.hits)} hits, used ${ago(state.age_s)}, ${score}`;
    const item = element("li");
    if (below.size || conversation) {
      const details = element("details", {}, element("summary", {}, facts));
      details.open = opened.has(state.name) || below.size > 0;
      details.addEventListener("toggle", () => (details.open ? opened.add(state.name) : opened.delete(state.name)));
      if (conversation) details.append(endOf(conversation, details));
      if (below.size) details.append(branches(below, state.tokens));
      item.append(details);
    } else {
      item.append(facts);
    }
    list.append(item);
  }
  return list;
}

function endOf(conversation, details) {
  const place = element("div", {}, element("span", { class: "soft" }, `${conversation.models.join(", ")}, ${conversation.name}`));
  const load = async () => {
    if (!$("texts").checked || !details.open || place.querySelector("pre")) return;
    const whole = await (await ask(`/cache/conversations/${conversation.name}`)).json().catch(() => null);
    if (whole) place.append(element("pre", {}, whole.text));
  };
  details.addEventListener("toggle", load);
  load();
  return place;
}

async function outline() {
  if (document.hidden) return;
  try {
    const found = await (await ask("/cache/outline")).json();
    const focused = document.activeElement?.closest("#tree") !== null && document.activeElement?.closest("#tree") !== undefined;
    if (focused) return; // nothing moves under the fingers of whoever walks through it
    const list = branches(forest(found.data));
    list.className = "tree";
    $("tree").replaceChildren(found.data.length ? list : element("p", { class: "soft" }, "No conversation is kept."));
    $("total").textContent = `${count(found.data.length)} of ${count(found.total)}, those used last`;
    rows(
      "gone",
      found.gone.map((each) => [each.kind.replaceAll("_", " "), each.end, each.score === null ? "none" : each.score.toPrecision(3), ago(each.age_s)]),
    );
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("tree").replaceChildren(element("p", { class: "soft" }, error.message));
  }
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
  }
}

async function begin() {
  for (;;) {
    try {
      const reply = await ask("/cache/live");
      outline();
      for await (const sample of events(reply)) show(sample);
      $("state").textContent = "the server has ended";
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        $("state").textContent = "a key is needed";
        return askForKey(begin);
      }
      $("state").textContent = error instanceof Refused ? error.message : "no connection";
    }
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
}

$("texts").addEventListener("change", () => {
  $("tree").replaceChildren();
  outline();
});
$("refresh").addEventListener("click", outline);
setInterval(outline, OUTLINE_MS);
begin();
