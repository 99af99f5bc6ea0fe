"""Attention of new tokens over a committed cache and, by packed bits, over each other.

`reference` is the definition. Two files lower the same algorithm to a GPU: `pallas` is what runs on NVIDIA GPUs by
default, because it needs nothing but JAX and its launches join the round's one CUDA graph on every supported JAX;
`triton` (imported when asked for, since Triton is optional) pads nothing in memory and stays when Pallas's Triton
lowering, deprecated since jax 0.11, goes. docs/attention.md has the figures and the choice between them.
"""

from pallas_kernels.tree_attention import pallas, reference

__all__ = ["pallas", "reference"]
