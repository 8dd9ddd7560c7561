"""Every decoder of Transformers as a tiny random model, compared with `generate`."""
