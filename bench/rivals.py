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

# a test and what it fails with -> why herd does not do as it wants; so a test that fails otherwise than it did is new
REASONS = {
    r"multiple_addresses.*all\(\[None": "a list of addresses in --host, and a key of this test's own; herd listens at one address",
    r"server_props.*404": "/props: llama.cpp's route. The context is in /v1/models, slots do not exist",
    r"server_slots.*404": "/slots: llama.cpp's route; what runs is told by /metrics",
    r"load_split.*404": "a model of its own, in pieces, and /completion, llama.cpp's route",
    r"no_ui.*200 == 404": "a server started with --no-ui, which herd does not have: its page is always there",
    r"aliases_and_tags.*aliases": "aliases and tags that its command line gives a model; herd has one name for each",
    r"cached_tokens.*== 77": "how many tokens its own tokenizer and template make of a prompt",
    r"::test_chat_completion_stream\[.*'' is None|test_logprobs_stream.*'' is None|STREAMED.*Expected non empty": 'the first chunk has content "", as OpenAI\'s own has; llama.cpp has null. Passes when that is changed',  # noqa: E501
    r"with_openai_library.*system_fingerprint|with_openai_library.*herd-": "a fingerprint that begins with llama.cpp's \"b\"; herd's names herd and its version",  # noqa: E501
    r"::test_chat_template .*__verbose|test_verbose_debug.*400": "the prompt under __verbose, llama.cpp's debugging, of a template that the test gives; /tokenize with messages tells herd's",  # noqa: E501
    r"assistant_prefill.*__verbose": "the prompt under __verbose. llama.cpp goes on within a last message of the assistant; OpenAI begins a new one, and so does herd",  # noqa: E501
    r"continue_final_message_vllm.*400": "continue_final_message, and the prompt under __verbose. herd does not go on within a message of the assistant, and says so",  # noqa: E501
    r"(apply_chat_template|thinking_history_in_template).*404": "/apply-template: llama.cpp's route, with another model's template",
    r"response_format2.*400": "json_schema without a name, which OpenAI answers with a 400 too",
    r"completion_req\[messages7.*200": "wants two messages of the assistant in turn refused; OpenAI takes them, and so does herd",
    r"with_timings_per_token.*timings_per_token": "timings_per_token; `timings: true` adds the same object once, at the end",
    r"llama_telemetry.*timings_per_token": "timings_per_token and return_progress in /v1/responses, which has `timings` alone",
    r"test_chat_completion::test_logit_bias.*400": "/tokenize in llama.cpp's form (content). Passes when that is changed to vLLM's (prompt), which herd has",  # noqa: E501
    r"context_size_exceeded.*(200 == 400|Should have failed)": "its 100 turns fit into this server's context. One that is too long is a 400 with OpenAI's code, context_length_exceeded",  # noqa: E501
    r"return_progress\[.*None": "steps of 64 tokens (its -b); here the prompt is read in one step, and progress is told between steps",
    r"multiple_choices.*400": "id_slot 0: a place in llama.cpp's table. Passes without it",
    r"completions_token_count.*404": "/chat/completions/input_tokens: llama.cpp's route; /tokenize and Anthropic's count_tokens tell it",
    r"tool_result_with_text.*400": "a text before a tool_result, which Anthropic answers with a 400 too",
    r"tool_result_with_image.*400 == 500": "wants 500 with llama.cpp's words; herd says 400: it takes text alone from tools, which Llama 4's template writes as JSON",  # noqa: E501
    r"vision_format_accepted.*400 == 500": "wants 500 of a model that reads no images; it is a 400 here, since sending it again does not help",  # noqa: E501
    r"vision_base64.*huggingface": "fetches an image from huggingface.co, which this machine did not reach; Cria reads none",
    r"empty_messages.*400": "no messages at all, which Anthropic answers with a 400 too",
    r"test_anthropic_thinking .*400": "thinking: enabled. Llama 4 does not think, and herd says so rather than ignore it",
    r"thinking_history_in_count_tokens.*thinking": "thinking blocks of another model in the history, for which Llama 4 has no place",
    r"static_assets.*sw.js": "/sw.js, a file of llama.cpp's page; herd's page (/) asks for no key either",
    r"incorrect_api_key.*authentication_error": "type authentication_error; OpenAI has invalid_request_error with code invalid_api_key. The 401 is there",  # noqa: E501
    r"test_correct_api_key.*'content' in": "the key is let in; then wants the reply under content, llama.cpp's form, where OpenAI's has choices",  # noqa: E501
    r"cors_options.*405": "llama.cpp lets any origin in, with credentials, unless told otherwise; herd lets in those of --allow-origin, none here",  # noqa: E501
    r"cors_origins_(localhost_rejects|defaults).*400 == 200": "a preflight of a foreign origin is a 400 without the header, not a 200 without it; browsers refuse both",  # noqa: E501
    r"cors_proxy.*404": "/cors-proxy: llama.cpp's route",
    r"local_media_file.*400 == 200": "file: addresses in a folder of --media-path; herd reads no file that a client names",
    r"test_stream::.*resume_and_stop.*404": "/v1/stream: llama.cpp's route, which takes up a stream again",
    r"test_stream::.*StopIteration": "a router with a model of its own, whose states are in /models; herd tells them by /health",
    r"test_tokenize::.*400": "/tokenize in llama.cpp's form (content, add_special, with_pieces); herd has vLLM's (prompt)",
    r"prompt_logprobs.*prompt_logprobs is": "prompt_logprobs: vLLM's field; herd tells no log-probabilities of prompts",
    r"prompt_logprobs_.*no attribute": "a null prompt_logprobs in a reply that was not asked for any: vLLM's field",
    r"single_completion.*no attribute 'prompt_logprobs'": "all is as it wants, to its last line: a null prompt_logprobs in the reply, vLLM's field",  # noqa: E501
    r"single_chat_session.*CompletionUsa": "how many tokens its own tokenizer makes of the prompt, and no prompt_tokens_details, which OpenAI's replies have",  # noqa: E501
    r"test_chat_streaming.*ChoiceDelta": "text in the chunk that has finish_reason; OpenAI's has none, nor has herd's",
    r"test_chat_completion_stream_options.*min_tokens": "min_tokens and continuous_usage_stats: vLLM's fields. What it wants of include_usage is as it wants it",  # noqa: E501
    r"structured_outputs_(json|choice|regex)_chat.*(Unterminated|!=)": "what the weights say: replies keep to their format, but Cria (135M) says the same again, or a string without end",  # noqa: E501
    r"named_tool_use.*Unterminated": "what the weights say: the function is called, and Cria (135M) writes a string of its arguments without end",  # noqa: E501
    r"structured_output .*Unterminated": "what the weights say: the reply keeps to the schema, and Cria (135M) writes a string of it without end",  # noqa: E501
    r"extra_field.*unknown field": "wants a message's field that nobody knows taken; herd names it, since it could be a slip",
    r"complex_message_content.*== '2'": 'what the weights say: "1 + 1 = 2" where it wants "2"',
    r"custom_role.*my-custom-role": "a role that nobody knows, which OpenAI answers with a 400 too; Llama 4 was trained with its own",
    r"long_seed.*seed is": "refused with a 400 as it wants, in other words than pydantic's (greater_than_equal)",
    r"test_invocations.*404": "/invocations: the route of Amazon's SageMaker",
    r"kv_transfer.*return_token_ids": "kv_transfer_params and return_token_ids, by which parts of vLLM on several machines talk",
    r"per_request_metrics.*min_tokens": "min_tokens, and vLLM's metrics in the reply; herd has llama.cpp's `timings: true`",
    r"tool_use\[plain-True.*enable_thinking": "chat_template_kwargs: enable_thinking true. Llama 4 does not think; false is taken",
    r"tool_use\[plain-False-auto.*(0 > 0|is not None)": "what the weights say: with tool_choice auto Cria (135M) answers itself; required and named functions pass",  # noqa: E501
    r"truncation_side.*return_token_ids": "return_token_ids, truncate_prompt_tokens and truncation_side: vLLM's fields",
    r"logprob_token_ids.*logprob_token_ids": "logprob_token_ids and allowed_token_ids: vLLM's fields",
    r"test_completion_streaming.*'stop' == 'length'": "what the weights say: Cria's reply ends before the limit",
    r"parallel_streaming.*51 <= 50": "at most max_tokens chunks; herd has one more, for finish_reason alone, as OpenAI has",
    r"stream_options.*continuous_usage_stats": "continuous_usage_stats: vLLM's field, in every chunk; OpenAI's include_usage is there",
    r"batch_completions.*use_beam_search": "use_beam_search: vLLM's field; the batch before it is as it wants",
    r"echo_logprob.*those of a prompt": "echo with logprobs, of OpenAI's older API: herd tells no log-probabilities of prompts",
    r"empty_prompt.*prompt_embeds": "prompt_embeds, vLLM's field: a 400 as it wants, in other words",
    r"out_of_vocab.*not in the vocabulary": 'a 400 as it wants, in other words: "not in the vocabulary" where it looks for "out of vocabulary"',  # noqa: E501
    r"check_models.*cria": "the name of its model, and an adapter beside it",
    r"anthropic_tool_call .*'end_turn'": "what the weights say: Cria (135M) answers without a call",
    r"cache_usage.*== 0": "no token cached at first, though the beginning is every prompt's; and tokens as written to a cache that nobody asked for by cache_control",  # noqa: E501
    r"show_version.*404": "/version: vLLM's route",
    r"request_cancellation.*min_tokens": "min_tokens, and 10,000 tokens where 8,192 fit. With ignore_eos and 8,000 it passes: 200 replies are left, the next comes in 0.14 s",  # noqa: E501
    r"test_server_load.*404": "/load: vLLM's route; /metrics tells what runs",
    r"test_tokenize_chat.*400": "add_generation_prompt false and continue_final_message: /tokenize tells the prompt that the model reads, which ends with the reply's header",  # noqa: E501
    r"return_token_strs.*' is": 'pieces as byte-level BPE spells them (\u0120is); herd tells the text that they stand for (" is")',
    r"tokenizer_info.*404": "/tokenizer_info: vLLM's route",
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
