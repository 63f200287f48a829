"""The folder of a server: what is written stays, and no two servers share it."""

import sqlite3
import time
from pathlib import Path

import pytest

from herd.errors import ResourceError
from herd.serve.config import ServeConfig
from herd.serve.store import Store, owner
from tests.serve.echo import Echo

TABLES = ["CREATE TABLE IF NOT EXISTS notes (owner TEXT, text TEXT)"]


def test_what_is_written_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b", TABLES)
    store.db.execute("INSERT INTO notes VALUES (?, ?)", (owner(("key", "1")), "hello"))
    store.close()
    again = Store(tmp_path / "a" / "b", TABLES)
    assert [tuple(row) for row in again.db.execute("SELECT * FROM notes")] == [('["key", "1"]', "hello")]
    again.close()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store = Store(tmp_path, TABLES)
    with pytest.raises(ResourceError, match="another server"):
        Store(tmp_path, TABLES)
    store.close()
    Store(tmp_path, TABLES).close()


def test_statements_together_are_all_or_none(tmp_path: Path) -> None:
    store = Store(tmp_path, TABLES)
    with store.together():
        store.db.execute("INSERT INTO notes VALUES ('a', 'kept')")
    with pytest.raises(ZeroDivisionError), store.together():
        store.db.execute("INSERT INTO notes VALUES ('a', 'not kept')")
        store.db.execute("DELETE FROM notes WHERE text = 'kept'")
        1 / 0  # noqa: B018
    assert [row["text"] for row in store.db.execute("SELECT text FROM notes")] == ["kept"]
    store.close()


def test_a_store_without_a_folder_goes_with_its_server() -> None:
    store = Store(None, TABLES)
    assert (store.folder / "server.sqlite").exists()
    store.close()
    assert not store.folder.exists()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot keep its data"):
        Store(tmp_path / "file", TABLES)
    (tmp_path / "server.sqlite").write_text("no database, but long enough to look like one" * 100)
    with pytest.raises(ResourceError, match="not a database"):
        Store(tmp_path, TABLES)
    (tmp_path / "server.sqlite").unlink()
    Store(tmp_path, TABLES).close()


def test_owners_differ_where_their_words_do() -> None:
    assert len({owner(()), owner(("a",)), owner(("a", "b")), owner(("ab",)), owner(('a", "b',))}) == 5


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    store = Store(tmp_path, TABLES)
    store.db.execute("INSERT INTO notes VALUES ('a', 'x')")
    files = list(tmp_path.iterdir())
    assert len(files) == 4 and all(file.stat().st_mode & 0o077 == 0 for file in files)
    store.close()


@pytest.mark.parametrize("gone", ["removed", "replaced"])
def test_a_database_that_is_not_there_any_more_is_told(tmp_path: Path, gone: str) -> None:
    """What would be written then, nobody could read again."""
    store = Store(tmp_path, TABLES)
    store.db.execute("INSERT INTO notes VALUES ('a', 'x')")
    (tmp_path / "server.sqlite").rename(tmp_path / "elsewhere")
    if gone == "replaced":
        (tmp_path / "server.sqlite").write_bytes((tmp_path / "elsewhere").read_bytes())
    for _ in range(2):
        with pytest.raises(ResourceError, match="removed or replaced"):
            store.db.execute("INSERT INTO notes VALUES ('a', 'y')")
    with pytest.raises(ResourceError, match="removed or replaced"), store.together():
        pass
    (tmp_path / "elsewhere").replace(tmp_path / "server.sqlite")
    store.db.execute("INSERT INTO notes VALUES ('a', 'z')")
    store.close()


def test_another_program_that_locks_it_is_told_soon(serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    served = serve(Echo(), ServeConfig(port=0, data_folder=tmp_path, drain_s=1))
    body = {"model": "echo", "input": "hi"}
    stored = served.http.post("/v1/responses", json=body).json()["id"]
    other = sqlite3.connect(tmp_path / "server.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    upload = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
    for how, where, sent in (
        ("POST", "/v1/responses", {"json": body}),
        ("POST", "/v1/files", upload),
        ("DELETE", f"/v1/responses/{stored}", {}),
    ):
        start = time.monotonic()
        reply = served.http.request(how, where, **sent)
        assert time.monotonic() - start < 2  # nobody is served meanwhile
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1", reply.text
        assert reply.json()["error"]["code"] == "server_busy" and "another program" in reply.json()["error"]["message"]
    assert served.chat().status_code == 200
    other.execute("ROLLBACK")
    other.close()
    assert served.http.post("/v1/responses", json=body).status_code == 200


def test_a_full_disk_is_told_and_not_the_end_of_what_it_ended(tmp_path: Path) -> None:
    store = Store(tmp_path, TABLES)
    store.db.execute("PRAGMA max_page_count = 3")
    with pytest.raises(sqlite3.OperationalError, match="full"), store.together():
        store.db.execute("INSERT INTO notes VALUES ('a', ?)", ("x" * 100_000,))
    store.db.execute("INSERT INTO notes VALUES ('a', 'x')")
    store.close()
