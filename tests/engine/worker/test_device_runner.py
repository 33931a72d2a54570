"""An asynchronous device gives the CPU's tokens, however late its results come."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.columns import column, int32s
from engine.grammar import Grammar
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.worker.device import Device
from engine.worker.in_process import InProcessExecutor
from engine.worker.torch_device import TorchDevice
from tests.engine.worker.device_driver import CoreDriver, make_device_driver, start_executor
from tests.engine.worker.driver import VOCAB, Driver, Request, build_model
from tests.engine.worker.lora_files import write_adapter
from tests.engine.worker.parity import CASES, NEW, Reference, compare, merged, prompts, serve
from tests.engine.worker.stand_in_device import StandInDevice

KINDS = ("llama", "qwen2")  # qwen2: layers with a window beside others without
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, seed=2),
    Sampling(temperature=0.7, top_k=5, seed=2**64 - 3),
    Sampling(temperature=1.2, top_p=0.8, seed=4),
    Sampling(temperature=1.5, min_p=0.1, top_k=30, top_p=0.9, seed=5),
]
ON_HOST = [
    Sampling(temperature=0.8, presence_penalty=1.0, seed=6),
    Sampling(repetition_penalty=1.4),
    Sampling(temperature=0.9, logprobs=3, seed=7),
    Sampling(min_tokens=4, stop_ids=tuple(range(0, VOCAB, 2))),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, build_model(kind, folder)) for kind, folder in folders.items()}


@pytest.fixture
def started() -> Iterator[list[InProcessExecutor]]:
    """Executors to shut down."""
    executors: list[InProcessExecutor] = []
    yield executors
    for executor in executors:
        executor.shutdown()


MakeDriver = Callable[..., Driver]
MakeCore = Callable[..., CoreDriver]


@pytest.fixture
def device_driver(started: list[InProcessExecutor]) -> MakeDriver:
    def make(device: Device, folder: Path, **options: Any) -> Driver:
        driver = make_device_driver(device, folder, **options)
        started.append(driver.executor)
        return driver

    return make


@pytest.fixture
def core_driver(started: list[InProcessExecutor]) -> MakeCore:
    def make(device: Device | None, folder: Path, **options: Any) -> CoreDriver:
        options = {"kernels": "torch", "max_num_batched_tokens": 16, "max_model_len": 128, **options}
        executor, resolved = start_executor(device, folder, **options)
        started.append(executor)
        return CoreDriver(executor, resolved)

    return make


@pytest.mark.parametrize(
    ("kind", "device", "cases"),
    [
        ("llama", lambda: TorchDevice("cpu"), CASES),
        ("qwen2", lambda: TorchDevice("cpu"), CASES),
        ("qwen2", StandInDevice, ("chunked",)),
    ],
    ids=["llama on torch", "qwen2 on torch", "qwen2 on the stand-in"],
)
def test_the_generic_backend_equals_transformers(
    kind: str, device: Callable[[], Device], cases: tuple[str, ...], models: Any, device_driver: MakeDriver
) -> None:
    folder, model = models[kind]
    reference, driver = Reference(model), device_driver(device(), folder)
    for case in cases:
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row


def test_bfloat16_masks_reach_the_device(models: Any, core_driver: MakeCore) -> None:
    """numpy has no bfloat16, so the biases of the attention travel as bits."""
    folder, _ = models["qwen2"]
    found = []
    for device in (None, TorchDevice("cpu")):
        driver = core_driver(device, folder, dtype="bfloat16", max_num_batched_tokens=128, rows=1)
        found.append(driver.run([(prompt, Sampling()) for prompt in prompts(1)[2:4]], 6))
    assert found[0] == found[1]


def test_masks_of_grammars_reach_the_device(models: Any, core_driver: MakeCore) -> None:
    """Their slots get the CPU's tokens, and so do those beside them."""
    folder, _ = models["llama"]
    digits = Grammar("regex", "[0-5]{3}(-[6-9]{2}){1,4}")
    found = []
    for device in (None, TorchDevice("cpu"), StandInDevice()):
        driver = core_driver(device, folder)
        found.append(driver.run(mixed_requests(SAMPLINGS + ON_HOST[:3], 16), 12, grammars=(None, digits)))
        assert driver.most_in_flight > 1
        if isinstance(device, StandInDevice):
            assert device.masked_rows > 0
    for tokens in found[0][1::2]:
        assert re.fullmatch("[0-5]{3}(-[6-9]{2}){1,4}", "".join(map(chr, tokens)))
    assert found[0] == found[1] == found[2]


