"""How arrays lie on the disk: only as `checkpoint.save` lays them out."""

import json
import shutil

import jax
import numpy as np
import pytest

from jetspec_jax import checkpoint
from jetspec_jax.layout import check_layout
from jetspec_jax.target import target_shapes
from tests.models import random_params, tiny_target

CONFIG = tiny_target(dtype="bfloat16", num_layers=1)  # its embedding: 23 tokens of 16 numbers
SHAPES = target_shapes(CONFIG)
NORM, EMBEDDING = "params.norm.scale", "params.embedding"
PLACE = str(("params", "norm", "scale"))  # of the norm in what Orbax tells of the tree


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The embedding lies in several pieces."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PIECE_BYTES", 512)
        checkpoint.save(folder, CONFIG, random_params(SHAPES, np.random.default_rng(0)), "a test")
    return folder / checkpoint.ARRAYS


@pytest.fixture
def arrays(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "arrays")


def edit(file, change):
    """`change` takes JSON and changes it."""
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def entry(tree):
    return tree["tree_metadata"][PLACE]


def told(tree, name):
    return next(e["array_metadata"] for e in tree["array_metadatas"] if e["array_metadata"]["param_name"] == name)


def renamed(tree, new):
    tree["tree_metadata"][new] = tree["tree_metadata"].pop(PLACE)


def test_what_was_saved_is_sound(arrays):
    check_layout(arrays, SHAPES)
    pieces = [file.name for file in (arrays / EMBEDDING).iterdir() if file.name != ".zarray"]
    assert len(pieces) > 1
    edit(arrays / "_METADATA", lambda tree: tree.pop("use_zarr3"))  # as Orbax wrote it when there was no other
    check_layout(arrays, SHAPES)


@pytest.mark.parametrize("change", [
    {"use_ocdbt": True}, {"use_ocdbt": None}, {"use_ocdbt": 0}, {"use_zarr3": True}, {"use_zarr3": None}])
