"""Prompts: token ids, or a text that the core tokenizes; and the check whether the model can serve them."""

from typing import NamedTuple

from engine.errors import ContextLengthError, RequestError


class Text(NamedTuple):
    """A prompt for a core that tokenizes (`--ablate inline-frontend`)."""

    text: str
    add_special_tokens: bool = True


Prompt = list[int] | Text


def length_of(prompt: Prompt) -> int:
    """The number of tokens of a prompt; 0 for a text, which is not tokenized yet."""
    return len(prompt) if isinstance(prompt, list) else 0


def check_prompt(prompt: list[int], max_model_len: int, vocab_size: int, *, pools: bool = False) -> None:
    """Raise RequestError for a prompt that is empty, too long, or holds ids outside the vocabulary.

    If the model `pools`, there is no output, so that the prompt may be as long as a request.
    """
    if not prompt:
        raise RequestError("the prompt is empty: at least one token is needed", "prompt")
    if pools and len(prompt) > max_model_len:
        raise ContextLengthError.of(
            max_model_len, f"a text has {len(prompt)} tokens; truncate_prompt_tokens -1 cuts it", "input"
        )
    if not pools and len(prompt) >= max_model_len:
        raise ContextLengthError.of(
            max_model_len, f"it has {len(prompt)} tokens, and at least one output token is needed", "prompt"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise RequestError(f"{wrong} is not in the vocabulary (0..{vocab_size - 1})", "prompt")
