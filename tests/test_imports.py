"""What decoding does not need is not imported: a machine for decoding need not have it."""

import os
import subprocess
import sys

import pytest

from tests.test_scripts import ROOT


@pytest.mark.parametrize("module", [
    "jetspec_jax", "experiments.decode", "experiments.benchmark", "experiments.h100_bench",
    "experiments.h100_steps.correct", "jetspec_jax.training.trainer"])
def test_imports(module):
    unwanted = {'tensorboardX', 'matplotlib', 'gguf', 'torch', 'triton'}
    code = f"import sys, {module}; print(*{unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
