"""The plan for an H100: its arithmetic by hand, and (marker `aot`) the counts of the program compiled for Qwen3-8B."""

import itertools
import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.h100 import predict
from experiments.h100.compile import PLUGINS, Program
from experiments.h100.costs import cost_of, kernel_cost, used_experts
from experiments.h100.hlo import Module, Shape, parse_instruction
from experiments.h100.kernels import read_report
from experiments.h100.large import large_row
from experiments.h100.launches import cache_copies, read_sequence, read_thunks, weight_collectives, weight_copies
from experiments.h100.plan import collectives_of, setup_for
from experiments.h100.predict import load_predictions, predicted_kernel, predicted_round
from experiments.h100.roofline import Operation, estimate, floor, head_operations, target_operations
from experiments.h100.sweep import fill, table
from jetspec_jax import JetSpecError, TreeConfig
from jetspec_jax.presets import PRESETS

ROOT = Path(__file__).parent.parent

# ruff: noqa: E501
# A loop of unknown length with a product, an inner loop of three steps, an attention kernel and two copies.
HLO = """\
HloModule jit_run, is_scheduled=true

%gather_rows (p0: bf16[100,8], p1: s32[3]) -> bf16[3,8] {
  %p0 = bf16[100,8]{1,0} parameter(0)
  %p1 = s32[3]{0} parameter(1)
  ROOT %gather = bf16[3,8]{1,0} gather(%p0, %p1), offset_dims={1}
}

%write_row (q0: bf16[2,1,2,64,4], q1: bf16[2,1,2,1,4], q2: s32[]) -> bf16[2,1,2,64,4] {
  %q0 = bf16[2,1,2,64,4]{4,3,2,1,0} parameter(0)
  %q1 = bf16[2,1,2,1,4]{4,3,2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %update = bf16[2,1,2,64,4]{4,3,2,1,0} dynamic-update-slice(%q0, %q1, %q2)
}

%step (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %add.1 = s32[] copy(%i), metadata={op_name="jit(run)/while/body/tree/while/body/add"}
  ROOT %next = (s32[]) tuple(%add.1)
}

%body (arg: (s32[], bf16[100,8], bf16[2,1,2,64,4], /*index=3*/bf16[3,8])) -> (s32[], bf16[100,8], bf16[2,1,2,64,4], bf16[3,8]) {
  %arg = (s32[], bf16[100,8]{1,0}, bf16[2,1,2,64,4]{4,3,2,1,0}, /*index=3*/bf16[3,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %w = bf16[100,8]{1,0} get-tuple-element(%arg), index=1
  %cache = bf16[2,1,2,64,4]{4,3,2,1,0} get-tuple-element(%arg), index=2
  %x = bf16[3,8]{1,0} get-tuple-element(%arg), index=3
  %ids = s32[3]{0} constant({1, 2, 3})
  %rows = bf16[3,8]{1,0} fusion(%w, %ids), kind=kLoop, calls=%gather_rows, metadata={op_name="jit(run)/while/body/verify/embed/gather"}
  %wt = bf16[8,100]{0,1} bitcast(%w)
  %dot = (bf16[3,100]{1,0}, s8[4096]{0}) custom-call(%rows, %wt), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(run)/while/body/verify/layers_1/mlp/up/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %copied = bf16[100,8]{1,0} copy(%w), metadata={op_name="jit(run)/while/body/verify/layers_1/x"}
  %init = (s32[]) tuple(%n)
  %inner = (s32[]) while(%init), condition=%cond, body=%step, backend_config={"known_trip_count":{"n":"3"}}
  %q = bf16[1,4,2,2,4]{4,3,2,1,0} constant({...})
  %k = bf16[1,4,2,4]{3,2,1,0} constant({...})
  %bits = s32[1,4,1]{2,1,0} constant({...})
  %one = s32[1]{0} constant({1})
  %attended = bf16[1,4,2,2,4]{4,3,2,1,0} custom-call(%one, %one, %q, %k, %k, /*index=5*/%bits, %cache, %cache), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(run)/while/body/verify/layers_1/attend/tree_attention/pallas_call"}
  %row = bf16[2,1,2,1,4]{4,3,2,1,0} constant({...})
  %written = bf16[2,1,2,64,4]{4,3,2,1,0} fusion(%cache, %row, %n), kind=kLoop, calls=%write_row, metadata={op_name="jit(run)/while/body/commit/scatter"}
  %saved = bf16[2,1,2,64,4]{4,3,2,1,0} copy(%written), metadata={op_name="jit(run)/while/body/commit/x"}
  ROOT %out = (s32[], bf16[100,8]{1,0}, bf16[2,1,2,64,4]{4,3,2,1,0}, bf16[3,8]{1,0}) tuple(%n, %w, %saved, %rows)
}

%cond (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[100,8], b: bf16[2,1,2,64,4], d: bf16[3,8]) -> bf16[3,8] {
  %a = bf16[100,8]{1,0} parameter(0), metadata={op_name="params.target['embedding']"}
  %b = bf16[2,1,2,64,4]{4,3,2,1,0} parameter(1), metadata={op_name="state.cache.k"}
  %d = bf16[3,8]{1,0} parameter(2), metadata={op_name="state.pending"}
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %carry = (s32[], bf16[100,8]{1,0}, bf16[2,1,2,64,4]{4,3,2,1,0}, bf16[3,8]{1,0}) tuple(%start, %a, %b, %d)
  %loop = (s32[], bf16[100,8]{1,0}, bf16[2,1,2,64,4]{4,3,2,1,0}, bf16[3,8]{1,0}) while(%carry), condition=%cond, body=%body
  ROOT %end = bf16[3,8]{1,0} get-tuple-element(%loop), index=3
}
"""

