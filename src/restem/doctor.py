"""`restem doctor`: what this machine has, and whether the tree computes on its devices what a model does.

What is tried is a small random model of an architecture (`restem.trial`): a second on each device, and nothing is fetched.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from restem.show import table

_RANDOM: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
_RANDOM |= {"num_hidden_layers": 2, "vocab_size": 512}


def machine(model: str | None = None) -> dict[str, Any]:
    """What `restem doctor` says. `model`: whose architecture is tried; None = the embedded model's if it is here already, else
    that of a Llama of no importance."""
    import torch

    from restem.models import compute_dtype, pick_device
    from restem.rundir import hardware, versions

    device, config = pick_device("auto"), _config(model)
    extras = {"hub": "datasets", "lora": "peft", "ray": "ray", "vllm": "vllm", "openai": "openai"}
    extras |= {"lm-eval": "lm_eval", "reasoning-gym": "reasoning_gym"}
    return {
        "device": device,
        "sampler dtype": _name(compute_dtype("auto", device)),
        "training dtype": _name(compute_dtype("auto", device, training=True)),
        "threads": torch.get_num_threads(),
        **hardware(),
        "devices": [_tried(config, name) for name in devices()],
        "extras": {name: find_spec(module) is not None for name, module in extras.items()},
        "versions": versions(),
        "sandbox": sandbox_facts(),
    }


def devices() -> list[str]:
    """Every device that restem computes on here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _config(model: str | None) -> Any:
    from transformers import LlamaConfig

    from restem.embedded import cached_model
    from restem.models import load_config

    if model in (None, "embedded"):
        made = cached_model()
        return LlamaConfig(**_RANDOM) if made is None else load_config(str(made))
    assert model is not None
    return load_config(str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model)


def _tried(config: Any, device: str) -> dict[str, Any]:
    """The tree on one device, tried anew; the result is kept for the runs to come."""
    from restem.first_use import Tried, device_name, try_device
    from restem.miniature import miniature_config
    from restem.models import compute_dtype
    from restem.trial import Finding, Formats, first_line

    formats = Formats(compute_dtype("auto", device), compute_dtype("auto", device, training=True))
    try:
        tried = try_device(miniature_config(config), device, formats)
    except Exception as error:  # a device that cannot be used at all is what this command is to show
        dtype = _name(formats.sampling)
        tried = Tried([Finding(what="logits", dtype=dtype, verdict="crash", reason=first_line(error))])
    return {
        "device": device,
        "name": device_name(device),
        "model": config.model_type,
        "findings": [asdict(finding) for finding in tried.findings],
        "without_flex": tried.without_flex,
    }


def sandbox_facts() -> dict[str, Any]:
    """The rung of the sandbox ladder that holds here, why the others are not used, and how long programs may take."""
    from restem.sandbox import examine, slowness

    rungs = examine()
    failures = {rung: list(reasons) for rung, reasons in rungs.failures.items() if reasons}
    return {"rung": rungs.best, "time_limit_factor": slowness(), "failures": failures}


def is_right(facts: dict[str, Any]) -> bool:
    """Whether the tree is right on every device, as far as it serves the model."""
    return all(finding["verdict"] in ("ok", "refused") for device in facts["devices"] for finding in device["findings"])


def machine_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    names = ("device", "sampler dtype", "training dtype", "threads", "cores", "system")
    lines = [f"{name:<14} {facts[name]}" for name in names]
    lines.append(f"{'memory':<14} {facts['memory_bytes'] / 2**30:.1f} GiB")
    lines += [
        f"{'extra ' + name:<14} " + ("installed" if there else f'absent: pip install "restem[{name}]"')
        for name, there in facts["extras"].items()
    ]
    sandbox = facts["sandbox"]
    lines.append(f"{'sandbox':<14} {sandbox['rung'] or 'none holds here: programs of a model are not run'}")
    lines.append(f"{'':<14} time limits of programs x {sandbox['time_limit_factor']:g}, by the speed of Python here")
    lines += [f"{'':<14} not {rung}: {'; '.join(reasons)}" for rung, reasons in sandbox["failures"].items()]
    lines.append(f"{'versions':<14} " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    return "\n".join([*lines, "", devices_text(facts["devices"])])


def devices_text(devices: list[dict[str, Any]]) -> str:
    """One line for each use of the tree on each device, and below them what went wrong."""
    header = ["device", "what", "format", "tree", "own pass", "verdict"]
    rows, reasons = [], []
    for device in devices:
        for finding in device["findings"]:
            sizes = [_size(finding["what"], finding[key]) for key in ("error", "own")]
            rows.append([device["device"], finding["what"], finding["dtype"], *sizes, finding["verdict"]])
            reasons += [f"{device['device']}: {finding['reason']}"] if finding["reason"] else []
        if device["without_flex"]:
            reasons.append(
                f"{device['device']}: FlexAttention fails ({device['without_flex']}); attention is computed without it"
            )
    named = ", ".join(f"{device['device']} = {device['name']}" for device in devices)
    return "\n".join(
        [
            f"the tree on a small random {devices[0]['model']} model, and the model's own pass: how far each is from float32",
            table(header, rows),
            named,
            *reasons,
        ]
    )


def _size(what: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1g} nats" if what == "decoding" else f"{value:.2g}"
