"""Tokens that a request bars: bad words as the token ids that spell them, and whether anything is left to sample."""

from collections.abc import Sequence

from engine.errors import RequestError
from engine.frontend.tokenizer import Tokenizer
from engine.messages import Sampling, int32s


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token sequences of bad words: each word as it begins a text, and as it follows a space.

    As in vLLM, the form behind a space counts where it is a sequence of other tokens as long as the first one; else it
    holds the first one, or begins with a space of its own, which is no part of the word.
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


def check_something_left(sampling: Sampling) -> None:
    """Raise RequestError where min_tokens and bad words bar every allowed token from the beginning."""
    if not sampling.allowed:
        return
    allowed = set(int32s(sampling.allowed).tolist())
    if sampling.min_tokens and allowed <= set(sampling.stop_ids):
        raise RequestError("allowed_token_ids holds only tokens that min_tokens bars", "allowed_token_ids")
    if allowed <= {word[0] for word in sampling.bad_words if len(word) == 1}:
        raise RequestError("allowed_token_ids holds only tokens that bad_words bars", "allowed_token_ids")