IN_A_GRAPH = """\
000: kCommandBuffer [source | sink] 
    001: kCopy  [source       | next=002 (1)] kCopy
    002: kWhile [prev=001 (1) | sink        ]       
condition:
      body:
        003: kCustomKernel   [source         | next=005 (1)] rows grid: [2, 3, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
        004: kCublasLtMatmul [source         | next=009 (1)] kCublasLtMatmul
        005: kCopy           [source         | next=009 (1)] kCopy
        006: kWhile          [prev=004 (1)   | next=093 (1)]           
condition:
          body:
            007: kCopy         [prev=085 (1) | next=087 (1)] kCopy
        008: kCustomKernel   [prev=006 (1)   | sink        ] tree_attention grid: [1, 2, 4] threads: [128, 1, 1]  shared_memory: 640 bytes
        009: kCustomKernel   [prev=006 (1)   | sink        ] written grid: [1, 1, 1] threads: [32, 1, 1]  shared_memory: 0 bytes
        010: kCopy           [source         | next=009 (1)] kCopy
"""  # noqa: W291
NAMES = {0: "buffer", 1: "start", 2: "loop", 3: "rows", 4: "dot", 5: "copied", 6: "inner", 7: "add.1", 8: "attended",
         9: "written", 10: "saved"}
ORIGINS = "".join(f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {i}\n  }}\n}}\n'
                  for i, name in NAMES.items())


def program(thunks=IN_A_GRAPH):
    return Program(HLO, thunks, ORIGINS, ptx={}, argument_bytes=0, alias_bytes=0, output_bytes=0, temp_bytes=0)


def test_instructions_are_parsed():
    i = parse_instruction('  ROOT %a.1 = (f32[2,3]{1,0:T(8)}, s32[]) fusion(%b, /*index=1*/%c.2), calls=%f')
    assert (i.name, i.opcode, i.operands, i.is_root) == ("a.1", "fusion", ("b", "c.2"), True)
    assert i.shapes == (Shape("f32", (2, 3)), Shape("s32", ()))
    assert [s.bytes for s in i.shapes] == [24, 4]


def test_values_are_traced_to_the_arguments():
    """Through the loop that carries them and a view."""
    module = Module(HLO)
    body = module.computations["body"]
    assert module.origin(body, "wt") == "params.target['embedding']"
    assert module.origin(body, "cache") == "state.cache.k"
    assert module.origin(body, "rows") == ""


def test_a_round_is_counted():
    sequence = read_sequence(program(), committed=16)
    by_scope = {launch.scope.removeprefix("jit(run)/while/body/"): launch for launch in sequence.launches}
    assert [launch.times for launch in sequence.launches] == [1, 1, 1, 3, 1, 1, 1]  # the copy before the loop is not
    assert (sequence.host_syncs, sequence.host_launches, sequence.host_transfers) == (0, 0, 0)
    rows = by_scope["verify/embed/gather"]
    assert (rows.cost.read, rows.cost.written, rows.blocks) == (3 * 8 * 2 + 3 * 4, 3 * 8 * 2, 6)
    dot = by_scope["verify/layers_1/mlp/up/dot_general"]
    assert (dot.label, dot.cost.flops, dot.place) == ("matmul", 2 * 3 * 8 * 100, "verify up")
    assert (dot.cost.read, dot.cost.written) == ((3 * 8 + 8 * 100) * 2, 3 * 100 * 2)  # its workspace does not count
    assert [launch.layer("verify") for launch in sequence.launches] == [None, 1, 1, None, 1, None, None]
    # 4 nodes x 2 heads x 2 of a group; 16 committed slots of one layer and 4 new keys; two sides.
    kernel = by_scope["verify/layers_1/attend/tree_attention/pallas_call"]
    assert kernel.label == "tree_attention"
    assert kernel.cost.flops == 4 * (4 * 2 * 2 * 4) * (16 + 4)
    assert kernel.cost.read == 4 + 4 + 64 * 2 + 2 * (4 * 2 * 4 * 2) + 4 * 4 + 2 * (2 * 16 * 4 * 2)
    written = by_scope["commit/scatter"]
    assert (written.cost.read, written.cost.written) == (2 * 2 * 4 * 2 + 4, 2 * 2 * 4 * 2)  # in place


