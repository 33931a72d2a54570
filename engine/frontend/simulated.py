"""What a request to simulated hardware can't ask for: answers that depend on what a model computes."""

from msgspec.structs import replace

from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams
from engine.messages import AddRequest, Ready

# Fields of SamplingParams. What only changes how likely tokens are, such as `temperature`, is accepted: all tokens are
# equally likely. Stop ids are never sampled, so `min_tokens` holds.
REFUSED = (
    "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "thinking_token_budget",
)  # fmt: skip


def check_simulated(ready: Ready, params: SamplingParams) -> None:
    """Raise RequestError for a field that would be without effect, if the device is simulated."""
    if not ready.simulated:
        return
    for field in REFUSED:
        if getattr(params, field) is not None:
            raise RequestError(f"{field} {_reason(ready)}: leave it out", field)


def refused_grammar(ready: Ready) -> str:
    """Why an output can't be made to conform to a grammar, if the device is simulated; otherwise empty."""
    if not ready.simulated:
        return ""
    return f"structured output, such as a JSON schema or a forced tool call, {_reason(ready)}: leave it out"


def with_stop_ids(message: AddRequest) -> AddRequest:
    """The message of a request whose stop ids the executor knows, so that it doesn't sample them by chance."""
    return replace(message, sampling=replace(message.sampling, stop_ids=message.stop_ids))


def _reason(ready: Ready) -> str:
    return f"is not possible on simulated hardware ({ready.simulated}), which computes no model"
