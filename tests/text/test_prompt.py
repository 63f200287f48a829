import json
import subprocess
import sys
from io import BytesIO
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from transformers.models.llama4 import processing_llama4

from herd.chat import Image, Message
from herd.errors import CheckpointError, PromptError, UsageError
from herd.text.images import Tiling
from herd.text.prompt import render
from herd.text.special import BYTE_SPECIALS
from herd.text.tokenizer import JsonTokenizer, bpe_json, byte_tokenizer, decode, spell

BYTES = byte_tokenizer()
TILING = Tiling()
GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm.json").read_text())

USUAL = [
    [("user", "Hello")],
    [("system", "Answer in one word."), ("user", "2 + 2?")],
    [("user", "Hi!"), ("assistant", "Hello, what can I do?"), ("user", "def f(x):\n    return x\n\n# why?")],
    [("user", "a"), ("system", "Now speak French."), ("user", "<|eot|>你好 🙂"), ("assistant", "")],
    [("user", "")],
    [("user", " space first"), ("assistant", "\ttab first"), ("user", "a\n")],
    [("user", " \n")],
]
LINE_BREAK_FIRST = [[("user", "\nhello")], [("assistant", "\n\n\nx"), ("user", "y")]]


def messages(chat) -> list[Message]:
    return [Message(role=role, content=(text,)) for role, text in chat]


def picture(width: int, height: int) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hf_ids(llama4_library):
    """transformers' way: the template makes one text, and the tokenizer finds the special tokens in it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it up
    template = environment.from_string(processing_llama4.chat_template)

    def ids(chat: list[tuple[str, str]]) -> list[int]:
        dicts = [{"role": role, "content": text} for role, text in chat]
        text = template.render(messages=dicts, bos_token="<|begin_of_text|>", add_generation_prompt=True)
        return llama4_library.encode(text, add_special_tokens=False).ids

    return ids


@pytest.mark.parametrize("chat", USUAL + LINE_BREAK_FIRST)
def test_same_tokens_as_meta(llama4, meta_format, chat):
    theirs = meta_format.encode_dialog_prompt([RawMessage(role=role, content=text) for role, text in chat])
    assert render(messages(chat), llama4).tokens == theirs.tokens


@pytest.mark.parametrize("chat", USUAL)
def test_same_tokens_as_transformers_on_usual_text(llama4, hf_ids, chat):
    chat = [(role, text.replace("<|eot|>", "")) for role, text in chat]  # which transformers takes for the token
    assert render(messages(chat), llama4).tokens == hf_ids(chat)


@pytest.mark.parametrize("chat", LINE_BREAK_FIRST)
def test_transformers_joins_the_header_with_a_line_break(llama4, hf_ids, chat):
    ours = render(messages(chat), llama4).tokens
    assert ours != hf_ids(chat)
    assert decode(llama4, ours, specials=True) == decode(llama4, hf_ids(chat), specials=True)


def test_the_example_of_the_docstring(llama4, hf_ids):
    assert render(messages([("user", "\nhello")]), llama4).tokens[4:7] == [368, 198, 25681]
    assert hf_ids([("user", "\nhello")])[4:6] == [2946, 25681]


def test_images_as_meta(llama4, meta_format):
    parts = ["Compare ", picture(500, 200), picture(20, 20), " and ", picture(900, 700), "\n."]
    raw = [RawTextItem(text=part) if isinstance(part, str) else RawMediaItem(data=part) for part in parts]
    theirs = meta_format.encode_dialog_prompt([RawMessage(role="user", content=raw)])
    content = tuple(part if isinstance(part, str) else Image(data=part) for part in parts)
    ours = render([Message(role="user", content=content)], llama4, tiling=TILING)
    assert ours.tokens == theirs.tokens
    assert len(ours.images) == 3
    for tiles, pixels in zip(ours.images, theirs.images, strict=True):
        assert torch.equal(torch.from_numpy(tiles.pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5), pixels)
    tiles_in_text = ours.tokens.count(llama4.specials["<|patch|>"]) / 144
    assert tiles_in_text == sum(len(tiles.pixels) for tiles in ours.images)


@pytest.mark.weights
@pytest.mark.parametrize("example", GOLDEN["chats"], ids=lambda example: str(len(example["ids"])))
def test_chatml_as_llama_cpp(donor, example):
    """llama.cpp's tokens of what the chat template in the GGUF file makes."""
    chat = [(message["role"], message["content"]) for message in example["messages"]]
    assert render(messages(chat), donor, chat_format="chatml").tokens == example["ids"]


def chatml_bytes() -> JsonTokenizer:
    specials = {"<|im_start|>": 256, "<|im_end|>": 257}
    return JsonTokenizer(bpe_json([*(spell(bytes([b])) for b in range(256)), *specials], [], pre="gpt-2", specials=specials))


