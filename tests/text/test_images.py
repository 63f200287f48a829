import base64
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import SizeDict
from transformers.models.llama4.processing_llama4 import Llama4Processor

from herd.chat import Image
from herd.errors import CheckpointError, PromptError
from herd.model.config import VisionConfig
from herd.text import images
from herd.text.images import Tiles, Tiling, canvas, from_data_uri, image_tokens, open_image, read_image, tile
from herd.text.tokenizer import byte_tokenizer
from tests import standins

TILING = Tiling()
SIZES = [(1, 1), (336, 336), (337, 336), (400, 300), (4000, 200), (200, 4000), (3, 1000), (999, 77), (640, 480), (1920, 1080)]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(width * 10_000 + height).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> Image:
    file = BytesIO()
    image.save(file, format, **options)
    return Image(data=file.getvalue())


def opened(image: PIL.Image.Image, format: str = "PNG", **options) -> np.ndarray:
    result = open_image(encoded(image, format, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.mark.parametrize(
    ("width", "height", "result", "tokens"),
    [
        (100, 100, (1, 1, 336, 336), 147),
        (337, 336, (1, 2, 337, 336), 437),
        (400, 300, (1, 2, 400, 300), 437),
        (300, 800, (3, 1, 300, 800), 582),
        (640, 480, (2, 2, 640, 480), 727),
        (672, 672, (2, 2, 672, 672), 727),
        (1024, 768, (3, 4, 1024, 768), 1887),
        (1920, 1080, (3, 5, 1680, 945), 2322),
        (1080, 1920, (5, 3, 945, 1680), 2322),
        (4000, 3000, (3, 4, 1344, 1008), 1887),
        (2000, 500, (2, 6, 2000, 500), 1887),
        (5000, 200, (1, 15, 5000, 200), 2322),
        (1344, 1344, (4, 4, 1344, 1344), 2467),
        (1, 100_000, (16, 1, 1, 5376), 144 * 17 + 16 + 3),
    ],
)
def test_canvas(width, height, result, tokens):
    assert canvas(width, height, TILING) == result
    specials = {
        f"<|{name}|>": i for i, name in enumerate(("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator"))
    }
    assert len(image_tokens(Tiles(result[0], result[1], np.empty(0, np.uint8)), TILING, specials)) == tokens


def odd_sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(1, limit, 2))) for limit in (50, 700, 3000, 9000) for _ in range(300)]
    edges = [1, 2, 111, 112, 168, 335, 336, 337, 671, 672, 673, 1008, 1344, 1680, 5375, 5376, 5377]
    return [*sizes, *((w, h) for w in edges for h in edges)]


