"""Kernels: paged attention in PyTorch, and the fused decoder in C++."""
