"""Tokens to text as they come: whole characters only, and never the start of a stop string that may yet complete itself."""

import codecs
from collections.abc import Sequence

from herd.text.tokenizer import Tokenizer


class Detokenizer:
    """Push tokens, get text. The pieces add up to the whole text, cut before the stop string that is first complete.

    Of two stop strings that end at the same character the longer counts. Once one is complete `stopped` is true and nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        assert all(stop), "an empty stop string is found everywhere"
        self.stopped = False
        self.stop: str | None = None  # the stop string that is complete
        self.tokenizer = tokenizer
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, not given out: it is the start of a stop string

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known; often "". A special token adds none."""
        return self._give(self._utf8.decode(self.tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back, when no token will follow; a broken character becomes U+FFFD."""
        text = self._give(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _give(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.stopped, self.stop, self._held = True, text[start:end], ""
            return text[:start]
        cut = len(text) - self._pending(text)
        self._held = text[cut:]
        return text[:cut]

    def _pending(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
