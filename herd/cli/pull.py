"""Fetch the default model and convert it, once; later calls find it there."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from herd.checkpoint.store import resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where the models live is $HERD_HOME, by default herd in the user's cache folder."""

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = "cria"  # the name of a model that can be fetched


def run(options: Options) -> int:
    print(resolve(options.model))
    return 0
