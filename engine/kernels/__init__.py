"""Paged attention in torch, and the C++ kernels for the CPU."""
