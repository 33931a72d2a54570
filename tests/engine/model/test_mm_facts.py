"""What memory planning knows of the inputs of a model."""

from engine.config import EngineConfig
from engine.data import known_models
from engine.model.mm_facts import MMFacts
from engine.model.model_info import read_model_info

QWEN = "Qwen/Qwen2-VL-7B-Instruct"


def facts(**options: object) -> MMFacts:
    config = EngineConfig(model=str(known_models()[QWEN]), load_format="dummy", **options)  # type: ignore[arg-type]
    found = read_model_info(config).mm
    assert found is not None
    return found


def test_no_input_has_more_tokens_than_a_request() -> None:
    assert facts().spec.most_tokens == {"image": 1280, "video": 16 * 768}
    assert facts(max_model_len=1000).spec.most_tokens == {"image": 1000, "video": 1000}


def test_kinds_that_no_prompt_may_have_need_no_memory() -> None:
    without = facts(limit_mm_per_prompt="video=0")
    assert without.most_tokens == 1280
    assert without.encoder_workspace < facts().encoder_workspace


def test_long_videos_need_the_memory_of_some_of_their_frames() -> None:
    """Of 12,288 embeddings, 1,280 at once: patches of 1,280 numbers in bfloat16, about 20 times, and the output."""
    patches, output = 1280 * 4, 12_288 * 3584 * 2
    assert facts().encoder_workspace == patches * 2 * (9 * 1280 + 2 * 4 * 1280) + output
