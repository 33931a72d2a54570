"""Prompts cut to a number of tokens, as `truncate_prompt_tokens` asks for."""

from engine.errors import RequestError
from engine.frontend.sampling import SamplingParams
from engine.frontend.tokenizer import Tokenizer

CHARACTERS = 16  # of a text are looked at for each token that is kept, at first
SPARE = 64  # tokens behind a cut through a text, after which they are those of the whole text


def kept_tokens(params: SamplingParams, max_model_len: int) -> int | None:
    """How many tokens of a prompt are kept at most, None for all; RequestError if that can't be."""
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
            raise RequestError(f"max_tokens {params.max_tokens} leaves no room for a prompt", "max_tokens")
    return keep


def encode_end(
    tokenizer: Tokenizer, text: str, keep: int, side: str | None, add_special_tokens: bool
) -> tuple[list[int], bool]:
    """Token ids of a text, or of as much of its end (its beginning, where `side` is "right") as gives `keep` of them.

    Also says whether anything was left out: a text of any length costs no more than what is kept of it.
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
    """The prompt's last `keep` tokens, or its first ones where `side` is "right"; all where `keep` is None.

    leading: ids that the tokenizer puts before each text. They stay where the prompt begins with them, as tokenizers
    truncate.
    """
    if keep is None or len(prompt) <= keep:
        return prompt
    if side == "right":
        return prompt[:keep]
    kept = len(leading) if len(leading) < keep and tuple(prompt[: len(leading)]) == leading else 0
    return [*prompt[:kept], *prompt[len(prompt) - keep + kept :]]
