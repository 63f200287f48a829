"""Make, list and revoke the API keys of `herd serve`. They are kept as hashes, so a key is shown once, when it is made."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from herd.checkpoint.store import home
from herd.errors import UsageError
from herd.serve.access.keys import Key, KeyFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """A server asks for keys when their file exists; it reads changes without a restart."""

    action: Positional[Literal["make", "list", "revoke"]] = "list"
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""  # whose key it is
    requests_per_minute: int | None = None  # that the new key may send; none: the server's limit; 0: no limit
    tokens_per_minute: int | None = None  # that its requests and their replies may have; none: the server's limit; 0: no limit
    keys_file: Path | None = None  # where they are kept; none: keys.json in herd's folder


def default_file() -> Path:
    """Where keys are kept unless told otherwise."""
    return home() / "keys.json"


def run(options: Options) -> int:
    file = KeyFile(options.keys_file or default_file())
    if options.action != "list" and not options.name:
        raise UsageError(f"herd keys {options.action} needs a name", f"herd keys {options.action} NAME")
    limits = {"requests_per_minute": options.requests_per_minute, "tokens_per_minute": options.tokens_per_minute}
    if options.action != "make" and any(limit is not None for limit in limits.values()):
        raise UsageError("a key gets its limits when it is made", "revoke it and make it anew")
    match options.action:
        case "make":
            print(file.make(options.name, **limits))
        case "revoke":
            file.revoke(options.name)
        case "list":
            for key in file.read():
                print(f"{key.name:<24} made {datetime.fromtimestamp(key.created, UTC):%Y-%m-%d %H:%M} UTC{_limits(key)}")
    return 0


def _limits(key: Key) -> str:
    limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
    told = [f"{limit or 'any number of'} {kind}" for kind, limit in limits.items() if limit is not None]
    return f", {' and '.join(told)} per minute" if told else ""
