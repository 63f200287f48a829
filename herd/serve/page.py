"""The chat page at "/": a few static files, read once, which talk to the API of this server as any client does.

A reply is text from outside, so the page may run its own scripts alone: the policy below allows none from a reply or from elsewhere, and
`require-trusted-types-for` makes the browser refuse every place where text could become HTML. Only files that lie in `web` at the start
can be had, by name: there is no path to walk out of.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).parent / "web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for again: after an upgrade nobody runs half of the old page
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def add_page(app: FastAPI) -> None:
    """The page at "/" and its files under /web/."""
    files = {path.name: path.read_bytes() for path in sorted(WEB.iterdir()) if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in files.items()}

    def reply(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404)
        headers = {**HEADERS, "etag": tags[name]}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if tags[name] in known:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=f"{TYPES[Path(name).suffix]}; charset=utf-8", headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return reply("index.html", request)

    @app.api_route("/web/{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        return reply(name, request)
