"""What people run today beside ours, on the same weights in the same run: tokens/s, first token, prompts, start.

    python experiments/peers.py                 # needs the extras `parity` and `peers`: what is missing is told
    python experiments/peers.py --long --start --out runs/peers
    taskset -c 1 python experiments/peers.py --methods default,transformers,llama.cpp

Everyone answers every prompt in every round, greedily and as long as plain decoding's answer is, one right after the
other; a first round warms up and does not count. Speeds are those after the first token, which comes from the prompt:
each prompt is also answered by one token, and that time is taken out. Medians over the rounds; `of plain` is the median
of the ratios within each round. Everyone has the cores that this process may use. Peers: transformers (torch), plainly
and by prompt lookup; llama.cpp in float32, and with the 4-bit file that the default target comes from; the published
PyTorch implementation of the method (its example's tree) where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.common import (
    add_pair_arguments,
    claim_output,
    load,
    require_at_least,
    require_present,
    run_main,
)
from experiments.decode import draft_from, read_prompts
from experiments.first_token import start_seconds
from experiments.llama_peer import llama_4bit, llama_float32
from experiments.published_peer import published
from experiments.torch_peer import torch_model
from jetspec_jax import JetSpecError, Pair
from jetspec_jax.arguments import Parser, integer, user_path
from jetspec_jax.files import write_text
from jetspec_jax.generate import Draft, generate
from jetspec_jax.machine import cores, processor
from jetspec_jax.programs import MOST_PROGRAMS

Run = Callable[[list[int], int], list[int]]  # (token ids, new tokens) -> new token ids
PROMPT_ROUNDS = 3
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 1024, 6000


@dataclass(frozen=True)
class PeerAnswer:
    """A greedy answer, the seconds it took with its prompt, and those that prompt and first token took alone."""

    token_ids: list[int]
    seconds: float
    first_seconds: float


@dataclass(frozen=True)
class Peer:
    """A way of decoding.

    Attributes:
        name: as in the table.
        run: (token ids, new tokens) -> new token ids.
        pair: whose tokenizer encodes the prompts.
    """

    name: str
    run: Run
    pair: Pair

    def generate(self, prompt: str, tokens: int) -> PeerAnswer:
        """The greedy answer, once with its first token alone and once whole."""
        ids = self.pair.encode(prompt)
        start = time.perf_counter()
        self.run(ids, 1)
        middle = time.perf_counter()
        answer = self.run(ids, tokens)
        return PeerAnswer(answer, time.perf_counter() - middle, middle - start)


def peer_speed(answers: list[PeerAnswer]) -> float:
    """Tokens per second after the first, as for our own: the prompt and the first token are taken out."""
    seconds = sum(a.seconds - a.first_seconds for a in answers)
    return sum(len(a.token_ids) - 1 for a in answers) / seconds if seconds > 0 else 0.0


def _transformers(pair: Pair, **options: Any) -> Run:
    model, generate_peer = torch_model(pair)
    return lambda ids, tokens: generate_peer(model, ids, tokens, **options)


def _ours(pair: Pair, tree: Draft | None) -> Run:
    return lambda ids, tokens: generate(pair, ids, max_new_tokens=tokens, tree=tree).token_ids


def _ours_by_lookup(pair: Pair) -> Run:
    """As decode.py chooses its length."""
    return _ours(pair, draft_from(argparse.Namespace(draft="lookup", budget=None), pair)[1])


OURS: dict[str, Callable[[Pair], Run]] = {
    "plain": lambda pair: _ours(pair, None),
    "default": lambda pair: _ours(pair, "auto"),
    "lookup": _ours_by_lookup,
}
PEERS: dict[str, Callable[[Pair], Run]] = {
    "transformers": _transformers,
    "transformers-lookup": lambda pair: _transformers(pair, prompt_lookup_num_tokens=7),
    "llama.cpp": llama_float32,
    "llama.cpp-4bit": llama_4bit,
    "jetspec-torch": published,
}


def ready(name: str, pair: Pair) -> Peer:
    """A way of `OURS` or `PEERS`, loaded, and warm.

    Raises:
        JetSpecError: what it needs is not installed, or it cannot decode this pair.
    """
    run = (OURS | PEERS)[name](pair)
    run([1, 2, 3], 2)
    return Peer(name, run, pair)


def main() -> None:
    args = build_parser().parse_args()
    names, messages = parse_methods(args.methods), read_prompts(args)
    require_at_least(args, max_new_tokens=2, rounds=1)
    require_present(args.model, args.head)
    claim_output(args.out)
    pair = load(args)
    pair.programs.most_stored = MOST_PROGRAMS  # of all ways, in turns
    prompts = [pair.chat(message) for message in messages]
    peers, left_out = ready_or_told(names, pair)
    rounds = compare(peers, prompts, args.max_new_tokens, args.rounds)
    lengths = [PROMPT_TOKENS, LONG_PROMPT_TOKENS] if args.long else [PROMPT_TOKENS]
    lengths = [length for length in lengths if length < pair.target_config.max_positions]
    reading = read_speeds(peers, pair.encode(prompts[0]), lengths)
    rows = [summary(peer.name, rounds, reading.get(peer.name, {})) for peer in peers]
    report = {**machine(), "rows": rows, "left_out": left_out}
    save(args.out, report)  # what is there outlives a start that fails
    if args.start:
        report["start_seconds"] = start_seconds(args, pair, messages[0], [peer.name for peer in peers])
        save(args.out, report)
    print(markdown(report))
    if args.json:
        print(json.dumps(report))


def ready_or_told(names: list[str], pair: Pair) -> tuple[list[Peer], dict[str, str]]:
    """(those that can decode this pair here, why each of the others cannot)."""
    peers, left_out = [], {}
    for name in names:
        try:
            peers.append(ready(name, pair))
        except JetSpecError as error:
            if name == "plain":  # whatever is wrong is wrong with the pair
                raise
            left_out[name] = str(error)
    return peers, left_out


def compare(peers: list[Peer], prompts: Sequence[str], max_new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Of every round, the answers to all prompts by the name of who gave them; the first peer says how long they are.

    Nobody always comes first, nor always after the same one: every other round goes backwards.
    """
    lengths = [len(peers[0].run(peers[0].pair.encode(prompt), max_new_tokens)) for prompt in prompts]
    found = []
    with tqdm(total=(rounds + 1) * len(prompts) * len(peers), unit="answer", leave=False) as bar:
        for i in range(rounds + 1):
            answers: dict[str, Any] = {peer.name: [] for peer in peers}
            for prompt, length in zip(prompts, lengths, strict=True):
                for peer in peers if i % 2 else peers[::-1]:
                    answers[peer.name].append(peer.generate(prompt, length))
                    bar.update()
            found.append(answers)
    return found[1:]


