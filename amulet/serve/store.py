"""The SQLite file in which the server stores users' preferences and thumbs."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from amulet.errors import RequestError
from amulet.serve.errors import ApiError

MEMORY = ":memory:"
_TABLES = """
CREATE TABLE IF NOT EXISTS preferences (user TEXT PRIMARY KEY, settings TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS thumbs (
    user TEXT, id TEXT, thumb TEXT NOT NULL, PRIMARY KEY (user, id)
);
"""
_PAGES = 2**18  # of 4 KiB: limits a file that users write to to 1 GiB


class Store:
    """Settings (preference, strength, ...) and thumbs by user; any thread may call it.

    Args:
        path: the file; if there is none, it is created with access for its owner only. `MEMORY`
            keeps everything in memory until `close`.

    Raises:
        RequestError: the file can't be opened or is not an SQLite database.
    """

    def __init__(self, path: str | Path) -> None:
        self._lock = threading.Lock()
        try:
            if path != MEMORY:
                Path(path).touch(mode=0o600)
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")  # readers don't wait for writers
            self._database.execute("PRAGMA secure_delete=ON")  # deleted data is overwritten
            self._database.execute(f"PRAGMA max_page_count={_PAGES}")
            self._database.executescript(_TABLES)
        except (OSError, TypeError, sqlite3.Error) as error:
            raise RequestError(
                f"store={str(path)!r}: {error}; expected a file that can be written, new or "
                "an SQLite database."
            ) from None

    def get(self, user: str) -> dict[str, Any] | None:
        """Return a user's settings, or None if there are none."""
        with self._lock:
            row = self._database.execute(
                "SELECT settings FROM preferences WHERE user = ?", (_text(user),)
            ).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def put(self, user: str, settings: dict[str, Any]) -> None:
        """Store a user's settings, replacing earlier ones.

        Raises:
            ApiError: the file has its full size (507).
        """
        self._write(
            "INSERT OR REPLACE INTO preferences VALUES (?, ?)", _text(user), json.dumps(settings)
        )

    def delete(self, user: str) -> bool:
        """Delete a user's settings; return whether there were any."""
        return self._write("DELETE FROM preferences WHERE user = ?", _text(user)) > 0

    def thumbs(self, user: str) -> list[dict[str, Any]]:
        """Return a user's thumbs, oldest first, each with its `id`."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id, thumb FROM thumbs WHERE user = ? ORDER BY rowid", (_text(user),)
            ).fetchall()
        return [{"id": id_, **json.loads(thumb)} for id_, thumb in rows]

    def put_thumb(self, user: str, id_: str, thumb: dict[str, Any], most: int) -> bool:
        """Store a thumb, replacing an earlier one with the same id.

        Returns:
            Whether it was stored: a user with `most` thumbs can change them, but not add more.

        Raises:
            ApiError: the file has its full size (507).
        """
        return (
            self._write(
                "INSERT OR REPLACE INTO thumbs SELECT ?1, ?2, ?3 "
                "WHERE (SELECT count(*) FROM thumbs WHERE user = ?1 AND id <> ?2) < ?4",
                _text(user),
                _text(id_),
                json.dumps(thumb),
                most,
            )
            > 0
        )

    def delete_thumbs(self, user: str, id_: str | None = None) -> int:
        """Delete one of a user's thumbs, or all (None); return how many there were."""
        if id_ is None:
            return self._write("DELETE FROM thumbs WHERE user = ?", _text(user))
        return self._write("DELETE FROM thumbs WHERE user = ? AND id = ?", _text(user), _text(id_))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _write(self, statement: str, *values: object) -> int:
        """Run a statement; return how many rows it changed."""
        with self._lock:
            try:
                changed = self._database.execute(statement, values).rowcount
            except sqlite3.OperationalError as error:
                if "full" not in str(error):
                    raise
                raise ApiError(
                    507, "The server's store is full: delete entries that are no longer needed."
                ) from None
            if statement.startswith("DELETE"):  # remove it from the write-ahead log, too
                with suppress(sqlite3.OperationalError):  # another process is reading the file
                    self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return changed


def _text(given: str) -> str:
    """Return a text that SQLite accepts: a URL may contain a lone surrogate."""
    return given.encode("utf-8", "replace").decode("utf-8")
