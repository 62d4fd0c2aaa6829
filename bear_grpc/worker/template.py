"""Chat messages to text, with the model's own Jinja template.

The template comes with the file and is not trusted: Jinja's immutable sandbox
keeps it from reaching Python, the text thread's time limit from running on.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from ..backend.base import Vocabulary
from ..errors import InvalidField
from ..input_limits import DEFAULT_LIMITS
from ..params import ChatInput


class _Refusal(Exception):
    """The template calls raise_exception: the conversation is not one it takes."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """A compiled template with the names that model templates expect."""

    def __init__(
        self,
        source: str,
        vocabulary: Vocabulary,
        max_chars: int = DEFAULT_LIMITS.max_rendered_chars,
    ) -> None:
        """Raises InvalidField when the template does not compile."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._max_chars = max_chars
        self._specials = {f"{name}_token": vocabulary.special_text(name) for name in ("bos", "eos")}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as exc:
            raise InvalidField("chat", f"the model's chat template does not compile: {exc}") from exc

    def render(self, chat: ChatInput) -> str:
        """The text of a conversation. Raises InvalidField when the template refuses it."""
        values: dict[str, Any] = {
            **chat.template_kwargs,
            **self._specials,
            "messages": [{"role": turn.role, "content": turn.content} for turn in chat.messages],
            "add_generation_prompt": chat.add_generation_prompt,
        }
        pieces, size = [], 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > self._max_chars:
                    raise _Refusal(f"it gives more than {self._max_chars} characters")
        except _Refusal as exc:
            raise InvalidField("chat.messages", f"the model's chat template refuses them: {exc}") from exc
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as exc:
            raise InvalidField("chat.messages", f"the model's chat template fails on them: {exc}") from exc
        return "".join(pieces)
