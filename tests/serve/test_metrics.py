"""What Prometheus reads: requests by route and status, and the engines' own numbers."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from herd.engine.local import Local, Model
from tests.serve.conftest import Live
from tests.serve.echo import Echo


def samples(served: Live) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and the labels' values."""
    reply = served.http.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_requests(serve):
    served = serve(Echo())
    assert served.chat("one two three").status_code == 200
    assert served.chat(temperature=9).status_code == 400
    for i in range(5):
        served.http.get(f"/nowhere/{i}")
    found = samples(served)
    assert found["herd_http_requests_total", ("/v1/chat/completions", "200")] == 1
    assert found["herd_http_requests_total", ("/v1/chat/completions", "400")] == 1
    assert found["herd_http_requests_total", ("none", "404")] == 5
    assert found["herd_http_requests_in_flight", ()] == 1  # this one
    assert found["herd_first_token_seconds_count", ("echo",)] == 1
    assert found["herd_request_reply_tokens_sum", ("echo",)] == 3
    assert found["herd_token_seconds_count", ("echo",)] == 1


def test_engines(serve, tiny: Model):
    backend = Local([tiny])
    served = serve(backend, stats=backend.stats)
    before = samples(served)
    assert served.chat(model="tiny", max_tokens=5, ignore_eos=True, n=2).status_code == 200
    after = samples(served)

    def grown(name: str, *labels: str) -> float:
        return after[name, ("tiny", *labels)] - before[name, ("tiny", *labels)]

    assert grown("herd_generated_tokens_total") == 10
    assert grown("herd_sequences_finished_total", "length") == 2
    assert grown("herd_step_seconds_total", "run") > 0 and grown("herd_steps_total") > 0
    assert after["herd_model_loaded", ("tiny",)] == 1 and after["herd_sequences_running", ("tiny",)] == 0
    assert {state for name, labels in after if name == "herd_pages" for state in labels[2:]} == {"used", "cached", "free"}


def test_a_model_that_is_away(serve):
    found = samples(serve(Echo(), stats=lambda: {"away": None}))
    assert found["herd_model_loaded", ("away",)] == 0
    assert not [name for name, _ in found if name == "herd_steps_total"]


def test_ready(serve):
    healthy = True
    served = serve(Echo(), is_healthy=lambda: healthy)
    assert (served.http.get("/ready").status_code, served.http.get("/ready").json()) == (200, {"status": "ready"})
    healthy = False
    assert served.http.get("/ready").status_code == 503


@pytest.mark.parametrize(
    ("states", "status"),
    [({"a": "loading"}, 503), ({"a": "unloaded"}, 200), ({"a": "loading", "b": "loaded"}, 200), ({"a": "loading", "b": "loading"}, 503)],
)
def test_ready_when_something_answers(serve, states: dict[str, str], status: int):
    """One that is not in memory is ready: nobody would ask for it otherwise, and so it would never be loaded."""
    served = serve(Echo(), states=lambda: states)
    assert (served.http.get("/ready").status_code, served.http.get("/health").status_code) == (status, 200)
