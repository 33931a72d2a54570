"""The limits of requests, checked before a request costs anything."""

import math
from collections.abc import Iterable, Sequence

from engine.api.chat_protocol import ChatRequest
from engine.api.error_responses import ApiError
from engine.api.http_options import Limits
from engine.api.protocol import CompletionRequest
from engine.errors import ContextLengthError, RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.front_end_stats import Histogram

# Of all stop strings of a request together: each new token is compared with all their prefixes.
MAX_STOP_CHARACTERS = 4096
LONGEST_WAIT_S = 60  # in Retry-After


def check_request(body: CompletionRequest | ChatRequest, limits: Limits, max_model_len: int) -> None:
    """Raise RequestError for a body over a limit, with the field and the flag that raises the limit."""
    n, name = body.n or 1, "n"
    if isinstance(body, CompletionRequest) and (body.best_of or 0) > n:
        n, name = body.best_of or 0, "best_of"
    if n > limits.max_n:
        raise RequestError(f"{name} is {n:,}, but at most {limits.max_n:,} are allowed (--max-n)", name)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > limits.max_stop:
        raise RequestError(
            f"stop has {len(stops):,} strings, but at most {limits.max_stop:,} are allowed (--max-stop)", "stop"
        )
    characters = sum(map(len, stops))
    if characters > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop has {characters:,} characters in all, but at most {MAX_STOP_CHARACTERS:,} are allowed", "stop"
        )
    ids = len(body.stop_token_ids or ())
    if ids > limits.max_stop_token_ids:
        raise RequestError(
            f"stop_token_ids has {ids:,} entries, but at most {limits.max_stop_token_ids:,} are allowed "
            "(--max-stop-token-ids)",
            "stop_token_ids",
        )
    if isinstance(body, ChatRequest):
        if len(body.messages) > max_model_len:  # each takes at least one token
            raise ContextLengthError.of(max_model_len, f"messages has {len(body.messages):,} entries", "messages")
        return
    prompts = count_prompts(body.prompt)
    check_count(prompts, limits, "prompt")
    most = max(limits.max_prompts, limits.max_n)
    if prompts * n > most:
        raise RequestError(
            f"{prompts:,} prompts with {name}: {n:,} are {prompts * n:,} outputs, but at most {most:,} are allowed in "
            "one body (--max-prompts, --max-n)",
            name,
        )


def check_count(prompts: int, limits: Limits, field: str) -> None:
    """Raise RequestError for a field with more prompts than --max-prompts."""
    if prompts > limits.max_prompts:
        raise RequestError(
            f"{field} has {prompts:,} prompts, but at most {limits.max_prompts:,} are allowed per request "
            "(--max-prompts)",
            field,
        )


def count_prompts(prompt: str | Sequence[object]) -> int:
    """The number of prompts in a completion's `prompt`; a list of token ids is one."""
    return 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)


def check_texts(texts: Iterable[str], limits: Limits, max_model_len: int, longest_token: int, field: str) -> None:
    """Raise RequestError for a text that is longer than any prompt the model can serve, before it is tokenized."""
    derived = limits.max_prompt_bytes is None
    most = max_model_len * longest_token if limits.max_prompt_bytes is None else limits.max_prompt_bytes
    for text in texts:
        if len(text) * 4 <= most:  # a character has four bytes at most
            continue
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if size > most and derived:
            found = f"it has {size:,} bytes, more than {max_model_len:,} of the longest token ({most:,})"
            raise ContextLengthError.of(max_model_len, f"{found}; --max-prompt-bytes allows more", field)
        if size > most:
            raise RequestError(
                f"the prompt has {size:,} bytes, but at most {most:,} are allowed (--max-prompt-bytes)", field
            )


def retry_after_s(latencies: Histogram, turns: float = 1.0) -> int:
    """Seconds for Retry-After: `turns` times the mean latency of the requests so far, at most LONGEST_WAIT_S."""
    ended = sum(latencies.counts)
    seconds = latencies.total / ended if ended else 1.0
    return math.ceil(min(max(seconds * turns, 1), LONGEST_WAIT_S))


def check_queue(client: EngineClient, limits: Limits, outputs: int) -> None:
    """Raise ApiError 503 if `outputs` more requests would exceed --max-queue."""
    if limits.max_queue is None:
        return
    stats = client.total_stats
    waiting, slots = stats.num_waiting, client.ready.max_num_seqs * len(client.serving)
    # Open requests are counted at once, waiting ones only with the core's next message.
    queue = max(stats.num_open + outputs - slots, waiting + outputs if waiting else 0)
    if queue <= limits.max_queue:
        return
    wait = retry_after_s(stats.e2e, queue / max(slots, 1))
    client.stats.count_event("queue_full")
    raise ApiError(
        503,
        f"the queue is full: {max(waiting, stats.num_open - slots, 0):,} waiting, at most {limits.max_queue:,} allowed "
        f"(--max-queue); try again in {wait} s",
        code="queue_full",
        headers={"Retry-After": str(wait)},
    )
