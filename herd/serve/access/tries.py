"""Wrong keys, by the address that they come from: who guesses waits longer and longer.

Keys that herd made cannot be guessed, so they are let in whatever else comes from their address, and nobody can lock their owners out. It
is an operator's own word (`--api-key`) that may be short, and that is not even looked at for an address that has to wait.
"""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FREE = 10  # wrong keys that cost no time
MOST_S = 60.0  # the longest wait
FORGOTTEN_S = 900.0  # an address that was silent for so long begins anew
MOST_ADDRESSES = 10_000  # that are remembered, those that failed last


@dataclass(slots=True)
class _Failures:
    count: int
    last: float  # when


class Tries:
    """Who has failed how often, of late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Seconds until a key from there is looked at again; 0: now."""
        found = self._failures.get(network(address))
        if found is None or found.count < FREE:
            return 0.0
        return max(0.0, found.last + min(2.0 ** min(found.count - FREE, 10), MOST_S) - self._clock())

    def failed(self, address: str) -> None:
        """A wrong key has come from there."""
        where, now = network(address), self._clock()
        found = self._failures.pop(where, None)
        if found is None or now - found.last > FORGOTTEN_S:
            found = _Failures(0, now)
        self._failures[where] = _Failures(found.count + 1, now)
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)


def network(address: str) -> str:
    """What one client can change at will is one: the lower half of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found) >> 64 << 64, 64)))
