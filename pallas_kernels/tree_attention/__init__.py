"""Attention of new tokens over a committed cache and, by packed bits, over each other."""

from pallas_kernels.tree_attention import pallas, reference

__all__ = ["pallas", "reference"]
