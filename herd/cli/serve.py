"""Serve models over OpenAI's API. Only this machine can reach it unless --host says otherwise."""

import os
import resource
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from herd.checkpoint.store import home
from herd.cli.keys import default_file
from herd.engine.config import EngineConfig
from herd.engine.local import Local, load
from herd.engine.opening import short_name
from herd.engine.trace import TraceFile
from herd.errors import UsageError
from herd.serve.config import ServeConfig

GREETING = """
herd serves {names} at {url}/v1, with a page to chat at {url}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "{first}",
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  reply = client.chat.completions.create(model="{first}", messages=[{{"role": "user", "content": "What is the capital of France?"}}])
  print(reply.choices[0].message.content)

Ctrl-C stops it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Requests choose among several models by name. Each has an engine of its own, with --kv-gib of its own; they share --threads."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="[MODEL ...]")] = ("cria",)  # paths to checkpoints, or names
    idle_s: float = 0.0  # seconds without a request after which a model leaves memory; the next one waits while it loads; 0: never
    lazy: FlagCreatePairsOff[bool] = False  # load a model at its first request, not at the start; checkpoints are checked at the start
    serve: ServeConfig = field(default_factory=ServeConfig)
    trace: Path | None = None  # file for what every step did, to be opened in ui.perfetto.dev
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(options: Options) -> int:
    try:
        from herd.serve.app import bind, make_app, open_store
        from herd.serve.app import run as run_server
    except ModuleNotFoundError as error:
        raise UsageError(f"the server needs {error.name}, which is not installed", "pip install 'herd-llm[serve]'") from error

    config = _with_keys(options.serve)
    # by the port, so that it is there again after a restart, and that two servers do not meet; a port of chance has nothing to find again
    config = replace(config, data_folder=config.data_folder or (home() / "serve" / str(config.port) if config.port else None))
    served = [short_name(name) for name in options.models]
    if len(set(served)) < len(served):
        raise UsageError(f"two models would be served under one name: {', '.join(served)}", "rename a folder")
    _allow_many_files()
    listener, store = bind(config), open_store(config)  # before the models: a port or a folder that is taken should cost a moment
    trace = TraceFile(options.trace) if options.trace else None
    loaded = partial(load, config=options.engine, idle_s=options.idle_s, lazy=options.lazy, trace=trace)
    backend = Local([loaded(name) for name in options.models], stuck_s=config.stuck_s)
    names = backend.models()
    comes_and_goes = len(names) > 1 or options.lazy or options.idle_s > 0

    def ready(url: str) -> None:
        print(GREETING.format(names=", ".join(names), first=names[0], url=url), flush=True)
        if config.api_key or config.keys_file:
            where = f"; `herd keys` in {config.keys_file}" if config.keys_file else ""
            print(
                f"It asks for an API key: put yours in place of \"none\", and give curl -H 'Authorization: Bearer KEY'{where}.", flush=True
            )

    states = backend.states if comes_and_goes else dict[str, str]
    app = make_app(backend, config, is_healthy=backend.is_healthy, states=states, stats=backend.stats, store=store)
    run_server(app, listener, config, ready, lambda is_second: _end_within(2 if is_second else config.drain_s + 4, int(is_second)))
    return 0


def _end_within(seconds: float, code: int) -> None:
    """End the process by then, whatever it does: a thread that is inside a kernel, a driver or a disk cannot be ended by itself."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _with_keys(config: ServeConfig) -> ServeConfig:
    """The config with the keys of the environment and of herd's folder. Raises `UsageError` for a file that was named and is not there."""
    file = config.keys_file
    if file is not None and not file.exists():
        raise UsageError(f"there is no file of keys {file}", f"herd keys make NAME --keys-file {file}", param="keys_file")
    if file is None and default_file().exists():
        file = default_file()
    return replace(config, api_key=config.api_key or os.environ.get("HERD_API_KEY", ""), keys_file=file)


def _allow_many_files() -> None:
    """As many as the system lets this process ask for: each connection is one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
