"""Compiled programs, kept by what they were compiled for, and how long compilation took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

# The whole loop of rounds becomes one CUDA graph: the GPU itself decides whether to go on, and the host neither
# launches nor waits within it. Without the second option XLA makes no graph of a loop at all. Products that share an
# operand stay apart: to join them XLA copies their weights side by side every time. COLLECTIVES are not in the list:
# a graph that loops cannot hold NCCL's as they are (github.com/NVIDIA/nccl, issue 1986), so over a mesh of several GPUs
# the loop is the host's, which launches graphs and collectives in turn.
GPU_OPTIONS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,WHILE,CONDITIONAL",
               "xla_gpu_graph_min_graph_size": 1, "xla_gpu_dot_merger_threshold_mb": 0}


def compiler_options() -> dict[str, Any]:
    """What XLA must be told on this backend."""
    return GPU_OPTIONS if jax.default_backend() == "gpu" else {}


class Programs:
    """Compiles ahead of time, so that compilation is never counted as decoding.

    Args:
        options: what XLA must be told; None takes `compiler_options()`.

    Attributes:
        compile_seconds: wall-clock seconds spent compiling so far.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self._options = options
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_seconds = 0.0

    def clear(self) -> None:
        """Forgets all programs and frees their memory."""
        self._compiled.clear()

    def __call__(self, function: Callable[..., Any], static: tuple, *args: Any, donate: int | None = None) -> Any:
        """Runs `function(*static, *args)`, compiled.

        Args:
            static: hashable leading arguments.
            donate: index into `args` whose buffers the result may take over.
        """
        leaves, structure = jax.tree.flatten(args)
        key = (function, static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._compiled:
            start = time.perf_counter()
            jitted = jax.jit(function, static_argnums=tuple(range(len(static))),
                             donate_argnums=() if donate is None else (len(static) + donate,))
            options = compiler_options() if self._options is None else self._options
            self._compiled[key] = jitted.lower(*static, *args).compile(options)
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key](*args)
