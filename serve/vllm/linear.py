"""A packed linear in vLLM: loading this process's share of it, and the product.

vLLM merges linears that share their input (q, k and v; gate and up) and, with tensor parallelism,
gives each process some of the rows or columns. It could not cut the stored tensors itself, as they
hold kept weights only. So each is kept as it comes from the file, and cut and merged when all are
there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)

from secateur.compile import cpu, torch_ops
from secateur.compile.config import BITMASK, MAKE_AGAIN, SCALES, VALUES, PackedConfig, PackedLayer
from secateur.compile.packed import pieces
from secateur.compile.shard import alike, cut, dense, join, own
from secateur.compile.stored import Pieces
from secateur.compile.values import DTYPES, VALUE_TYPES
from secateur.errors import ModelError
from secateur.pattern import Pattern
from secateur.serve.linear import narrowest, setting

WEIGHT = ".weight"
_VALUE_TYPES = {**DTYPES, "int8": torch.int8, "int4": torch.uint8}
logger = init_logger("vllm.secateur")  # vLLM shows the loggers below its own name only


@dataclass
class Census:
    """What computes the linears of a model; written to the log when the last one is loaded.

    Attributes:
        waiting: packed linears that are not loaded yet.
        dense: linears that the file stores dense.
    """

    waiting: int = 0
    dense: list[str] = field(default_factory=list)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _bytes: Counter[str] = field(default_factory=Counter)

    @property
    def first(self) -> bool:
        """Whether none is loaded yet."""
        return not self._counts

    def loaded(self, name: str, how: str, nbytes: int) -> None:
        """One packed linear is there."""
        self._counts[_without_numbers(name), how] += 1
        self._bytes[how] += nbytes
        self.waiting -= 1
        if self.waiting == 0:
            self._log()

    def _log(self) -> None:
        for how, nbytes in self._bytes.items():
            names = [
                f"{name} ({count})" for (name, what), count in self._counts.items() if what == how
            ]
            logger.info("secateur: %s: %s, %.1f MB", ", ".join(names), how, nbytes / 1e6)
        if self.dense:
            counts = Counter(map(_without_numbers, self.dense))
            names = [f"{name} ({count})" for name, count in counts.items()]
            logger.info("secateur: %s: not packed, dense in vLLM", ", ".join(names))


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and computes one linear of vLLM, which may be several of the file.

    Args:
        config: what the file stores.
        prefix: name of the linear in vLLM.
        parts: names of its parts in the file, in the order of their rows; one of them is packed.
        census: told what computes it.
    """

    def __init__(
        self, config: PackedConfig, prefix: str, parts: Sequence[str], census: Census
    ) -> None:
        self.config, self.prefix, self.parts, self.census = config, prefix, list(parts), census
        self.tensors: dict[str, torch.Tensor] = {}
        self.held: list[torch_ops.HeldMatrix] = []
        self.handles: list[int] = []
        self.sizes: list[int] = []
        self.fallback: LinearMethodBase | None = None
        census.waiting += 1

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Empty parameters under the names that vLLM will look for; see `LinearMethodBase`."""
        self.dtype = params_dtype
        self.columns = own(input_size, input_size_per_partition, layer.tp_rank, layer.tp_size)
        self.rows = self._rows(layer, output_partition_sizes, input_size)
        types = {BITMASK: torch.uint8, SCALES: torch.float16, WEIGHT: params_dtype}
        types[VALUES] = _VALUE_TYPES[self.config.values]
        for end in sorted({end for part in self.parts for end in self._ends(part)}):
            empty = torch.nn.Parameter(torch.empty(0, dtype=types[end]), requires_grad=False)
            empty.weight_loader = partial(self._take, end)  # type: ignore[attr-defined]
            layer.register_parameter(end.removeprefix("."), empty)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Cut, merge and lay out what was loaded.

        Raises:
            ModelError: names the tensor that is absent or not as config.json says, or the linear
                that cannot be cut for so many processes.
        """
        shares = self._shares()
        for end in {end for part in self.parts for end in self._ends(part)}:
            delattr(layer, end.removeprefix("."))
        self.tensors.clear()
        if (obstacle := _obstacle(layer)) is not None:
            self._compute_densely(layer, shares, obstacle)
            return
        if self.census.first:
            torch_ops.borrow_torch_threads()
        merged = [join(shares)] if alike(shares) else shares
        self.held = [torch_ops.HeldMatrix(_pack(share)) for share in merged]
        self.handles = [held.handle for held in self.held]
        matrices = [held.matrix for held in self.held]
        self.sizes = [matrix.rows for matrix in matrices]
        hows = {_how(matrix) for matrix in matrices}
        nbytes = sum(matrix.nbytes for matrix in matrices)
        self.census.loaded(self.prefix, " and ".join(sorted(hows)), nbytes)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., columns] W.T + bias``, with this process's columns and rows."""
        if self.fallback is not None:
            product: torch.Tensor = self.fallback.apply(layer, x, bias)
            return product
        # torch.compile can trace numbers, but not the matrices.
        if len(self.handles) == 1:
            whole: torch.Tensor = torch_ops.linear(x, self.handles[0], bias)
            return whole
        biases = [None] * len(self.sizes) if bias is None else torch.split(bias, self.sizes)
        parts = zip(self.handles, biases, strict=True)
        return torch.cat([torch_ops.linear(x, handle, added) for handle, added in parts], dim=-1)

    def _rows(self, layer: Any, sizes: list[int], columns: int) -> list[tuple[str, range]]:
        """Which rows of which parts this process holds, in order."""
        wholes = _whole_sizes(layer)
        if len(self.parts) not in (1, len(sizes)):
            raise ModelError(
                f"{self.prefix} has {len(sizes)} outputs in vLLM, but {len(self.parts)} parts",
                "serve the model with --engine transformers",
            )
        fused = len(self.parts) == 1
        place, found = 0, []
        for index, (whole, size) in enumerate(zip(wholes, sizes, strict=True)):
            part = self.parts[0 if fused else index]
            held = own(whole, size, layer.tp_rank, layer.tp_size)
            found.append((part, range(place + held.start, place + held.stop)))
            place += whole if fused else 0
        for part in self.parts:
            expected = sum(wholes) if fused else wholes[self.parts.index(part)]
            stored = self.config.layers.get(part)
            if stored is not None and stored.shape != (expected, columns):
                raise ModelError(
                    f"config.json calls {part!r} a linear of shape {stored.shape}, but the model "
                    f"has one of ({expected}, {columns})",
                    MAKE_AGAIN,
                )
        return found

    def _ends(self, part: str) -> list[str]:
        """The ends of the names of its tensors."""
        if part not in self.config.layers:
            return [WEIGHT]
        return [tensor.removeprefix(part) for tensor in self.config.stored(part)]

    def _take(self, end: str, _: Any, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Keep one tensor of the file; vLLM calls this with the name of the part in ``shard``."""
        index = 0 if shard is None else {"q": 0, "k": 1, "v": 2}.get(str(shard), shard)
        self.tensors[self.parts[int(index)] + end] = tensor

    def _shares(self) -> list[Pieces]:
        """This process's rows and columns of each part, validated."""
        parts = {part: self._read(part) for part in self.parts}
        try:
            return [
                parts[part]
                if parts[part].layer.shape == (len(rows), len(self.columns))
                else cut(parts[part], rows, self.columns)
                for part, rows in self.rows
            ]
        except ValueError as fault:
            raise ModelError(
                f"{self.prefix} cannot be divided among the processes: {fault}",
                "use another --tensor-parallel-size",
            ) from fault

    def _read(self, part: str) -> Pieces:
        """A part as it is stored, with every check."""
        for end in self._ends(part):
            if part + end not in self.tensors:
                raise ModelError(f"the packed model has no tensor {part + end!r}", MAKE_AGAIN)
        found = {end: self.tensors.get(part + end) for end in (WEIGHT, BITMASK, VALUES, SCALES)}
        layer = self.config.layers.get(part)
        if layer is not None:
            values = found[VALUES]
            assert values is not None
            size = self.config.group_size
            return pieces(part, layer, found[BITMASK], values, found[SCALES], size)
        weight = found[WEIGHT]
        assert weight is not None
        rows, columns = weight.shape
        layer = PackedLayer(
            pattern=Pattern(), shape=(rows, columns), kept=weight.numel(), per_row=columns
        )
        return pieces(part, layer, None, weight.contiguous())

    def _compute_densely(self, layer: torch.nn.Module, shares: list[Pieces], obstacle: str) -> None:
        """Give vLLM the dense weight, in the type that it computes in."""
        weight = torch.cat([torch.from_numpy(dense(share)).to(self.dtype) for share in shares])
        device = torch.get_default_device()
        layer.weight = torch.nn.Parameter(weight.to(device), requires_grad=False)
        self.fallback = UnquantizedLinearMethod()
        self.fallback.process_weights_after_loading(layer)
        self.census.loaded(self.prefix, f"dense in vLLM: {obstacle}", weight.nbytes)


def _whole_sizes(layer: torch.nn.Module) -> list[int]:
    """The rows of each linear that vLLM merged, of all processes together."""
    if isinstance(layer, QKVParallelLinear):
        key_values = layer.total_num_kv_heads
        query = layer.total_num_heads * layer.head_size
        return [query, key_values * layer.head_size, key_values * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def _obstacle(layer: torch.nn.Module) -> str | None:
    """Why the kernels cannot compute a linear of this process."""
    if setting("SECATEUR_KERNELS", ("on", "off")) == "off":
        return "SECATEUR_KERNELS=off"
    device = torch.get_default_device().type
    if device != "cpu":
        return f"there are no kernels for {device} yet"
    if not torch_ops.BUILT:
        return "the native module is not built"
    return None


def _pack(share: Pieces) -> cpu.CpuMatrix:
    """A share in a layout of this CPU."""
    values, value_type = share.values, share.value_type
    if value_type == "fp32":
        narrow = narrowest(torch.from_numpy(values))
        value_type = VALUE_TYPES[narrow.dtype]
        values = (narrow if value_type == "fp32" else narrow.view(torch.uint16)).numpy()
    activations = None
    if share.scales is not None:
        activations = setting("SECATEUR_ACTIVATIONS", ("int8", "fp32"))
    return cpu.pack(
        values,
        share.bitmask,
        share.layer.shape,
        share.layer.pattern,
        value_type,
        scales=share.scales,
        group_size=share.group_size,
        activations=activations,  # type: ignore[arg-type]
    )


def _how(matrix: cpu.CpuMatrix) -> str:
    """What computes a matrix, and why it is dense if it is."""
    activations = " x int8 activations" if matrix.activations == "int8" else ""
    why = f" ({matrix.why})" if matrix.why else ""
    called = f", called from Python: {torch_ops.OBSTACLE}" if torch_ops.OBSTACLE else ""
    return f"layout {matrix.layout}{why}, {matrix.value_type} values{activations}{called}"


def _without_numbers(name: str) -> str:
    """``model.layers.*.mlp`` of ``model.layers.7.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
