"""Kernels: tensors and plain data in, tensors out. They import nothing of crosspool."""
