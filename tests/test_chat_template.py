"""Chat templates: rendered as Hugging Face does, and harmless whatever they hold."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from fourfold.chat_template import ChatTemplate
from fourfold.errors import CheckpointError, UserError

HELLO = [{"role": "user", "content": "hello"}]
TURNS = [*HELLO, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "天气"}]
CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""


def test_chatml() -> None:
    assert ChatTemplate(CHATML).render(HELLO) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render(HELLO, add_generation_prompt=False).endswith("hello<|im_end|>\n")


@pytest.mark.parametrize(("name", "joiner"), [("yuan-n", "<n>"), ("yuan-newline", "\n")])
def test_yuan_turns_are_joined_and_the_last_is_followed_by_sep(name: str, joiner: str) -> None:
    template = ChatTemplate.built_in(name)
    assert template.render(HELLO) == "hello<sep>"
    assert template.render(TURNS) == f"hello{joiner}yes?{joiner}天气<sep>"
    with pytest.raises(
        UserError, match=f"the chat template {name} refuses these messages: Yuan 2.0 has no system role"
    ):
        template.render([{"role": "system", "content": "x"}, *HELLO])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no chat template 'chatml'; fourfold has yuan-n, yuan-newline"):
        ChatTemplate.built_in("chatml")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hello</s>"),
        ("{{ {'é': '<'} | tojson }}", '{"é": "<"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages | length }}{% endgeneration %}", "1"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        (
            "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{% endfor %}",
            "11True",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% set a, b = 'x', 'y' %}{{ a ~ b ~ 1 }}", "xy1"),
        ("{{ messages[0].content[::-1] }}", "olleh"),
    ],
)
def test_what_templates_may_use(source: str, text: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(HELLO) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(999) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ range(1000000000) | list }}",
        "{{ 'a' * 1000000000 }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('only\nquestions') }}",
    ],
)
def test_a_hostile_or_broken_template_is_one_sentence(source: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(source).render(HELLO)
    assert str(caught.value).startswith("the model's chat template ")
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_jinja_is_refused_when_it_is_read() -> None:
    with pytest.raises(CheckpointError, match="the model's chat template is not valid"):
        ChatTemplate("{% if %}")


def test_from_directory(tmp_path: Path) -> None:
    def write(value: object) -> None:
        config = {"chat_template": value, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert ChatTemplate.from_directory(tmp_path) is None
    write("{{ bos_token }}{{ eos_token }}")
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "<s></s>"
    write([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "d"
    write([{"name": "tool_use", "template": "t"}])
    with pytest.raises(CheckpointError, match="no default chat template, only tool_use"):
        ChatTemplate.from_directory(tmp_path)
    write(3)
    with pytest.raises(CheckpointError, match="chat_template that is not text"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "from the file"


def test_yuan_has_its_template_even_where_the_model_brings_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"fourfold": 1, "model": {"model_type": "yuan"}}')
    template = ChatTemplate.from_directory(tmp_path)
    assert template is not None
    assert template.render(TURNS) == "hello<n>yes?<n>天气<sep>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (["hi"], "message 0 must have"),
        ([{"role": "user"}], "message 0 must have"),
        ([*HELLO, {"role": "user", "content": ["x"]}], "message 1 must have"),
        ([{"role": "user", "content": "x", "tool_calls": "y"}], "'tool_calls', which is not supported"),
    ],
)
def test_messages_are_a_role_and_a_content(messages: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatTemplate("x").render(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'|center(10000000000) }}",
        "{{ ['a']|map('center', 10000000000)|list }}",
        "{{ messages|tojson(indent=10000000000) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '%*d' % (10000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, '10000000000') }}",
        "{% set a = 'a' * 1000000 %}{{ a.replace('a', a)|length }}",
        "{% set a = 'a' * 1000000 %}{{ a|replace('a', a)|length }}",
        "{% set a = 'a' * 1000000 %}{{ a.join(a)|length }}",
        "{% set a = 'a' * 1000000 %}{{ a|list|join(a)|length }}",
        "{% set a = '\t' * 1000000 %}{{ a.expandtabs(10000)|length }}",
    ],
)
def test_a_text_cannot_be_made_large_enough_to_fill_the_memory(source: str) -> None:
    with pytest.raises(UserError, match="not safe to run"):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])


def test_what_templates_do_with_texts_is_not_in_the_way_of_large_numbers_in_messages() -> None:
    source = "{{ '%s!'|format(messages[0].content) }} {{ '{}{{x}}'.format(messages[0].content)|replace('1', '7') }}"
    source += " {{ '%05.2f' % 3.14159 }} {{ messages|map(attribute='role')|join(', ')|center(8) }} {{ 7 % 3 }}"
    rendered = ChatTemplate(source).render([{"role": "user", "content": "0123456789"}])
    assert rendered == "0123456789! 0723456789{x} 03.14   user   1"


def doubled(value: str, more: str, n: int = 40) -> str:
    """A value that holds two of itself, which hold two of themselves."""
    return f"{{% set a = {value} %}}" + f"{{% set a = {more} %}}" * n


MACROS = "{% macro m0() %}{% endmacro %}" + "".join(
    f"{{% macro m{i}() %}}{{{{ m{i - 1}() }}}}{{{{ m{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 40)
)
BLOCKS = "".join(
    f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}" for i in range(25)
)


@pytest.mark.parametrize(
    "source",
    [
        MACROS + "{{ m39() }}",
        BLOCKS + "{% block b25 %}{% endblock %}",
        "{% macro c() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call c() %}" * 22 + "{% endcall %}" * 22,
        doubled("['x']", "[a, a]") + "{{ a }}",
        doubled("('x',)", "(a, a)") + "{{ a | tojson }}",
        doubled("{'x': 1}", "{'l': a, 'r': a}") + "{{ a ~ 'x' }}",
        doubled("dict(x=1)", "dict(l=a, r=a)") + "{{ a | string }}",
        doubled("['x']", "[a] * 2") + "{{ '%s' % a }}",
        doubled("['x']", "[a, a]") + "{% for x in a recursive %}{{ loop(x) }}{% endfor %}",
        "{% set n = namespace(a='x') %}{% set l = [n, n] %}{{ l }}",
        "{% set n = namespace(a='x') %}{% set n.a = n %}{{ n }}",
        "{% set n = namespace(i=9) %}{% for i in range(60) %}{% set n.i = n.i * n.i %}{% endfor %}{{ n.i }}",
        "{{ (['x' * 9000000] * 1000) | join }}",
        "{{ range(90000) | map(attribute='x') | map('default', 'x' * 9000000) | map('upper') | join }}",
        "{% set n = namespace(l=[]) %}{% for i in range(9) %}{% set n.l = n.l + [('a ' * 999999)|list] %}{% endfor %}",
        "{{ (['x' * 1000000] * 9) | map('upper') | list | sum(start=[]) }}",
        "{{ ('\\n' * 5000) | indent(1000000) }}",
        "{{ range(5000) | list | tojson(indent=1000000) }}",
        "{{ ('x' * 1000000).translate({120: 'y' * 1000000}) }}",
        "{% set a = 'a' * 9000000 %}{% for i in range(90000) %}{{ 'b' in a }}{% endfor %}",
        "{% set a = 'a' * 9000000 %}{% for i in range(90000) %}{{ a.count('b') }}{% endfor %}",
        "{% set a = 'a' * 9000000 %}{% for i in range(90000) %}{% set b = a[i:] %}{% endfor %}",
        "{% set b = range(99999) | list %}{% for x in b recursive %}{{ loop(b) if loop.depth0 < 1 }}{% endfor %}",
    ],
)
def test_a_template_can_neither_hang_nor_fill_the_memory(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="not safe to run"):
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["pprint", "wordwrap", "slice", "batch", "urlize"])
def test_filters_that_no_prompt_needs_are_not_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"No filter named '{name}'"):
        ChatTemplate(f"{{{{ messages | {name} }}}}")


def test_a_long_chat_is_well_within_bounds() -> None:
    """As long as a body may be, by a template that looks at all of it again and again."""
    source = "{% set ns = namespace(seen=[], text='') %}{% for m in messages %}{% set ns.seen = ns.seen + [m] %}"
    source += "{% set ns.text = ns.text + m.content[:9] | trim %}{% set rest = messages[loop.index0 + 1:] %}"
    source += "{% if 'x' in m['content'] and m != messages[-1] and messages is defined and messages | length > 2 %}"
    source += "{{ m.role | upper }}: {{ m.content }}\n{% endif %}{% if loop.index0 == messages | length - 1 %}"
    source += "{{ rest | length }}{{ (messages | first).role }}{% endif %}{% endfor %}{{ ns.seen | length }}"
    turns = [{"role": "user", "content": "x" * 1900} for _ in range(2047)]
    rendered = ChatTemplate(source).render([*turns, {"role": "user", "content": "the end"}])
    assert rendered == ("USER: " + "x" * 1900 + "\n") * 2047 + "0user2048"