def test_chatml_text():
    tokenizer = chatml_bytes()
    chat = messages([("user", "Hi"), ("assistant", "Yes?")])
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    reply = "<|im_start|>assistant\n"
    assert decode(tokenizer, render(chat, tokenizer, chat_format="chatml").tokens, specials=True) == system + turns + reply
    own = [Message(role="system", content=("Be brief.",)), *chat]
    text = decode(tokenizer, render(own, tokenizer, chat_format="chatml", reply=False).tokens, specials=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns


def test_llama4_text():
    chat = messages([("system", "S"), ("user", "U"), ("assistant", "A")])
    turns = "".join(
        f"<|header_start|>{role}<|header_end|>\n\n{text}<|eot|>" for role, text in [("system", "S"), ("user", "U"), ("assistant", "A")]
    )
    assert decode(BYTES, render(chat, BYTES, reply=False).tokens, specials=True) == "<|begin_of_text|>" + turns
    reply = "<|header_start|>assistant<|header_end|>\n\n"
    assert decode(BYTES, render(chat, BYTES).tokens, specials=True) == "<|begin_of_text|>" + turns + reply


CONTENT = st.lists(st.sampled_from([*BYTE_SPECIALS, "<|im_start|>", "<|im_end|>", "\n"]) | st.text()).map("".join)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=4)


@pytest.mark.parametrize(("chat_format", "tokenizer"), [("llama4", BYTES), ("chatml", chatml_bytes())])
@given(chat=CHATS, reply=st.booleans())
def test_loss_is_on_the_assistants_words_and_specials_are_the_renderers(chat_format, tokenizer, chat, reply):
    prompt = render(messages(chat), tokenizer, chat_format=chat_format, reply=reply)
    assert len(prompt.loss_mask) == len(prompt.tokens)
    runs = groupby(zip(prompt.tokens, prompt.loss_mask, strict=True), key=lambda pair: pair[1])
    learned = [decode(tokenizer, [token for token, _ in run], specials=True) for loss, run in runs if loss]
    close = "<|eot|>" if chat_format == "llama4" else "<|im_end|>"
    assert learned == [text + close for role, text in chat if role == "assistant"]

    turns = len(chat) + reply + (chat_format == "chatml" and chat[0][0] != "system")
    opened = "<|header_start|>" if chat_format == "llama4" else "<|im_start|>"
    assert prompt.tokens.count(tokenizer.specials[opened]) == turns
    assert prompt.tokens.count(tokenizer.specials[close]) == turns - reply


def test_a_reply_read_back_is_the_same_tokens(llama4):
    """The prompt of the next turn begins with the last prompt and the tokens of its reply, so a cached prefix holds."""
    for words in ("Hello there", "\n\nhello", " x"):
        before = render(messages([("user", "Hi")]), llama4).tokens
        after = render(messages([("user", "Hi"), ("assistant", words), ("user", "more")]), llama4).tokens
        assert after[: len(before)] == before
        generated = [*llama4.encode(words), llama4.specials["<|eot|>"]]
        assert after[len(before) :][: len(generated)] == generated


def test_touching_text_parts_are_one_text(llama4):
    split = Message(role="user", content=("Hel", "lo wor", "ld"))
    assert render([split], llama4).tokens == render(messages([("user", "Hello world")]), llama4).tokens


IMAGE = Image(data=picture(8, 8))


@pytest.mark.parametrize(
    ("chat", "options", "error", "message"),
    [
        ([], {}, PromptError, "no messages"),
        ([Message(role="robot", content=("x",))], {}, PromptError, "'robot' is not a role"),
        ([Message(role="usr", content=("x",))], {}, PromptError, "did you mean 'user'"),
        ([Message(role="user", content=(IMAGE,))], {}, PromptError, "this model reads no images"),
        ([Message(role="assistant", content=(IMAGE,))], {"tiling": TILING}, PromptError, "a message of the assistant holds an image"),
        ([Message(role="user", content=(Image(data=b"?"),))], {"tiling": TILING}, PromptError, "no image of a known kind"),
        ([Message(role="user", content=("x",))], {"chat_format": "lama4"}, UsageError, "did you mean 'llama4'"),
        ([Message(role="user", content=("x",))], {"chat_format": "chatml"}, CheckpointError, r"has no <\|im_start\|>"),
    ],
)
def test_what_cannot_be_rendered(chat, options, error, message):
    with pytest.raises(error, match=message):
        render(chat, BYTES, **options)


def test_import_is_light():
    heavy = {"torch", "transformers", "tokenizers", "tiktoken", "herd.model"}
    code = f"import sys, herd.text.prompt; found = {heavy} & set(sys.modules); assert not found, found"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
