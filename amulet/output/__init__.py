"""Converts token ids to what the caller reads: text, sections, events, replies."""
