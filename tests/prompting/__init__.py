"""The room prompting: one file per module."""
