"""Keyword arguments to request messages, for both clients.

None is unset and 0 is 0. What cannot be written into the message raises `InvalidField`, as the server would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from google.protobuf.message import Message as ProtoMessage

from bear_grpc.client.options import DefaultsOptions, GenerateOptions, LoadOptions, Message, Seconds
from bear_grpc.errors import InvalidField
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import server_service_pb2 as server
from bear_grpc.v1 import types_pb2 as types

# Field -> option, where the flat name differs from the field's own.
_STOP = {"sequences": "stop", "token_ids": "stop_token_ids"}
_OUTPUT = {"token_ids": "return_token_ids"}
_CONSTRAINTS = ("json_schema", "regex", "choices", "lark", "gbnf")


def generate(model: str, prompt: str | None, options: GenerateOptions) -> inference.GenerateRequest:
    """A GenerateRequest; the options are laid flat."""
    left = _given(options)
    _one_of(prompt=prompt, token_ids=left.get("token_ids"), messages=left.get("messages"))
    request = inference.GenerateRequest(model=model)
    if prompt is not None:
        _put(request, "prompt", prompt)
    elif "messages" in left:
        chat_options = {name: left.pop(name, None) for name in ("add_generation_prompt", "template_kwargs")}
        request.chat.CopyFrom(chat(left.pop("messages"), **chat_options))
    else:
        request.token_ids.SetInParent()  # an empty list is set too
        _put(request.token_ids, "ids", left.pop("token_ids"), path="token_ids")
    for token_id, bias in left.pop("logit_bias", {}).items():
        _fill(request.sampling.logit_bias.add(), {"token_id": token_id, "bias": bias})
    _constrain(request, left)
    _fill(request.stop, left, _STOP)
    _fill(request.output, left, _OUTPUT)
    _fill(request.sampling, left)
    _fill(request, left)
    _none_left(left)
    return request


def one_text(model: str, prompt: str | None, options: GenerateOptions) -> inference.GenerateRequest:
    """A GenerateRequest of one answer. Raises InvalidField for more: their texts come mixed."""
    if (options.get("n") or 1) > 1:
        raise InvalidField("n", "must be 1 for a stream of text; `generate` tells whose a text is")
    return generate(model, prompt, options)


def chat(
    messages: Iterable[Message],
    add_generation_prompt: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> inference.ChatInput:
    """A ChatInput from messages as `{"role": ..., "content": ...}`."""
    chat_input = inference.ChatInput(add_generation_prompt=add_generation_prompt)
    for message in messages:
        if isinstance(message, inference.ChatMessage):
            chat_input.messages.append(message)
            continue
        content = message["content"]
        entry = chat_input.messages.add(role=message["role"])
        for text in [content] if isinstance(content, str) else content:
            _put(entry.content.add(), "text", text, path="content")
    if template_kwargs is not None:
        chat_input.template_kwargs.update(dict(template_kwargs))
    return chat_input


def tokenize(
    model: str, text: str | None, messages: Sequence[Message] | None, **flags: bool | None
) -> inference.TokenizeRequest:
    """A TokenizeRequest of a text or of a conversation."""
    _one_of(text=text, messages=messages)
    request = inference.TokenizeRequest(model=model)
    if messages is not None:
        request.chat.CopyFrom(chat(messages))
    _fill(request, _given({"text": text, **flags}))
    return request


def detokenize(model: str, token_ids: Iterable[int], include_special: bool) -> inference.DetokenizeRequest:
    """A DetokenizeRequest."""
    request = inference.DetokenizeRequest(model=model, include_special=include_special)
    _put(request, "token_ids", token_ids)
    return request


def count_tokens(
    model: str, prompt: str | None, messages: Sequence[Message] | None
) -> inference.CountTokensRequest:
    """A CountTokensRequest of a prompt or of a conversation."""
    _one_of(prompt=prompt, messages=messages)
    request = inference.CountTokensRequest(model=model)
    if messages is not None:
        request.chat.CopyFrom(chat(messages))
    _fill(request, _given({"prompt": prompt}))
    return request


def list_models(states: Iterable[str | int], page_size: int) -> models.ListModelsRequest:
    """The first page's request; states by name, such as "ready"."""
    request = models.ListModelsRequest()
    _fill(request, {"states": states, "page_size": page_size})
    return request


def pull_model(
    name: str | None, repo_id: str | None, file: str | None, revision: str | None
) -> models.PullModelRequest:
    """A PullModelRequest by name, or of a file on the hub."""
    request = models.PullModelRequest()
    _target(request, name, repo_id, file, revision)
    return request


def load_model(name: str, options: LoadOptions) -> models.LoadModelRequest:
    """A LoadModelRequest."""
    return models.LoadModelRequest(name=name, options=load_options(options))


