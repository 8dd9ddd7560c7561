"""Judges that are models: the reward model ArmoRM, and language models behind an endpoint."""
