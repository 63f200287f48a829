"""The files of the chat page: what comes with them, and that nothing else can be had."""

import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from herd.serve.page import TYPES, WEB
from tests.serve.conftest import Live

NODE = shutil.which("node")
FILES = sorted(path.name for path in WEB.iterdir())


@pytest.mark.parametrize("name", ["", *(f"web/{name}" for name in FILES)])
def test_files_are_served_as_they_are(served: Live, name: str):
    path = WEB / Path(name or "index.html").name
    reply = served.http.get(f"/{name}")
    assert reply.status_code == 200 and reply.content == path.read_bytes()
    assert reply.headers["content-type"] == f"{TYPES[path.suffix]}; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-request-id"]
    head = served.http.head(f"/{name}")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", reply.headers["etag"])


def test_policy_allows_no_script_but_the_page_s_own(served: Live):
    policy = served.http.get("/").headers["content-security-policy"]
    rules = {words[0]: words[1:] for words in (rule.split() for rule in policy.split(";"))}
    assert rules["default-src"] == ["'self'"]
    assert not {"script-src", "script-src-elem", "script-src-attr", "connect-src"} & set(rules)  # so default-src rules them
    assert rules["require-trusted-types-for"] == ["'script'"]
    assert rules["frame-ancestors"] == rules["object-src"] == rules["base-uri"] == ["'none'"]
    assert "unsafe" not in policy and "*" not in policy


def test_unchanged_file_is_not_sent_again(served: Live):
    tag = served.http.get("/web/app.js").headers["etag"]
    for asked in (tag, f"W/{tag}", f'"other", {tag}'):
        reply = served.http.get("/web/app.js", headers={"if-none-match": asked})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in reply.headers
    assert served.http.get("/web/app.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert served.http.get("/web/style.css").headers["etag"] != tag


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/none.js",
        "/web/../page.py",
        "/web/..%2fpage.py",
        "/web/%2e%2e/page.py",
        "/web/..%5cpage.py",
        "/web//etc/passwd",
        "/app.js",
    ],
)
def test_nothing_else_can_be_had(served: Live, path: str):
    reply = served.http.get(path)
    assert reply.status_code == 404 and reply.json()["error"]["type"] == "invalid_request_error"


def test_page_is_read_only(served: Live):
    assert served.http.post("/", json={}).status_code == 405
    assert served.http.put("/web/app.js", content=b"x").status_code == 405


class Addresses(HTMLParser):
    """What a page loads, and scripts written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.loaded.append(value)
            if name.startswith("on") or name == "style" or (tag == "script" and "src" not in dict(attributes)):
                self.inline.append(f"{tag} {name}")


def test_page_loads_its_own_files_only():
    page = Addresses()
    page.feed((WEB / "index.html").read_text())
    assert page.inline == []
    assert page.loaded and set(page.loaded) <= {f"web/{name}" for name in FILES}
    for path in WEB.glob("*.js"):
        code = path.read_text()
        assert set(re.findall(r'(?:from |import\()"\./([^"]+)"', code)) <= set(FILES)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), path.name
        assert len(code.splitlines()) < 450
    assert not re.search(r"@import|url\(", (WEB / "style.css").read_text())


def test_temml_is_as_it_was_published():
    code, last = (WEB / "temml.js").read_bytes().rsplit(b"\n", 2)[:2]
    assert hashlib.sha256(code).hexdigest() in (Path(__file__).parents[2] / "NOTICE").read_text() and last == b"export default temml;"


@pytest.mark.skipif(NODE is None, reason="no node here")
@pytest.mark.parametrize("name", ["api", "markdown", "store"])
def test_modules_in_node(name: str):
    done = subprocess.run(
        [str(NODE), "--test", f"tests/serve/web/{name}.test.mjs"], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
