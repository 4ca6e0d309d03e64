"""Text: where calibration and evaluation text comes from, and how it becomes token windows.

For image classifiers: images of a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from secateur.checkpoint import CONFIG
from secateur.errors import EnvironmentFault, ModelError
from secateur.model import load_causal_lm, load_tokenizer
from secateur.progress import Tick, no_tick, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from secateur.model import StreamedModel
    from secateur.recipe import Calibration

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
# Short names for the data sets of the pruning papers: repository, configuration, split, files.
_HUB_SETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
    "c4": ("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz"),
}


def read_text(data: str) -> str:
    """Fetch a text by its name in a recipe.

    Args:
        data: 'pydoc', a .txt or .jsonl file (key 'text' or 'content'), 'wikitext2', 'c4', or the
            name of a Hugging Face data set with a column 'text'.

    Raises:
        ModelError: the text is missing, empty or not in a known form.
        EnvironmentFault: the data set needs the hub, or the `datasets` library, and has neither.
    """
    path = Path(data)
    if data == "pydoc":
        text = _pydoc()
    elif path.suffix in (".txt", ".jsonl"):
        text = _file(path)
    else:
        text = _dataset(data)
    if not text.strip():
        raise ModelError(f"the text {data!r} is empty", "give a file or data set that has text")
    return text


def _pydoc() -> str:
    """Python's language reference as the interpreter carries it: real prose on every machine."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _file(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise ModelError(
            f"the text file {path} cannot be read: {fault.strerror}",
            "check the path, or use the default --data self, which needs no file",
        ) from fault
    except UnicodeDecodeError as fault:
        raise ModelError(f"{path} is not UTF-8 text", "convert the file to UTF-8") from fault
    if path.suffix == ".txt":
        return content
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            document = record.get("text", record.get("content"))
        except (json.JSONDecodeError, AttributeError):
            document = None
        if not isinstance(document, str):
            raise ModelError(
                f"{path}, line {number} is not a JSON object with a 'text'",
                'write one object a line: {"text": "…"}',
            )
        documents.append(document)
    return "\n\n".join(documents)


def _dataset(name: str) -> str:
    repository, configuration, split, file = _HUB_SETS.get(name, (name, None, "train", None))
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            f"the data set {name!r} needs the `datasets` library, which is not installed",
            "pip install 'secateur[data]', or give a .txt or .jsonl file",
        ) from None
    try:
        rows = datasets.load_dataset(repository, configuration, split=split, data_files=file)
    except (OSError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as fault:
        raise EnvironmentFault(
            f"the data set {name!r} cannot be loaded: {str(fault).splitlines()[0]}",
            "check the name and the network, or give a .txt or .jsonl file",
        ) from fault
    except ValueError as fault:
        raise ModelError(
            f"the data set {name!r} cannot be used: {fault}", "name another"
        ) from fault
    if "text" not in rows.column_names:
        raise ModelError(
            f"the data set {name!r} has no column 'text' (it has {', '.join(rows.column_names)})",
            "export the text to a .txt or .jsonl file",
        )
    return "\n\n".join(rows["text"])


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokenise a whole text once, without special tokens: int64 ``[tokens]``."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_inputs(
    model: StreamedModel, calibration: Calibration, quiet: bool = True
) -> dict[str, torch.Tensor]:
    """The samples of a recipe as arguments of the model.

    Returns:
        ``{"input_ids": [samples, length]}``; of an image classifier ``{"pixel_values": [samples,
        channels, height, width], "labels": [samples]}``.

    Raises:
        ModelError: text or images that are missing or unfit, a model that cannot start a text.
    """
    checkpoint = model.checkpoint
    if calibration.data.endswith(".safetensors"):
        return _stored(Path(calibration.data), model)
    if model.architecture.reads == "images":
        return _images(model, calibration)
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    length = min(calibration.length, limit or calibration.length)
    if calibration.data != "self":
        ids = token_ids(load_tokenizer(checkpoint.path), read_text(calibration.data))
        windows = draw_windows(ids, calibration.samples, length, calibration.seed)
        return {"input_ids": windows}
    config = model.module.config
    first = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if first is None:
        raise ModelError(
            f"{checkpoint.path / CONFIG} names no bos_token_id, so the model cannot start a text "
            "by itself",
            "give calibration text with --data FILE",
        )
    starts = [[first[0] if isinstance(first, list) else first]]
    user = conversation_start(checkpoint.path)
    if 0 < len(user) <= length // 2 and calibration.samples > 1:
        starts.append(user)
    dense = load_causal_lm(checkpoint.path, model.dtype or "auto").to(model.device)
    with progress("writing calibration text (tokens)", quiet) as tick:
        own = self_generated(dense, starts, calibration.samples, length, calibration.seed, tick)
    return {"input_ids": own}


def conversation_start(path: Path) -> list[int]:
    """Token ids of a conversation up to where the user's first word comes.

    An instruction-tuned model goes on with a question and its own answer (Xu et al. 2024,
    "Magpie", section 2). Empty for a model without a tokenizer or a chat template.
    """
    from jinja2 import TemplateError

    said = "WHAT-THE-USER-SAYS"
    try:
        tokenizer = load_tokenizer(path)
        if not tokenizer.chat_template:
            return []
        text = tokenizer.apply_chat_template([{"role": "user", "content": said}], tokenize=False)
    except (ModelError, TemplateError):  # a template may insist on more than a user's message
        return []
    start, found, _ = str(text).rpartition(said)
    ids: list[int] = tokenizer(start, add_special_tokens=False)["input_ids"] if found else []
    return ids