def test_copies_of_weights_and_caches_are_found():
    launches = read_sequence(program(), committed=16).launches
    assert weight_copies(launches) == 2 * (100 * 8 * 2)
    assert cache_copies(launches, slots=64) == 2 * (2 * 2 * 64 * 4 * 2)
    assert cache_copies(launches, slots=65) == 0


def test_conditions_that_the_host_evaluates_are_counted():
    """The same without the command buffer: the outer loop's condition; the length of the inner one is known."""
    alone = "\n".join(line.removeprefix("    ") for line in IN_A_GRAPH.splitlines()[1:])
    sequence = read_sequence(program(alone), committed=16)
    assert (sequence.host_syncs, sequence.host_launches) == (1, 9)
    whole = read_sequence(program(alone), committed=16, repetitions=5, whole=True)
    assert sum(launch.times for launch in whole.launches) == 5 * 9 + 1


def test_transfers_to_the_host_are_counted():
    text = HLO.replace("%saved = bf16[2,1,2,64,4]{4,3,2,1,0} copy", "%saved = bf16[2,1,2,64,4]{4,3,2,1,0:S(5)} copy")
    changed = Program(text, IN_A_GRAPH, ORIGINS, {}, 0, 0, 0, 0)
    assert read_sequence(changed, committed=16).host_transfers == 1


# What four devices run: a sum outside a graph between two graphs, and a join of two values that is waited for.
MESH_HLO = """\
HloModule jit_over_mesh, is_scheduled=true, num_partitions=4

%body (arg: (s32[], bf16[256,40], f32[15,7], s32[15,7])) -> (s32[], bf16[256,40], f32[15,7], s32[15,7]) {
  %arg = (s32[], bf16[256,40]{1,0}, f32[15,7]{1,0}, s32[15,7]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %w = bf16[256,40]{1,0} get-tuple-element(%arg), index=1
  %f = f32[15,7]{1,0} get-tuple-element(%arg), index=2
  %i = s32[15,7]{1,0} get-tuple-element(%arg), index=3
  %x = bf16[256,40]{1,0} copy(%w), metadata={op_name="jit(over_mesh)/shard_map/while/body/verify/a"}
  %sum = bf16[256,40]{1,0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(over_mesh)/shard_map/while/body/verify/layers_0/mlp/psum"}
  %summed = bf16[256,40]{1,0} all-reduce-done(%sum)
  %join = ((f32[15,7]{1,0}, s32[15,7]{1,0}), (f32[15,28]{1,0}, s32[15,28]{1,0})) all-gather-start(%f, %i), dimensions={1}
  %joined = (f32[15,28]{1,0}, s32[15,28]{1,0}) all-gather-done(%join)
  %whole = bf16[256,160]{1,0} all-gather-start(%w), dimensions={1}
  ROOT %out = (s32[], bf16[256,40]{1,0}, f32[15,7]{1,0}, s32[15,7]{1,0}) tuple(%n, %summed, %f, %i)
}

%cond (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  ROOT %less = pred[] copy(%c)
}

ENTRY %main (a: bf16[256,40], f0: f32[15,7], i0: s32[15,7]) -> bf16[256,40] {
  %a = bf16[256,40]{1,0} parameter(0), metadata={op_name="args[0].target['params']['w']"}
  %f0 = f32[15,7]{1,0} parameter(1), metadata={op_name="args[1].f"}
  %i0 = s32[15,7]{1,0} parameter(2), metadata={op_name="args[1].i"}
  %zero = s32[] constant(0)
  %carry = (s32[], bf16[256,40]{1,0}, f32[15,7]{1,0}, s32[15,7]{1,0}) tuple(%zero, %a, %f0, %i0)
  %loop = (s32[], bf16[256,40]{1,0}, f32[15,7]{1,0}, s32[15,7]{1,0}) while(%carry), condition=%cond, body=%body
  ROOT %end = bf16[256,40]{1,0} get-tuple-element(%loop), index=1
}
"""
MESH_THUNKS = """\
001: kWhile [source | sink]
condition:
    002: kCustomKernel [source | sink] less grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | next=004 (1)]
        003: kCopy [source | sink] kCopy
    004: kAllReduce [prev=000 (1) | next=000 (1)] kAllReduce
    005: kAsyncStart [prev=000 (1) | next=000 (1)] stream=communication_stream[0], async_id=005
        007: kAllGather [source | sink] kAllGather
    006: kAsyncDone [prev=000 (1) | next=000 (1)] async_id=005
"""
MESH_NAMES = {1: "loop", 2: "less", 3: "x", 4: "sum", 5: "join", 6: "joined"}


