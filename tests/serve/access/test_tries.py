"""Who guesses keys waits longer and longer; who has one is let in; nothing grows."""

import pytest

from herd.serve.access import tries
from herd.serve.access.keys import Guard, KeyFile, KeyRefused, TooManyTries
from herd.serve.access.tries import Tries, network
from herd.serve.config import ServeConfig
from tests.clock import Clock
from tests.serve.echo import Echo


def test_a_guesser_gets_few_tries():
    """In a day of asking as fast as one may: the short word of an operator is looked at as often as this, and no more."""
    clock = Clock()
    guard = Guard("short word", tries=Tries(clock))
    looked_at = 0
    while clock.now < 86_400:
        try:
            guard.admit("Bearer guess", address="10.0.0.1")
        except TooManyTries as error:
            assert 0 < error.retry_after_s <= 60
            clock.now += error.retry_after_s
        except KeyRefused:
            looked_at += 1
    assert 1_000 < looked_at < 86_400 / 60 + 20
    with pytest.raises((KeyRefused, TooManyTries)):
        guard.admit("Bearer guess", address="10.0.0.1")
    with pytest.raises(TooManyTries):  # even the right one
        guard.admit("Bearer short word", address="10.0.0.1")
    assert guard.admit("Bearer short word", address="10.0.0.2").name == "api-key"
    clock.now += 60
    assert guard.admit("Bearer short word", address="10.0.0.1").name == "api-key"


def test_nobody_is_locked_out_by_a_neighbour(tmp_path):
    clock, file = Clock(), KeyFile(tmp_path / "keys.json")
    secret = file.make("ann")
    guard = Guard("short word", file, tries=Tries(clock))
    for _ in range(50):
        with pytest.raises((KeyRefused, TooManyTries)):
            guard.admit("Bearer guess", address="10.0.0.1")
    assert guard.admit(f"Bearer {secret}", address="10.0.0.1").name == "ann"
    with pytest.raises(KeyRefused, match="there is no API key"):  # no guess, and not counted
        guard.admit("", address="10.0.0.1")


def test_what_is_remembered_is_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tries, "MOST_ADDRESSES", 100)
    clock = Clock()
    found = Tries(clock)
    for i in range(1000):
        for _ in range(12):
            found.failed(f"10.0.{i // 250}.{i % 250}")
    assert len(found._failures) == 100
    assert found.wait_s("10.0.3.249") > 0 and found.wait_s("10.0.0.0") == 0
    clock.now = tries.FORGOTTEN_S + 1
    found.failed("10.0.3.249")
    assert found.wait_s("10.0.3.249") == 0


def test_one_client_has_one_network():
    assert network("2001:db8:1:2:3:4:5:6") == network("2001:db8:1:2::1") != network("2001:db8:1:3::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") != network("10.0.0.2")
    assert len(network("x" * 1000)) == 64


def test_over_http(serve):
    served = serve(Echo(), ServeConfig(port=0, api_key="a short word", drain_s=1))

    def ask(key: str) -> int:
        return served.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    codes = [ask(f"guess {i}") for i in range(tries.FREE + 5)]
    assert codes[: tries.FREE] == [401] * tries.FREE and 429 in codes
    reply = served.http.get("/v1/models", headers={"authorization": "Bearer another"})
    assert reply.status_code == 401 or int(reply.headers["retry-after"]) >= 1
    assert served.http.get("/health").status_code == 200
