"""Loads models from the hub, a folder, a GGUF file or a package."""
