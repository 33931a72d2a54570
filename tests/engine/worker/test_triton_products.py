"""A tiny Llama with quantized weights in the stack of interpreted kernels equals transformers with the same weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from engine.errors import ConfigError
from engine.kernels.quantization import quantize
from engine.kernels.triton import launch
from engine.kernels.triton.fp8 import reference
from engine.messages import Sampling
from engine.model.linears import quantizable_linears
from engine.model.loading.open_model import open_model
from engine.worker.linear_products import quantize_linears
from engine.worker.torch_device import TorchDevice
from engine.worker.triton_products import Fp8Format, Fp8Product, quantized_formats
from engine.worker.triton_stack import make_stack
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, configure, make_device_driver, start_executor
from tests.engine.worker.driver import VOCAB, Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.parity import Reference, check_briefly, merged, prompts
from tests.engine.worker.stand_in_device import StandInDevice

quick.patch()

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def quantized_model(kind: str, quantization: str, folder: Path, **more: Any) -> tuple[Any, Any]:
    """A tiny model as it is saved, and with the numbers of its quantized weights."""
    original, rounded = (build_model(kind, folder, **SIZES, **more) for _ in range(2))
    if original.config.tie_word_embeddings:
        rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.clone())
    linears = quantizable_linears(rounded)
    assert not isinstance(linears, str)
    with torch.no_grad():
        for path, linear in linears.items():
            form = "int8" if path == "lm_head" else quantization
            linear.weight.copy_(quantize(linear.weight, form).dequantize())
    return original, rounded


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    executors: list[Any] = []

    def make(folder: Path, **options: Any) -> Driver:
        driver = make_device_driver(TorchDevice("cpu"), folder, use_triton=True, **options)
        executors.append(driver.executor)
        return driver

    yield make
    for executor in executors:
        executor.shutdown()


@pytest.mark.parametrize(
    ("kind", "quantization", "kernels"),
    [
        ("llama", "int8", "triton, fused stack"),
        ("qwen2", "int4", "triton, fused stack"),  # with biases
        ("granite", "int8", "triton (the kernels do not support models of type 'granite')"),
        ("glm4", "int4", "triton (the kernels do not support models of type 'glm4')"),  # gate and up are one linear
    ],
)
def test_quantized_weights_equal_transformers(
    kind: str, quantization: str, kernels: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    """Sums in float32 in another order, as without quantization: the same tolerance. Prompts exceed FEW_ROWS tokens."""
    _, rounded = quantized_model(kind, quantization, tmp_path)
    driver = make_driver(tmp_path, quantization=quantization)
    assert driver.executor.kernels == kernels
    check_briefly(driver, Reference(rounded), seed=2, chunk=0)


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_a_tied_embedding_stays_as_it_is(kind: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    _, rounded = quantized_model(kind, "int8", tmp_path, tie_word_embeddings=True)
    request, reference = Request(prompts(1)[2]), Reference(rounded)
    make_driver(tmp_path, quantization="int8").run([request], 3, seed=1)
    assert request.output == reference.run(request.prompt)[0][:3]


def test_adapters_on_quantized_weights(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    original, rounded = quantized_model("llama", "int4", tmp_path / "model")
    folder = write_adapter(tmp_path / "all", original, LLAMA, seed=1)
    driver = make_driver(tmp_path / "model", quantization="int4")
    driver.executor.call("load_adapter", {"key": folder.name, "path": str(folder)}).result()
    references = {"": Reference(rounded), folder.name: merged(rounded, folder, 2.0)}
    requests = [Request(prompts(1)[2], adapter=key) for key in references]
    driver.run(requests, 4, seed=3)
    for request in requests:
        assert request.output == references[request.adapter].run(request.prompt)[0][:4], request
    assert requests[0].output != requests[1].output


@pytest.mark.parametrize(("kind", "load_format"), [("llama", "auto"), ("llama", "dummy"), ("granite", "auto")])
def test_nothing_of_the_host_meets_the_device(
    kind: str, load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(kind, tmp_path, **SIZES)
    stand_in = StandInDevice()
    monkeypatch.setattr(launch, "place_of", stand_in.place_of)
    options = {"quantization": "int8", "kv_cache_dtype": "int8", "load_format": load_format, "max_model_len": 100}
    executor, resolved = start_executor(stand_in, tmp_path, use_triton=True, **options)
    try:
        found = CoreDriver(executor, resolved).run([([1, 2, 3], Sampling())], 3)
    finally:
        executor.shutdown()
    assert [len(one) for one in found] == [3]


def reference_product(self: Fp8Product, x: torch.Tensor) -> torch.Tensor:
    """A product in fp8 in float32, but for the rounding of activations and of the result."""
    scales = x.float().abs().amax(1) / 448
    values = (x.float() / scales[:, None]).to(torch.float8_e4m3fn)
    return reference(values, scales, self.weight).to(x.dtype)


def test_fp8_weights(tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by `torch._scaled_mm` itself, which the CPU has too, against those of the reference.

    Sums in another order can round to the next number of bfloat16, and that can move an activation to the next number
    of e4m3, so a few log-probabilities differ; far less than from those of the weights before they were quantized.
    """
    plain = Reference(build_model("llama", tmp_path, **SIZES))
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(Fp8Product, "__call__", reference_product)
        driver = make_driver(tmp_path, quantization="fp8", dtype="bfloat16")
        assert driver.executor.kernels == "triton, fused stack"
        requests = [Request(prompt, Sampling(logprobs=VOCAB)) for prompt in prompts(1)[1:3]]
        driver.run(requests, 1, seed=1)
        found.append([torch.tensor([one.logprobs[0][token] for token in range(VOCAB)]) for one in requests])
    unquantized = [plain.run(prompt)[1][0] for prompt in prompts(1)[1:3]]
    errors = [float((torch.stack(found[0]) - torch.stack(other)).abs().mean()) for other in (found[1], unquantized)]
    assert errors[0] < 0.25 * errors[1], errors
    assert errors[1] < 1.0, errors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "granite"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_weights_are_counted_as_the_device_holds_them(quantization: str, kind: str, tied: bool, tmp_path: Path) -> None:
    build_model(kind, tmp_path, **SIZES, tie_word_embeddings=tied)
    config, model_info, _ = configure(tmp_path, dtype="bfloat16", quantization=quantization)
    meta_model, device = open_model(config, model_info), TorchDevice("cpu")
    formats = quantized_formats(quantization, torch.bfloat16, device)
    if kind == "qwen3":
        stack = make_stack(meta_model.model, model_info.kv_groups, 10, torch.clone, meta_model.fill, formats)
        held = [stack.embedding, stack.final_norm, *_tensors(stack.head)]
        for layer in stack.layers:
            held += [layer.input_norm, layer.post_norm, *(layer.norms or ())]
            held += [tensor for linear in layer.linears for tensor in _tensors(linear.product)]
    else:
        quantize_linears(meta_model.model, formats, meta_model.fill)
        meta_model.fill()
        linears = [one for one in meta_model.model.modules() if isinstance(one, nn.Linear)]
        held = [*meta_model.model.parameters()]
        held += [tensor for linear in linears for tensor in _tensors(cast("Any", linear.forward).product)]
    meta_model.close()
    assert sum(tensor.nbytes for tensor in held) == model_info.weight_bytes


