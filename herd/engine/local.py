"""The one bridge from the outside to engines: `herd.load` and its `Model` for Python, and the async `Backend` of the server."""

import asyncio
import ctypes
import queue
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from collections.abc import Sequence as ListLike
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from herd.chat import ChatEvent, ChatRequest, Done, Image, Message, Role, Sampling
from herd.checkpoint.identity import weights_identity
from herd.checkpoint.load import load_model
from herd.checkpoint.source import Source
from herd.engine.config import EngineConfig
from herd.engine.disk import DiskStore, fingerprint
from herd.engine.engine import Engine
from herd.engine.thread import EngineThread
from herd.errors import ContextError, HerdError, ModelNotFound, PromptError, UsageError, nearest
from herd.log import log
from herd.model.config import ModelConfig
from herd.model.llama4 import Llama4
from herd.model.swap import activation_bits
from herd.ops.attend import Packed
from herd.ops.native import kernels
from herd.text.images import Tiles, Tiling, open_image, read_image, tile
from herd.text.prompt import Prompt, render
from herd.text.tokenizer import tokenizer_of


class Reply(Iterator[str]):
    """A reply as it comes: iterate for pieces of text, or ask for `text`, which waits for the rest. Closing it frees what it held."""

    def __init__(self, thread: EngineThread, prompt: Prompt, sampling: Sampling) -> None:
        self.done: Done | None = None  # why it ended and what it cost, once it has
        self._closed = False
        self._pieces: list[str] = []
        self._events: queue.SimpleQueue[ChatEvent | HerdError] = queue.SimpleQueue()
        self._thread = thread
        self._sequence = thread.engine.sequence(prompt, sampling, self._events.put)
        thread.submit(self._sequence)

    def __next__(self) -> str:
        if self.done or self._closed:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, HerdError):
            self._closed = True
            raise event
        if isinstance(event, Done):
            self.done = event
            raise StopIteration
        self._pieces.append(event.text)
        return event.text

    @property
    def text(self) -> str:
        """The whole reply."""
        for _ in self:
            pass
        return "".join(self._pieces)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the whole reply, its stop token included."""
        for _ in self:
            pass
        return self.done.tokens if self.done else ()

    def close(self) -> None:
        """Stop computing; pieces that have not been read are lost."""
        if not self.done and not self._closed:
            self._closed = True
            self._thread.cancel(self._sequence)

    def __del__(self) -> None:
        if hasattr(self, "_sequence"):
            self.close()


class Model:
    """A loaded model, for Python. Made by `herd.load`."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.llama4, self.tokenizer = name, engine.runner.model, engine.tokenizer
        self.thread = EngineThread(engine, name)
        self._longest_token = max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))  # bytes

    @property
    def config(self) -> ModelConfig:
        return self.llama4.config

    @property
    def tiling(self) -> Tiling | None:
        """How this model wants its images cut; None if it sees none."""
        vision = self.config.vision
        if vision is None:
            return None
        return Tiling(tile_pixels=vision.tile_pixels, tokens_per_tile=vision.tokens_per_tile, max_tiles=vision.max_tiles)

    @torch.inference_mode()
    def logits(self, tokens: ListLike[int] | Tensor, images: ListLike[Any] | None = None) -> Tensor:
        """Next-token logits of one sequence by the packed forward, no cache: [T] -> [T, V] float32.

        images: what the `<|patch|>` tokens show, in order: `Tiles`, or a path, bytes, or data URI that is cut into tiles here.
        Raises `PromptError` when their features and the patch tokens differ in number.
        """
        device = self.llama4.norm.weight.device
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=device)
        if tokens.dim() != 1 or not len(tokens):
            raise PromptError(f"tokens have shape {list(tokens.shape)}; one sequence of at least one token is wanted")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise PromptError(f"tokens run from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has {self.config.vocab_size:,}")
        features = None
        num_patches, num_features = int((tokens == self.config.patch_id).sum()), 0
        if images:
            features = torch.cat([self.llama4.see(torch.from_numpy(tiles.pixels).to(device)) for tiles in map(self._tiles, images)])
            num_features = len(features)
        if num_patches != num_features:
            raise PromptError(f"there are {num_patches} patch tokens, and the images give {num_features} features")
        positions = torch.arange(len(tokens), device=device)
        out: Tensor = self.llama4(tokens, positions, Packed([len(tokens)], self.config.chunk_tokens), features)
        return out

    def generate(self, prompt: str | ListLike[int], sampling: Sampling | None = None, **fields: Any) -> Reply:
        """Continue a text (a begin-of-text token is put before it where the model has one) or a list of tokens, as they are.

        fields: those of `herd.chat.Sampling`, in place of a whole one: `generate("...", temperature=0, max_tokens=32)`.
        """
        if isinstance(prompt, str):
            self._check_length(len(prompt), "prompt")
            start = [] if self.config.bos_id is None else [self.config.bos_id]
            prompt = start + self.tokenizer.encode(prompt)
        tokens = list(prompt)
        if not all(isinstance(token, int) for token in tokens):
            raise PromptError("a prompt of tokens holds something that is no int", "give a text, or a list of token ids")
        return Reply(self.thread, Prompt(tokens=tokens, loss_mask=[False] * len(tokens), images=()), _sampling(sampling, fields))

    def chat(self, messages: str | ListLike[Message | dict[str, Any]], sampling: Sampling | None = None, **fields: Any) -> Reply:
        """Reply to a conversation: a string (one user message), `Message`s, or dicts as in OpenAI's API ({"role", "content"}).

        fields: those of `herd.chat.Sampling`, in place of a whole one.
        """
        if isinstance(messages, str):
            messages = [Message(role="user", content=(messages,))]
        return Reply(self.thread, self.prompt([_message(m) for m in messages]), _sampling(sampling, fields))

    def prompt(self, messages: ListLike[Message]) -> Prompt:
        """Render a conversation for this model, the header of the reply at its end."""
        self._check_length(sum(len(message.text) for message in messages), "messages")
        return render(messages, self.tokenizer, chat_format=self.config.chat_format, tiling=self.tiling)

    def _check_length(self, num_chars: int, what: str) -> None:
        """Refuse what cannot fit however it is tokenized, before the minutes that tokenizing it might take."""
        room = self.thread.engine.context_tokens
        least = -(-num_chars // self._longest_token)  # tokens; a character is at least a byte
        if least > room:
            raise ContextError(
                f"{num_chars:,} characters of {what} make at least {least:,} tokens; this engine holds {room:,}, reply included",
                "shorten it, or raise --context-tokens where the model allows",
                param=what,
            )

    def _tiles(self, image: Any) -> Tiles:
        if isinstance(image, Tiles):
            return image
        if self.tiling is None:
            raise PromptError(f"the model {self.name!r} sees no images")
        return tile(open_image(image if isinstance(image, Image) else read_image(image)), self.tiling)


def _sampling(whole: Sampling | None, values: dict[str, Any]) -> Sampling:
    known = [f.name for f in fields(Sampling)]
    for name in values:
        if name not in known:
            raise UsageError(f"there is no sampling field {name!r}", nearest(name, known) or f"there are: {', '.join(known)}", param=name)
    if "stop" in values:
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
    return replace(whole or Sampling(), **values)


def _message(message: Message | dict[str, Any]) -> Message:
    """A message as the caller wrote it; dicts as in OpenAI's API, with text, image_url, and image parts (a path, bytes or data URI)."""
    if isinstance(message, Message):
        return message
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise PromptError(f"a message is {message!r:.100}", 'it must be {"role": ..., "content": ...}, in a list')
    content = message["content"]
    parts: list[str | Image] = []
    for part in [content] if isinstance(content, str) else content or ():
        match part:
            case str() | Image():
                parts.append(part)
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}} | {"type": "image", "image": url}:
                parts.append(read_image(url))
            case _:
                raise PromptError(f"a part of a message is {part!r:.100}", "there are: text, image_url and image, as in OpenAI's API")
    return Message(role=cast(Role, message["role"]), content=tuple(parts))


