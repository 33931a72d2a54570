"""How memory is divided, and what is said when it doesn't suffice."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.devices import cpu
from engine.errors import ConfigError, OutOfMemoryError
from engine.memory import resolve
from engine.model.mm_facts import MMFacts
from engine.model.model_info import ModelInfo, read_model_info
from engine.multimodal.types import MMSpec
from engine.pooling import PoolingSpec
from tests.engine.worker.driver import BASE

GIB = 1 << 30


def make_facts(**changes: Any) -> ModelInfo:
    values: dict[str, Any] = {
        "path": Path("model"),
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "vocab_size": 32000,
        "max_model_len": 2048,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "weight_bytes": 100 << 20,
        "kv_bytes_per_token": 2 * 4 * 2 * 64 * 4,
        "windows": (0, 0, 0, 0),
    }
    return ModelInfo(**{**values, **changes})


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def set_free(amount: int) -> None:
        monkeypatch.setattr(cpu, "available_memory", lambda: amount)

    return set_free


def test_the_pool_is_what_remains(free) -> None:
    free(2 * GIB)
    found = resolve(EngineConfig(model="m", max_num_seqs=128), make_facts())
    lines = {line.what: line.bytes for line in found.memory}
    assert lines["weights"] == 100 << 20
    block_bytes = make_facts().kv_bytes_per_token * found.config.block_size
    assert lines["KV cache"] == found.config.num_blocks * block_bytes
    assert 0 <= GIB - sum(lines.values()) < block_bytes
    assert all(line.flag.startswith("--") for line in found.memory)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefill_replicas": 1, "decode_replicas": 1}, "--prefill-replicas does not work here: .*: use --dp"),
        ({"kv_spill": "host=1MiB"}, "--kv-spill does not work with a model that pools: leave the flag out"),
    ],
)
def test_what_models_that_pool_do_not_work_with(options: dict[str, Any], said: str, free) -> None:
    free(2 * GIB)
    facts = make_facts(pooling=PoolingSpec("embed", "last", 512))
    assert resolve(EngineConfig(model="m"), facts).config.pools
    with pytest.raises(ConfigError, match=said):
        resolve(EngineConfig(model="m", **options), facts)


def test_prompts_in_transfer_have_a_share_of_the_memory(free) -> None:
    free(2 * GIB)
    roles: dict[str, Any] = {"prefill_replicas": 1, "decode_replicas": 1}
    plain = resolve(EngineConfig(model="m", max_num_seqs=128, data_parallel_size=2), make_facts())
    found = resolve(EngineConfig(model="m", max_num_seqs=128, replica=1, **roles), make_facts())
    lines = {line.what: line.bytes for line in found.memory}
    block_bytes = make_facts().kv_bytes_per_token * found.config.block_size
    assert (found.config.role, plain.config.role, plain.config.transfer_blocks) == ("decode", "", 0)
    assert lines["prompts in transfer"] == found.config.transfer_blocks * block_bytes
    assert found.config.transfer_blocks >= found.config.num_blocks // 8
    assert sum(lines.values()) <= sum(line.bytes for line in plain.memory)
    assert found.memory[-1].what == "KV cache"
    given = resolve(EngineConfig(model="m", kv_cache_memory_bytes=GIB // 2, **roles), make_facts())
    assert given.config.num_blocks == GIB // 4 // block_bytes
    assert given.config.transfer_blocks * given.config.block_size >= make_facts().max_model_len


def with_inputs(tokens: int, unsplit: int = 0) -> ModelInfo:
    spec = MMSpec("llava", {"image": 7}, {"image": tokens})
    return make_facts(mm=MMFacts(spec, frozenset({7}), 2048, 5 << 20, unsplit))


def test_embeddings_and_encoders_are_planned(free) -> None:
    free(2 * GIB)
    config = EngineConfig(model="m", max_num_seqs=4, max_num_batched_tokens=512)
    plain, small, large = (resolve(config, facts) for facts in (make_facts(), with_inputs(100), with_inputs(4000)))
    lines = {line.what: line.bytes for line in large.memory}
    assert lines["encoder cache"] == 4000 * 2048
    assert lines["encoder workspace"] == 5 << 20
    assert [one.config.encoder_cache_tokens for one in (plain, small, large)] == [0, 512, 4000]
    assert sum(lines.values()) <= GIB
    assert large.memory[-1].what == "KV cache"
    assert large.config.num_blocks <= plain.config.num_blocks


def test_ranks_have_an_encoder_cache_each(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", "num_key_value_heads": 2}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", tensor_parallel_size=2, max_num_batched_tokens=300)
    facts = dataclasses.replace(read_model_info(config), mm=with_inputs(100).mm)
    lines = {line.what: line.bytes for line in resolve(config, facts, 8 * GIB).memory}
    assert lines["encoder cache"] == 2 * 300 * 2048


def test_one_stage_has_an_encoder_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", "num_key_value_heads": 2}))
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", tensor_parallel_size=2, pipeline_parallel_size=2,
        max_num_batched_tokens=300,
    )  # fmt: skip
    facts = dataclasses.replace(read_model_info(config), mm=with_inputs(100).mm)
    lines = {line.what: line.bytes for line in resolve(config, facts, 8 * GIB).memory}
    assert lines["encoder cache"] == 2 * 300 * 2048
    assert lines["encoder workspace"] == 2 * (5 << 20)


def test_steps_hold_the_largest_input_that_cant_be_split(free) -> None:
    free(4 * GIB)
    found = resolve(EngineConfig(model="m", max_num_seqs=4), with_inputs(4000, unsplit=4000))
    assert found.config.max_num_batched_tokens == 4004
    assert not found.warnings
    narrow = resolve(EngineConfig(model="m", max_num_batched_tokens=1000), with_inputs(4000, unsplit=4000))
    assert "--max-num-batched-tokens 4000" in narrow.warnings[0]


def test_the_error_names_what_inputs_need(free) -> None:
    free(220 << 20)
    with pytest.raises(OutOfMemoryError, match="for images and audio"):
        resolve(EngineConfig(model="m", max_num_seqs=1), with_inputs(4000))


def test_the_pool_is_no_larger_than_all_rows_can_use(free) -> None:
    free(1000 * GIB)
    found = resolve(EngineConfig(model="m", max_num_seqs=3), make_facts()).config
    assert found.num_blocks == 3 * 2048 // 32 + 1


def test_given_bytes_are_taken_as_given(free) -> None:
    free(4 * GIB)
    config = EngineConfig(model="m", kv_cache_memory_bytes=GIB, max_num_seqs=1)
    found = resolve(config, make_facts())
    assert found.config.num_blocks == GIB // (make_facts().kv_bytes_per_token * 32)
    assert found.warnings == ()
    free(GIB)
    assert "--kv-cache-memory-bytes" in resolve(config, make_facts()).warnings[0]


def test_a_window_bounds_what_a_request_needs(free) -> None:
    """Half of the layers see 512 tokens: they keep those and what a step computes."""
    free(1000 * GIB)
    model_info = make_facts(windows=(512, 0, 512, 0), kv_bytes_per_token=2 * 2 * 2 * 64 * 4)
    found = resolve(EngineConfig(model="m", max_num_seqs=3), model_info)
    needed = 2048 // 32 + (512 + 128 - 2) // 32 + 2
    assert found.config.kv_windows == (0, 512)
    assert found.config.num_blocks == 3 * needed + 1
    assert found.sequences == 3
    enough = (needed + 1) * 32 * model_info.kv_bytes_per_token
    resolve(EngineConfig(model="m", max_num_seqs=3, kv_cache_memory_bytes=enough), model_info)
    with pytest.raises(OutOfMemoryError, match=f"--kv-cache-memory-bytes {enough} or --max-model-len 2016$"):
        resolve(EngineConfig(model="m", max_num_seqs=3, kv_cache_memory_bytes=enough - 1), model_info)


@given(st.one_of(st.none(), st.integers(1, 4000)), st.one_of(st.none(), st.integers(1, 4000)))
def test_every_row_has_a_token_of_the_budget(rows: int | None, budget: int | None) -> None:
    if rows is not None and budget is not None and budget < rows:
        return
    config = EngineConfig(model="m", max_num_seqs=rows, max_num_batched_tokens=budget, kv_cache_memory_bytes=1 << 34)
    found = resolve(config, make_facts()).config
    assert found.max_num_batched_tokens >= found.max_num_seqs >= 1
    assert rows is None or found.max_num_seqs == rows
    assert budget is None or found.max_num_batched_tokens == budget


def test_the_defaults(free) -> None:
    free(64 * GIB)
    found = resolve(EngineConfig(model="m"), make_facts()).config
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.block_size) == (96, 112, 32)


def test_too_few_bytes_name_values_that_work(free) -> None:
    free(4 * GIB)
    with pytest.raises(OutOfMemoryError) as caught:
        resolve(EngineConfig(model="m", kv_cache_memory_bytes=1 << 20), make_facts())
    message = str(caught.value)
    wanted = int(re.search(r"--kv-cache-memory-bytes (\d+) or", message)[1])
    length = int(re.search(r"--max-model-len (\d+)", message)[1])
    resolve(EngineConfig(model="m", kv_cache_memory_bytes=wanted), make_facts())
    resolve(EngineConfig(model="m", kv_cache_memory_bytes=1 << 20), make_facts(max_model_len=length))
    with pytest.raises(OutOfMemoryError):
        resolve(EngineConfig(model="m", kv_cache_memory_bytes=wanted - 1), make_facts())


def test_too_small_a_share_names_one_that_works(free) -> None:
    free(600 << 20)
    with pytest.raises(OutOfMemoryError) as caught:
        resolve(EngineConfig(model="m", gpu_memory_utilization=0.3), make_facts())
    share = float(re.search(r"--gpu-memory-utilization ([\d.]+)", str(caught.value))[1])
    resolve(EngineConfig(model="m", gpu_memory_utilization=share), make_facts())


def test_a_model_beyond_the_machine_says_what_it_needs(free) -> None:
    free(50 << 20)
    with pytest.raises(OutOfMemoryError, match="use a machine with"):
        resolve(EngineConfig(model="m"), make_facts())


def make_folder(folder: Path, kind: str) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": kind, "num_key_value_heads": 4}))
    return EngineConfig(model=str(folder), load_format="dummy", max_num_seqs=4)


@pytest.mark.parametrize("kind", ["llama", "flex_olmo"])
def test_ranks_share_the_machine(kind: str, tmp_path: Path, free) -> None:
    """What each rank has for itself counts once a rank; what they divide, once."""
    free(GIB)
    config = make_folder(tmp_path, kind)
    model_info = read_model_info(config)
    lines = {}
    for ranks in (1, 4):
        found = resolve(dataclasses.replace(config, tensor_parallel_size=ranks), model_info)
        lines[ranks] = {line.what: line.bytes for line in found.memory}
        block_bytes = model_info.kv_bytes_per_token * found.config.block_size * (ranks if kind == "flex_olmo" else 1)
        assert lines[ranks]["KV cache"] == found.config.num_blocks * block_bytes
    replicated = lines[4]["weights"] - lines[1]["weights"]
    assert 0 < replicated < model_info.weight_bytes / 5  # norms; the vocabulary is divided
    assert lines[1]["workspace"] < lines[4]["workspace"] < 4 * lines[1]["workspace"]


def test_stages_share_the_machine(tmp_path: Path, free) -> None:
    """All stages together hold the model once, but for an embedding that is also the head."""
    free(1 << 40)
    config = make_folder(tmp_path, "llama")
    model_info = read_model_info(config)
    alone = resolve(config, model_info)
    two = resolve(dataclasses.replace(config, pipeline_parallel_size=2), model_info)
    assert two.config.pipeline_stages == 2
    weights, alone_weights = (one.memory[0].bytes for one in (two, alone))
    assert weights == pytest.approx(alone_weights, rel=5e-3)
    assert two.memory[-1].bytes // two.config.num_blocks == alone.memory[-1].bytes // alone.config.num_blocks
    workspace, alone_workspace = (one.memory[1].bytes for one in (two, alone))
    assert workspace == 2 * alone_workspace


def test_each_rank_has_a_part_of_a_block(tmp_path: Path, free) -> None:
    """Of the size of its stage's layers; together they are the block."""
    free(1 << 40)
    config = make_folder(tmp_path, "llama")
    model_info = read_model_info(config)
    block = model_info.kv_bytes_per_token * 32
    for flags, parts in (
        ({}, [3]),
        ({"tensor_parallel_size": 2}, [1.5, 1.5]),
        ({"pipeline_parallel_size": 2}, [1, 2]),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0.5, 0.5, 1, 1]),
    ):
        found = resolve(dataclasses.replace(config, block_size=32, **flags), model_info).config  # type: ignore[arg-type]
        assert sorted(found.kv_part_bytes) == [part * block / 3 for part in parts]
        assert sum(found.kv_part_bytes) == block


