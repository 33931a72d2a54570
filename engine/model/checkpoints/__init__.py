"""Reads weights: the tensors of safetensors files, quantized ones, and those of Mistral's format."""
