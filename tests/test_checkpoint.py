"""Checkpoints: saved whole or not at all, loaded only when they are what they say."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jetspec_jax import JetSpecError, checkpoint
from jetspec_jax.errors import DamagedError
from jetspec_jax.head import head_shapes
from jetspec_jax.sharding import make_mesh
from jetspec_jax.target import init_target, target_shapes
from tests.models import on_mesh, random_pair, tiny_head, tiny_moe, tiny_target


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


def mapped(folder):
    """Which arrays of a checkpoint are pages of this process."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not tell")
    arrays = str(folder / checkpoint.ARRAYS) + os.sep
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.partition(arrays)[2].partition(os.sep)[0] for line in lines if arrays in line}


def test_arrays_are_the_files_own_pages(pair, copy):
    """Until they are deleted; whatever becomes of the files' names, and whoever is given the arrays to write into."""
    arrays = copy / checkpoint.ARRAYS
    before = (arrays / "params.embedding" / "0.0").read_bytes()
    _, params = checkpoint.load(copy)
    names = {entry.name for entry in arrays.glob("params.*")}
    assert mapped(copy) == names
    embedding = params["params"].pop("embedding")
    written = jax.jit(lambda table: table.at[0].set(9), donate_argnums=0)(embedding)
    assert (np.asarray(written)[0] == 9).all()
    assert (arrays / "params.embedding" / "0.0").read_bytes() == before
    del embedding, written
    gc.collect()
    assert mapped(copy) == names - {"params.embedding"}
    shutil.rmtree(copy)
    expected = {name: leaf for name, leaf in pair.params.target["params"].items() if name != "embedding"}
    jax.tree.map(np.testing.assert_array_equal, params["params"], expected)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    gc.collect()
    assert mapped(copy) == set()


def test_few_files_are_kept_open(pair, copy, monkeypatch):
    """The largest, and none that is as large as one which is copied: two matrices of 1024 numbers, two of 768."""
    sizes = sorted((leaf.size for leaf in jax.tree.leaves(pair.params.target)), reverse=True)
    assert sizes[:5] == [1024, 1024, 768, 768, 512]
    largest = {f"params.layers_{i}.attention.qkv_proj.kernel" for i in (0, 1)}
    for most, names in ((0, set()), (1, set()), (2, largest), (3, largest)):
        monkeypatch.setattr(checkpoint, "MOST_MAPPED", most)
        _, params = checkpoint.load(copy)
        assert mapped(copy) == names
        jax.tree.map(np.testing.assert_array_equal, params, pair.params.target)
        del params
        gc.collect()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("piece", [200, 2**20])
def test_pieces_are_put_together(pair, tmp_path, monkeypatch, dtype, piece):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece)
    with checkpoint.written_beside(tmp_path / "out") as beside:
        checkpoint.save(beside, pair.target_config, pair.params.target, "a test")
    several = len(list((tmp_path / "out" / checkpoint.ARRAYS / "params.embedding").glob("[0-9]*"))) > 1
    assert several == (piece == 200)
    config, params = checkpoint.load(tmp_path / "out", dtype)
    assert config.dtype == (dtype or "float32")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(config.dtype)), params,
                 pair.params.target)


def test_a_number_too_large_for_the_dtype_is_infinite(pair, tmp_path):
    params = jax.tree.map(lambda leaf: leaf * 1e30, pair.params.target)
    with checkpoint.written_beside(tmp_path / "out") as beside:
        checkpoint.save(beside, pair.target_config, params, "a test")
    assert np.isinf(checkpoint.load(tmp_path / "out", "float16")[1]["params"]["embedding"]).all()


def test_loading_can_cast(pair, saved):
    config, loaded = checkpoint.load(saved / "head", "float32")
    assert config.dtype == "float32"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype("float32")), loaded, pair.params.head)


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 4}, "version 4"), ({"version": True}, "version True"), ({"version": None}, "version"),
    ({"format": "other"}, "foreign"),
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


