"""Chat templates: what they get, what they may not do, and how their refusals are told."""

from __future__ import annotations

import re

import pytest

from bear_grpc.errors import InvalidField
from bear_grpc.params import ChatInput, ChatTurn
from bear_grpc.testing import FakeVocabulary
from bear_grpc.worker.template import ChatTemplate

HELLO = ChatInput([ChatTurn("user", "hello"), ChatTurn("assistant", "hi")])


def render(source: str, chat: ChatInput = HELLO, **limits: int) -> str:
    return ChatTemplate(source, FakeVocabulary(), **limits).render(chat)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}", "user:hello;assistant:hi;"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello"}'),
        ("{{ 'ä' | tojson }}", '"ä"'),
        ("{{ tools is defined }}", "False"),
        ("{% for m in messages %}{{ m.role }}{% if true %}{% break %}{% endif %}{% endfor %}", "user"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{% if true %}\n  a\n{% endif %}", "  a\n"),
    ],
    ids=lambda value: value[:30],
)
def test_template_has_what_model_templates_expect(source, text):
    assert render(source) == text


def test_template_strftime_now_gives_a_date():
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))


def test_template_kwargs_are_variables():
    chat = ChatInput(HELLO.messages, template_kwargs={"enable_thinking": False})
    assert render("{{ enable_thinking }}", chat) == "False"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "eos_token"])
def test_template_kwargs_do_not_replace_what_the_server_gives(name):
    chat = ChatInput(HELLO.messages, template_kwargs={name: "mine"})
    assert "mine" not in render(f"{{{{ {name} }}}}", chat)


def test_template_raise_exception_is_told_with_its_message():
    with pytest.raises(InvalidField, match=r"chat\.messages: .* refuses them: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].role }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10000000) | list }}",
        "{% include 'other' %}",
        "{{ strftime_now(1) }}",
        "{{ 'x'.format_map }}{{ '{0.__class__.__mro__}'.format(1).missing.attribute }}",
    ],
)
def test_template_that_fails_or_reaches_out_is_refused(source):
    with pytest.raises(InvalidField, match=r"chat\.messages"):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% unknown %}", "{{ x | unknown }}"])
def test_template_that_does_not_compile_is_told_as_the_models_fault(source):
    with pytest.raises(InvalidField, match="chat: the model's chat template does not compile"):
        render(source)


def test_template_output_over_the_limit_is_refused():
    assert len(render("{% for i in range(10) %}{{ 'x' * 10 }}{% endfor %}", max_chars=100)) == 100
    with pytest.raises(InvalidField, match="100 characters"):
        render("{% for i in range(11) %}{{ 'x' * 10 }}{% endfor %}", max_chars=100)
