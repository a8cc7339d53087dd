"""Chat prompts are what transformers makes of the same template; what a request gets wrong is said in one line.

The templates are written for this test, in the styles of the families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from trtkit.repository.models.serving import chat as code
from trtkit.repository.models.serving.chat import ChatError, ChatTemplate, read_messages

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif -%}
<|start_header_id|>system<|end_header_id|>\n
Today Date: {{ date_string }}
{% if tools is not none %}Functions: {% for t in tools %}{{ t | tojson(indent=4) }}\n{% endfor %}{% endif -%}
{{ system }}<|eot_id|>
{%- for m in messages -%}
    {%- if m.tool_calls is defined %}
        {%- for call in m.tool_calls %}{{ '{"name": "' + call.function.name + '", "parameters": ' }}
        {{- call.function.arguments | tojson }}{{- '}' }}{% endfor %}<|eom_id|>
    {%- else -%}
        <|start_header_id|>{{ m['role'] }}<|end_header_id|>\n
{{ m['content'] | trim }}<|eot_id|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{% set role = 'model' %}
{%- else %}{% set role = message.role %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

QWEN = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}
{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{% endfor %}{{- "\n</tools><|im_end|>\n" }}{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 < ns.last %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {%- else %}{%- set content = message.content %}{%- endif %}
    {%- if message.role == "system" and loop.first %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') -%}
{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{%- endif %}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{%- endif %}
{%- if m['role'] == 'assistant' %}{% generation %}{% set ns.system = 'x' %}{% set inner = m['content'] %}
{{- '<｜Assistant｜>' + inner + eos_token }}{% endgeneration %}{{ inner }}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

VISION = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"""

MACRO = """{% macro show(m, sep=':') %}{{ m.role ~ sep ~ m.content }}{% if loop_limit %}{{ loop_limit }}{% endif %}
{% endmacro %}{% for m in messages %}{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ show(m) }}{% endfor %}{{ dict(a=1) | tojson }}{{ documents | tojson if documents }}"""

STYLES = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, str)}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TALK = [
    {"role": "user", "content": "Hi <b>&amp; 'you' \"there\"\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello 漢字 🙂"},
    {"role": "user", "content": "  And now?  "},
]
SYSTEM = [{"role": "system", "content": " Be brief. "}, *TALK]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "wetter", "description": "für <Ort> & Tag", "parameters": {"type": "object"}},
    }
]
CALL = {"function": {"name": "wetter", "arguments": {"ort": "Köln", "n": 3, "ja": True, "null": None}}}


def theirs(template: Any, messages: list[Any], **more: Any) -> str:
    """What transformers makes of it."""
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **TOKENS)
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **more))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize(
    ("messages", "more"),
    [
        (TALK, {}),
        (TALK[:1], {"enable_thinking": False, "date_string": "1 Jan 2025"}),
        (TALK, {"tools": TOOLS, "documents": [{"title": "ä", "text": "<x>"}]}),
    ],
)
def test_prompts_are_those_of_transformers(style: str, ask: bool, messages: list[Any], more: dict[str, Any]) -> None:
    ours = ChatTemplate({"default": STYLES[style]}, TOKENS).render(messages, add_generation_prompt=ask, **more)
    assert ours == theirs(STYLES[style], messages, add_generation_prompt=ask, **more)
    assert "漢字" in ours or len(messages) == 1


@pytest.mark.parametrize("style", ["CHATML", "LLAMA3", "GEMMA", "QWEN", "DEEPSEEK"])
def test_prompts_with_a_system_message(style: str) -> None:
    assert ChatTemplate({"default": STYLES[style]}, TOKENS).render(SYSTEM) == theirs(
        STYLES[style], SYSTEM, add_generation_prompt=True
    )


def test_prompts_with_calls_of_tools() -> None:
    raw = json.dumps([TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    messages = read_messages(raw)
    ours = ChatTemplate({"default": LLAMA3}, TOKENS).render(messages, tools=TOOLS)
    assert ours == theirs(LLAMA3, json.loads(raw), tools=TOOLS, add_generation_prompt=True)
    assert '"ort": "Köln"' in ours


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
ONLY_PARTS = "{% for m in messages %}{% for c in m['content'] %}[{{ c['text'] }}]{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (VISION, PARTS, "<user>onetwo"),
        (VISION, TALK[2:], "<user>  And now?  "),
        (CHATML, PARTS, "<|im_start|>user\none\ntwo<|im_end|>\n"),
        (ONLY_PARTS, PARTS, "[one][two]"),
        (ONLY_PARTS, TALK[2:], "[  And now?  ]"),
    ],
)
def test_content_comes_in_the_form_that_the_template_reads(template: str, messages: list[Any], prompt: str) -> None:
    assert ChatTemplate({"default": template}).render(messages, add_generation_prompt=False) == prompt


def test_the_time_is_now() -> None:
    from datetime import datetime

    year = str(datetime.now().year)
    assert ChatTemplate({"default": "{{ strftime_now('%Y') }}"}).render(TALK) in (year, str(int(year) + 1))


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert template.render(TALK) == "plain"
    assert template.render(TALK, tools=TOOLS) == "tools"
    assert template.render(TALK, tools=TOOLS, name="rag") == "rag"
    with pytest.raises(ChatError, match="no chat template 'x', only default, rag, tool_use"):
        template.render(TALK, name="x")


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


