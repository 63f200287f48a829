"""Text to token ids and back: Meta's tokenizer.model, Hugging Face's tokenizer.json, and a byte tokenizer for small models.

All are byte-level BPE. `encode` never yields a special id, whatever the text says: a user who types `<|eot|>` gets the plain tokens of
those seven characters. The trap is Hugging Face's library, which looks for special tokens in every text; so it is given a file without
them, and only the renderer (prompt.py) places specials, by id.
"""

import base64
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from herd.errors import CheckpointError
from herd.text.special import BYTE_SPECIALS, LLAMA4_SPECIALS


class Tokenizer(Protocol):
    """What the rest of herd asks of a tokenizer."""

    specials: Mapping[str, int]  # name, such as `<|eot|>` -> id
    vocab_size: int  # highest id + 1
    pre: str  # llama.cpp's name of the rule that cuts text before BPE; "default" where it has none

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary tokens only. Lone surrogates become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an ordinary token stands for, maybe part of a character; b"" for specials and ids without a token."""
        ...

    def files(self) -> dict[str, bytes]:
        """File name -> content, from which `load_tokenizer` makes this tokenizer again."""
        ...

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The BPE merges, first to apply first."""
        ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises `CheckpointError`."""
    names = ("tokenizer.model", "tokenizer.json")
    return tokenizer_of({name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}, where=str(folder))


def tokenizer_of(files: Mapping[str, bytes], where: str = "the checkpoint") -> Tokenizer:
    """The tokenizer that a checkpoint's small files hold, by name: Meta's tokenizer.model if it is there, else tokenizer.json.

    where: what holds the files, for the message of a `CheckpointError`.
    """
    model, table = files.get("tokenizer.model"), files.get("tokenizer.json")
    if model is not None and _is_tiktoken(model):
        return TiktokenTokenizer(model)
    if table is not None:
        return JsonTokenizer(table)
    if model is not None:
        raise CheckpointError(f"tokenizer.model of {where} is SentencePiece, not tiktoken", "put the model's tokenizer.json beside it")
    raise CheckpointError(f"{where} holds neither tokenizer.model nor tokenizer.json", "copy one from where the weights came from")


def decode(tokenizer: Tokenizer, ids: Iterable[int], specials: bool = False) -> str:
    """The text of whole tokens; broken UTF-8 becomes U+FFFD. specials: spell the special tokens too, else they vanish."""
    names = {token_id: name.encode() for name, token_id in tokenizer.specials.items()} if specials else {}
    return b"".join(names.get(i) or tokenizer.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


# How text is cut before BPE. Source: llama_models/llama4/tokenizer.py, O200K_PATTERN.
_LLAMA4_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# tiktoken fails on longer input, so Meta cuts there, and the cuts show in the ids. Source: the same file.
_BLOCK_CHARS = 400_000
_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_RUN_CHARS + 1},}}|(?<!\s)\s{{{_RUN_CHARS + 1},}}")


class TiktokenTokenizer:
    """Meta's tokenizer.model: on each line a base64 token and its rank, which is its id. The 2,048 specials follow the last rank.

    Raises `CheckpointError` for a broken file.
    """

    def __init__(self, data: bytes) -> None:
        import tiktoken

        self._data = data
        self._ranks = _read_ranks(data)
        self._tokens = sorted(self._ranks, key=self._ranks.__getitem__)
        self._encoding = tiktoken.Encoding("llama4", pat_str=_LLAMA4_PATTERN, mergeable_ranks=self._ranks, special_tokens={})
        self.specials: Mapping[str, int] = {name: len(self._tokens) + i for i, name in enumerate(LLAMA4_SPECIALS)}
        self.vocab_size = len(self._tokens) + len(LLAMA4_SPECIALS)
        self.pre = "llama4"

    def encode(self, text: str) -> list[int]:
        return [i for piece in _pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else b""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._data}

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Every pair of tokens whose concatenation is a token, by the rank of the result: tiktoken joins any two neighbours that make
        a token, so all the ways to make one must be listed. Source: transformers, TikTokenConverter.
        """
        found = []
        for token in self._tokens:
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            known = [(a, b) for a, b in pairs if a in self._ranks and b in self._ranks]
            found += sorted(known, key=lambda pair: (self._ranks[pair[0]], self._ranks[pair[1]]))
        return found


