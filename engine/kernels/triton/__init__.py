"""Kernels of the GPU devices in Triton; needs the package `triton` (3.6 to 3.9).

One source serves all targets and the interpreter (TRITON_INTERPRET=1, CPU tensors), so these rules hold throughout:

- plain `tl.load` and `tl.store` with masks; nothing that Triton 3.6 or 3.9 lacks, such as block pointers;
- no arithmetic in a storage dtype: numbers become float32 after each load, and the interpreter's bfloat16 is wrong;
- operands of `tl.dot` have the dtype `launch.dot_dtype`, which is float32 in the interpreter;
- no return within an `if`: what follows is compiled too, even if the condition is constant;
- offsets into caches and logits are 64-bit;
- what changes from step to step is a runtime argument or in memory, so that a batch size compiles no new kernel, and a
  captured graph serves every batch that fits its buffers.
"""
