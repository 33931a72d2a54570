"""The part of a model that one pipeline stage computes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One of `count` pipeline stages (`--pp`). The first one also embeds tokens, and encodes multimodal inputs.

    Args:
        number: from 0.
        count: of all stages.
        begin: its first layer.
        end: the layer after its last one.
        pools: the model returns hidden states, so that the last stage does not need the head.
    """

    number: int
    count: int
    begin: int
    end: int
    pools: bool = False

    @property
    def layers(self) -> range:
        return range(self.begin, self.end)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    @property
    def has_head(self) -> bool:
        return self.is_last and not self.pools
