"""What a model that pools returns of each prompt: an embedding, or the scores of a classification head."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError

Task = Literal["embed", "classify"]
# Which hidden states of the last layer become the vector: the mean over the prompt, those of its first or last token;
# head: the class of an encoder computes its scores itself.
Method = Literal["mean", "cls", "last", "head"]
Activation = Literal["none", "sigmoid"]

RUNNERS = ("auto", "generate", "pooling")
CONVERSIONS = ("auto", "none", "embed", "classify")
HOW_TO_EMBED = "--runner pooling --convert embed"

# vLLM's --pooler-config
POOLING_TYPES: dict[str, Method] = {"MEAN": "mean", "CLS": "cls", "LAST": "last"}
POOLER_FIELDS = ("pooling_type", "seq_pooling_type", "normalize", "use_activation")


class Pooled(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The vector of a prompt, of a model that pools; its request ends with it."""

    handle: int
    vector: bytes  # float32[width]


class PoolingSpec(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What workers and front ends must know of a model that pools; part of `Ready`.

    Args:
        task: embed returns a vector of the hidden size, classify the score of the one label of a classification head.
        method: of pooling.
        width: numbers in a vector.
        encoder: its layers attend in both directions and have no KV cache: a prompt is computed in one step.
        normalize: embeddings are divided by their length.
        activation: of the score.
        matryoshka: the first numbers of an embedding are an embedding too.
        dimensions: how many of them may be requested; empty: any number.
        lowercase: texts are put into lower case before they are tokenized.
        label: name of the one class of a classification head.
        most_tokens: of a prompt, if the model's files say so; 0: as many as it has positions.
    """

    task: Task
    method: Method
    width: int
    encoder: bool = False
    normalize: bool = True
    activation: Activation = "none"
    matryoshka: bool = False
    dimensions: tuple[int, ...] = ()
    lowercase: bool = False
    most_tokens: int = 0
    label: str = ""

    @property
    def whole_prompts(self) -> bool:
        """Whether one step computes a prompt, without the prefix cache: the vector depends on all hidden states."""
        return self.encoder or self.method != "last"


def check_pooler_config(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a --pooler-config with unknown fields or values."""
    unknown = given.keys() - {*POOLER_FIELDS}
    if unknown:
        raise ConfigError(f"--pooler-config has no field {sorted(unknown)[0]}: there are {', '.join(POOLER_FIELDS)}")
    for field in POOLER_FIELDS[:2]:
        if given.get(field) is not None and str(given[field]).upper() not in POOLING_TYPES:
            raise ConfigError(f"--pooler-config: {field} must be one of {', '.join(POOLING_TYPES)}")
    for field in POOLER_FIELDS[2:]:
        if not isinstance(given.get(field), bool | None):
            raise ConfigError(f"--pooler-config: {field} must be true or false")
