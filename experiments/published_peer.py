"""The same pair in the published PyTorch implementation of the method (github.com/hao-ai-lab/JetSpec), where it is
installed: its reference path, which runs on a CPU too, with its public names alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from converters.convert import export_head
from experiments.torch_peer import save_huggingface
from jetspec_jax import checkpoint
from jetspec_jax.config import HeadConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.pair import Pair

WIDTH, BUDGET = 7, 63  # of its own examples


def published(pair: Pair) -> Callable[[list[int], int], list[int]]:
    """Its tree decoding in float32.

    Returns:
        (token ids, new tokens) -> new token ids, greedy; fewer where the target ends its answer.

    Raises:
        JetSpecError: it is not installed, JAX decodes on a GPU, or the pair has no parallel head or no tokenizer.
    """
    try:
        import torch
        from jetspec import LLM, DraftHeadTreeDrafter, SamplingParams, load_draft_head
    except ImportError as error:
        raise JetSpecError("this comparison needs the published implementation: pip install "
                           "git+https://github.com/hao-ai-lab/JetSpec") from error
    if jax.default_backend() != "cpu":
        raise JetSpecError("the published implementation is compared on the CPU: set JAX_PLATFORMS=cpu")
    if not isinstance(pair.head_config, HeadConfig):
        raise JetSpecError("the published implementation needs a parallel draft head: name one with --head")
    with tempfile.TemporaryDirectory() as folder:
        target, converted, head_folder = (Path(folder) / name for name in ("target", "converted", "head"))
        save_huggingface(pair, target)
        converted.mkdir()
        checkpoint.save(converted, pair.head_config, pair.params.head, "a comparison")
        export_head(converted, head_folder, progress=False)
        model = LLM(str(target), device="cpu", dtype=torch.float32)
        head = load_draft_head(str(head_folder), device="cpu", dtype=torch.float32)
    taps = {"block_size": head.block_size, "target_layer_ids": head.target_layer_ids}
    drafter = DraftHeadTreeDrafter(head, target=model.model, **taps)

    def run(ids: list[int], tokens: int) -> list[int]:
        answer = model.generate_tree(torch.tensor([ids]), drafter, tree_width=WIDTH, budget=BUDGET,
                                     sampling_params=SamplingParams(temperature=0.0, max_new_tokens=tokens), **taps)
        return list(answer["token_ids"])

    return run
