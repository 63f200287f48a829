r"""Messages to tokens: the only renderer, used to serve and to train, so that the two cannot drift.

Llama 4:  <|begin_of_text|> then for each message  <|header_start|>role<|header_end|> "\n\n" content <|eot|>
ChatML:   for each message                          <|im_start|>role "\n" content <|im_end|> "\n"

The header and the content are tokenized apart, as Meta does. transformers tokenizes all text between two special tokens in one piece,
which differs when the content starts with a line break: "\n\n" + "\nhello" is 368 198 25681 here and 2946 25681 there. Apart is right
for a chat: the model writes its reply after a header that is already tokens, and reading that reply back as history must give the same
tokens, or the cached prefix is lost and training sees what serving never makes.

A tool's result has the header "ipython" in Llama 4's prompts; how tools, calls and results are written is in tools.py.

Source: llama_models/llama4/chat_format.py; `tokenizer.chat_template` in SmolLM2-135M-Instruct's GGUF file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from herd.chat import Image, Message, Tool
from herd.errors import CheckpointError, PromptError, UsageError, nearest
from herd.text.images import Tiles, Tiling, image_tokens, open_image, tile
from herd.text.tokenizer import Tokenizer
from herd.text.tools import TOOL_FORMATS, Special, ToolFormat, in_order


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A rendered conversation."""

    tokens: list[int]
    loss_mask: list[bool]  # true on what the assistant wrote, its closing token included; as long as `tokens`
    images: tuple[Tiles, ...] = ()  # in the order of their `<|patch|>` tokens
    num_image_tokens: int = 0  # those of images, their marks included


@dataclass(frozen=True, kw_only=True, slots=True)
class _Format:
    """The marks of a chat format: names of special tokens, and plain text."""

    begin: tuple[str, ...]  # specials that open a prompt
    before_role: str  # special
    after_role: tuple[str, ...]  # specials
    gap: str  # text between header and content
    close: str  # special that ends a turn
    after: str  # text between two turns
    default_system: str  # system message of a conversation that starts without one; "" is none
    tool_formats: tuple[str, ...]  # forms of tools and calls that its models know, the usual one first


_FORMATS = {
    "llama4": _Format(
        begin=("<|begin_of_text|>",),
        before_role="<|header_start|>",
        after_role=("<|header_end|>",),
        gap="\n\n",
        close="<|eot|>",
        after="",
        default_system="",
        tool_formats=("pythonic", "json"),
    ),
    "chatml": _Format(
        begin=(),
        before_role="<|im_start|>",
        after_role=(),
        gap="\n",
        close="<|im_end|>",
        after="\n",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        tool_formats=("tags",),
    ),
}
_ROLES = ("system", "user", "assistant", "tool")


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    chat_format: str = "llama4",
    tiling: Tiling | None = None,
    reply: bool = True,
    tools: Sequence[Tool] = (),
    tool_format: str = "auto",
) -> Prompt:
    """Render a conversation. Raises `PromptError` for one that cannot be, `CheckpointError` when the tokenizer lacks a special token.

    chat_format: "llama4" or "chatml".  tiling: how the model cuts images; None, it reads none.  reply: open the assistant's next turn.
    tools: those that the reply may call.  tool_format: how tools and calls are written: "pythonic", "json", "tags", or "auto".
    Text parts that touch are joined first, so that the tokens do not depend on how a client cut the text.
    """
    if chat_format not in _FORMATS:
        raise UsageError(f"there is no chat format {chat_format!r}", nearest(chat_format, _FORMATS) or f"herd knows {', '.join(_FORMATS)}")
    if not messages:
        raise PromptError("the conversation has no messages", "send at least one", param="messages")
    form, calls = _FORMATS[chat_format], TOOL_FORMATS[tool_format_of(chat_format, tool_format)]
    for message in messages:
        _check(message)
    messages = in_order(messages)
    if tools:
        messages = calls.introduce(messages, tools)
    page = _Page(tokenizer, tiling)
    for name in form.begin:
        page.special(name)
    if form.default_system and messages[0].role != "system":
        page.turn(form, calls, Message(role="system", content=(form.default_system,)))
    for message in messages:
        page.turn(form, calls, message)
    if reply:
        page.header(form, "assistant")
    return Prompt(page.tokens, page.loss_mask, tuple(page.images), page.num_image_tokens)


