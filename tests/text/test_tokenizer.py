import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from herd.errors import CheckpointError
from herd.model.presets import TINY
from herd.text.special import BYTE_SPECIALS, LLAMA4_SPECIALS
from herd.text.tokenizer import (
    JsonTokenizer,
    TiktokenTokenizer,
    bpe_json,
    byte_tokenizer,
    decode,
    load_tokenizer,
    spell,
    tokenizer_of,
    unspell,
)
from tests.text.texts import TEXTS, WHEEL

META = MetaTokenizer.get_instance()
BYTES = byte_tokenizer()
GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm.json").read_text())
HOSTILE = st.lists(st.sampled_from([*LLAMA4_SPECIALS[:30], *BYTE_SPECIALS, "<|", "|>", "<", "eot", " ", "\n", "x"]) | st.text()).map(
    "".join
)


def meta_ids(text: str) -> list[int]:
    return META.encode(text, bos=False, eos=False)


def test_special_ids(llama4):
    """Source: the released vocabulary, spelled out."""
    known = {
        "begin_of_text": 200000,
        "end_of_text": 200001,
        "fim_prefix": 200002,
        "header_start": 200005,
        "header_end": 200006,
        "eom": 200007,
        "eot": 200008,
        "step": 200009,
        "text_post_train_reserved_special_token_0": 200010,
        "text_post_train_reserved_special_token_5": 200015,
        "python_start": 200016,
        "python_end": 200017,
        "finetune_right_pad": 200018,
        "text_post_train_reserved_special_token_8": 200019,
        "text_post_train_reserved_special_token_68": 200079,
        "image_start": 200080,
        "image_end": 200081,
        "tile_x_separator": 200084,
        "tile_y_separator": 200085,
        "image": 200090,
        "patch": 200092,
        "vision_reserved_special_token_1047": 201133,
        "reasoning_reserved_special_token_0": 201134,
        "reasoning_thinking_end": 201143,
        "reserved_special_token_0": 201144,
        "reserved_special_token_903": 202047,
    }
    assert {name: llama4.specials[f"<|{name}|>"] for name in known} == known
    assert llama4.specials == META.special_tokens
    assert llama4.vocab_size == 202048


def test_byte_specials_match_the_tiny_preset():
    assert BYTES.vocab_size == 271
    assert BYTES.specials["<|begin_of_text|>"] == TINY.bos_id
    assert tuple(BYTES.specials[f"<|{name}|>"] for name in ("end_of_text", "eom", "eot")) == TINY.stop_ids
    assert (BYTES.specials["<|finetune_right_pad|>"], BYTES.specials["<|patch|>"]) == (TINY.pad_id, TINY.patch_id)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_meta(llama4, text):
    assert llama4.encode(text) == meta_ids(text)


@given(text=st.text(st.characters()))
def test_same_ids_as_meta_on_any_text(llama4, text):
    assert llama4.encode(text) == meta_ids(text)


@pytest.mark.parametrize(
    "text",
    ["a" * 25_000, "a" * 25_001, "ab" * 30_000, " " * 60_000, "x\n" + " " * 25_001 + "y" * 50_001, "word " * 81_000, "ab" * 200_000 + "c"],
    ids=len,
)
def test_long_text_is_cut_where_meta_cuts_it(llama4, text):
    assert llama4.encode(text) == meta_ids(text)


@pytest.mark.parametrize("text", TEXTS)
def test_merges_carry_the_whole_vocabulary(llama4, llama4_json, text):
    """tiktoken's ranks, as merges, in Hugging Face's library: the same ids."""
    assert llama4_json.encode(text) == llama4.encode(text)


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("aA bB1'\n\t.", max_size=100))
def test_merges_on_any_text(llama4, llama4_json, text):
    assert llama4_json.encode(text) == llama4.encode(text)


def test_merges_round_trip(llama4, llama4_json):
    assert llama4_json.merges() == llama4.merges()
    assert llama4_json.pre == llama4.pre == "llama4"
    assert llama4_json.specials == llama4.specials
    assert all(llama4_json.token_bytes(i) == llama4.token_bytes(i) for i in range(-1, 202_050))


@given(text=HOSTILE)
def test_text_never_becomes_special(llama4, llama4_json, text):
    for tokenizer in (llama4, llama4_json, BYTES):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.specials.values())
        assert decode(tokenizer, ids) == text


def test_special_words_cannot_be_spelled_out():
    """`ignore_merges` takes a whole piece from the vocabulary and a merge may end in any token: neither may reach a special."""
    words = ["h", "e", "l", "o", "hello"]
    assert JsonTokenizer(bpe_json(words, [], pre="llama-bpe", specials={})).encode("hello") == [4]
    assert JsonTokenizer(bpe_json(words, [], pre="llama-bpe", specials={"hello": 4})).encode("hello") == [0, 1, 2, 2, 3]
    merged = bpe_json(["h", "i", "hi"], ["h i"], pre="gpt-2", specials={"hi": 2})
    assert JsonTokenizer(merged).encode("hi") == [0, 1]
    assert JsonTokenizer(merged).merges() == []