def _is_tiktoken(data: bytes) -> bool:
    fields = data.split(b"\n", 1)[0].split()
    return len(fields) == 2 and fields[1].isdigit()


def _read_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise CheckpointError(f"tokenizer.model, line {number}: not a base64 token and its rank", "fetch the file again") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"tokenizer.model: the {len(ranks):,} ranks have a gap or a repeat", "fetch the file again")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise CheckpointError(f"tokenizer.model: no token for byte {missing[0]:#04x}", "fetch the file again")
    return ranks


def _pieces(text: str) -> Iterator[str]:
    """Cut as Meta does: blocks of 400,000 characters, and in each, runs with or without space after every 25,000."""
    for start in range(0, len(text), _BLOCK_CHARS):
        block = text[start : start + _BLOCK_CHARS]
        runs = (range(run.start() + _RUN_CHARS, run.end(), _RUN_CHARS) for run in _LONG_RUN.finditer(block))
        for low, high in itertools.pairwise([0, *itertools.chain(*runs), len(block)]):
            yield block[low:high]


def _byte_chars() -> str:
    """The printable character that stands for each byte in byte-level BPE files. Source: openai/gpt-2 encoder.py, bytes_to_unicode."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return "".join(chr(b if b in printable else next(spare)) for b in range(256))


_BYTE_CHARS = _byte_chars()
_BYTE_OF = {char: byte for byte, char in enumerate(_BYTE_CHARS)}


def spell(token: bytes) -> str:
    """A token as byte-level BPE files (tokenizer.json, GGUF) write it: one printable character per byte, a space is `Ġ`."""
    return token.decode("latin-1").translate(_BYTE_CHARS)


def unspell(token: str) -> bytes:
    """The bytes of a token that is written as in byte-level BPE files. Raises `CheckpointError`."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError as error:
        raise CheckpointError(f"token {token!r} is not byte-level: {error.args[0]!r} stands for no byte", _ONLY_BYTE_LEVEL) from error


_ONLY_BYTE_LEVEL = "herd reads byte-level BPE, as Llama 3, Llama 4, GPT-2 and SmolLM2 have it"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _byte_level(False)]


# llama.cpp's name -> the same rule in Hugging Face's words. Source: transformers/convert_slow_tokenizer.py for the Llama 3 pattern,
# the released tokenizer.json of SmolLM2; llama.cpp src/llama-vocab.cpp for the names.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "llama4": _split(_LLAMA4_PATTERN),
    "llama-bpe": _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "gpt-2": [_byte_level(True)],
    "default": [_byte_level(True)],
}
_IGNORE_MERGES = {"llama4", "llama-bpe"}  # a whole piece that is a token is taken as it is, as tiktoken does


class JsonTokenizer:
    """Hugging Face's tokenizer.json, byte-level BPE only. Raises `CheckpointError` for any other kind.

    Every added token of the file counts as special, those not marked so too: text never becomes one. A byte for which the vocabulary
    has no token (SmolLM2 lacks some control characters) is dropped by `encode`, as the library and llama.cpp do.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        file = _read_json(data)
        model = file["model"]
        self.specials: Mapping[str, int] = {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
        hidden = set(self.specials.values())
        vocab = {token: token_id for token, token_id in model["vocab"].items() if token_id not in hidden}
        # A vocabulary often lists the specials too. They must go: `ignore_merges`, or a merge, could spell one out of plain text.
        gone = model["vocab"].keys() - vocab.keys()
        self._merges = [(a, b) for a, b in map(_pair, model["merges"]) if gone.isdisjoint((a, b, a + b))]
        self._bytes = {token_id: unspell(token) for token, token_id in vocab.items()}
        self._inner = _build(file, vocab, self._merges)
        self.vocab_size = max(hidden | self._bytes.keys()) + 1
        self.pre = _pre_name(file["pre_tokenizer"])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(_without_surrogates(text), add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._data}

    def merges(self) -> list[tuple[bytes, bytes]]:
        return [(unspell(a), unspell(b)) for a, b in self._merges]


def byte_tokenizer() -> JsonTokenizer:
    """A token for each byte (id = the byte) and the specials of Llama 4's format after them; for small models and tests."""
    tokens = [*_BYTE_CHARS, *BYTE_SPECIALS]
    return JsonTokenizer(bpe_json(tokens, [], pre="gpt-2", specials={name: 256 + i for i, name in enumerate(BYTE_SPECIALS)}))


