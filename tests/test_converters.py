"""Conversion: every tensor arrives where it belongs, and nothing unsound gets through."""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from converters import convert
from converters.assemble import take_apart
from converters.cli import main
from converters.names import head_slots, target_slots
from jetspec_jax import JetSpecError, checkpoint, load_pretrained
from jetspec_jax.generate import generate
from jetspec_jax.head import head_shapes
from jetspec_jax.presets import PRESETS
from jetspec_jax.target import target_shapes
from tests.models import DATA, tiny_head, tiny_moe, tiny_target

DENSE, TIED, MOE = DATA / "dense", DATA / "tied_bidirectional", DATA / "moe"


@pytest.fixture
def target(tmp_path):
    """A copy of a recorded target that a test may damage."""
    return shutil.copytree(DENSE / "target", tmp_path / "source")


def rewrite(folder, change):
    """Loads the tensors of a folder, lets `change` alter the dict, and writes them back."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shard(folder, parts=3):
    """Splits model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[i::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("config", [PRESETS["qwen3-8b"].target, PRESETS["qwen3-0.6b"].target,
                                    PRESETS["smollm2-135m"].target, PRESETS["qwen3-30b-a3b"].target,
                                    tiny_target(qkv_bias=True, out_bias=True)])
def test_target_table_covers_every_parameter_once(config):
    assert_table_covers(target_slots(config), target_shapes(config))


@pytest.mark.parametrize("config", [PRESETS["qwen3-8b"].head, tiny_head(tiny_target(), qkv_bias=True)])
def test_head_table_covers_every_parameter_once(config):
    assert_table_covers(head_slots(config), head_shapes(config))


@pytest.mark.parametrize("fused", [False, True])
def test_both_layouts_of_experts_cover_every_parameter_once(fused):
    config = tiny_moe(num_layers=3, dense_layers=(1,))
    slots = target_slots(config, fused)
    assert_table_covers(slots, target_shapes(config))
    assert sum(len(slot.parts) for slot in slots) == 3 + 3 * 8 + 3 + 2 * (3 if fused else 1 + 3 * 5)


def assert_table_covers(slots, shapes):
    expected = {tuple(key.key for key in path[1:]): leaf.shape
                for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    found = {}
    for slot in slots:
        assert slot.path not in found
        assert sum(math.prod(part.shape) for part in slot.parts) == math.prod(slot.shape)
        found[slot.path] = slot.shape
    assert found == expected
    names = [part.name for slot in slots for part in slot.parts]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "tensors"), [("qwen3-8b", 58), ("qwen3-30b-a3b", 91)])
def test_the_released_heads_have_so_many_tensors(name, tensors):
    assert sum(len(slot.parts) for slot in head_slots(PRESETS[name].head)) == tensors


def fuse_experts(tensors):
    """The layout that transformers has in memory: per layer [E, 2F, D] and [E, D, F]."""
    stack = lambda layer, kind: np.stack([tensors.pop(f"{layer}.{e}.{kind}.weight") for e in range(8)])  # noqa: E731
    for layer in [f"model.layers.{i}.mlp.experts" for i in range(5)]:
        gate, up = stack(layer, "gate_proj"), stack(layer, "up_proj")
        tensors[f"{layer}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{layer}.down_proj"] = stack(layer, "down_proj")


