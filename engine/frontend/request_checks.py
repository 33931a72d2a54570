"""What a client of the engine checks of a request before it sends it to a core."""

from collections.abc import Sequence

from engine.errors import RequestError
from engine.frontend.prompts import Prompt, check_prompt
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.simulated import check_simulated
from engine.messages import Ready

PRIORITIES = range(-(2**63), 2**63)


def check_fields(ready: Ready, prompts: Sequence[Prompt], params: SamplingParams, priority: int) -> None:
    """Raise RequestError for a request that a core can't serve; `ready` is the core's report."""
    if params.use_beam_search:
        raise RequestError("use_beam_search is a field of the HTTP API only", "use_beam_search")
    if priority and ready.scheduling_policy != "priority":
        raise RequestError(
            f"priority is {priority}, but this server schedules by arrival: start it with --scheduling-policy priority",
            "priority",
        )
    if priority not in PRIORITIES:
        raise RequestError(f"priority must be a 64-bit integer, not {priority}", "priority")
    for prompt in prompts:
        if isinstance(prompt, list):
            check_ids(ready, prompt)
        else:
            assert ready.inline, "this core does not tokenize"
    params.check_vocabulary(ready.vocab_size)
    check_simulated(ready, params)


def check_ids(ready: Ready, prompt: list[int]) -> None:
    """Raise RequestError for a prompt that is empty, too long, or holds ids outside the vocabulary."""
    check_prompt(prompt, ready.max_model_len, ready.prompt_vocab_size, pools=ready.pooling is not None)
