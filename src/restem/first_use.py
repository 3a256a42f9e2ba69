"""A device is tried before a run relies on it: once for each architecture and number format, and the result is kept.

The key holds whatever the result depends on: the device, the model's sizes, the versions of torch and transformers, and
restem's own code. Only a trial that passed is relied on; one that failed is done again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from restem import attention_flex
from restem.embedded import cache_dir
from restem.errors import RestemError
from restem.files import read_json, write_json
from restem.miniature import miniature, miniature_config
from restem.trial import Finding, Formats, first_line, trial


class Tried(NamedTuple):
    """The result of trying a device with an architecture."""

    findings: list[Finding]
    without_flex: str = ""
    """Why FlexAttention is not used there, though the device could have it: what was wrong with it. "" = it is used."""

    @property
    def passed(self) -> bool:
        return all(finding.verdict == "ok" for finding in self.findings)

    @property
    def bad(self) -> list[Finding]:
        """What the device computes wrongly, or not at all. An architecture that the tree serves nowhere is neither this nor
        passed."""
        return [finding for finding in self.findings if finding.verdict in ("wrong", "crash")]


def on_first_use(config: Any, device: str, formats: Formats, say: Callable[[str], None], *, trains: bool) -> None:
    """Try a device with the architecture of a config unless it passed before; RestemError if the tree is not right there.

    `trains`: whether a gradient is needed, too.
    """
    try:
        small = miniature_config(config)
        tried = recall(key_of(small, device, formats))
        is_new = tried is None or not tried.passed
        if tried is None or is_new:
            tried = try_device(small, device, formats)
    except Exception as error:  # an architecture with rules of its own for its sizes; the check at loading remains
        why = f"with a small {config.model_type} model ({first_line(error)})"
        say(f"warning: the tree could not be tried on {device_name(device)} {why}")
        return
    needed = {"logits", "decoding", "gradient"} if trains else {"logits", "decoding"}
    bad = [finding for finding in tried.bad if finding.what in needed]
    where = f"tree against {small.model_type} on {device_name(device)}, {formats_text(formats)}"
    if bad:
        raise RestemError(
            f"{where}: {'; '.join(finding.words() for finding in bad)}. A run here would not compute what the model does. Use "
            'model.device = "cpu", or another number format (model.dtype, improve.dtype). `restem doctor --model MODEL` tries '
            "every device; please report what it says."
        )
    if tried.without_flex:
        attention_flex.refuse(_whole(device), tried.without_flex)
        say(f"warning: FlexAttention fails on {device_name(device)} ({tried.without_flex}); attention is computed without it")
    if is_new and all(finding.verdict != "refused" for finding in tried.findings):  # which is said when it is loaded
        say(f"checked {where}: {', '.join(finding.words() for finding in tried.findings)}")


def try_device(small: Any, device: str, formats: Formats) -> Tried:
    """Try a device anew and keep the result. `small`: the config of a miniature. Where it fails with FlexAttention, it is tried
    without."""
    key = key_of(small, device, formats)  # first: a model writes into its config
    model = miniature(small, device)
    tried = Tried(trial(model, formats))
    if tried.bad and attention_flex.serves(model.device):
        reason = "; ".join(finding.words() for finding in tried.bad)
        attention_flex.refuse(model.device, reason)
        again = Tried(trial(model, formats), reason)
        tried = again if again.passed else tried
    keep(key, tried)
    del model
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return tried


def _whole(device: str) -> torch.device:
    """A device with its index, as its tensors name it."""
    found = torch.device(device)
    return found if found.index is not None or found.type != "cuda" else torch.device("cuda", torch.cuda.current_device())


def key_of(config: Any, device: str, formats: Formats) -> dict[str, str]:
    """What a result holds for. `config`: of the miniature."""
    settings = {
        name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")
    }
    return {
        "device": device_name(device),
        "architecture": config.model_type,
        "sizes": _digest(json.dumps(settings, sort_keys=True, default=str).encode()),
        "sampling": str(formats.sampling),
        "training": str(formats.training),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "restem": _source(),
    }


def keep(key: dict[str, str], tried: Tried) -> None:
    """Write a result into the user's cache. A cache that cannot be written costs a second the next time."""
    findings = [asdict(finding) for finding in tried.findings]
    try:
        _file(key).parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(key), {"key": key, "findings": findings, "without_flex": tried.without_flex})
    except OSError:
        return


def recall(key: dict[str, str]) -> Tried | None:
    """What was kept for this key; None = nothing."""
    try:
        kept = read_json(_file(key))
        return Tried([Finding(**finding) for finding in kept["findings"]], kept["without_flex"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(key: dict[str, str]) -> Path:
    return cache_dir() / "trials" / f"{_digest(json.dumps(key, sort_keys=True).encode())}.json"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=10).hexdigest()


@cache
def _source() -> str:
    """A hash of restem's own code: the version does not tell two states of a checkout apart."""
    return _digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))


def device_name(device: str) -> str:
    """As users know it: "NVIDIA H200"; a CPU by its architecture."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"the CPU ({platform.machine()})" if torch.device(device).type == "cpu" else device


def formats_text(formats: Formats) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in formats]
    return names[0] if names[0] == names[1] else f"{names[0]} (training {names[1]})"
