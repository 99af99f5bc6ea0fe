"""The settings of one training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jetspec_jax.config import is_integer, is_number, make_plain, require

Loss = Literal["forward_kl", "hard_label"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a head is trained (arXiv 2606.18394 section 4 and appendix; what it leaves open is an option here).

    Args:
        steps: optimiser steps.
        row_tokens: P, tokens of a packed row; longer sequences are cut.
        rows: packed rows of a micro-batch, over all devices.
        accumulate: micro-batches per step.
        anchors: A, random anchors of a row.
        slots: slots of a training block, the anchor included, 2 to G; None trains the whole block. A causal head's
            first slots do not see the later ones, so a shorter block teaches them the same for less.
        loss: "forward_kl" (to the target's distribution at temperature 1) or "hard_label" (cross-entropy).
        gamma: the loss of depth i weighs exp(-(i-1)/gamma); 0 is uniform.
        vocab_subset: tokens that the loss of a step looks at (the batch's own, the most frequent, random others);
            None is the full vocabulary.
        loss_chunk: slots whose logits exist at one time.
        learning_rate: the peak.
        warmup: share of the steps until the peak.
        final_rate: share of the peak to which the rate falls, by a cosine.
        beta1, beta2, weight_decay: of AdamW.
        clip: the gradient's largest norm.
        product_dtype: operands of products are rounded to it; parameters, norms, softmax and optimiser stay float32.
        remat: recompute the head's layers in the backward pass (less memory, a third more work).
        seed: of data order, anchors, vocabulary subsets and random initialisation.
    """

    steps: int
    row_tokens: int = 512
    rows: int = 1
    accumulate: int = 1
    anchors: int = 128
    slots: int | None = None
    loss: Loss = "forward_kl"
    gamma: float = 0.0
    vocab_subset: int | None = None
    loss_chunk: int = 512
    learning_rate: float = 3e-4
    warmup: float = 0.04
    final_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    product_dtype: str | None = None
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("steps", "row_tokens", "rows", "accumulate", "anchors", "loss_chunk"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 1, f"{name} must be an integer of at least 1, not {value!r}")
        require(self.slots is None or (is_integer(self.slots) and self.slots >= 2),
                 f"slots must be an integer of at least 2, or None, not {self.slots!r}")
        require(self.vocab_subset is None or (is_integer(self.vocab_subset) and self.vocab_subset >= 2),
                 f"vocab_subset must be an integer of at least 2, or None, not {self.vocab_subset!r}")
        require(self.loss in get_args(Loss), f"loss {self.loss!r} is not one of {', '.join(get_args(Loss))}")
        for name, low, high in (("gamma", 0, 1e6), ("warmup", 0, 1), ("final_rate", 0, 1), ("beta1", 0, 1),
                                ("beta2", 0, 1), ("weight_decay", 0, 10), ("clip", 0, 1e6), ("learning_rate", 0, 10)):
            value = getattr(self, name)
            require(is_number(value) and low <= value <= high,
                     f"{name} must be a number from {low} to {high:g}, not {value!r}")
        require(self.clip > 0, "clip must be above 0")
        require(max(self.beta1, self.beta2) < 1, "beta1 and beta2 must be below 1")
        require(self.product_dtype in (None, "bfloat16", "float32"),
                 f"product_dtype {self.product_dtype!r} is not bfloat16, float32 or None")
        require(is_integer(self.seed) and 0 <= self.seed < 2**32,
                 f"seed must be an integer from 0 to 2**32 - 1, not {self.seed!r}")
