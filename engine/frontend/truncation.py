"""Truncation of prompts to a number of tokens (`truncate_prompt_tokens`)."""

from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.tokenizer import Tokenizer

CHARACTERS = 16  # of a text, first tokenized for each token to keep
SPARE = 64  # tokens next to a cut through a text that may differ from those of the whole text


def kept_tokens(params: SamplingParams, max_model_len: int) -> int | None:
    """The number of prompt tokens to keep, None for all. Raises RequestError if it is out of range."""
    keep = params.truncate_prompt_tokens
    if keep is None:
        return None
    if keep >= max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens must lie below {max_model_len} (--max-model-len), not {keep}",
            "truncate_prompt_tokens",
        )
    if keep == -1:
        keep = max_model_len - (params.max_tokens or 1)
        if keep < 1:
            raise RequestError(f"max_tokens {params.max_tokens} leaves no tokens for the prompt", "max_tokens")
    return keep


def kept_of_text(keep: int | None, max_model_len: int) -> int | None:
    """The number of tokens to keep of a pooled text, None for all. Raises RequestError if it is out of range."""
    if keep == -1:
        return max_model_len
    if keep is not None and not 1 <= keep <= max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or lie in 1..{max_model_len} (--max-model-len), not {keep}",
            "truncate_prompt_tokens",
        )
    return keep


def encode_end(
    tokenizer: Tokenizer, text: str, keep: int, side: str | None, add_special_tokens: bool
) -> tuple[list[int], bool]:
    """Tokenize as much of the end of a text as gives `keep` tokens; of its beginning if `side` is "right".

    A long text thus costs no more than the part that is kept. Returns the token ids, which may be more than `keep`, and
    whether a part of the text was left out.
    """
    characters = CHARACTERS * (keep + SPARE)
    while characters < len(text):
        part = text[:characters] if side == "right" else text[len(text) - characters :]
        ids = tokenizer.encode(part, add_special_tokens)
        if len(ids) >= keep + SPARE:
            return ids, True
        characters *= 4
    return tokenizer.encode(text, add_special_tokens), False


def truncate(prompt: list[int], keep: int | None, side: str | None, leading: tuple[int, ...]) -> list[int]:
    """Keep the last `keep` tokens of a prompt.

    Args:
        prompt: token ids.
        keep: number of tokens; None: all.
        side: "right" keeps the first tokens instead.
        leading: ids that the tokenizer puts before each text. If the prompt begins with them, they are kept too, as
            tokenizers do when they truncate.
    """
    if keep is None or len(prompt) <= keep:
        return prompt
    if side == "right":
        return prompt[:keep]
    kept = len(leading) if len(leading) < keep and tuple(prompt[: len(leading)]) == leading else 0
    return [*prompt[:kept], *prompt[len(prompt) - keep + kept :]]