def test_what_four_devices_tell_each_other():
    """In a ring each sends 2 * 3/4 of a sum, and its own part of a join three times."""
    origins = "".join(f'thunk_metadata {{\n profile_annotation: "{name}"\n thunk_id: {i}\n}}\n'
                      for i, name in MESH_NAMES.items())
    sequence = read_sequence(Program(MESH_HLO, MESH_THUNKS, origins, {}, 0, 0, 0, 0), committed=0)
    assert [launch.label for launch in sequence.launches] == ["copy", "copy", "all-reduce", "all-gather"]
    assert (sequence.host_syncs, sequence.host_graphs, sequence.host_launches) == (1, 1, 3)
    reduced, joined = collectives_of(sequence.launches)
    assert (reduced["kind"], reduced["count"], reduced["bytes"]) == ("all-reduce", 1, 30_720)  # of 20,480
    assert reduced["seconds"] == pytest.approx(10e-6 + 30_720 / 370e9)
    assert (joined["kind"], joined["count"], joined["bytes"]) == ("all-gather", 1, 3 * 2 * 15 * 7 * 4)
    assert [launch.layer("verify") for launch in sequence.launches] == [None, None, 0, None]
    assert weight_collectives(sequence.launches) == 0


def test_weights_that_travel_are_found():
    module = Module(MESH_HLO)
    (source,) = cost_of(module, module.computations["body"]["whole"], 0).sources
    assert source.is_weight
    cost = cost_of(module, module.computations["body"]["whole"], 0)
    assert cost.sent == 3 * 256 * 40 * 2


def test_experts_that_are_used():
    """The mean over all ways in which 2 tokens can choose 2 of 4 experts each; one token uses what it chooses."""
    pairs = [set(pair) for pair in itertools.combinations(range(4), 2)]
    mean = sum(len(a | b) for a in pairs for b in pairs) / len(pairs) ** 2
    assert used_experts(4, 2, 2) == pytest.approx(mean)
    assert used_experts(128, 8, 1) == pytest.approx(8)


def test_a_product_of_experts_reads_those_that_are_used():
    expert = 2048 * 1536 * 2  # bytes of gate and up

    def cost(tokens, held, devices):
        read, flops = kernel_cost("grouped_gate_up", [Shape("s32", (tokens, 8)), Shape("bf16", (tokens, 2048)),
                                                      Shape("bf16", (held, 2048, 1536))], 0, devices)
        return read[2], flops

    assert cost(1, 128, 1) == (8 * expert, 8 * expert)  # two operations per number of two bytes
    assert cost(1, 32, 4) == (2 * expert, 2 * expert)  # on each of four devices, on average
    assert cost(256, 128, 1) == (pytest.approx(128 * expert, rel=1e-6), 256 * 8 * expert)


def test_the_floor_of_qwen3_30b_a3b():
    """Plain: 8 of 128 experts in each of 48 layers, attention, router, LM head and the cache of 4096 tokens."""
    target = PRESETS["qwen3-30b-a3b"].target
    operations = target_operations(target, 1, 4096, 1)
    experts = 48 * 8 * 3 * 2048 * 768 * 2
    others = 48 * 2 * (2048 * 5120 + 4096 * 2048 + 2048 * 128) + 2048 * 151936 * 2 + 48 * 2 * 2 * 4 * 128 * 4096
    assert sum(o.bytes for o in operations) == pytest.approx(experts + others)


def test_a_device_has_its_share_of_the_floor():
    """All matrices and the keys are split."""
    for name in ("qwen3-32b", "qwen3-30b-a3b"):
        whole, shared = (setup_for(name, TreeConfig(budget=64), 1, 4096, devices).decoder for devices in (1, 2))
        for account in (lambda d: target_operations(d.target, 64, 4096, 1),
                        lambda d: head_operations(d.target, d.drafter.head, 4096, 1)):
            for a, b in zip(account(whole), account(shared), strict=True):
                factor = 1 if a.name == "router" else 2  # all know the choices of all tokens
                assert (a.bytes, a.flops) == (pytest.approx(factor * b.bytes), pytest.approx(factor * b.flops)), a.name


