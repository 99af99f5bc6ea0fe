"""GGUF files: small ones written here, in both architectures, and damaged ones."""

import math
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from converters import gguf_header
from converters.assemble import take_apart
from converters.cli import main
from converters.gguf_file import GGUFFile
from converters.gguf_header import read_header
from converters.names import gguf_name, target_slots
from converters.tokenizer import load_tokenizer
from jetspec_jax import JetSpecError, checkpoint, load_pretrained
from jetspec_jax.config import RopeScaling
from jetspec_jax.target import target_shapes
from tests.models import random_params, tiny_target

TOKENS = ["<|end|>", "<|start|>", *sorted("abcdeĠ1234567"), "ab", "Ġc", "123"]


def interleaved(weight, heads):
    """What llama.cpp's converter does to Llama's queries and keys."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(file, config, tensors, arch, merges=("a b", "Ġ c"), pre="smollm", tokenizer=None,
          endianess=gguf.GGUFEndian.LITTLE, templates="{% for m in messages %}{{ m.content }}{% endfor %}", **changes):
    """`changes` are fields of the architecture; `tokenizer` has fields of the tokenizer."""
    writer = gguf.GGUFWriter(file, arch, endianess=endianess)
    fields = {"context_length": 128, "embedding_length": config.hidden_size, "block_count": config.num_layers,
              "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_heads,
              "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim, **changes}
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{name}", value)
    if "rope.freq_base" not in changes:
        writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in (tokenizer or {}).items():
        add = {bool: writer.add_bool, list: writer.add_array}.get(type(value), writer.add_int32)
        add(f"tokenizer.ggml.{name}", value)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(list(merges))
    if "eos_token_id" not in (tokenizer or {}):
        writer.add_eos_token_id(0)
    if isinstance(templates, int):
        writer.add_uint32("tokenizer.chat_template", templates)
    else:
        writer.add_chat_template(templates)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=["llama", "qwen3"])
def example(request, tmp_path):
    """(file, what must be loaded from it, tensors and config to write variations)."""
    arch = request.param
    llama = arch == "llama"
    config = tiny_target(dtype="float32", vocab_size=len(TOKENS), qk_norm=not llama, tie_embeddings=llama)
    params = random_params(target_shapes(config), np.random.default_rng(0))
    tensors = {}
    for name, value in take_apart(params, target_slots(config)):
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, config.num_heads if "q_proj" in name else config.num_kv_heads)
        tensors[gguf_name(name)] = np.array(value)
    write(tmp_path / "model.gguf", config, tensors, arch)
    return tmp_path / "model.gguf", params, tensors, config, arch


def test_weights_config_and_tokenizer_arrive(example, tmp_path):
    file, params, _, config, _ = example
    assert main(["target", str(file), str(tmp_path / "out")]) == 0
    loaded_config, loaded = checkpoint.load(tmp_path / "out")
    assert loaded_config.rms_norm_eps == 1e-5
    assert loaded_config.eos_token_ids == (0,)
    assert loaded_config.max_positions == 128
    assert (loaded_config.qk_norm, loaded_config.tie_embeddings) == (config.qk_norm, config.tie_embeddings)
    np.testing.assert_array_equal(loaded["params"]["layers_1"]["attention"]["qkv_proj"]["kernel"],
                                  params["params"]["layers_1"]["attention"]["qkv_proj"]["kernel"])
    np.testing.assert_array_equal(loaded["params"]["embedding"], params["params"]["embedding"])
    tokenizer = load_pretrained(tmp_path / "out").tokenizer
    ids = tokenizer("ab c<|end|>12")["input_ids"]
    assert [TOKENS[i] for i in ids] == ["ab", "Ġc", "<|end|>", "1", "2"]  # digits stay single
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab c12"
    assert tokenizer.chat_template
    direct = load_pretrained(file)  # without converting first
    assert direct.tokenizer("ab c")["input_ids"] == ids[:2]
    assert direct.target_config.dtype == "float32"


def write_embedding(file, arch, packed):
    """A file of one layer that holds nothing but an embedding table of 32 columns, in Q8_0."""
    writer = gguf.GGUFWriter(file, arch)
    for name in ("block_count", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"{arch}.{name}", 1)
    writer.add_uint32(f"{arch}.embedding_length", 32)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quantised_tensors_are_dequantised(example, tmp_path):
    _, _, _, config, arch = example
    values = np.random.default_rng(1).standard_normal((config.vocab_size, 32)).astype(np.float32)
    write_embedding(tmp_path / "q.gguf", arch, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))
    source = GGUFFile(tmp_path / "q.gguf")
    assert source.shapes["model.embed_tokens.weight"] == (config.vocab_size, 32)
    np.testing.assert_allclose(source.read("model.embed_tokens.weight"), values, atol=0.03)


def refused(capsys, file, out, message):
    assert main(["target", str(file), str(out)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("size", [0, 10, 200, -2000])
def test_truncated_files_are_refused(example, tmp_path, capsys, size):
    file = example[0]
    file.write_bytes(file.read_bytes()[:size])
    refused(capsys, file, tmp_path / "out", "model.gguf")


def test_missing_and_extra_tensors_are_refused(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    write(tmp_path / "less.gguf", config, {n: t for n, t in tensors.items() if n != "blk.1.ffn_up.weight"}, arch)
    refused(capsys, tmp_path / "less.gguf", tmp_path / "out", "lacks 1 tensor")
    write(tmp_path / "more.gguf", config, {**tensors, "blk.0.attn_rot.weight": tensors["blk.0.attn_q.weight"]}, arch)
    refused(capsys, tmp_path / "more.gguf", tmp_path / "out", "holds 1 tensor")
    write(tmp_path / "field.gguf", config, tensors, arch, embedding_length=None)
    refused(capsys, tmp_path / "field.gguf", tmp_path / "out", "embedding_length")


def test_metadata_of_wrong_types_is_refused(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    for name in ("rope.freq_base", "block_count", "attention.head_count", "context_length", "vocab_size"):
        write(tmp_path / "text.gguf", config, tensors, arch, **{name: "many"})
        refused(capsys, tmp_path / "text.gguf", tmp_path / "out", f"text.gguf: {arch}.{name} must be")


@pytest.mark.parametrize("merge", ["ab", "a d"])  # one half; two known tokens that make no token
def test_merges_that_make_no_tokens_are_refused(example, tmp_path, capsys, merge):
    _, _, tensors, config, arch = example
    write(tmp_path / "merges.gguf", config, tensors, arch, merges=["a b", merge])
    refused(capsys, tmp_path / "merges.gguf", tmp_path / "out", "its tokenizer is damaged")


@pytest.mark.parametrize(("fields", "message"), [
    ({"rope.scaling.factor": 4.0}, "rope.scaling.factor 4.0 is given without {}.rope.scaling.type"),
    ({"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor 2.0 is given without"),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "is no field of {}.rope.scaling.type 'none'"),
    ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "rope.scaling.type 'longrope' is not supported"),
    ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 4.0}, "rope.scaling.type 'dynamic' is not supported"),
    ({"rope.scaling.type": "linear"}, "lacks '{}.rope.scaling.factor'"),
    ({"rope.scaling.type": 2}, "{}.rope.scaling.type must be a text"),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.25}, "rope.scaling.factor must be a number from 1"),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": float("inf")}, "rope.scaling.factor must be a number"),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 2.0}, "is no field of"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "lacks '{}.rope.scaling.original_context_length'"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 0},
     "rope.scaling.original_context_length must be an integer of at least 1"),
    ({"rope.scaling.yarn_log_multiplier": 0.1}, "{}.rope.scaling.yarn_log_multiplier 0.1 is not supported"),
    ({"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor 0.5 is not supported"),
    ({"rope.scale_linear": 2.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "contradict each other"),
    ({"rope.scale_linear": "2"}, "rope.scale_linear must be"),
    ({"rope.scale_linear": 0.5}, "rope.scale_linear must be a number from 1"),
    ({"rope.dimension_count": 4}, "{}.rope.dimension_count must be the head dimension 8, not 4"),
    ({"attention.value_length": 16}, "{}.attention.value_length must be the head dimension 8, not 16"),
    ({"rope.freq_base": 0.0}, "rope.freq_base must be"), ({"rope.freq_base": float("inf")}, "rope.freq_base must be"),
    ({"rope.freq_base": float("nan")}, "rope.freq_base must be"), ({"attention.key_length": 0}, "key_length must be"),
    ({"attention.head_count_kv": 0}, "{}.attention.head_count_kv must be an integer of at least 1, not 0"),
    ({"attention.head_count": 0}, "{}.attention.head_count must be"), ({"context_length": 0}, "context_length must be"),
    ({"attention.sliding_window": 64}, "{}.attention.sliding_window 64 is not supported"),
    ({"attention.scale": 0.5}, "{}.attention.scale 0.5"), ({"logit_scale": 0.5}, "{}.logit_scale 0.5 is not"),
    ({"residual_scale": 0.5}, "residual_scale"), ({"embedding_scale": 12.0}, "embedding_scale 12.0 is not supported"),
    ({"expert_count": 8}, "{}.expert_count 8"), ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ({"vocab_size": 7}, "vocab_size must be the 18 rows")])
def test_metadata_that_is_not_computed_is_refused(example, tmp_path, capsys, fields, message):
    _, _, tensors, config, arch = example
    write(tmp_path / "bad.gguf", config, tensors, arch, **fields)
    refused(capsys, tmp_path / "bad.gguf", tmp_path / "out", message.format(arch))


@pytest.mark.parametrize(("tokenizer", "message"), [
    ({"eos_token_id": 99}, "tokenizer.ggml.eos_token_id must be a token id from 0 to 17, not 99"),
    ({"eot_token_id": 18}, "tokenizer.ggml.eot_token_id must be"), ({"eom_token_id": 18}, "eom_token_id must be"),
    ({"bos_token_id": 18}, "bos_token_id must be"), ({"eos_token_id": True}, "eos_token_id must be an integer"),
    ({"add_bos_token": True}, "lacks 'tokenizer.ggml.bos_token_id'"), ({"add_bos_token": 1}, "must be true or false"),
    ({"add_eos_token": 1, "bos_token_id": 1}, "add_eos_token must be true or false"),
    ({"eos_token_id": [0, 1]}, r"eos_token_id must be an integer of at least -1, not [0, 1]"),
    ({"eot_token_id": [1]}, "eot_token_id must be an integer"), ({"add_bos_token": [False]}, "add_bos_token must be")])
def test_tokenizers_that_make_no_sense_are_refused(example, tmp_path, capsys, tokenizer, message):
    _, _, tensors, config, arch = example
    write(tmp_path / "bad.gguf", config, tensors, arch, tokenizer=tokenizer)
    refused(capsys, tmp_path / "bad.gguf", tmp_path / "out", message)


@pytest.mark.parametrize(("tokenizer", "ends"), [
    ({"eot_token_id": 1, "eom_token_id": 4}, (0, 1, 4)), ({"eot_token_id": 0}, (0,)), ({"eos_token_id": -1}, ()),
    ({"eot_token_id": -1}, (0,))])
def test_end_tokens(example, tmp_path, tokenizer, ends):
    _, _, tensors, config, arch = example
    write(tmp_path / "ends.gguf", config, tensors, arch, tokenizer=tokenizer)
    assert GGUFFile(tmp_path / "ends.gguf").config.eos_token_ids == ends


@pytest.mark.parametrize(("pre", "tokenizer", "text", "expected"), [
    ("smollm", {"bos_token_id": 1}, "ab", ["ab"]),
    ("smollm", {"bos_token_id": 1, "add_bos_token": True}, "ab", ["<|start|>", "ab"]),
    ("qwen2", {"add_eos_token": True}, "ab", ["ab", "<|end|>"]),
    ("gpt-2", {"bos_token_id": 1, "add_bos_token": True, "add_eos_token": True}, "ab", ["<|start|>", "ab", "<|end|>"]),
    ("llama-bpe", {"bos_token_id": 1}, "ab c", ["<|start|>", "ab", "Ġc"]),
    ("llama-bpe", {"bos_token_id": 1, "add_bos_token": False}, "1234561", ["123", "4", "5", "6", "1"]),
    ("qwen2", {}, "1231", ["1", "2", "3", "1"])])
def test_what_tokenizers_add(example, tmp_path, pre, tokenizer, text, expected):
    """Llama 3 begins every text, takes three digits at once, and a known piece whole, without merges to it."""
    _, _, tensors, config, arch = example
    write(tmp_path / "model.gguf", config, tensors, arch, pre=pre, tokenizer=tokenizer)
    assert main(["target", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    for source in ("model.gguf", "out"):
        loaded = load_pretrained(tmp_path / source).tokenizer
        assert [TOKENS[i] for i in loaded(text)["input_ids"]] == expected
        plain = [token for token in expected if token not in TOKENS[:2]]
        assert [TOKENS[i] for i in loaded(text, add_special_tokens=False)["input_ids"]] == plain


def test_all_chat_templates_travel(example, tmp_path):
    _, _, tensors, config, arch = example
    write(tmp_path / "model.gguf", config, tensors, arch, templates=[
        {"name": "default", "template": "a{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ messages[0].content }}b"}])
    assert main(["target", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    for source in ("model.gguf", "out"):
        pair = load_pretrained(tmp_path / source)
        assert (pair.chat("c"), pair.chat("c", chat_template="tool_use")) == ("ac", "cb")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device\n(28)")])
def test_no_room_for_the_copy_of_a_tokenizer(example, monkeypatch, error):
    """The Rust library raises the second."""
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", refuse)
    with pytest.raises(JetSpecError) as refused:
        load_tokenizer(example[0])
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(
        f"cannot copy the tokenizer of {example[0]} into TMPDIR: No space left on device")


def test_a_chat_template_is_text(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    write(tmp_path / "bad.gguf", config, tensors, arch, templates=3)
    refused(capsys, tmp_path / "bad.gguf", tmp_path / "out", "tokenizer.chat_template must be a text, not 3")


def test_how_text_is_split_is_not_guessed(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    write(tmp_path / "model.gguf", config, tensors, arch, pre=None)
    assert main(["target", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 2
    assert "pre-tokenizer None is not supported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_metadata_is_noted_once(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    write(tmp_path / "new.gguf", config, tensors, arch, tokenizer={"novel": 1, "add_space_prefix": False},
          **{"novel_gate": 1, "rope.scaling.finetuned": 1, "expert_count": 0, "rope.dimension_count": config.head_dim})
    assert main(["target", str(tmp_path / "new.gguf"), str(tmp_path / "out")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert notes == [f"jetspec-convert: note: {tmp_path / 'new.gguf'}: fields that are not known here are ignored: "
                     f"'{arch}.novel_gate', 'tokenizer.ggml.novel'"]


def move(file, offsets):
    """Rewrites the offset of the tensors that `offsets` names, which stands at the end of each description."""
    data = bytearray(file.read_bytes())
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name in offsets:
            at = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) - 8
            data[at:at + 8] = offsets[tensor.name].to_bytes(8, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(("offset", "message"), [
    (1, "begins at offset 1, which is no multiple of the alignment 32"), (0, "inside tensor"), (64, "inside tensor"),
    (2**20, "not a sound GGUF file"), (2**64 - 32, "not a sound GGUF file"), (2**64 - 1184, "not a sound GGUF file"),
    (2**63, "not a sound GGUF file")])
def test_tensors_that_lie_wrong_are_refused(example, tmp_path, capsys, offset, message):
    """Unaligned, over another, past the end, and so far that 64 bits wrap around into the file."""
    file = example[0]
    move(file, {"blk.1.ffn_up.weight": offset})
    refused(capsys, file, tmp_path / "out", message)


def test_big_endian_files_are_refused(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    write(tmp_path / "big.gguf", config, tensors, arch, endianess=gguf.GGUFEndian.BIG)
    refused(capsys, tmp_path / "big.gguf", tmp_path / "out", "big.gguf is a big-endian GGUF file")


@pytest.mark.parametrize(("fields", "scaling", "limit"), [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling(kind="linear", factor=4), 512),
    ({"rope.scale_linear": 4.0}, RopeScaling(kind="linear", factor=4), 512), ({"rope.scale_linear": 1.0}, None, 128),
    ({"rope.scaling.type": "none"}, None, 128), ({"rope.scaling.original_context_length": 32}, None, 128),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
      "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 0.5, "rope.scaling.attn_factor": 1.1},
     RopeScaling(kind="yarn", factor=4, original_max_positions=64, beta_fast=16, beta_slow=0.5, truncate=True,
                 attention_factor=1.1 * (0.1 * math.log(4) + 1)), 256)])
def test_rope_scaling_is_read(example, tmp_path, fields, scaling, limit):
    _, _, tensors, config, arch = example
    write(tmp_path / "scaled.gguf", config, tensors, arch, **fields)
    read = GGUFFile(tmp_path / "scaled.gguf").config
    assert (read.rope_scaling, read.max_positions) == (scaling, limit)


def test_a_table_of_divisors_is_read(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    table = np.array([1, 1.5, 4, 8], np.float32)
    write(tmp_path / "table.gguf", config, {**tensors, "rope_freqs.weight": table}, arch)
    assert main(["target", str(tmp_path / "table.gguf"), str(tmp_path / "out")]) == 0
    loaded = checkpoint.load_config(tmp_path / "out")
    assert loaded.rope_scaling == RopeScaling(kind="table", divisors=(1.0, 1.5, 4.0, 8.0))
    for bad, message in ((table[:3], "3 divisors"), (table - 1, "divisors must be"), (table * np.inf, "divisors must")):
        write(tmp_path / "bad.gguf", config, {**tensors, "rope_freqs.weight": bad}, arch)
        refused(capsys, tmp_path / "bad.gguf", tmp_path / "bad", message)
    write(tmp_path / "both.gguf", config, {**tensors, "rope_freqs.weight": table}, arch, **{"rope.scale_linear": 2.0})
    refused(capsys, tmp_path / "both.gguf", tmp_path / "bad", "contradict each other")


def test_other_architectures_are_refused(example, tmp_path, capsys):
    _, _, tensors, config, _ = example
    write(tmp_path / "other.gguf", config, tensors, "mamba")
    refused(capsys, tmp_path / "other.gguf", tmp_path / "out", "'mamba'")


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def field(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def tensor(name="t", shape=(4,), kind=0, offset=0):
    """`shape` with the shortest axis first, as files have it."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def write_bytes(file, fields=(), tensors=(), data=b"", version=3, counts=None, alignment=32):
    """A file of these bytes; `counts` are the counts that it states, of tensors and of fields."""
    header = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(fields))))
    header += b"".join((*fields, *tensors))
    file.write_bytes(header + bytes(-len(header) % alignment if data else 0) + data)
    return file


