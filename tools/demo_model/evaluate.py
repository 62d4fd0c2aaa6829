"""Measures a finished GGUF with llama.cpp and writes the figures as JSON.

    python -m tools.demo_model.evaluate [FILE.gguf] [--json FIGURES.json]

Uses the low-level API: greedy, flash attention off, prompts rendered by the chat template in the file.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from . import offtopic
from .dialogue import SYSTEM_TEXTS
from .export import MODEL, WORK_DIR
from .facts import Fact, load_facts
from .stories import stories
from .tokenizer import RESERVED, Tokenizer

N_SEQUENCES = 16
CONTEXT = 512


class Engine:
    """One llama.cpp model and context; answers many prompts side by side."""

    def __init__(self, path: Path, threads: int) -> None:
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=threads, flash_attn=False, verbose=False, vocab_only=True
        )
        self.metadata = self.llama.metadata
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * N_SEQUENCES, N_SEQUENCES
        params.n_batch = params.n_ubatch = 2048
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.formatter = Jinja2ChatFormatter(
            template=self.metadata["tokenizer.chat_template"], bos_token="<s>", eos_token="</s>"
        )

    def raw(self, prompt: str) -> list[int]:
        """Token ids of a raw prompt: BOS and the text."""
        return self.llama.tokenize(prompt.encode(), add_bos=True, special=False)

    def chat(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a dialogue, rendered by the template in the file."""
        rendered = self.formatter(messages=[{"role": r, "content": c} for r, c in messages]).prompt
        return self.llama.tokenize(rendered.encode(), add_bos=False, special=True)

    def forward(self, entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Runs (token, position, sequence, wanted) entries; returns the wanted rows of logits."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for at, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, at), (self.n_vocab,)).copy()
            for at, entry in enumerate(entries)
            if entry[3]
        ]
        return np.stack(rows)

    def answers(self, prompts: list[list[int]], limit: int = 160) -> list[str]:
        """Greedy continuations, in groups of `N_SEQUENCES`; a leading newline is removed."""
        out: list[str] = []
        for start in range(0, len(prompts), N_SEQUENCES):
            group = prompts[start : start + N_SEQUENCES]
            llama_cpp.llama_memory_clear(self.memory, True)
            made: list[list[int]] = [[] for _ in group]
            last = [self.forward(_prompt_entries(p, s))[0] for s, p in enumerate(group)]
            live = list(range(len(group)))
            while live:
                tokens = {s: int(np.argmax(last[s])) for s in live}
                live = [s for s in live if not llama_cpp.llama_vocab_is_eog(self.vocab, tokens[s])]
                for s in live:
                    made[s].append(tokens[s])
                live = [s for s in live if len(made[s]) < limit]
                if not live:
                    break
                rows = self.forward([(made[s][-1], len(group[s]) + len(made[s]) - 1, s, True) for s in live])
                for s, row in zip(live, rows, strict=True):
                    last[s] = row
            texts = (self.llama.detokenize(tokens, special=False).decode() for tokens in made)
            out.extend(text.removeprefix("\n") for text in texts)
        return out

    def perplexity(self, texts: list[str]) -> float:
        """Exponential of the mean loss per token, end token included."""
        total, count = 0.0, 0
        for text in texts:
            ids = [*self.raw(text), self.llama.token_eos()]
            llama_cpp.llama_memory_clear(self.memory, True)
            entries = [(token, at, 0, True) for at, token in enumerate(ids[:-1])]
            logits = self.forward(entries).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
            total, count = total + float(losses.sum()), count + len(losses)
        return float(np.exp(total / count))


def _prompt_entries(prompt: list[int], sequence: int) -> list[tuple[int, int, int, bool]]:
    return [(token, at, sequence, at == len(prompt) - 1) for at, token in enumerate(prompt)]


def share(engine: Engine, prompts: list[list[int]], expected: list[str]) -> float:
    """Share of prompts answered word for word."""
    got = engine.answers(prompts)
    return sum(a == b for a, b in zip(got, expected, strict=True)) / len(expected)


def tokenizer_mismatches(engine: Engine, facts: list[Fact], count: int) -> int:
    """Texts on which our encoder and llama.cpp disagree, or which do not survive a round trip."""
    rng = random.Random(3)
    tokens = [llama_cpp.llama_vocab_get_text(engine.vocab, at).decode() for at in range(engine.n_vocab)]
    ours = Tokenizer(tokens[len(RESERVED) :])
    alphabet = "abcdefgXYZ 012 \n\t\u00e9\u00df\u6f22\u5b57\U0001f43b\u0301_<>|/.,()'\"\\"
    texts = [fact.answer for fact in facts]
    texts += ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count)]
    wrong = 0
    for text in texts:
        ids = engine.llama.tokenize(text.encode(), add_bos=False, special=False)
        wrong += ids != ours.encode(text) or engine.llama.detokenize(ids).decode() != text
    return wrong


def measure(path: Path, threads: int) -> dict[str, float | int]:
    """All figures of the model card."""
    engine, facts, rng = Engine(path, threads), load_facts(), random.Random(7)
    figures: dict[str, float | int] = {"bytes": path.stat().st_size, "facts": len(facts)}
    for name, pairs in (
        ("trained", [(q, f.answer) for f in facts for q in f.ask]),
        ("held_out", [(q, f.answer) for f in facts for q in f.held_out]),
    ):
        answers = [answer for _, answer in pairs]
        figures[f"{name}_questions"] = len(pairs)
        figures[f"{name}_raw"] = share(engine, [engine.raw(q) for q, _ in pairs], answers)
        figures[f"{name}_chat"] = share(engine, [engine.chat([("user", q)]) for q, _ in pairs], answers)
    lower = [(fact.ask[0].lower().rstrip("?."), fact.answer) for fact in facts]
    figures["lower_case_raw"] = share(engine, [engine.raw(q) for q, _ in lower], [a for _, a in lower])
    second, system = [], []
    for fact in facts:
        first = rng.choice([other for other in facts if other is not fact])
        turn = [("user", rng.choice(first.ask)), ("assistant", first.answer)]
        second.append(engine.chat([*turn, ("user", fact.ask[0])]))
        system.append(engine.chat([("system", rng.choice(SYSTEM_TEXTS)), ("user", fact.ask[0])]))
    answers = [fact.answer for fact in facts]
    figures["second_turn_chat"] = share(engine, second, answers)
    figures["with_system_chat"] = share(engine, system, answers)
    refused = [offtopic.ANSWER] * len(offtopic.HELD_OUT)
    figures["offtopic_questions"] = len(refused)
    figures["held_out_offtopic_raw"] = share(engine, [engine.raw(q) for q in offtopic.HELD_OUT], refused)
    figures["story_perplexity_held_out"] = engine.perplexity([s.text for s in stories(200, held_out=True)])
    figures["story_perplexity_trained"] = engine.perplexity([s.text for s in stories(200, held_out=False)])
    figures["tokenizer_mismatches"] = tokenizer_mismatches(engine, facts, 3000)
    return {key: round(value, 4) for key, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--json", type=Path, default=WORK_DIR / "figures.json", help="where the figures go")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    text = json.dumps(measure(arguments.model, arguments.threads), indent=2)
    print(text)
    print(f"measured in {time.monotonic() - started:.0f} s")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
