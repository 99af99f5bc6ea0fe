"""Live parity with transformers on torch: the real formats' own implementation decides what is right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from converters.names import gguf_name
from experiments import torch_peer
from jetspec_jax import TreeConfig, load_pretrained
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.generate import generate
from jetspec_jax.pretrained import HEADS, cache_folder
from jetspec_jax.target import target_forward, target_logits
from tests import test_gguf

torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch") and pytest.importorskip("safetensors")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3,
         "max_position_embeddings": 256}
CASES = {
    "qwen3 tied, groups of 1": ("Qwen3", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16,
                                          "tie_word_embeddings": True}),
    "qwen3 untied, groups of 2": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
    "qwen3 groups of 4, odd sizes": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10,
                                               "hidden_size": 35, "intermediate_size": 51, "rms_norm_eps": 1e-5}),
    "qwen3 with biases": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
                                    "attention_bias": True}),
    "llama": ("Llama", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama tied, biases, head_dim": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24,
                                               "attention_bias": True, "tie_word_embeddings": True}),
}


def random_model(kind, sizes, seed=0):
    """A transformers model with weights large enough to matter, biases and norms included."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


EXPERTS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
           "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True}
EXPERT_CASES = {
    "all layers": {},
    "shares of all experts, tied": {"norm_topk_prob": False, "tie_word_embeddings": True},
    "dense layers": {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
}


def random_experts(sizes, seed=0):
    """A Qwen3-MoE model whose expert 5 never wins: three others have positive logits, one of each pair of opposites."""
    model = random_model("Qwen3Moe", {**EXPERTS, **sizes}, seed)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                router = layer.mlp.gate.weight
                router[1], router[4], router[7], router[5] = -router[0], -router[3], -router[6], 0
    return model


def save_experts(model, folder, fused):
    """As published (every expert by itself), or as transformers holds it in memory (one tensor a projection)."""
    model.save_pretrained(folder)
    if fused:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    names = safetensors.safe_open(folder / "model.safetensors", "np").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) == fused
    assert any(name.endswith("experts.7.up_proj.weight") for name in names) != fused


def our_logits(pair, ids, taps=()):
    ids = jnp.asarray(ids, jnp.int32)
    batch, size = ids.shape
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], ids.shape)

    @jax.jit
    def forward(params):
        out = target_forward(pair.target_config, params, ids, positions, causal_bits(batch, size),
                             KVCache.create(pair.target_config, batch, 1), jnp.zeros((batch,), jnp.int32), taps)
        return target_logits(pair.target_config, params, out.hidden), out.tapped

    logits, tapped = forward(pair.params.target)
    return np.asarray(logits), np.asarray(tapped)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tapped_states(tmp_path, case):
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 131, (2, 40))
    with torch.inference_mode():
        theirs = model(torch.tensor(ids), output_hidden_states=True)
    logits, tapped = our_logits(load_pretrained(tmp_path / "hf"), ids, taps=(0, 1))
    expected = theirs.logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    for i in range(2):  # the output of layer id is hidden_states[id + 1]
        width = model.config.hidden_size
        np.testing.assert_allclose(tapped[..., i * width:(i + 1) * width], theirs.hidden_states[i + 1].numpy(),
                                   atol=1e-4 * float(theirs.hidden_states[i + 1].abs().max()))


@pytest.mark.parametrize(("case", "fused"), [*((case, False) for case in EXPERT_CASES), ("all layers", True)])
def test_mixtures_of_experts(tmp_path, case, fused):
    """Both layouts; from one token to 256; uneven routing with an expert that no token chooses."""
    model = random_experts(EXPERT_CASES[case])
    save_experts(model, tmp_path / "hf", fused)
    pair = load_pretrained(tmp_path / "hf")
    for size in (1, 37, 256):
        ids = np.random.default_rng(size).integers(0, 131, (1, size))
        with torch.inference_mode():
            theirs = model(torch.tensor(ids), output_router_logits=True, output_hidden_states=True)
        logits, tapped = our_logits(pair, ids, taps=(0, 1))
        expected = theirs.logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
        np.testing.assert_allclose(tapped[..., 48:], theirs.hidden_states[2].numpy(), atol=1e-3)
    chosen = [np.bincount(layer.topk(3).indices.flatten(), minlength=8) for layer in theirs.router_logits]
    assert all(counts[5] == 0 and counts.max() > 1.5 * counts[counts > 0].min() for counts in chosen)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