def test_another_format_is_refused(arrays, change):
    edit(arrays / "_METADATA", lambda tree: tree.update(change))
    with pytest.raises(ValueError, match="stored in another format"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("change", [
    lambda tree: tree["tree_metadata"].pop(PLACE),
    lambda tree: tree["tree_metadata"].update({"('more',)": {**entry(tree), "key_metadata": [{"key": "more"}]}}),
    lambda tree: renamed(tree, str(("params", "norm", "bias"))),
    lambda tree: renamed(tree, "params.norm.scale"),
    lambda tree: entry(tree)["key_metadata"][1].update(key="other"),
    lambda tree: entry(tree)["key_metadata"].pop(),
    lambda tree: (entry(tree)["key_metadata"][2].update(key="bias"), renamed(tree, str(("params", "norm", "bias"))))])
def test_other_names_in_the_tree_are_refused(arrays, change):
    edit(arrays / "_METADATA", change)
    with pytest.raises(ValueError, match="the names of the stored arrays differ"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("value", ["np.ndarray", "scalar", "None", None])
def test_what_is_no_array_is_refused(arrays, value):
    edit(arrays / "_METADATA", lambda tree: entry(tree)["value_metadata"].update(value_type=value))
    with pytest.raises(ValueError, match="no array"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_an_array_under_another_name_is_refused(arrays, name):
    (arrays / name).rename(arrays / f"{name}s")
    with pytest.raises(ValueError, match="the names of the stored arrays differ"):
        check_layout(arrays, SHAPES)


def test_an_array_too_few_is_refused(arrays):
    (arrays / NORM / ".zarray").unlink()
    with pytest.raises(ValueError, match="the names of the stored arrays differ"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("change", [
    {"zarr_format": 3}, {"order": "F"}, {"compressor": {"id": "zlib", "level": 1}}, {"filters": [{"id": "delta"}]},
    {"fill_value": 0}, {"dimension_separator": "/"}, {"shape": [17]}, {"shape": [16, 1]}, {"dtype": "<f2"},
    {"dtype": "<u2"}, {"dtype": ">f2"}, {"chunks": [0]}, {"chunks": [-16]}, {"chunks": [16, 1]},
    {"chunks": []}, {"chunks": [16.0]}, {"chunks": [True]}, {"chunks": 16}, {"chunks": None}])
def test_an_array_that_is_told_otherwise_is_refused(arrays, change):
    edit(arrays / NORM / ".zarray", lambda tree: tree.update(change))
    with pytest.raises(ValueError, match=r"the shape or dtype of params\.norm\.scale differs, or how it is stored"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("name", ["zarr_format", "order", "compressor", "filters", "fill_value",
                                  "dimension_separator", "shape", "dtype"])
def test_an_array_of_which_too_little_is_told_is_refused(arrays, name):
    edit(arrays / NORM / ".zarray", lambda tree: tree.pop(name))
    with pytest.raises(ValueError, match="how it is stored"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_array_of_another_dtype_is_refused(arrays, dtype):
    with pytest.raises(ValueError, match="the shape or dtype"):
        check_layout(arrays, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), SHAPES))


@pytest.mark.parametrize("chunks", [[8], [17]])
def test_pieces_of_another_size_are_refused(arrays, chunks):
    """The norm's 16 numbers are one piece of 32 bytes."""
    assert (arrays / NORM / "0").stat().st_size == 32
    edit(arrays / NORM / ".zarray", lambda tree: tree.update(chunks=chunks))
    with pytest.raises(ValueError, match="truncated or too long"):
        check_layout(arrays, SHAPES)


def test_pieces_of_which_one_has_the_bytes_of_another_are_refused(arrays):
    first, second = sorted(file for file in (arrays / EMBEDDING).iterdir() if file.name != ".zarray")[:2]
    second.write_bytes(second.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{EMBEDDING} is truncated or too long"):
        check_layout(arrays, SHAPES)
    first.write_bytes(first.read_bytes() + b"\0\0")
    with pytest.raises(ValueError, match=f"{EMBEDDING} is truncated or too long"):
        check_layout(arrays, SHAPES)


def test_a_piece_too_few_is_refused(arrays):
    (arrays / EMBEDDING / "0.0").unlink()
    with pytest.raises(ValueError, match=f"{EMBEDDING} is truncated or too long"):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("name", ["99.0", "0", "0.0.0", "00.0", "0.0~", "a"])
def test_a_piece_of_another_name_is_refused(arrays, name):
    (arrays / EMBEDDING / "0.0").rename(arrays / EMBEDDING / name)
    with pytest.raises(ValueError, match=EMBEDDING):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("change", [
    {"chunk_shape": [15]}, {"chunk_shape": [16, 1]}, {"chunk_shape": None}, {"write_shape": []},
    {"write_shape": [16, 1]}, {"write_shape": [0]}, {"write_shape": [-16]}, {"write_shape": [16.0]},
    {"write_shape": [True]}, {"write_shape": 16}, {"write_shape": None}])
def test_pieces_that_are_told_otherwise_are_refused(arrays, change):
    file = arrays / "array_metadatas" / "process_0"
    edit(file, lambda tree: told(tree, NORM).update(change))
    with pytest.raises(ValueError, match="process_0 differs"):
        check_layout(arrays, SHAPES)


def test_pieces_of_an_array_that_is_not_there_are_refused(arrays):
    edit(arrays / "array_metadatas" / "process_0", lambda tree: told(tree, NORM).update(param_name="params.other"))
    with pytest.raises((KeyError, ValueError)):
        check_layout(arrays, SHAPES)


@pytest.mark.parametrize("name", ["_METADATA", f"{NORM}/.zarray", "array_metadatas/process_0"])
def test_other_encodings_are_refused(arrays, name):
    (arrays / name).write_text((arrays / name).read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match=r"."):
        check_layout(arrays, SHAPES)
