const INTERVAL_MS = 2000;
const SAMPLES = 150;  // five minutes
const WINDOW = 15;    // samples that percentiles and shares are taken over: 30 s
let key = sessionStorage.getItem("redline-key") ?? "";

const headers = () => key ? { Authorization: `Bearer ${key}` } : {};

async function errorOf(answer) {
  const text = await answer.text();
  try { return JSON.parse(text).error.message; } catch { return text || `${answer.status} ${answer.statusText}`; }
}

// ---------------------------------------------------------------------------------------------------------- models

async function loadModels() {
  let answer;
  try { answer = await fetch(`${base}v1/models`, { headers: headers() }); }
  catch { showState("the server does not answer", true); return; }
  const refused = answer.status === 401;
  byId("access").hidden = !refused;
  byId("use").hidden = refused || document.body.dataset.generates !== "true";
  if (refused) {
    byId("access-hint").textContent = key ? "The server refused this key." : "This server needs an API key.";
    byId("key").focus();
    return;
  }
  if (!answer.ok) { showState(await errorOf(answer), true); return; }
  const models = (await answer.json()).data;
  byId("model").replaceChildren(...models.map(model => new Option(model.id, model.id)));
  const [first] = models;
  byId("title").textContent = first.id;
  byId("facts").textContent = `Redline · requests of up to ${first.max_model_len.toLocaleString()} tokens`;
}

byId("access").addEventListener("submit", event => {
  event.preventDefault();
  key = byId("key").value.trim();
  sessionStorage.setItem("redline-key", key);
  loadModels();
});

// ------------------------------------------------------------------------------------------------------------ chat

const conversation = [];  // messages as they are sent
let images = [];     // data: URLs chosen for the next message
let running = null;  // the AbortController of a request

function show(role, text, pictures = []) {
  const shown = make("div", `message ${role}`);
  shown.append(make("span", "role", role));
  for (const url of pictures) { const image = make("img"); image.src = url; image.alt = "sent image"; shown.append(image); }
  const body = make("span", "text", text);
  shown.append(body);
  byId("messages").append(shown);
  shown.scrollIntoView({ block: "nearest" });
  return body;
}

function settings() {
  const found = { model: byId("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed", "presence_penalty"]) {
    const value = byId(name).value.trim();
    if (value !== "") found[name] = Number(value);
  }
  return found;
}

function requestOf(text) {
  if (byId("mode").value === "completion") return ["v1/completions", { ...settings(), prompt: text }];
  const parts = images.map(url => ({ type: "image_url", image_url: { url } }));
  conversation.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  return ["v1/chat/completions", { ...settings(), messages }];
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let begun = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (begun + value).split("\n\n");
    begun = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

async function send(text) {
  const pictures = images, before = conversation.length;
  const [path, body] = requestOf(text);
  show("user", text, pictures);
  chooseImages([]);
  const target = show("assistant", "");
  let output = "", usage = null, first = 0, last = 0;
  running = new AbortController();
  setRunning(true);
  try {
    const answer = await fetch(base + path, {
      method: "POST", headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(body), signal: running.signal,
    });
    if (!answer.ok) throw new Error(await errorOf(answer));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        last = performance.now();
        first = first || last;
        output += choice.text ?? choice.delta.content ?? "";
        target.textContent = output;
        byId("messages").scrollTop = byId("messages").scrollHeight;
      }
    }
    if (usage) byId("usage").textContent = spent(usage, (last - first) / 1000);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
    if (!output) { conversation.length = before; target.parentNode.remove(); }
  } finally {
    if (output && byId("mode").value === "chat") conversation.push({ role: "assistant", content: output });
    running = null;
    setRunning(false);
  }
}

function spent(usage, seconds) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const rate = usage.completion_tokens > 1 && seconds > 0 ? `, ${number((usage.completion_tokens - 1) / seconds)} tok/s` : "";
  return `${usage.prompt_tokens} prompt tokens (${cached} cached), ${usage.completion_tokens} output tokens${rate}`;
}

function setRunning(on) {
  byId("send").disabled = on;
  byId("stop").hidden = !on;
  byId("mode").disabled = on;
}

function chooseImages(urls) {
  images = urls;
  byId("chosen").replaceChildren(...urls.map(url => { const image = make("img"); image.src = url; image.alt = "chosen image"; return image; }));
  byId("file").value = "";
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

byId("compose").addEventListener("submit", event => {
  event.preventDefault();
  const text = byId("text").value;
  if (running || !(text.trim() || images.length)) return;
  byId("text").value = "";
  send(text);
});
byId("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("compose").requestSubmit(); }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  byId("messages").replaceChildren();
  byId("usage").textContent = "";
});
byId("mode").addEventListener("change", () => {
  byId("clear").click();
  byId("upload").hidden = byId("mode").value !== "chat" || document.body.dataset.images !== "true";
  byId("system-label").hidden = byId("mode").value !== "chat";
  chooseImages([]);
});
byId("file").addEventListener("change", async event => chooseImages(await Promise.all([...event.target.files].map(readFile))));
byId("upload").hidden = document.body.dataset.images !== "true";

// --------------------------------------------------------------------------------------------------------- metrics

const samples = [];

// Sums of all samples of a name over their labels; histograms have a list of [upper bound, count].
function parseMetrics(text) {
  const sums = {}, buckets = {};
  for (const line of text.split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    const bound = /(?:^|,)le="([^"]+)"/.exec(labels);
    if (bound) (buckets[name] ??= []).push([bound[1] === "+Inf" ? Infinity : Number(bound[1]), Number(value)]);
    else sums[name] = (sums[name] ?? 0) + Number(value);
  }
  return { sums, buckets };
}

