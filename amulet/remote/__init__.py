"""An `Amulet` whose model is on a server: `connect(url)`. Requires the package `openai`."""

from amulet.remote.client import connect

__all__ = ["connect"]
