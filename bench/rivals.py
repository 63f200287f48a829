"""Do the API tests of rivals pass against this server?

    allow="--allow-origin http://localhost --allow-origin http://localhost:8080 --allow-origin http://127.0.0.1"
    allow="$allow --allow-origin http://127.0.0.1:3000 --allow-origin http://[::1] --allow-origin http://[::1]:3000"
    herd serve cria --port 8711 --context-tokens 8192 $allow
    herd serve cria --port 8712 --context-tokens 8192 --api-key sk-this-is-the-secret-key --data-folder /tmp/other
    pip install pytest pytest-asyncio openai anthropic requests regex jsonschema prometheus_client transformers
    python bench/rivals.py --llamacpp SOURCES --vllm SOURCES --url http://127.0.0.1:8711 --keyed-url http://127.0.0.1:8712 --tokenizer CRIA

SOURCES are folders with a rival's sources. Their tests run from there, as they are, and none of their code is here. Around them is changed
only what belongs to their servers: nothing is started; the model's name is ours; llama.cpp's routes without /v1 get it, and its builds' "b"
stands before our fingerprint; the texts and counts of tokens that their own weights give are not compared. What they import of vLLM and
torch is a stand-in. Left out are tests that ask no server, or one with adapters, watermarks or other weights.

Each failure is in `REASONS`, or is printed as new.
"""

import argparse
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

LLAMACPP = ("basic", "chat_completion", "compat_anthropic", "compat_oai_responses", "security", "stream", "tokenize", "tool_call")
VLLM = (
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/models/test_models.py",
    "openai/test_chunked_prompt.py",
    "anthropic/test_messages.py",
    "serve/instrumentator/test_basic.py",
    "serve/tokenize/test_tokenization.py",
)
WEIGHTS = ("n_prompt", "n_cache", "re_prefill")  # parameters that only their weights give


class Anything:
    """Equal to whatever it is compared with."""

    def __eq__(self, _: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that are not here and that only their servers need: every name in them is a mock."""

    names = ("vllm", "torch", "wget", "fastapi", "pybase64")

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        held: dict[str, Any] = {
            "vllm.tokenizers": {"get_tokenizer": tokenizer},
            "vllm.config": {"ModelConfig": lambda **_: types.SimpleNamespace(get_vocab_size=lambda: len(tokenizer()))},
            "torch": {"iinfo": lambda _: types.SimpleNamespace(min=-(1 << 63), max=(1 << 63) - 1)},
        }
        module.__dict__.update(held.get(module.__name__, {}))


def tokenizer(*_: object, **__: object) -> Any:
    """The model's, by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["RIVALS_TOKENIZER"])


class RunningServer:
    """What vLLM's tests start a server with; here it runs already."""

    DUMMY_API_KEY = "none"

    def __init__(self, *_: object, **__: object) -> None:
        self.url_root = os.environ["RIVALS_URL"]

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def url_for(self, *parts: str) -> str:
        return "/".join((self.url_root, *parts))

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url_for("v1"), api_key="none", max_retries=0, **options)

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key="none", max_retries=0, **options)

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key="none", max_retries=0, **options)


def named(body: Any) -> Any:
    """A request's body with our model in place of theirs; a name that is wrong on purpose stays."""
    if isinstance(body, dict) and "not" not in str(body.get("model")) and "wrong" not in str(body.get("model")):
        return {**body, "model": os.environ["RIVALS_MODEL"]}
    return body


def adapt_clients() -> None:
    """Change what is sent, where it is sent: the model's name, and /v1 where a client of llama.cpp's leaves it out."""
    import anthropic
    import openai
    import requests

    for owner in (openai._base_client.SyncAPIClient, openai._base_client.AsyncAPIClient, anthropic._base_client.BaseClient):
        build = owner._build_request

        def rebuilt(self: Any, options: Any, *, build: Callable[..., Any] = build, **more: Any) -> Any:
            options.json_data = named(options.json_data)
            if isinstance(self, openai.OpenAI) and self.base_url.path == "/":
                options.url = f"/v1{options.url}"
            return build(self, options, **more)

        owner._build_request = rebuilt
    post = requests.post

    def posted(url: str, *args: Any, **options: Any) -> Any:
        return post(url, *args, **{**options, **({"json": named(options["json"])} if options.get("json") is not None else {})})

    requests.post = posted


def theirs(server: Any, body: Any) -> Any:
    """A reply with their names in place of ours, where it has ours."""
    if not isinstance(body, dict):
        return body
    own, name = os.environ["RIVALS_MODEL"], server.model_alias
    if isinstance(build := body.get("system_fingerprint"), str):
        body = {**body, "system_fingerprint": f"b{build}"}
    if name and body.get("model") == own:
        body = {**body, "model": name}
    if name and body.get("object") == "list":
        body = {**body, "data": [{**item, "id": name if item["id"] == own else item["id"]} for item in body["data"]]}
    return body


