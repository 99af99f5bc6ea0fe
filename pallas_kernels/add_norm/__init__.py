"""Residual sum and RMSNorm in one launch."""

from pallas_kernels.add_norm import pallas, reference

__all__ = ["pallas", "reference"]
