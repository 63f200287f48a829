"""What is kept of responses: each thing once, for a time, within a limit, and never a conversation without its beginning."""

import random
from typing import Any

import pytest

from herd.errors import HerdError, ResourceError, UsageError
from herd.serve.responses.store import DAY_S, TABLES, Responses
from herd.serve.store import Store
from tests.clock import Clock


class Kept:
    """A store under test, with short words for what it does."""

    def __init__(self, max_bytes: int = 1 << 30, days: float = 30.0) -> None:
        self.clock = Clock(1e9)
        self.store = Store(None, TABLES)
        self.responses = Responses(self.store, max_bytes, days, self.clock)

    def save(self, id: str, previous: str | None = None, text: str = "x", owner: str = "ann") -> None:
        items = [{"id": f"{kind}_{id}", "text": text} for kind in ("in", "out")]
        self.clock.now += 1
        told = {"id": id, "previous_response_id": previous, "output": items[1:]}
        self.responses.save(owner, told, items[:1])

    def past(self, id: str) -> list[str]:
        return [item["id"] for item in self.responses.past("ann", id)]

    def ids(self) -> set[str]:
        return {row["id"] for row in self.store.db.execute("SELECT id FROM responses")}

    def num_bytes(self) -> int:
        return int(self.store.db.execute("SELECT sum(bytes) AS bytes FROM responses").fetchone()["bytes"])


@pytest.fixture
def kept() -> Any:
    made: list[Kept] = []

    def make(**how: Any) -> Kept:
        made.append(Kept(**how))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


def test_a_chain_is_kept_once(kept):
    here = kept()
    for i in range(200):
        here.save(f"r{i}", f"r{i - 1}" if i else None, text="x" * 1000)
    assert here.past("r199") == [f"{kind}_r{i}" for i in range(200) for kind in ("in", "out")]
    assert [item["id"] for item in here.responses.inputs("ann", "r1")] == ["in_r0", "out_r0", "in_r1"]
    [pages] = here.store.db.execute("SELECT count(*) AS n, sum(length(told)) AS size FROM response_items")
    assert pages["n"] == 400 and pages["size"] < here.num_bytes() < 200 * 2 * 1200


def test_deleting_the_middle(kept):
    here = kept()
    for id, previous in (("a", None), ("b", "a"), ("c", "b"), ("d", "c")):
        here.save(id, previous)
    here.responses.delete("ann", "b")
    assert here.ids() == {"a", "c", "d"} and here.past("a") == ["in_a", "out_a"]
    assert not here.store.db.execute("SELECT * FROM response_items WHERE response = 'b' OR id LIKE '%_b'").fetchall()
    for id in ("c", "d"):
        with pytest.raises(UsageError, match=f"'{id}' cannot be continued: 'b'"):
            here.past(id)
    assert [item["id"] for item in here.responses.inputs("ann", "d")] == ["in_c", "out_c", "in_d"]
    with pytest.raises(HerdError, match="there is no response 'b'"):
        here.responses.delete("ann", "b")


def test_owners(kept):
    here = kept()
    here.save("a")
    for look in (here.responses.past, here.responses.find, here.responses.inputs, here.responses.delete):
        with pytest.raises(UsageError, match="there is no response 'a'"):
            look("bob", "a")
    with pytest.raises(UsageError, match="there is no item 'out_a'"):
        here.responses.item("bob", "out_a", "input.0.id")
    here.save("b", "a", owner="bob")  # whatever it says it continues, the past of another is not read
    with pytest.raises(UsageError, match="'b' cannot be continued: 'a'"):
        here.responses.past("bob", "b")
    assert here.responses.item("ann", "out_a", "input.0.id") == {"id": "out_a", "text": "x"}


def test_time(kept):
    here = kept(days=1)
    here.save("a")
    here.save("other")
    here.clock.now += DAY_S / 2
    here.save("b", "a")
    here.clock.now += DAY_S * 0.75
    assert here.past("b") == ["in_a", "out_a", "in_b", "out_b"]  # what is continued is in use
    with pytest.raises(UsageError, match="there is no response 'other'"):
        here.responses.find("ann", "other")
    here.clock.now += DAY_S
    with pytest.raises(UsageError, match="there is no response 'b'"):
        here.past("b")
    assert not here.ids() and not here.store.db.execute("SELECT * FROM response_items").fetchall()


def test_a_limit_of_bytes(kept):
    here = kept(max_bytes=4000)
    for id in "abcd":
        here.save(id, text="x" * 400)
    here.save("e", "a", text="x" * 400)
    here.save("f", text="x" * 400)
    assert here.ids() == {"a", "d", "e", "f"} and here.num_bytes() <= 4000  # a is in use: b and c were not for longest
    here.responses.check_room("ann", [{"text": "x" * 2900}], "a")
    with pytest.raises(UsageError, match="this server keeps 4,000"):
        here.responses.check_room("ann", [{"text": "x" * 2900}], "e")


@pytest.mark.parametrize("seed", range(8))
def test_only_the_ends_of_chains_go(kept, seed: int):
    """Whatever is made and continued, every response that is there can be continued, and all fit."""
    here, draw = kept(max_bytes=6000, days=0.002), random.Random(seed)
    for i in range(120):
        here.clock.now += draw.choice((0, 0, 30))
        known = sorted(here.ids())
        previous = draw.choice(known) if known and draw.random() < 0.7 else None
        here.save(f"r{i}", previous, text="x" * draw.randrange(500))
        chain = [row["bytes"] for row in here.responses._chain("ann", f"r{i}")]
        assert here.num_bytes() <= max(6000, sum(chain))
        for id in here.ids():
            here.past(id)
        last = here.past(f"r{i}")
        assert last[-2:] == [f"in_r{i}", f"out_r{i}"] and len(last) == 2 * len(chain)


def test_a_disk_that_fails(kept):
    here = kept()
    here.save("a")
    here.store.db.execute("CREATE TRIGGER full BEFORE INSERT ON response_items BEGIN SELECT raise(ABORT, 'disk full'); END")
    with pytest.raises(ResourceError, match="cannot be stored: disk full"):
        here.save("b", "a")
    assert here.ids() == {"a"}
