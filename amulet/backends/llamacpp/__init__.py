"""Runs models from GGUF files with llama.cpp."""