@pytest.mark.parametrize("pieces", [1, 3])
def test_both_layouts_of_experts_become_the_same_checkpoint(tmp_path, pieces):
    """Every expert's tensors in its place, by the file's own names; the checkpoint decodes as recorded."""
    source = shutil.copytree(MOE / "target", tmp_path / "each")
    tensors = load_file(source / "model.safetensors")
    fused = shutil.copytree(source, tmp_path / "fused")
    rewrite(fused, fuse_experts)
    for folder in (source, fused):
        if pieces > 1:
            shard(folder, pieces)
        assert main(["target", str(folder), str(tmp_path / f"{folder.name}_out")]) == 0
    config, params = checkpoint.load(tmp_path / "each_out")
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint.load(tmp_path / "fused_out")[1])
    mlp, theirs = params["params"]["layers_2"]["mlp"], "model.layers.2.mlp."
    np.testing.assert_array_equal(mlp["router"], tensors[f"{theirs}gate.weight"].T)
    np.testing.assert_array_equal(mlp["gate_up_proj"][6, :, 48:], tensors[f"{theirs}experts.6.up_proj.weight"].T)
    np.testing.assert_array_equal(mlp["down_proj"][7], tensors[f"{theirs}experts.7.down_proj.weight"].T)
    for name, tensor in take_apart(params, target_slots(config)):
        np.testing.assert_array_equal(tensor, tensors.pop(name))
    assert not tensors
    case = json.loads((MOE / "expected.json").read_text())["cases"][0]
    prompt = load_file(MOE / "activations.safetensors")["0.prompt"].tolist()
    assert generate(load_pretrained(tmp_path / "each_out"), prompt, max_new_tokens=8, tree=None,
                    eos_token_ids=()).token_ids == case["ar_token_ids"][:8]


@pytest.mark.parametrize(("changes", "layers"), [
    ({}, ()), ({"decoder_sparse_step": 2}, (0, 2, 4)), ({"mlp_only_layers": [3]}, (3,)),
    ({"mlp_only_layers": [1, 0], "decoder_sparse_step": 3}, (0, 1, 3, 4)), ({"norm_topk_prob": False}, ()),
    ({"num_local_experts": 8, "num_experts": None}, ()), ({"num_local_experts": 8, "num_experts": 8}, ())])
