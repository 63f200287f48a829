"""Programs that people use, against `herd serve cria` as they start it: a process, a port, and nothing of the tests in between.

What the fields mean is tested beside (test_api.py, test_tools.py, test_messages.py); here it is whether whole programs are content.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from herd.checkpoint.store import resolve
from herd.errors import HerdError
from tests.processes import serving

pytestmark = pytest.mark.weights

HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {"type": "string", "enum": ["Paris", "Oslo"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": PARAMETERS}}


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Oslo"]
    is_wet: bool


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server process, one for all of this file."""
    try:
        resolve("cria")
    except HerdError as error:
        pytest.skip(f"the default model cannot be fetched: {error.message}")
    with serving("cria", "--kv-gib", "1") as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cria"]
    whole = client.chat.completions.create(model="cria", messages=HELLO, temperature=0, max_tokens=24)
    assert "Paris" in (whole.choices[0].message.content or "")
    chunks = list(client.chat.completions.create(model="cria", messages=HELLO, temperature=0, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    parsed = client.chat.completions.parse(model="cria", messages=HELLO, response_format=Weather, max_tokens=64)
    assert isinstance(parsed.choices[0].message.parsed, Weather)


def test_openai_async(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {"model": "cria", "messages": HELLO, "temperature": 0, "max_tokens": 16}
            whole = client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [(await whole).choices[0].message.content or "", streamed]

    first, second = asyncio.run(ask())
    assert first == second and first


def test_openai_loop_of_tools(client: openai.OpenAI) -> None:
    messages = list(HELLO)
    asked: Any = {"model": "cria", "messages": messages, "tools": [TOOL], "max_tokens": 64}
    for choice in ("required", "required", "none"):
        message = client.chat.completions.create(**asked, tool_choice=choice).choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            assert call.type == "function" and call.function.name == "get_weather"
            assert json.loads(call.function.arguments)["city"] in CITY["enum"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
    assert messages[-1].content and not messages[-1].tool_calls and len(messages) >= 6


def test_anthropic(url: str) -> None:
    tool: Any = {"name": "get_weather", "description": "Tells the weather.", "input_schema": PARAMETERS}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": "cria", "max_tokens": 24, "system": "Be brief.", "messages": HELLO, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked)
        counted = client.messages.count_tokens(model="cria", system="Be brief.", messages=HELLO)
        assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
        called = client.messages.create(model="cria", max_tokens=64, messages=HELLO, tools=[tool], tool_choice={"type": "any"})
        used = called.content[-1]
        assert called.stop_reason == "tool_use" and used.type == "tool_use" and used.input["city"] in CITY["enum"]
        result: Any = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "rain"}]}
        history = [*HELLO, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(model="cria", max_tokens=8, messages=history, tools=[tool], tool_choice={"type": "none"}).content


def test_langchain(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: Literal["Paris", "Oslo"]) -> str:
        """Tells the weather in a city."""
        return f"rain in {city}"

    choices: Any = {"temperature": 0, "max_tokens": 64, "max_retries": 0, "stream_usage": True}
    model = langchain.ChatOpenAI(model="cria", base_url=f"{url}/v1", api_key="none", **choices)
    asked = [SystemMessage("Be brief."), HumanMessage("What is the capital of France?")]
    whole = model.invoke(asked)
    assert isinstance(whole, AIMessage) and whole.content and whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    chunks = list(model.stream(asked))
    assert "".join(chunk.content for chunk in chunks) == whole.content and any(chunk.usage_metadata for chunk in chunks)

    async def ask() -> Any:
        reply = await model.ainvoke(asked)
        await model.root_async_client.close()
        return reply.content

    assert asyncio.run(ask()) == whole.content
    assert [reply.content for reply in model.batch([asked, asked])] == [whole.content] * 2
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Weather, method=method).invoke("It rains in Oslo."), Weather), method
    calling = model.bind_tools([get_weather], tool_choice="required").invoke(asked)
    assert calling.tool_calls and calling.response_metadata["finish_reason"] == "tool_calls"
    results = [get_weather.invoke(call) for call in calling.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    after = model.bind_tools([get_weather], tool_choice="none").invoke([*asked, calling, *results])
    assert after.content and not after.tool_calls
    model.root_client.close()


def test_llm(url: str, tmp_path: Path) -> None:
    """Simon Willison's `llm`, as its documentation tells people to add such a server."""
    pytest.importorskip("llm")
    entry = f'- model_id: herd\n  model_name: cria\n  api_base: "{url}/v1"\n  supports_schema: true\n  supports_tools: true\n'
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def ask(*args: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "herd", "-o", "temperature", "0", "-o", "max_tokens", "48", *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    question = "What is the capital of France?"
    streamed = ask(question)
    assert "Paris" in streamed and ask("--no-stream", question) == streamed
    assert ask("-c", "-s", "Be brief.", "And of Italy?")
    assert set(json.loads(ask("--schema", json.dumps(PARAMETERS), "Name a city."))) == {"city"}


CURL = shutil.which("curl")


@pytest.mark.skipif(CURL is None, reason="no curl here")
def test_curl(url: str) -> None:
    def ask(path: str, *args: str, **fields: Any) -> str:
        body = json.dumps({"model": "cria", "messages": HELLO, "temperature": 0, "max_tokens": 16, **fields})
        command = [str(CURL), "-sS", "--fail-with-body", "-m", "60", f"{url}{path}", *args, "-d", body]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    content = ("-H", "Content-Type: application/json")
    text = json.loads(ask("/v1/chat/completions", *content))["choices"][0]["message"]["content"]
    lines = ask("/v1/chat/completions", *content, "-N", stream=True).strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for line in lines) == text
    version = (*content, "-H", "anthropic-version: 2023-06-01", "-H", "x-api-key: none")
    assert json.loads(ask("/v1/messages", *version))["content"] == [{"type": "text", "text": text}]
    events = [event.split("\ndata: ") for event in ask("/v1/messages", *version, "-N", stream=True).strip().split("\n\n")]
    assert all(json.loads(data)["type"] == kind.removeprefix("event: ") for kind, data in events)
    deltas = [json.loads(data)["delta"]["text"] for kind, data in events if kind == "event: content_block_delta"]
    assert "".join(deltas) == text and events[-1][0] == "event: message_stop"