SCALED = {
    "linear": ("Llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama3": ("Llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32, "rope_theta": 1e4}),
    "llama3, other bounds": ("Qwen3", {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 0.5,
                                       "high_freq_factor": 2.0, "original_max_position_embeddings": 40,
                                       "rope_theta": 1e3}),
    "yarn": ("Qwen3", YARN),
    "yarn with an attention factor": ("Llama", {**YARN, "attention_factor": 1.3}),
    "yarn with other bounds": ("Qwen3", {**YARN, "beta_fast": 6.0, "beta_slow": 0.5, "truncate": False}),
    "yarn with mscale": ("Qwen3", {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4}),
}


def scaled_model(case, **sizes):
    kind, rope = SCALED[case]
    return random_model(kind, {**CASES["qwen3 untied, groups of 2"][1], "rope_parameters": dict(rope),
                               "max_position_embeddings": 128, **sizes})


def assert_same_logits(model, pair, size=100):
    """Far beyond the original context; and the model is not the one without scaling."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, size))
    with torch.inference_mode():
        expected = model(torch.tensor(ids)).logits.numpy()
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(our_logits(pair, ids)[0], expected, atol=2e-4 * scale)
    unscaled = replace(pair, target_config=replace(pair.target_config, rope_scaling=None))
    assert np.abs(our_logits(unscaled, ids)[0] - expected).max() > 0.02 * scale


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", SCALED)
def test_scaled_rotary_embeddings(tmp_path, case, old):
    """As transformers writes it now, and as older files have it."""
    model = scaled_model(case)
    model.save_pretrained(tmp_path)
    if old:
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"], rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
        (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    pair = load_pretrained(tmp_path)
    assert_same_logits(model, pair)
    peer = type(model)(type(model.config)(**torch_peer.huggingface_fields(pair.target_config)))
    ours, theirs = peer.model.rotary_emb, model.model.rotary_emb
    np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6)
    assert ours.attention_scaling == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("case", ["linear", "llama3", "yarn", "yarn with other bounds"])
def test_scaled_gguf_files(tmp_path, case):
    """The same weights with llama.cpp's fields, or its tensor of divisors for llama3."""
    model = scaled_model(case, vocab_size=len(test_gguf.TOKENS), rms_norm_eps=1e-5)
    model.save_pretrained(tmp_path / "hf")
    config, rope = convert.read_config(tmp_path / "hf", "target"), SCALED[case][1]
    arch = "qwen3" if config.qk_norm else "llama"
    tensors = {gguf_name(name): value.numpy() for name, value in model.state_dict().items()}
    fields = {"context_length": 128}
    if rope["rope_type"] == "llama3":
        inverse, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model.config)
        tensors["rope_freqs.weight"] = (1e4 ** -(np.arange(0, 32, 2) / 32) / inverse.numpy()).astype(np.float32)
    else:
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": 4.0}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = 32
        fields |= {f"rope.scaling.yarn_{name}": rope[name] for name in ("beta_fast", "beta_slow") if name in rope}
    if arch == "llama":
        for name, value in tensors.items():
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                tensors[name] = test_gguf.interleaved(value, config.num_heads if "_q" in name else config.num_kv_heads)
    test_gguf.write(tmp_path / "model.gguf", config, tensors, arch, **fields)
    if "truncate" in rope:  # GGUF always has whole bounds
        model.model.rotary_emb = type(model.model.rotary_emb)(type(model.config)(
            **{**model.config.to_dict(), "rope_parameters": {**rope, "truncate": True}}))
    assert_same_logits(model, load_pretrained(tmp_path / "model.gguf"))


@pytest.mark.parametrize("case", ["qwen3 untied, groups of 2", "llama tied, biases, head_dim"])
def test_sharded_files_are_the_same_model(tmp_path, case):
    model = random_model(*CASES[case])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = np.random.default_rng(0).integers(0, 131, (1, 20))
    one, many = (our_logits(load_pretrained(tmp_path / name), ids)[0] for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)


def test_bfloat16_files(tmp_path):
    """Read as float32, the rounded weights give transformers' float32 logits; read as bfloat16, logits near them."""
    model = random_model(*CASES["qwen3 untied, groups of 2"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(0, 131, (1, 30))
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.inference_mode():
        exact = reread(torch.tensor(ids)).logits.numpy()
    scale = np.abs(exact).max()
    wide = load_pretrained(tmp_path / "hf", dtype="float32")
    np.testing.assert_allclose(our_logits(wide, ids)[0], exact, atol=1e-4 * scale)
    narrow = load_pretrained(tmp_path / "hf", dtype="bfloat16")
    assert narrow.params.target["params"]["embedding"].dtype == jnp.bfloat16
    np.testing.assert_allclose(our_logits(narrow, ids)[0], exact, atol=0.05 * scale)


@pytest.mark.parametrize("case", ["qwen3 untied, groups of 2", "llama", "dense layers"])
def test_greedy_generation(tmp_path, case):
    model = random_model(*CASES[case]) if case in CASES else random_experts(EXPERT_CASES[case])
    model.save_pretrained(tmp_path / "hf")
    prompt = [5, 99, 3]
    with torch.inference_mode():
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=25, do_sample=False, eos_token_id=None,
                                pad_token_id=0)[0, 3:].tolist()
    assert generate(load_pretrained(tmp_path / "hf"), prompt, max_new_tokens=25, tree=None,
                    eos_token_ids=()).token_ids == theirs


TEXT = ("The capital of France is Paris. In 1889, 300 workers finished the tower (18,038 parts!);\n\n"
        "def area(r):\n    return 3.14159 * r ** 2  # déjà vu, naïve café, 北京")


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def peer(smollm2):
    """transformers reads the same GGUF file with its own dequantisation and permutation."""
    folder = cache_folder() / "smollm2-135m"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32).eval()


def test_smollm2_logits_on_real_text(smollm2, peer):
    ids = np.asarray([smollm2.tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        expected = peer(torch.tensor(ids)).logits.numpy()
    logits, _ = our_logits(smollm2, ids)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_smollm2_tokenizer_is_the_ggufs_own(smollm2):
    theirs = transformers.AutoTokenizer.from_pretrained(cache_folder() / "smollm2-135m",
                                                        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    ids = smollm2.tokenizer(TEXT)["input_ids"]
    assert smollm2.tokenizer.decode(ids) == TEXT
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Why?"}]
    for messages, given in ((talk[:1], "Hi"), (talk, talk)):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert smollm2.encode(smollm2.chat(given)) == expected
    chat = smollm2.encode(smollm2.chat("Hi"))
    assert (chat[0], chat.count(2)) == (1, 2)  # <|im_start|> and <|im_end|> are single tokens
    assert all(len(smollm2.tokenizer.decode([i]).strip()) <= 1 for i in smollm2.tokenizer("18038")["input_ids"])


def test_smollm2_knows_the_capital_of_france_by_tree(smollm2):
    out = generate(smollm2, "The capital of France is", max_new_tokens=12, tree=TreeConfig(budget=16))
    plain = generate(smollm2, "The capital of France is", max_new_tokens=12, tree=None)
    assert "Paris" in out.text
    assert out.token_ids == plain.token_ids


def test_a_preset_without_its_head():
    alone = load_pretrained("smollm2-135m", False)
    assert (alone.head_config, alone.params.head) == (None, {})


def test_the_shipped_head_gains_tokens(smollm2):
    """On a prompt of our own; the tokens stay the plain ones."""
    prompt = smollm2.chat("Tom has 4 red balls and buys 7 blue balls for 3 dollars each. How much does he pay?")
    out = generate(smollm2, prompt, max_new_tokens=48)
    assert sum(out.accept_lengths) / out.rounds > 1.8
    assert out.token_ids == generate(smollm2, prompt, max_new_tokens=48, tree=None).token_ids


def test_the_shipped_head_survives_conversion_and_export(tmp_path):
    from converters.cli import main
    shipped = HEADS / "smollm2-135m"
    assert main(["head", str(shipped), str(tmp_path / "converted")]) == 0
    assert main(["export-head", str(tmp_path / "converted"), str(tmp_path / "again")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (shipped / name).read_bytes()
    assert (shipped / "model.safetensors").stat().st_size < 40e6


def test_a_hugging_face_folder_with_tokenizer_loads_as_it_is(tmp_path, smollm2):
    """The tokenizer and the chat template of a plain Hugging Face folder are found, and travel through conversion."""
    from converters.cli import main
    model = random_model(*CASES["llama"])
    model.save_pretrained(tmp_path / "hf")
    smollm2.tokenizer.save_pretrained(tmp_path / "hf")
    assert main(["target", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    for folder in ("hf", "out"):
        pair = load_pretrained(tmp_path / folder)
        assert pair.tokenizer("a b")["input_ids"] == smollm2.tokenizer("a b")["input_ids"]
        assert pair.chat("Hi") == smollm2.chat("Hi")
    assert json.loads((tmp_path / "out" / "jetspec.json").read_text())["source"] == str(tmp_path / "hf")
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    assert load_pretrained(Path(tmp_path / "out")).tokenizer is None
