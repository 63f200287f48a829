"""Limits of requests and tokens per minute, by key. Where no keys are asked for, all share one account.

Each is a bucket: it holds a minute's worth, a request takes from it, and it fills up steadily. What a reply costs is known at its end, so
an estimate is taken at the door and put right then. Real usage may leave less than nothing, and who comes next waits for that too. Tokens
of a prompt that were computed before cost nothing, as at Anthropic.

Source of the headers: OpenAI's guide to rate limits, and `_base_client.py` of openai 3.54, which obeys retry-after-ms before retry-after.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from herd.errors import UsageError

CHARS_PER_TOKEN = 4  # of English text, about
IMAGE_TOKENS = 1_000  # of an image: some tiles
IMAGES = ("url", "data", "image_url", "file_data")  # fields that hold one


class RateLimited(UsageError):
    """A caller who has used up what he may."""

    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, kind: str, limit: int, wait_s: float) -> None:
        super().__init__(f"{limit:,} {kind} per minute are used up", "ask again when retry-after says", retry_after_s=max(wait_s, 0.001))
        self.kind = kind


class Bucket:
    """What may be used of something in a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._filled = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What is left; below 0 where more was used than was there."""
        now = self._clock()
        self._level = min(self._level + (now - self._filled) * self.per_minute / 60, self.per_minute)
        self._filled = now
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there, a whole bucket for what is larger than that."""
        return max(0.0, (min(amount, self.per_minute) - self.level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Use it. Less than nothing gives back."""
        self._level = min(self.level - amount, self.per_minute)


class Account:
    """The buckets of one caller, by what is counted; none for what has no limit."""

    def __init__(self, limits: Mapping[str, int], clock: Callable[[], float]) -> None:
        self.limits = dict(limits)
        self._buckets = {kind: Bucket(limit, clock) for kind, limit in limits.items() if limit}

    def charge(self, kind: str, amount: float) -> None:
        """Raises `RateLimited`, and takes nothing, where it is not there."""
        bucket = self._buckets.get(kind)
        if bucket is None:
            return
        if wait_s := bucket.wait_s(amount):
            raise RateLimited(kind, bucket.per_minute, wait_s)
        bucket.take(amount)

    def settle(self, kind: str, amount: float) -> None:
        """Take it, there or not; less than nothing gives back."""
        if bucket := self._buckets.get(kind):
            bucket.take(amount)

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's words."""
        told = {}
        for kind, bucket in self._buckets.items():
            told[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{kind}"] = duration(bucket.wait_s(bucket.per_minute))
        return told


class Meter:
    """What one request uses of its caller's account."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._prompt = self._reserved = self._used = 0.0
        self._has_ended = False

    def begin(self) -> None:
        """Count the request. Raises `RateLimited`."""
        self._account.charge("requests", 1)

    def reserve(self, form: BaseModel) -> None:
        """Take an estimate of what the request will cost. Raises `RateLimited`."""
        prompt, reply = estimate(form)
        self._account.charge("tokens", prompt + reply)
        self._prompt, self._reserved = prompt, prompt + reply

    def used(self, tokens: int, *, is_end: bool = True) -> None:
        """A reply has ended, or else was broken off, when its prompt counts as estimated."""
        self._used += tokens
        self._has_ended |= is_end

    def close(self) -> None:
        """The request is over: put the estimate right. One that never began to be answered has cost nothing."""
        if self._used and not self._has_ended:
            self._used += self._prompt
        self._account.settle("tokens", self._used - self._reserved)
        self._reserved = self._used = 0.0

    def headers(self) -> dict[str, str]:
        """As of the account, after this request where it is known what it cost."""
        if self._has_ended:
            self.close()
        return self._account.headers()


class Limits:
    """The accounts of all callers. They are as many as there are keys."""

    def __init__(self, requests: int, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """requests, tokens: per minute, of who has no limits of his own; 0: none."""
        self._defaults = {"requests": requests, "tokens": tokens}
        self._clock = clock
        self._accounts: dict[tuple[str, ...], Account] = {}

    def meter(self, caller: tuple[str, ...], requests: int | None = None, tokens: int | None = None) -> Meter | None:
        """For one request of the caller's; None where nothing limits him. requests, tokens: his own limits."""
        own = {"requests": requests, "tokens": tokens}
        limits = {kind: self._defaults[kind] if limit is None else limit for kind, limit in own.items()}
        if not any(limits.values()):
            return None
        account = self._accounts.get(caller)
        if account is None or account.limits != limits:
            account = self._accounts[caller] = Account(limits, self._clock)
        return Meter(account)


def estimate(form: BaseModel) -> tuple[float, float]:
    """Tokens of a request's prompt and of its replies, at most, as far as one can tell without a tokenizer."""
    fields = form.model_dump(exclude={"model"}, exclude_none=True)
    most = next((fields[name] for name in ("max_completion_tokens", "max_tokens", "max_output_tokens") if fields.get(name)), 0)
    return math.ceil(_prompt(fields)), most * (fields.get("n") or 1)


def _prompt(value: Any) -> float:
    if isinstance(value, str):
        return len(value) / CHARS_PER_TOKEN
    if isinstance(value, list):
        return len(value) if value and isinstance(value[0], int) else sum(map(_prompt, value))
    if isinstance(value, dict):
        return sum(IMAGE_TOKENS if name in IMAGES and isinstance(each, str) else _prompt(each) for name, each in value.items())
    return 0.0


def duration(seconds: float) -> str:
    """As OpenAI writes one: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
