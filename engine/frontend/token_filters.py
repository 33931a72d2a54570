"""Tokens that a request excludes: bad words as token sequences, and the check whether any token is left to sample."""

from collections.abc import Sequence

from engine.columns import int32s
from engine.errors import RequestError
from engine.frontend.tokenizer import Tokenizer
from engine.messages import Sampling


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token sequences of bad words: each word at the beginning of a text, and after a space.

    As in vLLM, the sequence after a space is used only if it is as long as the first one and begins with another token.
    Otherwise it contains the first one, or begins with a separate token for the space.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), False))
        forms = [bare]
        if spaced and bare and len(spaced) == len(bare) and spaced[0] != bare[0]:
            forms.append(spaced)
        for form in forms:
            if not form or max(form) >= vocab_size:
                raise RequestError(f"bad_words: the model has no tokens for {word!r}", "bad_words")
            found[form] = None
    return tuple(found)


def check_any_token_left(sampling: Sampling) -> None:
    """Raise RequestError if min_tokens or bad words exclude every allowed token from the start."""
    if not sampling.allowed:
        return
    allowed = set(int32s(sampling.allowed).tolist())
    if sampling.min_tokens and allowed <= set(sampling.stop_ids):
        raise RequestError("allowed_token_ids has only tokens that min_tokens excludes", "allowed_token_ids")
    if allowed <= {word[0] for word in sampling.bad_words if len(word) == 1}:
        raise RequestError("allowed_token_ids has only tokens that bad_words excludes", "allowed_token_ids")
