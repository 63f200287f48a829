"""How a server is run. Apart from the rest, so that a command line reads it without loading a web framework."""

from dataclasses import dataclass, field
from pathlib import Path

from herd.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The choices of one server."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in; make keys first
    api_key: str = field(default="", repr=False)  # that clients must send; HERD_API_KEY in the environment hides it from `ps`
    keys_file: Path | None = None  # where `herd keys` keeps keys; none: keys.json in herd's folder, if it exists
    port: int = 8000  # TCP port; 0 takes any free one
    data_folder: Path | None = None  # for stored responses, files and batches; none: one for the port, in herd's folder
    responses_gib: float = 1.0  # of stored responses (/v1/responses); those go first that were not used for longest; 0 stores none
    responses_days: float = 30.0  # after which a stored response goes that was not continued
    max_body_bytes: int = 64 << 20  # of one request; images travel inside it as base64
    max_file_bytes: int = 200 << 20  # of one uploaded file
    max_stored_bytes: int = 10 << 30  # of all files together; those that batches leave count, but are kept whatever there is
    max_batch_lines: int = 100_000  # requests in one batch
    batch_width: int = 8  # requests of all batches that are computed side by side
    body_s: float = 120.0  # seconds that a body may take to arrive
    allow_host: tuple[str, ...] = ()  # names by which this machine's programs may call a server that asks for no key; * for any
    allow_origin: tuple[str, ...] = ()  # origins of web pages that may use this server from a browser, such as https://example.com
    image_urls: bool = False  # fetch images by http(s) address, from public ones alone; else they come as data: URIs
    image_url_bytes: int = 20 << 20  # of one that is fetched
    image_url_s: float = 10.0  # seconds that fetching one may take
    max_requests: int = 512  # under way at once, those that wait in the queue included; more get 503 and Retry-After
    requests_per_minute: int = 0  # of each key that has no limit of its own, or of all callers where no keys are asked for; 0: no limit
    tokens_per_minute: int = 0  # the same, of tokens that are read and written; what was computed before is free
    reply_s: float = 14_400.0  # seconds that a reply may take, the wait for its turn included; in batches it may take longer
    ping_s: float = 15.0  # seconds of silence after which a stream gets a comment, so that no proxy hangs up
    stuck_s: float = 300.0  # seconds that a step may last before /health fails and those who wait for it are told
    drain_s: int = 10  # seconds that replies under way get to end when the server stops

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port}; it must lie between 0 and 65535", "give a --port in that range", param="port")
        if not self.responses_gib >= 0:
            text = f"responses_gib is {self.responses_gib}; it must not be below 0"
            raise UsageError(text, "give a larger responses_gib", param="responses_gib")
        positive = ("responses_days", "max_body_bytes", "max_file_bytes", "max_stored_bytes", "max_batch_lines", "batch_width", "body_s")
        for name in (*positive, "image_url_bytes", "image_url_s", "max_requests", "reply_s", "ping_s", "stuck_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be above 0", f"give a larger {name}", param=name)
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 0 (no limit) or more", param=name)
