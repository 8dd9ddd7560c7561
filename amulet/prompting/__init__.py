"""From messages and preferences to token ids."""
