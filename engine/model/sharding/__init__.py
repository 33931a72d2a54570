"""Divides the weights of a model among tensor-parallel ranks."""
