"""Any causal language model of Transformers, decoded in rows."""
