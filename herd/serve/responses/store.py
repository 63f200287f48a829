"""Responses that are kept, so that they can be read again and continued.

A response has its own items, the new ones of its request and those of its reply, and the id of the one before it; a conversation is the
chain of them, and nothing of it is kept twice. A response that is deleted is gone with its items: those after it can still be read, and
can no longer be continued. What goes by itself goes by its last use, and continuing a response uses all before it, so that a chain only
ever loses its end, never its middle.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from herd.errors import ResourceError, UsageError
from herd.serve.errors import RequestError, is_locked
from herd.serve.store import Store

TABLES = (
    """CREATE TABLE IF NOT EXISTS responses (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        previous TEXT, -- the response that it continues, which may be gone
        used REAL NOT NULL, -- seconds since 1970, when it was made or continued
        bytes INTEGER NOT NULL,
        told TEXT NOT NULL -- the response without its output
    )""",
    "CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used)",
    """CREATE TABLE IF NOT EXISTS response_items (
        response TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
        place INTEGER NOT NULL,
        is_output INTEGER NOT NULL,
        id TEXT NOT NULL,
        told TEXT NOT NULL,
        PRIMARY KEY (response, place)
    )""",
    "CREATE INDEX IF NOT EXISTS response_items_by_id ON response_items (id)",
)
CHAIN = """WITH RECURSIVE chain (id, owner, previous, bytes, depth) AS (
    SELECT id, owner, previous, bytes, 0 FROM responses WHERE id = ? AND owner = ?
    UNION ALL
    SELECT r.id, r.owner, r.previous, r.bytes, depth + 1 FROM chain JOIN responses AS r ON r.id = chain.previous AND r.owner = chain.owner
) """
DAY_S = 24 * 3600.0


class Responses:
    """The responses of a store."""

    def __init__(self, store: Store, max_bytes: int, days: float, clock: Callable[[], float] = time.time) -> None:
        """max_bytes: of all together; 0 keeps none.  days: after its last use a response goes."""
        self._store = store
        self._db.execute("PRAGMA secure_delete = ON")  # what goes is overwritten
        self._max_bytes, self._kept_s, self._clock = max_bytes, days * DAY_S, clock

    @property
    def _db(self) -> sqlite3.Connection:
        return self._store.db

    @property
    def keeps_any(self) -> bool:
        return self._max_bytes > 0

    def past(self, owner: str, id: str) -> list[dict[str, Any]]:
        """The items of a response's conversation, to its end. Raises `UsageError` where it cannot be continued."""
        chain = self._chain(owner, id)
        if not chain:
            raise _not_found(f"there is no response {id!r} to continue", "previous_response_id", 400, "previous_response_not_found")
        if chain[0]["previous"] is not None:
            text = f"{id!r} cannot be continued: {chain[0]['previous']!r}, which came before it, was deleted"
            hint = "send the whole conversation as input"
            raise _not_found(text, "previous_response_id", 400, "previous_response_not_found", hint)
        return self._items(owner, id)

    def inputs(self, owner: str, id: str) -> list[dict[str, Any]]:
        """The items that a response was made from, as far back as they are kept. Raises `RequestError`."""
        self._one(owner, id)
        return self._items(owner, id, without="depth = 0 AND is_output")

    def find(self, owner: str, id: str) -> dict[str, Any]:
        """A response. Raises `RequestError`."""
        told: dict[str, Any] = json.loads(self._one(owner, id)["told"])
        rows = self._db.execute("SELECT told FROM response_items WHERE response = ? AND is_output ORDER BY place", (id,))
        return {**told, "output": [json.loads(row["told"]) for row in rows]}

    def item(self, owner: str, id: str, param: str) -> dict[str, Any]:
        """An item of any response, as it was made if herd made it. Raises `RequestError`, which names `param`."""
        self._forget_old()
        row = self._db.execute(
            "SELECT i.told FROM response_items AS i JOIN responses AS r ON r.id = i.response WHERE i.id = ? AND r.owner = ?"
            " ORDER BY is_output DESC, i.rowid DESC LIMIT 1",
            (id, owner),
        ).fetchone()
        if row is None:
            raise _not_found(f"there is no item {id!r}", param)
        found: dict[str, Any] = json.loads(row["told"])
        return found

    def delete(self, owner: str, id: str) -> None:
        """Raises `RequestError` where there is none."""
        self._one(owner, id)
        self._db.execute("DELETE FROM responses WHERE id = ?", (id,))

    def check_room(self, owner: str, inputs: Sequence[dict[str, Any]], previous: str | None) -> None:
        """Whether a conversation can be kept with these items more. Raises `UsageError`."""
        chain = self._chain(owner, previous) if previous else []
        needed = sum(row["bytes"] for row in chain) + sum(len(text.encode()) for text in map(_written, inputs))
        if needed > self._max_bytes:
            text = f"the conversation takes {needed:,} bytes; this server keeps {self._max_bytes:,} of all conversations"
            raise UsageError(text, "send store: false, or begin a new one", param="store")

    def save(self, owner: str, response: dict[str, Any], inputs: Sequence[dict[str, Any]]) -> None:
        """Keep a response, and let others go for it, those first that were not used for longest. Raises `ResourceError`."""
        id, previous = response["id"], response["previous_response_id"]
        told = _written({name: value for name, value in response.items() if name != "output"})
        items = [(False, item) for item in inputs] + [(True, item) for item in response["output"]]
        rows = [(id, place, is_output, item["id"], _written(item)) for place, (is_output, item) in enumerate(items)]
        num_bytes = len(told.encode()) + sum(len(row[-1].encode()) for row in rows)
        now = self._clock()
        try:
            with self._store.together():
                self._db.execute(CHAIN + "UPDATE responses SET used = ? WHERE id IN (SELECT id FROM chain)", (previous, owner, now))
                self._forget_old()
                self._db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", (id, owner, previous, now, num_bytes, told))
                self._db.executemany("INSERT INTO response_items VALUES (?, ?, ?, ?, ?)", rows)
                self._make_room(now)
        except sqlite3.Error as error:
            if is_locked(error):
                raise
            raise ResourceError(
                f"the response cannot be stored: {error}", "send store: false, or make room on the server's disk"
            ) from error

    def _make_room(self, now: float) -> None:
        """Within `max_bytes`, but for the conversation in use. Of equal use the newest goes first: what it continues was there before."""
        excess = self._db.execute("SELECT total(bytes) AS bytes FROM responses").fetchone()["bytes"] - self._max_bytes
        gone: list[tuple[str]] = []
        for row in self._db.execute("SELECT id, bytes FROM responses WHERE used < ? ORDER BY used, rowid DESC", (now,)):
            if excess <= 0:
                break
            excess -= row["bytes"]
            gone.append((row["id"],))
        self._db.executemany("DELETE FROM responses WHERE id = ?", gone)

    def _forget_old(self) -> None:
        self._db.execute("DELETE FROM responses WHERE used < ?", (self._clock() - self._kept_s,))

    def _one(self, owner: str, id: str) -> sqlite3.Row:
        self._forget_old()
        row: sqlite3.Row | None = self._db.execute("SELECT told FROM responses WHERE id = ? AND owner = ?", (id, owner)).fetchone()
        if row is None:
            raise _not_found(f"there is no response {id!r}", "response_id")
        return row

    def _chain(self, owner: str, id: str) -> list[sqlite3.Row]:
        """A response and those before it, the first one first."""
        self._forget_old()
        return self._db.execute(CHAIN + "SELECT previous, bytes FROM chain ORDER BY depth DESC", (id, owner)).fetchall()

    def _items(self, owner: str, id: str, without: str = "FALSE") -> list[dict[str, Any]]:
        rows: Iterable[sqlite3.Row] = self._db.execute(
            CHAIN + f"SELECT told FROM chain JOIN response_items ON response = chain.id WHERE NOT ({without}) ORDER BY depth DESC, place",
            (id, owner),
        )
        return [json.loads(row["told"]) for row in rows]


def _written(told: dict[str, Any]) -> str:
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


GONE = "it was never stored, was deleted, has expired, or belongs to another API key"


def _not_found(text: str, param: str, status: int = 404, code: str | None = None, hint: str = GONE) -> RequestError:
    """The same words for what never was, what is gone, and what is somebody else's."""
    error = RequestError(status, text, hint)
    error.param, error.code = param, code
    return error
