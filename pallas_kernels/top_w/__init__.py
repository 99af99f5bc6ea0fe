"""The W most likely tokens of each row of logits with their log-probabilities, in two launches."""

from pallas_kernels.top_w import pallas, reference

__all__ = ["pallas", "reference"]
