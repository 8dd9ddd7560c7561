"""The Transformers backend: one file per module."""
