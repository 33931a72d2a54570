"""Builds a model on the meta device and fills its parameters from a checkpoint, or with random values."""
