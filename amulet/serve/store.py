"""Users' preferences in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from amulet.errors import RequestError

_TABLE = "CREATE TABLE IF NOT EXISTS preferences (user TEXT PRIMARY KEY, settings TEXT NOT NULL)"


class PreferenceStore:
    """Settings (preference, strength, floor, placement) by user; any thread may call it.

    Args:
        path: the file; it is made, readable for its owner alone, where there is none.

    Raises:
        RequestError: the file can't be opened or is no SQLite database.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")  # readers don't wait for a writer
            self._database.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise RequestError(
                f"preferences={str(path)!r}: {error}; expected a file that can be written, new or "
                "an SQLite database."
            ) from None

    def get(self, user: str) -> dict[str, Any] | None:
        """Return a user's settings, None where there are none."""
        with self._lock:
            row = self._database.execute(
                "SELECT settings FROM preferences WHERE user = ?", (user,)
            ).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def put(self, user: str, settings: dict[str, Any]) -> None:
        """Keep a user's settings in place of earlier ones."""
        with self._lock:
            self._database.execute(
                "INSERT OR REPLACE INTO preferences VALUES (?, ?)", (user, json.dumps(settings))
            )

    def delete(self, user: str) -> bool:
        """Forget a user's settings; return whether there were any."""
        with self._lock:
            found = self._database.execute("DELETE FROM preferences WHERE user = ?", (user,))
            return found.rowcount > 0

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()
