"""Lets the target write training prompts itself: it goes on where the chat template opens the user's turn.

    python experiments/write_prompts.py --out data/own.jsonl --count 1500
    python experiments/write_prompts.py --out data/stories.jsonl --count 1500 --stories
    python experiments/generate_data.py --out data/more --source data/own.jsonl=1500 --source data/stories.jsonl=1500

More varied than templates, and of the kind that the target was tuned on. Prompts of the benchmark suites are excluded.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from experiments.common import (
    add_target_arguments,
    check_output,
    load,
    require_at_least,
    run_main,
)
from jetspec_jax import JetSpecError, Pair, SamplingParams
from jetspec_jax.arguments import Parser, integer, number, user_path, within
from jetspec_jax.files import write_text
from jetspec_jax.generate import stream
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.text import ChatText
from jetspec_jax.training.prompts import Exclusion, suite_exclusion
from jetspec_jax.training.templates import STORY_OPENINGS, fill

MIN_WORDS = 4
MAX_WAVES = 20  # of as many attempts as prompts are missing


def main() -> None:
    args = build_parser().parse_args()
    require_at_least(args, count=1, max_tokens=1, batch_size=1)
    sampling = SamplingParams(args.temperature, None, args.top_p)
    if not args.temperature:
        raise JetSpecError("--temperature 0 would write one prompt again and again")
    check_output(args.out.parent)
    if args.out.exists():
        raise JetSpecError(f"--out {args.out} is there already: delete it, or name another file")
    exclusion = suite_exclusion(cache_folder() / "sources")
    pair = load(args, tiles=False, drafts=False)
    rng = random.Random(args.seed)
    prompts: dict[str, None] = {}
    with tqdm(total=args.count, unit="prompt") as bar:
        for wave in range(MAX_WAVES):
            # Never fewer than fill the batch: other sizes would be compiled anew.
            attempts = max(args.count - len(prompts), args.batch_size)
            openings = [fill(rng.choice(STORY_OPENINGS), rng) if args.stories else "" for _ in range(attempts)]
            seed = args.seed * MAX_WAVES + wave  # below 2**32
            written = user_turns(pair, openings, sampling, seed, args.max_tokens, args.batch_size)
            for turn in suitable(written, exclusion):
                if len(prompts) < args.count:
                    prompts.setdefault(turn)
                    bar.update(len(prompts) - bar.n)
            if prompts:  # a run that is cut short leaves what it has
                write_text(args.out, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
            if len(prompts) == args.count:
                break
        else:
            raise JetSpecError(f"only {len(prompts)} of {args.count} prompts were of use: this target seldom ends a "
                               "user's turn; give a larger --max-tokens, or prompts of your own to generate_data.py")
    print(f"{len(prompts)} prompts in {args.out}")


def user_turns(pair: Pair, openings: list[str], sampling: SamplingParams, seed: int, max_tokens: int,
               batch_size: int) -> Iterator[str]:
    """What the target writes as a user after each opening; turns that it did not end are left out."""
    before = ChatText(pair.chat("\N{OBJECT REPLACEMENT CHARACTER}").partition("\N{OBJECT REPLACEMENT CHARACTER}")[0])
    for chunk in stream(pair, [before + opening for opening in openings], tree=None, sampling=sampling, seed=seed,
                        max_new_tokens=max_tokens, batch_size=batch_size):
        if chunk.result is not None and chunk.result.finish_reason == "stop":
            yield (openings[chunk.index] + (chunk.result.text or "")).strip()


def suitable(turns: Iterable[str], exclusion: Exclusion) -> Iterator[str]:
    """Turns of some words that are no benchmark's."""
    return (turn for turn in turns if len(turn.split()) >= MIN_WORDS and not exclusion.matches(turn))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE", help='lines {"prompt": ...}')
    parser.add_argument("--count", type=integer, required=True, metavar="N", help="how many prompts")
    parser.add_argument("--stories", action="store_true", help="begin each as an arithmetic story does")
    add_target_arguments(parser)
    parser.add_argument("--temperature", type=number, default=1.0, help="default %(default)s")
    parser.add_argument("--top-p", type=number, default=0.95, help="default %(default)s")
    parser.add_argument("--max-tokens", type=integer, default=120, help="of a prompt; longer ones are dropped (default "
                                                                    "%(default)s)")
    parser.add_argument("--batch-size", type=integer, default=64, help="default %(default)s")
    parser.add_argument("--seed", type=within(0, 2**32 // MAX_WAVES - 1), default=0)
    return parser


if __name__ == "__main__":
    run_main(main)
