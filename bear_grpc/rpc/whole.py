"""The events of a generation as one answer."""

from __future__ import annotations

from ..v1 import inference_service_pb2 as pb


class Whole:
    """Takes the messages of a stream and gives a GenerateOnceResponse."""

    def __init__(self, n: int) -> None:
        self._response = pb.GenerateOnceResponse(choices=[pb.Choice(index=index) for index in range(n)])
        self._texts: list[list[str]] = [[] for _ in range(n)]

    async def add(self, message: pb.GenerateResponse) -> None:
        """The next message of the stream."""
        response, index = self._response, message.index
        response.request_id = message.request_id
        choice = response.choices[index]
        match message.WhichOneof("event"):
            case "started" if index == 0:
                response.started.CopyFrom(message.started)
            case "delta":
                self._texts[index].append(message.delta.text)
                choice.tokens.extend(message.delta.tokens)
            case "completed":
                completed = message.completed
                choice.finish_reason = completed.finish_reason
                if completed.HasField("stop_cause"):
                    choice.stop_cause.CopyFrom(completed.stop_cause)
                if completed.HasField("constraint_satisfied"):
                    choice.constraint_satisfied = completed.constraint_satisfied
                choice.timings.CopyFrom(completed.timings)
                # Of the prompt only answer 0 tells a count.
                response.usage.prompt_token_count += completed.usage.prompt_token_count
                response.usage.cached_token_count += completed.usage.cached_token_count
                response.usage.completion_token_count += completed.usage.completion_token_count

    def response(self) -> pb.GenerateOnceResponse:
        """The answer, when the stream has ended."""
        for choice, texts in zip(self._response.choices, self._texts, strict=True):
            choice.text = "".join(texts)
        return self._response