def test_canvas_is_metas(references):
    transform = references.meta.VariableSizeImageTransform(336)
    resolutions = torch.tensor(transform.find_supported_resolutions(16, 336))
    for width, height in odd_sizes():
        best_w, best_h = transform.get_best_fit((width, height), resolutions)
        box = min(max(width, 336), best_w), min(max(height, 336), best_h)
        resized_w, resized_h = transform.get_max_res_without_distortion((width, height), box)
        assert canvas(width, height, TILING) == (best_h // 336, best_w // 336, max(resized_w, 1), max(resized_h, 1)), (width, height)


def hf_canvas(references, width: int, height: int) -> tuple[int, int, int, int]:
    resolutions = torch.tensor(references.hf.find_supported_resolutions(16, SizeDict(height=336, width=336)))
    best_h, best_w = references.hf.get_best_fit((height, width), resolutions)
    box = min(max(height, 336), best_h), min(max(width, 336), best_w)
    resized_h, resized_w = references.hf.get_max_res_without_distortion((height, width), box)
    return int(best_h) // 336, int(best_w) // 336, max(int(resized_w), 1), max(int(resized_h), 1)


def test_canvas_is_transformers_but_for_a_pixel(references):
    """transformers takes the second scale in float32, so a resized side may come out one pixel off; the grid of tiles never differs."""
    results = [(canvas(w, h, TILING), hf_canvas(references, w, h)) for w, h in odd_sizes()]
    assert all(ours[:2] == theirs[:2] and np.abs(np.subtract(ours, theirs)).max() <= 1 for ours, theirs in results)
    assert sum(ours != theirs for ours, theirs in results) <= 3
    assert canvas(1464, 2928, TILING) == (5, 3, 840, 1680)  # half of 1680 is 840
    assert hf_canvas(references, 1464, 2928) == (5, 3, 839, 1680)


def normalised(tiles: Tiles) -> torch.Tensor:
    return torch.from_numpy(tiles.pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


def meta_tiles(references, image: PIL.Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """As ChatFormat._encode_content puts them together."""
    tiles, ratio = references.meta.VariableSizeImageTransform(336)(image, max_num_chunks=16)
    if len(tiles) > 1:
        tiles = torch.cat((tiles, references.meta.ResizeNormalizeImageTransform(336, 336)(image)[None]))
    return tiles, ratio


def hf_tiles(references, image: PIL.Image.Image) -> tuple[torch.Tensor, list[int]]:
    """Everything after the constructor, which would ask for torchvision by name."""
    processor = references.hf.Llama4ImageProcessor.__new__(references.hf.Llama4ImageProcessor)
    result = processor._preprocess(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()],
        do_resize=True,
        size=SizeDict(height=336, width=336),
        resample=standins.InterpolationMode.BILINEAR,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        max_patches=16,
        resize_to_max_canvas=False,
        disable_grouping=None,
        return_tensors="pt",
    )
    return result["pixel_values"], result["aspect_ratios"][0].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_metas(references, size):
    image = PIL.Image.fromarray(noise(*size))
    tiles = tile(image, TILING)
    pixels, ratio = meta_tiles(references, image)
    assert (tiles.rows, tiles.cols) == ratio
    assert torch.equal(normalised(tiles), pixels)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_transformers_within_rounding(references, size):
    """One step of 255 for the other resize, and half a step since transformers normalises in bfloat16."""
    image = PIL.Image.fromarray(noise(*size))
    tiles = tile(image, TILING)
    pixels, ratio = hf_tiles(references, image)
    assert [tiles.rows, tiles.cols] == ratio
    assert (normalised(tiles) - pixels.float()).abs().max() * 127.5 <= 1.5


def test_the_resize_alone_is_within_one_step():
    image = noise(999, 777)
    pillow = np.asarray(PIL.Image.fromarray(image).resize((336, 300), PIL.Image.Resampling.BILINEAR)).astype(int)
    tensor = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], (300, 336), mode="bilinear", antialias=True)
    assert np.abs(pillow - tensor[0].permute(1, 2, 0).numpy()).max() <= 1


def test_other_tilings():
    vision = VisionConfig(width=32, num_layers=2, num_heads=2, hidden_width=64, tile_pixels=56, adapter_width=48, max_tiles=4)
    tiling = Tiling(tile_pixels=vision.tile_pixels, tokens_per_tile=vision.tokens_per_tile, max_tiles=vision.max_tiles)
    tiles = tile(PIL.Image.fromarray(noise(150, 60)), tiling)
    assert (tiles.rows, tiles.cols, tiles.pixels.shape) == (1, 3, (4, 56, 56, 3))
    assert tiles.pixels.dtype == np.uint8
    assert tiles.pixels.flags.writeable  # torch.from_numpy warns otherwise


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 3), (4, 4), (16, 1)])
def test_tokens_are_those_of_both_references(references, meta_format, llama4, llama4_library, grid):
    ids = image_tokens(Tiles(*grid, np.empty(0, np.uint8)), TILING, llama4.specials)
    text = Llama4Processor._prompt_split_image(None, grid, 144)
    assert ids == llama4_library.encode(text, add_special_tokens=False).ids

    count = grid[0] * grid[1] + (grid != (1, 1))
    assert ids == meta_format._encode_image(references.meta_chat.TransformedImage(torch.empty(count, 3, 336, 336), grid))


