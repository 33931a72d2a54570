"""The in-process executor: order, errors, sampling under any schedule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.columns import column, float32s, int32s
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.memory import resolve
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.model.model_info import read_model_info
from engine.worker.in_process import InProcessExecutor
from tests.engine.worker.driver import BASE, Driver, Request, build_model

MakeDriver = Callable[..., Driver]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, build_model("llama", folder)


def seeded(count: int) -> list[Request]:
    params = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "presence_penalty": 0.5}
    return [Request([i + 1, 2, 3, 4, 5, 6, 7, 8, 9], Sampling(seed=1000 + i, **params)) for i in range(count)]


def test_seeded_rows_sample_the_same_tokens_under_any_schedule(llama: Any, make_driver: MakeDriver) -> None:
    driver = make_driver(llama[0], rows=5)
    alone = seeded(8)
    for request in alone:
        driver.run([request], 12, seed=0, chunk=100, preempt=0.0)
    for schedule in (1, 2):
        together = seeded(8)
        driver.run(together, 12, seed=schedule, chunk=3, preempt=0.4)
        assert [request.output for request in together] == [request.output for request in alone]
    assert driver.preemptions > 0
    assert len({tuple(request.output) for request in alone}) == 8


def test_logprobs_are_those_of_the_model(llama: Any, make_driver: MakeDriver) -> None:
    folder, model = llama
    executor = make_driver(folder).executor
    prompt = [3, 1, 4, 1, 5]
    row = SlotAssignment(2, 1, column(prompt), 5, 0, (column([1, 2]),), Sampling(logprobs=3))
    executor.submit(encode(StepMessage(0, assigned_slots=(row,), chunks=column([[2, 5]]))))
    table = decode_result(executor.sample(0).result()).logprobs
    assert table is not None
    expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].float(), -1)
    top = torch.topk(expected, 3)
    assert int32s(table.ids).tolist() == [int(top.indices[0]), *top.indices.tolist()]
    torch.testing.assert_close(torch.tensor(float32s(table.values))[1:], top.values, rtol=1e-4, atol=1e-4)
    assert int32s(table.ranks).tolist() == [1]


def test_a_step_of_which_no_row_samples_has_no_tokens(llama: Any, make_driver: MakeDriver) -> None:
    executor = make_driver(llama[0]).executor
    row = SlotAssignment(0, 1, column([1, 2, 3]), 3, 0, (column([1]),), Sampling())
    executor.submit(encode(StepMessage(0, assigned_slots=(row,), chunks=column([[0, 2]]))))
    result = decode_result(executor.sample(0).result())
    assert (result.step, result.tokens, result.logprobs) == (0, b"", None)
    assert result.seconds > 0
    executor.submit(encode(StepMessage(1, freed_slots=column([0]))))
    assert decode_result(executor.sample(1).result()).tokens == b""


def test_steps_run_ahead_of_their_results(llama: Any, make_driver: MakeDriver) -> None:
    """Several steps are handed over before any result is looked at: the worker feeds itself."""
    driver = make_driver(llama[0])
    waited = Request([5, 6, 7])
    driver.run([waited], 5, seed=0, chunk=100, preempt=0.0)
    executor = driver.executor
    row = SlotAssignment(0, 99, column([5, 6, 7]), 3, 0, (column([900, 901]),), Sampling())
    messages = [StepMessage(0, assigned_slots=(row,), chunks=column([[0, 3]])), *(StepMessage(i) for i in range(1, 5))]
    results = []
    for message in messages:
        executor.submit(encode(message))
        results.append(executor.sample(message.step))
    assert [int32s(decode_result(result.result()).tokens)[0] for result in results] == waited.output


def test_a_burst_is_several_steps_in_one_message(llama: Any, make_driver: MakeDriver) -> None:
    driver = make_driver(llama[0])
    waited = Request([5, 6, 7])
    driver.run([waited], 5, seed=0, chunk=100, preempt=0.0)
    executor = driver.executor
    row = SlotAssignment(0, 99, column([5, 6, 7]), 3, 0, (column([900, 901]),), Sampling())
    resting = SlotAssignment(1, 99, column([5]), 1, 0, (column([902]),), Sampling())
    executor.submit(encode(StepMessage(0, assigned_slots=(row, resting), chunks=column([[0, 3], [1, 0]]))))
    executor.sample(0).result()
    executor.submit(encode(StepMessage(1, chunks=column([[1, 0]]), num_steps=4)))
    results = [decode_result(executor.sample(step).result()) for step in range(1, 5)]
    assert [result.step for result in results] == [1, 2, 3, 4]
    assert [int32s(result.tokens).tolist() for result in results] == [[token] for token in waited.output[1:5]]


def test_a_step_must_be_sampled_before_the_next(llama: Any, make_driver: MakeDriver) -> None:
    executor = make_driver(llama[0]).executor
    row = SlotAssignment(0, 1, column([1]), 1, 0, (column([1]),), Sampling())
    executor.submit(encode(StepMessage(0, assigned_slots=(row,)))).result()
    with pytest.raises(RuntimeError, match="step 0 hasn't been sampled"):
        executor.submit(encode(StepMessage(1))).result()
    with pytest.raises(RuntimeError, match="step 1 hasn't run"):
        executor.sample(1).result()


def test_dummy_weights_follow_the_seed(tmp_path: Path, make_driver: MakeDriver) -> None:
    config = {**BASE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outputs = []
    for seed in (1, 1, 2):
        request = Request([1, 2, 3])
        make_driver(tmp_path, load_format="dummy", seed=seed, num_layers=2).run([request], 8, seed=0)
        outputs.append(request.output)
    assert outputs[0] == outputs[1] != outputs[2]


def start(config: EngineConfig) -> None:
    model_info = read_model_info(config)
    InProcessExecutor(config, model_info, resolve(config, model_info).config)


def test_a_class_beside_the_attention_interface_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gptj", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_positions": 64}))
    with pytest.raises(ModelError, match="doesn't fit the attention interface"):
        start(EngineConfig(model=str(tmp_path), load_format="dummy"))


def test_weights_that_do_not_fit_the_config_are_refused(llama: Any, tmp_path: Path) -> None:
    folder = llama[0]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 16}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="the weights can't be loaded"):
        start(EngineConfig(model=str(tmp_path)))


def test_missing_tensors_are_refused_not_made_up(llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = llama[0]
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.1.mlp" in name))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp"):
        start(EngineConfig(model=str(tmp_path)))


def test_the_start_up_ledger(llama: Any, make_driver: MakeDriver) -> None:
    seconds = make_driver(llama[0]).executor.seconds
    assert set(seconds) == {"import torch", "open model", "load weights", "prepare kernels"}
    assert all(value >= 0 for value in seconds.values())


def test_two_executors_in_one_process_keep_apart(llama: Any, make_driver: MakeDriver) -> None:
    first, second = make_driver(llama[0]), make_driver(llama[0])
    requests = [Request([9, 8, 7]), Request([9, 8, 7])]
    first.run(requests[:1], 6, seed=0)
    second.run(requests[1:], 6, seed=1)
    assert requests[0].output == requests[1].output