def test_nesting_of_thunks():
    thunks = {thunk.id: thunk for thunk in read_thunks(IN_A_GRAPH)}
    assert {i: t.loops for i, t in thunks.items()} == {
        0: (), 1: (), 2: (), **dict.fromkeys((3, 4, 5, 6, 8, 9, 10), (2,)), 7: (2, 6)}
    assert all(t.in_graph for i, t in thunks.items() if i)
    assert (thunks[8].kernel, thunks[8].grid, thunks[8].shared_bytes) == ("tree_attention", (1, 2, 4), 640)


def test_the_larger_of_bytes_and_operations_counts():
    assert floor([Operation("a", 3.0e9, 798e6), Operation("b", 3.0e6, 798e9)]) == pytest.approx(2e-3)
    launches = [launch for launch in read_sequence(program(), committed=16).launches if launch.label == "matmul"]
    assert estimate(launches) == pytest.approx(2e-6 + (48 + 1600 + 600) / 3.0e12)


def test_the_floor_of_qwen3_8b():
    """Design: layers 13.9 GB, head 2.1 GB, LM head 1.24 GB twice; a cache of 4096 tokens 0.60 GB and 0.08 GB."""
    preset = PRESETS["qwen3-8b"]
    verify = target_operations(preset.target, 256, 4096, 1)
    draft = head_operations(preset.target, preset.head, 4096, 1)
    head = 1_048_626_432 * 2
    layers = 36 * 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288)
    cache = 2 * 2 * 8 * 128 * 4096
    assert sum(o.bytes for o in verify) == layers + 4096 * 151936 * 2 + 36 * cache
    assert sum(o.bytes for o in draft) == pytest.approx(head + 4096 * 151936 * 2 + 5 * cache, rel=1e-4)
    assert sum(o.flops for o in verify) == pytest.approx(256 * (layers + 2 * 4096 * 151936 + 36 * 4 * 4096 * 4096))


def test_a_product_of_ours_counts_its_operations():
    rows, weights = Shape("bf16", (256, 4096)), Shape("bf16", (4096, 24576))
    assert kernel_cost("gated_product", [rows, weights], 0) == ([rows.bytes, weights.bytes], 2 * 256 * 4096 * 24576)


def test_what_ptxas_says():
    text = ("ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
            "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
            "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem\n")
    assert read_report(text) == (255, 28, 64)
    assert read_report("Used 54 registers, used 1 barriers") == (54, 0, 0)


def test_a_target_without_a_head_gets_the_released_shape():
    setup = setup_for("qwen3-0.6b", TreeConfig(budget=16), 1, 1024)
    assert (setup.head.num_layers, setup.head.block_size, setup.head.target_layer_ids) == (5, 16, (1, 7, 13, 19, 25))
    assert setup.slots == 1536
    with pytest.raises(JetSpecError, match="--context"):
        setup_for("qwen3-8b", TreeConfig(), 1, 40960)
    with pytest.raises(JetSpecError, match="num_heads 64 cannot be split evenly over 3 devices"):
        setup_for("qwen3-32b", TreeConfig(), 1, 64, devices=3)
    with pytest.raises(JetSpecError, match="--tensor-parallel must be at least 1, not 0"):
        setup_for("qwen3-32b", TreeConfig(), 1, 64, devices=0)
    with pytest.raises(JetSpecError, match="not one of"):
        setup_for("qwen3-9b", TreeConfig(), 1, 64)


def test_the_page_is_filled_between_its_marks():
    row = {"model": "m", "context": 1024, "budget": 16, "total_bytes": 81e9, "launches": 9, "floor_seconds": 2e-3,
           "estimate_seconds": 3e-3, "plain_seconds": 1.5e-3}
    lines = table([row]).splitlines()
    assert lines[-1] == "| m | 1024 | 16 | 81.0 (no) | 9 | 2.00 | 3.00 | 1.50 | 1.50 | 2.00 |"
    assert fill("a\n<!-- t -->\nold\n<!-- end t -->\nb", "t", "new") == "a\n<!-- t -->\nnew\n<!-- end t -->\nb"
    with pytest.raises(JetSpecError, match="end x"):
        fill("a", "x", "new")


def test_a_line_of_the_table_of_several_gpus():
    report = {"fits": True, "memory": {"total_bytes": 18.19e9}, "launches": {"total": 823}, "expert_weight_bytes": 0,
              "collectives": [{"count": 140, "bytes": 510e6, "seconds": 2.78e-3}, {"count": 3, "bytes": 1e6, "seconds": 3e-5}],
              "floor_seconds": 6.58e-3, "estimate_seconds": 11.97e-3, "tokens_per_second": 899.2,
              "plain": {"estimate_seconds": 8.33e-3, "tokens_per_second": 120.1}}
    assert large_row("m", 4, report) == (
        "| m | 4 | 18.2 | 823 | 143 | 511 | 2.81 |  | 6.58 | 11.97 | 8.33 | 899 | 120 |")


