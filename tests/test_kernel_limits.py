"""Every kernel of the GPU tests compiled for an H100 without one: it fits, and keeps its numbers in registers.

Compiled in a process of its own, with the optimisations that these tests turn off.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import jax
import pytest

from experiments.h100.compile import PLUGINS, compile_for_h100, on_h100
from experiments.h100.kernels import kernels_of
from experiments.h100.launches import read_sequence
from experiments.h100_steps.correct import (
    Case,
    Draw,
    attention_case,
    attention_cases,
    cases,
    expert_cases,
    layer_cases,
    random_tree,
)
from jetspec_jax import PRESETS
from tests.test_scripts import ROOT

SHARED_BYTES = 227 * 1024  # of a block: with more, its launch fails
FEW_BYTES = 32  # a thread, that may be spilled
HAS_PLUGIN = find_spec("jax_plugins") is not None and any(find_spec(name) for name in PLUGINS)


def all_cases() -> Iterator[Case]:
    """Those of the GPU tests, and large models in float32, which has no tensor cores and the most to keep."""
    yield from cases(tiny=False)
    dense, experts, small = (PRESETS[name].target.with_dtype("float32")
                             for name in ("qwen3-8b", "qwen3-30b-a3b", "smollm2-135m"))
    yield from attention_cases(dense, (256, 128, 64, 16, 8, 1), ((1024, 1000), (512, 500)))
    for rows in (1, 16, 32, 64):
        yield from layer_cases(dense, rows)
    yield from expert_cases(experts, (1, 16, 256))
    for target in (small, dense, PRESETS["qwen3-8b"].target):  # a batch whose keys are not split
        yield attention_case(target, "16 nodes, 32 sequences", random_tree, 16, 1024, [1000] * 32)


def main() -> None:
    """Prints one JSON list: [case, [[kernel, spilled bytes, shared bytes], ...]] of each."""
    found = []
    for case in all_cases():
        with jax.enable_x64(True) if case.x64 else nullcontext():
            shapes = jax.eval_shape(lambda case=case: case.make(Draw(0)))
            program = compile_for_h100(case.kernel("pallas"), *on_h100(shapes))
        kernels = kernels_of(read_sequence(program, 1).launches, program.ptx)
        found.append([case.name, [[k.name, k.spill_bytes, k.shared_bytes] for k in kernels]])
    print(json.dumps(found))


@pytest.mark.aot
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs JAX's CUDA plugin")
def test_kernels_fit_an_h100():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as conftest set them
    done = subprocess.run([sys.executable, "-m", "tests.test_kernel_limits"], cwd=ROOT, timeout=1200,
                          env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 80
    assert [name for name, kernels in found if not kernels] == []  # else the reference is checked against itself
    bad = [(name, *kernel) for name, kernels in found for kernel in kernels
           if kernel[1] > FEW_BYTES or kernel[2] > SHARED_BYTES]
    assert bad == []


if __name__ == "__main__":
    main()
