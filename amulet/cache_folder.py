"""Where Amulet keeps what it makes once: the converted model, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of Amulet's own cached files; it need not exist.

    It is the one that AMULET_CACHE names, else one in the user's cache directory.
    """
    given = os.environ.get("AMULET_CACHE")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("amulet")
