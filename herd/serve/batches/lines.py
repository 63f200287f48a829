"""The lines of a batch: what is asked, one JSON object a line, and what came of it.

A line names the batch's own endpoint and nothing else, so that no request rides in on another. What came of lines is written at the end of
a file and given to the disk, a line at a time; after a crash these files alone say which lines are done, and a last line without its end
was never written. So each is answered once, whenever the server dies.

Source: OpenAI's guide to batches; a byte order mark and Windows' line ends are taken too.
"""

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from herd.serve.wire import Wire, shown_value, usage_error

MOST_ERRORS = 100  # that are told of one file
BOM = b"\xef\xbb\xbf"


class Line(Wire):
    """One request of a batch."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Scan:
    """What a file of requests holds."""

    numbers: "array[int]" = field(default_factory=lambda: array("q"))  # of the lines that are no blank ones, from 1
    offsets: "array[int]" = field(default_factory=lambda: array("q"))  # in bytes
    errors: list[dict[str, Any]] = field(default_factory=list)  # as OpenAI tells them: code, line, message, param


def scan(path: Path, endpoint: str, max_lines: int, max_line_bytes: int) -> Scan:
    """Find the lines of a file, and what is wrong with them."""
    found, ids = Scan(), set[str]()
    with path.open("rb") as file:
        number, offset = 0, 0
        while text := file.readline(max_line_bytes + 1):
            number += 1
            if len(text) > max_line_bytes and not text.endswith(b"\n"):
                found.errors.append(_error("line_too_long", number, f"the line is longer than {max_line_bytes:,} bytes, the limit"))
                break
            if number == 1 and text.startswith(BOM):
                offset, text = len(BOM), text[len(BOM) :]
            if text.strip():
                if len(found.numbers) == max_lines:
                    found.errors.append(_error("too_many_lines", number, f"the file has more than {max_lines:,} requests, the limit"))
                    break
                found.numbers.append(number)
                found.offsets.append(offset)
                error = _wrong(text, number, endpoint, ids)
                found.errors += [error] if error else []
                if len(found.errors) >= MOST_ERRORS:
                    break
            offset += len(text)
    if not found.numbers and not found.errors:
        found.errors.append(_error("empty_file", None, "the file has no requests. Hint: give one JSON object a line"))
    return found


def _wrong(text: bytes, number: int, endpoint: str, ids: set[str]) -> dict[str, Any] | None:
    """What is wrong with a line; takes note of its custom_id."""
    try:
        line = Line.model_validate_json(text)
    except ValidationError as error:
        found = usage_error(error)
        message = found.message.replace("the body", "the line", 1)
        is_json = error.errors(include_url=False)[0]["type"] != "json_invalid"
        return _error("invalid_request" if is_json else "invalid_json_line", number, message, found.param)
    if line.method != "POST":
        return _error("invalid_method", number, f"method is {shown_value(line.method)}; it must be POST", "method")
    if line.url != endpoint:
        return _error("invalid_url", number, f"url is {shown_value(line.url)}; this batch is for {endpoint} alone", "url")
    if line.custom_id in ids:
        return _error("duplicate_custom_id", number, f"custom_id {shown_value(line.custom_id)} stands in an earlier line", "custom_id")
    ids.add(line.custom_id)
    return None


def _error(code: str, line: int | None, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}


def read_line(path: Path, offset: int) -> Line:
    """A line that `scan` has found."""
    with path.open("rb") as file:
        file.seek(offset)
        return Line.model_validate_json(file.readline())


class Results:
    """What came of the lines of one batch, in two files: replies, and errors."""

    def __init__(self, batch_id: str, replies: Path, errors: Path) -> None:
        self._batch_id, self._paths = batch_id, (replies, errors)
        self._sizes = [0, 0]  # bytes of each that are whole lines
        self.counts = [0, 0]  # lines of each
        self.usage = {"input": 0, "cached": 0, "output": 0}  # tokens
        self.done: set[int] = set()  # numbers of lines

    def read(self) -> None:
        """Take up what the files hold, without a last line that was cut off."""
        self._sizes, self.counts, self.done = [0, 0], [0, 0], set()
        self.usage = dict.fromkeys(self.usage, 0)
        for which, path in enumerate(self._paths):
            for text in _whole_lines(path):
                self._sizes[which] += len(text)
                self._count(which, json.loads(text))
            if path.exists():
                os.truncate(path, self._sizes[which])

    def add(self, entries: list[dict[str, Any]], *, are_errors: bool) -> None:
        """Write what came of lines, made by `entry`; when this returns, the disk has it. All or nothing. Raises `OSError`."""
        path, text = self._paths[are_errors], b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries)
        with path.open("ab", buffering=0) as file:
            try:
                written = file.write(text)
                if written != len(text):
                    raise OSError(f"{written} of {len(text)} bytes were taken")
                os.fdatasync(file.fileno())
            except OSError:
                file.truncate(self._sizes[are_errors])
                raise
        self._sizes[are_errors] += len(text)
        for one in entries:
            self._count(are_errors, one)

    def entry(self, number: int, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
        """What came of a line, as OpenAI tells it; its id has the line's number in it."""
        return {"id": f"batch_req_{self._batch_id[6:]}_{number}", "custom_id": custom_id, "response": response, "error": error}

    def _count(self, which: int, entry: dict[str, Any]) -> None:
        self.counts[which] += 1
        self.done.add(int(entry["id"].rpartition("_")[2]))
        usage = ((entry["response"] or {}).get("body") or {}).get("usage") or {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.usage["input"] += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.usage["output"] += usage.get("completion_tokens", usage.get("output_tokens", 0))
        self.usage["cached"] += details.get("cached_tokens", 0)


def _whole_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
