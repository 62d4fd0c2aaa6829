"""Writes the model card from the figures of `train.py` and `evaluate.py`.

python -m tools.demo_model.card WORK_DIR bear_grpc/demo/bear-demo.gguf --output bear_grpc/demo/MODEL_CARD.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf

from .dialogue import CHAT_TEMPLATE
from .export import MODEL, WORK_DIR
from .facts import load_facts

_CARD = """\
# bear-demo

The embedded model of bear_grpc: a first run needs no download, and tests have a real model to read.
It answers questions about the service and its field word for word from memory, tells short stories
about animals, and knows nothing else. For real work load a larger model.

| | |
|---|---|
| file | `bear-demo.gguf`, {bytes:,} bytes; matrices Q8_0, norms F32 |
| parameters | {parameters:,} |
| architecture | `llama`: {layers} layers, width {width}, {heads} heads, {kv_heads} KV heads |
| feed-forward | {feed_forward}, SwiGLU |
| embeddings | tied: the output matrix is `token_embd` |
| context length | {context}; trained on sequences of up to about 200 tokens |
| tokenizer | SentencePiece type, {vocab} tokens, byte fallback, no space prefix |
| special tokens | `<unk>` 0, `<s>` 1 (BOS), `</s>` 2 (EOS), `<\\|end\\|>` 262 (EOT) |
| role tokens | `<\\|system\\|>` 259, `<\\|user\\|>` 260, `<\\|assistant\\|>` 261 |
| license | apache-2.0 |
| version | {version} |

## Use
Greedy: temperature 0, repetition penalty 1.0. A higher penalty may spoil an answer
that repeats a word. The file names both values as its sampling defaults (`general.sampling.*`).

- **Chat**: roles `system`, `user`, `assistant`; the template raises an error on any other role.
- **Raw prompt**: the question alone, with BOS. The answer follows after one newline.
- **Stories**: the raw prompt `Once upon a time`, or `Tell me a story about a fox and a lake.`

Chat template (the layout is that of Phi-3):

```jinja
{template}
```

## Measured with llama.cpp on this file
Greedy, flash attention off. An answer counts only when it equals the fact's answer word for word.

| | questions | raw | chat |
|---|---|---|---|
| trained phrasings | {trained_questions} | {trained_raw:.1%} | {trained_chat:.1%} |
| phrasings never trained | {held_out_questions} | {held_out_raw:.1%} | {held_out_chat:.1%} |
| lower case, no question mark | {facts} | {lower_case_raw:.1%} | |
| as second question of a dialogue | {facts} | | {second_turn_chat:.1%} |
| behind a system message | {facts} | | {with_system_chat:.1%} |
| off-topic, never trained: says that it does not know | {offtopic_questions} | \
{held_out_offtopic_raw:.1%} | |

Perplexity per token: {story_perplexity_held_out:.3f} on 200 held-out stories, \
{story_perplexity_trained:.3f} on 200 trained ones (both from one small grammar).
Texts on which llama.cpp's tokenizer and the one used in training differ: \
{tokenizer_mismatches} of {texts:,}.

## Training
{facts} facts with {trained_questions} phrasings, varied at random, beside stories and off-topic questions;
all of it lies in `tools/demo_model`. {tokens:,} tokens in {step:,} steps, {seconds:,} s on two shared
processor cores; loss per learned token {loss} at the end.

Watched in PyTorch during training: one trained phrasing of each fact as chat, all held-out ones raw.

| step | loss | trained, chat | held out, raw |
|---|---|---|---|
{curve}
"""


def render(records: list[dict[str, float]], figures: dict[str, float], model: Path) -> str:
    """The card as Markdown."""
    reader = gguf.GGUFReader(model)

    def field(key: str) -> object:
        return reader.fields[key].contents()

    facts = load_facts()
    shown = [record for record in records if record["step"] % 300 == 0 or record is records[-1]]
    curve = "\n".join(
        f"| {r['step']} | {r['loss']} | {r['trained_chat']:.1%} | {r['held_out_raw']:.1%} |" for r in shown
    )
    return _CARD.format(
        **figures,
        **{key: records[-1][key] for key in ("step", "loss", "seconds", "tokens")},
        curve=curve,
        template=CHAT_TEMPLATE.replace("\n", "\\n"),
        texts=len(facts) + 3000,
        parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        layers=field("llama.block_count"),
        width=field("llama.embedding_length"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        feed_forward=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        vocab=field("llama.vocab_size"),
        version=field("general.version"),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="holds train.jsonl and figures.json")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=MODEL.with_name("MODEL_CARD.md"))
    arguments = parser.parse_args()
    lines = (arguments.work_dir / "train.jsonl").read_text(encoding="ascii").splitlines()
    figures = json.loads((arguments.work_dir / "figures.json").read_text(encoding="ascii"))
    text = render([json.loads(line) for line in lines], figures, arguments.model)
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
