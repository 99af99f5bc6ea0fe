"""Chat prompts: the ids are those of `apply_chat_template`, whatever the tokenizer adds to a text; what is refused."""

import dataclasses
import gc
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from converters import convert
from experiments import decode, generate_data, peers, round_cost, write_prompts
from jetspec_jax import JetSpecError, chat_template
from jetspec_jax.generate import generate, read_requests
from jetspec_jax.text import ChatText
from tests.models import random_pair, tiny_target

PLAIN = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}model:{% endif %}")
TURNS = ("{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
         "{% if add_generation_prompt %}<|turn|>model\n{% if enable_thinking is false %}<think></think>{% endif %}"
         "{% endif %}")
STRICT = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
          "{{ messages[0].content }}{{ tools[0].name if tools else '' }}")
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"}]


def tokenizer(adds="$A", template=PLAIN, prepended=False, **options):
    """Letters and spaces as bytes; `adds` is what stands around a text, like "<s> $A </s>"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if prepended:
        own.normalizer = normalizers.Prepend(" ")
    special = ["<s>", "</s>", "<|turn|>", "[gMASK]"]
    own.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[(token, own.token_to_id(token)) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", chat_template=template,
                                   **options)


TOKENIZERS = {
    "adds nothing": tokenizer(), "appends an end": tokenizer("$A </s>"), "begins and ends": tokenizer("<s> $A </s>"),
    "a start that the template leaves out": tokenizer("<s> $A"),
    "a start that the template writes": tokenizer("<s> $A", "{{ bos_token }}" + TURNS),
    "a start that the template writes, an end that it does not": tokenizer("<s> $A </s>", "{{ bos_token }}" + TURNS),
    "another start": tokenizer("[gMASK] <s> $A", "<s>" + TURNS), "a space before": tokenizer("<s> $A", TURNS, True),
    "ends with its start": tokenizer("$A <s>"), "spells tokens": tokenizer("<s> $A", split_special_tokens=True)}


@pytest.fixture(scope="module")
def bare():
    return random_pair(0, tiny_target(vocab_size=260))


@pytest.fixture
def pair_with(bare):
    return lambda tokenizer: dataclasses.replace(bare, tokenizer=tokenizer)


def read(pair, prompt):
    """The token ids that `generate` begins with."""
    (request,) = read_requests(pair, [prompt], 4)
    return request.ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("messages", ["Hi", "", " </s><s> ", TALK], ids=["text", "empty", "tokens", "talk"])
def test_a_chat_is_encoded_as_its_template_writes_it(pair_with, name, messages):
    pair = pair_with(TOKENIZERS[name])
    whole = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    expected = pair.tokenizer.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
    assert read(pair, pair.chat(messages)) == pair.encode(pair.chat(messages)) == expected
    briefed = pair.tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *whole],
                                                 add_generation_prompt=True, return_dict=False)
    assert read(pair, pair.chat(messages, "Be brief.")) == briefed != expected
    begun = pair.chat(messages) + "Well,"
    assert read(pair, begun) == pair.tokenizer(str(begun), add_special_tokens=False)["input_ids"]


def test_answers_to_chats_texts_and_ids_together(pair_with):
    pair = pair_with(TOKENIZERS["begins and ends"])
    chat = pair.chat("Hi")
    ids = pair.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True,
                                             return_dict=False)
    outs = generate(pair, [chat, str(chat), ids, pair.tokenizer(str(chat))["input_ids"]], max_new_tokens=6, tree=None)
    assert outs[0].token_ids == outs[2].token_ids == generate(pair, chat, max_new_tokens=6, tree=None).token_ids
    assert outs[1].token_ids == outs[3].token_ids != outs[0].token_ids


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("adds nothing", "Hi", "Hi"), ("appends an end", "Hi", "Hi</s>"), ("begins and ends", "Hi", "<s>Hi</s>"),
    ("begins and ends", "<s>Hi", "<s>Hi</s>"), ("begins and ends", "<s><s>Hi", "<s><s>Hi</s>"),
    ("adds nothing", "<s>Hi", "<s>Hi"), ("another start", "Hi", "[gMASK]<s>Hi"),
    ("another start", "<s>Hi", "[gMASK]<s>Hi"), ("adds nothing", "<s><s>Hi", "<s><s>Hi"),
    ("ends with its start", "<s>Hi", "<s>Hi<s>"),
    ("spells tokens", "<s>Hi", "<s><s>Hi")])
def test_plain_text_gets_what_the_tokenizer_adds(pair_with, name, text, expected):
    """But not a second start token."""
    pair = pair_with(TOKENIZERS[name])
    assert pair.tokenizer.decode(pair.encode(text)) == expected


def test_the_switches_of_a_template(pair_with):
    templates = {"default": TURNS, "tool_use": "T" + STRICT, "rag": "{{ documents[0].text }}"}
    pair = pair_with(tokenizer("<s> $A", templates))
    thinking, not_thinking = pair.chat("Hi"), pair.chat("Hi", enable_thinking=False)
    assert not_thinking == thinking + "<think></think>"
    assert pair.chat("Hi", tools=[{"name": "look_up"}]) == "THilook_up"
    assert pair.chat("Hi", chat_template="rag", documents=[{"text": "A page."}]) == "A page."
    assert pair.chat("Hi", chat_template="{{ messages | length }}") == "1"
    begun = pair.chat([*TALK[:1], {"role": "assistant", "content": "Well,"}], continue_final_message=True)
    assert begun == "<|turn|>user\nHi</s><|turn|>assistant\nWell,"
    assert pair.chat("Hi", add_generation_prompt=False) == "<|turn|>user\nHi</s>"
    assert all(isinstance(text, ChatText) for text in (thinking, not_thinking, begun, begun + " I"))
    assert pair.chat("Hi", "") == pair.chat([{"role": "system", "content": ""}, TALK[0]]) != pair.chat("Hi")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look_up", "arguments": {}}}]}
    assert pair.chat([TALK[0], call, {"role": "tool", "content": "3"}]).count("<|turn|>") == 4
    assert pair.chat([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).startswith("<|turn|>user")


@pytest.mark.parametrize(("template", "messages", "options", "reason"), [
    (PLAIN, [], {}, r"messages must be .* not \[\]"), (PLAIN, None, {}, "messages must be .* not None"),
    (PLAIN, b"Hi", {}, "messages must be"), (PLAIN, TALK[0], {}, "messages must be"),
    (PLAIN, ["Hi"], {}, "message 0 must be a dict .* not 'Hi'"), (PLAIN, [TALK], {}, "message 0 must be a dict"),
    (PLAIN, [TALK[0], {"content": "Hi"}], {}, "message 1 must be a dict"),
    (PLAIN, [{"role": 1, "content": "Hi"}], {}, "message 0 must be a dict"),
    (PLAIN, [{"role": "user"}], {}, "content of message 0 .* not None"),
    (PLAIN, [{"role": "user", "content": 5}], {}, "content of message 0 .* not 5"),
    (PLAIN, "Hi", {"system": [10**5000]}, "too large to be printed"),
    (PLAIN, "Hi", {"system": 5}, "system must be text, not 5"),
    (PLAIN, [{"role": "system", "content": "S"}, *TALK], {"system": "T"}, "system message among the messages"),
    *((PLAIN, "Hi", {name: True}, f"{name!r} is no switch of a chat template") for name in (
        "tokenize", "return_tensors", "return_dict", "padding", "truncation", "tokenizer_kwargs", "conversation",
        "self")),
    (PLAIN, [{"role": "user", "content": 10**5000}], {}, "not int too large to be printed"),
    (PLAIN, [10**5000], {}, "too large to be printed"),
    (PLAIN, [{"role": "user", "content": b"x" * 10**6}], {}, "not b'xxx"),
    (PLAIN, "Hi", {"chat_template": [10**5000]}, "too large to be printed"),
    ({5: "T", "rag": "R"}, "Hi", {}, r"choose one of \['5', 'rag'\]"),
    (PLAIN, TALK, {"continue_final_message": True, "add_generation_prompt": True}, "not compatible"),
    (PLAIN, "Hi", {"tools": ["no schema"]}, "refuses these messages with tools .*Tools should"),
    (PLAIN, "Hi", {"chat_template": "rag"}, "chat_template 'rag' is neither"),
    (STRICT, "Hi", {"system": "S"}, "System role not supported.*leave the system message out"),
    ("{{ names.first }}", "Hi", {}, "'names' is undefined"), ("{% if %}", "Hi", {}, "TemplateSyntaxError"),
    ("{{ 1 + 'a' }}", "Hi", {}, "TypeError"), ("{{ 1 // 0 }}", "Hi", {}, "ZeroDivisionError"),
    (None, "Hi", {}, "no chat template: pass plain text"),
    ({"tool_use": "T", "rag": "R"}, "Hi", {}, r"several chat templates and no default: choose one of \['rag', 'tool"),
    ({"tool_use": "T", "rag": "R"}, "Hi", {"chat_template": "rat"}, r"'rat' is neither .* has \['rag', 'tool_use'\]")])
def test_chats_that_are_refused(pair_with, template, messages, options, reason):
    """In one line, which says what to do."""
    with pytest.raises(JetSpecError, match=reason) as refused:
        pair_with(tokenizer(template=template)).chat(messages, **options)
    assert "\n" not in str(refused.value)


DANGEROUS = r"""
'a' * 10**10
'a' * 9999999999
9999999 * 'a'
n * 9999999
'a' * 1000000 * 1000000
('a' * 1000) * (500 + 501)
[0] * 1e9
'a' * '9999999999' | int
2 ** n
10 ** 7
2 ** 3 ** 2
0 ** -1
'%9999999d' % 1
'%(a)-9999999s' % n
'%*d' % (9999999, 1)
'%9999999d' | format(1)
'{:>9999999}'.format(1)
'{:{}}'.format(1, 9999999)
n | center(9999999)
n.ljust(9999999)
n | indent(width=9999999)
n | batch(9999999, 0) | list
n | tojson(indent=9999999)
1.5 | round(9999999, 'ceil')
(1).to_bytes(9999999, 'big')
""".strip().splitlines()
DANGEROUS_LATER = [
    "{% set n = 45000 %}{{ ('x' * n * n) | length }}", "{% set n = 9999999 %}{{ 'x' * n }}",
    "{% set n = 4500 %}{% set a = 'x' * n %}{{ a * n }}",
    "{% set ns = namespace(n=1) %}{% set ns.n = 9999999 %}{{ 'x' * ns.n }}",
    "{% set ns = namespace(n=9999999) %}{{ 'x' * ns.n }}",
    "{% generation %}{{ 2 ** n }}{% endgeneration %}", "{% for m in messages %}{% continue %}{{ 2 ** n }}{% endfor %}"]


@pytest.mark.parametrize("template", [*("{{ " + line + " }}" for line in DANGEROUS), *DANGEROUS_LATER])
def test_numbers_with_which_one_line_takes_all_memory(pair_with, template):
    """They are refused before Jinja folds them, which it does when it compiles."""
    with pytest.raises(JetSpecError, match=r"^line 2 of the chat template of this target has a power, or repeats or "
                                           "pads by a number above 1000000, which could take all memory: remove it"):
        pair_with(tokenizer(template="\n" + template)).chat("Hi")


@pytest.mark.parametrize(("template", "text"), [
    ("{% set t = 1735689600 %}{{ t }}", "1735689600"), ("{{ messages | length < 1048576 }}", "True"),
    ("{{ 2**3 }}", "8"), ("{{ 10 ** 6 }}", "1000000"), ("{{ 1 ** 999999 }}", "1"),
    ("{{ x | default('call_123456789') }}", "call_123456789"),
    ("{{ 'a0123456789' | replace('0123456789', '') }}", "a"), ("{{ ' 123456789'.strip() }}", "123456789"),
    ("{{ '1234567890 x ' | trim }}", "1234567890 x"), ("{% set t = 1735689600 %}{{ t * 1000 }}", "1735689600000"),
    ("{{ messages | length * 9999999 }}", "9999999"), ("{{ (9 - messages | length) * 9999999 }}", "79999992"),
    ("{{ 5000 * 5000 }}", "25000000"), ("{% set ns = namespace(t=1735689600, n=2) %}{{ '-' * ns.n }}", "--"),
    ("{{ 1735689600 % 7 }}", "1"), ("{{ '%d' % 1735689600 }}", "1735689600"),
    ("{{ '%s' | format(12345678) }}", "12345678"), ("{{ 'id:12345678 {}'.format(12345678) }}", "id:12345678 12345678"),
    ("{{ '12345678' | center(10) }}", " 12345678 "), ("{{ 'a%20' ~ 12345678 }}", "a%2012345678"),
    ("{{ {'id': 12345678} | tojson(indent=1) }}", '{\n "id": 12345678\n}')])
def test_other_numbers_are_harmless(pair_with, template, text):
    assert pair_with(tokenizer(template=template)).chat("Hi") == text


@pytest.mark.parametrize(("template", "reason"), [
    ("{% if", "^the chat template that was passed refuses these messages"),
    ("{{ 2 ** n }}", "^line 1 of the chat template that was passed has a power"),
    ("{{ 'a' * 999999 }}" * 17, "^the chat template that was passed wrote 16999983 characters"),
    ("{{ 1 }}" * 150_000, "^the chat template that was passed has 1050000 characters"),
    ("rag", "^line 1 of the chat template of this target has a power")])
def test_an_error_says_whose_template_it_is(pair_with, template, reason):
    pair = pair_with(tokenizer(template={"default": PLAIN, "rag": "{{ 2 ** n }}"}))
    with pytest.raises(JetSpecError, match=reason):
        pair.chat("Hi", chat_template=template)


DOUBLING = "{% set n = namespace(a=START) %}{% for i in range(60) %}{% set n.a = n.a OP n.a %}{% endfor %}"


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "takes more than 0.6 seconds"),
    ("{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}", "takes more than 0.6 seconds"),
    ("{{ lipsum(1000000) }}", "takes more than 0.6 seconds"),
    (DOUBLING.replace("START", "'aa'").replace("OP", "~"), "takes more than 67 MB"),
    (DOUBLING.replace("START", "'aa'").replace("OP", "+"), "takes more than 67 MB"),
    (DOUBLING.replace("START", "[1]").replace("OP", "+"), "takes more than 67 MB"),
    ("{{ 'a' * 999999 }}" * 3, "wrote 2999997 characters"), ("a" * 2_000_000, "has 2000000 characters"),
    ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "RecursionError")], ids=str.split("""
    loops sums lorem text-by-tilde text-by-plus lists text characters macro nested"""))
def test_templates_without_an_end_are_stopped(pair_with, monkeypatch, template, reason):
    """Also in a thread that is not the main one; and the next template is bounded again."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.6)
    monkeypatch.setattr(chat_template, "MAX_BYTES", 2**26)
    monkeypatch.setattr(chat_template, "MAX_TEXT", 10**6)
    pair = pair_with(tokenizer(template=template))
    with ThreadPoolExecutor(1) as thread, pytest.raises(JetSpecError, match=reason) as refused:
        thread.submit(pair.chat, "Hi").result()
    assert len(str(refused.value)) < 800
    assert sys.gettrace() is None


