"""The room output: one file per module."""