def run_plan(*arguments):
    return run_python("experiments/h100_plan.py", *arguments)


def run_python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as conftest set them
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=1200)


HAS_PLUGIN = find_spec("jax_plugins") is not None and any(find_spec(name) for name in PLUGINS)


@pytest.mark.skipif(HAS_PLUGIN, reason="the CUDA plugin is installed")
def test_without_the_plugin_the_error_names_the_command():
    done = run_plan()
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install -e '.[plan]'" in done.stderr


@pytest.fixture(scope="module")
def qwen3_8b():
    """The report on Qwen3-8B with 256 nodes and 4096 committed tokens; compiled once."""
    done = run_plan("--json")
    assert done.returncode == 0, done.stderr
    assert "computed from the compiled program, not measured" in done.stdout
    return json.loads(done.stdout.splitlines()[-1])


aot = pytest.mark.aot
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's CUDA plugin is missing: pip install -e '.[plan]'")


@aot
@needs_plugin
def test_the_round_stays_on_the_device(qwen3_8b):
    assert (qwen3_8b["host_transfers"], qwen3_8b["host_syncs_per_round"]) == (0, 0)
    assert qwen3_8b["launches"]["outside_graphs"] == 0
    assert (qwen3_8b["weight_copy_bytes"], qwen3_8b["cache_copy_bytes"]) == (0, 0)


@aot
@needs_plugin
def test_memory(qwen3_8b):
    memory = qwen3_8b["memory"]
    assert qwen3_8b["fits"]
    assert memory["temp_bytes"] < 400e6
    assert memory["weight_bytes"] == 2 * (8_190_735_360 + 1_048_626_432)  # parameters of Qwen3-8B and of its head
    assert memory["cache_bytes"] == 2 * 2 * (36 + 5) * 8 * 128 * 6144  # slots as `generate` chooses them


@aot
@needs_plugin
def test_launches(qwen3_8b):
    """Few launches a layer; split keys take one, and the gate of 256 rows one, whose product is the library's."""
    launches = qwen3_8b["launches"]
    assert launches["per_target_layer"] == 10
    assert 9 <= launches["per_head_layer"] <= 10  # jax 0.12 has one more
    assert launches["by_kind"]["tree_attention_combine"] == 36 + 5
    assert launches["by_kind"]["gated_product"] == 5  # the head's 16 rows
    assert launches["total"] <= 36 * 10 + 5 * 9 + 48  # three of them look at the logits of the accepted path


@aot
@needs_plugin
def test_kernels(qwen3_8b):
    kernels = qwen3_8b["kernels"]
    assert {k["name"] for k in kernels} >= {"tree_attention", "tree_attention__1", "qk_norm_rope", "add_norm", "tree_build"}
    for kernel in kernels:
        assert 0 < kernel["registers"] <= 255
        assert kernel["spill_bytes"] == 0, kernel["name"]
        assert kernel["shared_bytes"] <= 227 * 1024
        if kernel["name"] in ("tree_attention", "tree_attention__1"):
            assert kernel["wgmma"] > 0
            assert 100 <= kernel["blocks"] <= 2 * 132  # all multiprocessors are busy, at once


@aot
@needs_plugin
def test_the_time_of_a_round_is_close_to_its_floor(qwen3_8b):
    assert qwen3_8b["floor_seconds"] == pytest.approx(6.96e-3, rel=0.01)
    # The gate of 256 rows in a launch of its own costs the plan 0.4 ms; the card gained 0.6 (docs/h100_measured.md).
    assert qwen3_8b["estimate_seconds"] <= 1.31 * qwen3_8b["floor_seconds"]
    assert qwen3_8b["plain"]["estimate_seconds"] <= 1.25 * qwen3_8b["plain"]["floor_seconds"]
    assert qwen3_8b["plain"]["floor_seconds"] < qwen3_8b["plain"]["estimate_seconds"] < qwen3_8b["estimate_seconds"]


# One compilation each: the round of a preset with fewer layers.
ROUND = """
import json, sys
from dataclasses import replace
from experiments.h100.launches import read_sequence
from experiments.h100.plan import SamplingParams, TreeConfig, compile_rounds, place, abstract_params, round_account
from experiments.h100.plan import setup_for, size_of
name, devices, layers = sys.argv[1], int(sys.argv[2]), 5
setup = setup_for(name, TreeConfig(budget=256), 1, 4096, devices)
setup = replace(setup, target=replace(setup.target, num_layers=layers),
                head=replace(setup.head, num_target_layers=layers, target_layer_ids=tuple(range(5))))
program = compile_rounds(setup, setup.decoder, SamplingParams())
print(json.dumps({**round_account(setup, program), "weight_bytes": size_of(place(setup, params=abstract_params(setup)))}))
"""