def test_the_first_version_had_no_checksums(pair, copy):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    del description["checksums"]
    file.write_text(json.dumps({**description, "version": 1}))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(copy)[1], pair.params.target)
    file.write_text(json.dumps(description))
    with pytest.raises(JetSpecError, match="damaged: it has no checksums"):
        checkpoint.load(copy)


def test_checksums_are_those_of_zip(saved):
    """CRC-32, as unzip and others compute it."""
    found = json.loads((saved / "head" / checkpoint.DESCRIPTION).read_text())["checksums"]
    arrays = saved / "head" / checkpoint.ARRAYS
    assert found == {str(file.relative_to(arrays)): f"{zlib.crc32(file.read_bytes()):08x}"
                     for file in arrays.rglob("*") if file.is_file()}


@pytest.mark.parametrize("at", [0, 2**20 - 1, 2**20, 2_500_000 - 1])
def test_every_byte_of_a_file_counts(tmp_path, at):
    """Wherever it is; and a file without any has a checksum too."""
    (tmp_path / "empty").touch()
    assert checkpoint._checksum(tmp_path / "empty") == "00000000"
    content = bytearray(np.random.default_rng(0).bytes(2_500_000))
    (tmp_path / "sound").write_bytes(content)
    content[at] ^= 1
    (tmp_path / "changed").write_bytes(content)
    sound, changed = (checkpoint._checksum(tmp_path / name) for name in ("sound", "changed"))
    assert changed == f"{zlib.crc32(content):08x}" != sound


@pytest.mark.parametrize("name", ["params.embedding/0.0", "params.embedding/.zarray", "_METADATA"])
def test_a_changed_byte_is_found(pair, copy, name):
    """In the middle of a file, as a failing disk changes it. Small files, here all, come first."""
    file = copy / checkpoint.ARRAYS / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{name} was changed since it was written; convert the original weights"):
        checkpoint.load(copy)


def test_a_changed_byte_of_a_large_file_is_found(pair, copy, monkeypatch):
    """These are checked while the arrays are read."""
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 1000)
    file = copy / checkpoint.ARRAYS / "params.embedding" / "0.0"
    content = bytearray(file.read_bytes())
    assert len(content) > 1000
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"embedding/0\.0 was changed"):
        checkpoint.load(copy)
    _, params = checkpoint.load(copy, verify=False)
    different = np.asarray(params["params"]["embedding"]) != np.asarray(pair.params.target["params"]["embedding"])
    assert different.sum() == 1


def test_another_dtype_is_found_without_checksums_too(copy):
    """float32 and int32 have equal sizes."""
    file = copy / checkpoint.ARRAYS / "params.norm.scale" / ".zarray"
    file.write_text(file.read_text().replace("<f4", "<i4"))
    for verify, message in ((True, "was changed since"), (False, "the shape or dtype of params.norm.scale differs")):
        with pytest.raises(DamagedError, match=message):
            checkpoint.load(copy, verify=verify)


@pytest.mark.parametrize("checksums", [None, [], {"../jetspec.json": "00000000"}, {"/etc/hostname": "0"},
                                       {"_METADATA": 7}, {"absent": "00000000"}, {"": "0"}])
def test_checksums_of_something_else(copy, checksums):
    file = copy / checkpoint.DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text()), "checksums": checksums}))
    with pytest.raises(DamagedError, match="damaged"):
        checkpoint.load(copy)


@pytest.mark.parametrize("layers", [3, 400, 10**9])
def test_layers_are_counted_before_they_are_made(copy, layers):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    description["config"]["num_layers"] = layers
    file.write_text(json.dumps(description))
    with pytest.raises(DamagedError, match="damaged"):
        checkpoint.load(copy)


@pytest.mark.parametrize("name", ["params.embedding/0.0", "params.embedding/.zarray", "_METADATA",
                                  "array_metadatas/process_0"])
def test_a_pipe_among_the_arrays_is_not_opened(copy, in_time, name):
    file = copy / checkpoint.ARRAYS / name
    file.unlink()
    os.mkfifo(file)
    for verify in (True, False):
        with pytest.raises(DamagedError, match="no ordinary file"):
            checkpoint.load(copy, verify=verify)


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


