"""A tokenizer of words of one letter, with special tokens around texts and pairs."""

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers, processors

from engine.frontend.tokenizer_backends import FastBackend

CLS, SEP = 2, 3
FIRST = 4  # the id of the word `a`


def make_backend(pair: str = "[CLS] $A [SEP] $B:1 [SEP]:1") -> FastBackend:
    """A text begins with [CLS] and ends with [SEP]; `pair` is the template of pairs."""
    letters = {chr(97 + number): FIRST + number for number in range(26)}
    library = LibraryTokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP, **letters}, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return FastBackend(library)


def words(text: str) -> list[int]:
    """Ids of the words of a text."""
    return [FIRST + ord(word) - 97 for word in text.split()]
