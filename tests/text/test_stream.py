from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.text.stream import Detokenizer
from herd.text.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


class Chunks:
    """A tokenizer whose token i is the i-th of these byte strings."""

    specials, vocab_size, pre = {}, 0, "default"

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def token_bytes(self, token_id: int) -> bytes:
        return self.chunks[token_id]


def folded(text: str, stops: list[str]) -> str:
    """The rule, read off the whole text: cut before the stop string that ends first, of those the longest."""
    for end in range(len(text) + 1):
        if lengths := [len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(lengths)]
    return text


def test_the_stop_string_that_ended_it_is_told():
    for stops, want in ((["b", "ab"], "ab"), (["c", "abc", "d"], "abc"), (["x"], None)):
        detokenizer = Detokenizer(Chunks([b"za", b"bcd"]), stops)
        detokenizer.push(0), detokenizer.push(1)
        assert detokenizer.stop == want


def run(chunks: list[bytes], stops: list[str]) -> tuple[str, bool, list[str]]:
    detokenizer = Detokenizer(Chunks(chunks), stops)
    pieces = [detokenizer.push(i) for i in range(len(chunks))] + [detokenizer.finish()]
    return "".join(pieces), detokenizer.stopped, pieces


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)] or [b""]


TEXT = st.text("abc\né🙂", max_size=40)
CUTS = st.lists(st.integers(0, 1000), max_size=60)


@given(text=TEXT, cuts=CUTS, stops=st.lists(st.text("abc\né🙂", min_size=1, max_size=4), max_size=4))
def test_pieces_add_up_to_the_folded_text(text, cuts, stops):
    whole, stopped, _ = run(split(text.encode(), cuts), stops)
    assert whole == folded(text, stops)
    assert stopped == any(stop in text for stop in stops)


@given(data=st.binary(max_size=40), cuts=CUTS, stops=st.lists(st.sampled_from(["\ufffd", "a", "\ufffda", "\x00"]), max_size=3))
def test_broken_utf8(data, cuts, stops):
    whole, _, _ = run(split(data, cuts), stops)
    assert whole == folded(data.decode("utf-8", errors="replace"), stops)


@given(text=TEXT, cuts=CUTS, stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_must_be(text, cuts, stops):
    """After each token, what is still held is a half character or the start of a stop string."""
    chunks = split(text.encode(), cuts)
    detokenizer, seen, given_out = Detokenizer(Chunks(chunks), stops), b"", ""
    for i, chunk in enumerate(chunks):
        seen += chunk
        given_out += detokenizer.push(i)
        if detokenizer.stopped:
            break
        held = seen.decode(errors="ignore")[len(given_out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_whole_characters():
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(b) for b in "é🙂!".encode()] == ["", "é", "", "", "", "🙂", "!"]
    assert detokenizer.push(0xF0) + detokenizer.finish() == "\ufffd"


def test_stop_string_over_tokens():
    _, stopped, pieces = run([b"one\n", b"Us", b"ed", b"\nUser", b": two", b"more"], ["\nUser:"])
    assert pieces == ["one", "", "\nUsed", "", "", "", ""]
    assert stopped


def test_held_text_is_flushed():
    whole, stopped, pieces = run([b"a", b"STO"], ["STOP"])
    assert (whole, stopped, pieces) == ("aSTO", False, ["a", "", "STO"])


def test_special_tokens_have_no_text():
    detokenizer = Detokenizer(BYTES, ["<|eot|>"])
    assert detokenizer.push(BYTES.specials["<|eot|>"]) == ""
    assert not detokenizer.stopped


@pytest.mark.parametrize(("stops", "whole"), [(["bc", "abcd"], "xa"), (["bc", "abc"], "x"), (["c", "abcd"], "xab")])
def test_stop_strings_that_overlap(stops, whole):
    """Whatever the tokens are."""
    for chunks in ([b"xabcd"], [b"x", b"a", b"b", b"c", b"d"], [b"xab", b"cd"]):
        assert run(chunks, stops)[0] == whole