@pytest.mark.parametrize("version", [2, 3])
def test_headers_are_read(tmp_path, version):
    values = {"u8": (0, "B", 255), "i8": (1, "b", -128), "u16": (2, "H", 65535), "i16": (3, "h", -2),
              "u32": (4, "I", 7), "i32": (5, "i", -7), "f32": (6, "f", 0.1), "yes": (7, "?", True),
              "u64": (10, "Q", 2**64 - 1), "i64": (11, "q", -2**63), "f64": (12, "d", 0.1)}
    fields = [field(name, kind, struct.pack(f"<{code}", value)) for name, (kind, code, value) in values.items()]
    fields += [field("text", 8, text("é")), field("general.alignment", 4, struct.pack("<I", 64)),
               field("numbers", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)), field("none", 9, struct.pack("<IQ", 8, 0)),
               field("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
               field("lists", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQB", 0, 1, 5) + struct.pack("<IQ", 0, 0))]
    tensors = [tensor("b", (3, 2), 0, 64), tensor("a", (4,), 1, 0)]
    data = struct.pack("<4e", 1, 2, 3, 4) + bytes(56) + struct.pack("<6f", *range(6))
    file = write_bytes(tmp_path / "f.gguf", fields, tensors, data, version, alignment=64)
    header = read_header(file)
    assert header.metadata == {
        **{name: value for name, (*_, value) in values.items()}, "text": "é", "general.alignment": 64,
        "numbers": [1, -2, 3], "none": [], "texts": ["a", ""], "lists": [[5], []]}
    assert header.metadata["yes"] is True
    start = file.stat().st_size - len(data)
    assert start % 64 == 0
    assert {t.name: (t.shape, t.kind.name, t.offset - start, t.size) for t in header.tensors.values()} == {
        "a": ((4,), "F16", 0, 8), "b": ((2, 3), "F32", 64, 24)}


def listed(kind, count, data=b""):
    return [field("x", 9, struct.pack("<IQ", kind, count) + data)]


@pytest.mark.parametrize(("parts", "message"), [
    ({"counts": (2**40, 0)}, "it counts 1099511627776 tensors, and is too small for them"),
    ({"counts": (0, 2**40)}, "it counts 1099511627776 fields"), ({"counts": (2**64 - 1, 0)}, "18446744073709551615 te"),
    ({"counts": (2, 0), "tensors": [tensor()]}, "it counts 2 tensors"), ({"counts": (0, 1)}, "it counts 1 fields"),
    *(({"fields": listed(n, 2**40, bytes(64))}, "it counts 1099511627776 items of field x") for n in (0, 4, 8, 9)),
    ({"fields": listed(12, 9, bytes(64))}, "it counts 9 items of field x"),
    ({"fields": [text("x") + struct.pack("<IQ", 8, 2**63) + bytes(9)]}, "field x reaches beyond its end"),
    ({"fields": [struct.pack("<Q", 2**40) + bytes(9)]}, "the name of a field reaches beyond its end"),
    ({"fields": [field("x", 9, struct.pack("<IQ", 9, 1) * 9)]}, "list of what is not known, or nested too deeply"),
    ({"fields": listed(13, 0)}, "field x is a list of what is not known"),
    ({"fields": [field("x", 13, bytes(8))]}, "field x is of type 13, which is not known"),
    ({"fields": [field("x", 0, b"1")] * 2}, "field x occurs twice"),
    ({"fields": [field("x", 8, text(b"a\xff"))]}, "field x is not UTF-8 text"),
    ({"fields": listed(8, 2, text("a") + text(b"\xc3"))}, "field x is not UTF-8 text"),
    ({"fields": [field(b"\xff", 0, b"1")]}, "the name of a field is not UTF-8 text"),
    ({"fields": [field("a\nb", 0, b"1")]}, r"'a\\nb' is no name of a field"),
    ({"fields": [field("a" * 300, 0, b"1")]}, "is no name of a field"),
    ({"fields": [field("x", 7, b"\2")]}, "field x is neither true nor false"),
    *(({"fields": [field("general.alignment", 4, struct.pack("<I", n))]},
       f"general.alignment must be a power of two up to 65536, not {n}") for n in (0, 3, 2**17)),
    ({"fields": [field("general.alignment", 8, text("32"))]}, "general.alignment must be a power of two"),
    ({"tensors": [tensor(shape=())]}, "tensor t has 0 dimensions"),
    ({"tensors": [tensor(shape=(1,) * 5)]}, "tensor t has 5 dimensions"),
    ({"tensors": [tensor(shape=(4, 0))]}, r"tensor t has shape \[0, 4\], which is empty"),
    ({"tensors": [tensor(shape=(33, 2), kind=8)]}, r"shape \[2, 33\], which is empty or no rows of whole blocks of 32"),
    ({"tensors": [tensor(shape=(2**63, 2**63))]}, "tensor t ends at offset .*, beyond the end of the file"),
    ({"tensors": [tensor(kind=999)]}, "tensor t is of type 999, which is not known"),
    ({"tensors": [tensor(b"\xff")]}, "the name of a tensor is not UTF-8 text"),
    ({"tensors": [tensor(), tensor(offset=32)], "data": bytes(64)}, "tensor t occurs twice"),
    ({"tensors": [tensor("s", (9,)), tensor(offset=32)], "data": bytes(64)}, "t begins at offset 32, inside tensor s"),
    ({"version": 1}, "of version 1, and versions 2 and 3 are read"), ({"version": 4}, "of version 4")])
def test_headers_that_lie_are_refused(tmp_path, in_time, parts, message):
    with pytest.raises(JetSpecError, match=message) as error:
        read_header(write_bytes(tmp_path / "bad.gguf", **parts))
    assert str(error.value).startswith(f"{tmp_path / 'bad.gguf'} is ")
    assert "\n" not in str(error.value)


def test_a_header_has_a_limit_whatever_the_file_has(tmp_path, monkeypatch):
    """A field of 100 bytes: 24 of the start, 8 and 1 of its name, 4 of its type, 8 and 100 of its text."""
    file = write_bytes(tmp_path / "f.gguf", [field("x", 8, text("y" * 100))], [tensor()], bytes(1000))
    entry = len(tensor())
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 145 + entry)
    assert read_header(file).metadata == {"x": "y" * 100}
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 144 + entry)
    with pytest.raises(JetSpecError, match="tensor t reaches beyond its end"):
        read_header(file)
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 144)
    with pytest.raises(JetSpecError, match="field x reaches beyond its end"):
        read_header(file)


