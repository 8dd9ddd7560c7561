"""Converts messages and preferences to token ids."""