def test_more_ranks_than_cores_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_folder(tmp_path, "llama")
    model_info = read_model_info(config)
    for cores, device, warned in ((2, "cpu (4 ranks of 1 thread)", True), (9, "cpu (4 ranks of 2 threads)", False)):
        monkeypatch.setattr(cpu, "cores", lambda cores=cores: cores)
        found = resolve(dataclasses.replace(config, tensor_parallel_size=4), model_info)
        assert found.device == device
        assert [f"--tp 4 on {cores} cores" in line for line in found.warnings] == [True] * warned


@pytest.mark.parametrize("given", [None, 64 << 20])
def test_replicas_divide_memory_and_kv_cache(given: int | None, free) -> None:
    free(4 * GIB)
    asked = EngineConfig(model="m", kv_cache_memory_bytes=given, max_num_seqs=128)
    alone = resolve(asked, make_facts())
    for replicas in (2, 4):
        each = resolve(dataclasses.replace(asked, data_parallel_size=replicas), make_facts())
        again = resolve(dataclasses.replace(asked, data_parallel_size=replicas), make_facts(), 4 * GIB // replicas)
        assert each == again, "what is free is the share of it, unless told"
        whole = {line.what: line.bytes for line in alone.memory}
        share = {line.what: line.bytes for line in each.memory}
        assert share["weights"] == whole["weights"]
        spent = replicas * sum(share.values()) if given is None else replicas * share["KV cache"]
        wanted = 2 * GIB if given is None else given
        block = make_facts().kv_bytes_per_token * 32
        assert 0 <= wanted - spent < replicas * block


def test_too_little_for_replicas_names_bytes_for_all_of_them(free) -> None:
    free(4 * GIB)
    asked = EngineConfig(model="m", kv_cache_memory_bytes=1 << 20, data_parallel_size=3)
    with pytest.raises(OutOfMemoryError, match=r"for each of 3 replicas .* or a lower --dp$") as caught:
        resolve(asked, make_facts())
    wanted = int(re.search(r"--kv-cache-memory-bytes (\d+) or", str(caught.value))[1])
    resolve(dataclasses.replace(asked, kv_cache_memory_bytes=wanted), make_facts())
    with pytest.raises(OutOfMemoryError):
        resolve(dataclasses.replace(asked, kv_cache_memory_bytes=wanted - 3), make_facts())


def test_more_replicas_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch, free) -> None:
    free(64 * GIB)
    for cores, device, warned in ((2, "cpu (1 thread)", 1), (9, "cpu (3 threads)", 0)):
        monkeypatch.setattr(cpu, "cores", lambda cores=cores: cores)
        found = resolve(EngineConfig(model="m", data_parallel_size=3), make_facts())
        assert found.device == device
        told = [line for line in found.warnings if "--dp" in line]
        assert told == [f"--dp 3 on {cores} cores: replicas share cores; use fewer"] * warned