class _Border:
    """Between the threads of engines and an event loop: events wait here until the step that made them is over.

    To wake a loop is a system call, at which an engine's thread loses the interpreter's lock; once a step is enough, whatever its events.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[tuple[asyncio.Queue[ChatEvent | HerdError], ChatEvent | HerdError]] = deque()

    def post(self, reader: asyncio.Queue[ChatEvent | HerdError], event: ChatEvent | HerdError) -> None:
        self._waiting.append((reader, event))

    def flush(self) -> None:
        """Let the loop hand out what waits. From any thread."""
        loop = self._loop()
        with suppress(RuntimeError):  # the loop has closed: nobody reads any more, and that must not stop the engine
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._waiting:
            reader, event = self._waiting.popleft()
            reader.put_nowait(event)


class Local:
    """The `Backend` of models that run in this process."""

    def __init__(self, models: ListLike[Model]) -> None:
        self._models = {model.name: model for model in models}
        self._borders: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Border] = weakref.WeakKeyDictionary()
        # images are cut one request at a time: a small file can be a hundred megapixels, and texts should not wait behind them
        self._cutting = ThreadPoolExecutor(1, thread_name_prefix="herd-images")
        if len(self._models) < len(models):
            raise UsageError(f"two models have the same name: {', '.join(model.name for model in models)}", "rename a folder")

    def models(self) -> list[str]:
        return list(self._models)

    def is_healthy(self) -> bool:
        """Whether every engine still runs."""
        return all(model.thread.failure is None for model in self._models.values())

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one reply; closing the generator frees its sequence."""
        model = self._models.get(request.model)
        if model is None:
            hint = nearest(request.model, self._models) or f"loaded: {', '.join(self._models)}"
            raise ModelNotFound(f"no model is called {request.model!r} here", hint, param="model")
        loop = asyncio.get_running_loop()
        border = self._borders.setdefault(loop, _Border(loop))
        events: asyncio.Queue[ChatEvent | HerdError] = asyncio.Queue()
        if any(isinstance(part, Image) for message in request.messages for part in message.content):
            prompt = await asyncio.wrap_future(self._cutting.submit(model.prompt, request.messages))
        else:
            prompt = await asyncio.to_thread(model.prompt, request.messages)
        sequence = model.thread.engine.sequence(prompt, request.sampling, partial(border.post, events))
        sequence.flush = border.flush
        model.thread.submit(sequence)
        try:
            while True:
                event = await events.get()
                if isinstance(event, HerdError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            model.thread.cancel(sequence)


def load(
    name: str | Path = "cria",
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    config: EngineConfig | None = None,
    **choices: Any,
) -> Model:
    """Load a model and start its engine.

    name: a path to any checkpoint that herd reads (herd, Hugging Face, Meta, GGUF), or a short name: cria (fetched when missing), tiny.
    dtype: of weights and compute; float32 on a CPU, where bfloat16 arithmetic is slow, else the checkpoint's own.
    device: "cpu", "cuda", ...; a GPU where there is one.
    choices: fields of `EngineConfig`, in place of a whole `config`.
    Raises `ModelNotFound`, `CheckpointError` or `UsageError`.
    """
    known = [f.name for f in fields(EngineConfig)]
    for choice in choices:
        if choice not in known:
            hint = nearest(choice, known) or f"there are: {', '.join(known)}"
            raise UsageError(f"there is no engine choice {choice!r}", hint, param=choice)
    return Model(short_name(name), open_engine(name, dtype=dtype, device=device, config=replace(config or EngineConfig(), **choices)))


def short_name(name: str | Path) -> str:
    """What a model is called by its clients: its short name, or the last part of its path."""
    path = Path(name).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def open_engine(name: str | Path, *, config: EngineConfig, dtype: torch.dtype | None = None, device: str | None = None) -> Engine:
    """The engine of a model, not yet running: for who wants to step it himself. Arguments and errors as for `load`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, source = load_model(name, dtype=dtype, device=device, activation_bits=config.activation_bits)
    tokenizer = tokenizer_of(source.files)
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # parsing a vocabulary leaves tens of megabytes of holes
    return Engine(model, tokenizer, config, _store(name, model, source, config))


def _store(name: str | Path, model: Llama4, source: Source, config: EngineConfig) -> DiskStore | None:
    """Where the engine keeps finished chunks over restarts, if its user has named a folder and the model has such."""
    if config.prefix_folder is None:
        return None
    if not model.config.global_layers or not model.config.chunk_tokens:
        log.warning("prefix_folder is of no use: %s has no layers whose keys outlast a chunk", short_name(name))
        return None
    dtype = model.norm.weight.dtype
    road = "native" if kernels() is not None and dtype == torch.float32 else "plain"
    computation = f"{dtype}, activations of {activation_bits(model)} bits, {road}"
    kv = config.kv if config.kv != "auto" else str(dtype)
    mark = fingerprint(model.config, weights_identity(name, source), kv, config.page_tokens, computation)
    return DiskStore(config.prefix_folder, mark, int(config.prefix_gib * 2**30))
