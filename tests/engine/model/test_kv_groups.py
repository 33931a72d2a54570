"""Which layers share a block table, and that their windows are those that the classes see."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.families import FAMILIES
from engine.model.kv_groups import MOST_PADDING, NOWHERE, group_layers, groups_of_stage, layer_windows
from engine.model.loading.open_model import fill_and_check, open_model
from engine.model.model_info import read_hf_config, read_model_info
from engine.model.runtime import attention_interface
from tests.engine.worker.driver import MODELS, build_model


def test_windows_have_groups_of_as_many_layers_as_all_have() -> None:
    found = group_layers((9, 9, 0, 9, 9, 0))
    assert found.windows == (0, 9, 9)
    assert found.group_size == 2
    assert found.places == ((1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1))


def test_layers_that_see_alike_are_one_group() -> None:
    assert group_layers((0,) * 30).group_size == 30
    assert group_layers((9,) * 30).windows == (9,)


@given(st.lists(st.sampled_from([0, 0, 8, 16]), min_size=1, max_size=70))
def test_each_layer_has_a_place_of_its_own(windows: list[int]) -> None:
    found = group_layers(windows)
    assert len(set(found.places)) == len(windows)
    for window, (group, index) in zip(windows, found.places, strict=True):
        assert found.windows[group] == window
        assert 0 <= index < found.group_size
    assert len(found.windows) * found.group_size <= (1 + MOST_PADDING) * len(windows)
    assert list(found.windows) == sorted(found.windows)


@given(st.lists(st.sampled_from([0, 0, 8, 16]), min_size=1, max_size=40), st.data())
def test_a_stage_stores_its_own_layers_in_the_groups_of_all(windows: list[int], data: st.DataObject) -> None:
    whole = group_layers(windows)
    begin = data.draw(st.integers(0, len(windows) - 1))
    layers = range(begin, data.draw(st.integers(begin + 1, len(windows))))
    found = groups_of_stage(whole, layers)
    assert found.windows == whole.windows, "block tables are the same in all stages"
    assert found.group_size <= min(whole.group_size, len(layers))
    for layer, (group, index) in enumerate(found.places):
        if layer not in layers:
            assert (group, index) == NOWHERE
            continue
        assert group == whole.places[layer][0]
        assert 0 <= index < found.group_size
    own = found.places[layers.start : layers.stop]
    assert len(set(own)) == len(own)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_config_says_what_layers_see(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that saw less than its group keeps would waste memory, one that saw more isn't run."""
    build_model(kind, tmp_path, **{"sliding_window": 9, **MODELS[kind]})
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    model_info, seen = read_model_info(config), {}
    attend = attention_interface._paged_attention

    def watched(module: Any, *arguments: Any, **options: Any) -> Any:
        seen[module.layer_idx] = options.get("sliding_window") or 0
        return attend(module, *arguments, **options)

    monkeypatch.setattr(attention_interface, "_paged_attention", watched)
    meta_model = open_model(config, model_info)
    fill_and_check(meta_model, config, model_info)
    meta_model.close()
    assert tuple(seen[layer] for layer in range(model_info.num_layers)) == model_info.windows


def test_a_layer_that_sees_more_than_is_kept_isnt_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model("olmo3", tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32")
    monkeypatch.setattr("engine.model.model_info.layer_windows", lambda *_: (9, 9, 9))
    model_info = read_model_info(config)
    meta_model = open_model(config, model_info)
    with pytest.raises(ModelError, match="a layer attends to all tokens, but its config has a window of 9"):
        fill_and_check(meta_model, config, model_info)
    meta_model.close()


def test_no_window_is_kept_where_none_can_be_left(tmp_path: Path) -> None:
    build_model("mistral", tmp_path)
    config = EngineConfig(model=str(tmp_path))
    model = read_hf_config(tmp_path, config)
    assert layer_windows(model, 10) == (9, 9, 9)
    assert layer_windows(model, 9) == (0, 0, 0)
    model.model_type = "unheard-of"
    assert layer_windows(model, 10) == (0, 0, 0), "what no test covers keeps all"


def test_a_long_text_needs_no_more_than_its_window(tmp_path: Path) -> None:
    """16k tokens through a window of 4k in a cache that has no room for half of them, beside transformers."""
    from engine.frontend.sampling_params import SamplingParams
    from engine.llm import LLM

    window, length, block = 4096, 16384, 32
    model = build_model(
        "mistral", tmp_path, sliding_window=window, num_hidden_layers=2, max_position_embeddings=length, head_dim=16
    )
    prompt = torch.randint(0, 128, (length - 8,), generator=torch.Generator().manual_seed(1)).tolist()
    model_info = read_model_info(EngineConfig(model=str(tmp_path), dtype="float32"))
    blocks = (window + 128 - 2) // block + 2 + 1
    with LLM(
        str(tmp_path), dtype="float32", block_size=block, max_num_seqs=1, max_num_batched_tokens=128,
        kv_cache_memory_bytes=blocks * block * model_info.kv_bytes_per_token,
    ) as llm:  # fmt: skip
        found = llm.generate([prompt], SamplingParams(max_tokens=6, temperature=0))[0].outputs[0].token_ids
    with torch.inference_mode():
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
    assert blocks * block < length / 3
    assert list(found) == wanted
