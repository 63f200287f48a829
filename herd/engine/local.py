"""The one bridge from the outside to engines: `herd.load` and its `Model` for Python, and the async `Backend` of the server."""

import asyncio
import json
import math
import weakref
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as ListLike
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.chat import (
    ChatEvent,
    ChatRequest,
    Done,
    Embedding,
    Image,
    Message,
    Sampling,
    TextRequest,
    Tokenized,
    Tool,
    ToolChoice,
)
from herd.checkpoint.load import open_model
from herd.engine.border import Border
from herd.engine.config import EngineConfig
from herd.engine.engine import Engine
from herd.engine.mean import Mean
from herd.engine.opening import open_engine, short_name
from herd.engine.reply import Reply
from herd.engine.resident import Resident, State, Stay
from herd.engine.sequence import Emit, Sequence
from herd.engine.stats import Stats
from herd.engine.stuck import Patience, stuck_error
from herd.engine.thread import EngineThread
from herd.engine.trace import TraceFile
from herd.errors import ContextError, HerdError, ModelNotFound, PromptError, UsageError, nearest
from herd.model.config import ModelConfig
from herd.model.llama4 import Llama4
from herd.ops.attend import Packed
from herd.text.callers import read_choice, read_message, read_tool
from herd.text.images import Tiles, Tiling, open_image, read_image, tile
from herd.text.prompt import Prompt, render
from herd.text.tokenizer import Tokenizer, decode


