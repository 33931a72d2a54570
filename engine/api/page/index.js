// Reads /metrics and /health again and again.

const INTERVAL_MS = 2000;
const ANSWER_MS = 10_000;  // a server that takes longer does not answer
const STATES = { ok: "serving", degraded: "degraded", hung: "hangs", dead: "ended" };
const samples = [];  // of the last SHOWN_MS and WINDOW_MS

function showState(text, kind) {
  const state = byId("state");
  if (state.textContent === text) return;  // or it would be read out each time
  state.textContent = text;
  state.className = `state ${kind}`;
}

function addSample(text) {
  const now = { at: performance.now(), ...parseMetrics(text) }, last = samples.at(-1) ?? now;
  samples.push(now);
  points.push(point(now, last, samples.findLast(({ at }) => at <= now.at - WINDOW_MS) ?? samples[0]));
  while (samples[0].at < now.at - SHOWN_MS - WINDOW_MS) samples.shift();
  while (points[0].at < now.at - SHOWN_MS) points.shift();
  draw();
}

async function watch() {
  const open = path => fetch(base + path, { signal: AbortSignal.timeout(ANSWER_MS) });
  try {
    const [metrics, health] = await Promise.all([open("metrics"), open("health")]);
    if (!metrics.ok) throw new Error(await errorOf(metrics));
    addSample(await metrics.text());
    const { status, cause } = await health.json();
    const text = STATES[status] ?? status;
    showState(cause ? `${text}: ${cause}` : text, status === "ok" ? "good" : "bad");
  } catch (error) {
    showState(causeOf(error), "bad");
  }
  setTimeout(watch, document.hidden ? 5 * INTERVAL_MS : INTERVAL_MS);
}

loadModels();
watch();
