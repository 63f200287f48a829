"""What a model's name means: a path, or a short name; and where herd keeps the models it fetches."""

import os
from pathlib import Path

from herd.checkpoint.cria import pull_cria
from herd.errors import ModelNotFound, nearest
from herd.model.presets import PRESETS

_META_WEIGHTS = (
    "accept Meta's licence at huggingface.co/meta-llama, download the checkpoint (Hugging Face's or Meta's own format), and give herd "
    "the path of its folder"
)


def home() -> Path:
    """The folder that herd keeps models in: `$HERD_HOME`, or `herd` in the user's cache folder."""
    if kept := os.environ.get("HERD_HOME"):
        return Path(kept)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "herd"


def resolve(model: str) -> Path:
    """The path that a name stands for. "cria" is fetched when it is not here yet. Raises `ModelNotFound` for what herd cannot bring."""
    if model == "cria":
        return pull_cria(home())
    if model == "behemoth":
        raise ModelNotFound("the weights of Llama 4 Behemoth were never released", "`herd inspect behemoth` shows a made-up geometry of it")
    if model == "tiny":
        raise ModelNotFound("tiny is made in memory, from random numbers, and has no path", "`open_model` and `load_model` take its name")
    if model in PRESETS:
        raise ModelNotFound(f"{model} names a model whose weights herd may not bring", _META_WEIGHTS)
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise ModelNotFound(f"{model} does not exist: there is no such user", "give the path of a checkpoint") from error
    if path.exists():
        return path
    if path.name != model:  # it was meant as a path
        raise ModelNotFound(f"{model} does not exist", "give the path of a checkpoint")
    raise ModelNotFound(
        f"no model is called {model!r}, and no such path exists", nearest(model, PRESETS) or f"there are: {', '.join(PRESETS)}"
    )
