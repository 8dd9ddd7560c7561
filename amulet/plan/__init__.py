"""Estimates the memory and time of steered requests on GPUs: `amulet plan`, docs/scaling.md."""
