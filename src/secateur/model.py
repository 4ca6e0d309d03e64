"""How a model directory is opened: whole, with transformers, or one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.architecture import Channels, architecture_of
from secateur.checkpoint import Checkpoint
from secateur.device import return_free_memory
from secateur.errors import ModelError
from secateur.orphans import refuse_orphan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Part = Literal["whole", "gate", "up", "down"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix of a block, ``y = W x``, wherever its module keeps it.

    Attributes:
        name: its name in the checkpoint, without ``.weight``.
        module: the module that holds it: a linear, a GPT-2 ``Conv1D``, or fused experts.
        shape: ``(out, in)``.
        expert, part: which expert's, and which of its matrices; "whole": the module's only one.
        transposed: whether it is stored ``[in, out]``, as Conv1D does.
        router: whether it routes tokens to experts.
    """

    name: str
    module: torch.nn.Module
    shape: tuple[int, int]
    expert: int = 0
    part: Part = "whole"
    transposed: bool = False
    router: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """``[out, in]``, a view of the module's parameter."""
        return self.part_of(self.parameter.data)

    @property
    def gradient(self) -> torch.Tensor | None:
        """``[out, in]``, a view of the parameter's gradient."""
        gradient = self.parameter.grad
        return None if gradient is None else self.part_of(gradient)

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The parameter that the weight is, or is a part of."""
        name = {"whole": "weight", "down": "down_proj"}.get(self.part, "gate_up_proj")
        parameter: torch.nn.Parameter = getattr(self.module, name)
        return parameter

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight ``[out, in]`` as the checkpoint holds it."""
        return weight.t().contiguous() if self.transposed else weight

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This linear's part of a tensor like `parameter`, as a view ``[out, in]``."""
        if self.part == "whole":
            return whole.t() if self.transposed else whole
        own = whole[self.expert]
        if self.part == "down":
            return own
        return own[: self.shape[0]] if self.part == "gate" else own[self.shape[0] :]


