"""The app, assembled from explicit inputs, and the server that runs it.

`bind` comes first and takes the port before a model is loaded, so that a port in use costs a moment and not minutes:

    listener = bind(config)
    backend = ...
    run(make_app(backend, config), listener, config, ready=print)
"""

import asyncio
import errno
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from herd.chat import Backend, EmbeddingBackend, TextBackend
from herd.errors import HerdError, ResourceError, nearest
from herd.serve.access.hosts import Hosts
from herd.serve.access.keys import Guard, KeyFile, KeyRefused
from herd.serve.access.limits import Limits
from herd.serve.access.room import Room
from herd.serve.api import add_openai_routes
from herd.serve.batches.files import BATCHES_TABLE, FILES_TABLE, Files, add_files
from herd.serve.batches.jobs import Batches, add_batches
from herd.serve.completions import add_completions
from herd.serve.config import ServeConfig
from herd.serve.connection import Door
from herd.serve.embeddings import add_embeddings
from herd.serve.errors import RequestError, error_reply, shown
from herd.serve.fetch import Fetcher
from herd.serve.messages import add_messages
from herd.serve.metrics import Metrics
from herd.serve.page import add_page
from herd.serve.protocol import Protocol
from herd.serve.responses.routes import add_responses
from herd.serve.responses.store import TABLES as RESPONSES
from herd.serve.store import Store
from herd.serve.tokens import add_tokens

if TYPE_CHECKING:
    from herd.engine.stats import Stats


TABLES: tuple[str, ...] = (*RESPONSES, FILES_TABLE, BATCHES_TABLE)  # of all that keep something in the store
OPEN = frozenset({"/", "/web/{name}", "/health", "/ready"})  # routes that ask for no key: the page asks its reader


def make_app(
    backend: Backend,
    config: ServeConfig,
    *,
    is_healthy: Callable[[], bool] = lambda: True,
    states: Callable[[], Mapping[str, str]] = dict,
    stats: "Callable[[], Mapping[str, Stats | None]]" = dict,
    fetcher: Fetcher | None = None,
    store: Store | None = None,
) -> FastAPI:
    """OpenAI's API over a backend, and the chat page.

    is_healthy: whether the backend still answers; when it says no, so does /health, and a supervisor may start the server anew.
    states: of models that come and go, by name, which /health tells too.
    stats: of the engines, by model, for /metrics.
    fetcher: of images by address; none: as the config says.
    store: what `open_store` gives, for who opens it before he loads models; it is closed with the app.
    """
    metrics = Metrics(stats)
    store = store or open_store(config)
    guard = Guard(config.api_key, KeyFile(config.keys_file) if config.keys_file else None)
    hosts = Hosts(config.host, config.allow_host, is_open=guard.is_open)
    limits = Limits(config.requests_per_minute, config.tokens_per_minute)

    async def admit(request: Request) -> None:
        """Of every route but the open ones."""
        if request.scope["route"].path not in OPEN:
            headers, address = request.headers, request.client.host if request.client else ""
            hosts.check(headers.get("host"))
            key = guard.admit(headers.get("authorization", ""), headers.get("x-api-key", ""), address)
            request.state.caller = key.words if key else ()
            own = (key.requests_per_minute, key.tokens_per_minute) if key else ()
            if request.method == "POST" and (meter := limits.meter(request.state.caller, *own)):
                request.state.meter = meter
                meter.begin()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batches.start()
        yield
        await batches.stop()
        store.close()

    app = FastAPI(title="herd", openapi_url=None, redirect_slashes=False, dependencies=[Depends(admit)], lifespan=lifespan)
    if fetcher is None and config.image_urls:
        fetcher = Fetcher(max_bytes=config.image_url_bytes, total_s=config.image_url_s)
    app.state.fetcher, app.state.config = fetcher, config
    app.add_middleware(Door, metrics=metrics, room=Room(config.max_requests))
    if config.allow_origin:  # else a browser lets no page but the server's own read a reply
        all_ = ("*",)
        app.add_middleware(CORSMiddleware, allow_origins=config.allow_origin, allow_methods=all_, allow_headers=all_, expose_headers=all_)
    app.add_exception_handler(HerdError, _herd_error)
    app.add_exception_handler(HTTPException, _http_error)
    add_openai_routes(app, backend, config, metrics)
    add_messages(app, backend, config, metrics)
    add_responses(app, backend, config, metrics, store)
    if isinstance(backend, TextBackend):
        add_completions(app, backend, config, metrics)
        add_tokens(app, backend, config)
    if isinstance(backend, EmbeddingBackend):
        add_embeddings(app, backend, config)
    files = Files(store, config)
    batches = Batches(app, files, config, is_healthy)
    add_files(app, files)
    add_batches(app, batches, config)
    _add_probes(app, metrics, is_healthy, states)
    add_page(app)
    return app


