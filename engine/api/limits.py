"""Whether a request stays within the server's limits; those it exceeds are refused before they cost anything."""

import math
from collections.abc import Iterable, Sequence

from engine.api.chat_protocol import ChatRequest
from engine.api.errors import ApiError
from engine.api.options import Limits
from engine.api.protocol import CompletionRequest
from engine.errors import RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.router import Router

# All stop strings of a request together: each new token is compared with all their beginnings.
MAX_STOP_CHARACTERS = 4096
LONGEST_WAIT_S = 60  # that Retry-After asks for


def check_request(body: CompletionRequest | ChatRequest, limits: Limits, max_model_len: int) -> None:
    """Raise RequestError for what a body asks too much of, with the field and the flag that raises the limit."""
    n = body.n or 1
    if n > limits.max_n:
        raise RequestError(f"n is {n:,}, but this server takes at most {limits.max_n:,} (--max-n)", "n")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > limits.max_stop:
        raise RequestError(
            f"stop has {len(stops):,} strings, at most {limits.max_stop:,} are taken (--max-stop)", "stop"
        )
    characters = sum(map(len, stops))
    if characters > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"stop has {characters:,} characters in all, at most {MAX_STOP_CHARACTERS:,} are taken", "stop"
        )
    ids = len(body.stop_token_ids or ())
    if ids > limits.max_stop_token_ids:
        raise RequestError(
            f"stop_token_ids has {ids:,} entries, at most {limits.max_stop_token_ids:,} are taken "
            "(--max-stop-token-ids)",
            "stop_token_ids",
        )
    if isinstance(body, ChatRequest):
        if len(body.messages) > max_model_len:  # each takes a token at least
            raise RequestError(
                f"messages has {len(body.messages):,} entries, more than the model takes tokens: {max_model_len:,} "
                "(--max-model-len)",
                "messages",
            )
        return
    prompts = count_prompts(body.prompt)
    if prompts > limits.max_prompts:
        raise RequestError(
            f"prompt has {prompts:,} prompts, at most {limits.max_prompts:,} are taken in one body (--max-prompts)",
            "prompt",
        )
    most = max(limits.max_prompts, limits.max_n)
    if prompts * n > most:
        raise RequestError(
            f"{prompts:,} prompts with n: {n:,} are {prompts * n:,} outputs, at most {most:,} are taken in one body "
            "(--max-prompts, --max-n)",
            "n",
        )


def count_prompts(prompt: str | Sequence[object]) -> int:
    """How many prompts a completion's `prompt` holds: a list of token ids is one."""
    return 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)


def check_texts(texts: Iterable[str], limits: Limits, max_model_len: int, longest_token: int, field: str) -> None:
    """Raise RequestError for a text that is longer than any prompt the model takes, before it is tokenized."""
    derived = limits.max_prompt_bytes is None
    most = max_model_len * longest_token if limits.max_prompt_bytes is None else limits.max_prompt_bytes
    for text in texts:
        if len(text) * 4 <= most:  # a character has four bytes at most
            continue
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > most:
            why = f" (--max-model-len {max_model_len:,} times the longest token; --max-prompt-bytes)"
            raise RequestError(
                f"the prompt has {size:,} bytes, but at most {most:,} are taken"
                + (why if derived else " (--max-prompt-bytes)"),
                field,
            )


def check_queue(client: EngineClient, limits: Limits, outputs: int) -> None:
    """Raise ApiError 503 if so many more requests would have the queue grow beyond its limit."""
    if limits.max_queue is None:
        return
    stats = client.total_stats
    waiting, slots = stats.core.waiting, client.ready.max_num_seqs
    if isinstance(client, Router):
        slots *= sum(replica.dead is None for replica in client.replicas)
    # Open requests are counted at once, those that wait only with the core's next message.
    queue = max(stats.live + outputs - slots, waiting + outputs if waiting else 0)
    if queue <= limits.max_queue:
        return
    ended = sum(stats.e2e.counts)
    seconds = stats.e2e.total / ended if ended else 1.0
    wait = math.ceil(min(max(seconds * queue / max(slots, 1), 1), LONGEST_WAIT_S))
    raise ApiError(
        503,
        f"{max(waiting, stats.live - slots, 0):,} requests wait already, and at most {limits.max_queue:,} may "
        f"(--max-queue): try again in {wait} s",
        code="queue_full",
        headers={"Retry-After": str(wait)},
    )
