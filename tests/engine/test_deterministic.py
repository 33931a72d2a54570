"""`--deterministic`: a request has the same bits alone, in a batch, in chunks, preempted and from the prefix cache.

All that the flag accepts is served by real cores and the real fused stack; what it refuses is refused with its flag.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.cpu import build
from tests.engine import invariance
from tests.engine.invariance import BATCH, BLOCK, SAMPLINGS, Probe, different, others, probes
from tests.engine.pooling_models import VOCABULARY, pooling_engine
from tests.engine.pooling_models import build as build_pooling
from tests.engine.worker.driver import build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.mm_driver import Prompts
from tests.engine.worker.mm_model import widened
from tests.engine.worker.mm_models import MM_MODELS

pytestmark = pytest.mark.skipif(not build.supported_isas(), reason="the fused stack needs AVX2")

VOCAB = 1000
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.05,
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
EIGHT_BITS = {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by family."""
    made = {}
    for kind, more in (("llama", PLAIN), ("mistral", {"sliding_window": 530}), ("qwen3", {})):
        made[kind] = tmp_path_factory.mktemp(kind)
        model = build_model(kind, made[kind], **SHAPE, **more)
        if kind == "llama":
            for number, names in enumerate((LLAMA, LLAMA[:2])):
                write_adapter(made[kind] / f"adapter-{number}", model, names, number)
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"dtype": "float32"}),
        ("mistral", {"dtype": "bfloat16"}),
        ("mistral", EIGHT_BITS),
        ("qwen3", {"dtype": "bfloat16", "quantization": "int4"}),
        ("llama", {"dtype": "bfloat16", "ablate": ("prefill-first", "full-state", "watermark")}),
        ("llama", {"dtype": "bfloat16", "tensor_parallel_size": 2}),
    ],
    ids=["float32", "bfloat16", "int8", "int4", "parts of v0", "two ranks"],
)
def test_bits_do_not_depend_on_what_else_is_served(
    kind: str, options: dict[str, Any], folders: dict[str, Path]
) -> None:
    kinds = probes(VOCAB)
    rest = others(BATCH - len(kinds), VOCAB)
    assert different(folders[kind], kinds, rest, deterministic=True, **options) == []


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, EIGHT_BITS], ids=["bfloat16", "int8"])
def test_neither_do_they_with_adapters_in_the_batch(options: dict[str, Any], folders: dict[str, Path]) -> None:
    paths = {f"lora-{number}": folders["llama"] / f"adapter-{number}" for number in range(2)}
    names = ["", *paths]
    kinds = probes(VOCAB, names)
    kinds["greedy, the base"] = Probe(kinds["greedy"].prompt[:200], SAMPLINGS["greedy with logprobs"])
    rest = others(BATCH - len(kinds), VOCAB, names)
    found = different(folders["llama"], kinds, rest, deterministic=True, adapters=paths, **options)
    assert found == []


def test_drafts_change_no_token(folders: dict[str, Path]) -> None:
    repeated = [5, 9, 7, 11] * 20
    kinds = {"greedy": Probe(repeated, SAMPLINGS["greedy"]), **probes(VOCAB)}
    rest = others(BATCH - len(kinds), VOCAB)
    options = {"dtype": "bfloat16", "speculative": "ngram", "num_speculative_tokens": 3}
    assert different(folders["llama"], kinds, rest, deterministic=True, **options) == []
    with invariance.large(folders["llama"], dtype="bfloat16") as served:
        (without,) = served.run([kinds["greedy"]])
    with invariance.large(folders["llama"], deterministic=True, **options) as served:
        (drafted,) = served.run([kinds["greedy"]])
        assert served.core.scheduler.stats(0.0).num_draft_tokens > 0
    assert drafted.bits == without.bits


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_nor_do_those_of_models_with_images(kind: str, tmp_path: Path) -> None:
    """Encoders are PyTorch's, but each input is encoded alone; qwen2_vl also has M-RoPE."""
    entry = MM_MODELS[kind]
    widened(entry.build(tmp_path), tmp_path)
    prompts = Prompts(tmp_path, entry)
    samplings = [SAMPLINGS[name] for name in ("greedy with logprobs", "drawn", "filtered")]
    kinds = {
        f"prompt {i}": Probe(one.prompt, samplings[i % 3], inputs=one.inputs) for i, one in enumerate(prompts.samples())
    }
    texts = [prompts.text(seed, 1 + seed * 17 % 90) for seed in range(BATCH - len(kinds))]
    rest = [Probe(text, samplings[i % 3]) for i, text in enumerate(texts)]
    found = different(tmp_path, kinds, rest, deterministic=True, dtype="bfloat16", max_model_len=256)
    assert found == []


@pytest.mark.parametrize(("kind", "dtype"), [("bert", "float32"), ("qwen3", "bfloat16")])
def test_vectors_have_the_same_bits_too(kind: str, dtype: str, tmp_path: Path) -> None:
    """Encoders are PyTorch's, but compute each prompt alone; the decoder's prompts share a beginning, and chunks."""
    build_pooling(
        kind, tmp_path, hidden_size=128, intermediate_size=192, **({"head_dim": 32} if kind == "qwen3" else {})
    )
    luck = random.Random(5)
    beginning = luck.choices(range(2, VOCABULARY), k=20)
    prompts = [beginning + luck.choices(range(2, VOCABULARY), k=luck.randint(1, 40)) for _ in range(BATCH)]
    options = {"deterministic": True, "dtype": dtype, "runner": "pooling", "max_num_seqs": BATCH, "block_size": BLOCK}
    with pooling_engine(tmp_path, max_num_batched_tokens=8192, **options) as engine:
        alone = []
        for prompt in prompts:
            engine.core.scheduler.reset_prefix_cache()
            alone += engine.pool([prompt])
        engine.core.scheduler.reset_prefix_cache()
        answers = {"in a batch": engine.pool(prompts), "again": engine.pool(prompts)}
        assert (max(engine.cached.values()) >= BLOCK) == (kind == "qwen3")
    if kind == "qwen3":
        with pooling_engine(tmp_path, max_num_batched_tokens=BATCH + 7, **options) as engine:
            answers["in chunks"] = engine.pool(prompts)
    for condition, vectors in answers.items():
        assert [one.tobytes() for one in vectors] == [one.tobytes() for one in alone], condition


def test_the_comparison_sees_paths_that_do_depend_on_the_batch(folders: dict[str, Path]) -> None:
    """PyTorch's products, which the flag refuses."""
    kinds = probes(VOCAB)
    found = different(folders["llama"], kinds, others(BATCH - len(kinds), VOCAB), dtype="float32", kernels="torch")
    assert any(line.endswith("logprobs") for line in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "torch"}, "--deterministic needs the C[+][+] CPU kernels: --kernels torch"),
        ({"block_size": 8}, "--deterministic needs the C[+][+] CPU kernels: --block-size 8"),
        ({"dtype": "float16"}, "--deterministic needs the C[+][+] CPU kernels: .*float16"),
    ],
)
def test_a_path_of_pytorch_is_refused(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message), invariance.large(folders["llama"], deterministic=True, **options):
        pass


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_than_two_ranks_are_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"--deterministic does not work with --tp {ranks}: .* use --tp 2"):
        EngineConfig(model="any", deterministic=True, tensor_parallel_size=ranks)