def test_tokens_need_a_vocabulary_that_has_them():
    specials = {name: i for name, i in byte_tokenizer().specials.items() if name != "<|patch|>"}
    with pytest.raises(CheckpointError, match=r"has no <\|patch\|>"):
        image_tokens(Tiles(1, 1, np.empty(0, np.uint8)), TILING, specials)


def test_rgba_is_metas(references):
    image = PIL.Image.fromarray(noise(40, 30, 4))
    assert np.array_equal(opened(image), np.asarray(references.meta_chat.convert_image_to_rgb(image)))


def test_transparency_is_transformers_within_a_step():
    """Both lay every kind of transparency on white; Pillow's two ways of blending round apart. Meta does so for RGBA alone."""
    rgba = PIL.Image.fromarray(noise(40, 30, 4))
    grey = PIL.Image.merge("LA", (rgba.getchannel("R"), rgba.getchannel("A")))
    for image in (rgba, grey):
        assert np.abs(opened(image).astype(int) - convert_to_rgb(image, return_numpy=True)).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB"])
def test_transparent_colour_becomes_white(mode):
    image = PIL.Image.new("RGB", (4, 2), (10, 20, 30)).convert(mode)
    image.putpixel((3, 1), {"P": 5, "L": 200, "1": 255, "RGB": (1, 2, 3)}[mode])
    pixels = opened(image, transparency=image.getpixel((3, 1)))
    assert pixels[1, 3].tolist() == [255, 255, 255]
    assert np.array_equal(pixels[0, 0], np.asarray(image.convert("RGB"))[0, 0])


def test_palette_cmyk_and_one_bit(references):
    rgb = PIL.Image.fromarray(noise(40, 30))
    for image, format in ((rgb.quantize(64), "PNG"), (rgb.quantize(64), "GIF"), (rgb.convert("1"), "PNG"), (rgb.convert("CMYK"), "TIFF")):
        assert np.array_equal(opened(image, format), np.asarray(references.meta_chat.convert_image_to_rgb(image)))