def test_json_extras_of_the_library_are_off():
    file = json.loads(bpe_json(["a", "b", "<s>"], [], pre="gpt-2", specials={"<s>": 2}))
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    }
    file["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file["model"]["unk_token"] = "<s>"
    assert JsonTokenizer(json.dumps(file).encode()).encode("ab?<s>") == [0, 1]  # what has no token is dropped


def test_added_tokens_not_marked_special_are_special_all_the_same():
    file = json.loads(bpe_json(["a", "b", "ab"], ["a b"], pre="gpt-2", specials={"ab": 2}))
    file["added_tokens"][0]["special"] = False
    assert JsonTokenizer(json.dumps(file).encode()).encode("ab") == [0, 1]


def test_byte_level_spelling():
    assert [spell(bytes([b])) for b in range(256)] == [bytes_to_unicode()[b] for b in range(256)]
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    with pytest.raises(CheckpointError, match="stands for no byte"):
        unspell("▁hello")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_tokenizer_is_utf8(text):
    assert BYTES.encode(text) == list(text.encode())
    assert decode(BYTES, BYTES.encode(text)) == text


def test_decode():
    ids = [104, 105, BYTES.specials["<|eot|>"], 0xF0, 0x9F, 300, -1]
    assert decode(BYTES, ids) == "hi\ufffd"
    assert decode(BYTES, ids, specials=True) == "hi<|eot|>\ufffd"


@pytest.mark.parametrize("pre", ["llama4", "llama-bpe", "smollm", "gpt-2"])
def test_pre_is_recognised(pre):
    data = bpe_json(["a"], [], pre=pre, specials={})
    assert JsonTokenizer(data).pre == pre
    file = json.loads(data)
    for step in file["pre_tokenizer"].get("pretokenizers", [file["pre_tokenizer"]]):
        step["trim_offsets"] = False  # no matter for ids
        if step.get("use_regex"):
            del step["use_regex"]  # old files leave it out
    assert JsonTokenizer(json.dumps(file).encode()).pre == pre


def test_pre_names():
    assert JsonTokenizer(bpe_json(["a"], [], pre="default", specials={})).pre == "gpt-2"
    with pytest.raises(CheckpointError, match="'deepseek-llm' is not known"):
        bpe_json(["a"], [], pre="deepseek-llm", specials={})
    with pytest.raises(CheckpointError, match="holds a token twice"):
        bpe_json(["a", "a"], [], pre="gpt-2", specials={})


def test_files_round_trip(tmp_path, llama4):
    for tokenizer in (BYTES, llama4):  # tokenizer.model is preferred where there are both
        for name, content in tokenizer.files().items():
            (tmp_path / name).write_bytes(content)
        again = load_tokenizer(tmp_path)
        assert again.encode("Größe <|eot|>") == tokenizer.encode("Größe <|eot|>")
        assert again.specials == tokenizer.specials
        assert again.files() == tokenizer.files()


def test_files_in_memory(llama4):
    assert tokenizer_of({**llama4.files(), **BYTES.files(), "config.json": b"{}"}).vocab_size == 202048
    with pytest.raises(CheckpointError, match="the checkpoint holds neither"):
        tokenizer_of({})


def test_load_finds_what_it_can_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")  # how a SentencePiece file begins
    with pytest.raises(CheckpointError, match="is SentencePiece, not tiktoken"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(BYTES.files()["tokenizer.json"])
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)


def broken_model(change: str) -> bytes:
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    if change == "line":
        lines[7] = b"!!! 7"
    if change == "gap":
        lines[255] = lines[255].replace(b"255", b"256")
    if change == "byte":
        lines[255] = b"YWI= 255"
    return b"\n".join(lines)


def test_any_size_of_base_vocabulary():
    assert TiktokenTokenizer(broken_model("")).specials["<|eot|>"] == 256 + 8


@pytest.mark.parametrize(("change", "message"), [("line", "line 8"), ("gap", "gap or a repeat"), ("byte", "no token for byte 0xff")])
def test_broken_model(change, message):
    with pytest.raises(CheckpointError, match=message):
        TiktokenTokenizer(broken_model(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "holds a WordPiece model"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True}}, "sets byte_fallback"),
        ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}}, "is not byte-level"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "used twice"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}, "not of two tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "is broken"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no tokens"),
        ({"pre_tokenizer": None}, "does not cut text into bytes"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "does not cut text into bytes"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, "changes text before it is read"),
        ({"added_tokens": [{"content": "x"}]}, "is broken"),
        ({"model": None}, "is broken"),
    ],
)
def test_other_json_kinds_are_refused(change, message):
    file = json.loads(BYTES.files()["tokenizer.json"]) | change
    with pytest.raises(CheckpointError, match=message):
        JsonTokenizer(json.dumps(file).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_broken_json(data):
    with pytest.raises(CheckpointError, match="is broken"):
        JsonTokenizer(data)


@pytest.mark.weights
@pytest.mark.parametrize("example", GOLDEN["texts"], ids=lambda example: ascii(example["text"][:12]))
def test_same_ids_as_llama_cpp(donor, example):
    assert donor.encode(example["text"]) == example["ids"]


def test_wheel_is_loaded_from_its_folder(llama4):
    assert load_tokenizer(WHEEL).files() == llama4.files()
