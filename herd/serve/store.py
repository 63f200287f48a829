"""What a server keeps beyond a reply: one folder, one SQLite database in it, one server at a time.

Who keeps something brings its own tables (`Store(folder, tables)`), and speaks SQL; here are only the folder, its lock and the
connection. Rows belong to a caller, by the words that `connection.caller` gives: `owner` makes one text of them, to select by.
"""

import fcntl
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from herd.errors import ResourceError

DATABASE = "server.sqlite"
LOCK = "server.lock"


class Store:
    """A folder that one server owns, and the database in it. All of it belongs to one thread, the event loop's.

    Statements run one by one, each its own transaction; `with store.together():` around several makes them one. What was written is on
    the disk when that ends, so that neither `kill -9` nor a loss of power loses it.
    """

    def __init__(self, folder: Path | None, tables: Iterable[str]) -> None:
        """Make or open it. Raises `ResourceError` where another server has it, or where it cannot be written.

        folder: none is one of its own, which goes when the store is closed.
        tables: statements that make what is not there yet (`CREATE TABLE IF NOT EXISTS ...`).
        """
        self._passing = tempfile.TemporaryDirectory(prefix="herd-serve-") if folder is None else None
        self.folder = folder = Path(self._passing.name) if self._passing else cast("Path", folder)
        self._lock = -1
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # for its owner, also in an open folder
            # the routes of an app may be run by any one thread, so sqlite3 need not insist on the one that opened it
            self.db = sqlite3.connect(folder / DATABASE, isolation_level=None, check_same_thread=False)
            self.db.row_factory = sqlite3.Row
            self.db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON")
            for statement in tables:
                self.db.execute(statement)
        except BlockingIOError as error:
            self._unlock()
            raise ResourceError(f"another server keeps its data in {folder}", "give another --data-folder") from error
        except (OSError, sqlite3.Error) as error:
            self._unlock()
            raise ResourceError(f"the server cannot keep its data in {folder}: {error}", "give another --data-folder") from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """All statements within, or none of them. Not to be held over an `await`."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self.db.in_transaction:  # a disk that is full has ended it
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def close(self) -> None:
        """Let another server have the folder."""
        self.db.close()
        self._unlock()
        if self._passing:
            self._passing.cleanup()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def owner(caller: tuple[str, ...]) -> str:
    """The words of a caller as one text, different for different callers."""
    return json.dumps(caller)
