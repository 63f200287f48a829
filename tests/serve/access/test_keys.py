"""API keys: their file, who is let in, and that callers share nothing."""

import os
import stat
from pathlib import Path

import openai
import pytest
from fastapi.routing import APIRoute

from herd.cli.main import main
from herd.engine.local import Local, Model
from herd.errors import HerdError, UsageError
from herd.serve.access.keys import Guard, KeyFile
from herd.serve.app import OPEN
from herd.serve.config import ServeConfig
from tests.serve.conftest import bearer
from tests.serve.echo import Echo

SECRET = "a secret of mine"


def test_a_file_of_keys(tmp_path: Path):
    file = KeyFile(tmp_path / "folder" / "keys.json")
    old = os.umask(0)
    try:
        secret = file.make("ann")
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert secret.startswith("hk-") and len(secret) == 46 and secret not in file.path.read_text()
    other = KeyFile(file.path)
    assert [key.name for key in other.read()] == ["ann"]
    second = file.make("bob")
    assert second != secret and [key.name for key in other.read()] == ["ann", "bob"]  # read again
    file.revoke("ann")
    assert [key.name for key in other.read()] == ["bob"] and list(file.path.parent.iterdir()) == [file.path]
    for name in ("", "a b", "../x", "x" * 65):
        with pytest.raises(UsageError, match="cannot be called"):
            file.make(name)
    with pytest.raises(UsageError, match="there is a key called 'bob'"):
        file.make("bob")
    with pytest.raises(UsageError, match="no key is called 'bobb'") as caught:
        file.revoke("bobb")
    assert "did you mean 'bob'?" in caught.value.hint


def test_a_broken_file_lets_nobody_in(tmp_path: Path):
    path = tmp_path / "keys.json"
    for text in ("", "{}", '{"keys": [{}]}', "[]"):
        path.write_text(text)
        with pytest.raises(HerdError, match="cannot be read"):
            Guard(file=KeyFile(path)).admit("Bearer x")
    with pytest.raises(UsageError, match="fewer than 8"):
        Guard("short")


def test_who_is_let_in(serve, tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    ann, bob = file.make("ann"), file.make("bob")
    echo = Echo()
    served = serve(echo, ServeConfig(port=0, api_key=SECRET, keys_file=file.path, drain_s=1))
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    salts = []
    for headers in (bearer(ann), bearer(bob), bearer(SECRET), {"x-api-key": ann}, {"authorization": f"bearer  {bob}"}):
        assert served.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        salts.append(echo.requests[-1].cache_salt)
    assert len(set(salts)) == 3 and salts[3] == salts[0] and salts[4] == salts[1]
    assert not any(secret in word for salt in salts for word in salt for secret in (ann, bob, SECRET))
    for headers in (
        {},
        bearer("hk-wrong"),
        {"authorization": "Bearer"},
        bearer(ann[:-1]),
        bearer(file.read()[0].sha256),
        {"authorization": ann},
    ):
        reply = served.http.post("/v1/chat/completions", content=b"not even JSON", headers=headers)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        error = reply.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    file.revoke("ann")
    assert served.http.get("/v1/models", headers=bearer(ann)).status_code == 401
    file.revoke("bob")
    assert served.http.get("/v1/models").status_code == 401
    file.path.unlink()
    assert served.http.get("/v1/models", headers=bearer(bob)).status_code == 401
    assert served.http.get("/v1/models", headers=bearer(SECRET)).status_code == 200


def test_every_route_asks_but_the_open_ones(serve, tiny: Model):
    config = ServeConfig(port=0, api_key=SECRET, drain_s=1)
    served = serve(Local([tiny]), config)
    routes = [route for route in served.server.config.app.routes if isinstance(route, APIRoute)]
    assert {route.path for route in routes} > OPEN and len(routes) > 8
    for route in routes:
        path = route.path.replace("{name:path}", "tiny").replace("{name}", "style.css")
        for method in route.methods:
            expected = 200 if route.path in OPEN else 401
            assert served.http.request(method, path).status_code == expected, path
            assert served.http.request(method, path, headers=bearer(SECRET)).status_code != 401, path


def test_the_client_knows_the_error(serve):
    served = serve(Echo(), ServeConfig(port=0, api_key=SECRET, drain_s=1))
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong one", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="the API key is not known here"):
            client.models.list()
        assert client.with_options(api_key=SECRET).models.list().data[0].id == "echo"


def test_callers_share_no_prefix(serve, tiny: Model, tmp_path: Path):
    file = KeyFile(tmp_path / "keys.json")
    ann, bob = file.make("ann"), file.make("bob")
    served = serve(Local([tiny]), ServeConfig(port=0, keys_file=file.path, drain_s=1))
    text = "what was computed for one caller is not taken over for another, or the time would tell what others ask"

    def cached(key: str) -> int:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
        usage = served.http.post("/v1/chat/completions", json=body, headers=bearer(key)).json()["usage"]
        return usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)

    assert [cached(ann), cached(bob)] == [0, 0]
    assert cached(ann) == cached(bob) > 64


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--keys-file", str(tmp_path / "keys.json")]
    assert main(["keys", "make", "ann", *where]) == 0
    secret = capsys.readouterr().out.strip()
    assert Guard(file=KeyFile(tmp_path / "keys.json")).admit(f"Bearer {secret}").name == "ann"
    assert main(["keys", "list", *where]) == 0
    assert "ann" in (out := capsys.readouterr().out) and secret not in out
    assert main(["keys", "revoke", "ann", *where]) == 0
    assert main(["keys", "revoke", "ann", *where]) == 2
    assert "no key is called 'ann'" in capsys.readouterr().err
    assert main(["keys", "make", *where]) == 2
