"""Kernels in C++ for decoders of the Llama kind on the CPU, compiled on first use."""
