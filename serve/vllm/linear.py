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

from secateur.compile import torch_ops
from secateur.compile.config import MAKE_AGAIN
from secateur.compile.shard import cut, dense, own
from secateur.compile.stored import Pieces
from secateur.errors import ModelError
from secateur.serve.vllm.product import Product, make_product
from secateur.serve.vllm.stores import WEIGHT, Store, dense_pieces

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
        store: the linears that the files do not store as dense weights.
        prefix: name of the linear in vLLM.
        parts: names of its parts, in the order of their rows; one of them is in the store.
        census: told what computes it.
    """

    def __init__(self, store: Store, prefix: str, parts: Sequence[str], census: Census) -> None:
        self.store, self.prefix, self.parts, self.census = store, prefix, list(parts), census
        self.tensors: dict[str, torch.Tensor] = {}
        self.whole: dict[str, tuple[int, int]] = {}
        self.product: Product | None = None
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
        # Where vLLM makes a model's parameters, it computes; later it does not say.
        self.dtype, self.device = params_dtype, torch.get_default_device()
        self.columns = own(input_size, input_size_per_partition, layer.tp_rank, layer.tp_size)
        self.rows = self._rows(layer, output_partition_sizes, input_size)
        for end, dtype in self._ends().items():
            empty = torch.nn.Parameter(
                torch.empty(0, dtype=dtype or params_dtype), requires_grad=False
            )
            empty.weight_loader = partial(self._take, end)  # type: ignore[attr-defined]
            layer.register_parameter(end.removeprefix("."), empty)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Cut, merge and lay out what was loaded.

        Raises:
            ModelError: names the tensor that is absent or not as config.json says, or the linear
                that cannot be cut for so many processes.
        """
        shares = self._shares()
        for end in self._ends():
            delattr(layer, end.removeprefix("."))
        self.tensors.clear()
        product = make_product(shares, self.dtype, self.device)
        if isinstance(product, str):
            self._compute_densely(layer, shares, product)
            return
        if self.census.first and self.device.type == "cpu":
            torch_ops.borrow_torch_threads()
        self.product = product
        self.census.loaded(self.prefix, product.how, product.nbytes)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [..., columns] W.T + bias``, with this process's columns and rows."""
        if self.product is None:
            assert self.fallback is not None
            result: torch.Tensor = self.fallback.apply(layer, x, bias)
            return result
        return self.product(x, bias)

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
            if part in self.store.names:
                _check_shape(part, self.store.shape(part), (expected, columns))
            self.whole[part] = expected, columns
        return found

    def _ends(self) -> dict[str, torch.dtype | None]:
        """The ends of the names of all its tensors, with their types."""
        ends: dict[str, torch.dtype | None] = {}
        for part in self.parts:
            ends |= self.store.tensors(part) if part in self.store.names else {WEIGHT: None}
        return dict(sorted(ends.items()))

    def _take(self, end: str, _: Any, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Keep one tensor of the file; vLLM calls this with the name of the part in ``shard``."""
        if self.store.reads_files and end != WEIGHT:
            return
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
        if part in self.store.names:
            found = self.store.read(part, self.tensors, self.dtype)
            _check_shape(part, found.layer.shape, self.whole[part])
            return found
        if part + WEIGHT not in self.tensors:
            raise ModelError(f"the model has no tensor {part + WEIGHT!r}", MAKE_AGAIN)
        return dense_pieces(part, self.tensors[part + WEIGHT])

    def _compute_densely(self, layer: torch.nn.Module, shares: list[Pieces], obstacle: str) -> None:
        """Give vLLM the dense weight, in the type that it computes in."""
        weight = torch.cat([torch.from_numpy(dense(share)).to(self.dtype) for share in shares])
        layer.weight = torch.nn.Parameter(weight.to(self.device), requires_grad=False)
        self.fallback = UnquantizedLinearMethod()
        self.fallback.process_weights_after_loading(layer)
        self.census.loaded(self.prefix, f"dense in vLLM: {obstacle}", weight.nbytes)


def _check_shape(part: str, found: tuple[int, int] | None, shape: tuple[int, int]) -> None:
    if found is not None and tuple(found) != shape:
        raise ModelError(
            f"the checkpoint has {part!r} as a linear of shape {tuple(found)}, but the model has "
            f"one of {shape}",
            MAKE_AGAIN,
        )


def _whole_sizes(layer: torch.nn.Module) -> list[int]:
    """The rows of each linear that vLLM merged, of all processes together."""
    if isinstance(layer, QKVParallelLinear):
        key_values = layer.total_num_kv_heads
        query = layer.total_num_heads * layer.head_size
        return [query, key_values * layer.head_size, key_values * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def _without_numbers(name: str) -> str:
    """``model.layers.*.mlp`` of ``model.layers.7.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
