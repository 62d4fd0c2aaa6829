"""Measures the server against llama.cpp's own programs: `python -m benchmarks --help`."""
