"""Configs of models with encoders: sizes are those of the decoder, weights those of the whole class."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.data import known_models
from engine.errors import ModelError
from engine.model.mm_facts import MMFacts
from engine.model.model_info import read_hf_config, read_model_info, weight_shapes
from tests.engine.multimodal.tiny_vision import write_model
from tests.engine.worker.mm_model import TEXT
from tests.engine.worker.mm_models_llava import CLIP, IMAGE, build_llava

LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": IMAGE,
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": CLIP,
}


def dummy(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(config or LLAVA))
    return EngineConfig(model=str(folder), load_format="dummy", **{"dtype": "float32", **options})


def test_sizes_of_the_decoder_and_weights_of_all(tmp_path: Path) -> None:
    model = build_llava(tmp_path)
    info = read_model_info(EngineConfig(model=str(tmp_path)))
    assert (info.vocab_size, info.num_layers, info.num_kv_heads, info.hidden_size) == (128, 2, 2, 32)
    assert info.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert info.max_model_len == 512
    assert info.architecture == "LlavaForConditionalGeneration"


def test_facts_about_inputs(tmp_path: Path) -> None:
    mm = read_model_info(dummy(tmp_path)).mm
    assert mm is not None
    assert (mm.spec.family, mm.spec.placeholders, mm.spec.most_tokens) == ("llava", {"image": IMAGE}, {"image": 16})
    assert mm.embedding_ids == {IMAGE}
    assert mm.embedding_bytes == 32 * 4
    assert mm.encoder_workspace > 16 * 32 * 4
    assert mm.unsplit_tokens == 0


def test_fewer_layers_are_those_of_the_decoder(tmp_path: Path) -> None:
    config = dummy(tmp_path, num_layers=1)
    hf_config = read_hf_config(tmp_path, config)
    assert (hf_config.text_config.num_hidden_layers, hf_config.vision_config.num_hidden_layers) == (1, 3)
    assert read_model_info(config).num_layers == 1


def test_only_the_decoder_is_quantized(tmp_path: Path) -> None:
    plain, small = (
        read_model_info(dummy(tmp_path, dtype="bfloat16", quantization=kind)).weight_bytes for kind in (None, "int8")
    )
    config = {**LLAVA, "vision_config": {**CLIP, "num_hidden_layers": 6}}
    more, more_small = (
        read_model_info(dummy(tmp_path, config, dtype="bfloat16", quantization=kind)).weight_bytes
        for kind in (None, "int8")
    )
    assert small < plain
    assert more - plain == more_small - small > 0


def test_weights_of_encoders_are_not_taken_for_those_of_the_decoder(tmp_path: Path) -> None:
    config = dummy(tmp_path)
    names = weight_shapes(config, read_model_info(config))
    decoder = [name for name in names if name.endswith("layers.0.self_attn.q_proj.weight")]
    assert decoder == ["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert any("vision_tower" in name for name in names)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 3}, r"text_config\.num_attention_heads \(3\)"),
        ({"hidden_size": "wide"}, r"text_config\.hidden_size must be an integer"),
        ({"hidden_act": "nothing"}, r"text_config\.hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
        ({"model_type": "qwen3_next"}, "linear_attention"),
    ],
)
def test_a_decoder_that_cannot_run_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    config = {**LLAVA, "text_config": {**LLAVA["text_config"], **change}}
    with pytest.raises(ModelError, match=says):
        read_model_info(dummy(tmp_path, config))


QWEN = "Qwen/Qwen2-VL-7B-Instruct"


def qwen(**options: object) -> MMFacts:
    config = EngineConfig(model=str(known_models()[QWEN]), load_format="dummy", **options)  # type: ignore[arg-type]
    found = read_model_info(config).mm
    assert found is not None
    return found


def test_no_input_has_more_tokens_than_a_request() -> None:
    assert qwen().spec.most_tokens == {"image": 1280, "video": 16 * 768}
    assert qwen(media_limits={"video_frames": 65}).spec.most_tokens == {"image": 1280, "video": 33 * 768}
    assert qwen(max_model_len=1000).spec.most_tokens == {"image": 1000, "video": 1000}


def test_kinds_that_no_prompt_may_have_need_no_memory() -> None:
    without = qwen(limit_mm_per_prompt="video=0")
    assert without.most_tokens == 1280
    assert without.encoder_workspace < qwen().encoder_workspace


def test_long_videos_need_the_memory_of_some_of_their_frames() -> None:
    """Of 12,288 embeddings, 1,280 at once: patches of 1,280 numbers in bfloat16, about 20 times, and the output."""
    patches, output = 1280 * 4, 12_288 * 3584 * 2
    assert qwen().encoder_workspace == patches * 2 * (9 * 1280 + 2 * 4 * 1280) + output


def test_a_kind_whose_token_the_tokenizer_lacks_is_not_taken(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "internvl")
    with_token = read_model_info(EngineConfig(model=str(folder), load_format="dummy"))
    assert with_token.mm is not None
    assert with_token.mm.spec.placeholders == {"image": 258, "video": 259}
    assert with_token.mm.embedding_ids == {258}
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<video>"', '"<film>"'))
    without = read_model_info(EngineConfig(model=str(folder), load_format="dummy"))
    assert without.mm is not None
    assert without.mm.spec.placeholders == {"image": 258}
    says = "videos are refused: the tokenizer has no token <video>, which stands for one in a prompt"
    assert says in without.warnings
    assert says not in with_token.warnings