@pytest.mark.parametrize(("blocks", "message"), [
    (4000, "the config asks for 4000 layers, and there are "), (4097, "block_count must be an integer of at most 4096"),
    (10**9, "block_count must be an integer of at most 4096, not 1000000000")])
def test_counts_of_layers_have_a_limit(example, tmp_path, capsys, in_time, blocks, message):
    _, _, tensors, config, arch = example
    write(tmp_path / "deep.gguf", config, tensors, arch, block_count=blocks)
    refused(capsys, tmp_path / "deep.gguf", tmp_path / "out", message)


def test_a_table_as_large_as_the_file_is_not_read(example, tmp_path, capsys):
    _, _, tensors, config, arch = example
    table = np.ones((1000, 100), np.float32)
    write(tmp_path / "table.gguf", config, {**tensors, "rope_freqs.weight": table}, arch)
    refused(capsys, tmp_path / "table.gguf", tmp_path / "out", "has 100000 divisors, and head_dim 8 needs 4")


def test_what_never_ends_is_no_model(tmp_path, capsys, in_time):
    os.mkfifo(tmp_path / "model.gguf")
    for source in (tmp_path / "model.gguf", Path("/dev/zero")):
        refused(capsys, source, tmp_path / "out", f"{source} is no ordinary file")
        with pytest.raises(JetSpecError, match=f"{source} is no ordinary file"):
            load_pretrained(source)


def test_values_that_overflow_are_no_warnings(tmp_path):
    """An infinite scale: whoever reads the values finds that they are not finite."""
    block = np.frombuffer(struct.pack("<e32b", math.inf, *[0] * 32), np.uint8)
    write_embedding(tmp_path / "scale.gguf", "llama", np.tile(block, (7, 1)))
    assert np.isnan(GGUFFile(tmp_path / "scale.gguf").read("model.embed_tokens.weight")).all()