def _tensors(product: Any) -> list[torch.Tensor]:
    weight = product.weight
    return [found for name in weight.__slots__ if (found := getattr(weight, name)) is not None]


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_products_have_biases(quantization: str, rows: int) -> None:
    dtype = torch.bfloat16 if quantization == "fp8" else torch.float32
    weight, bias, x = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype), torch.randn(rows, 64).to(dtype)
    form = Fp8Format() if quantization == "fp8" else quantized_formats(quantization, dtype, TorchDevice("cpu")).layers
    with_bias, without = form.make(weight, bias)(x), form.make(weight, None)(x)
    torch.testing.assert_close(with_bias, without + bias)
    assert (without.float() - x.float() @ weight.float().T).abs().max() < 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"quantization": "int8"}, "model.layers.0.self_attn.q_proj: 32 inputs are not a multiple of 64"),
        ("mixtral", {"quantization": "int8"}, "mlp.gate.weight does not belong to a linear"),
        ("llama", {"quantization": "fp8"}, "--quantization fp8 needs --dtype bfloat16, not float32"),
        (
            "llama",
            {"quantization": "fp8", "dtype": "bfloat16", "intermediate_size": 40},
            "mlp.gate_proj: fp8 products need inputs and outputs in multiples of 16, not 32 and 40",
        ),
    ],
)
def test_refusals(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = dict(options)
    sizes = {name: options.pop(name) for name in ("intermediate_size",) if name in options}
    build_model(kind, tmp_path, **{"num_hidden_layers": 2, **sizes})
    with pytest.raises(ConfigError, match=message):
        start_executor(TorchDevice("cpu"), tmp_path, use_triton=True, **options)


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "fp8"}])
def test_kernels_in_torch_have_no_quantized_forms(options: dict[str, Any], tmp_path: Path) -> None:
    build_model("llama", tmp_path, **SIZES)
    with pytest.raises(ConfigError, match="needs the Triton kernels"):
        start_executor(TorchDevice("cpu"), tmp_path, **options)
