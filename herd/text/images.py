"""Images: from the bytes that a user sent to the tiles that the encoder sees and the tokens that hold their place.

An image is laid on a canvas of rows x cols square tiles, as small as shows it whole, else as large as is allowed; it is never enlarged
beyond one tile. It keeps its shape, sits at the top left, and the rest is black. Where there is more than one tile, a last, global tile
shows the whole image squashed into a square (Meta's prompt guide says it is padded; the code squashes).

Source: llama_models/llama4/preprocess.py and chat_format.py. herd resizes as Meta does, with Pillow's antialiased bilinear filter.
transformers resizes with torchvision, which rounds differently (one step of 255 at times), and computes the resized side in float32
where the canvas is the limit, so that it can come out a pixel off.
"""

import base64
import binascii
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from herd.chat import Image
from herd.errors import CheckpointError, PromptError

MAX_IMAGE_BYTES = 50 << 20  # of the encoded file
MAX_IMAGE_PIXELS = 100_000_000  # after decoding
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # all that Pillow may try: its other readers are old, rare or run programs

_URI = "write data:image/png;base64, and then the file's bytes in base64"
_KINDS = "give a path, the file's bytes, or a data: URI: data:image/png;base64,..."


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a model cuts images."""

    tile_pixels: int = 336  # side of a tile
    tokens_per_tile: int = 144  # `<|patch|>` tokens that one tile becomes
    max_tiles: int = 16  # of one image, the global one not counted


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """One image, cut: rows x cols tiles, row by row, then the global tile if there is more than one."""

    rows: int
    cols: int
    pixels: NDArray[np.uint8]  # [I, S, S, 3], S pixels to a side


def read_image(source: bytes | str | Path) -> Image:
    """An image from encoded bytes, a `data:` URI or a path. Raises `PromptError`; the image itself is first looked at by `open_image`.

    Not for strings from the network: a path reads a file of this machine. A server calls `from_data_uri`.
    """
    if isinstance(source, bytes):
        _check_size(len(source))
        return Image(data=source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return from_data_uri(source)
    if isinstance(source, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)):
        raise PromptError(f"an image cannot be read from {scheme[1]}:// addresses", _KINDS)
    path = Path(source)
    try:
        if not path.is_file():
            raise PromptError(f"there is no image file {str(path)!r}", _KINDS)
        _check_size(path.stat().st_size)
        return Image(data=path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise PromptError(f"image file {str(path)!r} cannot be read: {error}", _KINDS) from error


def from_data_uri(uri: str) -> Image:
    """An image from `data:image/...;base64,...`. Raises `PromptError`."""
    head, comma, body = uri.partition(",")
    kind, *options = head[5:].lower().split(";")
    if head[:5].lower() != "data:" or not comma:
        raise PromptError(f"{uri[:40]!r} is not a data: URI", _URI)
    if not kind.startswith("image/"):
        raise PromptError(f"the data: URI holds {kind or 'text/plain'!r}, not an image", _URI)
    if "base64" not in options:
        raise PromptError("the data: URI is percent-encoded; herd reads base64", _URI)
    _check_size(len(body) * 3 // 4 - body[-2:].count("="))
    try:
        return Image(data=base64.b64decode(body, validate=True))
    except (binascii.Error, ValueError) as error:  # ValueError: a character beyond ASCII
        raise PromptError(f"the data: URI is not base64: {error}", _URI) from error


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise PromptError(f"the image has {size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}", "send a smaller or more compressed image")


def open_image(image: Image) -> PIL.Image.Image:
    """The image as 8-bit RGB, upright, on white where it is transparent; an animation's first frame. Raises `PromptError`.

    Opens PNG, JPEG, WebP, GIF, BMP and TIFF, and no other. The number of pixels is read from the header and checked before they are.
    """
    _check_size(len(image.data))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # its notes on size and on odd metadata; we check what matters
            opened = PIL.Image.open(BytesIO(image.data), formats=FORMATS)
            _check_pixels(opened.width * opened.height)
            opened.load()
            return _rgb(PIL.ImageOps.exif_transpose(opened))
    except PIL.Image.DecompressionBombError as error:  # from twice Pillow's own limit it does not tell the size
        raise PromptError(f"the image has more than {MAX_IMAGE_PIXELS:,} pixels, the limit", "send a smaller image") from error
    except PromptError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise PromptError(f"{len(image.data):,} bytes are no image of a known kind", f"herd opens {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises a dozen classes on broken files, SyntaxError and struct.error among them
        raise PromptError(f"the image is broken or cut short: {error}", "send it whole, or save it again as PNG or JPEG") from error


def _check_pixels(count: int) -> None:
    if count > MAX_IMAGE_PIXELS:
        raise PromptError(f"the image has {count:,} pixels; the limit is {MAX_IMAGE_PIXELS:,}", "send a smaller image")


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Meta lays RGBA on white and leaves every other mode to Pillow, which drops other transparency and clips 16 bits to 255."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _narrow(image)
    if image.mode == "F":
        raise PromptError("the image holds floating-point pixels, whose range is not known", "save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _narrow(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey to 8, to the nearest step: 65535 is white."""
    wide = np.array(image, dtype=np.int32)
    if wide.min() < 0 or wide.max() > 0xFFFF:
        raise PromptError(f"the image holds values from {wide.min()} to {wide.max()}; 16 bits are the limit", "save it with 8 or 16 bits")
    if "transparency" in image.info:  # PNG's one transparent shade
        wide[wide == image.info["transparency"]] = 0xFFFF
    return PIL.Image.fromarray(((wide * 0xFF + 0x7FFF) // 0xFFFF).astype(np.uint8))


def canvas(width: int, height: int, tiling: Tiling) -> tuple[int, int, int, int]:
    """(rows, cols, resized width, resized height) for an image of that size.

    Of the canvases that need no shrinking take the one that enlarges least; if all shrink, the one that shrinks least; among equals the
    smallest. The comparison is in float32, as in the reference: another precision breaks other ties.
    """
    side = tiling.tile_pixels
    grids = [(rows, cols) for rows in range(1, tiling.max_tiles + 1) for cols in range(1, tiling.max_tiles // rows + 1)]
    w, h = np.float32(width), np.float32(height)
    scales = {(rows, cols): min(np.float32(cols * side) / w, np.float32(rows * side) / h) for rows, cols in grids}
    scale = min((s for s in scales.values() if s >= 1), default=max(scales.values()))
    rows, cols = min((grid for grid in grids if scales[grid] == scale), key=lambda grid: grid[0] * grid[1])

    box_w, box_h = min(max(width, side), cols * side), min(max(height, side), rows * side)
    scale_w, scale_h = box_w / width, box_h / height
    if scale_w < scale_h:
        return rows, cols, box_w, max(1, min(int(height * scale_w), box_h))
    return rows, cols, max(1, min(int(width * scale_h), box_w)), box_h


def tile(image: PIL.Image.Image, tiling: Tiling) -> Tiles:
    """Cut an RGB image. The pixels equal those of Meta's processor before it normalises them, (x / 255 - 0.5) / 0.5."""
    assert image.mode == "RGB", "open_image makes it so"
    side, bilinear = tiling.tile_pixels, PIL.Image.Resampling.BILINEAR
    rows, cols, width, height = canvas(*image.size, tiling)
    page = PIL.Image.new("RGB", (cols * side, rows * side))
    page.paste(image.resize((width, height), bilinear))
    pixels = np.array(page).reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(rows * cols, side, side, 3)  # [I, S, S, 3]
    if rows * cols > 1:
        whole = np.asarray(image.resize((side, side), bilinear))
        pixels = np.concatenate((pixels, whole[None]))
    return Tiles(rows, cols, pixels)


def image_tokens(tiles: Tiles, tiling: Tiling, specials: Mapping[str, int]) -> list[int]:
    """The ids that stand for one image. `<|patch|>` is where features go, a tile's worth at a time, in the order of `tiles.pixels`.

    Between tiles of a row stands an x separator, after every row a y separator (the last one too), before the global tile `<|image|>`.
    Raises `CheckpointError` when the vocabulary has no such tokens.
    """
    try:
        start, end, image, patch, next_col, next_row = (specials[f"<|{name}|>"] for name in _IMAGE_SPECIALS)
    except KeyError as error:
        raise CheckpointError(
            f"the tokenizer has no {error.args[0]}, so it cannot hold an image", "use the model's own tokenizer"
        ) from error
    one = [patch] * tiling.tokens_per_tile
    row = one + [next_col, *one] * (tiles.cols - 1) + [next_row]
    grid = row * tiles.rows if tiles.rows * tiles.cols > 1 else []
    return [start, *grid, image, *one, end]


_IMAGE_SPECIALS = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