def summary(name: str, rounds: list[dict[str, Any]], reading: dict[int, float]) -> dict[str, Any]:
    """One row of the table: medians over the rounds; the ratios are to plain decoding in the same round."""
    speeds = [peer_speed(answers[name]) for answers in rounds]
    plain = [peer_speed(answers["plain"]) for answers in rounds]
    mine, theirs = rounds[-1][name], rounds[-1]["plain"]
    return {"method": name, "tokens_per_second": statistics.median(speeds),
            "of_plain": statistics.median(a / b if b else 0.0 for a, b in zip(speeds, plain, strict=True)),
            "first_token_seconds": statistics.median(a.first_seconds for answers in rounds for a in answers[name]),
            "identical": sum(a.token_ids == b.token_ids for a, b in zip(mine, theirs, strict=True)),
            "prompts": len(mine), "prompt_tokens_per_second": reading}


def read_speeds(peers: list[Peer], ids: list[int], lengths: list[int]) -> dict[str, dict[int, float]]:
    """Tokens of a prompt read a second, the first token of the answer included; medians, side by side.

    Prompt lookup reads a prompt as plain decoding does.
    """
    readers = [peer for peer in peers if "lookup" not in peer.name]
    found: dict[str, dict[int, float]] = {peer.name: {} for peer in readers}
    for length in lengths:
        prompt = list(itertools.islice(itertools.cycle(ids), length))
        seconds: dict[str, list[float]] = {peer.name: [] for peer in readers}
        for _ in tqdm(range(PROMPT_ROUNDS + 1), desc=f"prompts of {length} tokens", leave=False):
            for peer in readers:
                start = time.perf_counter()
                peer.run(prompt, 1)
                seconds[peer.name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            found[name][length] = length / statistics.median(times[1:])
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on besides the weights."""
    versions = {}
    for package in ("jax", "torch", "transformers", "llama-cpp-python", "jetspec"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"processor": processor(), "cores": cores(), "versions": versions}


def markdown(report: dict[str, Any]) -> str:
    """The machine, one row for everyone who was asked, and the starts."""
    count = report["cores"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lengths = list(report["rows"][0]["prompt_tokens_per_second"])
    columns = ["who", "tokens/s", "of plain", "first token", "identical", *(f"prompt of {n:,}" for n in lengths)]
    lines = [f"{report['processor']}, {count} core{'s' if count > 1 else ''}; {versions}", "",
             f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report["rows"]:
        read = row["prompt_tokens_per_second"]
        cells = [title(row["method"]), f"{row['tokens_per_second']:.1f}", f"{row['of_plain']:.2f}",
                 f"{row['first_token_seconds']:.2f} s", f"{row['identical']}/{row['prompts']}",
                 *(f"{read[n]:.0f} tokens/s" if n in read else "-" for n in lengths)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {' | '.join([title(name), why, *'-' * (len(columns) - 2)])} |"
              for name, why in report["left_out"].items()]
    if "start_seconds" in report:
        lines += ["", "| who | from the start of the process to its first token |", "|---|---|"]
        lines += [f"| {title(name)} | {seconds:.1f} s |" for name, seconds in report["start_seconds"].items()]
    return "\n".join(lines)


def save(folder: Path | None, report: dict[str, Any]) -> None:
    if folder is not None:
        write_text(folder / "results.json", json.dumps(report, indent=1) + "\n")
        write_text(folder / "results.md", markdown(report) + "\n")


def title(name: str) -> str:
    return f"ours, {name}" if name in OURS else name


def parse_methods(text: str) -> list[str]:
    """"transformers,default" -> ["plain", "transformers", "default"]: everyone is compared with plain decoding."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    known = [*OURS, *PEERS]
    if unknown := [name for name in names if name not in known]:
        raise JetSpecError(f"--methods {unknown[0][:80]!r}: choose from {', '.join(known)}")
    return list(dict.fromkeys(["plain", *names]))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_pair_arguments(parser)
    parser.add_argument("--methods", default=",".join([*OURS, *PEERS]), metavar="A,B,...",
                        help="beside plain decoding (default %(default)s)")
    parser.add_argument("--prompt-file", metavar="F", type=user_path,
                        help='one prompt a line, or .jsonl with {"prompt": ...} (default: a few prompts of our own)')
    parser.add_argument("--max-new-tokens", type=integer, default=64, help="of each answer (default %(default)s)")
    parser.add_argument("--rounds", type=integer, default=7, help="of which the medians count (default %(default)s)")
    parser.add_argument("--long", action="store_true", help=f"read prompts of {LONG_PROMPT_TOKENS:,} tokens too")
    parser.add_argument("--start", action="store_true", help="time programs from their start to their first token")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="results.json and results.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.set_defaults(prompt=None)
    return parser


if __name__ == "__main__":
    run_main(main)
