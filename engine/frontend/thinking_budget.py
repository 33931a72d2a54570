"""The limit of a request's reasoning: checked, and turned into what the core enforces."""

import msgspec

from engine.errors import RequestError
from engine.frontend.answer_format import AnswerFormat, prompt_end
from engine.frontend.prompts import Prompt, Text
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.tokenizer import Tokenizer
from engine.reasoning import ReasoningBudget

FIELD = "thinking_token_budget"


def check_thinking_budget(params: SamplingParams, answers: AnswerFormat) -> None:
    """Raise RequestError if the reasoning of a request can't be limited as it asks for."""
    if params.thinking_token_budget is None:
        return
    if answers.reasoning_marks is None:
        raise RequestError(
            f"{FIELD}: the form of this model's reasoning is unknown, or it has none (--reasoning-parser)", FIELD
        )
    if params.structured_outputs is not None:
        other = params.structured_outputs.field
        raise RequestError(
            f"{FIELD} can't be used with {other}, which leaves no place for reasoning: leave one of them out", FIELD
        )
    if params.use_beam_search:
        raise RequestError(f"{FIELD} can't be used with use_beam_search", FIELD)


def with_thinking_budget(
    params: SamplingParams, answers: AnswerFormat, tokenizer: Tokenizer, prompt: Prompt
) -> SamplingParams:
    """The parameters of a prompt, with the limit of its reasoning; `check_thinking_budget` has accepted them."""
    marks = answers.reasoning_marks
    if params.thinking_token_budget is None or marks is None:
        return params
    end = prompt_end(tokenizer, prompt.text if isinstance(prompt, Text) else prompt)
    budget = ReasoningBudget(marks, params.thinking_token_budget, answers.begins_with_reasoning(end))
    return msgspec.structs.replace(params, reasoning=budget)
