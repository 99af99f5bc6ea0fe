"""Programs that threads share, what they wait for them, how long a dispatch may take, and Ctrl-C in between."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jetspec_jax.generate
from jetspec_jax import programs
from jetspec_jax.decode import run_rounds
from jetspec_jax.generate import Run, generate, stream
from jetspec_jax.programs import Clock, Pace, Programs
from tests.models import random_pair

TIMEOUT = 60  # seconds, for what happens at once unless a thread waits for the wrong one
TWO = jnp.asarray(2, jnp.int32)


@pytest.fixture(scope="module")
def pair():
    return random_pair(0)


@pytest.fixture
def watch(monkeypatch):
    """The time that programs go by, which passes only when a test says so: `watch.seconds += 1`. `watch.asked` can be
    acquired once for each time that somebody looked at it."""
    watch = SimpleNamespace(seconds=100.0, asked=threading.Semaphore(0))

    def look():
        watch.asked.release()
        return watch.seconds

    monkeypatch.setattr(programs, "time", SimpleNamespace(perf_counter=look))
    return watch


def await_looks(watch, count):
    for _ in range(count):
        assert watch.asked.acquire(timeout=TIMEOUT)


def counting(traced, before=lambda: None):
    """x -> power * x, which tells whenever it is traced."""
    def multiply(power, x):
        traced.append(power)
        before()
        return power * x
    return multiply


def test_a_program_is_compiled_once_however_many_threads_want_it(watch):
    """All of them wait for it, whoever compiles."""
    traced, kept = [], Programs()

    def compile_slowly():
        await_looks(watch, 8)  # at the start of eight waits
        watch.seconds += 3

    multiply = counting(traced, compile_slowly)

    def call(_):
        clock = Clock()
        return int(kept(clock, multiply, (3,), TWO)), clock.waited

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == [(6, 3.0)] * 8
    assert traced == [3]
    assert kept.compile_seconds == 8 * 3  # all threads waited
    clock = Clock()
    kept(clock, multiply, (3,), TWO)
    assert clock.waited == 0


def test_waits_add_up_and_are_none_of_the_callers_time(watch):
    def take_three_seconds():
        watch.seconds += 3

    clock, kept = Clock(), Programs()
    multiply = counting([], take_three_seconds)
    before = clock.now()
    for power in (3, 5, 3):
        kept(clock, multiply, (power,), TWO)
        watch.seconds += 1
    assert clock.waited == kept.compile_seconds == 6
    assert clock.now() - before == 3


def test_a_result_takes_over_what_is_donated():
    kept, given, other = Programs(), jnp.arange(4), jnp.arange(4)
    assert kept(Clock(), lambda factor, a, b: factor * a + b, (3,), other, given, donate=1).tolist() == [0, 4, 8, 12]
    assert given.is_deleted() and not other.is_deleted()


def test_different_programs_are_compiled_at_the_same_time():
    both, kept = threading.Barrier(2), Programs()
    multiply = counting([], lambda: both.wait(TIMEOUT))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda power: int(kept(Clock(), multiply, (power,), TWO)), (5, 7))) == [10, 14]
    assert kept.compile_seconds > 0


def test_who_waits_for_a_compilation_that_fails_tries_itself(watch):
    traced, kept, entered = [], Programs(), threading.Event()

    def fail_once():
        if len(traced) == 1:
            entered.set()
            await_looks(watch, 2)  # at the start of both waits
            raise KeyboardInterrupt

    multiply = counting(traced, fail_once)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept, Clock(), multiply, (3,), TWO)
        assert entered.wait(TIMEOUT)
        second = pool.submit(kept, Clock(), multiply, (3,), TWO)
        assert int(second.result(TIMEOUT)) == 6
        assert isinstance(first.exception(TIMEOUT), KeyboardInterrupt)
    assert len(traced) == 2


def test_the_program_that_was_not_used_for_longest_goes_first():
    traced, kept = [], Programs(most=2)
    multiply = counting(traced)
    for power in (3, 5, 3, 7, 3, 5):  # 7 takes the place of 5, and 5 that of 7
        assert int(kept(Clock(), multiply, (power,), TWO)) == 2 * power
    assert traced == [3, 5, 7, 5]


def test_a_program_that_goes_leaves_memory():
    """Also one of a function that lives on, which JAX would keep with all that it compiled of it."""
    def alive():
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    kept, multiply = Programs(most=3), counting([])
    before = alive()
    for power in range(9):
        kept(Clock(), multiply, (power,), TWO)
    assert alive() == before + 3
    kept.clear()
    assert alive() == before


def test_threads_get_the_answers_and_the_times_of_their_own(pair, monkeypatch):
    prompts = [[1, 2, 3 + i] for i in range(6)]
    compiled, compile_one, shared = [], Programs._compile, replace(pair, programs=Programs())

    def spy(self, function, static, args, donate):
        compiled.append(function.__name__)
        return compile_one(self, function, static, args, donate)

    monkeypatch.setattr(Programs, "_compile", spy)

    def work(prompt):
        start = time.perf_counter()
        answer = generate(shared, prompt, max_new_tokens=8, tree=None, eos_token_ids=())
        return answer, time.perf_counter() - start

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, prompts))
    again = [work(prompt)[0] for prompt in prompts]
    assert sorted(compiled) == ["create_state", "insert", "prefill", "run_rounds", "sequence_keys"]
    assert [answer.token_ids for answer, _ in found] == [answer.token_ids for answer in again]
    assert max(answer.compile_seconds for answer, _ in found) > 0 == max(answer.compile_seconds for answer in again)
    for answer, wall in found:
        assert 0 < answer.prompt_seconds <= answer.seconds
        assert answer.seconds + answer.compile_seconds <= wall


@pytest.mark.parametrize(("rounds", "seconds", "expected"), [(1, 0.1, 5), (8, 0.001, 1024), (200, 1.0, 100),
                                                             (1, 9.0, 1), (5, 5.0, 1)])
def test_a_dispatch_is_to_take_half_a_second(rounds, seconds, expected):
    pace = Pace()
    assert pace.rounds == 1
    pace.took(rounds, seconds)
    assert pace.rounds == expected


def test_processes_do_not_choose_by_their_own_clocks(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    one, other = Pace(), Pace()
    assert one.rounds == other.rounds == 16
    one.took(16, 0.001), other.took(16, 100.0)
    assert one.rounds == other.rounds == 16


def test_the_pace_is_that_of_whole_dispatches_without_compilation(pair, watch, monkeypatch):
    """29 rounds, each a sixteenth of a second: one, then eight in half a second. The last four end all."""
    told, took, compile_one = [], Pace.took, Programs._compile

    def compile_timed(self, function, static, args, donate):
        watch.seconds += 50
        run, stored = compile_one(self, function, static, args, donate)

        def timed(*args):
            watch.seconds += int(args[2]) / 16 if function is run_rounds else 7
            return run(*args)

        return timed, stored

    def spy(self, rounds, seconds):
        told.append((rounds, seconds))
        took(self, rounds, seconds)

    monkeypatch.setattr(Programs, "_compile", compile_timed)
    monkeypatch.setattr(Pace, "took", spy)
    generate(replace(pair, programs=Programs()), [1, 2], max_new_tokens=30, tree=None, eos_token_ids=())
    assert told == [(1, 1 / 16)] + [(8, 0.5)] * 3


@pytest.fixture
def dispatched(monkeypatch):
    """The rounds that every dispatch may take; the first one is alone, the others as many as there may be."""
    monkeypatch.setattr(programs, "DISPATCH_SECONDS", 1e9)
    seen, call = [], Run._call

    def spy(self, function, static, *args, donate=None):
        if function is run_rounds:
            seen.append(int(args[2]))
        return call(self, function, static, *args, donate=donate)

    monkeypatch.setattr(Run, "_call", spy)
    return seen


def test_many_short_dispatches_say_what_one_says(pair, dispatched, monkeypatch):
    prompts = [[1, 2], [3], [4, 5, 6]]
    options = {"max_new_tokens": 30, "batch_size": 2, "tree": None, "eos_token_ids": ()}
    expected = generate(pair, prompts, **options)
    assert dispatched[0] == 1
    dispatched.clear()
    monkeypatch.setattr(programs, "MOST_ROUNDS", 3)
    found = generate(pair, prompts, **options)
    assert set(dispatched) == {1, 3}
    assert [(a.token_ids, a.accept_lengths) for a in found] == [(a.token_ids, a.accept_lengths) for a in expected]


def test_a_chunk_comes_after_its_rounds_whatever_a_dispatch_takes(pair, dispatched, monkeypatch):
    """30 tokens: the prompt's and 29 rounds, four at a time; in dispatches of one, three, three and one, ..."""
    monkeypatch.setattr(programs, "MOST_ROUNDS", 3)
    chunks = list(stream(pair, [1, 2], max_new_tokens=30, tree=None, eos_token_ids=(), rounds_per_chunk=4))
    assert [len(chunk.accept_lengths) for chunk in chunks] == [4] * 7 + [1]
    assert dispatched == [1, 3] + [3, 1] * 6 + [3]


