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
LOCKED_S = 0.1  # that a statement waits for another program, which should not be there; so long nobody is served


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
            self._opened = _identity(folder / DATABASE)
            # the routes of an app may be run by any one thread, so sqlite3 need not insist on the one that opened it
            self._db = sqlite3.connect(folder / DATABASE, timeout=LOCKED_S, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON")
            for statement in tables:
                self._db.execute(statement)
        except BlockingIOError as error:
            self._unlock()
            raise ResourceError(f"another server keeps its data in {folder}", "give another --data-folder") from error
        except (OSError, sqlite3.Error) as error:
            self._unlock()
            raise ResourceError(f"the server cannot keep its data in {folder}: {error}", "give another --data-folder") from error

    @property
    def db(self) -> sqlite3.Connection:
        """The connection. Raises `ResourceError` where the file is no longer in the folder: what is written then would be lost."""
        path = self.folder / DATABASE
        if _identity(path) != self._opened:
            raise ResourceError(f"the server's database {path} was removed or replaced", "start the server anew; what it kept is lost")
        return self._db

    @contextmanager
    def together(self) -> Iterator[None]:
        """All statements within, or none of them. Not to be held over an `await`."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a disk that is full has ended it
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Let another server have the folder."""
        self._db.close()
        self._unlock()
        if self._passing:
            self._passing.cleanup()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def owner(caller: tuple[str, ...]) -> str:
    """The words of a caller as one text, different for different callers."""
    return json.dumps(caller)
