"""Trains the demo model and writes its GGUF.

    python -m tools.demo_model.train [--work-dir DIR] [--output FILE.gguf]

Everything follows from the data files and `--seed`; threads may change the last bits of the sums.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import offtopic
from .dialogue import SYSTEM_TEXTS, Example, Layout, fact_examples, offtopic_example, story_example
from .export import MODEL, WORK_DIR, write_gguf
from .facts import Fact, load_facts
from .model import DemoModel, ModelConfig
from .stories import PROMPTS, stories
from .tokenizer import Tokenizer, train_tokenizer

STORY_SHARE = 0.07
OFFTOPIC_SHARE = 0.03
TRAIN_STORIES = 6000
PASSES_PER_POOL = 6


def build_tokenizer(facts: list[Fact], size: int) -> Tokenizer:
    """Learns the vocabulary from the training side only; answers weigh most, as they are generated."""
    texts: list[tuple[str, int]] = [(text, 2) for text in (*SYSTEM_TEXTS, *PROMPTS)]
    for fact in facts:
        texts.append((fact.answer, 6))
        for question in fact.ask:
            texts.extend(((question, 2), (question.lower(), 1)))
    texts.append((offtopic.ANSWER, 6))
    texts.extend((question, 1) for question in offtopic.QUESTIONS)
    texts.extend((story.text, 1) for story in stories(60, held_out=False))
    return train_tokenizer(texts, size)


def batches(layout: Layout, facts: list[Fact], budget: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets) batches of about `budget` tokens; -1 marks targets that are not learned.

    Examples of a pool are sorted by length, so rows of a batch need almost no padding.
    """
    rng = random.Random(seed)
    tales = stories(TRAIN_STORIES, held_out=False)
    while True:
        pool: list[Example] = []
        for _ in range(PASSES_PER_POOL):
            pool.extend(fact_examples(layout, facts, rng))
        told, refused = int(len(pool) * STORY_SHARE), int(len(pool) * OFFTOPIC_SHARE)
        pool.extend(offtopic_example(layout, rng) for _ in range(refused))
        pool.extend(story_example(layout, rng.choice(tales), rng) for _ in range(told))
        rng.shuffle(pool)
        pool.sort(key=lambda example: len(example.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.ids) > budget:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from map(pad, groups)


def pad(group: list[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and next-token targets; causal attention keeps padding out of the loss."""
    width = max(len(example.ids) for example in group) - 1
    ids = torch.zeros(len(group), width, dtype=torch.long)
    targets = torch.full((len(group), width), -1, dtype=torch.long)
    for row, example in enumerate(group):
        tokens = torch.tensor(example.ids)
        learn = torch.tensor(example.learn, dtype=torch.bool)
        ids[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = torch.where(learn[1:], tokens[1:], -1)
    return ids, targets


def exact_rate(model: DemoModel, examples: list[Example]) -> float:
    """Share of examples whose whole answer is the greedy choice at every token."""
    right = 0
    order = sorted(examples, key=lambda example: len(example.ids))
    with torch.no_grad():
        for start in range(0, len(order), 64):
            ids, targets = pad(order[start : start + 64])
            with torch.autocast("cpu", torch.bfloat16):
                choice = model.logits(model(ids)).argmax(-1)
            right += int(((choice == targets) | (targets < 0)).all(dim=1).sum())
    return right / len(order)


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: short warm-up, a plateau, then linear decay over the last 45 %."""
    warm, decay = min(1.0, (step + 1) / 60), min(1.0, (steps - step) / (0.45 * steps))
    return warm * decay


def train(arguments: argparse.Namespace) -> None:
    """Runs the whole training and exports the result."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    facts = load_facts()
    tokenizer = build_tokenizer(facts, arguments.vocab)
    layout = Layout(tokenizer)
    config = ModelConfig(vocab=len(tokenizer))
    model = DemoModel(config)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n != "token_embd.weight"]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n == "token_embd.weight"]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.muon_lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    held_out = [layout.raw(question, fact.answer) for fact in facts for question in fact.held_out]
    trained = [layout.chat([(fact.ask[step % 5], fact.answer)]) for step, fact in enumerate(facts)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(facts)} facts, {len(tokenizer)} tokens, {parameters:,} parameters", flush=True)

    source = batches(layout, facts, arguments.batch_tokens, arguments.seed)
    records: list[dict[str, float]] = []
    started, total_loss, seen = time.monotonic(), 0.0, 0
    for step in range(arguments.steps):
        ids, targets = next(source)
        factor = schedule(step, arguments.steps)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(ids)
            wanted = targets >= 0
            logits = model.logits(hidden[wanted])
        loss = F.cross_entropy(logits.float(), targets[wanted])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        total_loss, seen = total_loss + loss.item(), seen + ids.numel()
        if (step + 1) % arguments.report_every == 0 or step + 1 == arguments.steps:
            count = (step % arguments.report_every) + 1
            record = {
                "step": step + 1,
                "loss": round(total_loss / count, 4),
                "trained_chat": round(exact_rate(model, trained), 4),
                "held_out_raw": round(exact_rate(model, held_out), 4),
                "seconds": round(time.monotonic() - started),
                "tokens": seen,
            }
            print(json.dumps(record), flush=True)
            total_loss = 0.0
            records.append(record)
            lines = "".join(json.dumps(line) + "\n" for line in records)
            (arguments.work_dir / "train.jsonl").write_text(lines, encoding="ascii")
            saved = {"state": model.state_dict(), "config": asdict(config), "pieces": tokenizer.pieces}
            torch.save(saved, arguments.work_dir / "checkpoint.pt")
    write_gguf(model.state_dict(), config, tokenizer, arguments.output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="for checkpoint and records")
    parser.add_argument("--output", type=Path, default=MODEL, help="the GGUF to write")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