def test_messages_name_the_flags_that_gave_the_number_of_replicas(monkeypatch: pytest.MonkeyPatch, free) -> None:
    free(64 * GIB)
    monkeypatch.setattr(cpu, "cores", lambda: 1)
    config = EngineConfig(model="m", prefill_replicas=1, decode_replicas=2)
    given = "--prefill-replicas 1 --decode-replicas 2"
    assert f"{given} on 1 core: replicas share cores; use fewer" in resolve(config, make_facts()).warnings
    small = dataclasses.replace(config, kv_cache_memory_bytes=3)
    with pytest.raises(OutOfMemoryError, match=r"or a lower --prefill-replicas or a lower --decode-replicas$"):
        resolve(small, make_facts())


def test_undivided_attention_is_warned_of(tmp_path: Path) -> None:
    config = dataclasses.replace(make_folder(tmp_path, "flex_olmo"), tensor_parallel_size=2)
    assert any("keeps the KV cache of all heads" in line for line in resolve(config, read_model_info(config)).warnings)


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(make_folder(tmp_path, "llama"), tensor_parallel_size=3)
    with pytest.raises(ConfigError, match=r"--tp 3.*4 heads and 4 KV heads.*use --tp 1, 2 or 4"):
        resolve(config, read_model_info(config))


def test_without_chunking_a_step_holds_the_longest_prompt(free) -> None:
    free(8 * GIB)
    model_info = make_facts()
    assert resolve(EngineConfig(model="m"), model_info).config.max_num_batched_tokens < model_info.max_model_len
    for fields in ({"engine": "v0"}, {"ablate": ("no-chunking",)}):
        found = resolve(EngineConfig(model="m", **fields), model_info).config
        assert found.max_num_batched_tokens == model_info.max_model_len
    with pytest.raises(ConfigError, match=r"\(1024\) must not be below --max-model-len \(2048\)"):
        resolve(EngineConfig(model="m", engine="v0", max_num_batched_tokens=1024), model_info)


def test_v0_caches_no_prefixes(free) -> None:
    free(8 * GIB)
    assert resolve(EngineConfig(model="m"), make_facts()).config.enable_prefix_caching
    assert not resolve(EngineConfig(model="m", engine="v0"), make_facts()).config.enable_prefix_caching
