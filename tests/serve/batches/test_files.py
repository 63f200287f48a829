"""/v1/files with OpenAI's client, and with what no client sends."""

import errno
import io
import os
import sqlite3
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai.types import file_create_params, file_list_params

from herd.serve.access.keys import KeyFile
from herd.serve.batches.files import FileForm, FilePage
from herd.serve.config import ServeConfig
from tests.serve.conftest import Live, client_of, live
from tests.serve.echo import Echo

LIMIT = 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def running(folder: Path) -> Iterator[Live]:
    with live(Echo(), ServeConfig(port=0, data_folder=folder, max_file_bytes=LIMIT, max_stored_bytes=1_000_000, drain_s=1)) as server:
        yield server


@pytest.fixture
def client(running: Live) -> Iterator[openai.OpenAI]:
    with client_of(running) as client:
        yield client


def post(
    running: Live, name: str = "a.jsonl", data: bytes = b"{}", headers: dict[str, str] | None = None, **fields: str
) -> httpx2.Response:
    return running.http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "batch", **fields}, headers=headers)


def test_every_openai_field_is_known() -> None:
    assert set(typing.get_type_hints(file_list_params.FileListParams)) == set(FilePage.honoured())
    names = {name.partition("[")[0] for name in (*FileForm.honoured(), *FileForm.neutral)}
    assert {*names, "file"} == set(typing.get_type_hints(file_create_params.FileCreateParams))


def test_what_was_uploaded_comes_back(client: openai.OpenAI, folder: Path) -> None:
    data = os.urandom(LIMIT - 100)
    file = client.files.create(file=("ü b.jsonl", io.BytesIO(data)), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose, file.status) == ("file", len(data), "ü b.jsonl", "batch", "processed")
    assert client.files.retrieve(file.id) == file
    reply = client.files.with_raw_response.content(file.id)
    assert client.files.content(file.id).content == data
    assert reply.headers["content-disposition"] == "attachment" and reply.headers["x-content-type-options"] == "nosniff"
    assert [path.name for path in (folder / "files").iterdir()] == [file.id]
    assert client.files.delete(file.id).deleted
    assert not list((folder / "files").iterdir())
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            call(file.id)


def test_lists_go_page_by_page(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}.jsonl", b"x"), purpose="batch").id for i in range(5)]
    assert [file.id for file in client.files.list()] == ids[::-1]
    page = client.files.list(limit=2, order="asc", purpose="batch")
    assert [file.id for file in page.data] == ids[:2] and page.has_more
    assert [file.id for file in page] == ids  # the client goes on by itself
    assert not client.files.list(purpose="vision").data
    for bad, param in (
        ({"limit": 0}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "file-x"}, "after"),
        ({"extra_query": {"a": 1}}, "a"),
    ):
        with pytest.raises(openai.BadRequestError, match=param):
            client.files.list(**bad)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", "..\\x", "%2e%2e%2fx", "日本.jsonl", "a'; DROP TABLE files;--", "server.sqlite", "x" * 255],
)
def test_names_are_words_and_no_paths(running: Live, client: openai.OpenAI, folder: Path, name: str) -> None:
    before = set(folder.parent.rglob("*"))
    file = client.files.create(file=(name, b"data"), purpose="batch")
    assert file.filename == name and client.files.content(file.id).content == b"data"
    assert set(folder.parent.rglob("*")) - before == {folder / "files" / file.id}


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "a\nb", "\x1b[31m"])
def test_names_that_nobody_can_read_are_refused(running: Live, name: str) -> None:
    quoted = name.encode()
    body = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    body += b'--b\r\ncontent-disposition: form-data; name="file"; filename="' + quoted + b'"\r\n\r\nx\r\n--b--\r\n'
    reply = running.http.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert reply.status_code == 400 and "rror" in reply.text
    assert running.http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("path", ["..%2fserver.sqlite", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "file-..", "x" * 5000, "%00"])
def test_ids_are_no_paths(running: Live, path: str) -> None:
    for tail in ("", "/content"):
        assert running.http.get(f"/v1/files/{path}{tail}").status_code == 404


