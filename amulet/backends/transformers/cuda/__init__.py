"""What makes decoding fast on a GPU; without it every token is the same."""
