"""Models from GGUF files, computed by llama.cpp."""
