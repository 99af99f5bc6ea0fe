"""What decoding does not need is not imported: a machine for decoding need not have it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jetspec_jax import checkpoint
from jetspec_jax.target import target_shapes
from tests.models import random_params, tiny_target
from tests.test_chat import tokenizer
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


def test_an_answer_takes_no_more(tmp_path):
    """Nor is what converts, trains or writes weights imported before a converted model has answered."""
    unwanted = {"torch", "orbax", "tensorstore", "optax", "gguf", "matplotlib", "transformers.modeling_utils",
                "transformers.models.auto"}
    target = tiny_target(dtype="float32", vocab_size=260)
    checkpoint.save(tmp_path, target, random_params(target_shapes(target), np.random.default_rng(0)), "a test")
    tokenizer().save_pretrained(tmp_path / checkpoint.TOKENIZER)
    code = (f"import sys; from experiments import decode; sys.argv[1:] = ['--model', {str(tmp_path)!r}, '--draft', "
            "'none', '--prompt', 'Hi', '--no-chat-template', '--max-new-tokens', '2']; decode.main(); "
            f"print(*{unwanted} & set(sys.modules), sep=', ')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "", done.stdout
