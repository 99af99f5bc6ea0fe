"""Several devices decode what one does: the same tokens, from shares of the weights, with few and small messages."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file

from converters import convert
from jetspec_jax import JetSpecError, PromptLookup, SamplingParams, TreeConfig, checkpoint, load_pretrained, sharding
from jetspec_jax.autoregressive import AutoregressiveHeadConfig, autoregressive_shapes
from jetspec_jax.collectives import DATA, TENSOR
from jetspec_jax.decode import Decoder, create_state, run_rounds
from jetspec_jax.draft import HeadDrafter, NoDrafter, Params, top_logp
from jetspec_jax.generate import generate
from jetspec_jax.head import head_shapes
from jetspec_jax.sampling import Sampler, argmax_everywhere, warp
from jetspec_jax.sharding import connect, make_mesh, named_map, over_mesh, put
from jetspec_jax.target import target_shapes
from jetspec_jax.training.record import record_answers
from tests.models import DATA as RECORDED
from tests.models import on_mesh, random_pair, random_params, tiny_head, tiny_moe, tiny_target

# Sizes that tell apart what a wrong split would mix up, and that 2 and 4 divide.
TARGET = tiny_target(vocab_size=24, num_heads=8, num_kv_heads=4, qkv_bias=True, out_bias=True)
HEAD = tiny_head(TARGET, num_heads=4, num_kv_heads=4, block_size=5)
TREE = TreeConfig("accum_logp", 3, 12)
WARPED = SamplingParams(1.0, top_k=9, top_p=0.9)


@pytest.fixture(scope="module")
def pair():
    return random_pair(0, TARGET, HEAD)


@pytest.fixture(scope="module")
def with_experts():
    """A layer of experts and a dense one."""
    target = dataclasses.replace(TARGET, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=12,
                                 dense_layers=(1,))
    return random_pair(4, target, HEAD)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 24, rng.integers(1, 60)).tolist() for _ in range(5)]


@pytest.mark.parametrize(("groups", "shards", "tree", "sampling", "count", "batch"), [
    (1, 2, TREE, SamplingParams(), 1, None),
    (1, 2, None, WARPED, 5, None),
    (1, 4, TREE, WARPED, 5, None),
    (2, 2, TREE, SamplingParams(), 5, 2),  # rows are refilled
    (2, 4, None, SamplingParams(), 5, None),  # one row too many
    (4, 1, TreeConfig("chain"), SamplingParams(0.8), 5, None),
    (2, 2, PromptLookup(), SamplingParams(), 1, None),
])
def test_a_mesh_decodes_what_one_device_does(pair, prompts, groups, shards, tree, sampling, count, batch):
    spread = on_mesh(pair, make_mesh(shards, groups))
    one, many = (generate(p, prompts[:count], max_new_tokens=24, tree=tree, sampling=sampling, batch_size=batch, seed=3)
                 for p in (pair, spread))
    for alone, together in zip(one, many, strict=True):
        assert together.token_ids == alone.token_ids
        assert together.accept_lengths == alone.accept_lengths
        assert together.tree_sizes == alone.tree_sizes


@pytest.mark.parametrize(("groups", "shards", "tree", "sampling", "count"), [
    (1, 4, TREE, SamplingParams(), 5), (2, 2, None, WARPED, 5), (1, 2, TREE, WARPED, 1)])
def test_experts_are_spread_whole(with_experts, prompts, groups, shards, tree, sampling, count):
    spread = on_mesh(with_experts, make_mesh(shards, groups))
    held = spread.params.target["params"]["layers_0"]["mlp"]["gate_up_proj"].addressable_shards[-1]
    np.testing.assert_array_equal(held.data, np.asarray(
        with_experts.params.target["params"]["layers_0"]["mlp"]["gate_up_proj"])[-(8 // shards):])
    one, many = (generate(p, prompts[:count], max_new_tokens=24, tree=tree, sampling=sampling, seed=3)
                 for p in (with_experts, spread))
    assert [(a.token_ids, a.accept_lengths) for a in many] == [(a.token_ids, a.accept_lengths) for a in one]


def test_an_autoregressive_head_and_tied_embeddings(prompts):
    target = dataclasses.replace(TARGET, tie_embeddings=True, qk_norm=False)
    head = dataclasses.replace(AutoregressiveHeadConfig.like(HEAD), block_size=3)
    pair = random_pair(1, target, tiny_head(target))
    params = Params(pair.params.target, random_params(autoregressive_shapes(head), np.random.default_rng(0)))
    pair = dataclasses.replace(pair, head_config=head, params=params)
    one, many = (generate(p, prompts[0], max_new_tokens=12, tree=TreeConfig("accum_logp", 2, 5))
                 for p in (pair, on_mesh(pair, make_mesh(2))))
    assert (many.token_ids, many.accept_lengths) == (one.token_ids, one.accept_lengths)


def over_vocabulary(function, shards, logits):
    """Runs a function of parts of the vocabulary, [B, N, V/shards], whose result every device knows."""
    run = jax.shard_map(function, mesh=make_mesh(shards), in_specs=PartitionSpec(None, None, TENSOR),
                        out_specs=PartitionSpec(), check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(run)(logits))


@pytest.mark.parametrize("shards", [2, 8])
def test_best_tokens_of_a_spread_vocabulary(shards):
    """Equal logits, within a part and across parts, keep the order of their indices."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (2, 30, 160)).astype(np.float64)
    logits[0, 1] = 0
    best = over_vocabulary(partial(argmax_everywhere, shards=shards), shards, logits)
    np.testing.assert_array_equal(best, logits.argmax(axis=-1))
    assert best.dtype == np.int32
    for width in (1, 3, 16, 40):  # 40 tokens: more than a part of 20 has
        find = partial(top_logp, width=width, backend="reference", shards=shards, skip=1)
        tokens, logp = over_vocabulary(find, shards, logits)
        wanted = logits[:, 1:]
        expected = np.argsort(-wanted, axis=-1, kind="stable")[..., :width]
        np.testing.assert_array_equal(tokens, expected)
        total = np.log(np.exp(wanted).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(logp, np.take_along_axis(wanted, expected, axis=-1) - total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("params", [SamplingParams(0.7), SamplingParams(1.0, top_k=3), SamplingParams(1.3, top_p=0.6),
                                    WARPED, SamplingParams(1.0, top_k=200)])
def test_warping_of_a_spread_vocabulary(params):
    """What is cut depends on the whole vocabulary: here one part holds nearly all that is likely."""
    logits = np.random.default_rng(1).standard_normal((6, 64)) * 2
    logits[3:, :16] += 9
    run = jax.shard_map(partial(warp, Sampler.create(params, 4)), mesh=make_mesh(4),
                        in_specs=PartitionSpec(None, TENSOR), out_specs=PartitionSpec(None, TENSOR), check_vma=False)
    np.testing.assert_allclose(jax.jit(run)(logits), warp(Sampler.create(params), jnp.asarray(logits)), rtol=1e-12)


def collectives(drafter, pair, groups, sampling):
    """(name, dtype, shape, inside which operation) of every array that devices exchange in the compiled loop."""
    mesh, shards = pair.mesh, pair.mesh.shape[TENSOR]
    decoder = Decoder(pair.share().target_config, drafter, groups)
    sampler, eos, *limits = put(mesh, sampler=Sampler.create(sampling, shards), eos=np.zeros((4,), np.int32),
                                max_rounds=np.int32(3), min_active=np.int32(1))
    jitted = partial(jax.jit, static_argnums=(0, 1, 2))
    state = jitted(over_mesh)(mesh, create_state, (decoder, 3, 7 * 73), sampler, eos)
    program = jitted(over_mesh, donate_argnums=4).lower(mesh, run_rounds, (decoder,), pair.params, state,
                                                        *limits).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes > 0.95 * memory.output_size_in_bytes  # the state is updated in place
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = []
    for result, name, rest in re.findall(rf"= (.*?) ({names})(?:-start)?\((.*)", program.as_text()):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            found.append((name, dtype, tuple(map(int, shape.split(","))) if shape else (),
                          re.search(r'op_name="(.*?)"', rest).group(1)))
    return found


@pytest.mark.parametrize("sampling", [SamplingParams(), WARPED])
@pytest.mark.parametrize("plain", [True, False])
def test_what_travels_in_a_round(plain, sampling):
    """Two sums a layer, one of the embeddings, one of the head's fused features; beside them a few values a node."""
    target = dataclasses.replace(TARGET, num_layers=3)
    head = tiny_head(target, num_heads=4, num_kv_heads=4, num_layers=2)
    pair = on_mesh(random_pair(2, target, head), make_mesh(2, 2))
    share = pair.share()
    drafter = NoDrafter() if plain else HeadDrafter(share.target_config, share.head_config, TREE)
    found = collectives(drafter, pair, 2, sampling)
    sums = [where for name, _, shape, where in found if name == "all-reduce" and shape[-1:] == (target.hidden_size,)]
    assert len(sums) == (2 * 3 + 1) + (0 if plain else 2 * 2 + 2)
    small = 3 * drafter.nodes * 2 * TREE.width  # [B, N] of both devices, or [B, G-1, W]
    for name, _, shape, where in found:
        if shape[-1:] != (target.hidden_size,):
            assert name in ("all-reduce", "all-gather"), (name, where)
            assert math.prod(shape) <= small, (name, shape, where)
    # Whether any group goes on: one number.
    assert sum(dtype == "s32" and shape == () and "while" in where for _, dtype, shape, where in found) == 1


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, config, params in (("target", TARGET, pair.params.target), ("head", HEAD, pair.params.head)):
        with checkpoint.written_beside(folder / name) as beside:
            checkpoint.save(beside, config, params, "a test")
    return folder


def test_weights_are_read_into_their_shares(pair, saved, monkeypatch):
    """Each device holds its heads, its columns of gate and up and its tokens, and nothing was whole on the way."""
    arrived = []

    def watched(name, value, *rest):
        arrived.append(value)
        return sharding.arrange(name, value, *rest)

    monkeypatch.setattr(checkpoint, "arrange", watched)
    mesh = make_mesh(4, 2)
    loaded = load_pretrained(saved / "target", saved / "head", dtype="float64", mesh=mesh)
    matrices = [value for value in arrived if value.ndim > 1]
    assert len(matrices) == 2 + 4 * TARGET.num_layers + 1 + 4 * HEAD.num_layers
    for value in matrices:
        assert {4 * shard.data.size for shard in value.addressable_shards} == {value.size}

    split_axis = {"embedding": 0, "lm_head": 1, "qkv_proj/kernel": 1, "qkv_proj/bias": 0, "o_proj/kernel": 0,
                  "gate_up_proj/kernel": 1, "down_proj/kernel": 0, "fc/kernel": 0}
    for shapes, params in ((target_shapes(TARGET), loaded.params.target), (head_shapes(HEAD), loaded.params.head)):

        def expected_shape(name, leaf):
            axis = next((axis for end, axis in split_axis.items() if name.endswith(end)), None)
            return {tuple(size // 4 if i == axis else size for i, size in enumerate(leaf.shape))}

        held = jax.tree.map(lambda leaf: {shard.data.shape for shard in leaf.addressable_shards}, params)
        assert held == named_map(expected_shape, shapes)

    kernel = loaded.params.target["params"]["layers_1"]["attention"]["qkv_proj"]["kernel"]
    stored = np.asarray(pair.params.target["params"]["layers_1"]["attention"]["qkv_proj"]["kernel"])
    q, k, v = stored[:, :64].reshape(16, 8, 8), stored[:, 64:96].reshape(16, 4, 8), stored[:, 96:].reshape(16, 4, 8)
    for shard in kernel.addressable_shards:
        i = next(int(where[1]) for where in np.argwhere(mesh.device_ids == shard.device.id))
        expected = np.concatenate([q[:, 2 * i:2 * i + 2], k[:, i:i + 1], v[:, i:i + 1]], axis=1)
        np.testing.assert_array_equal(shard.data, expected.reshape(16, -1))


def test_large_arrays_are_stored_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 2**20)
    config = tiny_target(vocab_size=4096, hidden_size=128, dtype="float32")
    params = random_params(target_shapes(config), np.random.default_rng(0))
    with checkpoint.written_beside(tmp_path / "target") as beside:
        checkpoint.save(beside, config, params, "a test")
    pieces = list((tmp_path / "target" / "arrays" / "params.embedding").glob("[0-9]*"))
    assert [piece.stat().st_size for piece in pieces] == [2**20] * 2
    for mesh in (None, make_mesh(2)):
        loaded = checkpoint.load(tmp_path / "target", mesh=mesh)[1]["params"]
        np.testing.assert_array_equal(loaded["embedding"], params["params"]["embedding"])


def test_bad_meshes_are_refused(pair, saved):
    with pytest.raises(JetSpecError, match="2 x 5 needs 10 devices, and there are 8"):
        make_mesh(5, 2)
    for wrong in (0, -1, 1.5, True, None):
        with pytest.raises(JetSpecError, match="tensor_parallel must be an integer of at least 1"):
            make_mesh(wrong)
    with pytest.raises(JetSpecError, match="the target's num_kv_heads 4 cannot be split evenly over 8 devices"):
        load_pretrained(saved / "target", saved / "head", mesh=make_mesh(8))
    with pytest.raises(JetSpecError, match="the head's num_heads 4 cannot be split evenly over 8"):
        checkpoint.load(saved / "head", mesh=make_mesh(8))
    with pytest.raises(JetSpecError, match="vocab_size 24 cannot be split evenly over 5"):
        tiny_target(vocab_size=24, num_heads=5, num_kv_heads=5, intermediate_size=20).share(5)
    with pytest.raises(JetSpecError, match="num_experts 5 cannot be split evenly over 2"):
        tiny_moe(vocab_size=24).share(2)
    with pytest.raises(JetSpecError, match=r"has the axes \('data',\), expected"):
        load_pretrained(saved / "target", mesh=Mesh(np.asarray(jax.devices()), (DATA,)))
    spread = on_mesh(pair, make_mesh(1, 4))
    with pytest.raises(JetSpecError, match="batch_size 3 is not a multiple of the mesh's 4 groups"):
        generate(spread, [[1]] * 5, batch_size=3)
    with pytest.raises(JetSpecError, match="answers are recorded on one device"):
        next(record_answers(spread, [[1]], (0,), max_new_tokens=2, batch_size=1, sampling=SamplingParams(), seed=0))


def test_processes_that_do_not_fit_are_refused():
    with pytest.raises(JetSpecError, match="from 0, not 2 and 2"):
        connect("here:1", 2, 2)
    with pytest.raises(JetSpecError, match="from 0, not None and 0"):
        connect("here:1", None, 0)
    with pytest.raises(JetSpecError, match="must be HOST:PORT, not 'here'"):
        connect("here", 2, 0)
    with pytest.raises(JetSpecError, match=r"cannot be joined.*name them with a coordinator"):
        connect()  # no cluster, and too late


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags}


def decode(*arguments, devices=1):
    return subprocess.Popen([sys.executable, "experiments/decode.py", *map(str, arguments)],
                            cwd=Path(__file__).parent.parent, env=environment(devices), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The recorded pair, converted."""
    folder = tmp_path_factory.mktemp("recorded")
    convert.convert_target(RECORDED / "dense" / "target", folder / "target", progress=False)
    convert.convert_head(RECORDED / "dense" / "head", folder / "head", progress=False)
    return folder


def test_foreign_files_are_read_into_the_same_shares(recorded):
    mesh = make_mesh(2)
    for kind, read in (("target", convert.read_target), ("head", convert.read_head)):
        foreign = read(RECORDED / "dense" / kind, progress=False, mesh=mesh)[1]
        ours = checkpoint.load(recorded / kind, mesh=mesh)[1]
        for a, b in zip(jax.tree.leaves(foreign), jax.tree.leaves(ours), strict=True):
            assert a.sharding == b.sharding
            np.testing.assert_array_equal(a, b)
            assert a.ndim == 1 or {2 * shard.data.size for shard in a.addressable_shards} == {a.size}


def test_two_processes_decode_the_recorded_run(recorded):
    """Met through `jax.distributed`; each holds half of every layer, and the first one prints."""
    case = json.loads((RECORDED / "dense" / "expected.json").read_text())["cases"][0]
    prompt = load_file(RECORDED / "dense" / "activations.safetensors")["0.prompt"].tolist()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [decode("--model", recorded / "target", "--head", recorded / "head", "--prompt", " ".join(map(str, prompt)),
                   "--max-new-tokens", case["max_new"], "--json", "--coordinator", address, "--processes", 2,
                   "--process-id", i) for i in range(2)]
    (out, err), (silent, err_of_second) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], err + err_of_second
    assert json.loads(out.splitlines()[-1])["token_ids"] == case["ar_token_ids"]
    assert json.loads(out.splitlines()[-1])["accept_lengths"] == case["runs"][1]["accept_lengths"]
    assert "token_ids" not in silent


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tensor-parallel", 3), "a mesh of 1 x 3 needs 3 devices, and there are 2"),
    (("--processes", 2), "--processes and --process-id need --coordinator HOST:PORT"),
])
def test_options_that_do_not_fit_are_one_line(arguments, message):
    process = decode("--model", "qwen3-8b", "--prompt", "1 2", *arguments, devices=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in err
    assert len(err.splitlines()) == 1
