"""Finding the model that a user names: a directory, a GGUF file or a name on the hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from secateur.checkpoint import CONFIG, file_sha256
from secateur.errors import EnvironmentFault, ModelError


def cache_directory() -> Path:
    """Where imported models, compiled libraries and measured figures are kept.

    ``$SECATEUR_CACHE`` or ``~/.cache/secateur``.
    """
    return Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")


def resolve_model(model: str, cache: Path | None = None) -> Path:
    """Turn the name of a model into a directory of safetensors.

    A GGUF file is dequantised once into ``cache`` (default `cache_directory`).

    Raises:
        ModelError: nothing usable has this name.
        EnvironmentFault: it looks like a hub name, but the hub cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file at {path}", "check the path")
        return _import_gguf(path, cache or cache_directory())
    if path.exists() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise ModelError(
            f"there is no model at {model}",
            "give a Hugging Face model directory, a .gguf file, or a hub name like 'org/name'",
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        raise EnvironmentFault(
            f"{model!r} is no directory here and the hub did not give it: "
            f"{str(fault).strip().splitlines()[0]}",
            "check the name and the network, or give the path of a model directory",
        ) from fault


def _import_gguf(path: Path, cache: Path) -> Path:
    output = cache / f"{path.stem}-{file_sha256(path)[:12]}"
    if (output / CONFIG).exists():
        return output
    import transformers

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, OSError, ImportError) as fault:
        raise ModelError(
            f"transformers cannot read {path}: {fault}", "give a model directory instead"
        ) from fault
    # transformers takes a model read from GGUF for a quantised one and would not save it; its
    # weights are plain tensors by now.
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    model._weight_conversions = None
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, output)
    return output
