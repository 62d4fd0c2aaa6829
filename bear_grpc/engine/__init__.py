"""The engine: sequences, scheduling, sampling, stopping. Knows no process, no socket, no llama.cpp."""
