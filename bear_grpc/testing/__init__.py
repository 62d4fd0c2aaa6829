"""For tests of programs on bear_grpc, and of bear_grpc itself.

A real server, with the embedded model, for tests of a client:

    async def test_my_client_gets_text():
        async with serve_in_process(load=["bear-demo"]) as target:
            assert await my_client(target).ask("hello")

An engine without llama.cpp: `FakeBackend` is deterministic, instant, and strict
about what llama.cpp would abort on or silently get wrong; `FakeClock` is its time.
Nothing else in bear_grpc imports this package.
"""

from .backend import FakeBackend, Misuse
from .clock import FakeClock
from .sampler import FakeSampler
from .server import serve_in_process
from .vocabulary import CHAT_TEMPLATE, FakeVocabulary

__all__ = [
    "CHAT_TEMPLATE",
    "FakeBackend",
    "FakeClock",
    "FakeSampler",
    "FakeVocabulary",
    "Misuse",
    "serve_in_process",
]
