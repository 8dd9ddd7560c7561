"""The cache folder for the converted model and compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of Amulet's cached files, which need not exist.

    AMULET_CACHE sets it; the default is in the user's cache directory.
    """
    given = os.environ.get("AMULET_CACHE")
    if given:
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("amulet")
