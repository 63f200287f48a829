"""Random traffic for as long as one likes: nothing may leak, and replies stay what they are. `make soak` takes an hour, the suite seconds.

Two models are served over HTTP and used from Python at once by many readers: arrivals in bursts, prompts that begin alike, images, readers
who leave, pages for little more than one sequence, finished chunks on a small disk, and one of the models unloaded whenever it is idle. The
other stays loaded, so that what an engine gathers over a long life shows. Between windows of traffic all is quiet, and then there must be
no page held, no sequence left anywhere, no thread and descriptor more than before, no file that is not whole, and no more memory than after
the warm-up.

SOAK_S says how many seconds.
"""

import base64
import gc
import io
import os
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import PIL.Image
import pytest

import herd
from herd.chat import Image, Message, Sampling
from herd.checkpoint.quantize import quantize_checkpoint
from herd.engine.engine import Engine
from herd.engine.local import Local, Model
from herd.engine.memory import sweep
from herd.engine.reply import Reply
from herd.engine.resident import Stay
from herd.engine.sequence import Sequence
from herd.engine.stats import Stats
from herd.errors import ContextError
from herd.ops.native import kernels
from tests.clock import until
from tests.engine.made import is_clean
from tests.serve.conftest import live

from .greedy import greedy_reply

SECONDS = float(os.environ.get("SOAK_S", "2"))
WINDOW_S = min(60.0, max(0.5, SECONDS / 60))
READERS = 6
# of resident memory after the warm-up: from its first third to its last, and at any one time, where the C allocator's caches come and go
DRIFT, NOISE = 0.02, 0.02 if os.environ.get("MALLOC_ARENA_MAX") == "1" else 0.05
LIMIT_BYTES = 600_000  # of chunks on the disk
CHOICES = {
    "context_tokens": 320,
    "max_sequences": 6,
    "step_tokens": 48,
    "page_tokens": 4,
    "kv_gib": 0.00018,  # pages for one sequence of full length and a half
    "prefix_gib": LIMIT_BYTES / 2**30,
}
WORDS = ["the", "herd", "went", "down", "to", "the river", "and drank;", "then it rained,", "so they", "stood", "under trees", "and waited"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (56 + 28 * (number % 2), 56), (number * 60 % 256, 90, 200 - number * 30)).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(i) for i in range(3)]


def talk(rng: random.Random, *, sees: bool) -> list[Message]:
    """A question, which begins as one of a few do; for a model with eyes at times with a picture."""
    begin = random.Random(rng.randrange(4)).choices(WORDS, k=12)
    content: list[str | Image] = [" ".join([*begin, *rng.choices(WORDS, k=rng.choice([0, 1, 3, 8]))])]
    if sees and rng.random() < 0.2:
        content.insert(rng.randrange(2), Image(data=rng.choice(PICTURES)))
    return [Message(role="user", content=tuple(content))]


