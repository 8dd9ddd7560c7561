"""Backends that compute logits: `base` is the interface, each sub-package implements it."""