def test_between_dispatches_the_host_asks_only_who_is_done(pair, monkeypatch):
    asked, fetch = [], jetspec_jax.generate.fetch

    def spy(tree):
        asked.append([leaf.shape for leaf in jax.tree.leaves(tree)])
        return fetch(tree)

    monkeypatch.setattr(jetspec_jax.generate, "fetch", spy)
    monkeypatch.setattr(programs, "DISPATCH_SECONDS", 1e9)
    monkeypatch.setattr(programs, "MOST_ROUNDS", 4)
    generate(pair, [1, 2], max_new_tokens=30, tree=None, eos_token_ids=())  # 29 rounds: 1, and seven times 4
    assert asked[:-1] == [[(1,)]] * 8
    assert len(asked[-1]) == 6


def test_after_ctrl_c_the_next_call_is_right(pair, monkeypatch):
    options = {"max_new_tokens": 20, "tree": None, "eos_token_ids": ()}
    expected, fetch = generate(pair, [1, 2], **options).token_ids, jetspec_jax.generate.fetch
    left = [True]

    def interrupted(tree):
        if left:
            left.pop()
            raise KeyboardInterrupt
        return fetch(tree)

    monkeypatch.setattr(jetspec_jax.generate, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(pair, [1, 2], **options)
    assert generate(pair, [1, 2], **options).token_ids == expected


def test_a_program_that_donates_is_another():
    """Who does not give a buffer away has it afterwards."""
    programs, x, y = Programs(), jnp.ones(3, jnp.int32), jnp.full(3, 2, jnp.int32)
    programs(Clock(), jnp.add, (), x, y, donate=1)
    assert y.is_deleted()
    z = jnp.full(3, 5, jnp.int32)
    assert programs(Clock(), jnp.add, (), x, z).tolist() == [6, 6, 6]
    assert z.tolist() == [5, 5, 5]
