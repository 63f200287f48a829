"""How a failure is told to a client: OpenAI's error object, and never a traceback."""

import errno
import math
import sqlite3
from typing import Any

from fastapi.responses import JSONResponse

from herd.errors import BusyError, HerdError, ResourceError, UsageError
from herd.log import log


class RequestError(UsageError):
    """A request that fails before its fields are looked at: no such path, not JSON, too large."""

    def __init__(self, http_status: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.http_status = http_status


class ReplyTooLate(ResourceError):
    """A reply that was not done in its time. The same request would take as long again, so clients are told not to send it."""

    http_status = 504
    code = "timeout"


def shown(error: Exception, request_id: str) -> HerdError:
    """What a client is told of a failure. What is the server's fault is logged, with the traceback where nobody foresaw it."""
    if not isinstance(error, HerdError):
        if is_locked(error):
            log.error("request %s failed: another program has locked the server's database", request_id)
            hint = "send it again; what else opens the server's data folder should let go of it"
            return BusyError("another program has locked the server's database", hint, retry_after_s=1)
        log.error("request %s failed", request_id, exc_info=error)
        if _is_of_the_disk(error):
            return ResourceError("the server's disk is full or fails", f"make room on it; its log has more under request id {request_id}")
        return HerdError("the server failed on this request", f"its log has the reason under request id {request_id}")
    if error.http_status >= 500 and not isinstance(error, BusyError):  # which comes by the thousand
        log.error("request %s failed: %s", request_id, " ".join(error.message.split()))
    return error


def is_locked(error: Exception) -> bool:
    """Whether another program uses a database at this moment."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it says more
    return isinstance(error, sqlite3.OperationalError) and code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a file or the database could not be written or read, and not for a fault of herd's own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)  # their other kinds are bugs


def error_object(error: HerdError, path: str = "") -> dict[str, Any]:
    """OpenAI's error object, or Anthropic's under /v1/messages; clients show `message`, so the hint goes there."""
    message = f"{error.message}. Hint: {error.hint}" if error.hint else error.message
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(error.http_status, "api_error" if error.http_status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"message": message, "type": error.kind, "param": error.param, "code": error.code}}


_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_reply(error: HerdError, path: str = "") -> JSONResponse:
    """The whole reply to a request that failed."""
    return JSONResponse(error_object(error, path), status_code=error.http_status, headers=retry_headers(error))


def retry_headers(error: HerdError) -> dict[str, str]:
    """When to ask again: HTTP's header in whole seconds, and the one that OpenAI's and Anthropic's clients read before it."""
    seconds = error.retry_after_s
    if isinstance(error, ReplyTooLate):
        return {"x-should-retry": "false"}
    if seconds is None:
        return {}
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000)), "x-should-retry": "true"}
