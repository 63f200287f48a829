"""The lines of a batch: what is wrong with a file, and what is left of one that was cut off."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from herd.serve.batches.lines import MOST_ERRORS, Results, read_line, scan

CHAT = "/v1/chat/completions"


def line(custom_id: object = "a", **fields: object) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "echo"}, **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def scanned(path: Path, data: bytes, max_lines: int = 100_000, max_line_bytes: int = 1000) -> Any:
    path.write_bytes(data)
    return scan(path, CHAT, max_lines, max_line_bytes)


@pytest.mark.parametrize(
    "data",
    [
        line("a") + b"\n" + line("b") + b"\n",
        line("a") + b"\n" + line("b"),
        line("a") + b"\r\n" + line("b") + b"\r\n",
        b"\xef\xbb\xbf" + line("a") + b"\n" + line("b") + b"\n",
        b"\n\n" + line("a") + b"\n  \n\t\n" + line("b") + b"\n\r\n",
    ],
)
def test_lines_are_found_however_they_end(tmp_path: Path, data: bytes) -> None:
    found = scanned(tmp_path / "f", data)
    assert not found.errors and len(found.numbers) == 2
    assert [read_line(tmp_path / "f", offset).custom_id for offset in found.offsets] == ["a", "b"]
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [json.loads(lines[number - 1])["custom_id"] for number in found.numbers] == ["a", "b"]


@pytest.mark.parametrize(
    ("bad", "code", "message"),
    [
        (b"{", "invalid_json_line", "the line is not JSON"),
        (b"hello", "invalid_json_line", "the line is not JSON"),
        (b'{"custom_id": "\xff"}', "invalid_json_line", "the line is not JSON"),
        (b"\0\0", "invalid_json_line", "the line is not JSON"),
        (line("x").decode().encode("utf-16"), "invalid_json_line", "the line is not JSON"),
        (line("x") + line("y"), "invalid_json_line", "the line is not JSON"),
        (b"[" * 500, "invalid_json_line", "the line is not JSON"),
        (b"[1]", "invalid_request", "the line is [1]; it must be a JSON object"),
        (line(...), "invalid_request", "custom_id is missing"),
        (line(""), "invalid_request", "custom_id is"),
        (line(7), "invalid_request", "custom_id is 7"),
        (line("x" * 513), "invalid_request", "at most 512 characters"),
        (line("a"), "duplicate_custom_id", 'custom_id "a" stands in an earlier line'),
        (line("x", body=...), "invalid_request", "body is missing"),
        (line("x", body="{}"), "invalid_request", "body is"),
        (line("x", headers={"authorization": "Bearer stolen"}), "invalid_request", "headers is an unknown field"),
        (line("x", method="GET"), "invalid_method", 'method is "GET"; it must be POST'),
        (line("x", method="post"), "invalid_method", "it must be POST"),
        (line("x", method="POST /v1/files HTTP/1.1\r\n"), "invalid_method", "it must be POST"),
        (line("x", url="/v1/completions"), "invalid_url", "this batch is for /v1/chat/completions alone"),
        (line("x", url=f"http://169.254.169.254{CHAT}"), "invalid_url", "alone"),
        (line("x", url=f"//evil.example{CHAT}"), "invalid_url", "alone"),
        (line("x", url=f"{CHAT}/../../files"), "invalid_url", "alone"),
        (line("x", url=f"{CHAT}?key=1"), "invalid_url", "alone"),
        (line("x", url=f"{CHAT} HTTP/1.1\r\nhost: x\r\n\r\n"), "invalid_url", "alone"),
        (b'{"url": "/v1/chat/completions", ' + line("x", url="/v1/files")[1:], "invalid_url", 'url is "/v1/files"'),
        (b"x" * 1001, "line_too_long", "longer than 1,000 bytes"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, bad: bytes, code: str, message: str) -> None:
    found = scanned(tmp_path / "f", line("a") + b"\n\n" + bad + b"\n")
    error = found.errors[0]
    assert (error["code"], error["line"]) == (code, 3) and message in error["message"] and len(error["message"]) < 300


def test_files_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    for data in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        (error,) = scanned(tmp_path / "f", data).errors
        assert (error["code"], error["line"]) == ("empty_file", None)
    many = b"\n".join(line(str(i)) for i in range(100_001))
    (error,) = scanned(tmp_path / "f", many).errors
    assert (error["code"], error["line"]) == ("too_many_lines", 100_001) and "more than 100,000 requests" in error["message"]
    assert len(scanned(tmp_path / "f", b"{\n" * 5000).errors) == MOST_ERRORS
    assert [e["code"] for e in scanned(tmp_path / "f", b"x" * 10_000_000).errors] == ["line_too_long"]


def test_results_outlive_a_cut_at_every_byte(tmp_path: Path) -> None:
    """Whatever was written of the last line, the lines before it are there and the next one begins anew."""
    paths = tmp_path / "out", tmp_path / "err"
    results = Results("batch_1", *paths)
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    for number in (1, 2, 3):
        response = {"status_code": 200, "request_id": "r", "body": {"é": "\n", "usage": usage}}
        results.add([results.entry(number, f"id {number}", response, None)], are_errors=False)
    results.add([results.entry(7, "bad", None, {"code": "x"})], are_errors=True)
    whole = paths[0].read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole) + 1):
        paths[0].write_bytes(whole[:cut])
        again = Results("batch_1", *paths)
        again.read()
        done = {1, 2} if cut < len(whole) else {1, 2, 3}
        assert again.done == {*done, 7} and again.counts == [len(done), 1]
        assert again.usage == {"input": 3 * len(done), "cached": 2 * len(done), "output": 4 * len(done)}
        if cut < len(whole):
            again.add([again.entry(3, "id 3", None, None)], are_errors=False)
        assert [json.loads(text)["custom_id"] for text in paths[0].read_bytes().splitlines()] == ["id 1", "id 2", "id 3"]


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results("batch_1", tmp_path / "out", tmp_path / "err")
    results.add([results.entry(1, "a", None, None)], are_errors=False)
    before = (tmp_path / "out").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fdatasync", full)
        results.add([results.entry(2, "b", None, None)], are_errors=False)
    assert (tmp_path / "out").read_bytes() == before and results.done == {1}