def test_layers_of_a_kind_are_alike():
    """Shapes are those of a model that is made whole."""
    moe = tiny_moe(num_layers=4, dtype="float32")
    for config in (tiny_target(num_layers=3, dtype="float32"), moe, dataclasses.replace(moe, dense_layers=(0, 2)),
                   dataclasses.replace(moe, dense_layers=(3,)), dataclasses.replace(moe, dense_layers=(0, 1, 2, 3))):
        whole = init_target(config, jax.random.key(0))
        assert target_shapes(config) == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)


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


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".out.k1ll3d.partial", ".other.k1ll3d.partial", ".outer.k1ll3d.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("written")
    (tmp_path / ".out.lock").touch()  # its lock went with it
    with checkpoint.written_beside(tmp_path / "out") as beside:
        (beside / "whole").write_text("written")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.k1ll3d.partial", ".outer.k1ll3d.partial", "out"]


def test_neighbours_are_no_leftovers(tmp_path):
    """qwen2 beside qwen2.5."""
    with checkpoint.written_beside(tmp_path / "model.v2") as one:
        with checkpoint.written_beside(tmp_path / "model"):
            pass
        assert one.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.v2"]


def test_long_names_are_written(tmp_path):
    with checkpoint.written_beside(tmp_path / ("x" * 255)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_the_home_folder_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with checkpoint.written_beside(Path("~/out")):
        pass
    assert (tmp_path / "out").is_dir()


def test_what_systems_leave_in_folders_is_no_damage(pair, copy):
    arrays = copy / checkpoint.ARRAYS
    for folder in (arrays, arrays / "array_metadatas", arrays / "params.embedding"):
        for name in (".DS_Store", "._0.0", "desktop.ini", "README"):
            (folder / name).write_bytes(b"\xff\x00")
        (folder / "@eaDir").mkdir()
    (arrays / ".#README").symlink_to("nowhere")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(copy)[1], pair.params.target)


def test_a_file_without_a_checksum_is_not_trusted(copy):
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    del description["checksums"]["params.embedding/0.0"]
    file.write_text(json.dumps(description))
    with pytest.raises(DamagedError, match=r"no checksum of params\.embedding/0\.0"):
        checkpoint.load(copy)


def test_a_device_behind_a_link_is_not_read(copy, in_time):
    (copy / checkpoint.ARRAYS / "link").symlink_to("/dev")
    file = copy / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    description["checksums"]["link/zero"] = "00000000"
    file.write_text(json.dumps(description))
    with pytest.raises(DamagedError, match="zero is no ordinary file"):
        checkpoint.load(copy)


def test_a_shared_model_is_not_written_as_another(tmp_path):
    """Over a mesh, the columns of fused matrices lie in another order."""
    shared = on_mesh(random_pair(0, tiny_target(dtype="float32", vocab_size=24)), make_mesh(2))
    with pytest.raises(JetSpecError, match="without a mesh"), checkpoint.written_beside(tmp_path / "out") as beside:
        checkpoint.save(beside, shared.target_config, shared.params.target, "a test")
    assert list(tmp_path.iterdir()) == []


def test_nobody_writes_the_same_folder_at_once(tmp_path):
    with checkpoint.written_beside(tmp_path / "out") as beside:
        code = ("import sys, pathlib\nfrom jetspec_jax import checkpoint, JetSpecError\ntry:\n"
                "    with checkpoint.written_beside(pathlib.Path(sys.argv[1])):\n        print('wrote')\n"
                "except JetSpecError as error:\n    print(error)")
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
        assert f"another process is writing {tmp_path / 'out'}" in other.stdout
        assert beside.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_in_advance(pair, tmp_path, monkeypatch):
    def refuse(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(JetSpecError, match="No space left"), checkpoint.written_beside(tmp_path / "out") as beside:
        checkpoint.save(beside, pair.target_config, pair.params.target, "a test")
    assert list(tmp_path.iterdir()) == []
