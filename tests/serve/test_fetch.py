"""Images by address: what is public is fetched, and nothing else can be had, however it is written, redirected or renamed."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import anthropic
import openai
import pytest

from herd.chat import Image
from herd.errors import PromptError
from herd.serve.config import ServeConfig
from herd.serve.fetch import Fetcher, addresses, is_public
from herd.serve.messages import MessagesBody
from herd.serve.schema import ChatBody
from tests.serve.conftest import client_of
from tests.serve.echo import Echo
from tests.serve.samples import PIXEL

PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1"),
    *("::ffff:0:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::", "2001::1"),
    *("2001:0:7f00:1::", "2001:db8::1", "3fff::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1", "fec0::1", "ff02::1", "100::1"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "223.255.255.255", "2606:4700:4700::1111", "2a00:1450:4001::1"]


def test_what_is_public():
    assert [text for text in PRIVATE if is_public(ip_address(text), 443)] == []
    assert [text for text in PUBLIC if not is_public(ip_address(text), 443)] == []
    assert not is_public(ip_address("8.8.8.8"), 22) and not is_public(ip_address("8.8.8.8"), 8080)


class Site(ThreadingHTTPServer):
    """A server whose every path is a function of its handler."""

    daemon_threads = True

    def __init__(self, **paths: Callable[[Any], None]) -> None:
        self.paths, self.asked = paths, list[str]()
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]

    def handle_error(self, *_: Any) -> None:
        pass  # whoever asks may leave


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.paths.get(self.path.strip("/").partition("?")[0], not_there)(self)

    def log_message(self, *_: Any) -> None:
        pass


def not_there(handler: Handler) -> None:
    handler.send_error(404)


def reply(content: bytes = PIXEL, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        for name, value in {"content_type": "image/png", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def redirect(where: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("location", where)
        handler.end_headers()

    return answer


def drip(handler: Handler) -> None:
    reply()(handler)
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def endless(handler: Handler) -> None:
    reply(b"")(handler)
    while True:
        handler.wfile.write(b"x" * 65536)


@pytest.fixture(scope="module")
def inside() -> Iterator[Site]:
    """What nobody outside may reach."""
    with running(Site(secret=reply())) as site:
        yield site


@pytest.fixture(scope="module")
def outside(inside: Site) -> Iterator[Site]:
    paths = {
        "image": reply(),
        "page": reply(b"<html>", content_type="text/html"),
        "packed": reply(b"x", content_encoding="gzip"),
        "huge": reply(b"", content_length="99999999"),
        "endless": endless,
        "drip": drip,
        "hop": redirect("/image"),
        "loop": redirect("/loop"),
        "in": redirect(f"http://127.0.0.1:{inside.port}/secret"),
        "file": redirect("file:///etc/passwd"),
        "user": redirect("http://user:word@public/image"),
        "split": redirect("http://public\\@127.0.0.1/"),
    }
    with running(Site(**paths)) as site:
        yield site


class running:
    def __init__(self, site: Site) -> None:
        self.site = site

    def __enter__(self) -> Site:
        threading.Thread(target=self.site.serve_forever, args=(0.01,), daemon=True).start()
        return self.site

    def __exit__(self, *_: object) -> None:
        self.site.shutdown()
        self.site.server_close()


def fetcher(outside: Site, **choices: Any) -> Fetcher:
    """For which the port of `outside` is what is public."""
    settings: dict[str, Any] = {"max_bytes": 100_000, "total_s": 0.7, "is_allowed": lambda _, port: port == outside.port, **choices}
    return Fetcher(**settings)


def get(found: Fetcher, url: str) -> Image:
    return asyncio.run(found.fetch(url, "messages.0"))


def test_an_image_is_fetched(outside: Site, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for path in ("image", "image?q=%20é", "hop"):
        assert get(fetcher(outside), f"http://localhost:{outside.port}/{path}") == Image(data=PIXEL)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("page", "has the type 'text/html'"),
        ("packed", "compressed it"),
        ("huge", "larger than 100,000 bytes"),
        ("endless", "larger than 100,000 bytes"),
        ("drip", "did not come within 0.7 s"),
        ("loop", "more than 3 redirects"),
        ("in", "not public"),
        ("file", "one of 'file'"),
        ("user", "a user or a password"),
        ("split", "backslashes"),
        ("nowhere", "answered 404"),
    ],
)
def test_what_a_server_may_not_do(outside: Site, inside: Site, path: str, message: str):
    begun = time.monotonic()
    with pytest.raises(PromptError, match=message) as caught:
        get(fetcher(outside), f"http://127.0.0.1:{outside.port}/{path}")
    assert caught.value.param == "messages.0" and time.monotonic() - begun < 5
    assert inside.asked == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f000001", "017700000001", "127.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
)
@pytest.mark.parametrize("port", ["", "inside"])
def test_ways_to_write_this_machine(inside: Site, host: str, port: str):
    url = f"http://{host}{f':{inside.port}' if port else ''}/secret"
    with pytest.raises(PromptError, match=r"not public|not known"):
        get(Fetcher(max_bytes=1000, total_s=5), url)
    assert inside.asked == []


NONE = [
    "http://",
    "http:///x",
    "http://a b/",
    "http://a\r\nb: c/",
    "http://[::1",
    "http://x:99999",
    "http://a@b/",
    "http://" + "x" * 9000,
]


@pytest.mark.parametrize("url", NONE, ids=range(len(NONE)))
def test_addresses_that_are_none(url: str):
    with pytest.raises(PromptError):
        get(Fetcher(max_bytes=1000, total_s=5), url)


def test_a_name_that_changes_its_meaning(outside: Site):
    """It is asked for once for each connection, and all that it means must be public."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]  # nobody listens at the first

    def is_allowed(address: Any, port: int) -> bool:
        return str(address) != "127.0.0.1"

    url = f"http://rebind.test:{outside.port}/image"
    before = len(outside.asked)
    with pytest.raises(PromptError, match="does not answer"):
        get(fetcher(outside, resolve=resolve, is_allowed=is_allowed), url)
    assert asked == ["rebind.test"]
    with pytest.raises(PromptError, match="not public"):
        get(fetcher(outside, resolve=both, is_allowed=is_allowed), url)
    assert len(outside.asked) == before
    # and the connection never asks for the name itself
    assert get(fetcher(outside, resolve=here), f"http://no-such-name.test:{outside.port}/image") == Image(data=PIXEL)


