"""Compare ways of decoding: questions, methods, judges, runs and their report."""