def tool_format_of(chat_format: str, tool_format: str = "auto") -> str:
    """The form of tools and calls that a model is given. Raises `UsageError` for one that its chat format does not have."""
    known = _FORMATS[chat_format].tool_formats
    if tool_format == "auto":
        return known[0]
    if tool_format not in known:
        raise UsageError(
            f"{chat_format} prompts have no tool format {tool_format!r}", f"there is: auto, {', '.join(known)}", param="tool_format"
        )
    return tool_format


def _check(message: Message) -> None:
    if message.role not in _ROLES:
        raise PromptError(
            f"{message.role!r} is not a role", nearest(message.role, _ROLES) or f"roles are {', '.join(_ROLES)}", param="messages"
        )
    if message.role != "user" and any(isinstance(part, Image) for part in message.content):
        raise PromptError(f"a message of the {message.role} holds an image", "images belong in the user's messages", param="messages")
    if message.tool_calls and message.role != "assistant":
        raise PromptError(f"a message of the {message.role} holds calls", "calls belong in the assistant's messages", param="messages")
    if message.tool_call_id is not None and message.role != "tool":
        raise PromptError(f"a message of the {message.role} holds the result of a call", 'its role must be "tool"', param="messages")


@dataclass(slots=True)
class _Page:
    """What has been rendered so far."""

    tokenizer: Tokenizer
    tiling: Tiling | None
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    images: list[Tiles] = field(default_factory=list)
    num_image_tokens: int = 0

    def turn(self, form: _Format, calls: ToolFormat, message: Message) -> None:
        loss, role, close = message.role == "assistant", str(message.role), form.close
        content: Sequence[str | Image | Special] = list(_joined(message.content))
        if message.tool_calls:
            content, close = calls.reply(message), calls.close_reply
        elif message.role == "tool":
            content, role, close = [calls.result(message.text)], calls.role, calls.close_result
        self.header(form, role)
        for part in content:
            if isinstance(part, str):
                self.text(part, loss)
            elif isinstance(part, Special):
                self.special(part.name, loss)
            else:
                self.image(part)
        self.special(close, loss)
        self.text(form.after)

    def header(self, form: _Format, role: str) -> None:
        self.special(form.before_role)
        self.text(role)
        for name in form.after_role:
            self.special(name)
        self.text(form.gap)

    def special(self, name: str, loss: bool = False) -> None:
        if name not in self.tokenizer.specials:
            raise CheckpointError(f"the tokenizer has no {name}, which the chat format needs", "use the model's own tokenizer")
        self._add([self.tokenizer.specials[name]], loss)

    def text(self, text: str, loss: bool = False) -> None:
        self._add(self.tokenizer.encode(text), loss)

    def image(self, image: Image) -> None:
        if self.tiling is None:
            raise PromptError("this model reads no images", "send text alone, or choose a model with vision", param="messages")
        tiles = tile(open_image(image), self.tiling)
        self.images.append(tiles)
        ids = image_tokens(tiles, self.tiling, self.tokenizer.specials)
        self.num_image_tokens += len(ids)
        self._add(ids)

    def _add(self, ids: list[int], loss: bool = False) -> None:
        self.tokens += ids
        self.loss_mask += [loss] * len(ids)


def _joined(content: Sequence[str | Image]) -> Iterator[str | Image]:
    for is_text, parts in groupby(content, key=lambda part: isinstance(part, str)):
        if is_text:
            yield "".join(part for part in parts if isinstance(part, str))
        else:
            yield from parts