def adapt_llamacpp() -> None:
    import utils
    from requests.structures import CaseInsensitiveDict

    process = utils.ServerProcess
    request, stream = process.make_request, process.make_stream_request

    def at(server: Any, path: str) -> str:
        url = os.environ["RIVALS_KEYED_URL" if server.api_key else "RIVALS_URL"]
        server.server_host, _, port = url.removeprefix("http://").partition(":")
        server.server_port = int(port)
        return f"/v1{path}" if path.startswith(("/chat/", "/completions", "/models", "/responses")) else path

    def asked(server: Any, method: str, path: str, *args: Any, **options: Any) -> Any:
        reply = request(server, method, at(server, path), *args, **options)
        reply.body = theirs(server, reply.body)
        reply.headers = CaseInsensitiveDict(reply.headers)  # as HTTP's are
        return reply

    def streamed(server: Any, method: str, path: str, *args: Any, **options: Any) -> Any:
        return (theirs(server, event) for event in stream(server, method, at(server, path), *args, **options))

    process.start = lambda server, *_, **__: at(server, "")
    process.stop = lambda _: None
    process.make_request, process.make_stream_request = asked, streamed
    utils.match_regex = lambda *_: True


# -- what pytest calls ------------------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    sys.meta_path.append(StandIns())
    config.addinivalue_line("markers", "slow: of theirs")
    config.addinivalue_line("markers", "optional: of theirs")
    adapt_clients()
    started = sys.modules["tests.utils"] = types.ModuleType("tests.utils")  # theirs imports their engine
    started.RemoteOpenAIServer, started.ROCM_EXTRA_ARGS = RunningServer, []  # type: ignore[attr-defined]
    if os.environ["RIVALS_OF"] == "llama.cpp":
        sys.path.insert(0, os.environ["RIVALS_FOLDER"])
        adapt_llamacpp()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    is_vllm = os.environ["RIVALS_OF"] == "vLLM"
    items[:] = [item for item in items if is_chosen(item, is_vllm)]
    for item in items:
        if call := getattr(item, "callspec", None):
            call.params.update({name: Anything() for name in WEIGHTS if name in call.params})


