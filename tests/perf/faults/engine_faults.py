"""Faults of single requests and of steps, in one server that has to go on, or to end with the cause."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import httpx
import torch

from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.perf.faults.clients import Streams, ask, disconnect_abruptly, most_seen
from tests.perf.faults.injection.sitecustomize import MARKER
from tests.perf.faults.row import Row, World, world
from tests.tiny import TINY

ROUNDS = 1000  # of loading and unloading an adapter that requests name meanwhile
RACERS = 2  # requests for it in each round
RACE_S = 0.02  # within which the moments of requests and unloads are drawn
UNUSED_S = 60.0  # until when an adapter must be unused, where requests for it have ended
DISCONNECTS = 200
NEIGHBORS = 4


def request_faults(model: str) -> Iterator[Row]:
    """Faults after which the server serves on."""
    with world(model, "--enable-runtime-lora", "--max-num-seqs", "32") as here:
        for fault in (adapter_race, failing_detokenizer, dropped_message, abrupt_disconnects):
            for _ in range(8):
                ask(here.served)
            here.warm()
            row = fault(here)
            row.leaked = here.leaked()
            row.expect(ask(here.served) == "200", "the server doesn't answer any more")
            yield row


def adapter_race(here: World) -> Row:
    """Load and unload an adapter; in each round requests name it before, while and after it is served."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in TINY.items() if key != "architectures"}))
    adapter = write_adapter(here.faults / "french", base, LLAMA, seed=1)
    del base
    load, name = {"lora_name": "french", "lora_path": str(adapter)}, {"lora_name": "french"}

    def ask_later() -> str:
        time.sleep(random.uniform(0, 2 * RACE_S))  # loading takes about as long as RACE_S
        return ask(here.served, model="french", prompt="a", max_tokens=random.randint(1, 4)).partition(":")[0]

    saw, refused, begin = Counter[str](), 0, time.monotonic()
    with httpx.Client(base_url=here.served.url, timeout=60) as http, ThreadPoolExecutor(2 * RACERS) as pool:
        before: list[Future[str]] = []
        for _ in range(ROUNDS):
            racers = [pool.submit(ask_later) for _ in range(RACERS)]
            loaded = http.post("/v1/load_lora_adapter", json=load).status_code
            time.sleep(random.uniform(0, RACE_S))
            deadline = time.monotonic() + UNUSED_S
            while (answer := http.post("/v1/unload_lora_adapter", json=name)).status_code == 400:
                if "request(s) still use" not in answer.text or time.monotonic() > deadline:
                    break
                refused += 1
                time.sleep(random.uniform(0, RACE_S))
            if (loaded, answer.status_code) != (200, 200):
                break
            # Requests of this round may still be under way when the adapter is loaded again.
            saw.update(one.result() for one in before)
            before = racers
        saw.update(one.result() for one in racers)
    counts = "; ".join(f"{count} × {what}" for what, count in saw.most_common())
    row = Row(f"adapter race, {ROUNDS:,} rounds", f"{counts}; {refused} unloads refused as in use", 0, {})
    row.seconds = time.monotonic() - begin
    row.expect((loaded, answer.status_code) == (200, 200), f"loading gave {loaded}, unloading: {answer.text}")
    row.expect(set(saw) == {"200", "404"}, "clients should see 200 and 404, and nothing else")
    raced = min(saw["200"], saw["404"], refused)
    row.expect(raced > ROUNDS / 10, f"requests and unloads hardly met: {row.client_saw}")
    return row


def failing_detokenizer(here: World) -> Row:
    """One request's texts can't be written; its neighbors' can."""
    neighbors = Streams(here.served, NEIGHBORS, max_tokens=800)
    begin = time.monotonic()
    saw = ask(here.served, stop=[MARKER])
    row = Row("failing detokenizer", saw, time.monotonic() - begin, {})
    row.expect(saw.startswith("500"), "the request didn't end with an error")
    row.expect(neighbors.wait() == ["[DONE]"] * NEIGHBORS, f"neighbors saw {most_seen(neighbors.seen)}")
    return row


def dropped_message(here: World) -> Row:
    """The core can't take a request; it is answered, and its neighbors go on."""
    neighbors = Streams(here.served, NEIGHBORS, max_tokens=800)
    begin = time.monotonic()
    saw = ask(here.served, cache_salt=MARKER)
    row = Row("message the core can't take", saw, time.monotonic() - begin, {})
    row.expect(saw[:1] in ("4", "5"), "the request didn't end with an error")
    row.expect(neighbors.wait() == ["[DONE]"] * NEIGHBORS, f"neighbors saw {most_seen(neighbors.seen)}")
    return row


def abrupt_disconnects(here: World) -> Row:
    """Clients reset their connections, before the first byte and in the middle of streams."""
    begin, logged = time.monotonic(), len(here.served.output())
    for number in range(DISCONNECTS):
        disconnect_abruptly(here.served, after=(0, 1, 500, 3000)[number % 4], stream=number % 3 > 0)
    saw = ask(here.served)
    row = Row(f"{DISCONNECTS} abrupt disconnects", f"the next one: {saw}", time.monotonic() - begin, {})
    written = here.served.output()[logged:]
    row.expect("Traceback" not in written, f"a traceback in the log: {written[-500:]}")
    return row


def failing_step(model: str, fault: str, switch: str, flags: tuple[str, ...]) -> Row:
    """A step that fails ends the server with its own cause."""
    cause = out_of_memory() if switch == "memory" else "the kernel returned status 719"
    with world(model, *flags) as here:
        streams = Streams(here.served, NEIGHBORS)
        begin = time.monotonic()
        here.switch_on(switch)
        seen = streams.wait()
        code = here.served.process.wait(30)
        row = Row(fault, most_seen(seen), time.monotonic() - begin, here.left_behind())
        told = [what for what in seen if what.startswith("error event: ") and cause in what]
        row.expect(len(told) == NEIGHBORS, "clients lack the cause")
        row.expect(code == 1, f"exit code {code}")
        row.expect(cause in here.last_line(), f"the last line is {here.last_line()!r}")
        return row


def out_of_memory() -> str:
    """What the allocator says."""
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        return str(error).rpartition("] ")[2].split(":")[0]
    raise AssertionError("a petabyte was allocated")


STEP_FAULTS: Sequence[Callable[[str], Row]] = (
    partial(failing_step, fault="failing forward pass", switch="forward", flags=()),
    partial(failing_step, fault="failing forward pass, two ranks", switch="forward", flags=("--tp", "2")),
    partial(failing_step, fault="step out of memory", switch="memory", flags=()),
    partial(failing_step, fault="step out of memory, two ranks", switch="memory", flags=("--tp", "2")),
)