// The quantile of what a histogram counted between two samples, interpolated within a bucket as Prometheus does.
function quantile(share, now, before) {
  const counts = now.map(([bound, count], index) => [bound, count - (before?.[index]?.[1] ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  let low = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= share * total) return bound === Infinity ? low : low + (bound - low) * (share * total - below) / Math.max(count - below, 1e-9);
    low = bound; below = count;
  }
  return low;
}

function point(now, last, before) {
  const gauge = name => now.sums[name] ?? 0;
  const grown = (name, since) => Math.max(0, (now.sums[name] ?? 0) - (since.sums[name] ?? 0));
  const rate = name => grown(name, last) / Math.max((now.at - last.at) / 1000, 0.001);
  const percentile = (share, name) => quantile(share, now.buckets[`${name}_bucket`] ?? [], before.buckets[`${name}_bucket`]);
  const queries = grown("vllm:prefix_cache_queries_total", before);
  return {
    running: gauge("vllm:num_requests_running"),
    waiting: gauge("vllm:num_requests_waiting"),
    kv: 100 * gauge("vllm:kv_cache_usage_perc"),
    hits: queries ? 100 * grown("vllm:prefix_cache_hits_total", before) / queries : null,
    preemptions: grown("vllm:num_preemptions_total", last),
    generated: rate("vllm:generation_tokens_total"),
    prompt: rate("vllm:prompt_tokens_total"),
    ttft50: percentile(0.5, "vllm:time_to_first_token_seconds"),
    ttft99: percentile(0.99, "vllm:time_to_first_token_seconds"),
    itl50: percentile(0.5, "vllm:inter_token_latency_seconds"),
    itl99: percentile(0.99, "vllm:inter_token_latency_seconds"),
  };
}

const number = value => value >= 100 ? Math.round(value).toLocaleString() : value >= 10 ? value.toFixed(0) : value.toFixed(value ? 1 : 0);
const plain = value => value === null ? "–" : number(value);
const percent = value => value === null ? "–" : `${number(value)} %`;
const seconds = value => value === null ? "–" : value < 1 ? `${number(1000 * value)} ms` : `${value.toFixed(2)} s`;

const CHARTS = [
  ["Requests", plain, [["running", "running"], ["waiting", "waiting"]]],
  ["Tokens per second", plain, [["generated", "generated"], ["prompt", "prompt"]]],
  ["Time to first token", seconds, [["ttft50", "P50"], ["ttft99", "P99"]]],
  ["Inter-token latency", seconds, [["itl50", "P50"], ["itl99", "P99"]]],
  ["Cache", percent, [["kv", "KV blocks in use"], ["hits", "prefix hits"]], 100],
  ["Preemptions", plain, [["preemptions", "in 2 s"]]],
];
const COLORS = ["first", "second"];
const NAMESPACE = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const views = CHARTS.map(([title, write, lines, top]) => {
  const card = make("div", "card chart"), legend = make("div", "legend"), axis = make("div", "axis");
  const drawing = svg("svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img", "aria-label": title });
  for (const y of [1, 50, 99]) drawing.append(svg("line", { class: "grid", x1: 0, x2: 300, y1: y, y2: y }));
  const drawn = lines.map(([, label], index) => {
    const value = make("b", "", "–"), entry = make("span", COLORS[index], `${label} `);
    entry.append(value);
    legend.append(entry);
    const line = svg("polyline", { class: COLORS[index], points: "" });
    drawing.append(line);
    return { value, line };
  });
  const highest = make("span", "", "");
  axis.append(make("span", "", "last 5 minutes"), highest);
  card.append(make("h3", "", title), legend, drawing, axis);
  byId("charts").append(card);
  return { write, lines, top, drawn, highest };
});

function draw(points) {
  for (const { write, lines, top, drawn, highest } of views) {
    const values = lines.flatMap(([name]) => points.map(one => one[name] ?? 0));
    const most = top ?? Math.max(...values, 0);
    highest.textContent = `top of the scale: ${write(most)}`;
    lines.forEach(([name], index) => {
      drawn[index].value.textContent = write(points.at(-1)[name]);
      const known = points.map((one, at) => [at, one[name]]).filter(([, value]) => value !== null);
      drawn[index].line.setAttribute("points", known.map(([at, value]) =>
        `${(300 * (at + SAMPLES - points.length) / (SAMPLES - 1)).toFixed(1)},${(99 - 98 * (most ? value / most : 0)).toFixed(1)}`).join(" "));
    });
  }
}

function showState(text, bad) {
  byId("state").textContent = text;
  byId("state").className = bad ? "facts bad" : "facts";
}

async function watch() {
  try {
    const [metrics, health] = await Promise.all([fetch(`${base}metrics`), fetch(`${base}health`)]);
    if (!metrics.ok) throw new Error(await errorOf(metrics));
    samples.push({ at: performance.now(), ...parseMetrics(await metrics.text()) });
    if (samples.length > SAMPLES + WINDOW) samples.shift();
    const state = await health.json();
    showState(state.cause ? `${state.status}: ${state.cause}` : `state: ${state.status}`, state.status !== "ok");
    const points = samples.map((now, at) => point(now, samples[Math.max(0, at - 1)], samples[Math.max(0, at - WINDOW)]));
    draw(points.slice(-SAMPLES));
  } catch (error) {
    showState(`the server does not answer: ${error.message}`, true);
  }
  setTimeout(watch, document.hidden ? 5 * INTERVAL_MS : INTERVAL_MS);
}

loadModels();
watch();
