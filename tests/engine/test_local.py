"""The Python API and the async backend over a live engine thread."""

import asyncio
import gc
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

import herd
from herd.chat import ChatRequest, Done, Message, Sampling, Text
from herd.engine.local import Local, Model
from herd.engine.opening import short_name
from herd.errors import ContextError, HerdError, ModelNotFound, PromptError, UsageError
from tests.engine.made import plain_prompt

from .greedy import greedy_reply, packed_logits


def is_idle(model: Model) -> bool:
    """Whether the engine comes to rest with no page held, within a few seconds."""
    pages = model.thread.engine.pages
    for _ in range(200):
        if model.thread.engine.scheduler.is_idle and all(p.room == p.num_pages for p in (pages.full, pages.local)):
            return True
        time.sleep(0.02)
    return False


def test_generate_is_the_greedy_reply(tiny: Model) -> None:
    reply = tiny.generate("Hello", temperature=0, max_tokens=20)
    pieces = list(reply)
    want = greedy_reply(tiny, plain_prompt([tiny.config.bos_id or 0, *b"Hello"]), 20)
    assert list(reply.tokens) == want
    assert "".join(pieces) == reply.text and reply.done


def test_chat_takes_strings_messages_and_dicts(tiny: Model) -> None:
    asked = (
        "hi",
        [Message(role="user", content=("hi",))],
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    )
    replies = {tiny.chat(messages, temperature=0, max_tokens=12).tokens for messages in asked}
    assert len(replies) == 1


def test_logits_equal_the_forward(tiny: Model) -> None:
    tokens = [256, *b"some text"]
    logits = tiny.logits(tokens)
    assert (logits.dtype, logits.shape) == (torch.float32, (10, 512))
    assert torch.equal(logits, packed_logits(tiny.llama4, tokens))


