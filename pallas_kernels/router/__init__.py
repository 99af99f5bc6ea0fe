"""The router of a mixture of experts: product, softmax and choice of the best experts in one launch."""

from pallas_kernels.router import pallas, reference

__all__ = ["pallas", "reference"]
