"""Both integrations, run through one table."""
