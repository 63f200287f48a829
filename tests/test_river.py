"""THE test: what the server answers is what the model says.

HTTP -> tokens, greedy, equals the packed forward that trains; with text and with an image, one reader and many.
"""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import PIL.Image
import pytest

from herd.chat import Image, Message
from herd.engine.local import Local, Model
from herd.text.stream import Detokenizer

from .engine.greedy import greedy_reply
from .serve.conftest import live

MAX_TOKENS = 40


@pytest.fixture(scope="module")
def client(tiny: Model) -> Iterator[openai.OpenAI]:
    with live(Local([tiny])) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(tiny: Model, messages: list[Message]) -> tuple[str, int]:
    """The greedy reply of the packed forward: its text and how many tokens it has."""
    reply = greedy_reply(tiny, tiny.prompt(messages), MAX_TOKENS)
    detokenizer = Detokenizer(tiny.tokenizer)
    shown = [token for token in reply if token not in tiny.config.stop_ids]
    return "".join(map(detokenizer.push, shown)) + detokenizer.finish(), len(reply)


def ask(client: openai.OpenAI, content: object) -> tuple[str, int]:
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=MAX_TOKENS,  # type: ignore[misc,list-item]
    )
    assert reply.usage
    return reply.choices[0].message.content or "", reply.usage.completion_tokens


@pytest.mark.parametrize(
    "text", ["hi", "a longer question, over several chunks of sixteen tokens, to cross their borders", "ünïcödé ☃ 中文"]
)
def test_reply_equals_the_packed_forward(tiny: Model, client: openai.OpenAI, text: str) -> None:
    assert ask(client, text) == expected(tiny, [Message(role="user", content=(text,))])


def test_stream_equals_the_packed_forward(tiny: Model, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "stream this"}], temperature=0, max_tokens=MAX_TOKENS, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected(tiny, [Message(role="user", content=("stream this",))])[0]


def test_an_image_is_seen(tiny: Model, client: openai.OpenAI) -> None:
    """A 1 x 2 tile picture between two texts, as a data URI."""
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((112, 50)).convert("RGB").save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "text", "text": "look: "}, {"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": " what?"}]
    message = Message(role="user", content=("look: ", Image(data=file.getvalue()), " what?"))
    assert ask(client, content) == expected(tiny, [message])
    tokens, specials = tiny.prompt([message]).tokens, tiny.tokenizer.specials
    image = tokens[tokens.index(specials["<|image_start|>"]) : tokens.index(specials["<|image_end|>"]) + 1]
    for count in (1, 2):
        reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content * count}], max_tokens=1, n=2)  # type: ignore[misc,list-item]
        assert reply.usage and reply.usage.prompt_tokens_details
        assert reply.usage.prompt_tokens_details.image_tokens == len(image) * count > 0
    made = client.responses.create(model="tiny", input=[{"role": "user", "content": [{"type": "input_image", "image_url": uri}]}])  # type: ignore[list-item,misc]
    assert made.usage and made.usage.input_tokens_details.to_dict()["image_tokens"] == len(image)


def test_prompt_cache_key_keeps_prefixes_apart(tiny: Model, client: openai.OpenAI) -> None:
    """What was computed under one key is not taken over under another, nor without one; the reply is the same."""
    text = "keys keep prefixes apart: a prompt over several pages, so that there is something to take over, asked again"

    def asked(**fields: str) -> tuple[int, str | None]:
        messages = [{"role": "user", "content": text}]
        reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8, **fields)  # type: ignore[call-overload]
        details = reply.usage.prompt_tokens_details
        return details.cached_tokens if details else 0, reply.choices[0].message.content

    first = asked(prompt_cache_key="ann")
    assert first[0] == 0
    for fields in ({"prompt_cache_key": "bob"}, {}, {"prompt_cache_key": ""}):
        assert asked(**fields) == first
    for fields in ({"prompt_cache_key": "ann"}, {"prompt_cache_key": "bob"}, {}, {"prompt_cache_key": ""}):
        cached, reply = asked(**fields)
        assert cached >= 64 and reply == first[1]


def test_many_readers_get_their_own(tiny: Model, client: openai.OpenAI) -> None:
    texts = [f"question {i} " * (1 + i % 5) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda text: ask(client, text), texts))
    assert replies == [expected(tiny, [Message(role="user", content=(text,))]) for text in texts]
