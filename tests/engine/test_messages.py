"""Messages survive the wire, and stay as small as the design promises."""

import pytest

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
    Stats,
    StepMessage,
    StepResult,
    TextOptions,
    ToCore,
    TokenLogprobs,
    Utility,
    UtilityResult,
    column,
    decode_from_core,
    decode_result,
    decode_step,
    decode_to_core,
    encode,
    float32s,
    front_end_of,
    int32s,
    int64s,
    make_handle,
)

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
