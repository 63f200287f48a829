"""The names by which a server may be called.

A browser lets a page talk to the server that it came from. So a page of evil.example, whose owner lets that name mean 127.0.0.1 once the
page is there (DNS rebinding), could talk to a server on its reader's own machine as if that were evil.example. What it cannot do is call
the server by another name: `Host` says evil.example. Where a key is asked for, the page has none, and any name will do.
"""

import ipaddress
from collections.abc import Sequence

from herd.serve.errors import RequestError

PRIVATE = (".localhost", ".local", ".internal")  # ends of names that nobody can register


class Hosts:
    """Which requests' `Host` is right."""

    def __init__(self, address: str, allowed: Sequence[str], *, is_open: bool) -> None:
        """address: that the server listens on; one that other machines reach may have any name.  allowed: more names; "*" for all.

        is_open: whether no key is asked for.
        """
        self._allowed = {name.lower() for name in allowed}
        self._are_all = not is_open or not _is_loopback(address) or "*" in allowed

    def check(self, host: str | None) -> None:
        """Raises `RequestError`. host: the header; programs that are not browsers may send none."""
        name = _name(host or "").lower()
        if self._are_all or "." not in name or _is_address(name) or name.endswith(PRIVATE) or name in self._allowed:
            return
        hint = f"call it by its address, start it with --allow-host {name:.100}, or make a key with `herd keys`"
        raise RequestError(403, f"{name[:100]!r} is none of this server's names", hint)


def _name(host: str) -> str:
    """Without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback if _is_address(address) else address == "localhost"
