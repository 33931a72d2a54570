// The charts: one line for each number, over the last minutes.

const SHOWN_MS = 300_000;
const GAP_MS = 15_000;  // between two samples, from which on no line connects them
const CHARTS = [  // title, how values are written, lines, the least top of the scale, whether it is fixed
  ["Requests", count, [["running", "running"], ["waiting", "waiting"]], 4],
  ["Tokens per second", count, [["generated", "generated"], ["prompt", "prompt"]], 10],
  ["Time to first token", seconds, [["ttft50", "P50"], ["ttft99", "P99"]], 0.01],
  ["Inter-token latency", seconds, [["itl50", "P50"], ["itl99", "P99"]], 0.01],
  ["Caches", percent, [["kv", "KV blocks in use"], ["hits", "prefix hits"]], 100, true],
  ["Preemptions", count, [["preemptions", "in 30 s"]], 4],
];
const COLORS = ["first", "second"];
const WIDTH = 300, HEIGHT = 100;
const NAMESPACE = "http://www.w3.org/2000/svg";

const points = [];  // what is shown, the oldest first
let cursor = null;  // the time of the point under the pointer

function svg(tag, attributes) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// The least 1, 2 or 4 times a power of ten that is not below a value.
function scaleTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].map(factor => factor * power).find(top => top >= value * (1 - 1e-9));
}

// A line through what is known of a number. It has gaps where nothing is known.
function pathOf(shown, name, place) {
  let path = "", before = null;
  for (const one of shown) {
    if (one[name] === null) { before = null; continue; }
    const [x, y] = place(one.at, one[name]);
    path += before !== null && one.at - before < GAP_MS ? `L${x} ${y}` : `M${x} ${y}h0`;
    before = one.at;
  }
  return path;
}

function makeChart([title, write, lines, least, fixed = false]) {
  const card = make("div", "card chart"), legend = make("div", "legend"), plot = make("div", "plot"), ticks = make("div", "ticks");
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
  for (const y of [0, HEIGHT / 2, HEIGHT]) drawing.append(svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
  const drawn = lines.map(([name, label], index) => {
    const value = make("b", "", "–"), entry = make("span", COLORS[index], `${label} `);
    entry.append(value);
    legend.append(entry);
    const line = svg("path", { class: COLORS[index] });
    return { name, label, value, line };
  });
  const mark = svg("line", { class: "mark", y1: 0, y2: HEIGHT });
  drawing.append(...drawn.map(({ line }) => line).reverse(), mark);
  const heights = [1, 0.5, 0].map(() => ticks.appendChild(make("span")));
  const times = make("div", "times");
  const span = times.appendChild(make("span", "", "5 min ago"));
  times.append(make("span", "", "now"));
  plot.append(ticks, drawing);
  card.append(make("h3", "", title), legend, plot, times);
  byId("charts").append(card);
  drawing.addEventListener("pointermove", event => setCursor(event.offsetX / drawing.clientWidth));
  drawing.addEventListener("pointerleave", () => setCursor(null));
  return { title, write, drawn, least, fixed, drawing, mark, heights, span };
}

const views = CHARTS.map(makeChart);

function setCursor(share) {
  const at = share === null || !points.length ? null : points.at(-1).at - (1 - share) * SHOWN_MS;
  const distance = one => Math.abs(one.at - at);
  cursor = at === null ? null : points.reduce((best, one) => distance(one) < distance(best) ? one : best).at;
  draw();
}

function draw() {
  if (!points.length) return;
  const newest = points.at(-1), chosen = points.find(({ at }) => at === cursor) ?? newest;
  const x = at => WIDTH * (1 + (at - newest.at) / SHOWN_MS);
  for (const { title, write, drawn, least, fixed, drawing, mark, heights, span } of views) {
    const values = drawn.flatMap(({ name }) => points.map(one => one[name] ?? 0));
    const top = fixed ? least : scaleTop(Math.max(least, ...values));
    heights.forEach((tick, index) => { tick.textContent = write(top * (1 - index / 2)); });
    const place = (at, value) => [x(at).toFixed(1), (HEIGHT * (1 - value / top)).toFixed(1)];
    for (const { name, value, line } of drawn) {
      value.textContent = write(chosen[name]);
      line.setAttribute("d", pathOf(points, name, place));
    }
    drawing.setAttribute("aria-label", `${title}: ${drawn.map(({ name, label }) => `${label} ${write(newest[name])}`).join(", ")}`);
    const marked = chosen !== newest;
    mark.classList.toggle("shown", marked);
    if (marked) { mark.setAttribute("x1", x(chosen.at)); mark.setAttribute("x2", x(chosen.at)); }
    span.textContent = marked ? `at the line: ${Math.round((newest.at - chosen.at) / 1000)} s ago` : "5 min ago";
  }
}
