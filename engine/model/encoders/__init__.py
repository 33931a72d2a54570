"""Encoders by model family: they turn the tensors of an input into the embeddings of its placeholders, in workers."""
