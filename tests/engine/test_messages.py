"""Messages survive the wire, and stay as small as the design promises."""

import msgspec
import pytest

from engine.columns import column, float32s, int32s, int64s
from engine.logprob_columns import TokenLogprobs
from engine.messages import (
    Abort,
    AddRequest,
    Admitted,
    Dead,
    Finished,
    FinishReason,
    FromCore,
    Hung,
    MMInputRef,
    Outputs,
    Sampling,
    Shutdown,
    SlotAssignment,
    StepMessage,
    StepResult,
    TextOptions,
    ToCore,
    Utility,
    UtilityResult,
    decode_from_core,
    decode_result,
    decode_step,
    decode_to_core,
    encode,
    front_end_of,
    make_handle,
)
from engine.stats import Stats

# Fields of Sampling that alone need no logits of sampled tokens, with values that are not the defaults. Temperature and
# seed are handled by `ModelBackend.choose`; min_tokens and stop_ids only have an effect together; prompt_logprobs are
# computed apart.
WITHOUT_LOGITS: dict[str, object] = {
    "temperature": 0.5,
    "seed": 7,
    "min_tokens": 3,
    "stop_ids": (2,),
    "prompt_logprobs": 2,
}
# All others, each with values that change what a request at temperature 1 samples.
WITH_LOGITS: dict[str, dict[str, object]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "logprobs": {"logprobs": 0},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": ((4, 1.0),)},
    "allowed": {"allowed": column([4])},
    "bad_words": {"bad_words": ((4,),)},
    "min_tokens with stop_ids": {"min_tokens": 3, "stop_ids": (2,)},
}

LOGPROBS = TokenLogprobs(2, column([0]), column([[5, 6]]), column([[-0.5, -1.5]], "<f4"), column([1]))


@pytest.mark.parametrize(
    "message",
    [
        AddRequest(make_handle(3, 9), column([1, 2, 3]), 16, Sampling(temperature=0.5, seed=2**64 - 1), (2,)),
        AddRequest(1, column([1]), 1, Sampling(logit_bias=((4, -100.0),)), (), 0, 2, "salt", "adapter"),
        AddRequest(1, column([1, 1, 2]), 1, Sampling(), mm_inputs=(MMInputRef(b"hash", 0, 2, True),)),
        Abort((1, 2)),
        Utility(0, 1, "reset_prefix_cache", {"a": 1}),
        AddRequest(
            1, b"", 5, Sampling(), text="é", add_special_tokens=False, text_options=TextOptions(("a", "b"), True, False)
        ),
        Shutdown(1.5),
    ],
)
def test_messages_to_the_core_survive_the_wire(message: ToCore):
    assert decode_to_core(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Outputs(1.0, column([7], "<i8"), column([3]), finished=(Finished(7, FinishReason.STOP, 3),), stats=Stats(1)),
        Outputs(1.0, admitted=(Admitted(1, 16, 0.25),), logprobs=LOGPROBS),
        UtilityResult(1, 5),
        Outputs(1.0, column([7], "<i8"), column([3]), texts=("é",), finished=(Finished(7, 0, stop="a", text="b"),)),
        Hung("cause"),
        Dead("cause"),
    ],
)
def test_messages_from_the_core_survive_the_wire(message: FromCore):
    assert decode_from_core(encode(message)) == message


def test_steps_and_results_survive_the_wire():
    added = SlotAssignment(1, 2, column([1, 2]), 2, 0, (column([3]),), Sampling())
    step = StepMessage(5, column([4]), (added,), column([[1, 0, 9]]), column([[1, 2]]))
    assert decode_step(encode(step)) == step
    step = StepMessage(6, free_encoder_keys=(b"old",), encoder_inputs=((1, 0),))
    assert decode_step(encode(step)) == step
    result = StepResult(5, column([8]), logprobs=LOGPROBS, seconds=0.5)
    assert decode_result(encode(result)) == result


def test_a_handle_names_its_front_end():
    handle = make_handle(5, 123)
    assert front_end_of(handle) == 5
    assert int64s(column([handle], "<i8"))[0] == handle


def test_columns_read_back_in_rows():
    assert int32s(column([[1, 2, 3], [4, 5, 6]]), 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert int32s(b"", 3).tolist() == []
    assert float32s(column([0.5, 1.5], "<f4"), 2).tolist() == [[0.5, 1.5]]


def test_a_decode_step_costs_bytes_only_for_what_changed():
    assert len(encode(StepMessage(1_000_000))) <= 16, "1,024 rows that all decode, and nothing else"
    blocks = [(row, 0, 5000 + row) for row in range(0, 1024, 16)]
    assert len(encode(StepMessage(1_000_000, new_blocks=column(blocks)))) <= 1024, "and 64 of them take a block"


def test_tokens_cost_twelve_bytes_each_on_their_way_out():
    handles, tokens = column(range(1024), "<i8"), column(range(1024))
    assert len(encode(Outputs(1e5, handles, tokens, stats=Stats()))) <= 12 * 1024 + 100


def test_every_sampling_field_is_declared():
    """A new field belongs into one of the two tables; into WITH_LOGITS if the sampler must see the logits for it."""
    declared = {*WITHOUT_LOGITS, *(name for name in WITH_LOGITS if " " not in name)}
    assert declared == {field.name for field in msgspec.structs.fields(Sampling)}


@pytest.mark.parametrize("name", WITHOUT_LOGITS)
def test_fields_that_need_no_logits(name: str):
    assert getattr(Sampling(), name) != WITHOUT_LOGITS[name], "another value than the default"
    assert not Sampling(**{"temperature": 1.0, name: WITHOUT_LOGITS[name]}).needs_logits


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_all_other_fields_send_a_request_to_the_sampler(name: str):
    """Otherwise the model backend chooses the token, and the field has no effect (see `Runner._plan_sampling`)."""
    assert Sampling(temperature=1.0, **WITH_LOGITS[name]).needs_logits
