"""Make compressed.json: two matrices as the compressed-tensors package compresses them, and what it reads from them again; one in float32.

pip install compressed-tensors==0.20.0
python -m tests.checkpoint.golden.make_compressed
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("compressed.json")
SCHEMES = {"pack-quantized": "W4A16", "float-quantized": "FP8_DYNAMIC"}


def compressor(format: str) -> tuple[Any, Any]:
    """The package's class for a format, and the published scheme of it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    return BaseCompressor.get_value_from_registry(format), preset_name_to_scheme(SCHEMES[format], ["Linear"])


def main() -> None:
    golden: dict[str, Any] = {"compressed_tensors": version("compressed-tensors")}
    generator = torch.Generator().manual_seed(0)
    for format in SCHEMES:
        made, scheme = compressor(format)
        weight = torch.randn(8, 256 if format == "pack-quantized" else 64, generator=generator).bfloat16()
        group, largest = (128, 7.5) if format == "pack-quantized" else (64, 448)
        scale = weight.view(8, -1, group).abs().amax(-1) / largest
        packed = made.compress({"weight": weight, "weight_scale": scale}, scheme)
        codes = packed["weight_packed"] if format == "pack-quantized" else packed["weight"].view(torch.uint8)
        read = made.decompress({**packed, "weight_scale": scale.float()}, scheme)["weight"]
        assert read.dtype == torch.float32
        golden[format] = {"codes": codes.tolist(), "scale": scale.float().tolist(), "weight": read.tolist()}
    made, scheme = compressor("float-quantized")
    weight = torch.randn(8, 64, generator=generator)
    scale = (weight.abs().amax(-1, keepdim=True) / 448).bfloat16().float()
    codes = made.compress({"weight": weight, "weight_scale": scale}, scheme)["weight"].view(torch.uint8)
    golden["float32"] = {"given": weight.tolist(), "scale": scale.tolist(), "codes": codes.tolist()}
    PATH.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
