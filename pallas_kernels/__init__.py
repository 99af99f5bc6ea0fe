"""Kernels, one folder each: `reference.py` is what the kernel means, a backend is one more file beside it."""
