"""Models: which architectures are supported, and how a model directory is opened.

Support is data (`ARCHITECTURES`): where the decoder blocks are. Which linears there are, and which
of them share an input, is seen in the model itself. To describe a new architecture add an entry;
nothing else needs to know its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint import Checkpoint
from secateur.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where things are in a family of models.

    Attributes:
        blocks: path of the list of decoder blocks.
    """

    blocks: str


_LLAMA_LIKE = Architecture(blocks="model.layers")

# By `model_type` of config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Look up the architecture of a ``config.json``.

    Raises:
        ModelError: it is not supported; says which are and how to describe a new one.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {kind!r} is not supported (supported: {', '.join(ARCHITECTURES)})",
            "describe it by one entry in secateur.model.ARCHITECTURES; docs/prune.md shows how",
        )
    return ARCHITECTURES[kind]


class StreamedModel:
    """A causal LM of which only the part in use is in memory.

    The module tree is built without weights; `load_block` fills one decoder block from the
    checkpoint and `free_block` empties it again.

    Args:
        checkpoint: where the weights are.
        device: where blocks are loaded to.
        dtype: the type that they are loaded and run in.

    Raises:
        ModelError: unsupported architecture, or a checkpoint that does not fit its config.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        import accelerate
        import transformers

        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.architecture = architecture_of(checkpoint.config)
        if "quantization_config" in checkpoint.config:
            method = checkpoint.config["quantization_config"].get("quant_method")
            raise ModelError(
                f"{checkpoint.path} is already compressed (quant_method {method!r})",
                "prune the uncompressed model",
            )
        try:
            config = transformers.AutoConfig.from_pretrained(str(checkpoint.path))
            with accelerate.init_empty_weights(include_buffers=False):
                self.module = transformers.AutoModelForCausalLM.from_config(config).eval()
        except (ValueError, KeyError, TypeError) as fault:
            raise ModelError(
                f"{checkpoint.path / 'config.json'} does not describe a model: {fault}",
                "copy config.json from the original model",
            ) from fault
        self.module.requires_grad_(False)
        self.blocks: torch.nn.ModuleList = self.module.get_submodule(self.architecture.blocks)

    def block_prefix(self, index: int) -> str:
        """The name of a block with a dot behind it, e.g. ``model.layers.3.``."""
        return f"{self.architecture.blocks}.{index}."

    def linears(self, index: int) -> dict[str, torch.nn.Linear]:
        """The linear layers of a block by their full names, in the order of the module tree."""
        import torch

        prefix = self.block_prefix(index)
        return {
            prefix + name: module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    def tensor_names(self, index: int | None) -> list[str]:
        """Names in the checkpoint of a block's tensors; None: those outside all blocks."""
        inside = f"{self.architecture.blocks}."
        if index is not None:
            inside = self.block_prefix(index)
            return [name for name in self.checkpoint.names() if name.startswith(inside)]
        return [name for name in self.checkpoint.names() if not name.startswith(inside)]

    def load_block(self, index: int, read: Callable[[str], torch.Tensor] | None = None) -> None:
        """Fill a block with its weights, from the checkpoint or by another ``read(name)``."""
        self._fill(self.blocks[index], self.block_prefix(index), read or self.checkpoint.load)

    def free_block(self, index: int) -> None:
        """Drop the weights of a block."""
        self._empty(self.blocks[index])

    def load_outside(self) -> None:
        """Fill everything outside the blocks except the output head."""
        head = self.module.get_output_embeddings()
        for name, owner in self._outside():
            if owner is not head:
                prefix = f"{name}." if name else ""
                self._fill(owner, prefix, self.checkpoint.load, recurse=False)

    def free_outside(self) -> None:
        """Drop the weights outside the blocks."""
        for _, owner in self._outside():
            self._empty(owner, recurse=False)

    def _outside(self) -> Iterator[tuple[str, torch.nn.Module]]:
        inside = self.architecture.blocks
        for name, owner in self.module.named_modules():
            if name != inside and not name.startswith(f"{inside}."):
                yield name, owner

    def _fill(
        self,
        owner: torch.nn.Module,
        prefix: str,
        read: Callable[[str], torch.Tensor],
        recurse: bool = True,
    ) -> None:
        import torch

        for name, parameter in list(owner.named_parameters(recurse=recurse)):
            tensor = read(prefix + name)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{prefix + name} is {list(tensor.shape)} in {self.checkpoint.path} but "
                    f"config.json asks for {list(parameter.shape)}",
                    "copy config.json and the weights from one model",
                )
            holder = owner.get_submodule(name.rpartition(".")[0])
            filled = torch.nn.Parameter(
                tensor.to(self.device, self.dtype or tensor.dtype), requires_grad=False
            )
            holder.register_parameter(name.rpartition(".")[2], filled)
        for buffer_owner in owner.modules() if recurse else [owner]:
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(self.device))

    def _empty(self, owner: torch.nn.Module, recurse: bool = True) -> None:
        import torch

        for module in owner.modules() if recurse else [owner]:
            for name, parameter in module.named_parameters(recurse=False):
                meta = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
                module.register_parameter(name, meta)


def load_causal_lm(path: str | Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Open a dense, pruned or packed model directory with transformers, ready for inference.

    Args:
        path: the directory.
        dtype: type to compute in; "auto" takes the one in config.json.

    Raises:
        ModelError: the directory is missing, damaged or of an unknown architecture.
    """
    import transformers

    Checkpoint(path)  # missing and damaged files: our sentence instead of a traceback
    transformers.utils.logging.disable_progress_bar()  # loading takes a second or two
    try:
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as fault:
        raise ModelError(
            f"transformers cannot open {path}: {fault}", "check config.json"
        ) from fault
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model directory.

    Raises:
        ModelError: the directory has none.
    """
    import transformers

    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True
        )
    except (ValueError, KeyError, OSError) as fault:
        raise ModelError(
            f"{path} has no usable tokenizer: {fault}",
            "copy tokenizer.json and tokenizer_config.json from the original model",
        ) from fault
    return tokenizer