def is_chosen(item: pytest.Item, is_vllm: bool) -> bool:
    """Leave out what needs other weights, adapters or watermarks, and what calls their code and no server."""
    if item.get_closest_marker("slow") or any(word in item.nodeid for word in ("lora", "watermarked")):
        return False
    starts_one = "RemoteOpenAIServer" in inspect.getsource(item.function)  # type: ignore[attr-defined]
    return not is_vllm or starts_one or any(name.endswith("server") for name in item.fixturenames)  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed or report.skipped:
        line = {"test": Path(report.location[0]).stem + "::" + report.location[2], "outcome": report.outcome, "why": ""}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            line["why"] = (crash.message if crash else str(report.longrepr)).replace("\n", " ")[:300]
        with Path(os.environ["RIVALS_REPORT"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


# -- the table ---------------------------------------------------------------------------------------------------------------------------

REASONS = {  # what a test or its failure says -> why herd does not do as it wants
    r"::test_logprobs_stream|::test_chat_completion_stream\[|Expected non empty content delta": "the first chunk's content is \"\", as OpenAI's",  # noqa: E501
    r"system_fingerprint|with_openai_library": "no system_fingerprint, which OpenAI calls deprecated",
    r"__verbose|::test_verbose_debug|::test_apply|apply-template": "shows llama.cpp's prompt; herd has /tokenize with messages",
    r"cors|Origin|OPTIONS": "no other site's page may ask this server: there is no CORS",
    r"authentication_error": "OpenAI says invalid_request_error",
    r"'content' in .*text_completion": "llama.cpp's own reply form",
    r"::test_server_slots|::test_server_props|::test_load_split|aliases|::test_no_ui|multiple_addresses": "llama.cpp's own options and routes",  # noqa: E501
    r"::test_server_models|::test_check_models": "the model's name is another here",
    r"static_assets": "files of llama.cpp's own page",
    r"cached_tokens": "counts tokens of its own weights",
    r"test_stream::": "llama.cpp's streams that are resumed",
    r"test_tokenize::": "llama.cpp's form (content); herd has vLLM's (prompt)",
    r"response_format\[response_format[01]|json_schema\[|grammar is an unknown|with_grammar": "llama.cpp's fields; herd has response_format and vLLM's",  # noqa: E501
    r"response_format2": "no json_schema.name, which OpenAI requires",
    r"messages7|messages7": "two messages of the assistant in turn are taken, as OpenAI's are",
    r"timings_per_token|return_progress|id_slot|::test_chat_completions_multiple|input_tokens|token_count": "llama.cpp's own fields and routes",  # noqa: E501
    r"test_chat_completion::test_logit_bias": "llama.cpp's form of /tokenize",
    r"context_size_exceeded": "expects its own error type; the prompt fits into this server's context",
    r"continue_final|add_generation|tokenize_chat": "vLLM's continuation of a message, and prompts without a header",
    r"tool_result_with_text": "Anthropic refuses text before a tool_result too",
    r"image|vision|media|test-1.jpeg": "pictures: a 400 where llama.cpp has 500, no files of the server, and a model that sees none",
    r"empty_messages": "Anthropic refuses an empty list too",
    r"thinking": "no thinking",
    r"openai_library_correct_api_key": "base_url without /v1",
    r"prompt_logprobs|::test_echo_logprob|those of a prompt": "log-probabilities of prompts are not told",
    r"min_tokens|return_token_ids|logprob_token_ids|continuous_usage|beam_search|chat_template_kwargs|return_tokens": "vLLM's own field",
    r"CompletionUsage\(|CompletionUsa": "counts tokens of its own weights",
    r"ChoiceDelta\(": "wants text in the last chunk; OpenAI's holds finish_reason alone",
    r"chunk len": "wants no chunk for finish_reason alone",
    r"Unterminated|192\.|1 \+ 1|'stop' == 'length'|'end_turn' == 'tool_use'": "what the weights say",
    r"extra_field|my-custom-role": "unknown fields and roles are refused",
    r"bad2": "names the first wrong key alone",
    r"MagicMock": "needs vLLM itself",
    r"/invocations|/version|tokenizer_info|::test_server_load": "vLLM's own routes",
    r"output_config": "Anthropic's structured output is not taken",
}


def run(rival: str, folder: Path, files: Sequence[Path], args: argparse.Namespace) -> list[dict[str, str]]:
    report = Path(args.report_folder).resolve() / f"{rival}.jsonl"
    report.unlink(missing_ok=True)
    told = {"OF": rival, "FOLDER": folder, "URL": args.url, "KEYED_URL": args.keyed_url, "MODEL": args.model, "REPORT": report}
    told["TOKENIZER"] = args.tokenizer
    env = {**os.environ, **{f"RIVALS_{name}": str(value) for name, value in told.items()}, "PYTHONPATH": str(Path(__file__).parent)}
    root = args.vllm.resolve() if rival == "vLLM" else folder
    options = [
        "-q",
        "--import-mode=importlib",
        "-p",
        "rivals",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
    ]
    options += ["--confcutdir", str(folder), "--rootdir", str(root), *(["--noconftest"] if rival == "llama.cpp" else [])]
    subprocess.run([sys.executable, "-m", "pytest", *options, *map(str, files)], env=env, cwd=report.parent, stdout=sys.stderr, check=False)
    return [json.loads(line) for line in report.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", type=Path, help="folder with llama.cpp's sources")
    parser.add_argument("--vllm", type=Path, help="folder with vLLM's sources")
    parser.add_argument("--url", default="http://127.0.0.1:8711", help="of a server that asks for no key")
    parser.add_argument("--keyed-url", default="http://127.0.0.1:8712", help="of one with the key of llama.cpp's tests")
    parser.add_argument("--model", default="cria")
    parser.add_argument("--tokenizer", default="", help="folder with the model's tokenizer, for transformers")
    parser.add_argument("--report-folder", default="/tmp", help="for what the tests said, a line each")
    args = parser.parse_args()
    if args.llamacpp:
        folder = (args.llamacpp / "tools/server/tests").resolve()
        show("llama.cpp", run("llama.cpp", folder, [folder / f"unit/test_{name}.py" for name in LLAMACPP], args))
    if args.vllm:
        folder = (args.vllm / "tests/entrypoints").resolve()
        show("vLLM", run("vLLM", folder, [folder / name for name in VLLM], args))


def reason(line: dict[str, str]) -> str:
    said = f"{line['test']} {line['why']}"
    return next((why for pattern, why in REASONS.items() if re.search(pattern, said)), f"NEW: {line['why']}")


def show(rival: str, lines: Sequence[dict[str, str]]) -> None:
    passed = [line for line in lines if line["outcome"] == "passed"]
    print(f"\n## {rival}: {len(passed)} of {len(lines)} pass\n\n| test | | why not |\n|---|---|---|")
    for line in lines:
        name = line["test"].replace("|", "/")
        why = "" if line in passed else reason(line)
        print(f"| {name} | {line['outcome']} | {why} |")


if __name__ == "__main__":
    main()