class Model:
    """A model, for Python. Made by `herd.load`. One that was unloaded is loaded again by the first call that needs it."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident
        self._longest_token = 0  # bytes; 0: not known yet

    @property
    def name(self) -> str:
        return self._resident.name

    @property
    def state(self) -> State:
        """Whether it is in memory."""
        return self._resident.state

    @property
    def failure(self) -> HerdError | None:
        """Why its engine has died, if it has."""
        return self._resident.failure

    @property
    def step_s(self) -> float:
        """Seconds that the step which its engine is in has lasted; 0 between steps."""
        return self._resident.step_s

    @property
    def thread(self) -> EngineThread:
        """Its running engine."""
        return self._resident.stay().thread

    @property
    def llama4(self) -> Llama4:
        return self.thread.engine.runner.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.thread.engine.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.thread.engine.model

    @property
    def context_tokens(self) -> int | None:
        """Room for a prompt and its reply together; None before it was ever in memory."""
        return self._resident.context_tokens

    def load(self) -> None:
        """Return when it is in memory."""
        self._resident.load()

    def unload(self) -> bool:
        """Take it out of memory: weights, keys and values, thread. False, and nothing happens, while a reply is under way."""
        return self._resident.unload()

    def stay_if_loaded(self) -> Stay | None:
        """Keep it in memory; None where it is not."""
        return self._resident.stay_if_loaded()

    def stats(self) -> Stats | None:
        """What its engine holds and has done since it was loaded, None where it is not."""
        engine = self._resident.engine
        return engine.stats() if engine else None

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
        llama4 = self.llama4  # held, and so in memory, until this has ended
        device = llama4.norm.weight.device
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=device)
        if tokens.dim() != 1 or not len(tokens):
            raise PromptError(f"tokens have shape {list(tokens.shape)}; one sequence of at least one token is wanted")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise PromptError(f"tokens run from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has {self.config.vocab_size:,}")
        features = None
        num_patches, num_features = int((tokens == self.config.patch_id).sum()), 0
        if images:
            features = torch.cat([llama4.see(torch.from_numpy(tiles.pixels).to(device)) for tiles in map(self._tiles, images)])
            num_features = len(features)
        if num_patches != num_features:
            raise PromptError(f"there are {num_patches} patch tokens, and the images give {num_features} features")
        positions = torch.arange(len(tokens), device=device)
        out: Tensor = llama4(tokens, positions, Packed([len(tokens)], self.config.chunk_tokens), features)
        return out

    def generate(self, prompt: str | ListLike[int], sampling: Sampling | None = None, **fields: Any) -> Reply:
        """Continue a text (a begin-of-text token is put before it where the model has one) or a list of tokens, as they are.

        fields: those of `herd.chat.Sampling`, in place of a whole one: `generate("...", temperature=0, max_tokens=32)`.
        """
        with self._resident.stay():
            return Reply(self._resident.stay(), self.plain_prompt(prompt), _sampling(sampling, fields))

    def plain_prompt(self, prompt: str | ListLike[int], *, begin: bool = True) -> Prompt:
        """A text or tokens as a prompt. begin: put a begin-of-text token before a text, where the model has one."""
        with self._resident.stay():
            if isinstance(prompt, str):
                self._check_length(len(prompt), "prompt")
                start = [self.config.bos_id] if begin and self.config.bos_id is not None else []
                prompt = start + self.tokenizer.encode(prompt)
            tokens = list(prompt)
            if not all(isinstance(token, int) for token in tokens):
                raise PromptError("a prompt of tokens holds something that is no int", "give a text, or a list of token ids")
            return Prompt(tokens=tokens, loss_mask=[False] * len(tokens), images=())

    def chat(
        self,
        messages: str | ListLike[Message | dict[str, Any]],
        sampling: Sampling | None = None,
        *,
        tools: ListLike[Tool | dict[str, Any]] = (),
        tool_choice: ToolChoice | str = "auto",
        **fields: Any,
    ) -> Reply:
        """Reply to a conversation: a string (one user message), `Message`s, or dicts as in OpenAI's API ({"role", "content"}).

        tools: what the reply may call, as `Tool`s or as in OpenAI's API.  tool_choice: "auto", "none", "required", or the name of a tool.
        fields: those of `herd.chat.Sampling`, in place of a whole one.
        """
        if isinstance(messages, str):
            messages = [Message(role="user", content=(messages,))]
        choice = tool_choice if isinstance(tool_choice, ToolChoice) else read_choice(tool_choice)
        request = ChatRequest(
            model=self.name,
            messages=tuple(map(read_message, messages)),
            sampling=_sampling(sampling, fields),
            tools=tuple(map(read_tool, tools)),
            tool_choice=choice,
        )
        with self._resident.stay():
            return Reply(self._resident.stay(), self.prompt(request), request.sampling, request.tools, choice)

    def prompt(self, request: ChatRequest | ListLike[Message]) -> Prompt:
        """Render a conversation for this model, its tools if it may call any, and the header of the reply at its end."""
        if not isinstance(request, ChatRequest):
            request = ChatRequest(model=self.name, messages=tuple(request))
        tools = () if request.tool_choice.mode == "none" else request.tools
        size = sum(len(message.text) + sum(len(call.arguments) for call in message.tool_calls) for message in request.messages)
        with self._resident.stay():
            self._check_length(size, "messages")
            return render(
                request.messages,
                self.tokenizer,
                chat_format=self.config.chat_format,
                tiling=self.tiling,
                tools=tools,
                tool_format=self.thread.engine.tool_format,
            )

    def _check_length(self, num_chars: int, what: str) -> None:
        """Refuse what cannot fit however it is tokenized, before the minutes that tokenizing it might take."""
        room, tokenizer = self.thread.engine.context_tokens, self.tokenizer
        if not self._longest_token:
            self._longest_token = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
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


class Local:
    """The `Backend` of models that run in this process."""

    def __init__(self, models: ListLike[Model], *, stuck_s: float = math.inf) -> None:
        """stuck_s: seconds that a step may last before its engine counts as stuck, and those who wait for it are told."""
        self._models, self._stuck_s = {model.name: model for model in models}, stuck_s
        self._borders: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Border] = weakref.WeakKeyDictionary()
        # images are cut one request at a time: a small file can be a hundred megapixels, and texts should not wait behind them
        self._cutting = ThreadPoolExecutor(1, thread_name_prefix="herd-images")
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="herd-load")  # one model at a time; who waits holds no other thread
        if len(self._models) < len(models):
            raise UsageError(f"two models have the same name: {', '.join(model.name for model in models)}", "rename a folder")

    def models(self) -> list[str]:
        return list(self._models)

    def states(self) -> dict[str, State]:
        """Which models are in memory."""
        return {name: model.state for name, model in self._models.items()}

    def is_healthy(self) -> bool:
        """Whether no engine has died or is stuck. A model that is not loaded is healthy: the first request for it loads it."""
        return all(model.failure is None and model.step_s <= self._stuck_s for model in self._models.values())

    def stats(self) -> dict[str, Stats | None]:
        """What the engines hold and have done, None for those that are not in memory."""
        return {name: model.stats() for name, model in self._models.items()}

    def context_tokens(self, model: str) -> int | None:
        """Room for a prompt and its reply together; None where the model has not been loaded yet."""
        return self._model(model).context_tokens

    def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one reply, after its model has been loaded where it is not; closing the generator frees its sequence."""
        model, tools, choice = self._model(request.model), request.tools, request.tool_choice

        def made(engine: Engine, emit: Emit) -> Sequence:
            prompt = model.prompt(request)
            salt, background, progress = _salt(request.cache_salt), request.background, request.progress
            return engine.sequence(
                prompt, request.sampling, emit, salt, tools=tools, tool_choice=choice, background=background, progress=progress
            )

        has_images = any(isinstance(part, Image) for message in request.messages for part in message.content)
        return self._replied(model, made, has_images=has_images)

    def complete(self, request: TextRequest) -> AsyncGenerator[ChatEvent, None]:
        """Stream one continuation of a text, as `chat` does."""
        model = self._model(request.model)

        def made(engine: Engine, emit: Emit) -> Sequence:
            prompt = model.plain_prompt(request.prompt, begin=request.begin)
            return engine.sequence(prompt, request.sampling, emit, _salt(request.cache_salt), background=request.background)

        return self._replied(model, made)

    async def embed(self, request: TextRequest) -> Embedding:
        """A text as a vector, computed among the replies that are under way."""
        model, mean = self._model(request.model), Mean()

        def made(engine: Engine, emit: Emit) -> Sequence:
            prompt = model.plain_prompt(request.prompt, begin=request.begin)
            return engine.sequence(prompt, Sampling(), emit, background=request.background, mean=mean)

        async with aclosing(self._replied(model, made)) as events:
            async for _ in events:
                pass
        return mean.embedding

    async def tokenize(self, request: ChatRequest | TextRequest) -> Tokenized:
        """A request's prompt, as its model reads it."""
        model = self._model(request.model)
        with await self._stay(model) as stay:

            def made() -> Tokenized:
                if isinstance(request, ChatRequest):
                    prompt = model.prompt(request)
                else:
                    prompt = model.plain_prompt(request.prompt, begin=request.begin)
                names = {token: name.encode() for name, token in model.tokenizer.specials.items()}
                pieces = tuple(names.get(token) or model.tokenizer.token_bytes(token) for token in prompt.tokens)
                return Tokenized(tokens=tuple(prompt.tokens), pieces=pieces, context_tokens=stay.thread.engine.context_tokens)

            return await asyncio.wrap_future(self._cutting.submit(made))

    async def detokenize(self, model: str, tokens: tuple[int, ...]) -> str:
        """The text of tokens, special ones by name. Raises `PromptError` for one that is not in the vocabulary."""
        found = self._model(model)
        with await self._stay(found):

            def read() -> str:
                wrong = next((token for token in tokens if not 0 <= token < found.config.vocab_size), None)
                if wrong is not None:
                    raise PromptError(f"token {wrong} is not in the vocabulary of {found.config.vocab_size:,}", param="tokens")
                return decode(found.tokenizer, tokens, specials=True)

            return await asyncio.to_thread(read)

    def _model(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            hint = nearest(name, self._models) or f"loaded: {', '.join(self._models)}"
            raise ModelNotFound(f"no model is called {name!r} here", hint, param="model")
        return model

    async def _stay(self, model: Model) -> Stay:
        while (stay := model.stay_if_loaded()) is None:
            await asyncio.get_running_loop().run_in_executor(self._loading, model.load)
        return stay

    async def _replied(
        self, model: Model, made: Callable[[Engine, Emit], Sequence], *, has_images: bool = False
    ) -> AsyncGenerator[ChatEvent, None]:
        with await self._stay(model) as stay:
            loop = asyncio.get_running_loop()
            border = self._borders.setdefault(loop, Border(loop))
            events: asyncio.Queue[ChatEvent | HerdError] = asyncio.Queue()
            thread, emit = stay.thread, partial(border.post, events)
            if thread.step_s > self._stuck_s:
                raise stuck_error(self._stuck_s)
            if has_images:
                sequence = await asyncio.wrap_future(self._cutting.submit(made, thread.engine, emit))
            else:
                sequence = await asyncio.to_thread(made, thread.engine, emit)  # rendering and compiling a grammar take their time
            sequence.flush = border.flush
            thread.submit(sequence)
            patience = Patience(thread, self._stuck_s, events.put_nowait)
            try:
                while True:
                    event = await events.get()
                    if isinstance(event, HerdError):
                        raise event
                    yield event
                    if isinstance(event, Done):
                        return
            finally:
                patience.end()
                thread.cancel(sequence)


def _salt(words: tuple[str, ...]) -> bytes:
    return json.dumps(words).encode() if words else b""


def load(
    name: str | Path = "cria",
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    config: EngineConfig | None = None,
    idle_s: float = 0.0,
    lazy: bool = False,
    trace: TraceFile | None = None,
    **choices: Any,
) -> Model:
    """Load a model and start its engine. Several may be loaded: each has its own keys and values, and they take turns at the CPU's threads.

    name: a path to any checkpoint that herd reads (herd, Hugging Face, Meta, GGUF), or a short name: cria (fetched when missing), tiny.
    dtype: of weights and compute; float32 on a CPU, where bfloat16 arithmetic is slow, else the checkpoint's own.
    device: "cpu", "cuda", ...; a GPU where there is one.
    idle_s: seconds without a request after which it is unloaded, until the next one; 0: never.
    lazy: the checkpoint is only opened and checked, and loaded by the first request.
    trace: where to note what every step did; several models may share one.
    choices: fields of `EngineConfig`, in place of a whole `config`.
    Raises `ModelNotFound`, `CheckpointError` or `UsageError`.
    """
    known = [f.name for f in fields(EngineConfig)]
    for choice in choices:
        if choice not in known:
            hint = nearest(choice, known) or f"there are: {', '.join(known)}"
            raise UsageError(f"there is no engine choice {choice!r}", hint, param=choice)
    engine = partial(open_engine, name, dtype=dtype, device=device, config=replace(config or EngineConfig(), **choices), trace=trace)
    model = Model(Resident(short_name(name), engine, idle_s=idle_s))
    if lazy:
        open_model(name)
    else:
        model.load()
    return model
