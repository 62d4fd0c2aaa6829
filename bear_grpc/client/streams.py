"""Running calls as iterators that cancel the call when they are left.

gRPC itself lets a call run on that nobody reads any more, whether its iterator is left or even forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc

from bear_grpc.client.errors import CallCancelled, translate

T = TypeVar("T")


class _SyncCall(Protocol):
    def __next__(self) -> Any: ...
    def cancel(self) -> bool: ...


class Stream(Iterator[T], Generic[T]):
    """The answers of a running call. Leaving it (`with`, `break`, an exception) cancels the call."""

    def __init__(self, call: _SyncCall, target: str, pick: Callable[[Any], T | None] | None = None) -> None:
        """`pick` makes what is yielded of a response; None is left out."""
        self._call = call
        self._target = target
        self._pick = pick

    def __next__(self) -> T:
        try:
            while True:
                response = next(self._call)
                picked: T | None = response if self._pick is None else self._pick(response)
                if picked is not None:
                    return picked
        except grpc.RpcError as failed:
            raise translate(failed, self._target) from failed
        except BaseException:  # the end, or a KeyboardInterrupt; cancelling a call that ended does nothing
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends the call, from any thread: a reader then gets `CallCancelled`."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:  # a `for` that was left keeps no other trace of the iterator
        self.cancel()


class AsyncStream(AsyncIterator[T], Generic[T]):
    """The answers of a running call. Leaving it (`async with`, `break`, an exception) cancels the call."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[Any, Any],
        target: str,
        pick: Callable[[Any], T | None] | None = None,
    ) -> None:
        """`pick` makes what is yielded of a response; None is left out."""
        self._call = call
        self._target = target
        self._pick = pick
        self._cancelled_here = False

    async def __anext__(self) -> T:
        try:
            while True:
                response: Any = await self._call.read()
                if response is grpc.aio.EOF:
                    raise StopAsyncIteration
                picked: T | None = response if self._pick is None else self._pick(response)
                if picked is not None:
                    return picked
        except grpc.RpcError as failed:
            raise translate(failed, self._target) from failed
        except asyncio.CancelledError:
            task = asyncio.current_task()
            # grpc.aio tells the reader of a cancelled call what asyncio tells a cancelled task.
            if self._cancelled_here and (task is None or not task.cancelling()):
                raise CallCancelled("the call was cancelled") from None
            raise

    def cancel(self) -> None:
        """Ends the call, from any task of its loop: a reader then gets `CallCancelled`."""
        self._cancelled_here = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
