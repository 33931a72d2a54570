"""The number of tokens of an output that are reasoning, for `usage`."""

from collections.abc import Iterable, Sequence

from engine.frontend.detokenizer import Detokenizer
from engine.frontend.parsing.events import AnswerParser, Event, Reasoning


class ReasoningTokens:
    """Counts the tokens of one output whose text is reasoning; its tags do not count.

    The tokens are read one by one, so that the number does not depend on which of them arrive together.

    Attributes:
        count: the tokens that are known to be reasoning.
    """

    def __init__(self, parser: AnswerParser, detokenizer: Detokenizer, *, once: bool):
        """Args:
        parser: reports the reasoning of the output; other parts need not be told apart.
        detokenizer: of the output, without stop strings: what they cut off was generated too.
        once: nothing is reasoning after the first other part.
        """
        self.count = 0
        self._parser = parser
        self._detokenizer = detokenizer
        self._once = once
        self._ended = False
        self._within = False  # reasoning has begun, and no other part
        self._textless = 0  # tokens since the last text: parts of a character, or hidden
        self._held = 0  # tokens since the last event, which may be reasoning

    def add(self, tokens: Sequence[int]) -> None:
        """Add the next tokens of the output."""
        for token in tokens:
            if self._ended:
                return
            text, _ = self._detokenizer.push(token)
            if not text:
                self._textless += 1
                continue
            self._held += self._textless + 1
            self._textless = 0
            self._read(self._parser.feed(text))

    def finish(self) -> int:
        """The output has ended; returns the count."""
        if not self._ended:
            self._ended = True
            self._read([*self._parser.feed(self._detokenizer.finish()), *self._parser.finish()])
        return self.count

    def _read(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Reasoning):
                # What was held before the first reasoning is its tag.
                self.count += self._held if self._within else min(self._held, 1)
                self._within = True
            else:
                self._within = False
                self._ended |= self._once
            self._held = 0
