"""What all steps share: where results go, which sizes are measured, weights made on the device, XLA's options."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.h100.plan import Setup, abstract_params, setup_for
from jetspec_jax import HeadConfig, TargetConfig, TreeConfig
from jetspec_jax.config import KernelBackend
from jetspec_jax.draft import Params
from jetspec_jax.files import write_text
from jetspec_jax.programs import compiler_options

LOOP_COMMANDS = ",WHILE,CONDITIONAL"
# XLA's own products tune themselves for seconds a program; without them all are cuBLASLt's, as the plan counts.
CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Sizes:
    """What is measured, of the real model and of the tiny one.

    Attributes:
        budgets: nodes of a tree, the most telling first; 1 is plain decoding.
        contexts: committed tokens; the first is that of kernels and profile.
        slots: S, cache slots of every program: length is an operand, so one program serves all contexts.
        batches: sequences, each with `batch_budgets` at `batch_context` tokens.
        rows: of the invariance table.
        warm, repeats: runs before and of every timing.
        turns: rounds or loops of the two runs whose difference is timed.
    """

    budgets: tuple[int, ...] = (1, 256, 64, 16, 128, 32)
    contexts: tuple[int, ...] = (4096, 1024)
    slots: int = 6144
    batches: tuple[int, ...] = (8, 32)
    batch_budgets: tuple[int, ...] = (1, 64, 16)
    batch_context: int = 1024
    batch_slots: int = 2048
    rows: tuple[int, ...] = (1, 16, 64, 256)
    warm: int = 3
    repeats: int = 5
    turns: tuple[int, int] = (8, 32)


TINY = Sizes(budgets=(1, 8, 4), contexts=(64, 32), slots=256, batches=(2,), batch_budgets=(1, 8), batch_context=32,
             batch_slots=128, rows=(1, 4, 8), warm=1, repeats=1, turns=(1, 2))


@dataclass(frozen=True)
class Bench:
    """One run of the measurement.

    Attributes:
        out: folder of the results.
        tiny: a tiny model with interpreted kernels, to check the script anywhere.
        host_loop: keep the loop of rounds out of the CUDA graph.
        weights: folder (or GGUF file) of the small real target; None: the default, fetched where it is not cached.
    """

    out: Path
    tiny: bool = False
    host_loop: bool = False
    weights: Path | None = None

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else Sizes()

    @cached_property
    def setup(self) -> Setup:
        """Qwen3-8B with its head, or the tiny pair; budget and context of the first of `sizes`' trees."""
        budget = max(self.sizes.budgets)
        if self.tiny:
            return tiny_setup(budget, self.sizes.contexts[0])
        return setup_for("qwen3-8b", TreeConfig(budget=budget), 1, self.sizes.contexts[0])

    def setup_at(self, budget: int, context: int, batch: int = 1) -> Setup:
        return replace(self.setup, tree=replace(self.setup.tree, budget=budget), context=context, batch=batch)

    @cached_property
    def params(self) -> Params:
        """Normal with deviation 0.02, every matrix its own numbers; scales of norms are 1."""
        leaves, tree = jax.tree.flatten(abstract_params(self.setup))
        keys = jax.random.split(jax.random.key(0), len(leaves))
        made = [_draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
        params: Params = jax.block_until_ready(jax.tree.unflatten(tree, made))
        return params

    @property
    def kernels(self) -> KernelBackend:
        return "pallas_interpret" if self.tiny else "pallas"

    @property
    def loop_options(self) -> dict[str, Any]:
        """The library's options; the loop is the host's where it has to be."""
        options = dict(compiler_options())
        name = "xla_gpu_enable_command_buffer"
        if self.host_loop and name in options:
            options[name] = options[name].replace(LOOP_COMMANDS, "")
        return options

    @property
    def options(self) -> dict[str, Any]:
        """The same with cuBLASLt's products alone."""
        return self.loop_options | (CUBLAS_ONLY if jax.default_backend() == "gpu" else {})

    def save(self, name: str, report: Any) -> None:
        """Writes `name`.json, whole or not at all."""
        write_text(self.out / f"{name}.json", json.dumps(report, indent=1) + "\n")

    def random(self, seed: int, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
        """Normal numbers, made on the device."""
        return _normal(jax.random.key(seed), shape, jnp.dtype(dtype or self.setup.target.dtype))


def tiny_setup(budget: int, context: int) -> Setup:
    """Small enough for interpreted kernels."""
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
        "dtype": "float32", "kernels": "pallas_interpret"}
    target = TargetConfig(**shape, num_layers=2)
    head = HeadConfig(**shape, num_layers=1, block_size=4, target_layer_ids=(0, 1), num_target_layers=2,
                      mask_token_id=63)
    return Setup(target, head, TreeConfig(width=2, budget=budget), 1, context)


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype) if len(shape) == 1 else _normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


_normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
_BEGIN = time.perf_counter()


def say(*words: Any) -> None:
    """A line of progress, with the seconds since this process began."""
    print(f"[{time.perf_counter() - _BEGIN:6.1f}]", *words, flush=True)
