"""Training material of the embedded model `bear-demo`: data, tokenizer, trainer, GGUF writer, evaluation."""
