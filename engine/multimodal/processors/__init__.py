"""Processors by model family: they turn a decoded input into tensors and placeholder tokens, in pool processes."""
