"""Benchmarks: a script per claim, run as `python -m benchmarks.<name>`."""
