// From the text of /metrics to the numbers of the charts.

const WINDOW_MS = 30_000;  // that percentiles, shares and preemptions are taken over

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

// What the charts show of a sample. `last` is the one before it, `before` the newest that is WINDOW_MS older.
function point(now, last, before) {
  const gauge = name => now.sums[name] ?? 0;
  const grown = (name, since) => Math.max(0, (now.sums[name] ?? 0) - (since.sums[name] ?? 0));
  const rate = name => now === last ? null : grown(name, last) / ((now.at - last.at) / 1000);
  const percentile = (share, name) => quantile(share, now.buckets[`${name}_bucket`] ?? [], before.buckets[`${name}_bucket`]);
  const queries = grown("vllm:prefix_cache_queries_total", before);
  return {
    at: now.at,
    running: gauge("vllm:num_requests_running"),
    waiting: gauge("vllm:num_requests_waiting"),
    kv: 100 * gauge("vllm:kv_cache_usage_perc"),
    hits: queries ? 100 * grown("vllm:prefix_cache_hits_total", before) / queries : null,
    preemptions: grown("vllm:num_preemptions_total", before),
    generated: rate("vllm:generation_tokens_total"),
    prompt: rate("vllm:prompt_tokens_total"),
    ttft50: percentile(0.5, "vllm:time_to_first_token_seconds"),
    ttft99: percentile(0.99, "vllm:time_to_first_token_seconds"),
    itl50: percentile(0.5, "vllm:inter_token_latency_seconds"),
    itl99: percentile(0.99, "vllm:inter_token_latency_seconds"),
  };
}

const number = value => value >= 10 ? Math.round(value).toLocaleString("en") : String(Math.round(10 * value) / 10);
const count = value => value === null ? "–" : number(value);
const percent = value => value === null ? "–" : `${number(value)} %`;
const seconds = value => {
  if (value === null) return "–";
  return value < 1 ? value ? `${number(1000 * value)} ms` : "0" : `${value >= 10 ? number(value) : Number(value.toFixed(2))} s`;
};