async def both(host: str, port: int) -> list[str]:
    return ["127.0.0.2", "127.0.0.1"]


async def here(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def test_all_apis(serve, outside: Site):
    echo = Echo()
    served = serve(echo, fetcher=fetcher(outside))
    url = f"http://localhost:{outside.port}/image"
    with client_of(served) as client:
        content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": content}])
        assert echo.requests[-1].messages[0].content == (Image(data=PIXEL), "what")
        content[0]["image_url"]["url"] = url.replace("image", "page")
        with pytest.raises(openai.BadRequestError, match="no image") as caught:
            client.chat.completions.create(model="echo", messages=[{"role": "user", "content": content}])
        assert caught.value.param == "messages.0.content.0.image_url.url"
        item: Any = {"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "what"}]}
        first = client.responses.create(model="echo", input=[item])
        asked = outside.asked.count("/image")
        client.responses.create(model="echo", input="and now?", previous_response_id=first.id)  # what is kept is the picture
        assert echo.requests[-1].messages[0].content == (Image(data=PIXEL), "what") and outside.asked.count("/image") == asked > 0
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        block: Any = {"type": "image", "source": {"type": "url", "url": url}}
        client.messages.create(model="echo", max_tokens=5, messages=[{"role": "user", "content": [block, {"type": "text", "text": "x"}]}])
        assert echo.requests[-1].messages[0].content == (Image(data=PIXEL), "x")


def test_it_is_off_by_default(serve, inside: Site):
    served = serve(Echo())
    url = f"http://127.0.0.1:{inside.port}/secret"
    reply = served.chat([{"type": "image_url", "image_url": {"url": url}}])
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "messages.0.content.0.image_url.url"
    assert "data: URI" in error["message"] and "--image-urls" in error["message"]
    reply = served.chat([{"type": "image_url", "image_url": {"url": "ftp://example.com/a.png"}}])  # which that would not read either
    assert reply.status_code == 400 and "--image-urls" not in reply.json()["error"]["message"]
    block: Any = {"type": "image", "source": {"type": "url", "url": url}}
    body = {"model": "echo", "max_tokens": 1, "messages": [{"role": "user", "content": [block]}]}
    assert served.http.post("/v1/messages", json=body).status_code == 400
    block["source"] = {"type": "url", "data": "x"}
    assert "source of type 'url' holds url" in served.http.post("/v1/messages", json=body).json()["error"]["message"]
    switched_on = serve(Echo(), ServeConfig(port=0, image_urls=True, drain_s=1))
    assert "not public" in switched_on.chat([{"type": "image_url", "image_url": {"url": url}}]).json()["error"]["message"]
    assert inside.asked == []


def test_a_client_who_leaves_ends_the_fetch(serve, outside: Site):
    served = serve(Echo(), fetcher=fetcher(outside, total_s=60.0))
    host, port = served.url.removeprefix("http://").split(":")
    body = f'{{"model":"echo","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"http://127.0.0.1:{outside.port}/drip"}}}}]}}]}}'
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        time.sleep(0.3)
    for _ in range(100):
        if 'status="gone"' in served.http.get("/metrics").text:
            return
        time.sleep(0.02)
    pytest.fail("it goes on")


def test_only_images_are_looked_for():
    url = "https://example.com/x.png"
    chat = ChatBody.model_validate(
        {
            "model": "echo",
            "messages": [{"role": "user", "content": [{"type": "text", "text": url}, {"type": "image_url", "image_url": {"url": url}}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"url": url, "image_url": url}}}],
        }
    )
    assert list(addresses(chat)) == [(url, "messages.0.content.1.image_url.url")]
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {"url": url}}
    body = {"model": "echo", "max_tokens": 1, "messages": [{"role": "assistant", "content": [call]}]}
    assert list(addresses(MessagesBody.model_validate(body))) == []
