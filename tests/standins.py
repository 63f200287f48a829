"""Stand-ins for packages that a reference imports and herd's tests do not install.

The reference runs as it was written; only what it asks of the missing package is given here, in its plainest form. Each function returns
modules by name, and `installed` puts them where `import` finds them, for the length of a `with`.
"""

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


@contextmanager
def installed(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let `import` find the modules. What was imported with their help keeps them."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def torchvision() -> dict[str, ModuleType]:
    """What the image processors of llama_models and transformers take from torchvision. Source: torchvision/transforms, v0.25."""
    functional = _module("torchvision.transforms.functional", resize=_resize_pil, pil_to_tensor=_pil_to_tensor)
    v2_functional = _module(
        "torchvision.transforms.v2.functional",
        InterpolationMode=InterpolationMode,
        resize=_resize_tensor,
        pad=_pad,
        normalize=_normalize,
    )
    v2 = _module("torchvision.transforms.v2", functional=v2_functional)
    transforms = _module(
        "torchvision.transforms",
        functional=functional,
        v2=v2,
        InterpolationMode=InterpolationMode,
        Compose=Compose,
        Resize=Resize,
        ToTensor=ToTensor,
        Normalize=Normalize,
    )
    package = _module("torchvision", transforms=transforms)
    return {module.__name__: module for module in (package, transforms, functional, v2, v2_functional)}


class InterpolationMode(enum.Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        return _resize_pil(image, self.size)


class ToTensor:
    def __call__(self, image: Any) -> torch.Tensor:
        return _pil_to_tensor(image).float().div(255)


class Normalize:
    def __init__(self, mean: Any, std: Any, inplace: bool = False) -> None:
        self.mean, self.std, self.inplace = mean, std, inplace

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return _normalize(image, self.mean, self.std, self.inplace)


def _resize_pil(image: Any, size: tuple[int, int], interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> Any:
    import PIL.Image

    assert interpolation is InterpolationMode.BILINEAR
    return image.resize(size[::-1], PIL.Image.Resampling.BILINEAR)


def _pil_to_tensor(image: Any) -> torch.Tensor:
    import numpy as np

    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _resize_tensor(image: torch.Tensor, size: Any, interpolation: InterpolationMode, antialias: bool = True) -> torch.Tensor:
    size = [int(side) for side in size]
    if list(image.shape[-2:]) == size:
        return image
    return torch.nn.functional.interpolate(image, size, mode=interpolation.value, align_corners=False, antialias=antialias)


def _pad(image: torch.Tensor, padding: Any, fill: Any = 0) -> torch.Tensor:
    assert not any(fill), "black, as transformers pads for Llama 4"
    left, top, right, bottom = (int(side) for side in padding)
    return torch.nn.functional.pad(image, (left, right, top, bottom))


def _normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    mean, std = (torch.as_tensor(value, dtype=image.dtype).view(-1, 1, 1) for value in (mean, std))
    return (image if inplace else image.clone()).sub_(mean).div_(std)
