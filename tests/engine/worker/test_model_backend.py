"""Which kernels compute a model, and the warnings if they are not the best ones."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.devices import cpu
from engine.errors import ConfigError
from engine.kernels.cpu import build, packed_files
from engine.kernels.cpu.build import BuildError
from engine.messages import Sampling
from tests.engine.worker.driver import VOCAB, Driver, Request, build_model
from tests.engine.worker.parity import Reference, compare, serve

ISA = next(iter(build.supported_isas()), None)

needs_kernels = pytest.mark.skipif(ISA is None, reason="the CPU kernels need AVX2 or NEON")


@needs_kernels
def test_a_llama_gets_the_fused_stack(tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    build_model("llama", tmp_path, head_dim=16)
    executor = make_driver(tmp_path, block_size=16).executor
    assert executor.kernels == f"{ISA}, fused stack"
    assert executor.warnings == ()


@needs_kernels
@pytest.mark.parametrize(("kind", "groups"), [("mistral", 1), ("qwen2", 3)])
def test_the_fused_stack_has_a_table_for_each_kv_group(
    kind: str, groups: int, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    reference = Reference(build_model(kind, tmp_path, head_dim=16, hidden_size=64))
    driver = make_driver(tmp_path, block_size=16)
    assert "fused" in driver.executor.kernels
    assert len(driver.windows) == groups
    found = compare(kind, "chunked", serve(driver, "chunked"), reference)
    assert found.passed, found.note


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gpt2", {}, "type 'gpt2'"),
        ("llama", {"block_size": 8}, "--block-size 8"),
        ("llama", {"dtype": "float16"}, "float16"),
        ("llama", {"kernels": "torch"}, "--kernels torch"),
    ],
)
def test_others_go_through_torch_and_the_table_says_why(
    kind: str,
    options: dict[str, object],
    said: str,
    tmp_path: Path,
    make_driver: Callable[..., Driver],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "FAST_DTYPES", {})  # any CPU computes float16 fast enough
    build_model(kind, tmp_path, **({"head_dim": 16} if kind == "llama" else {}))
    executor = make_driver(tmp_path, **{"block_size": 16, **options}).executor
    assert executor.kernels.startswith("torch (")
    assert said in executor.kernels
    assert executor.warnings == (), "that is as it should be"


@needs_kernels
@pytest.mark.parametrize(("kernels", "warnings"), [("auto", 0), ("torch", 1)])
def test_a_slow_dtype_is_a_warning_only_with_torch(
    kernels: str,
    warnings: int,
    tmp_path: Path,
    make_driver: Callable[..., Driver],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cpu.FAST_DTYPES, "bfloat16", {"a feature that no CPU has"})
    build_model("llama", tmp_path, head_dim=16)
    found = make_driver(tmp_path, block_size=16, dtype="bfloat16", kernels=kernels).executor.warnings
    assert len(found) == warnings
    assert all("PyTorch computes bfloat16 slowly" in warning for warning in found)


@needs_kernels
def test_without_a_compiler_torch_computes_and_warns(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(build, "library", fail)
    build_model("llama", tmp_path, head_dim=16)
    driver = make_driver(tmp_path, block_size=16)
    assert len(driver.executor.warnings) == 1
    assert "no C++ compiler" in driver.executor.warnings[0]
    request = Request([1, 2, 3])
    driver.run([request], 4, seed=1)
    assert len(request.output) == 4
    with pytest.raises(ConfigError, match=f"--kernels {ISA}: there is no C"):
        make_driver(tmp_path, block_size=16, kernels=ISA)


@needs_kernels
def test_a_compiler_that_does_not_know_the_newest_isa_makes_the_next(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, needs = build.ISAS["avx2"]
    newest = {"newest": (("-march=nonsense",), needs)}
    monkeypatch.setattr(build, "ISAS", newest | {"avx2": (flags, needs)})
    build_model("llama", tmp_path, head_dim=16)
    executor = make_driver(tmp_path, block_size=16).executor
    assert executor.kernels == "avx2, fused stack"
    assert executor.warnings == ()


def test_an_old_machine_computes_with_torch_and_warns(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpu_features", frozenset)
    build_model("llama", tmp_path, head_dim=16)
    executor = make_driver(tmp_path, block_size=16).executor
    assert executor.kernels.startswith("torch (")
    assert "AVX2" in executor.warnings[0]
    with pytest.raises(ConfigError, match="lacks avx2"):
        make_driver(tmp_path, block_size=16, kernels="avx2")


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("gpt2", {"quantization": "int8"}, "--quantization int8 needs .* 'gpt2'"),
        ("gpt2", {"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8 needs .* 'gpt2'"),
        ("llama", {"quantization": "int8", "dtype": "float32"}, "int8 weights only with --dtype bfloat16"),
        ("llama", {"quantization": "int8", "dtype": "bfloat16"}, "hidden size of 32 elements is not a multiple of 64"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    kind: str, options: dict[str, object], said: str, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    build_model(kind, tmp_path, **({"head_dim": 16} if kind == "llama" else {}))
    with pytest.raises(ConfigError, match=said):
        make_driver(tmp_path, **{"block_size": 16, **options})


@needs_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_models_answer(quantization: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    build_model("llama", tmp_path, head_dim=16, hidden_size=64, intermediate_size=128)
    driver = make_driver(tmp_path, block_size=16, dtype="bfloat16", quantization=quantization, kv_cache_dtype="int8")
    requests = [Request([1, 2, 3]), Request(list(range(40)))]
    driver.run(requests, 6, seed=1)
    assert [len(request.output) for request in requests] == [6, 6]


@pytest.mark.parametrize(("kernels", "block_size"), [("torch", 4), pytest.param("auto", 16, marks=needs_kernels)])
def test_what_a_row_samples_does_not_depend_on_its_neighbours(
    kernels: str, block_size: int, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    """Greedy rows, draws, filters, logprobs, guesses: each may take another way to its tokens."""
    build_model("llama", tmp_path, head_dim=16)
    kinds = [
        Sampling(),
        Sampling(temperature=1.0, seed=2),
        Sampling(temperature=0.5, seed=2**64 - 1),
        Sampling(temperature=0.8, top_p=0.9, seed=4),
        Sampling(logprobs=2),
        Sampling(temperature=1.0, seed=2, logprobs=0),
        Sampling(temperature=0.7, presence_penalty=1.0, seed=5),
    ]
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5 + i] for i in range(len(kinds))]
    guessing = {"speculative": "ngram", "num_speculative_tokens": 3}
    outputs = []
    for options, together in (({}, True), (guessing, True), ({}, False)):
        driver = make_driver(tmp_path, block_size=block_size, kernels=kernels, **options)
        requests = [Request(prompt, kind) for prompt, kind in zip(prompts, kinds, strict=True)]
        for group in [requests] if together else [[request] for request in requests]:
            driver.run(group, 24, seed=3)
        outputs.append([request.output[:24] for request in requests])
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0][0] != outputs[0][1]


@needs_kernels
def test_a_checkpoint_that_was_replaced_is_not_read_from_packed_files(
    tmp_path: Path, make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logprobs(folder: Path | None) -> list[dict[int, float]]:
        monkeypatch.setattr(packed_files, "default_folder", lambda: folder)
        request = Request([1, 2, 3], Sampling(logprobs=VOCAB))
        make_driver(tmp_path, block_size=16, dtype="bfloat16", quantization="int4").run([request], 4, seed=0)
        return request.logprobs

    model = build_model("llama", tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    file, kept = tmp_path / "model.safetensors", tmp_path / "packed"
    before, status = logprobs(kept), file.stat()
    names = set(kept.iterdir())
    assert names
    assert logprobs(kept) == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 9] += 2
    model.save_pretrained(tmp_path)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    after = logprobs(kept)
    assert after != before
    assert after == logprobs(None)
    assert len(set(kept.iterdir()) - names) == 1, "only that weight was packed anew"
