"""One file per module of the core."""
