"""What makes the Transformers backend fast on a CPU."""