@pytest.mark.parametrize("format", images.FORMATS)
def test_every_format_opens(format):
    assert opened(PIL.Image.new("RGB", (5, 4), (255, 0, 0)), format).shape == (4, 5, 3)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format):
    wide = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    expected = np.rint(wide / 257).astype(int)
    pixels = opened(PIL.Image.fromarray(wide), format)
    assert np.array_equal(pixels[..., 0], expected)
    if format == "TIFF":
        assert np.array_equal(opened(PIL.Image.fromarray(wide.astype(np.int32)), format)[..., 0], expected)
    else:
        assert opened(PIL.Image.fromarray(wide), format, transparency=32768)[1, 0].tolist() == [255, 255, 255]


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(PromptError, match="from -1 to 70000"):
        opened(PIL.Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF")
    with pytest.raises(PromptError, match="floating-point"):
        opened(PIL.Image.fromarray(np.array([[0.5]], np.float32)), "TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = PIL.Image.fromarray(noise(6, 4))
    flip = PIL.Image.Transpose
    stored = {  # how a camera that was turned stores it; Source: the EXIF standard, tag 0x0112
        1: [],
        2: [flip.FLIP_LEFT_RIGHT],
        3: [flip.ROTATE_180],
        4: [flip.FLIP_TOP_BOTTOM],
        5: [flip.TRANSPOSE],
        6: [flip.ROTATE_90],
        7: [flip.TRANSVERSE],
        8: [flip.ROTATE_270],
    }[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(opened(image, exif=exif), np.asarray(upright))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(format):
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    assert opened(frames[0], format, save_all=True, append_images=frames[1:], **options)[0, 0].tolist() == [255, 0, 0]


def test_other_formats_are_refused():
    for format in ("PPM", "ICO", "EPS", "PDF", "TGA"):
        with pytest.raises(PromptError, match=r"no image of a known kind\n.*PNG, JPEG"):
            opened(PIL.Image.new("RGB", (16, 16)), format)
    for data in (b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(PromptError, match="no image of a known kind"):
            open_image(Image(data=data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_unopened():
    """Without decoding, and without Pillow's warning, which starts at 89 million pixels and would be an error here."""
    for width, height, message in [
        (20_000, 10_000, "more than 100,000,000 pixels"),
        (10_001, 10_000, "has 100,010,000 pixels; the limit is 100,000,000"),
    ]:
        with pytest.raises(PromptError, match=message):
            open_image(Image(data=png_header(width, height)))
    with pytest.raises(PromptError, match="broken or cut short"):  # 95 million are allowed, were they there
        open_image(Image(data=png_header(9_500, 10_000)))


def test_no_warning_filter_is_left_behind():
    before = list(warnings.filters)
    opened(PIL.Image.new("RGB", (2, 2)))
    assert warnings.filters == before


SMALL = {format: encoded(PIL.Image.fromarray(noise(24, 18)), format).data for format in images.FORMATS}


@pytest.mark.parametrize("format", images.FORMATS)
def test_cut_short(format, monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # Meta's module sets it, once imported
    with pytest.raises(PromptError):
        open_image(Image(data=SMALL[format][: len(SMALL[format]) // 2]))


@given(
    format=st.sampled_from(images.FORMATS),
    changes=st.dictionaries(st.integers(0, 2000), st.integers(0, 255), max_size=8),
    cut=st.integers(0, 3000),
)
def test_broken_images_give_an_image_or_a_prompt_error(format, changes, cut):
    data = bytearray(SMALL[format][: max(cut, 20)])
    for place, byte in changes.items():
        data[place % len(data)] = byte
    with suppress(PromptError):
        assert open_image(Image(data=bytes(data))).mode == "RGB"


def test_read_image(tmp_path):
    data = SMALL["PNG"]
    (tmp_path / "x.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, uri, uri.replace("data:image/png;", "DATA:Image/PNG;name=x;"), tmp_path / "x.png", str(tmp_path / "x.png")):
        assert read_image(source) == Image(data=data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/x.png", "https:// addresses"),
        ("HTTP://example.org/x.png", "HTTP:// addresses"),
        ("file:///etc/passwd", "file:// addresses"),
        ("nothing.png", "no image file 'nothing.png'"),
        ("/", "no image file"),
        ("/dev/zero", "no image file"),
        ("a\0b", "image file"),
        ("x" * 5000, "image file"),
        ("data:text/html;base64,aGk=", "holds 'text/html', not an image"),
        ("data:,hi", "holds 'text/plain', not an image"),
        ("data:image/svg+xml,%3Csvg/%3E", "percent-encoded"),
        ("data:image/png;base64", "is not a data: URI"),
        ("data:image/png;base64,a", "is not base64"),
        ("data:image/png;base64,aGk=!", "is not base64"),
        ("data:image/png;base64,é", "is not base64"),
    ],
)
def test_what_cannot_be_read(source, message):
    with pytest.raises(PromptError, match=message):
        read_image(source)


def test_from_data_uri_reads_no_files():
    with pytest.raises(PromptError, match="is not a data: URI"):
        from_data_uri("/etc/hostname")


def test_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1000)
    data = bytes(1001)
    (tmp_path / "x.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (data, uri, tmp_path / "x.png"):
        with pytest.raises(PromptError, match=r"has 1,001 bytes; the limit is 1,000"):
            read_image(source)
    with pytest.raises(PromptError, match="1,001 bytes"):
        open_image(Image(data=data))
    assert read_image(data[:1000]).data == data[:1000]
