"""Small tokenizers of the kinds that models have, made by the library itself."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend, StandInBackend

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "ein Löffel für Äpfel",
    "日本語のテキスト",
    "smile 😀 and 👩‍👩‍👧",
    "aaa abab abc",
]
END = "<|end|>"
CITED = "<tool call>"  # an added token that isn't special, with a space in it


def byte_level_library() -> LibraryTokenizer:
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken(CITED, special=False)])
    return library


def sentence_piece_library() -> LibraryTokenizer:
    """As Llama 2 and Gemma write it: ▁ for spaces, bytes as tokens where no piece fits."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefgh",
        "▁a",
        "▁b",
        "▁the",
        "ab",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    library = LibraryTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(FastBackend(byte_level_library()))


@pytest.fixture(scope="session")
def sentence_piece() -> Tokenizer:
    return Tokenizer(FastBackend(sentence_piece_library()))


@pytest.fixture(scope="session")
def stand_in() -> Tokenizer:
    return Tokenizer(StandInBackend(300), eos_ids=[2])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model's folder as far as a front end reads it."""
    library = byte_level_library()
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": END}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 400}))
    return tmp_path


TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}{{ raise_exception('no tools here') }}{%- endif -%}
[{{ message['role'] }}] {% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}
{% endfor -%}
{%- if add_generation_prompt -%}[assistant] {% endif -%}"""
