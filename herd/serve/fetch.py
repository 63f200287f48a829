"""Images by address, where the operator has switched that on (`--image-urls`).

Who makes a server read an address reads what only that server can reach: a router, a database, a cloud's credentials. So the host is
resolved once, everything that it resolves to must be public, and the connection goes to an address that was looked at, whatever the name
means a moment later. A redirect begins anew. The odd ways to write an address (decimal, octal, hex) need no care: they are resolved like
names, and what comes out is looked at. httpcore2 is used without the client on top of it: no proxies from the environment, no cookies, no
decompression, no redirects but those below.

Source of the networks: IANA's special-purpose address registries.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore2
from fastapi import Request
from pydantic import BaseModel

from herd.chat import Image
from herd.errors import PromptError
from herd.serve.connection import while_connected

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

PORTS = (80, 443)
MOST_REDIRECTS = 3
MOST_AT_ONCE = 8  # of one server
_REDIRECTS = (301, 302, 303, 307, 308)
_ODD = re.compile(r"[\x00-\x20\x7f\\]")
_HINT = "send the image inside the request, as a data: URI such as data:image/png;base64,iVBOR..."
# what `is_global` of some version of Python lets through, or what leads to an IPv4 address inside
_CLOSED = [ip_network(text) for text in ("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "224.0.0.0/3")]
_CLOSED += [ip_network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
_OPEN_V6 = ip_network("2000::/3")  # all that is routed: not ::ffff:0:0/96, 64:ff9b::/96, fc00::/7, fe80::/10, ff00::/8


def is_public(address: Address, port: int) -> bool:
    """Whether anybody on the internet could ask the same."""
    is_routed = address.is_global and (address.version == 4 or address in _OPEN_V6)
    return port in PORTS and is_routed and not any(address in network for network in _CLOSED if network.version == address.version)


def is_address(uri: str) -> bool:
    """Whether that is an address on the web, and not the image itself."""
    return uri[:8].lower().startswith(("http://", "https://"))


class Fetcher:
    """Fetches images. Refuses all else, with a `PromptError` that says what and names the field."""

    def __init__(
        self,
        *,
        max_bytes: int,
        total_s: float,
        is_allowed: Callable[[Address, int], bool] = is_public,
        resolve: Resolve | None = None,
    ) -> None:
        """max_bytes: of one image.  total_s: for one image, redirects included.  is_allowed: an address and a port.  resolve: a name."""
        self.max_bytes, self.total_s = max_bytes, total_s
        self._is_allowed, self._resolve = is_allowed, resolve or self._ask
        self._at_once = asyncio.Semaphore(MOST_AT_ONCE)
        self._resolving = ThreadPoolExecutor(4, thread_name_prefix="herd-resolve")  # of its own: a slow resolver holds up nothing else

    async def fetch(self, url: str, param: str) -> Image:
        """The image there."""
        try:
            async with self._at_once, asyncio.timeout(self.total_s):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._get(url)
                    if isinstance(found, bytes):
                        return Image(data=found)
                    url = urljoin(url, found)
            raise PromptError(f"there are more than {MOST_REDIRECTS} redirects")
        except TimeoutError as error:
            raise PromptError(f"the image did not come within {self.total_s:g} s", _HINT, param=param) from error
        except PromptError as error:
            raise PromptError(f"the image cannot be fetched: {error.message}", error.hint or _HINT, param=param) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError, ValueError) as error:
            raise PromptError("the image cannot be fetched: its server does not answer as it should", _HINT, param=param) from error

    async def _get(self, url: str) -> bytes | str:
        """The body, or where it is said to be."""
        target = _parsed(url)
        pool = httpcore2.AsyncConnectionPool(network_backend=_Pinned(await self._addresses(target)), max_connections=1)
        headers: dict[bytes | str, bytes | str] = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "herd"}
        async with pool, pool.stream("GET", target, headers=headers) as reply:
            told = {name.lower(): value.decode("latin-1") for name, value in reply.headers}
            if reply.status in _REDIRECTS and b"location" in told:
                return told[b"location"]
            if reply.status != 200:
                raise PromptError(f"its server answered {reply.status}")
            self._check_headers(told)
            body = bytearray()
            async for piece in reply.aiter_stream():
                body += piece
                self._check_size(len(body))
            return bytes(body)

    def _check_headers(self, told: Mapping[bytes, str]) -> None:
        kind = told.get(b"content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/"):
            raise PromptError(f"what is there has the type {kind[:60]!r}, which is no image")
        if told.get(b"content-encoding", "identity").lower() != "identity":
            raise PromptError("its server compressed it, unasked")
        length = told.get(b"content-length", "0")
        self._check_size(int(length) if length.isdecimal() else 0)

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise PromptError(f"it is larger than {self.max_bytes:,} bytes, the limit", "send a smaller one")

    async def _addresses(self, target: httpcore2.URL) -> list[str]:
        """What the host resolves to, once, all of it allowed."""
        host, port = target.host.decode(), target.origin.port
        found = await self._resolve(host.strip("[]"), port)
        if not found:
            raise PromptError("its host is not known")
        if not all(self._is_allowed(ip_address(address), port) for address in found):
            raise PromptError("its host or port is not public", "herd fetches from public addresses alone, on ports 80 and 443")
        return found

    async def _ask(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._resolving, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _parsed(url: str) -> httpcore2.URL:
    """The one reading of an address: what is looked at is what is asked for."""
    if _ODD.search(url) or len(url) > 8192:
        raise PromptError("its address holds spaces, control characters or backslashes, or is too long")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise PromptError(f"its address is one of {parts.scheme[:20]!r}, not of http or https")
    if "@" in parts.netloc:
        raise PromptError("its address holds a user or a password")
    host = (parts.hostname or "").encode("idna").decode()
    if not host or "%" in host:
        raise PromptError("its address has no host")
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="%/:=&?~+!$,;'@()*[]-._")
    return httpcore2.URL(scheme=parts.scheme, host=f"[{host}]" if ":" in host else host, port=parts.port, target=path)


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that were looked at, whatever the name is. TLS still checks the certificate against the name."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses, self._network = addresses, httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        del host
        for address in self._addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, 2.0, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._network.connect_tcp(self._addresses[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        del path, timeout, socket_options
        raise PromptError("its address is a file of this machine")


def addresses(form: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The images of a body that are addresses, each with its place. Plain dicts are not looked into: they are schemas and arguments."""
    if isinstance(form, BaseModel):
        for name in type(form).model_fields:
            value, place = getattr(form, name), f"{where}.{name}" if where else name
            if name in ("url", "image_url") and isinstance(value, str):
                if is_address(value):
                    yield value, place
            else:
                yield from addresses(value, place)
    elif isinstance(form, list):
        for i, value in enumerate(form):
            yield from addresses(value, f"{where}.{i}")


async def fetched(request: Request, form: BaseModel) -> Mapping[str, Image]:
    """The images of a body that are addresses, by address; none where that is not switched on. Stops when the client goes away.

    Raises `PromptError`.
    """
    fetcher: Fetcher | None = request.app.state.fetcher
    wanted = dict(addresses(form))
    if fetcher is None or not wanted:
        return {}
    room = request.app.state.config.max_body_bytes

    async def fetch_all() -> dict[str, Image]:
        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(fetcher.fetch(url, place)) for url, place in wanted.items()}
        return {url: task.result() for url, task in tasks.items()}

    try:
        images = await while_connected(request.receive, fetch_all())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    if sum(len(image.data) for image in images.values()) > room:
        raise PromptError(f"the images have more than {room:,} bytes together, the limit of a body", "send fewer or smaller ones")
    return images
