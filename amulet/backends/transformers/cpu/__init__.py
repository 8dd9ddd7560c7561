"""Speeds up decoding on a CPU; without it, answers are the same."""
