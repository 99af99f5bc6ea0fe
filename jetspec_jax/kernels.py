"""Which implementation of a kernel runs: the one place where backends are chosen."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
from jax import lax

from jetspec_jax.config import KernelBackend
from jetspec_jax.errors import JetSpecError
from pallas_kernels import add_norm as add_norm_kernels
from pallas_kernels import gated_product as gated_product_kernels
from pallas_kernels import grouped_matmul as grouped_matmul_kernels
from pallas_kernels import qk_norm_rope as qk_norm_rope_kernels
from pallas_kernels import router as router_kernels
from pallas_kernels import top_w as top_w_kernels
from pallas_kernels import tree_attention as tree_attention_kernels
from pallas_kernels import tree_build as tree_build_kernels


def tree_attention(backend: KernelBackend) -> Callable[..., Any]:
    """`pallas_kernels.tree_attention` by backend; the only kernel that is also there in plain Triton.

    Raises:
        JetSpecError: Triton was asked for and is not installed.
    """
    if backend in ("triton", "triton_interpret"):
        return _triton_tree_attention(interpret=backend == "triton_interpret")
    return _choose("tree_attention", tree_attention_kernels, backend)


@cache
def _triton_tree_attention(interpret: bool) -> Callable[..., Any]:
    """Imported when asked for: Triton is an optional dependency."""
    backend, needed, extra = (("triton_interpret", "torch", "test,parity") if interpret else
                              ("triton", "jax_triton", "gpu"))
    try:
        importlib.import_module(needed)
        module = importlib.import_module("pallas_kernels.tree_attention.triton")
    except ImportError as reason:
        raise JetSpecError(f"kernels {backend!r} cannot run here ({str(reason).splitlines()[0]}): install "
                           f"jetspec-jax[{extra}]") from reason
    return partial(module.tree_attention, interpret=interpret)


def qk_norm_rope(backend: KernelBackend, **static: Any) -> Callable[..., Any]:
    """`pallas_kernels.qk_norm_rope` by backend, with its sizes filled in."""
    return _choose("qk_norm_rope", qk_norm_rope_kernels, backend, tuple(sorted(static.items())))


def add_norm(backend: KernelBackend, eps: float) -> Callable[..., Any]:
    """`pallas_kernels.add_norm` by backend."""
    return _choose("add_norm", add_norm_kernels, backend, (("eps", eps),))


def gated_product(backend: KernelBackend) -> Callable[..., Any]:
    """`pallas_kernels.gated_product` by backend."""
    return _choose("gated_product", gated_product_kernels, backend)


def top_w(backend: KernelBackend, **static: Any) -> Callable[..., Any]:
    """`pallas_kernels.top_w` by backend, with its sizes filled in."""
    return _choose("top_w", top_w_kernels, backend, tuple(sorted(static.items())))


def tree_build(backend: KernelBackend, **static: Any) -> Callable[..., Any]:
    """`pallas_kernels.tree_build` by backend, with its size and kind filled in."""
    return _choose("tree_build", tree_build_kernels, backend, tuple(sorted(static.items())))


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
        return partial(kernel, interpret=backend in ("pallas_interpret", "triton_interpret"))

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