def bpe_json(tokens: Sequence[str], merges: Sequence[str], *, pre: str, specials: Mapping[str, int]) -> bytes:
    """A tokenizer.json from what a GGUF file holds. Raises `CheckpointError` when `pre` is not known.

    tokens: by id, spelled byte-level, specials in their places.  merges: "left right".  pre: GGUF's tokenizer.ggml.pre.
    """
    if pre not in _PRE_TOKENIZERS:
        raise CheckpointError(f"pre-tokenizer {pre!r} is not known", f"herd knows {', '.join(_PRE_TOKENIZERS)}")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"the vocabulary of {len(tokens):,} tokens holds a token twice", "make the file again from its source")
    steps = _PRE_TOKENIZERS[pre]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": token_id, "content": name, **flags} for name, token_id in sorted(specials.items(), key=lambda item: item[1])]
    file = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": pre in _IGNORE_MERGES,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    return json.dumps(file, ensure_ascii=False).encode()


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        file = json.loads(data)
        fault = _fault(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"tokenizer.json is broken: {error!r}", "fetch the file again") from error
    if fault:
        raise CheckpointError(f"tokenizer.json {fault}", _ONLY_BYTE_LEVEL)
    return dict(file)


def _fault(file: dict[str, Any]) -> str:
    """Why this is not a plain byte-level BPE, or ""."""
    model = file["model"]
    if model.get("type", "BPE") != "BPE":
        return f"holds a {model['type']} model"
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            return f"sets {key} = {model[key]!r}"
    if (normalizer := file.get("normalizer")) and normalizer["type"] != "NFC":
        return f"changes text before it is read ({normalizer['type']})"
    if not any(step["type"] == "ByteLevel" for step in _steps(file["pre_tokenizer"])):
        return "does not cut text into bytes"
    ids = list(model["vocab"].values())
    if not ids or len(set(ids)) != len(ids) or not all(isinstance(i, int) and i >= 0 for i in ids):
        return "has no tokens, or an id that is negative, no number or used twice"
    if not all(isinstance(token["content"], str) and isinstance(token["id"], int) for token in file.get("added_tokens") or ()):
        return "has an added token without a name or an id"
    if not all(len(_pair(merge)) == 2 for merge in model["merges"]):
        return "has a merge that is not of two tokens"
    return ""


def _pair(merge: str | list[str]) -> list[str]:
    """A merge in either spelling of the file, "a b" or ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _pre_name(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for a pre-tokenizer, or "default". `trim_offsets` does not touch ids; `use_regex` was once left out when true."""

    def plain(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"use_regex": True, **step, "trim_offsets": None} for step in steps]

    found = plain(_steps(pre_tokenizer))
    return next((name for name, steps in _PRE_TOKENIZERS.items() if plain(steps) == found), "default")


def _build(file: dict[str, Any], vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """The library's tokenizer for plain text: no added tokens, nothing put before or after, an unknown byte is no token."""
    import tokenizers

    model = {**file["model"], "vocab": vocab, "merges": merges, "unk_token": None}
    kept = {"version": "1.0", "normalizer": file.get("normalizer"), "pre_tokenizer": file["pre_tokenizer"]}
    dropped: dict[str, Any] = {"added_tokens": [], "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**kept, **dropped, "model": model}))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"tokenizer.json is broken: {error}", "fetch the file again") from error


def _without_surrogates(text: str) -> str:
    """Lone surrogates as U+FFFD, as tiktoken does: JSON can carry them, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
