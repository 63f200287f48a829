"""A source's tokenizer as lists of tokens and merges, which is how GGUF and tokenizer.json hold one."""

from collections.abc import Mapping

from herd.text.tokenizer import Tokenizer, bpe_json, spell, tokenizer_of


def tokenizer_in(files: Mapping[str, bytes]) -> Tokenizer | None:
    """The tokenizer in a source's files; None when there is none."""
    return tokenizer_of(files) if {"tokenizer.model", "tokenizer.json"} & files.keys() else None


def spelled_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Every token by id, spelled byte-level; specials by their names, `[PAD7]` where an id has no token."""
    names = {i: name for name, i in tokenizer.specials.items()}
    return [names.get(i) or spell(tokenizer.token_bytes(i)) or f"[PAD{i}]" for i in range(vocab_size)]


def spelled_merges(tokenizer: Tokenizer) -> list[str]:
    """The merges in order, each as "left right"."""
    return [f"{spell(a)} {spell(b)}" for a, b in tokenizer.merges()]


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that does what the tokenizer does."""
    tokens = spelled_tokens(tokenizer, tokenizer.vocab_size)
    return bpe_json(tokens, spelled_merges(tokenizer), pre=tokenizer.pre, specials=tokenizer.specials)
