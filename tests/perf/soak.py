"""`make soak`: random load on a real server for MINUTES=60, then: does it give everything back?

Lengths are mixed, some clients leave before the first token or in the middle, some answers end in stop strings, some
requests are nonsense, and the KV cache is so small that requests are preempted. Each minute a line is printed; at the
end all requests are over and blocks, slots, tasks and file descriptors must be back where they were, and the memory of
the server's processes must not have grown on the way. Exit code 1 if not. Rows over time go to results/soak.json.

MODEL=smollm2-135m picks the model, FLAGS="…" adds flags of `redline serve`, CLIENTS=24 so many at the same time. Linux.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from tests.serving import Served, serve

RESULTS = Path("results") / "soak.json"
MAX_MODEL_LEN = 512
SERVER = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--kv-cache-memory-bytes", "32MiB")
WARM_UP_S = 30.0  # of load, before what is kept for good is counted
SAMPLE_S = 10.0
QUIET_S = 60.0  # how long the last request may take to be over
REQUEST_LIMIT_S = 300.0
# The CPU's matrix library keeps a kernel for each shape it meets, up to a limit that is reached in some minutes.
FLAT_FROM, FLAT_FROM_MINUTE, FLAT_MINUTES = 0.25, 10.0, 5.0  # memory is judged from then on, if that long is left
FLAT_MIB, FLAT_SHARE = 8.0, 0.02  # what it may grow in that time: noise of the allocator
WORDS = re.findall(
    r"\w+",
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these",
)
STOPS = ([" the"], ["e"], ["\n"], [".", ",", " and"], ["never to be found in any text"])


@dataclass
class Sample:
    """The server at one moment."""

    minute: float
    requests: int
    unexpected: int
    running: float
    waiting: float
    kv_use: float
    preemptions: float
    generated: float
    last_step_age_s: float | None
    pss_mib: float
    pss_frontend_mib: float  # of that, the process that was started; the rest are its children
    descriptors: int
    threads: int
    tasks: float


class Watch:
    """Reads /metrics, /health and /proc."""

    def __init__(self, served: Served, load: "Load"):
        self._served = served
        self._load = load
        self._begin = time.monotonic()
        self.samples: list[Sample] = []

    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(self._served.process.pid)
        return [server, *server.children(recursive=True)]

    def take(self) -> Sample:
        metric = self._served.metric
        health = self._served.client.get("/health").json()
        pss: list[float] = []
        descriptors = threads = 0
        for process in self.processes():
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            pss.append(int(re.findall(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)[0]) / 1024)
            descriptors += process.num_fds()
            threads += process.num_threads()
        sample = Sample(
            minute=(time.monotonic() - self._begin) / 60,
            requests=sum(self._load.done.values()),
            unexpected=len(self._load.unexpected),
            running=metric("vllm:num_requests_running"),
            waiting=metric("vllm:num_requests_waiting"),
            kv_use=metric("vllm:kv_cache_usage_perc"),
            preemptions=metric("vllm:num_preemptions_total"),
            generated=metric("vllm:generation_tokens_total"),
            last_step_age_s=health.get("last_step_age_s"),
            pss_mib=sum(pss),
            pss_frontend_mib=pss[0],
            descriptors=descriptors,
            threads=threads,
            tasks=metric("redline:tasks"),
        )
        self.samples.append(sample)
        return sample

    async def settle(self) -> Sample:
        """Wait until nothing runs or waits and the counts of two looks are the same; at most QUIET_S."""
        deadline = time.monotonic() + QUIET_S
        while True:
            before = self.take()
            await asyncio.sleep(2.0)
            after = self.take()
            busy = after.running or after.waiting or after.kv_use
            still = (before.descriptors, before.tasks) == (after.descriptors, after.tasks)
            if (still and not busy) or time.monotonic() > deadline:
                return after


class Load:
    """Clients that each do one random thing after the other."""

    def __init__(self, url: str, model: str, seed: int):
        self._url = url
        self._model = model
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self._kinds: dict[Callable[[httpx.AsyncClient], Awaitable[None]], int] = {
            self.streamed: 8,
            self.whole: 4,
            self.stopped: 4,
            self.chat: 3,
            self.several: 2,
            self.leaves_midway: 6,
            self.leaves_at_once: 4,
            self.nonsense: 3,
            self.forgets: 1,
        }

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(clients)))

    async def _client(self, end: float) -> None:
        while time.monotonic() < end:
            # A connection lives for a few requests, as those of real clients do.
            async with httpx.AsyncClient(base_url=self._url, timeout=REQUEST_LIMIT_S) as http:
                for _ in range(self._random.randint(1, 8)):
                    (act,) = self._random.choices(list(self._kinds), list(self._kinds.values()))
                    name = getattr(act, "__name__", "")
                    try:
                        await act(http)
                    except (httpx.HTTPError, AssertionError, ValueError) as error:
                        self.unexpected.append(f"{name}: {type(error).__name__}: {error}")
                    self.done[name] += 1
                    if time.monotonic() > end:
                        return
            # Now and then all is quiet, so that preempted and waiting requests catch up.
            await asyncio.sleep(self._random.expovariate(2.0))

    def _body(self, **more: Any) -> dict[str, Any]:
        draw = self._random
        most = MAX_MODEL_LEN - 200
        words = draw.choice((draw.randint(1, 12), draw.randint(20, 150), draw.randint(100, most)))
        # A quarter begin alike and find each other's blocks.
        prompt = " ".join(WORDS * 2 if draw.random() < 0.25 else draw.choices(WORDS, k=words))[: 4 * most]
        body: dict[str, Any] = {
            "model": self._model, "prompt": prompt, "max_tokens": draw.choice((1, 8, 40, 150)),
            "temperature": draw.choice((0.0, 0.7, 1.0)), "ignore_eos": draw.random() < 0.7,
        }  # fmt: skip
        if draw.random() < 0.2:
            body |= {"logprobs": 3}
        return body | more

    async def _events(self, http: httpx.AsyncClient, path: str, body: dict[str, Any], most: int | None = None) -> int:
        """Stream an answer, to the end or for so many events; closing the response early is leaving."""
        count, ended = 0, False
        async with http.stream("POST", path, json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, f"{answer.status_code} for {path}"
            async for line in answer.aiter_lines():
                ended |= line == "data: [DONE]"
                count += line.startswith("data: {")
                assert '"error"' not in line[:20], line
                if most is not None and count >= most:
                    return count
        assert ended, f"the stream broke off after {count} events"
        return count

    async def streamed(self, http: httpx.AsyncClient) -> None:
        body = self._body()
        count = await self._events(http, "/v1/completions", body)
        assert count >= 1, "a stream without an event"

    async def whole(self, http: httpx.AsyncClient) -> None:
        body = self._body(max_tokens=self._random.randint(1, 60), ignore_eos=True)
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"
        found = answer.json()
        tokens, reason = found["usage"]["completion_tokens"], found["choices"][0]["finish_reason"]
        assert (tokens, reason) == (body["max_tokens"], "length"), f"{tokens} of {body['max_tokens']}, {reason}"

    async def stopped(self, http: httpx.AsyncClient) -> None:
        stop = self._random.choice(STOPS)
        answer = await http.post("/v1/completions", json=self._body(stop=stop, max_tokens=60))
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"
        text = answer.json()["choices"][0]["text"]
        assert not any(one in text for one in stop), f"{stop} is in {text!r}"

    async def chat(self, http: httpx.AsyncClient) -> None:
        body = self._body()
        message = {"role": "user", "content": body.pop("prompt")[:400]}
        body.pop("logprobs", None)
        await self._events(http, "/v1/chat/completions", body | {"messages": [message]})

    async def several(self, http: httpx.AsyncClient) -> None:
        body = self._body(n=3, max_tokens=30, temperature=1.0)
        await self._events(http, "/v1/completions", body)

    async def leaves_midway(self, http: httpx.AsyncClient) -> None:
        await self._events(http, "/v1/completions", self._body(max_tokens=150), self._random.randint(1, 40))

    async def leaves_at_once(self, http: httpx.AsyncClient) -> None:
        """Without having read anything, of a whole answer as of a stream."""
        body = self._body(max_tokens=150, stream=self._random.random() < 0.5)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(http.post("/v1/completions", json=body), self._random.uniform(0.001, 0.5))

    async def nonsense(self, http: httpx.AsyncClient) -> None:
        good = self._body()
        content, status = self._random.choice(
            [
                (b"{ this is no JSON", 400),
                (json.dumps(good | {"temperature": -1}).encode(), 400),
                (json.dumps(good | {"prompt": [5] * (MAX_MODEL_LEN + 1)}).encode(), 400),
                (json.dumps(good | {"prompt": [-1]}).encode(), 400),
                (json.dumps(good | {"max_tokens": "many"}).encode(), 400),
                (json.dumps(good | {"model": "another"}).encode(), 404),
            ]
        )
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, f"{answer.status_code} instead of {status}: {answer.text[:200]}"

    async def forgets(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/reset_prefix_cache", json={})
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"


def slope(samples: list[Sample]) -> tuple[float, float, float]:
    """MiB a minute with a 95 % interval, and the minutes it was fitted over."""
    minutes = np.array([sample.minute for sample in samples])
    pss = np.array([sample.pss_mib for sample in samples])
    centred = minutes - minutes.mean()
    rate = float((centred * pss).sum() / (centred**2).sum())
    rest = pss - pss.mean() - rate * centred
    error = float(np.sqrt((rest**2).sum() / max(len(pss) - 2, 1) / (centred**2).sum()))
    return rate, 1.96 * error, float(minutes[-1] - minutes[0])


def judge(before: Sample, after: Sample, under_load: list[Sample], load: Load) -> list[str]:
    """What is wrong."""
    found = []
    if after.running or after.waiting:
        found.append(f"{after.running:g} requests still run and {after.waiting:g} wait, with nobody there")
    if after.kv_use:
        found.append(f"{after.kv_use:.2%} of the blocks are still held")
    for what, was, now in (
        ("file descriptors", before.descriptors, after.descriptors),
        ("tasks", before.tasks, after.tasks),
    ):
        if now > was:
            found.append(f"{now:g} {what}, {was:g} before the load")
    # Threads for long texts are made on demand, up to as many as asyncio allows each process.
    if after.threads - before.threads > (os.cpu_count() or 1) + 4:
        found.append(f"{after.threads} threads, {before.threads} before the load")
    found += grown(under_load)
    if not after.preemptions:
        found.append("nothing was preempted: the KV cache is too large for this load to mean much")
    for kind, count in Counter(load.unexpected).most_common(5):
        found.append(f"{count} × {kind}")
    return found


def grown(samples: list[Sample]) -> list[str]:
    """What is wrong with memory."""
    start, end = samples[0].minute, samples[-1].minute
    start = max(FLAT_FROM_MINUTE, start + FLAT_FROM * (end - start))
    judged = [sample for sample in samples if sample.minute >= start]
    if not judged or end - start < FLAT_MINUTES:
        print(f"memory can't be judged: {FLAT_FROM_MINUTE + FLAT_MINUTES:g} minutes are needed for that")
        return []
    rate, error, minutes = slope(judged)
    print(f"memory: {rate:+.3f} ± {error:.3f} MiB a minute over the last {minutes:.0f} minutes")
    least, allowed = (rate - error) * minutes, max(FLAT_MIB, FLAT_SHARE * judged[0].pss_mib)
    return [f"memory grew by {least:.1f} MiB at least, {allowed:.1f} may be noise"] if least > allowed else []


def show(sample: Sample, before: Sample | None = None) -> None:
    tokens = ""
    if before is not None and sample.minute > before.minute:
        tokens = f"{(sample.generated - before.generated) / (sample.minute - before.minute) / 60:.0f} tokens/s, "
    print(
        f"minute {sample.minute:.1f}: {sample.requests:,} requests, {sample.unexpected} unexpected; {tokens}"
        f"{sample.running:g} run, {sample.waiting:g} wait, KV {sample.kv_use:.0%}, {sample.preemptions:g} preemptions; "
        f"PSS {sample.pss_mib:.0f} MiB, {sample.descriptors} descriptors, {sample.tasks:g} tasks, "
        f"{sample.threads} threads",
        flush=True,
    )


async def soak(served: Served, model: str, minutes: float, clients: int) -> int:
    load = Load(served.url, model, seed=1)
    watch = Watch(served, load)
    await load.run(clients, min(WARM_UP_S, 60 * minutes))
    before = await watch.settle()
    show(before)
    watch.samples.clear()
    running = asyncio.ensure_future(load.run(clients, 60 * minutes))
    last, begin = before, time.monotonic()
    while not running.done():
        await asyncio.wait([running], timeout=SAMPLE_S)
        if served.process.poll() is not None:
            running.cancel()
            print(f"the server ended with exit code {served.process.returncode}:\n{served.output()[-3000:]}")
            return 1
        sample = watch.take()
        if sample.minute - last.minute >= 1 or time.monotonic() - begin >= 60 * minutes:
            show(sample, last)
            last = sample
    await running
    under_load = list(watch.samples)
    after = await watch.settle()
    show(after)
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in load.done.most_common())
    print(f"requests: {kinds}")
    wrong = judge(before, after, under_load, load)
    RESULTS.parent.mkdir(exist_ok=True)
    phases = [("before", before), *(("load", one) for one in under_load), ("after", after)]
    rows: list[dict[str, Any]] = [{"phase": phase} | asdict(sample) for phase, sample in phases]
    RESULTS.write_text(json.dumps([*rows, {"phase": "verdict", "leaks": wrong}], indent=1) + "\n")
    for line in wrong:
        print(f"LEAK OR FAILURE: {line}")
    if not wrong:
        print(f"nothing leaked in {minutes:g} minutes: blocks, slots, tasks and file descriptors are as before")
    return 1 if wrong else 0


def main() -> int:
    minutes, clients = float(os.environ.get("MINUTES", "60")), int(os.environ.get("CLIENTS", "24"))
    model, flags = os.environ.get("MODEL", "smollm2-135m"), shlex.split(os.environ.get("FLAGS", ""))
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), model, "--served-model-name", "soak", *SERVER, *flags) as served,
    ):
        return asyncio.run(soak(served, "soak", minutes, clients))


if __name__ == "__main__":
    sys.exit(main())