def mixed_requests(samplings: list[Sampling], count: int = 10) -> list[tuple[list[int], Sampling]]:
    found = prompts(3)
    return [(found[i % len(found)] + [i], samplings[i % len(samplings)]) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samplings", [SAMPLINGS, SAMPLINGS + ON_HOST], ids=["device", "host"])
def test_a_core_that_runs_ahead_gets_the_cpus_tokens(
    kind: str, samplings: list[Sampling], models: Any, core_driver: MakeCore
) -> None:
    """Chunks, prefix hits, preemptions, bursts; results come after the next step has begun."""
    folder, _ = models[kind]
    requests = mixed_requests(samplings)
    options = {"rows": 5, "num_blocks": 34 if kind == "llama" else 65, "max_model_len": 100}
    expected = core_driver(None, folder, **options).run(requests, 20)
    device = StandInDevice(delay_s=0.05)
    driver = core_driver(device, folder, **options)
    assert driver.run(requests, 20) == expected
    assert driver.run(requests[:4], 20) == expected[:4], "with prefixes of the first time"
    assert driver.most_in_flight >= 2
    assert device.most_unready >= 2
    assert driver.stats.preemptions > 0
    assert driver.stats.prefix_hits > 0
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


def test_draft_tokens_are_verified_on_a_device(models: Any, core_driver: MakeCore) -> None:
    folder, _ = models["llama"]
    requests = [([5, 6, 7, 8, 5, 6, 7, 8, 5 + i], sampling) for i, sampling in enumerate(SAMPLINGS)]
    expected = core_driver(None, folder).run(requests, 30)
    guessing = {"speculative": "ngram", "num_speculative_tokens": 3}
    driver = core_driver(StandInDevice(), folder, **guessing)
    assert driver.run(requests, 30) == expected
    assert driver.stats.num_draft_tokens > 0
    assert driver.stats.num_accepted_tokens > 0


def test_adapters_in_one_batch(models: Any, tmp_path: Path, device_driver: MakeDriver) -> None:
    folder, model = models["llama"]
    one = write_adapter(tmp_path / "one", model, ("q_proj", "down_proj"), 1)
    driver = device_driver(StandInDevice(), folder)
    driver.executor.call("load_adapter", {"key": "one#1", "path": str(one)}).result()
    references = {"": Reference(model), "one#1": merged(model, one, 2.0)}
    requests = [Request(prompt, adapter=key) for prompt in prompts(1)[:4] for key in references]
    driver.run(requests, NEW, seed=3, preempt=0.4)
    for request in requests:
        assert request.output == references[request.adapter].run(request.prompt)[0], request
    driver.executor.call("unload_adapter", {"key": "one#1"}).result()
    after = Request(prompts(1)[1])
    driver.run([after], NEW, seed=4)
    assert after.output == references[""].run(after.prompt)[0]


def test_prompt_logprobs_are_those_of_the_cpu(models: Any, device_driver: MakeDriver) -> None:
    folder, _ = models["llama"]
    row = SlotAssignment(0, 1, column([5, 6, 7, 8]), 4, 0, (column([1]),), Sampling(prompt_logprobs=2))
    message = encode(StepMessage(0, assigned_slots=(row,), chunks=column([[0, 4]])))
    found = []
    for device in (StandInDevice(), TorchDevice("cpu")):
        executor = device_driver(device, folder).executor
        executor.submit(message)
        found.append(decode_result(executor.sample(0).result()))
    (first,), (second,) = (result.prompt_logprobs for result in found)
    assert first == second
    assert int32s(first.logprobs.index).tolist() == [1, 2, 3]
    assert found[0].tokens == found[1].tokens != b""


def assignment(slot: int, generation: int, block: int, prompt: list[int], **sampling: Any) -> SlotAssignment:
    blocks = column([block, block + 1])
    return SlotAssignment(slot, generation, column(prompt), len(prompt), 0, (blocks,), Sampling(**sampling))


def test_a_slot_is_reused_while_a_result_is_pending(models: Any, device_driver: MakeDriver) -> None:
    """The late token of the first request must not become one of the second."""
    device = StandInDevice()
    driver = device_driver(device, models["llama"][0])
    alone = Request([9, 8, 7])
    driver.run([alone], 4, seed=0, chunk=100, preempt=0.0)
    device.gate.clear()
    executor = driver.executor
    first, second = assignment(0, 50, 900, [5, 6, 7]), assignment(0, 51, 902, [9, 8, 7])
    messages = [
        StepMessage(0, assigned_slots=(first,), chunks=column([[0, 3]])),
        StepMessage(1),
        StepMessage(2, freed_slots=column([0]), assigned_slots=(second,), chunks=column([[0, 3]])),
        StepMessage(3),
        StepMessage(4),
        StepMessage(5),
    ]
    submitted, results = [], []
    for message in messages:
        submitted.append(executor.submit(encode(message)))
        results.append(executor.sample(message.step))
    for forward in submitted:
        forward.result(10)
    assert not any(result.done() for result in results)
    device.gate.set()
    tokens = [int32s(decode_result(result.result(10)).tokens).tolist() for result in results]
    assert [token for (token,) in tokens[2:]] == alone.output
    # What a penalty counts comes from the host's copy of the tokens.
    executor.submit(encode(StepMessage(6)))
    slots = executor._device_runner._slots
    executor.sample(6).result(10)
    assert slots.known_tokens(0)[:-1].tolist() == [9, 8, 7, *alone.output]


def test_a_burst_is_several_steps_in_one_message(models: Any, device_driver: MakeDriver) -> None:
    device = StandInDevice()
    driver = device_driver(device, models["llama"][0])
    waited = Request([5, 6, 7])
    driver.run([waited], 5, seed=0, chunk=100, preempt=0.0)
    executor = driver.executor
    rows = (assignment(0, 99, 900, [5, 6, 7]), assignment(1, 99, 902, [5]))
    executor.submit(encode(StepMessage(0, assigned_slots=rows, chunks=column([[0, 3], [1, 0]]))))
    results = [executor.sample(0)]
    device.gate.clear()
    executor.submit(encode(StepMessage(1, chunks=column([[1, 0]]), num_steps=4)))
    results += [executor.sample(step) for step in range(1, 5)]
    threading.Timer(0.05, device.gate.set).start()
    found = [decode_result(result.result(10)) for result in results]
    assert [result.step for result in found] == [0, 1, 2, 3, 4]
    assert [int32s(result.tokens).tolist() for result in found] == [[token] for token in waited.output]


def test_a_step_must_be_sampled_before_the_next(models: Any, device_driver: MakeDriver) -> None:
    executor = device_driver(StandInDevice(), models["llama"][0]).executor
    executor.submit(encode(StepMessage(0, assigned_slots=(assignment(0, 1, 1, [1]),)))).result()
    with pytest.raises(RuntimeError, match="step 0 hasn't been sampled"):
        executor.submit(encode(StepMessage(1))).result()
    with pytest.raises(RuntimeError, match="step 1 hasn't run"):
        executor.sample(1).result()


def test_a_failing_device_fails_the_results(models: Any, device_driver: MakeDriver) -> None:
    device = StandInDevice()
    executor = device_driver(device, models["llama"][0]).executor
    device.gate.clear()
    row = assignment(0, 1, 1, [1, 2])
    executor.submit(encode(StepMessage(0, assigned_slots=(row,), chunks=column([[0, 2]])))).result()
    pending = executor.sample(0)
    executor.submit(encode(StepMessage(1))).result()
    device.failure = RuntimeError("an illegal address was read")
    device.gate.set()
    with pytest.raises(RuntimeError, match="illegal address"):
        pending.result(10)
    with pytest.raises(RuntimeError, match="illegal address"):
        executor.sample(1).result(10)


def test_a_shutdown_waits_for_the_result_in_progress_and_drops_later_ones(
    models: Any, device_driver: MakeDriver
) -> None:
    device = StandInDevice()
    executor = device_driver(device, models["llama"][0]).executor
    device.gate.clear()
    row = assignment(0, 1, 1, [1, 2])
    executor.submit(encode(StepMessage(0, assigned_slots=(row,), chunks=column([[0, 2]])))).result()
    first = executor.sample(0)
    executor.submit(encode(StepMessage(1))).result()
    second = executor.sample(1)
    assert not first.done()
    threading.Timer(0.1, device.gate.set).start()
    executor.shutdown()
    assert decode_result(first.result(0)).step == 0
    with pytest.raises(CancelledError):
        second.result(0)


def test_a_step_is_one_copy_each_way(models: Any, device_driver: MakeDriver) -> None:
    device = StandInDevice()
    driver = device_driver(device, models["llama"][0])
    driver.run([Request([1, 2, 3])], 8, seed=0, chunk=0, preempt=0.0)
    assert (device.puts, device.fetches) == (8, 8)


@pytest.mark.parametrize(
    ("mistake", "refusal"),
    [
        (lambda inside, host: inside + host, "mixes tensors"),
        (lambda inside, host: inside[host > 0], "mixes tensors"),
        (lambda inside, host: inside.numpy(), "reads a tensor"),
        (lambda inside, host: bool((inside > 0).all()), "waits"),
        (lambda inside, host: inside[inside > 0], "waits"),
        (lambda inside, host: host.copy_(inside), "mixes tensors"),
    ],
)
def test_the_stand_in_refuses_what_a_device_would(mistake: Callable[..., Any], refusal: str) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        device = StandInDevice()
        device.bind_thread()
        host = torch.arange(4.0)
        inside = device.place(host)
        assert (inside * 2 + torch.zeros(4, device=host.device)).sum().ndim == 0
        try:
            mistake(inside, host)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert refusal in str(caught[0])
