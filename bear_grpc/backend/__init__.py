"""What runs the model: the interface that the engine needs, and llama.cpp behind it."""
