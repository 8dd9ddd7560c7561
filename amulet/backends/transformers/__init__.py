"""Runs causal language models of Transformers, in rows."""
