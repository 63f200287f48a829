"""The errors that herd shows to people: what is wrong, the value, the limit, and a hint of what to do.

The command line prints them as two lines and exits with `exit_code`; the server answers `http_status` with OpenAI's error object;
library users catch the one base class. What only a bug in herd can break is an `assert`, not one of these.
"""

import difflib
from collections.abc import Iterable


class HerdError(Exception):
    """Base of every error that herd raises on purpose.

    message: what is wrong, with the value and the limit.  hint: what to do about it.
    """

    exit_code = 1
    http_status = 500
    kind = "server_error"  # OpenAI's error `type`
    code: str | None = None  # OpenAI's error `code`

    def __init__(self, message: str, hint: str = "", *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param  # the request field at fault, where there is one
        self.retry_after_s = retry_after_s  # seconds after which to ask again, where that may help

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(HerdError):
    """The caller asked for something that does not exist or cannot be: a flag, a field, a value out of range."""

    exit_code = 2
    http_status = 400
    kind = "invalid_request_error"


class PromptError(UsageError):
    """A message that cannot be rendered: no messages, an unknown role, a broken image."""


class ContextError(UsageError):
    """A prompt that is longer than the context."""

    code = "context_length_exceeded"


class ModelNotFound(UsageError):
    """A model name or path that leads nowhere."""

    http_status = 404
    code = "model_not_found"


class CheckpointError(HerdError):
    """A checkpoint that is broken, incomplete or of an unknown kind."""


class ResourceError(HerdError):
    """The machine cannot do it: disk full, port taken, no memory, download failed."""

    http_status = 503


class BusyError(ResourceError):
    """There is too much to do just now."""

    code = "server_busy"


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name most like `name` as a phrase for a hint, or "" when nothing is like it."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else ""