def _stored(file: Path, model: StreamedModel) -> dict[str, torch.Tensor]:
    """Samples that were made before, e.g. by a model that wrote them itself."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = "input_ids" if model.architecture.reads == "text" else "pixel_values"
    try:
        inputs = load_file(file)
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{file} cannot be read: {fault}", "give a safetensors file") from fault
    if name not in inputs or not len(inputs[name]):
        raise ModelError(
            f"{file} holds no samples {name!r}; it holds: {', '.join(sorted(inputs))}",
            "store input_ids [samples, length], or pixel_values [samples, channels, height, width]",
        )
    if name == "input_ids":
        ids, vocabulary = inputs[name], int(model.checkpoint.config.get("vocab_size", 0))
        if (
            ids.ndim != 2
            or ids.is_floating_point()
            or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
        ):
            raise ModelError(
                f"{file}: input_ids {list(ids.shape)} are no ids [samples, length] of this model's "
                f"{vocabulary} tokens",
                "make them with this model's tokenizer",
            )
        inputs = {name: ids.long()}
    return inputs


def _images(model: StreamedModel, calibration: Calibration) -> dict[str, torch.Tensor]:
    """Images of a folder, drawn without repetition, through the model's own processor.

    Where the images lie in sub-folders named like the model's classes, these are their labels;
    else the label is what the model itself sees in them.
    """
    import torch
    import transformers

    path, folder = model.checkpoint.path, Path(calibration.data)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGES)
    if not files:
        raise ModelError(
            f"{path} classifies images and {calibration.data!r} is no folder of images "
            f"({', '.join(sorted(_IMAGES))})",
            "give one with --data DIR",
        )
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise EnvironmentFault(
            "reading images needs Pillow, which is not installed", "pip install 'secateur[images]'"
        ) from None
    chosen = Random(calibration.seed).sample(files, min(calibration.samples, len(files)))
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(str(path))
        images = []
        for file in chosen:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
    except (OSError, ValueError, UnidentifiedImageError) as fault:
        raise ModelError(
            f"the calibration images cannot be prepared: {fault}",
            "check the images, and that the model has its preprocessor_config.json",
        ) from fault
    pixels: torch.Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    known = model.module.config.label2id
    if all(file.parent.name in known for file in chosen):
        labels = [int(known[file.parent.name]) for file in chosen]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}
    dense = transformers.AutoModelForImageClassification.from_pretrained(str(path)).eval()
    with torch.no_grad():
        rows = [dense(pixel_values=image[None]).logits.argmax(-1) for image in pixels]
    return {"pixel_values": pixels, "labels": torch.cat(rows)}


def draw_windows(ids: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """Draw windows from a token stream: ``[samples, min(length, tokens)]``.

    Starts come from ``random.Random(seed).randint(0, tokens - length - 1)``, one per sample, as
    in the code of the pruning papers; windows may overlap.

    Raises:
        ModelError: the text has fewer than two tokens.
    """
    import torch

    if len(ids) < 2:
        raise ModelError(
            f"the calibration text has {len(ids)} tokens", "give a text of at least a paragraph"
        )
    length = min(length, len(ids))
    random = Random(seed)
    last = max(0, len(ids) - length - 1)
    starts = [random.randint(0, last) for _ in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def self_generated(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    samples: int,
    length: int,
    seed: int,
    tick: Tick = no_tick,
) -> torch.Tensor:
    """Let a model write its own calibration text: ``[samples, length]`` token ids.

    Plain sampling (temperature 1, no truncation), as in data-free quantisation (Liu et al. 2023,
    "LLM-QAT", section 3.1). Needs the whole model in memory.

    Args:
        model: the dense model.
        starts: token ids that a text begins with, each shorter than ``length``; as many samples
            of each, in this order.
        tick: called with (tokens done, tokens in all).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    most = max(1, min(32, 32768 // length))
    rows: list[torch.Tensor] = []
    with torch.no_grad():
        for number, start in enumerate(starts):
            share = len(range(number, samples, len(starts)))
            for batch in torch.split(torch.tensor([list(start)] * share), most):
                step, columns, cache = batch, [batch], _cache(model, length)
                for position in range(len(start), length):
                    out = model(step.to(model.device), past_key_values=cache, use_cache=True)
                    chances = out.logits[:, -1].float().softmax(-1).cpu()
                    step = torch.multinomial(chances, 1, generator=generator)
                    columns.append(step)
                    done = sum(map(len, rows)) * length + len(batch) * (position + 1)
                    tick(done, samples * length)
                rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


def _cache(model: PreTrainedModel, length: int) -> Cache:
    """A KV cache that is written in place: transformers' own copies itself at every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Reserved(DynamicLayer):  # type: ignore[misc]
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                batch, heads = key_states.shape[:2]
                self.room = [
                    states.new_empty(batch, heads, length, states.shape[-1])
                    for states in (key_states, value_states)
                ]
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room[:, :, start:end] = states
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [Reserved() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
