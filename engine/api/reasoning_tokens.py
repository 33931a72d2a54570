"""The number of tokens of an output that are reasoning, for `usage`."""

from engine.frontend.detokenizer import Detokenizer
from engine.frontend.parsing.events import Event, HoldingParser, Reasoning
from engine.frontend.streams import CollectedOutput, Delta


class ReasoningTokens:
    """Counts the tokens of one output whose text is reasoning; its tags do not count.

    The tokens are read one by one, so that the number does not depend on which of them arrive together.

    Attributes:
        count: the tokens that are known to be reasoning.
    """

    def __init__(self, parser: HoldingParser, detokenizer: Detokenizer, *, once: bool, shows_stop: bool = False):
        """Args:
        parser: reports the reasoning of the output; other parts need not be told apart.
        detokenizer: of the output, without stop strings: what they cut off was generated too.
        once: nothing is reasoning after the first other part.
        shows_stop: a stop token is a part of the text.
        """
        self.count = 0
        self._parser = parser
        self._detokenizer = detokenizer
        self._once = once
        self._shows_stop = shows_stop
        self._ended = False
        self._textless = 0  # tokens since the last text: parts of a character, or hidden
        self._length = 0  # characters so far
        self._reported: int | None = None  # where the reasoning that was reported ends; None: outside of reasoning
        # Texts that are not reported yet: where they end, and how many tokens each took.
        self._held: list[tuple[int, int]] = []

    def add(self, part: Delta | CollectedOutput) -> None:
        """Add the next tokens of the output."""
        ends_by_token = part.finish_reason == "stop" and not isinstance(part.stop_reason, str)
        tokens = part.token_ids[:-1] if ends_by_token and not self._shows_stop else part.token_ids
        for token in tokens:
            if self._ended:
                return
            text, _ = self._detokenizer.push(token)
            self._textless += 1
            if text:
                self._length += len(text)
                self._held.append((self._length, self._textless))
                self._textless = 0
                self._read(self._parser.feed(text))

    def finish(self) -> int:
        """The output has ended; returns the count."""
        if not self._ended:
            self._ended = True
            rest = self._detokenizer.finish()
            self._length += len(rest)
            self._read([*self._parser.feed(rest), *self._parser.finish()])
        return self.count

    def _read(self, events: list[Event]) -> None:
        for event in events:
            if not isinstance(event, Reasoning):
                self._reported = None
                self._held.clear()
                self._ended |= self._once
                continue
            length = len(event.text)
            begin = self._length - self._parser.held - length if self._reported is None else self._reported
            self._reported = begin + length
            while self._held and self._held[0][0] <= begin:  # the tag, or line breaks next to it
                self._held.pop(0)
            start = begin
            while self._held and start < self._reported:
                start, tokens = self._held.pop(0)
                self.count += tokens
