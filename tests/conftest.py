"""Every test runs with 64-bit types on and promotion strict, so that an implicit dtype or rank is an error."""

import os
import signal
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"  # for meshes
# Hundreds of tiny programs are compiled and each runs for milliseconds: LLVM need not optimise them. (The scripts'
# tests run in their own processes and use fully optimised programs.) On an NVIDIA GPU it would make other kernels than
# those that are used.
if not Path("/dev/nvidiactl").exists():
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

# Triton reads this when it is imported: its kernels then run in its interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import jax
import pytest

from tests.models import PROGRAMS

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def in_time():
    """What would count for hours fails after 20 seconds."""
    def fail(*_):
        pytest.fail("it took 20 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Hundreds of small programs would otherwise stay in memory until the end."""
    yield
    jax.clear_caches()
    PROGRAMS.clear()
