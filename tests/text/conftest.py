"""What the text tests share: the released Llama 4 tokenizer (it is part of the llama_models wheel) and the references' image code."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import hypothesis
import PIL.ImageFile
import pytest
import tokenizers
from llama_models.llama4.args import Size, VisionArgs
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

from herd.text.special import LLAMA4_SPECIALS
from herd.text.tokenizer import JsonTokenizer, TiktokenTokenizer, bpe_json, spell
from tests import standins
from tests.text.texts import WHEEL

hypothesis.settings.register_profile("herd", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("herd")


@pytest.fixture(scope="session")
def llama4() -> TiktokenTokenizer:
    return TiktokenTokenizer((WHEEL / "tokenizer.model").read_bytes())


@pytest.fixture(scope="session")
def llama4_json(llama4: TiktokenTokenizer) -> JsonTokenizer:
    """The same vocabulary by way of its merges, as a GGUF file would hold it."""
    tokens = [spell(llama4.token_bytes(i)) for i in range(200_000)] + list(LLAMA4_SPECIALS)
    merges = [f"{spell(a)} {spell(b)}" for a, b in llama4.merges()]
    return JsonTokenizer(bpe_json(tokens, merges, pre="llama4", specials=llama4.specials))


@pytest.fixture(scope="session")
def llama4_library(llama4_json: JsonTokenizer) -> tokenizers.Tokenizer:
    """Hugging Face's library as its users have it: special tokens are found in the text."""
    return tokenizers.Tokenizer.from_str(llama4_json.files()["tokenizer.json"].decode())


@pytest.fixture(scope="session")
def donor(donor_gguf: Path) -> JsonTokenizer:
    """SmolLM2's tokenizer, from the GGUF file of the default model."""
    fields = gguf.GGUFReader(donor_gguf).fields
    tokens, kinds, merges, pre = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges", "pre"))
    specials = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == gguf.TokenType.CONTROL}
    return JsonTokenizer(bpe_json(tokens, merges, pre=pre, specials=specials))


@pytest.fixture(scope="session")
def references() -> Iterator[SimpleNamespace]:
    """Meta's and transformers' own image code: `meta`, `meta_chat` and `hf` are their modules. torchvision is a stand-in."""
    import transformers.image_processing_backends as backends  # before the stand-in, so that transformers does not take it for the real one

    modules = standins.torchvision()
    with standins.installed(modules), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # Meta's module sets it for the whole process
        import llama_models.llama4.chat_format as meta_chat
        import llama_models.llama4.preprocess as meta
        import transformers.models.llama4.image_processing_llama4 as hf

        patch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        patch.setattr(backends, "tvF", modules["torchvision.transforms.v2.functional"], raising=False)
        yield SimpleNamespace(meta=meta, meta_chat=meta_chat, hf=hf)


@pytest.fixture(scope="session")
def meta_format(references: SimpleNamespace) -> Any:
    """Meta's renderer, with the vision geometry of the released models."""
    vision = VisionArgs(
        image_size=Size(height=336, width=336),
        patch_size=Size(height=14, width=14),
        dim=1408,
        n_layers=34,
        n_heads=16,
        mlp_ratio=4,
        output_dim=4096,
        pixel_shuffle_ratio=0.5,
    )
    return references.meta_chat.ChatFormat(MetaTokenizer.get_instance(), vision)
