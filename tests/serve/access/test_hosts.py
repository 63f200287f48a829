"""A page that calls the server by a name of its own is not the server's page."""

import pytest

from herd.serve.access.hosts import Hosts
from herd.serve.config import ServeConfig
from herd.serve.errors import RequestError
from tests.serve.echo import Echo

OWN = [
    "127.0.0.1:8000",
    "127.0.0.1",
    "localhost:8000",
    "LOCALHOST",
    "[::1]:8000",
    "10.0.0.7:8000",
    "herd",
    "box:8000",
    "a.localhost",
    "box.local",
    "",
    None,
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "EVIL.EXAMPLE.",
    "127.0.0.1.evil.example",
    "localhost.evil.example:80",
    "evil.example]:1",
    "1.2.3.4.5",
]


@pytest.mark.parametrize("host", OWN)
def test_names_of_its_own(host: str | None):
    Hosts("127.0.0.1", (), is_open=True).check(host)


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_names_of_others(host: str, address: str):
    with pytest.raises(RequestError, match="none of this server's names") as caught:
        Hosts(address, ("good.example",), is_open=True).check(host)
    assert caught.value.http_status == 403
    for hosts in (
        Hosts(address, (), is_open=False),  # who has a key may come in
        Hosts(address, ("*",), is_open=True),
        Hosts("0.0.0.0", (), is_open=True),  # others call it by names that it cannot know
    ):
        hosts.check(host)


def test_a_name_that_is_given():
    hosts = Hosts("127.0.0.1", ("Good.example",), is_open=True)
    hosts.check("good.example:443")
    with pytest.raises(RequestError):
        hosts.check("not.good.example")


def test_over_http(serve):
    served = serve(Echo())
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    evil = {"host": "evil.example", "origin": "http://evil.example"}
    for reply in (
        served.http.post("/v1/chat/completions", json=body, headers=evil),
        served.http.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}, headers=evil),
        served.http.get("/v1/files", headers=evil),
        served.http.get("/metrics", headers=evil),
    ):
        assert reply.status_code == 403 and "--allow-host evil.example" in reply.json()["error"]["message"]
    assert served.http.get("/health", headers=evil).status_code == 200
    assert served.chat().status_code == 200
    named = serve(Echo(), ServeConfig(port=0, allow_host=("evil.example",), drain_s=1))
    assert named.http.post("/v1/chat/completions", json=body, headers=evil).status_code == 200
