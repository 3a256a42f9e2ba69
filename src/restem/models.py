"""Models as directories: find one by name, load it, say which weights it holds.

A model is named by a string: "embedded", a local directory, or a hub id. `fingerprint` is the identity of its weights; the
promises "Improve starts from the base" and "the sampler is the last winner" are checked with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restem.errors import MissingExtra, RestemError
from restem.memory import free_bytes, is_out_of_memory

if TYPE_CHECKING:
    from restem.prompts import Renderer


def locate(name: str, *, say: Callable[[str], None] | None = None) -> str:
    """The local directory of a model; fetches the embedded model or a hub model into the user's cache first."""
    if name == "embedded":
        from restem.embedded import embedded_model

        return str(embedded_model(progress=say))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise RestemError(
                f"the model directory {path} has no config.json, so it is no Hugging Face model directory. "
                "Give the folder that save_pretrained wrote: of a model, or of a LoRA adapter."
            )
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise RestemError(
            f'there is no model "{name}": no such directory. '
            'Give a local directory, a hub id such as "HuggingFaceTB/SmolLM2-135M", "embedded" or "toy".'
        )
    return _from_hub(name)


def _from_hub(name: str) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "Loading a model from the hub") from None
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
        return str(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's own errors are many; each means that there is no model to run
        raise RestemError(
            f'the model "{name}" is neither a local directory nor could it be fetched from the hub '
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check the name and the connection, "
            'or give a local directory or "embedded" as model.base.'
        ) from None


def load_model(path: str, *, dtype: Any, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Load the weights (safetensors only) of a causal language model onto a device, ready for inference."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if is_adapter(path):
        return _placed(_merged(path, trust_remote_code=trust_remote_code), path, device, dtype)
    config: Any = None
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        seq2seq = getattr(config, "is_encoder_decoder", False)
        auto: Any = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a quantised model's packages, remote code: whatever it is, there is no model to run
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise _does_not_fit(path, "cpu", _stored_bytes(path)) from error
        raise RestemError(f"the model in {path} cannot be loaded: {_reason(error)}{_quantised(config)}") from error
    return _placed(model, path, device, None)


def _placed(model: Any, path: str, device: str, dtype: Any) -> Any:
    """The model on its device, in evaluation mode. `dtype`: None = as it is."""
    import torch

    if (there := torch.device(device)).type == "cuda" and there.index is not None:
        torch.cuda.set_device(there)  # where compiled kernels and captured graphs go, whatever their tensors are on
    try:
        return model.to(device=device, dtype=dtype).eval()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
        raise _does_not_fit(path, device, size) from error


def _does_not_fit(path: str, device: str, size: int) -> RestemError:
    import torch

    return RestemError(
        f"the model in {path} does not fit {device}: its weights take {size / 1e9:.2f} GB as they are loaded, and "
        f"{free_bytes(torch.device(device)) / 1e9:.2f} GB are free. Free memory there, or take a smaller model, another device "
        '(model.device), or a shorter number format (model.dtype = "bfloat16"; for training improve.weights).'
    )


def _stored_bytes(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def _reason(error: BaseException) -> str:
    """What an error says first, behind its kind where that says more."""
    said = next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, OSError | ValueError) and said
    return said if plain else f"{type(error).__name__}: {said}".rstrip(": ")


def _quantised(config: Any) -> str:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return (
        f"\nIts weights are quantised ({method or 'method not named'}). Give the model they were made from, in plain numbers."
    )


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds a LoRA adapter instead of a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def adapted(path: str | Path) -> str:
    """The directory of the model that an adapter adapts; a whole model's own directory."""
    if not is_adapter(path):
        return str(path)
    name = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise RestemError(f"the adapter in {path} does not name its base model (base_model_name_or_path)")
    return locate(str(name))


def _merged(path: str, *, trust_remote_code: bool) -> Any:
    """An adapter's base with the adapter added to its weights, in float32."""
    import torch

    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtra("peft", "lora", "Loading a LoRA adapter") from None
    base = load_model(adapted(path), dtype=torch.float32, trust_remote_code=trust_remote_code)
    try:
        return PeftModel.from_pretrained(base, path, torch_device="cpu").merge_and_unload()
    except Exception as error:
        raise RestemError(f"the adapter in {path} does not fit its base {adapted(path)}: {_reason(error)}") from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = adapted(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a package that is missing, remote code, a damaged file: there is no tokenizer
        raise RestemError(f"the tokenizer in {path} cannot be loaded: {_reason(error)}") from error


def save_model(model: Any, tokenizer: Any, directory: Path, *, dtype: Any, state: dict[str, Any] | None = None) -> None:
    """Write an ordinary Hugging Face model directory, weights in `dtype`. `state`: the weights, where the model holds parts."""
    converted: dict[Any, Any] = {}  # by memory: tied weights stay one tensor, and are written once
    stored = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        if tensor.is_floating_point():
            tensor = converted.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
        stored[name] = tensor
    model.save_pretrained(directory, state_dict=stored)
    # save_pretrained writes down the number format of the model in memory, not that of the tensors it is given.
    config = directory / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(directory)


def storage_dtype(path: str) -> Any:
    """The number format in which a model directory stores its weights (of an adapter: its base); float32 if it does not say."""
    import torch

    config = json.loads((Path(adapted(path)) / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name), torch.float32)


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model directory (of an adapter: its base's); of a hub id only that file is fetched."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(adapted(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RestemError(f"the config of the model {path} cannot be read: {_reason(error)}") from error


def context_length(path: str, *, trust_remote_code: bool = False) -> int:
    """The most tokens of a text that a model directory's model is made for."""
    config = load_config(path, trust_remote_code=trust_remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def fingerprint(path: str) -> str:
    """Hash of the names and values of a model directory's weights: 16 hexadecimal digits.

    Values are compared as float32, so that a bfloat16 model and its exact float32 copy agree. An adapter's hash is made of its
    own and its base's.
    """
    if is_adapter(path):
        both = _fingerprint(path) + fingerprint(adapted(path))
        return hashlib.blake2b(both.encode(), digest_size=8).hexdigest()
    return _fingerprint(path)


def _fingerprint(path: str) -> str:
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise RestemError(f"the model directory {path} holds no .safetensors file; restem loads no other format")
    return _fingerprint_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.cache
def _fingerprint_of(files_and_stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Files with their sizes and times: while these stay, they are read once per process."""
    from safetensors import safe_open

    files = [file for file, _, _ in files_and_stamps]
    where = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            where.update(dict.fromkeys(handle.keys(), file))
    handles: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in files}
    return fingerprint_tensors((name, handles[where[name]].get_tensor(name)) for name in sorted(where))


def fingerprint_tensors(tensors: Iterable[tuple[str, Any]]) -> str:
    """The same hash, of (name, tensor) pairs sorted by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(memoryview(tensor.detach().float().contiguous().cpu().numpy()).cast("B"))
    return digest.hexdigest()


def end_ids(model: Any, renderer: Renderer) -> frozenset[int]:
    """Every token that ends a completion: the tokenizer's end token and those of the model's generation settings."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = more if isinstance(more, list) else [] if more is None else [more]
    return frozenset([renderer.end_id, *more])


def logits_of(model: Any, hidden: Any) -> Any:
    """Logits of last hidden states, scaled and capped as the model's own forward pass does."""
    return shape_logits(model, model.get_output_embeddings()(hidden))


def shape_logits(model: Any, raw: Any) -> Any:
    """Logits from what the output layer gives: scaled and capped, number by number."""
    config = model.config.get_text_config()
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        return raw / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        return raw * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        return (raw / cap).tanh() * cap
    return raw


def shapes_logits(model: Any) -> bool:
    """Whether `shape_logits` changes anything."""
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"))


def compute_dtype(choice: str, device: str, *, training: bool = False) -> Any:
    """The number format for "auto": bfloat16 where the device multiplies in it natively, else float32.

    A CUDA card without bfloat16 samples in float16, in which it is several times as fast as in float32. It trains in float32:
    small gradients vanish in float16.
    """
    import torch

    if choice != "auto":
        return getattr(torch, choice)
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32 if training else torch.float16
    if device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def pick_device(choice: str) -> str:
    """The device for "auto": CUDA, else the CPU. Another one is refused: on no other was restem ever shown to be right."""
    import torch

    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(choice)
    except RuntimeError:
        raise RestemError(
            f'model.device = "{choice}": there is no such device. Use "auto", "cpu", "cuda" or "cuda:1".'
        ) from None
    if device.type == "cpu":
        return "cpu"  # whose index means nothing
    if device.type != "cuda":
        why = (
            "it has no float64, which sampling and training compute in" if device.type == "mps" else "it was never tried there"
        )
        raise RestemError(f'model.device = "{choice}": restem does not run there, since {why}. Use model.device = "cpu" here.')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        here = f"{count} of them, cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0" if count else "no CUDA device"
        raise RestemError(f'model.device = "{choice}" cannot be used: there is {here} here. Use "auto" or "cpu".')
    try:
        torch.empty(1, device=choice)
    except (RuntimeError, AssertionError) as error:  # in use by another process alone, an older driver
        raise RestemError(f'model.device = "{choice}" cannot be used here: {_reason(error)}') from None
    return choice
