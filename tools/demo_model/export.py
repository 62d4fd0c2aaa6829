"""Writes a trained checkpoint as GGUF: Q8_0 matrices, F32 norms, tokenizer, chat template, metadata.

python -m tools.demo_model.export CHECKPOINT OUTPUT.gguf
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np
import torch

from .dialogue import CHAT_TEMPLATE
from .model import ModelConfig
from .tokenizer import BYTES, CONTROL, RESERVED, Tokenizer

WORK_DIR = Path("build/demo-model")
MODEL = Path("bear_grpc/demo/bear-demo.gguf")
VERSION = "1.0"
DESCRIPTION = (
    "The embedded demonstration model of bear_grpc. It answers questions about the service and its field "
    "from memory and tells short stories; it knows nothing else."
)


def write_gguf(state: dict[str, torch.Tensor], config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    """Writes to a temporary file beside `path` and renames it, so readers never see half a model."""
    if len(tokenizer) != config.vocab:
        raise ValueError(f"tokenizer has {len(tokenizer)} tokens, the model {config.vocab}")
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_metadata(writer, config, sum(tensor.numel() for tensor in state.values()))
    _add_tokenizer(writer, tokenizer)
    for name, tensor in state.items():
        data = tensor.detach().to(torch.float32).numpy()
        if data.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(data))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, parameters: int) -> None:
    writer.add_type("model")
    writer.add_name("bear-demo")
    writer.add_basename("bear-demo")
    writer.add_version(VERSION)
    writer.add_author("bear_grpc")
    writer.add_organization("bear_grpc")
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_license_name("Apache License 2.0")
    writer.add_size_label(f"{parameters / 1e6:.1f}M")
    writer.add_tags(["text-generation", "question-answering", "demo"])
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # Engines that read these use them as the model's defaults: answers are learned word for word.
    writer.add_sampling_temp(0.0)
    writer.add_sampling_penalty_repeat(1.0)
    writer.add_vocab_size(config.vocab)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    kinds = [int(gguf.TokenType.NORMAL)] * len(tokenizer)
    for index, token in enumerate(RESERVED):
        kinds[index] = int(gguf.TokenType.BYTE if token in BYTES else gguf.TokenType.CONTROL)
    kinds[0] = int(gguf.TokenType.UNKNOWN)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_scores(tokenizer.scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_eot_token_id(tokenizer.ids[CONTROL[-1]])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # Off: pieces are then concatenative, and text after a control token encodes as it does alone.
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=WORK_DIR / "checkpoint.pt")
    parser.add_argument("output", type=Path, nargs="?", default=MODEL)
    arguments = parser.parse_args()
    saved = torch.load(arguments.checkpoint, weights_only=True)
    tokenizer = Tokenizer(saved["pieces"])
    write_gguf(saved["state"], ModelConfig(**saved["config"]), tokenizer, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