def test_a_callback_of_the_garbage_collector_does_not_lose_the_end(pair_with, monkeypatch):
    """The time is over while it runs; what is raised within it goes nowhere."""
    def callback(phase, info):
        time.sleep(0.3)
        return (lambda: phase)()

    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    growing = "{% set n = namespace(a=[]) %}{% for i in range(9000) %}{% set n.a = [n.a, i] %}{% endfor %}"
    gc.collect()
    gc.callbacks.append(callback)
    try:
        with pytest.raises(JetSpecError, match=r"takes more than 0\.2 seconds"):
            pair_with(tokenizer(template=growing)).chat("Hi")
    finally:
        gc.callbacks.remove(callback)


def test_a_tracer_of_the_users_stays(pair_with):
    def tracer(*_):
        return None

    sys.settrace(tracer)
    try:
        assert pair_with(tokenizer()).chat("Hi") == "user: Hi\nmodel:"
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert pair_with(tokenizer()).chat("Hi") == "user: Hi\nmodel:"
    assert sys.gettrace() is None


LIKE_QWEN = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.last = index %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% generation %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endgeneration %}{% else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{{ ns.last }}{{ '-' * 3 }}{% endif %}"""
LIKE_MISTRAL = """{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}{{ bos_token }}
{%- for message in rest %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message.role == "user" %}{{ "[INST] " + (system + "\\n\\n" if loop.last and system is defined else "") }}
        {{- message.content + "[/INST]" }}{% else %}{{ " " + message.content + eos_token }}{% endif %}
{%- endfor %}"""


def test_templates_like_those_of_models_are_not_changed(pair_with):
    pair = pair_with(tokenizer(template={"default": LIKE_QWEN, "other": LIKE_MISTRAL}))
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}, TALK[2]]
    assert pair.chat(talk, "S") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n3---")
    assert pair.chat(TALK, "S", chat_template="other") == "<s>[INST] Hi[/INST] Hello.</s>[INST] S\n\nWhy?[/INST]"
    with pytest.raises(JetSpecError, match="roles must alternate"):
        pair.chat([*TALK, TALK[0]], chat_template="other")


def test_text_that_cannot_be_encoded(pair_with):
    with pytest.raises(JetSpecError, match="no tokenizer"):
        pair_with(None).encode("Hi")
    with pytest.raises(JetSpecError, match="no tokenizer, and so no chat template"):
        pair_with(None).chat("Hi")
    pair = pair_with(tokenizer())
    half = r"'\\udcff' at character \d+ .* wrong encoding"
    for text in ("Hi \udcff", ChatText("Hi \udcff")):
        with pytest.raises(JetSpecError, match=half):
            pair.encode(text)
    for messages, switches in (("\udcff", {}), (TALK, {"system": "\udcff"}), (TALK, {"note": "\udcff"}),
                               (TALK, {"tools": [{"name": "\udcff"}]})):
        with pytest.raises(JetSpecError, match=half):
            pair_with(tokenizer(template=PLAIN + "{{ note }}{{ tools[0].name if tools }}")).chat(messages, **switches)


def run(monkeypatch, pair, *arguments):
    monkeypatch.setattr(sys, "argv", ["decode.py", "--draft", "none", "--max-new-tokens", "4", *arguments])
    monkeypatch.setattr(decode, "load", lambda *_, **__: pair)
    decode.main()


def test_switches_from_the_command_line(pair_with, monkeypatch, capsys):
    pair, read_as = pair_with(tokenizer("<s> $A", TURNS)), []
    streamed = decode.stream
    monkeypatch.setattr(decode, "stream", lambda pair, prompt, **options: (
        read_as.append(prompt), streamed(pair, prompt, **options))[1])
    run(monkeypatch, pair, "--prompt", "Hi", "--chat-option", "enable_thinking=false", "--system", "S", "--json")
    assert read_as == [pair.chat("Hi", "S", enable_thinking=False)]
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"]) <= 4
    assert decode.read_switches(["a=1", 'b=["x"]', "c=rag", "d=null", "e=a=b", "f=", "g=False", "h=None"]) == {
        "a": 1, "b": ["x"], "c": "rag", "d": None, "e": "a=b", "f": "", "g": False, "h": None}
    assert decode.read_switches(["a=" + "[" * 100_000]) == {"a": "[" * 100_000}


@pytest.mark.parametrize(("options", "reason"), [
    (["enable_thinking"], "NAME=VALUE"), (["=1"], "NAME=VALUE"), (["a b=1"], "NAME=VALUE"),
    (["a=1", "--chat-option", "a=2"], "every name once"), (["tokenize=true"], "'tokenize' is no switch"),
    (["system=S"], "'system' is no switch"), (["self=1"], "'self' is no switch"),
    (["a=1", "--no-chat-template"], "cannot go with --no-chat-template")])
def test_wrong_chat_options_cost_no_model(monkeypatch, options, reason):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(sys, "argv", ["decode.py", "--chat-option", *options])
    monkeypatch.setattr(decode, "load", load)
    with pytest.raises(JetSpecError, match=reason):
        decode.main()


def test_the_scripts_read_the_same_ids(pair_with, monkeypatch):
    pair = pair_with(TOKENIZERS["begins and ends"])

    def ids(text):
        return pair.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                  return_dict=False)

    assert generate_data.prompt_ids(pair, "Hi") == ids("Hi")
    [(text, length)] = generate_data.foreign_texts(pair, ["Hi"], {"Hi": "Yes."}, 9)
    assert (text[:length], pair.tokenizer.decode(text[length:])) == (ids("Hi"), "Yes.")
    seen = []
    peers.Peer("peer", lambda given, tokens: seen.append(given) or [1], pair).generate(pair.chat("Hi"), 3)
    assert seen == [ids("Hi")] * 2
    monkeypatch.setattr(write_prompts, "stream", lambda pair, prompts, **_: iter(seen.append(prompts) or ()))
    list(write_prompts.user_turns(pair, ["", "Tom"], None, 0, 9, 2))
    assert [pair.tokenizer.decode(pair.encode(prompt)) for prompt in seen[-1]] == ["user: ", "user: Tom"]
    monkeypatch.setitem(sys.modules, "experiments.torch_peer", SimpleNamespace(
        torch_model=lambda _: (None, lambda model, given, tokens: seen.append(given))))
    monkeypatch.setattr(round_cost, "generate", lambda pair, given, **_: seen.append(given) or SimpleNamespace(
        token_ids=None))
    round_cost.against_transformers(pair, 2, 1)
    assert seen[-4:] == [ids(round_cost.PROMPT)] * 4


@pytest.mark.parametrize("template", [
    TURNS, {"default": TURNS, "tool_use": "T{{ tools[0].name }}"},
    {"tool_use": "T", "rag": "R{{ messages[0].content }}"}])
def test_chat_templates_travel(tmp_path, template):
    """As many as there are: a converted folder has the templates of the Hugging Face folder, and its ids."""
    source, out = tmp_path / "hf", tmp_path / "out"
    tokenizer("<s> $A </s>", template).save_pretrained(source)
    more = source / "additional_chat_templates"
    assert more.exists() == isinstance(template, dict)
    if more.exists():
        (more / "notes.txt").write_text("no template")
        (more / "deeper").mkdir()
        shutil.copyfile(more / "tool_use.jinja", more / "deeper" / "lost.jinja")
    convert.save_tokenizer(source, out)
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert ours.chat_template == theirs.chat_template == template
    for options in ({"tools": [{"name": "look_up"}]}, {"chat_template": "rag"}):
        assert ours.apply_chat_template(TALK, **options) == theirs.apply_chat_template(TALK, **options)
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert copied == {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()} - {
        "additional_chat_templates/notes.txt", "additional_chat_templates/deeper/lost.jinja"}


def test_templates_are_fetched_from_the_hub(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    files = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "notes.md", "x.bin"]
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, allow_patterns: fetched.extend(
        filter_repo_objects(files, allow_patterns=allow_patterns)) or tmp_path)
    convert.resolve_source("owner/name-that-is-not-here")
    assert fetched == files[:3]