def test_limits(running: Live, folder: Path) -> None:
    """Of one file, as it comes, whatever was announced; and of all files."""
    assert post(running, data=b"x" * LIMIT).status_code == 200
    for data in (b"x" * (LIMIT + 100_000), b"x" * 20_000_000):
        reply = post(running, data=data)
        assert reply.status_code == 413 and "larger than 300,000 bytes" in reply.json()["error"]["message"]
    assert post(running, data=b"x" * LIMIT).status_code == post(running, data=b"x" * LIMIT).status_code == 200
    reply = post(running, data=b"x" * LIMIT)
    assert reply.status_code == 413 and "keeps 900,000 bytes" in reply.json()["error"]["message"]
    for _ in range(24):  # even empty files count
        assert post(running, data=b"").status_code == 200
    assert post(running, data=b"").status_code == 413
    assert len(list((folder / "files").iterdir())) == 27


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"purpose": "fine-tune"}, "purpose is"),
        ({"purpose": "x" * 2000}, "cannot be read"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}, "expires_after[anchor] is"),
        ({"porpose": "batch"}, "did you mean 'purpose'?"),
    ],
)
def test_fields_that_are_not_taken(running: Live, fields: dict[str, str], message: str) -> None:
    reply = post(running, **fields)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]


def test_forms_that_are_none(running: Live) -> None:
    for kind, body, status in [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"junk", 400),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nno file\r\n--b--\r\n', 400),
    ]:
        reply = running.http.post("/v1/files", content=body, headers={"content-type": kind})
        assert reply.status_code == status and reply.json()["error"]["message"]
    two = [("file", ("a", b"1")), ("file", ("b", b"2"))]
    assert "Too many files" in running.http.post("/v1/files", files=two, data={"purpose": "batch"}).json()["error"]["message"]
    assert running.http.get("/v1/files").json()["data"] == []


def test_pages_of_other_sites_send_nothing(running: Live) -> None:
    """A form is what a browser sends without asking the server first."""
    for origin in ("http://evil.example", "null", "http://localhost.evil.example:8000", running.url + ".evil.example"):
        assert post(running, headers={"origin": origin}).status_code == 403
        reply = running.http.post("/v1/batches/batch_x/cancel", headers={"origin": origin})
        assert reply.status_code == 403 and "may not send this" in reply.json()["error"]["message"]
    assert running.http.get("/v1/files").json()["data"] == []
    assert post(running, headers={"origin": running.url}).status_code == 200


def test_files_belong_to_their_caller(serve: Callable[..., Live], tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    running = serve(Echo(), ServeConfig(port=0, keys_file=keys.path, data_folder=tmp_path / "data", drain_s=1))
    keys.make("nobody")
    ann, bob = (client_of(running, keys.make(name)) for name in ("ann", "bob"))
    with ann, bob:
        file = ann.files.create(file=("a.jsonl", b"x"), purpose="batch")
        assert [one.id for one in ann.files.list()] == [file.id] and not bob.files.list().data
        for call in (bob.files.retrieve, bob.files.delete, bob.files.content):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        with pytest.raises(openai.BadRequestError):
            bob.files.list(after=file.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


def test_what_a_crash_left_is_swept_away(folder: Path) -> None:
    config = ServeConfig(port=0, data_folder=folder, drain_s=1)
    with live(Echo(), config) as running, client_of(running) as client:
        kept = client.files.create(file=("a.jsonl", b"x"), purpose="batch")
        (folder / "files" / "file-half").write_bytes(b"half of an upload")
    with live(Echo(), config) as running, client_of(running) as client:
        assert [path.name for path in (folder / "files").iterdir()] == [kept.id]
        assert client.files.content(kept.id).content == b"x"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), sqlite3.OperationalError("disk I/O error")])
def test_a_disk_that_is_full_is_told(running: Live, monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception) -> None:
    def full(*_: object) -> None:
        raise error

    before = set((folder / "files").iterdir())
    monkeypatch.setattr("herd.serve.batches.files._keep" if isinstance(error, OSError) else "herd.serve.batches.files.Files.add", full)
    reply = post(running)
    assert reply.status_code == 503 and "disk is full or fails" in reply.json()["error"]["message"]
    monkeypatch.undo()
    assert set((folder / "files").iterdir()) == before
    assert post(running).status_code == 200