def wire(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them."""

    def part(of: str | Image) -> dict[str, Any]:
        if isinstance(of, str):
            return {"type": "text", "text": of}
        return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(of.data).decode()}}

    return [{"role": m.role, "content": [part(each) for each in m.content]} for m in messages]


@dataclass
class Soak:
    """The models, their server, and what came of it."""

    models: list[Model]
    url: str
    living: int  # of the tests before this one
    known: dict[str, dict[int, str]] = field(default_factory=dict)  # replies of the native model by itself, by seed of the question
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    http: httpx2.Client = field(default_factory=httpx2.Client)

    def window(self, seconds: float, seed: int) -> None:
        """Traffic, and the end of it."""
        end = time.monotonic() + seconds
        self.http = httpx2.Client(base_url=self.url, timeout=120)
        readers = [threading.Thread(target=self.read, args=(random.Random(f"{seed} {i}"), end)) for i in range(READERS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        self.http.close()

    def read(self, rng: random.Random, end: float) -> None:
        """One reader until the end."""
        try:
            while time.monotonic() < end:
                self.ask(rng)
                if rng.random() < 0.1:
                    time.sleep(min(0.3, rng.expovariate(10)))
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def ask(self, rng: random.Random) -> None:
        model = rng.choice(self.models)
        self.counts["asked"] += 1
        kind = rng.choices([self.check, self.from_python, self.over_http, self.story, self.too_long], [2, 4, 4, 2, 0.2])[0]
        kind(model, rng)

    def check(self, model: Model, rng: random.Random) -> None:
        """A greedy reply against the packed forward's; of the native model, which rounds otherwise, against its own reply alone."""
        over_http = rng.random() < 0.5
        if model.name in self.known:
            seed = rng.choice(list(self.known[model.name]))
            messages, want = talk(random.Random(seed), sees=False), self.known[model.name][seed]
        else:
            messages = talk(rng, sees=True)
            with model._resident.stay():
                found = greedy_reply(model, model.prompt(messages), 12)
                want = text_of(model, found)
        found_text = self.post(model, messages, max_tokens=12, temperature=0) if over_http else None
        if found_text is None:
            found_text = model.chat(messages, temperature=0, max_tokens=12).text
        self.counts["checked"] += 1
        if found_text != want:
            self.wrong.append(f"{model.name} said {found_text!r} to {messages}, and not {want!r}")

    def from_python(self, model: Model, rng: random.Random) -> None:
        reply = model.chat(talk(rng, sees=model.tiling is not None), drawn(rng))
        if rng.random() < 0.3:
            with suppress(StopIteration):
                for _ in range(rng.randrange(4)):
                    next(reply)
            self.counts["left"] += 1
            if rng.random() < 0.5:
                reply.close()
            return  # else it is forgotten
        assert reply.text is not None

    def over_http(self, model: Model, rng: random.Random) -> None:
        sampling, messages = drawn(rng), talk(rng, sees=model.tiling is not None)
        fields = {"max_tokens": sampling.max_tokens, "seed": sampling.seed, "temperature": sampling.temperature, "ignore_eos": True}
        if rng.random() < 0.5:
            self.post(model, messages, **fields)
            return
        body = {"model": model.name, "messages": wire(messages), "stream": True, **fields}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            for number, line in enumerate(lines):
                assert "error" not in line[:20], line
                if rng.random() < 0.03 * number:
                    self.counts["left"] += 1
                    return
            assert line == "data: [DONE]"

    def story(self, model: Model, rng: random.Random) -> None:
        """Little to read and much to say: several fit when they come, and not for long."""
        del model  # the native one is the faster
        reply = self.models[0].generate(rng.choice(WORDS), max_tokens=rng.randint(60, 200), temperature=0.3, ignore_eos=True)
        assert len(reply.tokens) >= 60

    def post(self, model: Model, messages: list[Message], **fields: Any) -> str:
        response = self.http.post("/v1/chat/completions", json={"model": model.name, "messages": wire(messages), **fields})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    def too_long(self, model: Model, rng: random.Random) -> None:
        with pytest.raises(ContextError):
            model.generate("x" * rng.randint(400, 3000))


def drawn(rng: random.Random) -> Sampling:
    return Sampling(temperature=rng.choice([0, 1]), seed=rng.randrange(100), max_tokens=rng.choice([1, 5, 20, 40]), ignore_eos=True)


def text_of(model: Model, tokens: list[int]) -> str:
    from herd.text.stream import Detokenizer

    detokenizer = Detokenizer(model.tokenizer)
    return "".join(detokenizer.push(token) for token in tokens if token not in model.config.stop_ids) + detokenizer.finish()


def living() -> int:
    """Sequences, and what holds engines, anywhere in the process."""
    gc.collect()
    return sum(type(each) in (Sequence, Stay, Reply) for each in gc.get_objects())


def quiet_state(soak: Soak, stays: Model, goes: Model, most: int) -> tuple[Counter[str], int]:
    """Names of threads and number of descriptors when everything that is not kept is gone."""
    assert not soak.wrong, soak.wrong
    assert until(goes.unload)
    engine = stays.thread.engine
    assert until(lambda: engine.scheduler.is_idle and is_clean(engine))
    assert engine.shelf and engine.shelf.store.flush(30)

    assert until(lambda: living() == soak.living)
    until(lambda: descriptors() <= most)  # the server takes a moment to close a connection
    sweep()
    names = Counter(t.name for t in threading.enumerate() if not t.name.startswith(("asyncio_", "AnyIO")))
    return names, descriptors()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(kernels() is None, reason="the native kernels are not built here")
def test_soak(tmp_path: Path) -> None:
    quantize_checkpoint("tiny", tmp_path / "native", "int4")
    folder = tmp_path / "kv"
    stays = herd.load(tmp_path / "native", prefix_folder=folder, **CHOICES)
    goes = herd.load("tiny", prefix_folder=folder, idle_s=0.2, **CHOICES)
    backend = Local([stays, goes])
    gone: Counter[str] = Counter()
    count_what_it_did(goes, gone)
    with live(backend, is_healthy=backend.is_healthy) as server:
        soak = Soak([stays, goes], server.url, living())
        soak.known[stays.name] = {
            seed: stays.chat(talk(random.Random(seed), sees=False), temperature=0, max_tokens=12).text for seed in range(20)
        }
        history: list[int] = []
        names: list[Counter[str]] = []
        fds: list[int] = []
        start = time.monotonic()
        while (passed := time.monotonic() - start) < SECONDS or len(history) < 4:
            soak.window(min(WINDOW_S, max(0.3, SECONDS - passed)), len(history))
            found, fd = quiet_state(soak, stays, goes, max(fds[:3], default=1000))
            names.append(found)
            fds.append(fd)
            history.append(resident_bytes())
            check_folder(folder)
            assert backend.is_healthy()
            done = gone + tallied(stays.stats() or pytest.fail("it was unloaded"))
            say(soak, done, passed, f"{history[-1] / 1e6:.1f} MB, {fds[-1]} descriptors, {sum(found.values())} threads")
        warm = len(history) // (2 if SECONDS < 60 else 5)
        assert all(each == names[1] for each in names[1:]), names
        assert max(fds[warm:]) <= max(fds[:warm])
        check_memory(history[:warm], history[warm:])
        assert not done["failed"] and soak.counts["checked"] and done["loaded"] >= len(history)
        if SECONDS >= 60:  # else chance may have left something out
            for what in ("gave way", "evicted", "chunks from the disk", "chunks evicted there", "guesses right"):
                assert done[what], what
            assert soak.counts["left"]
    assert stays.unload() and goes.unload()


def tallied(*all_stats: Stats) -> Counter[str]:
    """What several engines did, in all."""
    found: Counter[str] = Counter()
    for stats in all_stats:
        assert stats.disk
        found += Counter(
            {
                "gave way": stats.num_preempted,
                "evicted": stats.full_pages.evicted + stats.local_pages.evicted,
                "chunks from the disk": stats.disk.hits,
                "chunks evicted there": stats.disk.evicted,
                "guesses right": stats.accepted_tokens,
                "failed": stats.num_failed + stats.disk.broken + stats.disk.failed_reads + stats.disk.failed_writes,
            }
        )
    return found


def count_what_it_did(model: Model, total: Counter[str]) -> None:
    """Add up how often the engine of a model that comes and goes was made, and what each of them did."""
    make = model._resident._open

    def made() -> Engine:
        engine = make()
        close = engine.close

        def closed() -> None:
            total.update(tallied(engine.stats()))
            close()

        total["loaded"] += 1
        engine.close = closed  # type: ignore[method-assign]
        return engine

    model._resident._open = made


def check_memory(before: list[int], after: list[int]) -> None:
    """Flat: what an allocator with many arenas keeps differs by a few percent from one time to the next, but it does not drift."""
    shown = [f"{each / 1e6:.1f}" for each in (*before, *after)]
    assert max(after) < max(before) * (1 + NOISE), shown
    if (third := len(after) // 3) >= 5:
        assert median(after[-third:]) < median(after[:third]) * (1 + DRIFT), shown


def check_folder(folder: Path) -> None:
    """Within its limit, and every file whole."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    assert all(path.suffix == ".kv" for path in files) and sum(path.stat().st_size for path in files) <= LIMIT_BYTES


def say(soak: Soak, done: Counter[str], passed: float, state: str) -> None:
    """A line of progress, seen with `-s`."""
    counts = ", ".join(f"{value:,} {name}" for name, value in (soak.counts + done).items())
    sys.stdout.write(f"{passed:6.0f} s  {state}; {counts}\n")
    sys.stdout.flush()
