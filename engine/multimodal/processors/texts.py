"""The tokens of texts that a processor writes next to embeddings: times of frames, names of tiles."""

from collections.abc import Callable
from pathlib import Path

from engine.errors import ModelError
from engine.pretrained import load_auto_tokenizer
from engine.text import first_line

OTHER_FILES = ("tokenizer.model", "vocab.json", "tokenizer_config.json")


def text_encoder(folder: Path) -> Callable[[str], list[int]]:
    """A function that tokenizes a text, markers such as `<|vision_start|>` included, without a start token.

    In a folder without a tokenizer (a model of dummy weights has only a config) it returns no tokens.

    Raises ModelError if the tokenizer can't be read.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exceptions
            raise ModelError(f"{file} can't be read: {first_line(error)}") from error
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    if any((folder / name).is_file() for name in OTHER_FILES):
        other = load_auto_tokenizer(str(folder))
        return lambda text: list(other.encode(text, add_special_tokens=False))
    return lambda text: []  # noqa: ARG005
