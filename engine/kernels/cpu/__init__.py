"""Kernels in C++ for Llama-like decoders on the CPU, compiled on first use."""