def open_store(config: ServeConfig) -> Store:
    """The server's folder. Raises `ResourceError` where another server has it, or where it cannot be written."""
    return Store(config.data_folder, TABLES)


def _add_probes(app: FastAPI, metrics: Metrics, is_healthy: Callable[[], bool], states: Callable[[], Mapping[str, str]]) -> None:
    """What a supervisor, a load balancer and Prometheus ask."""

    @app.get("/health")
    async def health() -> JSONResponse:
        is_well, models = is_healthy(), dict(states())
        told = {"status": "ok" if is_well else "failed"} | ({"models": models} if models else {})
        return JSONResponse(told, status_code=200 if is_well else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        models = states().values()
        # a model that is not in memory answers too, after a while; where it is on its way, ask again
        status = "failed" if not is_healthy() else "loading" if models and set(models) == {"loading"} else "ready"
        return JSONResponse({"status": status}, status_code=200 if status == "ready" else 503)

    @app.get("/metrics")
    async def tell() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _herd_error(request: Request, error: Exception) -> JSONResponse:
    reply = error_reply(shown(error, request.state.request_id), request.url.path)
    if isinstance(error, KeyRefused):
        reply.headers["www-authenticate"] = "Bearer"
    return reply


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path[:200], Headers(error.headers)
    if error.status_code == 405:
        found = RequestError(405, f"{path} does not take {request.method}", f"it takes {headers.get('allow')}")
    elif error.status_code == 404:
        paths = [route.path for route in request.app.routes if isinstance(route, APIRoute)]
        found = RequestError(404, f"there is no {path}", nearest(path, paths) or f"there are: {', '.join(paths)}")
    else:
        found = RequestError(error.status_code, error.detail)
    reply = error_reply(found, request.url.path)
    reply.headers.update(headers)
    return reply


def bind(config: ServeConfig) -> socket.socket:
    """Take the port. Raises `ResourceError` when it cannot be had.

    The socket listens already, since a port that is bound alone can be taken by another: who calls before `run` waits for it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(f"port {config.port} on {config.host} is in use", "give another with --port") from error
        reason = error.strerror or str(error)
        raise ResourceError(f"cannot listen on {config.host} port {config.port}: {reason}", "give another --host or --port") from error
    # connections inherit it; asyncio sets it only on sockets made with an explicit protocol, and without it the kernel holds back a second
    # small write until the first is acknowledged: 40 ms in every reply
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """uvicorn, told how herd wants it."""

    def __init__(
        self, app: FastAPI, config: ServeConfig, ready: Callable[[str], None], stopping: Callable[[bool], None] = lambda _: None
    ) -> None:
        choices: dict[str, Any] = {
            "http": Protocol,
            "ws": "none",
            "server_header": False,
            "access_log": False,
            "log_config": None,
            "log_level": "warning",
            "timeout_keep_alive": 75,  # above what clients keep idle connections for, so that none is closed as it is used again
            "timeout_graceful_shutdown": config.drain_s,
        }
        super().__init__(uvicorn.Config(app, **choices))
        self.ready, self.stopping = ready, stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets replies end, the second tells them that they will not."""
        is_second = self.should_exit
        super().handle_exit(sig, frame)
        if is_second:
            for task in tuple(self.server_state.tasks):
                task.get_loop().call_soon_threadsafe(task.cancel)
        self.stopping(is_second)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:  # just cancelled: a moment to tell their clients
            await asyncio.wait(self.server_state.tasks, timeout=1)


def run(
    app: FastAPI,
    listener: socket.socket,
    config: ServeConfig,
    ready: Callable[[str], None],
    stopping: Callable[[bool], None] = lambda _: None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, in the main thread. Replies under way get `config.drain_s` to end; a second signal waits no longer.

    ready: called with the server's address once it answers.  stopping: called at each signal, with whether it is not the first.
    """
    # uvicorn stops in good order on both signals and then raises them again, which for SIGTERM would end the process on the spot
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            Server(app, config, ready, stopping).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
