"""Which implementation of a kernel runs: the one place where backends are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
from jax import lax

from jetspec_jax.config import KernelBackend
from pallas_kernels import add_norm as add_norm_kernels
from pallas_kernels import grouped_matmul as grouped_matmul_kernels
from pallas_kernels import qk_norm_rope as qk_norm_rope_kernels
from pallas_kernels import router as router_kernels
from pallas_kernels import tree_attention as tree_attention_kernels


def tree_attention(backend: KernelBackend) -> Callable[..., Any]:
    """`pallas_kernels.tree_attention` by backend."""
    return _choose("tree_attention", tree_attention_kernels, backend)


def qk_norm_rope(backend: KernelBackend, **static: Any) -> Callable[..., Any]:
    """`pallas_kernels.qk_norm_rope` by backend, with its sizes filled in."""
    return _choose("qk_norm_rope", qk_norm_rope_kernels, backend, tuple(sorted(static.items())))


def add_norm(backend: KernelBackend, eps: float) -> Callable[..., Any]:
    """`pallas_kernels.add_norm` by backend."""
    return _choose("add_norm", add_norm_kernels, backend, (("eps", eps),))


def router(backend: KernelBackend, choices: int, normalised: bool) -> Callable[..., Any]:
    """`pallas_kernels.router` by backend."""
    return _choose("router", router_kernels, backend, (("choices", choices), ("normalised", normalised)))


def grouped_mlp(backend: KernelBackend) -> Callable[..., Any]:
    """`pallas_kernels.grouped_matmul` by backend."""
    return _choose("grouped_mlp", grouped_matmul_kernels, backend)


@cache  # one function per kernel and sizes, so that all layers share one trace of it
def _choose(name: str, folder: ModuleType, backend: KernelBackend, static: tuple = ()) -> Callable[..., Any]:
    """A function of arrays alone.

    "auto" is decided when the program is lowered, so that a GPU program compiled on another machine has the kernels.
    """
    reference = partial(getattr(folder.reference, name), **dict(static))
    kernel = partial(getattr(folder.pallas, name), **dict(static))
    if backend == "reference":
        return reference
    if backend != "auto":
        return partial(kernel, interpret=backend == "pallas_interpret")

    @jax.jit
    def kernel_or_reference(*arrays: Any) -> Any:
        try:
            return kernel(*arrays)
        except NotImplementedError as reason:
            if jax.default_backend() == "gpu":
                warnings.warn(f"{name} runs without its kernel, slowly: the kernel does not take {reason}",
                              stacklevel=2)
            return reference(*arrays)

    return lambda *arrays: lax.platform_dependent(*arrays, cuda=kernel_or_reference, default=reference)