class StreamedModel:
    """A model of which only the part in use is in memory.

    The module tree is built without weights; `load_block` fills one block from the checkpoint and
    `free_block` empties it again.

    Args:
        checkpoint: where the weights are.
        device: where blocks are loaded to.
        dtype: the type that they are loaded and run in.
        changes: keys of the config that are to be otherwise.

    Raises:
        ModelError: unsupported architecture, or a checkpoint that does not fit its config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None,
        **changes: Any,
    ) -> None:
        import accelerate
        import transformers
        from transformers.initialization import no_init_weights

        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.architecture = architecture_of(checkpoint.config)
        refuse_orphan(checkpoint)
        if "quantization_config" in checkpoint.config:
            method = checkpoint.config["quantization_config"].get("quant_method")
            raise ModelError(
                f"{checkpoint.path} is already compressed (quant_method {method!r})",
                "prune the uncompressed model",
            )
        auto = transformers.AutoModelForCausalLM
        if self.architecture.reads == "images":
            auto = transformers.AutoModelForImageClassification
        try:
            config = transformers.AutoConfig.from_pretrained(str(checkpoint.path), **changes)
            # Weights that are not there need no initial values.
            with accelerate.init_empty_weights(include_buffers=False), no_init_weights():
                self.module = auto.from_config(config).eval()
        except (ValueError, KeyError, TypeError) as fault:
            raise ModelError(
                f"{checkpoint.path / 'config.json'} does not describe a model: {fault}",
                "copy config.json from the original model",
            ) from fault
        self.module.requires_grad_(False)
        self.blocks: torch.nn.ModuleList = self.module.get_submodule(self.architecture.blocks)
        # Checkpoints of the first GPTs were saved without the head, and so without this prefix.
        root = self.architecture.blocks.partition(".")[0] + "."
        rooted = any(name.startswith(root) for name in checkpoint.names())
        self._missing_root = "" if rooted else root
        self._reading: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def stored_name(self, name: str) -> str:
        """The name in the checkpoint of what the module tree calls ``name``."""
        for module, stored in self.architecture.stored:
            name = name.replace(module, stored)
        return name.removeprefix(self._missing_root)

    def block_prefix(self, index: int) -> str:
        """What a block's tensors begin with in the checkpoint, e.g. ``model.layers.3.``."""
        return self.stored_name(f"{self.architecture.blocks}.{index}.")

    def linears(self, index: int) -> dict[str, Linear]:
        """The weight matrices of a block by their names in the checkpoint, in module order."""
        import torch
        from transformers.pytorch_utils import Conv1D

        found: list[Linear] = []
        for path, module in self.blocks[index].named_modules():
            name = self.stored_name(f"{self.architecture.blocks}.{index}.{path}.")[:-1]
            router = path.rpartition(".")[2] in self.architecture.routers
            if isinstance(module, torch.nn.Linear):
                shape = (module.out_features, module.in_features)
                found.append(Linear(name, module, shape, router=router))
            elif isinstance(module, Conv1D):
                width, out = module.weight.shape
                found.append(Linear(name, module, (out, width), transposed=True))
            elif self._fused(module):
                found += self._experts(name, module)
        return {linear.name: linear for linear in found}

    def channels(self, index: int) -> list[Channels]:
        """The channels of a block whose order is free; linears by their names in the checkpoint."""
        linears, prefix = self.linears(index), self.block_prefix(index)
        found = [
            Channels(
                tuple(prefix + name for name in channels.producers),
                prefix + channels.consumer,
                channels.heads,
            )
            for channels in self.architecture.channels
        ]
        for linear in linears.values():
            if linear.part == "down":
                gate, up, down = self.architecture.experts or ("", "", "")
                own = linear.name.removesuffix(down)
                found.append(Channels((own + gate, own + up), linear.name))
        return [channels for channels in found if channels.consumer in linears]

    def _fused(self, module: torch.nn.Module) -> bool:
        return self.architecture.experts is not None and hasattr(module, "gate_up_proj")

    def _experts(self, name: str, module: Any) -> Iterator[Linear]:
        gate, up, down = self.architecture.experts or ("", "", "")
        experts, hidden, inner = module.down_proj.shape
        for expert in range(experts):
            own = f"{name}.{expert}."
            yield Linear(own + gate, module, (inner, hidden), expert, "gate")
            yield Linear(own + up, module, (inner, hidden), expert, "up")
            yield Linear(own + down, module, (hidden, inner), expert, "down")

    def tensor_names(self, index: int | None) -> list[str]:
        """Names in the checkpoint of a block's tensors; None: those outside all blocks."""
        if index is not None:
            inside = self.block_prefix(index)
            return [name for name in self.checkpoint.names() if name.startswith(inside)]
        inside = self.stored_name(f"{self.architecture.blocks}.")
        return [name for name in self.checkpoint.names() if not name.startswith(inside)]

    def load_block(self, index: int, read: Callable[[str], torch.Tensor] | None = None) -> None:
        """Fill a block with its weights, from the checkpoint or by another ``read(name)``."""
        if read is None and self._reading is not None and self._reading[0] == index:
            read = self._reading[1].result().__getitem__
            self._reading = None
        prefix = f"{self.architecture.blocks}.{index}."
        self._fill(self.blocks[index], prefix, read or self.checkpoint.load)

    def prefetch(self, index: int) -> None:
        """Begin to read a block from the disk while the device is busy with another one.

        Only where blocks are moved to a device: in the memory of the CPU it would take the place
        of a second block.
        """
        if self.device.type == "cpu" or index >= len(self.blocks):
            return
        names = self.tensor_names(index)

        def read() -> dict[str, torch.Tensor]:
            return {name: self.checkpoint.load(name).pin_memory() for name in names}

        pool = ThreadPoolExecutor(1)
        self._reading = index, pool.submit(read)
        pool.shutdown(wait=False)

    def free_block(self, index: int) -> None:
        """Drop the weights of a block, and give their memory back to the system."""
        self._empty(self.blocks[index])
        return_free_memory()

    def load_outside(self, head: bool = False) -> None:
        """Fill everything outside the blocks, the output head only if it is asked for."""
        output = self.module.get_output_embeddings()
        for name, owner in self._outside():
            prefix = f"{name}." if name else ""
            tied = self.stored_name(f"{prefix}weight") not in self.checkpoint
            if owner is not output or (head and not tied):
                self._fill(owner, prefix, self.checkpoint.load, recurse=False)
        if head and output is not None and output.weight.is_meta:  # tied to the embeddings
            output.weight = self.module.get_input_embeddings().weight

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
            holder = owner.get_submodule(name.rpartition(".")[0])
            stored = self.stored_name(prefix + name)
            if self._fused(holder):
                tensor = self._fuse(holder, stored, parameter.shape, read)
            else:
                tensor = read(stored).to(self.device, self.dtype)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{stored} is {list(tensor.shape)} in {self.checkpoint.path} but "
                    f"config.json asks for {list(parameter.shape)}",
                    "copy config.json and the weights from one model",
                )
            filled = torch.nn.Parameter(tensor, requires_grad=False)
            holder.register_parameter(name.rpartition(".")[2], filled)
        for buffer_owner in owner.modules() if recurse else [owner]:
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(self.device))

    def _fuse(
        self,
        holder: torch.nn.Module,
        stored: str,
        shape: torch.Size,
        read: Callable[[str], torch.Tensor],
    ) -> torch.Tensor:
        """One fused tensor of all experts, from the checkpoint's matrices."""
        import torch

        name, _, kind = stored.rpartition(".")
        parts = ("down",) if kind == "down_proj" else ("gate", "up")
        own = [linear for linear in self._experts(name, holder) if linear.part in parts]
        fused: torch.Tensor | None = None
        for linear in own:
            tensor = read(f"{linear.name}.weight").to(self.device, self.dtype)
            if tensor.shape != linear.shape:
                return tensor  # the caller says what is wrong with it
            if fused is None:
                fused = torch.empty(shape, device=self.device, dtype=tensor.dtype)
            linear.part_of(fused).copy_(tensor)
        assert fused is not None
        return fused

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

    # Missing and damaged files, and orphans: our sentence instead of a traceback.
    refuse_orphan(Checkpoint(path))
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