def load_options(options: LoadOptions) -> types.LoadOptions:
    """The contract's LoadOptions."""
    message, left = types.LoadOptions(), _given(options)
    _fill(message, left)
    _none_left(left)
    return message


def watch_load(interval: Seconds | None) -> server.WatchLoadRequest:
    """A WatchLoadRequest."""
    request = server.WatchLoadRequest()
    _fill(request, _given({"interval": interval}))
    return request


def unload_model(name: str, drain_timeout: Seconds | None) -> models.UnloadModelRequest:
    """An UnloadModelRequest."""
    request = models.UnloadModelRequest(name=name)
    _fill(request, _given({"drain_timeout": drain_timeout}))
    return request


def register_model(
    name: str,
    path: str,
    aliases: Iterable[str],
    defaults: DefaultsOptions | None,
    options: LoadOptions | None,
) -> models.RegisterModelRequest:
    """A RegisterModelRequest."""
    request = models.RegisterModelRequest(name=name, path=path, aliases=aliases)
    left = _given(defaults or {})
    _fill(request.defaults, left)
    _none_left(left)
    if options is not None:
        request.load_options.CopyFrom(load_options(options))
    return request


def estimate_memory(
    name: str | None, repo_id: str | None, file: str | None, revision: str | None, options: LoadOptions
) -> models.EstimateMemoryRequest:
    """An EstimateMemoryRequest of a known model, or of a file on the hub."""
    request = models.EstimateMemoryRequest(options=load_options(options))
    _target(request, name, repo_id, file, revision)
    return request


def _target(
    request: models.PullModelRequest | models.EstimateMemoryRequest,
    name: str | None,
    repo_id: str | None,
    file: str | None,
    revision: str | None,
) -> None:
    _one_of(name=name, repo_id=repo_id)
    if name is not None:
        request.name = name
    else:
        _fill(request.source, _given({"repo_id": repo_id, "file": file, "revision": revision}))


def _constrain(request: inference.GenerateRequest, left: dict[str, Any]) -> None:
    kinds = {name: left.pop(name) for name in _CONSTRAINTS if name in left}
    if not kinds:
        return
    _one_of(**kinds)
    [(name, value)] = kinds.items()
    if name == "choices":
        request.constraint.choices.SetInParent()
        _put(request.constraint.choices, "values", value, path=name)
    elif name == "json_schema":
        text = value if isinstance(value, str) else json.dumps(value)
        _put(request.constraint, "json_schema_json", text, path=name)
    else:
        _put(request.constraint, name, value)


def text_of(event: inference.GenerateResponse) -> str | None:
    """The text that an event brings; None when it brings none."""
    return event.delta.text or None


def _given(options: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _none_left(left: Mapping[str, object]) -> None:
    for name in left:  # as Python itself refuses a keyword that a function does not know
        raise TypeError(f"unexpected keyword argument {name!r}")


def _one_of(**inputs: object) -> None:
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "nothing"
        raise InvalidField("/".join(inputs), f"give exactly one of these, not {found}")


def _fill(message: ProtoMessage, left: dict[str, Any], renamed: Mapping[str, str] | None = None) -> None:
    """Moves what `message` has a field for out of `left` and into it."""
    for field in message.DESCRIPTOR.fields:
        option = (renamed or {}).get(field.name, field.name)
        is_value = field.message_type is None or field.message_type.full_name == "google.protobuf.Duration"
        if is_value and option in left:
            _put(message, field.name, left.pop(option), path=option)


def _put(message: ProtoMessage, name: str, value: Any, path: str | None = None) -> None:
    """Sets one field; enum values by name, durations in seconds."""
    field = message.DESCRIPTOR.fields_by_name[name]
    try:
        plain = partial(_plain, kind=field.enum_type)
        if field.is_repeated:
            getattr(message, name).extend(map(plain, value))
        elif field.message_type is not None:
            seconds = value if isinstance(value, timedelta) else timedelta(seconds=value)
            getattr(message, name).FromTimedelta(seconds)
        else:
            setattr(message, name, plain(value))
    except (ValueError, OverflowError) as error:  # out of the field's range, or no valid UTF-8
        raise InvalidField(path or name, str(error)) from error


def _plain(value: Any, kind: Any) -> Any:
    """The number of an enum value given by its full name or by what tells it from the others: "q8_0"."""
    if kind is None or not isinstance(value, str):
        return value
    prefix = kind.values[0].name.removesuffix("UNSPECIFIED")
    for known in kind.values:
        if value.upper() in (known.name, known.name.removeprefix(prefix)):
            return known.number
    names = ", ".join(known.name.removeprefix(prefix).lower() for known in kind.values[1:])
    raise ValueError(f"{value!r} is none of {names}")
