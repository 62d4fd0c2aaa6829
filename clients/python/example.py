"""Talks to a bear_grpc server: load a model, stream text, cancel, handle an error by its kind.

Start a server with `bear serve`, then: python clients/python/example.py [HOST:PORT]
"""
# ruff: noqa: T201

import sys

from bear_grpc.client import Client, ServerUnreachable
from bear_grpc.errors import BearError, ModelNotFound, QueueFull

MODEL = "bear-demo"


def main() -> int:
    target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
    with Client(target) as client:
        try:
            # Any call loads the model by itself; here it is to have options of its own.
            loaded = client.load_model(MODEL)
            print(f"{MODEL} takes {loaded.status.effective_options.context_length} tokens")

            # Text as it comes. What is left out has the model's defaults.
            messages = [{"role": "user", "content": "Hello! Who are you?"}]
            for text in client.stream_text(MODEL, messages=messages, temperature=0, max_tokens=64):
                print(text, end="", flush=True)
            print()

            # All events of a generation. Leaving the `with` cancels it, on the server too.
            with client.generate(MODEL, "Once upon a time", max_tokens=256) as events:
                num_deltas = 0
                for event in events:
                    num_deltas += event.WhichOneof("event") == "delta"
                    if num_deltas == 5:
                        print("enough of that story")
                        break

            # An error's class says what happened, its metadata what a program can do about it.
            try:
                client.generate_once("no-such-model", "Hello")
            except ModelNotFound as error:
                print(f"{error.reason}: {error.message}; near: {error.metadata.get('nearest') or 'nothing'}")
        except QueueFull as error:
            print(f"busy, try again in {error.retry_after_s} s", file=sys.stderr)
            return 1
        except ServerUnreachable as error:
            print(f"{error.message}; start one with `bear serve`", file=sys.stderr)
            return 1
        except BearError as error:
            print(f"{error.reason}: {error.message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
