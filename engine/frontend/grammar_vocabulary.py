"""The tokens of a model as grammars see them: the bytes of each."""

from engine.frontend.tokenizer import Tokenizer


class GrammarVocabulary:
    """Implements `engine.core.grammar_compiler.Vocabulary`."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size` is the model's. Ids that the tokenizer doesn't have are never sampled under a grammar."""
        known = min(vocab_size, tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.special_ids = sorted(token for token in tokenizer.special_ids if token < known)
        special = frozenset(self.special_ids)
        entry = tokenizer.backend.vocabulary_entry
        self.pieces = [
            entry(token).encode() if token in special else tokenizer.token_bytes(token) for token in range(known)
        ] + [b""] * (vocab_size - known)
        self._ids = {piece: token for token, piece in enumerate(self.pieces) if piece and token not in special}
        self._longest = max(map(len, self._ids), default=1)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, whose pieces are its bytes: the tokenizer's own if that is so, else the longest ones."""
        data = text.encode()
        own = self._tokenizer.encode(text, add_special_tokens=False)
        if all(token < len(self.pieces) for token in own) and b"".join(map(self.pieces.__getitem__, own)) == data:
            return own
        found, at = list[int](), 0
        while at < len(data):
            length = next((n for n in range(self._longest, 0, -1) if data[at : at + n] in self._ids), 0)
            if not length:
                break  # the vocabulary can't write the rest
            found.append(self._ids[data[at : at + length]])
            at += length
        return found
