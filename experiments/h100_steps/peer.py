"""Step `peer`: transformers on torch on the same card, plain greedy decoding of a model of the same size.

As users call it (`generate` with its default cache), and as one CUDA graph a token over a static cache: the most that
torch gives without custom kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from experiments.h100_steps.bench import Bench
from experiments.torch_peer import huggingface_fields

GRAPH_STEPS = 20  # replays between two events


def run(bench: Bench) -> None:
    """Writes peer.json."""
    try:
        import torch
        import transformers
    except ImportError as error:
        bench.save("peer", {"skipped": f"{error}: no torch or transformers here"})
        print("  no torch here: skipped", flush=True)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    context = bench.sizes.contexts[0]
    with torch.inference_mode():
        model = random_model(bench, device)
        ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)
        ways: dict[str, Callable[..., float]] = {"generate": time_generate, "graph": time_graph}
        for name, way in ways.items():
            try:
                report[name] = {"context": context, "ms": way(model, ids, bench)}
            except Exception as error:  # the other way is worth knowing
                report[name] = {"context": context, "error": f"{type(error).__name__}: {error}"[:2000]}
            bench.save("peer", report)
            print("  ", name, report[name], flush=True)


def random_model(bench: Bench, device: str) -> Any:
    """Qwen3 of the setup's size with random weights, made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    target = bench.setup.target
    dtype = getattr(torch, target.dtype)
    config = Qwen3Config(**huggingface_fields(target))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are a buffer, which no weight fills
    model = model.to_empty(device=device).eval()
    model.model.rotary_emb = rotary.to(device)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1)
    return model


def time_generate(model: Any, ids: Any, bench: Bench) -> float:
    """Milliseconds of a token after the first ones: two lengths, so that the prompt drops out."""
    few, many = (2, 4) if bench.tiny else (2, 34)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        answer = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
        answer[0, -1].item()  # waits for the device
        return time.perf_counter() - begin

    seconds(few)
    low, high = (statistics.median(seconds(tokens) for _ in range(3)) for tokens in (few, many))
    return (high - low) / (many - few) * 1e3


def time_graph(model: Any, ids: Any, bench: Bench) -> float:
    """Milliseconds of one decoding step over a static cache; on a GPU replayed as a CUDA graph."""
    import torch
    from transformers import StaticCache

    context = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=context + 256)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, place = ids[:, :1].clone(), torch.tensor([[context]], device=ids.device)

    def step() -> Any:
        return model(token, past_key_values=cache, use_cache=True, position_ids=place).logits.argmax(-1)

    if ids.device.type != "cuda":  # the same step, to check the script
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(bench.sizes.warm + bench.sizes.repeats):
        first.record()
        for _ in range(GRAPH_STEPS):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / GRAPH_STEPS)
    return statistics.median(times[bench.sizes.warm:])