def test_logits_with_an_image(tiny: Model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    PIL = pytest.importorskip("PIL.Image")
    PIL.new("RGB", (56, 56), (200, 10, 10)).save(tmp_path / "red.png")
    PIL.new("RGB", (56, 56), (10, 10, 200)).save(tmp_path / "blue.png")
    prompt = tiny.prompt([Message(role="user", content=(herd_image(tmp_path / "red.png"), "what?"))])
    red, blue = (tiny.logits(prompt.tokens, [tmp_path / name]) for name in ("red.png", "blue.png"))
    assert (red[-1] - blue[-1]).abs().max() > 1e-4
    with pytest.raises(PromptError, match="0 features"):
        tiny.logits(prompt.tokens)


def herd_image(path):  # type: ignore[no-untyped-def]
    from herd.text.images import read_image

    return read_image(path)


def test_a_reply_that_is_dropped_frees_its_pages(tiny: Model) -> None:
    reply = tiny.generate("x", temperature=1.0, max_tokens=900, ignore_eos=True)
    next(reply)
    assert not tiny.thread.engine.scheduler.is_idle
    del reply
    gc.collect()
    assert is_idle(tiny)


def test_many_readers_at_once(tiny: Model) -> None:
    prompts = [f"prompt number {i}" for i in range(30)]
    replies = [tiny.generate(prompt, temperature=0, max_tokens=16) for prompt in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert list(reply.tokens) == greedy_reply(tiny, plain_prompt([256, *prompt.encode()]), 16)
    assert is_idle(tiny)


def test_backend_streams_and_ends(tiny: Model) -> None:
    request = ChatRequest(
        model="tiny", messages=(Message(role="user", content=("hey",)),), sampling=Sampling(temperature=0, max_tokens=9, ignore_eos=True)
    )

    async def run() -> list[Text | Done]:
        return [event async for event in Local([tiny]).chat(request)]

    events = asyncio.run(run())
    assert isinstance(events[-1], Done) and events[-1].usage.completion_tokens == 9
    assert "".join(e.text for e in events if isinstance(e, Text)) == tiny.chat("hey", temperature=0, max_tokens=9, ignore_eos=True).text


def test_backend_cancels_when_closed(tiny: Model) -> None:
    request = ChatRequest(
        model="tiny", messages=(Message(role="user", content=("hey",)),), sampling=Sampling(temperature=1, max_tokens=800, ignore_eos=True)
    )

    async def run() -> None:
        events = Local([tiny]).chat(request)
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert is_idle(tiny)


def test_a_step_wakes_the_loop_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight readers, 30 tokens each, most of them in the same steps."""
    sampling = Sampling(temperature=0, max_tokens=30, ignore_eos=True)
    request = ChatRequest(model="tiny", messages=(Message(role="user", content=("hey",)),), sampling=sampling)
    wakes: list[object] = []
    steps = tiny.thread.engine.watch.num_steps

    async def run() -> list[int]:
        loop, backend = asyncio.get_running_loop(), Local([tiny])
        wake = loop.call_soon_threadsafe

        def counted(call: Any, *values: Any, **choices: Any) -> Any:
            if getattr(call, "__name__", "") == "_deliver":
                wakes.append(call)
            return wake(call, *values, **choices)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)

        async def read() -> int:
            events = [event async for event in backend.chat(request)]
            assert isinstance(events[-1], Done) and len(events[-1].tokens) == 30
            return len(events)

        return await asyncio.gather(*(read() for _ in range(8)))

    num_events = sum(asyncio.run(run()))
    assert 0 < len(wakes) <= tiny.thread.engine.watch.num_steps - steps < num_events


@pytest.mark.parametrize("is_async", [False, True])
def test_an_engine_that_dies_tells_every_reader(is_async: bool) -> None:
    model = herd.load("tiny")

    def broken(plan: object) -> None:
        raise RuntimeError("no more")

    model.thread.engine.runner.see = broken  # type: ignore[method-assign,assignment]
    request = ChatRequest(model="tiny", messages=(Message(role="user", content=("x",)),))

    async def read() -> None:
        async for _ in Local([model]).chat(request):
            pass

    with pytest.raises(HerdError, match="no more"):
        asyncio.run(asyncio.wait_for(read(), 20)) if is_async else list(model.generate("x"))
    assert not Local([model]).is_healthy()
    with pytest.raises(HerdError, match="no more"):
        model.generate("x")


def test_what_does_not_exist_is_named(tiny: Model) -> None:
    with pytest.raises(UsageError, match="temprature") as caught:
        tiny.chat("x", temprature=1)
    assert "temperature" in caught.value.hint
    with pytest.raises(UsageError, match="kv_gb") as caught:
        herd.load("tiny", kv_gb=3)
    assert "kv_gib" in caught.value.hint
    with pytest.raises(ModelNotFound, match="scuot") as missing:
        herd.load("scuot")
    assert "scout" in missing.value.hint
    with pytest.raises(PromptError, match="a message is"):
        tiny.chat([{"role": "user", "text": "x"}])
    with pytest.raises(PromptError, match="video"):
        tiny.chat([{"role": "user", "content": [{"type": "video"}]}])

    async def run() -> None:
        async for _ in Local([tiny]).chat(ChatRequest(model="tniy", messages=(Message(role="user", content=("x",)),))):
            pass

    with pytest.raises(ModelNotFound, match="tniy"):
        asyncio.run(run())


def test_what_cannot_fit_is_refused_before_it_is_tokenized(tiny: Model) -> None:
    with pytest.raises(ContextError, match=r"50,000,000 characters of messages make at least 50,000,000 tokens; this engine holds 1,024"):
        tiny.chat("x" * 50_000_000)
    with pytest.raises(ContextError, match=r"50,000,000 characters of prompt"):
        tiny.generate("x" * 50_000_000)


def test_a_model_that_is_dropped_ends_its_thread() -> None:
    import threading

    def live() -> int:
        return sum(thread.name == "herd-tiny" for thread in threading.enumerate())

    before = live()
    model = herd.load("tiny")
    model.generate("x", max_tokens=3).text  # noqa: B018
    assert live() == before + 1
    del model
    gc.collect()
    for _ in range(200):
        if live() == before:
            return
        time.sleep(0.02)
    pytest.fail("the engine's thread is still there")


@pytest.mark.parametrize("end", ["", "reply.close()", "raise SystemExit(0)"])
def test_a_program_may_end_in_the_middle_of_a_reply(end: str) -> None:
    code = f"import herd; model = herd.load('tiny'); reply = model.generate('x', max_tokens=900, ignore_eos=True); next(reply); {end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2.5},
        {"min_p": None},
        {"stop": (5,)},
        {"stop": [b"x"]},
        {"max_tokens": 2.5},
        {"seed": True},
        {"temperature": "a"},
        {"top_p": "1"},
    ],
    ids=str,
)
def test_fields_of_the_wrong_type_are_refused_and_harm_nobody(tiny: Model, fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        tiny.generate("hi", **{"temperature": 1, **fields})
    assert tiny.generate("hi", max_tokens=2).tokens


@pytest.mark.parametrize(
    ("path", "name"), [("cria", "cria"), ("models/llama-4.1", "llama-4.1"), ("models/x.gguf", "x"), ("/a/Llama-4-Scout/", "Llama-4-Scout")]
)
def test_models_are_called_by_the_last_part_of_their_path(path: str, name: str) -> None:
    assert short_name(path) == name
    assert short_name(".")
