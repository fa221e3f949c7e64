"""Templates as published models have them, rendered as transformers renders them."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.front_door.call import Message
from cluster.front_door.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{#- This block extracts the system message. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
    "{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}"
    "{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN3 = """{%- for message in messages %}
    {%- if message.role == "assistant" and loop.last %}{% break %}{% endif %}
    {{- '<|im_start|>' + message.role + ' ' + ({"text": message.content} | tojson) }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CONVERSATIONS = [
    [Message("user", "Why is the sky blue?")],
    [Message("system", "  Be brief. "), Message("user", "<b>&'\"</b> 中文 😀\n"), Message("assistant", "Yes.")],
    [Message("user", "a"), Message("assistant", "<think>b</think>c"), Message("user", "d {{ 7 * 7 }} {% raw %}")],
    [Message("user", "a", name="ann"), Message("assistant", "")],
]


def _as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content, **({"name": m.name} if m.name else {})} for m in messages]


@pytest.mark.parametrize(
    "source", [CHATML, LLAMA3, DEEPSEEK, MISTRAL, QWEN3], ids=["chatml", "llama3", "deepseek", "mistral", "qwen3"]
)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"date_string": "1 Jan 2000"}])
def test_the_text_is_the_one_transformers_renders(
    source: str, messages: list[Message], kwargs: dict[str, object]
) -> None:
    ours = ChatTemplate(source, SPECIAL)
    for add in (True, False):
        try:
            (expected,), _ = render_jinja_template(
                [_as_dicts(messages)], chat_template=source, add_generation_prompt=add, **SPECIAL, **kwargs
            )
        except Exception as refusal:
            with pytest.raises(ValueError, match="does not accept these messages") as raised:
                ours.render(messages, add_generation_prompt=add, **kwargs)
            raised.match(re.escape(str(refusal)))
        else:
            assert ours.render(messages, add_generation_prompt=add, **kwargs) == expected


def test_a_template_reads_the_clock_it_was_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2031, 2, 3))
    assert template.render([], add_generation_prompt=False) == "03 Feb 2031"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ messages.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__['Any'] }}",
        "{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{% include 'other' %}",
        "{{ undefined_name.attribute }}",
        "{{ messages[0] + 1 }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_the_sandbox_forbids_or_a_template_stumbles_over_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError, match="does not accept these messages"):
        ChatTemplate(source).render([Message("user", "hello")], add_generation_prompt=True)


def test_a_broken_template_is_refused_when_it_is_read() -> None:
    with pytest.raises(ValueError, match="cannot be compiled"):
        ChatTemplate("{% if %}")


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(tmp_path)
    assert not template.exists
    with pytest.raises(ValueError, match="no chat template"):
        template.render([Message("user", "a")], add_generation_prompt=True)


def test_where_the_template_is_read_from(tmp_path: Path) -> None:
    def rendered() -> str:
        return ChatTemplate.from_folder(tmp_path).render([], add_generation_prompt=True)

    config = {"bos_token": {"content": "<s>"}, "add_bos_token": True, "chat_template": "{{ bos_token }}string"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "<s>string"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert rendered() == "<s>named"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named[:1]}))
    with pytest.raises(ValueError, match="no template named 'default'"):
        rendered()
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert rendered() == "<s>file"
