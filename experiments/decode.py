"""Answers prompts by tree decoding, streaming the text as it is accepted, and says what it took.

    python experiments/decode.py --prompt "Name three rivers."
    python experiments/decode.py --model qwen3-8b --compare-ar
    python experiments/decode.py --model converted/target --head converted/head --prompt-file prompts.txt --json
    python experiments/decode.py --model qwen3-4b --draft lookup
    python experiments/decode.py --model qwen3-32b --head my-head --tensor-parallel 4

With --json the last line is one JSON object. For one prompt, `text`, `token_ids` and `accept_lengths` are its own; for
several they are lists with one entry per prompt, while `rounds`, `tokens_per_second` and `identical` cover all.

With --compare-ar every prompt is answered both ways, one right after the other. What no machine changes is told first:
whether the tokens are identical, and how many forwards of the target each way took. The ratio of the speeds is the
median over the prompts of (seconds a token of plain decoding / ours); in the JSON object `ar` holds plain decoding,
`beside_ar` the ratios (see `beside`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from experiments.common import (
    add_mesh_arguments,
    add_model_arguments,
    load,
    mesh_from,
    require_head,
    run_main,
    sampling_from,
    tree_from,
)
from jetspec_jax import JetSpecError, Pair, PromptLookup, SamplingParams
from jetspec_jax.arguments import Parser, integer, seed, user_path, utf8
from jetspec_jax.costs import MARGIN
from jetspec_jax.generate import Draft, Generation, StreamChunk, best_tree, default_tree, expected_speeds, stream
from jetspec_jax.pair import check_switches
from jetspec_jax.suites import read_prompt_text, read_prompts_jsonl

PROMPTS = ("Explain in a few sentences why the sky is blue.",
           "A train travels 60 miles in 1.5 hours. What is its average speed? Think step by step.",
           "Write a Python function that returns the n-th Fibonacci number.")
BUSY = 1.25  # of the dearest round over the cheapest; in processor time the three prompts stay within 1.1 on a CPU


def main() -> None:
    args = build_parser().parse_args()
    # A wrong option should not cost the loading of a model.
    check_draft(args)
    sampling, messages = sampling_from(args), read_prompts(args)
    if args.max_new_tokens < 1:
        raise JetSpecError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if (read_switches(args.chat_option) or args.system is not None) and args.no_chat_template:
        raise JetSpecError("--system and --chat-option are for the chat template: they cannot go with "
                           "--no-chat-template")
    pair = load(args, mesh_from(args), drafts=args.draft == "head")
    title, draft = draft_from(args, pair)
    answers, plain = answer_all(pair, messages, args, draft, sampling)
    summary = summarize(answers)
    print(f"\n{title}")
    show(summary, answers)

    report = contents(answers) | summary
    if args.compare_ar:
        report["ar"] = contents(plain) | summarize(plain)
        report["identical"] = compare(answers, plain)
        report["beside_ar"] = beside(answers, plain)
        show_beside(report, "tree" if args.draft == "head" else args.draft)
    else:
        show_speed("speed", summary)
    if args.json:
        print(json.dumps(report))


def check_draft(args: argparse.Namespace) -> None:
    """Raises JetSpecError for options of drafting that are out of range or do not fit each other."""
    tree_from(args)
    if args.draft == "head":
        require_head(args)
    elif any(option is not None for option in (args.head, args.tree_builder, args.tree_width)):
        raise JetSpecError(f"--head, --tree-builder and --tree-width cannot go with --draft {args.draft}")
    elif args.budget is not None and (args.draft == "none" or args.budget < 2):
        raise JetSpecError(f"--budget {args.budget} cannot go with --draft {args.draft}: a lookup has at least 2 "
                           "nodes, plain decoding has one")
    if args.draft == "none" and args.compare_ar:
        raise JetSpecError("--compare-ar compares with plain decoding, which is what --draft none does")


def draft_from(args: argparse.Namespace, pair: Pair) -> tuple[str, Draft | None]:
    """What the options name: (a title, how it drafts)."""
    if args.draft == "none":
        return "plain decoding", None
    if args.draft == "lookup":
        nodes = args.budget or min(PromptLookup().length + 1, best_tree(pair).budget)
        lookup = PromptLookup(length=nodes - 1)
        return f"prompt lookup (last {lookup.ngram} tokens, budget {nodes})", lookup
    named = any(option is not None for option in (args.tree_builder, args.tree_width, args.budget))
    if not named and not args.compare_ar and default_tree(pair) is None:
        return f"plain decoding{by_timing(pair)}", None
    tree = tree_from(args, pair)
    title = f"tree decoding ({tree.builder}, width {tree.width}, budget {tree.budget})"
    return title + ("" if named else by_timing(pair)), tree


def by_timing(pair: Pair) -> str:
    """What the default follows from, where it follows from what forwards cost this processor; else nothing."""
    speeds = expected_speeds(pair)
    if len(speeds) < 2:
        return ""
    nodes, plain = best_tree(pair).budget, max(costs.speeds(None)[1] for costs in pair.costs)
    gain = f"a tree of {nodes} nodes should decode {speeds[nodes] / plain:.2f} times as fast as one of 1"
    verdict = "" if default_tree(pair) else f", less than {MARGIN}: plain decoding is the default"
    return f"\n  by timing      {gain}{verdict}"


def as_prompt(pair: Pair, message: str, args: argparse.Namespace) -> str | list[int]:
    """What the model reads: the message in its chat template, or as it is; token ids where there is no tokenizer."""
    if pair.tokenizer is None:
        try:
            ids = [integer(word) for word in message.split()]
        except argparse.ArgumentTypeError as error:
            raise JetSpecError(f"this target has no tokenizer, so each prompt must be token ids, like --prompt "
                               f"'12 7 300': {error}") from error
        if not ids:
            raise JetSpecError("this target has no tokenizer: give each prompt as token ids, like --prompt '12 7 300'")
        return ids
    return message if args.no_chat_template else pair.chat(message, args.system, **read_switches(args.chat_option))


PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}  # for those who write Python


def read_switches(options: list[str]) -> dict[str, Any]:
    """["enable_thinking=false", ...] -> {"enable_thinking": False, ...}.

    Raises:
        JetSpecError: an option of another form, one that is given twice, or a name that is no switch of a template.
    """
    switches: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier() or name in switches:
            raise JetSpecError("--chat-option takes NAME=VALUE, every name once, for example enable_thinking=false, "
                               f"not {option!r}")
        try:
            switches[name] = json.loads(PYTHON_NAMES.get(value, value))
        except (ValueError, RecursionError):
            switches[name] = value
    check_switches(switches)
    return switches


def answer_all(pair: Pair, messages: list[str], args: argparse.Namespace, draft: Draft | None,
               sampling: SamplingParams) -> tuple[list[Generation], list[Generation]]:
    """(the answers, streamed; those of plain decoding, where they are to be compared).

    In turns, so that other work on the machine disturbs both ways alike, and neither always goes first.
    """
    answers: list[Generation] = []
    plain: list[Generation] = []
    for i, (message, prompt) in enumerate(zip(messages, [as_prompt(pair, m, args) for m in messages], strict=True)):
        warm_up = args.compare_ar and i == 0
        if args.compare_ar and i % 2:
            plain.append(answer(pair, prompt, args, None, sampling))
        heading = f"\n> {message}\n" if i else f"> {message}\n"
        answers.append(answer(pair, prompt, args, draft, sampling, heading, warm_up))
        if args.compare_ar and not i % 2:
            plain.append(answer(pair, prompt, args, None, sampling, warm_up=warm_up))
    return answers, plain


def answer(pair: Pair, prompt: str | list[int], args: argparse.Namespace, draft: Draft | None, sampling: SamplingParams,
           heading: str | None = None, warm_up: bool = False) -> Generation:
    """Decodes one prompt; with a heading, the text is streamed to standard output below it.

    `warm_up` decodes the first few rounds twice: the first ones of a process wait for memory that it never touched.
    """
    if heading is not None:
        print(heading, flush=True)
    compiled_before = pair.programs.compile_seconds

    def chunks() -> Iterator[StreamChunk]:
        return stream(pair, prompt, max_new_tokens=args.max_new_tokens, tree=draft, sampling=sampling, seed=args.seed)

    if warm_up:
        next(chunks())
    for chunk in chunks():
        if heading is not None:
            print(chunk.text if pair.tokenizer else " ".join(map(str, ["", *chunk.token_ids])), end="", flush=True)
    if heading is not None:
        print()
    assert chunk.result is not None  # the last chunk carries the result
    return replace(chunk.result, compile_seconds=pair.programs.compile_seconds - compiled_before)


def contents(answers: list[Generation]) -> dict[str, Any]:
    """The answers themselves: their own fields for one, lists for several."""
    fields: dict[str, list[Any]] = {"text": [a.text for a in answers], "token_ids": [a.token_ids for a in answers],
                                    "accept_lengths": [a.accept_lengths for a in answers]}
    return {name: value[0] for name, value in fields.items()} if len(answers) == 1 else dict(fields)


def summarize(answers: list[Generation]) -> dict[str, Any]:
    """The figures of one way of decoding. The first token of an answer comes from its prompt, not from a round."""
    tokens, rounds = sum(len(a.token_ids) for a in answers), sum(a.rounds for a in answers)
    accepted = [n for a in answers for n in a.accept_lengths]
    seconds = sum(decode_seconds(a) for a in answers)
    return {"tokens": tokens, "rounds": rounds, "mean_accept_length": sum(accepted) / max(rounds, 1),
            "tokens_per_second": (tokens - len(answers)) / seconds if rounds else 0.0, "decode_seconds": seconds,
            "prompt_seconds": sum(a.prompt_seconds for a in answers),
            "compile_seconds": sum(a.compile_seconds for a in answers)}


def beside(answers: list[Generation], plain: list[Generation]) -> dict[str, Any] | None:
    """Both ways prompt by prompt, each answered by one right after the other.

    Returns:
        forwards_ratio: forwards of the target (rounds) that plain decoding takes for one of ours, over all prompts; no
            machine changes it.
        speed_ratios: of every prompt, seconds a token of plain decoding over ours.
        speed_ratio: their median, which one disturbed prompt does not decide.
        round_costs: of every prompt, seconds a round of ours over plain decoding's. Unlike the speeds they do not
            depend on how much was accepted: where they scatter, other work disturbed the timing.
        None where no answer took a round.
    """
    pairs = [(a, b) for a, b in zip(answers, plain, strict=True) if a.rounds and b.rounds]
    if not pairs:
        return None
    ratios = [seconds_a_token(b) / seconds_a_token(a) for a, b in pairs]
    costs = [decode_seconds(a) / a.rounds / (decode_seconds(b) / b.rounds) for a, b in pairs]
    return {"forwards_ratio": sum(b.rounds for _, b in pairs) / sum(a.rounds for a, _ in pairs),
            "speed_ratio": statistics.median(ratios), "speed_ratios": ratios, "round_costs": costs}


def decode_seconds(answer: Generation) -> float:
    """Without the prompt."""
    return answer.seconds - answer.prompt_seconds


def seconds_a_token(answer: Generation) -> float:
    """Without the prompt, from which the first token comes."""
    return decode_seconds(answer) / (len(answer.token_ids) - 1)


def show_beside(report: dict[str, Any], name: str) -> None:
    """Prints the comparison with plain decoding; first what does not depend on the machine."""
    plain, found = report["ar"], report["beside_ar"]
    print("\nbeside plain decoding by the same code, however fast the machine")
    print(f"  tokens         identical: {report['identical']}")
    if found is None:
        return
    print(f"  forwards       {report['rounds']} of the target instead of {plain['rounds']}, which add one token each: "
          f"{found['forwards_ratio']:.2f} times fewer")
    print("\nin turns with plain decoding, on this machine as busy as it was")
    show_speed(name, report)
    show_speed("plain", plain)
    ratios, costs = found["speed_ratios"], found["round_costs"]
    print(f"  ratio          {found['speed_ratio']:.2f}x: median over the prompts of seconds a token, plain / {name} "
          f"(lowest {min(ratios):.2f}x, highest {max(ratios):.2f}x)")
    if max(costs) > BUSY * min(costs):
        print(f"  busy           rounds took {min(costs):.2f} to {max(costs):.2f} plain ones, which should hardly "
              "differ: other work ran")


def show_speed(name: str, summary: dict[str, Any]) -> None:
    print(f"  {name:14s} {summary['tokens_per_second']:.1f} tokens/s (apart from it: prompt "
          f"{summary['prompt_seconds']:.2f} s, programs {summary['compile_seconds']:.1f} s)")


def show(summary: dict[str, Any], answers: list[Generation]) -> None:
    """Prints what no machine changes, and how often each accepted length occurred."""
    print(f"  tokens         {summary['tokens']} in {summary['rounds']} rounds, ended by "
          f"{', '.join(sorted({a.finish_reason for a in answers}))}")
    print(f"  accepted       {summary['mean_accept_length']:.2f} tokens a forward of the target, the free one included")
    lengths = Counter(n for a in answers for n in a.accept_lengths)
    if len(lengths) > 1 or max(lengths, default=1) > 1:
        for depth in range(1, max(lengths) + 1):
            share = lengths[depth] / sum(lengths.values())
            print(f"    {depth:3d} {lengths[depth]:6d} {100 * share:5.1f} % {'#' * round(40 * share)}")


def compare(answers: list[Generation], plain: list[Generation]) -> bool:
    """Whether all tokens are the same; says where not (a near-tie that rounding decided, in bfloat16 above all)."""
    for i, (a, b) in enumerate(zip(answers, plain, strict=True)):
        if a.token_ids != b.token_ids:
            pairs = zip(a.token_ids, b.token_ids, strict=False)
            at = next((j for j, (x, y) in enumerate(pairs) if x != y), min(len(a.token_ids), len(b.token_ids)))
            print(f"note: prompt {i} differs from plain decoding from token {at} on", file=sys.stderr)
    return all(a.token_ids == b.token_ids for a, b in zip(answers, plain, strict=True))


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the options name.

    Raises:
        JetSpecError: an unreadable file, or one without prompts.
    """
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is None:
        return list(PROMPTS)
    if args.prompt_file.suffix == ".jsonl":
        return read_prompts_jsonl(args.prompt_file)
    prompts = [line for line in read_prompt_text(args.prompt_file).split("\n") if line.strip()]
    if not prompts:
        raise JetSpecError(f"--prompt-file {args.prompt_file} holds no prompts")
    return prompts


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_mesh_arguments(parser)
    parser.add_argument("--draft", choices=("head", "lookup", "none"), default="head",
                        help="trees of the head (default), what followed the last words in the text so far, or plain "
                             "decoding; the last two need no head")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", type=utf8, help="default: a few prompts of our own")
    what.add_argument("--prompt-file", metavar="F", type=user_path,
                      help='one prompt a line, or .jsonl with {"prompt": ...}; a pipe is read as plain lines')
    parser.add_argument("--max-new-tokens", type=integer, default=128, help="of each answer (default %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise at a temperature above 0")
    parser.add_argument("--system", metavar="TEXT", type=utf8, help="system message for the chat template")
    parser.add_argument("--chat-option", action="append", default=[], metavar="NAME=VALUE", type=utf8,
                        help="what the chat template reads besides, like enable_thinking=false or chat_template=rag; "
                             "the value is JSON, or text; repeatable")
    parser.add_argument("--no-chat-template", action="store_true", help="continue the prompt as it is")
    parser.add_argument("--compare-ar", action="store_true", help="decode plainly too, and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


if __name__ == "__main__":
    run_main(main)