def test_which_layers_have_experts(tmp_path, changes, layers):
    shutil.copy(MOE / "target" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    config = convert.read_config(tmp_path, "target")
    assert (config.dense_layers, config.num_experts, config.num_experts_per_tok) == (layers, 8, 2)
    assert config.norm_topk_prob == changes.get("norm_topk_prob", True)


@pytest.mark.parametrize(("changes", "message"), [
    ({"decoder_sparse_step": 0}, "decoder_sparse_step"), ({"mlp_only_layers": 3}, "mlp_only_layers must be a list"),
    ({"mlp_only_layers": [2]}, "lacks"), ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ({"num_experts": None}, "lacks 'num_experts'"), ({"num_experts": 7}, "holds"), ({"num_experts": 9}, "lacks"),
    ({"num_experts_per_tok": 9}, "more than num_experts"), ({"moe_intermediate_size": 40}, "shape")])
def test_configs_of_experts_that_do_not_fit_are_refused(tmp_path, capsys, changes, message):
    source = shutil.copytree(MOE / "target", tmp_path / "source")
    edit_json(source / "config.json", **changes)
    assert_refused(tmp_path, source, capsys, message)


@pytest.mark.parametrize("pieces", [1, 3])
def test_converted_target_and_head_decode_as_recorded(tmp_path, target, pieces):
    if pieces > 1:
        shard(target, pieces)
    assert main(["target", str(target), str(tmp_path / "t")]) == 0
    assert main(["head", str(DENSE / "head"), str(tmp_path / "h")]) == 0
    case = json.loads((DENSE / "expected.json").read_text())["cases"][0]
    prompt = load_file(DENSE / "activations.safetensors")["0.prompt"].tolist()
    out = generate(load_pretrained(tmp_path / "t", tmp_path / "h"), prompt, max_new_tokens=case["max_new"])
    assert out.token_ids == case["ar_token_ids"]
    assert out.accept_lengths == case["runs"][1]["accept_lengths"]


def test_dtype_option_rounds_once(tmp_path, target):
    assert main(["target", str(target), str(tmp_path / "t"), "--dtype", "bfloat16"]) == 0
    config, params = checkpoint.load(tmp_path / "t")
    assert config.dtype == "bfloat16"
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["params"]["embedding"], embedding.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("source", [DENSE / "head", TIED / "head"])
def test_exported_heads_are_byte_equal(tmp_path, source, dtype):
    if dtype:  # released heads are bfloat16 files
        source = shutil.copytree(source, tmp_path / "bf16")
        rewrite(source, lambda tensors: {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
        edit_json(source / "config.json", dtype="bfloat16")
    assert main(["head", str(source), str(tmp_path / "h")]) == 0
    assert main(["export-head", str(tmp_path / "h"), str(tmp_path / "back")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes()
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    for key in ("block_size", "dflash_config", "num_target_layers", "rope_theta", "head_dim", "num_hidden_layers"):
        assert ours[key] == theirs[key]
    assert convert.read_head_config(tmp_path / "back") == convert.read_head_config(source)


def test_rope_parameters_are_read(tmp_path):
    source = shutil.copytree(DENSE / "head", tmp_path / "head")
    config = json.loads((source / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": 12345.0, "rope_type": "default"}
    (source / "config.json").write_text(json.dumps(config))
    assert convert.read_head_config(source).rope_theta == 12345.0


def test_a_head_without_causal_flag_is_bidirectional(tmp_path):
    source = shutil.copytree(DENSE / "head", tmp_path / "head")
    assert convert.read_head_config(source).causal
    edit_json(source / "config.json", dflash_config={"mask_token_id": 63, "target_layer_ids": [1, 3, 5]})
    assert not convert.read_head_config(source).causal


def test_tokenizer_files_travel_along(tmp_path, target):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(target / "tokenizer.json"))
    (target / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["target", str(target), str(tmp_path / "t")]) == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "t" / "tokenizer" / name).read_bytes() == (target / name).read_bytes()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", b"{}", "tokenizer.* cannot be loaded"),
    ("additional_chat_templates/rag.jinja", b"\xff", "rag.jinja is not UTF-8 text")])
def test_a_damaged_tokenizer_is_told_at_once(tmp_path, target, capsys, name, content, message):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(target / "tokenizer.json"))
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_bytes(content)
    assert main(["target", str(target), str(tmp_path / "t")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "t").exists()


def test_a_tokenizer_without_a_class_stays_that_of_its_model(tmp_path, target):
    """Qwen's composes accents; nothing but the model's type says that this one is Qwen's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(target / "tokenizer.json"))
    edit_json(target / "config.json", model_type="qwen3")
    theirs = AutoTokenizer.from_pretrained(target)
    assert main(["target", str(target), str(tmp_path / "t")]) == 0
    ours = load_pretrained(tmp_path / "t").tokenizer
    assert type(ours) is type(theirs)
    assert ours("e\u0301 1")["input_ids"] == theirs("e\u0301 1")["input_ids"]


def test_generation_config_names_the_end_tokens(target):
    edit_json(target / "config.json", eos_token_id=5)
    assert convert.read_target_config(target).eos_token_ids == (5,)
    edit_json(target / "generation_config.json", eos_token_id=[7, 9])
    assert convert.read_target_config(target).eos_token_ids == (7, 9)


def test_a_stored_tied_lm_head_must_be_the_embedding(tmp_path):
    source = shutil.copytree(TIED / "target", tmp_path / "source")
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert main(["target", str(source), str(tmp_path / "good")]) == 0
    rewrite(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    assert main(["target", str(source), str(tmp_path / "bad")]) == 2


NAME = "model.layers.3.mlp.up_proj.weight"
BAD_TENSORS = {
    "lacks 1 tensor": lambda t: t.pop(NAME) is None or t,
    "holds 1 tensor": lambda t: t.update({"model.layers.8.mlp.up_proj.weight": t[NAME]}),
    "has shape": lambda t: t.update({NAME: t[NAME].T.copy()}),
    "not finite": lambda t: t[NAME].__setitem__((3, 4), np.nan),
    "dtype I32": lambda t: t.update({NAME: t[NAME].astype(np.int32)}),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_unsound_tensors_are_refused(tmp_path, target, capsys, message):
    rewrite(target, BAD_TENSORS[message])
    assert_refused(tmp_path, target, capsys, message)


def assert_refused(tmp_path, source, capsys, message, kind="target"):
    """One line that says so, status 2, and no output."""
    out = tmp_path / "output"
    assert main([kind, str(source), str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("jetspec-convert: error: ")
    assert [path.name for path in tmp_path.iterdir() if "output" in path.name] == []


def test_infinity_after_a_cast_is_refused(tmp_path, target):
    rewrite(target, lambda t: t.update({NAME: np.full(t[NAME].shape, 3.4e38, np.float32)}))
    with pytest.raises(JetSpecError, match="not finite after the cast"):
        convert.read_target(target, "bfloat16", progress=False)


def damage_header(change):
    def damage(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(change(json.loads(data[8:8 + length]))).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])
    return damage


def cut(count):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:count])
    return damage


def double_name(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8:8 + length].rstrip()
    entry = header[1:header.index(b"}") + 1]
    header = b"{" + entry + b"," + header[1:]
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])


def set_header(text):
    """These bytes in the place of the header, with their length before them."""
    return lambda folder: (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


def be_pipe(name):
    """A pipe that nobody writes to, in the place of a file."""
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return damage


@pytest.mark.parametrize("metadata", [None, 7, [], "text", {"format": ["pt"]}])
def test_metadata_of_any_type_is_left_alone(target, metadata):
    damage_header(lambda header: {**header, "__metadata__": metadata})(target)
    assert convert.read_target(target, progress=False)[0].num_layers == 8


@pytest.mark.parametrize(("name", "dtype", "message"), [
    ("model.embed_positions.position_ids", "I64", "holds integers (dtype I64), which no weight of a supported"),
    ("model.layers.0.self_attn.bias", "BOOL", "holds integers (dtype BOOL)"),
    ("model.layers.0.self_attn.q_proj.qweight", "I32", "quantised checkpoints must be dequantised"),
    ("model.layers.0.self_attn.q_proj.g_idx", "I32", "quantised checkpoints"), (NAME, "F8_E5M2", "quantised check"),
    ("model.layers.0.self_attn.q_proj.weight.absmax", "U8", "quantised checkpoints"), (NAME, "I8", "quantised check")])
def test_integers_are_not_all_quantised_weights(tmp_path, target, capsys, name, dtype, message):
    damage_header(lambda header: {**header, name: {**header[NAME], "dtype": dtype}})(target)
    assert_refused(tmp_path, target, capsys, f"tensor {name} has dtype '{dtype}'" if "quant" in message else message)


def set_entry(name, **changes):
    return damage_header(lambda header: {**header, name: {**header[name], **changes}})


@pytest.mark.parametrize(("damage", "message"), [
    (cut(0), "truncated"), (cut(5), "truncated"), (cut(300), "truncated"), (cut(-4), "truncated download"),
    (double_name, "occurs twice"), (set_entry(NAME, data_offsets=[0, 32768]), "overlap"),
    (set_entry(NAME, data_offsets=[10**15, 10**15 + 32768]), "overlap or leave gaps"),
    (set_entry(NAME, data_offsets=[0]), "lacks dtype"), (set_entry(NAME, shape=[-1, 64]), "has shape"),
    (set_entry(NAME, shape=[128, 65]), "does not take"), (set_entry(NAME, shape=[2**40, 2**40]), "does not take"),
    (set_entry(NAME, shape="64"), "has shape"), (set_entry(NAME, dtype=[]), "has dtype []"),
    (set_entry(NAME, dtype="F8_E4M3"), "F8_E4M3"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "header length"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"[1,2,3,4,5,6,78]"), "not a JSON"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors"),
    (set_entry(NAME, dtype=["F32"]), "has dtype ['F32']"), (set_entry(NAME, data_offsets=[0.0, 32768.0]), "has shape"),
    (set_entry(NAME, shape=[10**400]), "has shape [1000"), (set_entry(NAME, shape=[10**18] * 5000), "has shape [1000"),
    (set_entry(NAME, shape=[2**63, 0], data_offsets=[0, 0]), "has shape"),
    (set_entry(NAME, shape=[0, 64], data_offsets=[0, 0]), "of shape [0, 64] holds nothing"),
    (set_entry(NAME, shape=[float("nan"), 64]), "has shape [nan, 64]"),
    (set_header(b"\xff" * 40), "not a sound safetensors file"), (set_header(b"[" * 10**5), "nested too deeply"),
    (set_header(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not a sound safetensors file"),
    (damage_header(lambda header: {**header, "\ud800": header[NAME]}), r"'\ud800' is no name of a tensor"),
    (damage_header(lambda header: {**header, "a\nb": header[NAME]}), r"'a\nb' is no name of a tensor"),
    (damage_header(lambda header: {**header, "a" * 1000: header[NAME]}), "is no name of a tensor"),
    (damage_header(lambda header: {**header, NAME: [1]}), "lacks dtype"), (be_pipe("model.safetensors"), "no ordinary"),
    (be_pipe("config.json"), "config.json is no ordinary file"), (be_pipe("generation_config.json"), "no ordinary"),
    (be_pipe("model.safetensors.index.json"), "model.safetensors.index.json is no ordinary file")])
def test_hostile_files_are_refused(tmp_path, target, capsys, in_time, damage, message):
    damage(target)
    assert_refused(tmp_path, target, capsys, message)


def test_pickle_files_are_refused_unopened(tmp_path, target, capsys):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert_refused(tmp_path, target, capsys, "pickle")
    assert not (tmp_path / "exploded").exists()


def edit_index(change):
    def damage(folder):
        shard(folder)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"], folder)
        file.write_text(json.dumps(index))
    return damage


@pytest.mark.parametrize(("damage", "message"), [
    (edit_index(lambda m, f: m.update({NAME: "../other.safetensors"})), "not a file name inside the folder"),
    (edit_index(lambda m, f: m.update({NAME: "/etc/passwd"})), "not a file name inside the folder"),
    (edit_index(lambda m, f: m.update({NAME: 7})), "not a file name"),
    (edit_index(lambda m, f: m.update({NAME: "pytorch_model.bin"})), "no safetensors file"),
    (edit_index(lambda m, f: m.update({NAME: "absent.safetensors"})), "missing"),
    (edit_index(lambda m, f: m.update({NAME: "\ud800.safetensors"})), "not a file name"),
    (edit_index(lambda m, f: m.update({NAME: "é" * 200 + ".safetensors"})), "missing"),
    (edit_index(lambda m, f: m.update({"a\nb": m[NAME]})), r"'a\nb' is no name of a tensor"),
    (edit_index(lambda m, f: (f / "sub.safetensors").mkdir() or m.update({NAME: "sub.safetensors"})), "is no ordinary"),
    (edit_index(lambda m, f: os.mkfifo(f / "p.safetensors") or m.update({NAME: "p.safetensors"})), "is no ordinary"),
    (edit_index(lambda m, f: m.pop(NAME)), "disagree"),
    (edit_index(lambda m, f: m.clear()), "no weight_map"),
    (edit_index(lambda m, f: m.update({NAME: next(file for file in m.values() if file != m[NAME])})), "disagree"),
    (edit_index(lambda m, f: save_file({NAME: np.zeros((2, 2), np.float32)}, f / "extra.safetensors")
                or m.update({"other": "extra.safetensors"})), "stored twice")])
def test_an_unsound_index_is_refused(tmp_path, target, capsys, in_time, damage, message):
    damage(target)
    assert_refused(tmp_path, target, capsys, message)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"), ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"hidden_size": "64"}, "must be an integer"), ({"hidden_size": [64]}, "must be an integer"),
    ({"rope_theta": "big"}, "must be a number"), ({"rms_norm_eps": [1]}, "must be a number"),
    ({"hidden_size": 128}, "shape"), ({"num_attention_heads": 3}, "not a multiple"),
    ({"num_hidden_layers": 9, "layer_types": None}, "lacks"), ({"num_hidden_layers": 7, "layer_types": None}, "holds"),
    ({"tie_word_embeddings": True}, "ties")])
def test_configs_that_do_not_fit_are_refused(tmp_path, target, capsys, changes, message):
    edit_json(target / "config.json", **changes)
    assert_refused(tmp_path, target, capsys, message)


HUGE = 10**400
DEEP = json.loads("[" * 500 + "]" * 500)


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("target", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers must be an integer of at most"),
    ("target", {"num_hidden_layers": HUGE}, "num_hidden_layers must be an integer of at most 4096, not 1000"),
    ("target", {"num_hidden_layers": 4000, "layer_types": None}, "asks for 4000 layers, and there are 91 tensors"),
    ("target", {"num_hidden_layers": math.nan}, "num_hidden_layers must be an integer of at least 1, not nan"),
    ("target", {"vocab_size": 2**31}, "vocab_size must be an integer of at most 2147483647"),
    ("target", {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "is one of the sizes damaged?"),
    ("target", {"rope_theta": math.inf, "rope_parameters": None}, "rope_theta must be a number from 2 to 1e+30, not i"),
    ("target", {"rope_theta": HUGE, "rope_parameters": None}, "rope_theta must be a number from 2 to 1e+30, not 1000"),
    ("target", {"layer_types": DEEP}, "nested too deeply"),
    ("target", {"rope_parameters": {"a\nb": 1}}, "rope_parameters must be an object with plain names"),
    ("target", {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 1,
                                 "mscale_all_dim": -10 / math.log(4)}}, "mscale_all_dim must be a number from 0"),
    ("moe", {"num_experts": 10**9}, "num_experts must be an integer of at most 65536"),
    ("moe", {"num_experts": 65536}, "asks for 327680 experts in 5 layers, and there are "),
    ("moe", {"num_experts": None, "num_local_experts": HUGE}, "num_local_experts must be an integer of at most 65536"),
    ("moe", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers must be an integer of at most"),
    ("head", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers must be an integer of at most"),
    ("head", {"num_hidden_layers": 4000, "layer_types": None}, "asks for 4000 layers, and there are "),
    ("head", {"num_target_layers": 10**9}, "num_target_layers must be an integer of at most 4096"),
    ("head", {"dflash_config": {"mask_token_id": 63, "target_layer_ids": [1, HUGE]}}, "target_layer_ids must fit"),
    ("head", {"dflash_config": {"mask_token_id": HUGE, "target_layer_ids": [1]}}, "mask_token_id must be an integer")])
def test_numbers_that_no_model_has_are_refused(tmp_path, capsys, in_time, kind, changes, message):
    source = shutil.copytree({"target": DENSE / "target", "moe": MOE / "target", "head": DENSE / "head"}[kind],
                             tmp_path / "source")
    edit_json(source / "config.json", **changes)
    assert_refused(tmp_path, source, capsys, message, kind="head" if kind == "head" else "target")


def test_a_model_is_a_folder_or_a_file(tmp_path, capsys):
    (tmp_path / "head.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path, tmp_path / "head.gguf", capsys, "head.gguf is no folder with a config.json", kind="head")


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_damaged_configs_are_refused(tmp_path, target, capsys, text):
    if text is None:
        (target / "config.json").unlink()
    else:
        (target / "config.json").write_text(text)
    assert_refused(tmp_path, target, capsys, "config.json")


def test_target_and_head_are_not_confused(tmp_path, capsys):
    assert_refused(tmp_path, DENSE / "target", capsys, "no dflash_config", kind="head")
    assert_refused(tmp_path, DENSE / "head", capsys, "lacks")
    assert_refused(tmp_path, tmp_path / "absent", capsys, "does not exist")
    assert main(["export-head", str(DENSE / "head"), str(tmp_path / "output")]) == 2
    with pytest.raises(JetSpecError, match="does not fit"):
        load_pretrained(DENSE / "target", TIED / "head")


def test_existing_output_is_left_alone(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert main(["target", str(DENSE / "target"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def run_python(code, *arguments):
    """A process of its own, for limits and memory."""
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=root, text=True,
                          capture_output=True, timeout=300)


def test_a_full_disk_leaves_nothing(tmp_path):
    """The operating system refuses files above 20 kB, as a full disk would."""
    done = run_python("""
        import resource, sys
        from converters.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.exit(main(["target", *sys.argv[1:]]))
        """, DENSE / "target", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "nothing was left behind" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


EXPERT_FIELDS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}


@pytest.mark.parametrize(("layers", "experts", "fused"), [(16, {}, False), (8, EXPERT_FIELDS, False),
                                                          (8, EXPERT_FIELDS, True)])
def test_peak_memory_stays_near_the_outputs_size(tmp_path, layers, experts, fused):
    """At most 1.3 times the output and 1 GB: a model of 1.2 GB whose parts would not fit twice."""
    config = tiny_target(dtype="bfloat16", vocab_size=150_000, hidden_size=1024, intermediate_size=4096,
                         num_layers=layers, num_heads=16, num_kv_heads=8, head_dim=64, **experts)
    source = tmp_path / "big"
    source.mkdir()
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2**14, 2**20, dtype=np.uint16)  # finite bfloat16 bits
    save_file({part.name: np.resize(block, part.shape).view(ml_dtypes.bfloat16)
               for slot in target_slots(config, fused) for part in slot.parts}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({
        **experts, "model_type": "qwen3_moe" if experts else "qwen3", "vocab_size": 150_000, "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
        "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 600, "dtype": "bfloat16"}))
    done = run_python("""
        import sys
        from converters.cli import main
        assert main(["target", *sys.argv[1:]]) == 0
        # Not getrusage: its peak begins with the memory of the process that started this one.
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
        """, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    peak = int(done.stdout.split()[-1]) * 1024
    assert size > 1.1e9
    assert peak < 1.3 * size + 1e9
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(source)


def test_without_a_dtype_the_tensors_decide(tmp_path):
    source = shutil.copytree(DENSE / "head", tmp_path / "bf16")
    rewrite(source, lambda tensors: {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    assert main(["head", str(source), str(tmp_path / "h")]) == 0
    assert main(["export-head", str(tmp_path / "h"), str(tmp_path / "back")]) == 0
    assert (load_file(tmp_path / "back" / "model.safetensors")["fc.weight"].tobytes()
            == load_file(source / "model.safetensors")["fc.weight"].tobytes())


@pytest.mark.parametrize(("dflash", "causal"), [
    ({"causal": True}, True), ({"causal_head": True, "causal": True}, True), ({}, False), ({"causal": "no"}, None),
    ({"causal": None}, False), ({"causal": 0}, None),
    ({"causal_head": False, "causal": True}, None), ({"causal_head": [True]}, None)])
def test_both_spellings_of_the_causal_flag(tmp_path, dflash, causal):
    source = shutil.copytree(DENSE / "head", tmp_path / "head")
    edit_json(source / "config.json", dflash_config={"mask_token_id": 63, "target_layer_ids": [1, 3, 5], **dflash})
    if causal is None:
        with pytest.raises(JetSpecError, match="causal"):
            convert.read_head_config(source)
    else:
        assert convert.read_head_config(source).causal == causal


def test_what_takes_long_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(convert, "PATIENCE", 0)
    convert.read_head(DATA / "dense" / "head")
    assert "100%" in capsys.readouterr().err
