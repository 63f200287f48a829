"""API keys: made here, shown once, and kept only as hashes, in a file that only its owner can read.

A key is 256 random bits, so a plain SHA-256 of it can be neither guessed nor looked up, and needs no salt and no slow hash. Whether the
file exists decides whether a server asks for keys: an empty one lets nobody in, so that revoking the last key opens nothing.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from herd.errors import HerdError, UsageError, nearest
from herd.serve.access.tries import Tries

PREFIX = "hk-"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyRefused(UsageError):
    """No key, or none that is known."""

    http_status = 401
    code = "invalid_api_key"


class TooManyTries(UsageError):
    """A key from where many wrong ones came."""

    http_status = 429
    code = "rate_limit_exceeded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What is kept of a key."""

    id: str  # random, never used again: prefixes computed under a key that was revoked belong to nobody
    name: str  # for people
    sha256: str
    created: int  # seconds since 1970
    requests_per_minute: int | None = None  # None: the server's limit; 0: no limit
    tokens_per_minute: int | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What keeps its holder's prefixes and data apart from those of others."""
        return ("key", self.id)


class KeyFile:
    """The keys of one file, read again when it changes: a key that was revoked is refused by the next request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def read(self) -> list[Key]:
        """All of them. Raises `HerdError` for a file that cannot be read; a server then lets nobody in."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp != self._stamp:
                self._keys = [Key(**entry) for entry in json.loads(self.path.read_text())["keys"]]
                self._stamp = stamp
        except FileNotFoundError:
            self._stamp, self._keys = None, []
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HerdError(f"the keys in {self.path} cannot be read: {error}", "mend the file, or make new keys in another") from error
        return self._keys

    def make(self, name: str, *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> str:
        """A new key, as its user needs it. It cannot be shown again. Raises `UsageError` for a name that is taken or strange."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"a key cannot be called {name!r}", "a name has 1 to 64 of the characters A-Z a-z 0-9 . _ -", param="name")
        keys = self.read()
        if any(key.name == name for key in keys):
            raise UsageError(f"there is a key called {name!r}", f"revoke it first: herd keys revoke {name}", param="name")
        limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        for limit, value in limits.items():
            if value is not None and value < 0:
                raise UsageError(f"{limit} is {value}; it must be 0 (no limit) or more", param=limit)
        secret = PREFIX + secrets.token_urlsafe(32)
        self._write([*keys, Key(id=secrets.token_hex(8), name=name, sha256=digest(secret), created=int(time.time()), **limits)])
        return secret

    def revoke(self, name: str) -> None:
        """Let nobody in with it any more. Raises `UsageError` for a name that there is not."""
        keys = self.read()
        if name not in [key.name for key in keys]:
            hint = nearest(name, [key.name for key in keys]) or "herd keys list shows them"
            raise UsageError(f"no key is called {name!r}", hint, param="name")
        self._write([key for key in keys if key.name != name])

    def _write(self, keys: list[Key]) -> None:
        """All at once: who reads meanwhile sees the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def digest(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", errors="replace")).hexdigest()


class Guard:
    """Knows who may come in."""

    def __init__(self, api_key: str = "", file: KeyFile | None = None, tries: Tries | None = None) -> None:
        """api_key: one key that is known beforehand; "" for none.  file: more keys.  With neither, everybody may."""
        if api_key and len(api_key) < 8:
            raise UsageError("the API key has fewer than 8 characters", "herd keys make NAME makes a good one", param="api_key")
        self._own = Key(id=digest(api_key)[:16], name="api-key", sha256=digest(api_key), created=0) if api_key else None
        self._file, self._tries = file, tries or Tries()

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._own is None and self._file is None

    def admit(self, authorization: str, x_api_key: str = "", address: str = "") -> Key | None:
        """The key that a request brings; None where none is asked for. Raises `KeyRefused`, or `TooManyTries` where it was not looked at.

        authorization: the header of that name, "Bearer KEY".  x_api_key: Anthropic's clients send the key there.  address: the client's.
        """
        if self.is_open:
            return None
        kind, _, value = authorization.partition(" ")
        secret = value.strip() if kind.lower() == "bearer" else x_api_key
        if not secret:
            raise KeyRefused("there is no API key in the request", "send the header Authorization: Bearer KEY")
        wait_s = self._tries.wait_s(address)
        own = [self._own] if self._own and not wait_s else []
        sent, found = digest(secret), None
        for key in [*own, *(self._file.read() if self._file else [])]:
            if hmac.compare_digest(key.sha256, sent):  # all are compared, each in the same time
                found = key
        if found is not None:
            return found
        if wait_s:
            raise TooManyTries(
                "too many wrong API keys have come from this address", "ask again when retry-after says", retry_after_s=wait_s
            )
        self._tries.failed(address)
        raise KeyRefused("the API key is not known here", "ask the operator for one: herd keys make NAME")