BOS = {"bos_token": {"content": "<bos>", "special": True}, "eos_token": None}
JINJA = {"chat_template.jinja": "J{{ bos_token }}"}
NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
OLD = {"special_tokens_map.json": {"bos_token": "old"}}


@pytest.mark.parametrize(
    ("files", "plain", "tools"),
    [
        (JINJA, "J", "J"),
        ({**JINJA, "tokenizer_config.json": {"chat_template": "C", **BOS}}, "J<bos>", "J<bos>"),
        ({**JINJA, "additional_chat_templates/tool_use.jinja": "T"}, "J", "T"),
        ({"tokenizer_config.json": {"chat_template": "C{{ eos_token }}", **BOS}}, "C", "C"),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "D", "T"),
        ({"chat_template.json": {"chat_template": "P{{ bos_token }}"}, **OLD}, "Pold", "Pold"),
        ({**OLD, "tokenizer_config.json": {"chat_template": "{{ bos_token }}", **BOS}}, "<bos>", "<bos>"),
    ],
)
def test_where_templates_and_tokens_come_from(tmp_path: Path, files: dict[str, Any], plain: str, tools: str) -> None:
    template = ChatTemplate.load(write(tmp_path, files))
    assert template is not None
    assert (template.render(TALK), template.render(TALK, tools=TOOLS)) == (plain, tools)


def test_a_model_without_a_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(write(tmp_path, {"tokenizer_config.json": {"model_max_length": 1}})) is None


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: Expecting"),
        ({"tokenizer_config.json": []}, "must hold a JSON object"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "must be a template or a list"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "must be a template or a list"),
        ({"chat_template.jinja": "{% for %}"}, "chat template 'default': Expected an expression"),
    ],
)
def test_broken_files(tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        ChatTemplate.load(write(tmp_path, files))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"[", "no JSON"),
        (b"\xff[]", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "must be a list"),
        (b"[]", "at least one item"),
        (b'"hi"', "must be a list"),
        (b'["hi"]', "chat message 1 must be an object"),
        (b'[{"role": "user", "content": "a"}, {"content": "b"}]', 'chat message 2 needs a "role"'),
        (b'[{"role": 3, "content": "a"}]', "not a number"),
        (b'[{"role": "user"}]', 'chat message 1 has no "content"'),
        (b'[{"role": "user", "content": null}]', 'has no "content"'),
        (b'[{"role": "user", "content": {}}]', "not an object"),
        (b'[{"role": "user", "content": true}]', "not a boolean"),
        (b'[{"role": "user", "content": ["a"]}]', "part 1 of chat message 1"),
        (b'[{"role": "user", "content": [{"type": "image_url"}]}]', "only text is taken, not image_url"),
        (b'[{"role": "user", "content": [{"type": "text"}]}]', '"text" must be a string, not null'),
        (b" " * (code.MAX_BYTES + 1), "at most"),
        (json.dumps([TALK[0]] * (code.MAX_MESSAGES + 1)).encode(), "at most 4096"),
    ],
)
def test_wrong_messages_are_one_line(raw: bytes, problem: str) -> None:
    with pytest.raises(ChatError, match=r"^[^\n]*$") as caught:
        read_messages(raw)
    assert problem in str(caught.value)


def test_messages_as_they_are_sent() -> None:
    assert read_messages(json.dumps({"messages": TALK, "model": "x"})) == TALK
    assert read_messages(json.dumps(PARTS).encode()) == PARTS
    raw = '[{"role": "tool", "content": "4", "tool_call_id": "7", "name": null}]'
    assert read_messages(raw) == [{"role": "tool", "content": "4", "tool_call_id": "7"}]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (MISTRAL, "refuses the messages: Conversation roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[9].content }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
        ("{% set ns = namespace(a=1) %}{% set ns._x = 1 %}", "underscore"),
        ("{{ namespace(_x=1) }}", "underscore"),
        ("{% include 'x' %}", r"refuses|fails"),
        ("{% for i in range(1000000) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "more than 1000000 numbers"),
        ("{% for i in range(10000) %}{{ messages[0].content * 1000 }}{% endfor %}", "characters"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    ],
)
def test_what_a_template_may_not(template: str, problem: str) -> None:
    messages = [{"role": "assistant", "content": "Hi Hi Hi"}]
    with pytest.raises(ChatError, match=problem) as caught:
        ChatTemplate({"default": template}, TOKENS).render(messages)
    assert "\n" not in str(caught.value)


def test_a_template_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(code.time, "monotonic", lambda: float(next(ticks)))
    with pytest.raises(ChatError, match="more than 5 s"):
        ChatTemplate({"default": "{% for i in range(50) %}{{ i }}{% endfor %}"}).render(TALK)


def test_half_a_character_is_refused() -> None:
    messages = read_messages(rb'[{"role": "user", "content": "a\ud83d"}]')
    with pytest.raises(ChatError, match=r"half a character, U\+D83D"):
        ChatTemplate({"default": CHATML}).render(messages)
    whole = read_messages(rb'[{"role": "user", "content": "\ud83d\ude42"}]')
    assert "🙂" in ChatTemplate({"default": CHATML}).render(whole)
