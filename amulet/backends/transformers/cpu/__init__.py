"""What makes decoding fast on a CPU; without it every token is the same."""
