"""Checkpoints: saved whole or not at all, loaded only when they are what they say."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from jetspec_jax import JetSpecError, checkpoint
from jetspec_jax.head import head_shapes
from jetspec_jax.target import target_shapes
from tests.models import random_pair, tiny_head, tiny_target


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(dtype="float32", eos_token_ids=(3, 4))
    return random_pair(0, target, tiny_head(target, dtype="bfloat16"))


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, config, params in (("target", pair.target_config, pair.params.target),
                                 ("head", pair.head_config, pair.params.head)):
        with checkpoint.written_beside(folder / name) as beside:
            checkpoint.save(beside, config, params, "a test")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved / "target", tmp_path / "target")


def test_what_is_saved_is_loaded(pair, saved):
    for name, config, params in (("target", pair.target_config, pair.params.target),
                                 ("head", pair.head_config, pair.params.head)):
        loaded_config, loaded = checkpoint.load(saved / name)
        assert loaded_config == config
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert jax.tree.leaves(loaded)[0].dtype == config.dtype


def test_loading_can_cast(pair, saved):
    config, loaded = checkpoint.load(saved / "head", "float32")
    assert config.dtype == "float32"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("float32")), loaded, pair.params.head)


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 2}, "version 2"), ({"version": None}, "version"), ({"format": "other"}, "foreign"),
    ({"kind": "engine"}, "unknown kind"), ({"kind": []}, "unknown kind"),
    ({"config": {"vocab_size": 3}}, "damaged"), ({"config": None}, "damaged"),
    ({"kind": "head"}, "damaged")])
def test_foreign_and_newer_versions_are_refused(copy, change, message):
    file = copy / checkpoint.DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(JetSpecError, match=message):
        checkpoint.load(copy)


@pytest.mark.parametrize("field", ["rope_theta", "eos_token_ids", "max_positions", "qk_norm"])
def test_a_field_that_is_missing_is_not_guessed(copy, field):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    del description["config"][field]
    file.write_text(json.dumps(description))
    with pytest.raises(JetSpecError, match=f"damaged: its config lacks {field}"):
        checkpoint.load(copy)


def test_how_a_model_ran_is_not_what_it_is(copy):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    assert not {"shards", "kernels", "weight_tile"} & description["config"].keys()
    description["config"] |= {"shards": 2, "kernels": "pallas_interpret"}  # as files of earlier releases may have it
    file.write_text(json.dumps(description))
    assert checkpoint.load(copy)[0] == tiny_target(dtype="float32", eos_token_ids=(3, 4))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_damaged_description_is_refused(copy, text):
    (copy / checkpoint.DESCRIPTION).write_text(text)
    with pytest.raises(JetSpecError, match=r"target"):
        checkpoint.load(copy)


def test_too_little_memory_is_no_damage(copy, monkeypatch):
    def full(params):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 65 bytes.\nat length")

    monkeypatch.setattr(checkpoint.jax, "block_until_ready", full)
    with pytest.raises(JetSpecError, match=r"does not fit into the memory that is free \(RESOURCE_EXHAUSTED: Out of"):
        checkpoint.load(copy)


def test_shapes_are_known_whatever_kernels_are_asked_for(pair):
    """Finding them runs no kernel, which would refuse so small a cache."""
    for config, shapes in ((pair.target_config, target_shapes), (pair.head_config, head_shapes)):
        kernels = dataclasses.replace(config, kernels="pallas")
        assert shapes(kernels) == shapes(config)


def test_missing_arrays_are_refused(copy):
    shutil.rmtree(copy / checkpoint.ARRAYS)
    with pytest.raises(JetSpecError, match="damaged or do not match"):
        checkpoint.load(copy)


def test_truncated_arrays_are_refused(copy):
    files = [file for file in (copy / checkpoint.ARRAYS).rglob("*") if file.is_file() and "embedding" in str(file)]
    data = max(files, key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(JetSpecError, match="damaged or do not match"):
        checkpoint.load(copy)


def test_arrays_of_another_shape_are_refused(copy):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    description["config"]["intermediate_size"] = 25
    file.write_text(json.dumps(description))
    with pytest.raises(JetSpecError, match="damaged or do not match"):
        checkpoint.load(copy)


def test_nothing_is_left_of_a_failed_save(tmp_path):
    with pytest.raises(RuntimeError), checkpoint.written_beside(tmp_path / "out") as beside:
        (beside / "half").write_text("written")
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), checkpoint.written_beside(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(JetSpecError, match="exists already"), checkpoint.written_beside(tmp_path / "out"):
        pass


def test_a_full_disk_is_told_in_advance(pair, tmp_path, monkeypatch):
    def refuse(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(JetSpecError, match="No space left"), checkpoint.written_beside(tmp_path / "out") as beside:
        checkpoint.save(beside, pair.target_config, pair.params.target, "a test")
    assert list(tmp_path.iterdir()) == []
