"""From token ids to token ids: the engine, and how each token is chosen. It knows no text."""
