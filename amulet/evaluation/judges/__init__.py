"""Judges that are models: the reward model ArmoRM, and any language model behind an endpoint."""
