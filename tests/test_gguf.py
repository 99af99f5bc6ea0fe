"""GGUF files: small ones written here, in both architectures, and damaged ones."""

import gguf
import numpy as np
import pytest

from converters.assemble import take_apart
from converters.cli import main
from converters.gguf_file import GGUFFile
from converters.names import gguf_name, target_slots
from jetspec_jax import checkpoint, load_pretrained
from jetspec_jax.target import target_shapes
from tests.models import random_params, tiny_target

TOKENS = ["<|end|>", "<|start|>", *sorted("abcdeĠ1234567"), "ab", "Ġc"]


def interleaved(weight, heads):
    """What llama.cpp's converter does to Llama's queries and keys."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(file, config, tensors, arch, merges=("a b", "Ġ c"), **changes):
    writer = gguf.GGUFWriter(file, arch)
    fields = {"context_length": 128, "embedding_length": config.hidden_size, "block_count": config.num_layers,
              "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_heads,
              "attention.head_count_kv": config.num_kv_heads, "attention.key_length": config.head_dim, **changes}
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{name}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{name}", value)
    if "rope.freq_base" not in changes:
        writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
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


def test_quantised_tensors_are_dequantised(example, tmp_path):
    _, _, _, config, arch = example
    values = np.random.default_rng(1).standard_normal((config.vocab_size, 32)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", arch)
    for name in ("block_count", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"{arch}.{name}", 4)
    writer.add_uint32(f"{arch}.embedding_length", 32)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
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
    for name, message in (("rope.freq_base", "its metadata is not that of"), ("block_count", "num_layers must be"),
                          ("attention.head_count", "its metadata is not that of")):
        write(tmp_path / "text.gguf", config, tensors, arch, **{name: "many"})
        refused(capsys, tmp_path / "text.gguf", tmp_path / "out", message)


@pytest.mark.parametrize("merge", ["ab", "a d"])  # one half; two known tokens that make no token
def test_merges_that_make_no_tokens_are_refused(example, tmp_path, capsys, merge):
    _, _, tensors, config, arch = example
    write(tmp_path / "merges.gguf", config, tensors, arch, merges=["a b", merge])
    refused(capsys, tmp_path / "merges.gguf", tmp_path / "out", "its tokenizer is damaged")


def test_other_architectures_are_refused(example, tmp_path, capsys):
    _, _, tensors, config, _ = example
    write(tmp_path / "other.gguf", config, tensors, "mamba")
    refused(capsys, tmp_path / "other.gguf", tmp_path / "out", "'mamba'")