def compile_round(name, devices):
    done = run_python("-c", ROUND, name, str(devices))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@aot
@needs_plugin
def test_four_gpus_share_qwen3_32b():
    """Two sums a layer, and of the embedding and the taps; best tokens are joined; no weights travel."""
    report = compile_round("qwen3-32b", 4)
    summed = next(row for row in report["collectives"] if row["kind"] == "all-reduce")
    # 5 layers of the target on 256 nodes; 5 of the head, its embedding and its taps on 16 rows. And of each of 16 nodes
    # the largest logit along the path, in float32.
    assert summed["bytes"] == ((11 * 256 + 12 * 16) * 5120 * 2 + 16 * 4) * 2 * 3 // 4
    assert {row["kind"] for row in report["collectives"]} == {"all-reduce", "all-gather"}
    assert sum(row["bytes"] for row in report["collectives"] if row["kind"] == "all-gather") < 100e3
    assert report["collectives_per_target_layer"] == 2
    assert (report["weight_collective_bytes"], report["weight_copy_bytes"], report["cache_copy_bytes"]) == (0, 0, 0)
    # The host launches the collectives between graphs and decides once a round whether to go on.
    assert (report["host_syncs_per_round"], report["host_transfers"]) == (1, 0)
    assert report["launches"]["outside_graphs"] == 1 + sum(row["count"] for row in report["collectives"])
    assert report["launches"]["per_target_layer"] <= 12
    matrices = 2 * (5 * (5120 * 10240 + 8192 * 5120 + 3 * 5120 * 25600) * 2 + 2 * 5120 * 151936 + 5 * 5120 * 5120)
    assert report["weight_bytes"] == pytest.approx(matrices / 4, rel=1e-3)  # norms are whole on each


@aot
@needs_plugin
def test_a_round_of_qwen3_30b_a3b_reads_the_experts_that_are_used():
    report = compile_round("qwen3-30b-a3b", 1)
    assert report["expert_weight_bytes"] == pytest.approx(5 * 128 * 3 * 2048 * 768 * 2, rel=1e-6)  # 256 nodes use all
    assert report["launches"]["by_kind"]["grouped_gate_up"] == report["launches"]["by_kind"]["grouped_down"] == 5
    assert report["collectives"] == []
    assert (report["host_syncs_per_round"], report["launches"]["outside_graphs"]) == (0, 0)
    assert (report["weight_copy_bytes"], report["cache_copy_bytes"]) == (0, 0)
    assert report["estimate_seconds"] <= 1.6 * report["floor_seconds"]


PREDICTIONS = load_predictions()


def test_predictions_load_without_the_compiler():
    code = ("import sys; from experiments.h100 import predict; predict.load_predictions(); "
            "print([name for name in sys.modules if name.startswith('experiments.h100.')])")
    done = run_python("-c", code)
    assert (done.stdout.strip(), done.stderr) == ("['experiments.h100.predict']", "")
    assert predict.PREDICTED.stat().st_size < 60_000


def test_every_round_is_predicted():
    """Budget 1 is plain decoding; more nodes, tokens or sequences never cost less."""
    cases = [(budget, context, 1) for budget in (1, 16, 32, 64, 128, 256) for context in (1024, 4096)]
    cases += [(budget, 1024, batch) for budget in (1, 16, 64) for batch in (8, 32)]
    assert len(PREDICTIONS["rounds"]) == len(cases)
    for case in cases:
        row = predicted_round(*case)
        assert row["assumed_ms"] >= row["estimate_ms"] >= row["floor_ms"] > 0
        assert row["estimate_ms"] >= row["gigabytes"] / 3.0 + row["launches"] * PREDICTIONS["gap_us"] / 1e3 - 1e-3
        assert row["host"] == 0
        if case[0] > 16:
            assert row["floor_ms"] >= predicted_round(16, *case[1:])["floor_ms"] > predicted_round(1, *case[1:])["floor_ms"]
    assert predicted_round(48, 4096, 1) is None


