"""Speeds up decoding on a GPU; without it, answers are the same."""
