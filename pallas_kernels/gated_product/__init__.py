"""The gated MLP's first half, silu(x gate) * (x up), in one launch."""

from pallas_kernels.gated_product import pallas, reference

__all__ = ["pallas", "reference"]