def test_the_predicted_floor_is_that_of_the_shapes():
    """Qwen3-8B by hand: its weights and caches at 3.0 TB/s; a draft reads the head's and the LM head once more."""
    layers = 36 * (4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288) * 2
    lm_head, cache = 4096 * 151936 * 2, 36 * 2 * 8 * 128 * 2  # of one token
    for context in (1024, 4096):
        plain = (layers + lm_head + cache * context) / 3.0e12 * 1e3
        assert predicted_round(1, context, 1)["floor_ms"] == pytest.approx(plain, abs=6e-4)
        head = (layers + cache * context) * 5 / 36 + 5 * 4096 * 4096 * 2 + lm_head
        assert predicted_round(16, context, 1)["floor_ms"] == pytest.approx(plain + head / 3.0e12 * 1e3, abs=6e-4)
    assert predicted_round(1, 4096, 1)["floor_ms"] == pytest.approx(5.25, abs=0.005)
    batch = (layers + lm_head + 32 * cache * 1024) / 3.0e12 * 1e3
    assert predicted_round(1, 1024, 32)["floor_ms"] == pytest.approx(batch, abs=6e-4)


@pytest.mark.parametrize("budget", [1, 64, 256])
def test_predicted_launches_make_the_round(budget):
    """All of them, with a gap before each; what is assumed comes on top."""
    rows, whole = [row for row in PREDICTIONS["kernels"] if row["budget"] == budget], predicted_round(budget, 4096, 1)
    count = sum(row["launches"] for row in rows)
    assert count == whole["launches"]
    gaps = count * PREDICTIONS["gap_us"]
    assert (sum(row["launches"] * row["us"] for row in rows) + gaps) / 1e3 == pytest.approx(whole["estimate_ms"], abs=2e-3)
    assumed = sum(row["launches"] * row.get("assumed_us", row["us"]) for row in rows) + gaps
    assert assumed / 1e3 == pytest.approx(whole["assumed_ms"], abs=2e-3)
    for row in rows:
        assert row["us"] == pytest.approx(max(row["bytes"] / 3.0e6, row["flops"] / 798e6), abs=1e-3)


def test_predicted_kernels():
    """The verifying attention of 256 nodes is bound by products; a tree's 37 pops are assumed to take 1 us each."""
    (verify,) = (row for row in predicted_kernel("tree_attention", 256) if row["place"].startswith("verify"))
    assert verify["launches"] == 36
    assert verify["us"] == pytest.approx(4 * 256 * 32 * 128 * (4096 + 256) / 798e6, abs=1e-3)
    (tree,) = predicted_kernel("tree_build", 256)
    assert (tree["launches"], tree["assumed_us"]) == (1, 37.0)
    assert [(row["builder"], row["nodes"], row["steps"]) for row in PREDICTIONS["trees"]] == [
        ("accum_logp", 64, 9), ("accum_logp", 256, 37), ("best_first", 64, 63), ("best_first", 256, 255)]
    assert predicted_kernel("tree_build", 1) == []


def test_what_is_assumed_of_the_l2_cache():
    """128 blocks read 256 rows each; of 8 blocks of rows each reads all keys; at 5.5 TB/s."""
    setup = setup_for("qwen3-8b", TreeConfig(width=7, budget=256), 1, 4096)
    row = {"kind": "gated_product", "bytes": 209_715_200, "flops": 2 * 256 * 4096 * 24576, "grid": (128, 1, 1)}
    assert predict.assumed_us(row, setup) == pytest.approx((209_715_200 + 127 * 256 * 4096 * 2) / 5.5e6)
    row = {"kind": "tree_attention", "bytes": 28_450_824, "flops": 0, "grid": (8, 8, 2)}
    assert predict.assumed_us(row, setup) == pytest.approx((28_450_824 + 7 * 2 * 4096 * 8 * 128 * 2) / 5.5e6)
    assert predict.assumed_us({"kind": "matmul", "bytes": 1, "flops": 0, "grid": ()}, setup) == pytest.approx(1 / 5.5e6)


def test_the_page_shows_the_predictions():
    page = (ROOT / "docs" / "h100.md").read_text()
    assert fill(page, "predictions", predict.tables(PREDICTIONS)) == page
    assert predict.as_json(PREDICTIONS) == predict.PREDICTED.read_text()


@aot
@needs_plugin
@pytest.mark.skipif(metadata.version("jax") != PREDICTIONS["versions"]["jax"], reason="predicted with another jax")
@pytest.mark.parametrize("budget", [1, 256])
def test_predictions_are_of_these_programs(budget):
    """Whoever changes what is launched predicts anew: h100_plan.py --predict experiments/h100/predicted.json."""
    done = run_python("-c", "import json, sys; from experiments.h100.predict import compile_case; "
                            "print(json.dumps(compile_case(int(sys.argv[1]), 1, 6144, (4096,))[0]))", str(budget))
    assert done.returncode == 0, done.stderr
    whole, rows = json.loads(done.stdout.splitlines()[-1])
    assert whole == predicted_round(budget, 4096, 1)
    order = ("kernel", "place", "bytes")
    assert sorted(rows, key=lambda row: [row[key] for key in order]) == [
        row for row in PREDICTIONS["kernels"] if row["budget"] == budget]
