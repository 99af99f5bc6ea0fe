"""Records the target's own answers to training prompts, with the states that a head learns from.

    python experiments/generate_data.py --out data/greedy --source conversations=2000 --source word_problems=1500
    python experiments/generate_data.py --out data/sampled --source my_prompts.jsonl=500 --temperature 0.7

Killed at any point and started again with the same options, it goes on where it was. Prompts of the benchmark suites
are excluded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from tqdm import tqdm

from experiments.common import (
    add_sampling,
    add_target_arguments,
    claim_output,
    load,
    require_at_least,
    run_main,
    sampling_from,
)
from jetspec_jax import JetSpecError, Pair
from jetspec_jax.arguments import Parser, integer, seed, user_path, within
from jetspec_jax.config import FLOAT_DTYPES
from jetspec_jax.errors import shown
from jetspec_jax.presets import PRESETS, default_target_layer_ids
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.text import ChatText
from jetspec_jax.training.dataset import DatasetInfo, DatasetWriter
from jetspec_jax.training.prompts import SOURCES, check_source, collect_prompts, conversations, suite_exclusion
from jetspec_jax.training.record import Recording, record_answers, record_texts

SHARD = 64  # answers per shard
MAX_COUNT = 10**7  # prompts of a source, which are held in memory


def main() -> None:
    args = build_parser().parse_args()
    sampling, mixture = sampling_from(args), parse_mixture(args.source)
    require_at_least(args, max_new_tokens=1, max_prompt_tokens=1, batch_size=1)
    for name in mixture:
        check_source(name)
    claim_output(args.out)
    pair = load(args, tiles=False)  # batches are wide: plain matrices are faster
    if args.product_dtype:
        pair = dataclasses.replace(pair, target_config=dataclasses.replace(pair.target_config,
                                                                           product_dtype=args.product_dtype))
    layers = state_layers(args.model, pair) if not args.no_states else ()
    sources = cache_folder() / "sources"
    prompts = collect_prompts(mixture, sources, args.seed, suite_exclusion(sources),
                              lambda text: len(prompt_ids(pair, text)) <= args.max_prompt_tokens)
    if args.foreign:
        texts = foreign_texts(pair, prompts, dict(conversations(sources, args.seed)), args.max_new_tokens)
    recipe = {"mixture": mixture, "seed": args.seed, "max_new_tokens": args.max_new_tokens,
              "max_prompt_tokens": args.max_prompt_tokens, "sampling": dataclasses.asdict(sampling),
              "product_dtype": args.product_dtype, "foreign": args.foreign}
    config = pair.target_config
    writer = DatasetWriter(args.out, DatasetInfo(args.model, layers, config.hidden_size, config.vocab_size, recipe))
    done = writer.done()
    todo = [i for i in range(len(prompts)) if i not in done]
    tokens, start = 0, time.perf_counter()
    shard: list[Recording] = []
    with tqdm(total=len(prompts), initial=len(done), unit="answer", smoothing=0.05) as bar:
        if args.foreign:
            found = record_texts(pair, [texts[i] for i in todo], layers, batch_size=args.batch_size, indices=todo)
        else:
            found = record_answers(pair, [pair.chat(prompts[i]) for i in todo], layers, indices=todo,
                                   max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, sampling=sampling,
                                   seed=args.seed)
        for recording in found if todo else ():
            shard.append(recording)
            tokens += len(recording.tokens) - recording.prompt_length
            bar.update()
            bar.set_postfix_str(f"{tokens} tokens, {tokens / (time.perf_counter() - start):.0f}/s")
            if len(shard) == SHARD:
                writer.add(shard)
                shard = []
    if shard:
        writer.add(shard)
    print(json.dumps({"answers": len(prompts), "new_answers": len(todo), "new_tokens": tokens,
                      "tokens_per_second": tokens / (time.perf_counter() - start)}))


def foreign_texts(pair: Pair, prompts: list[str], answers: dict[str, str],
                  max_new_tokens: int) -> list[tuple[list[int], int]]:
    """Each prompt with the answer that another model gave, as token ids, and the length of the prompt."""
    missing = [prompt for prompt in prompts if prompt not in answers]
    if missing:
        raise JetSpecError(f"only conversations have foreign answers, and the prompt {missing[0][:60]!r} is from "
                           "elsewhere: give --source conversations=COUNT alone")
    texts = []
    for prompt in prompts:
        ids = prompt_ids(pair, prompt)
        answer = pair.encode(ChatText(answers[prompt]))[:max_new_tokens]  # the chat goes on
        texts.append((ids + answer, len(ids)))
    return texts


def state_layers(model: str, pair: Pair) -> tuple[int, ...]:
    """The layers that the preset's head taps (or five spread ones), and the last, whose states give the teacher."""
    head = pair.head_config or (PRESETS[model].head if model in PRESETS else None)
    count = pair.target_config.num_layers
    taps = head.target_layer_ids if head else default_target_layer_ids(count, 5)
    return tuple(dict.fromkeys((*taps, count - 1)))


def prompt_ids(pair: Pair, text: str) -> list[int]:
    return pair.encode(pair.chat(text))


def parse_mixture(entries: list[str]) -> dict[str, int]:
    """["conversations=100", ...] -> {"conversations": 100, ...}."""
    mixture = {}
    for entry in entries:
        name, equals, count = entry.rpartition("=")
        try:
            mixture[name] = within(1, MAX_COUNT)(count if equals else "")
        except argparse.ArgumentTypeError as error:
            raise JetSpecError(f"--source takes NAME=COUNT, for example conversations=1000, not {shown(entry)}: "
                               f"{error}") from error
    return mixture


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="dataset; resumed if it exists")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=COUNT",
                        help=f"how many prompts of {', '.join(SOURCES)}, or of a JSONL file; repeatable")
    add_target_arguments(parser)
    parser.add_argument("--head", metavar="NAME|PATH", help="whose tapped layers are recorded (default: the preset's "
                        "head, else five spread layers)")
    add_sampling(parser)
    parser.add_argument("--product-dtype", choices=FLOAT_DTYPES, help="round the operands of products to this dtype "
                        "(bfloat16 is faster on CPUs that have units for it)")
    parser.add_argument("--max-new-tokens", type=integer, default=256, help="default %(default)s")
    parser.add_argument("--max-prompt-tokens", type=integer, default=160, help="longer prompts are skipped (default "
                        "%(default)s)")
    parser.add_argument("--batch-size", type=integer, default=64, help="default %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of prompts and sampling (default %(default)s)")
    parser.add_argument("--foreign", action="store_true", help="keep the answers that another model gave in the "
                        "conversations (to compare with)")
    parser.add_argument("--no-states", action="store_true", help="tokens only; training then runs the target")
    return parser


if __name__ == "__main__":
    run_main(main)
