"""Products by secateur's own library of CUTLASS's sparse GEMMs, where it was built and loads.

    product = OwnProduct(library, blocks, torch.bfloat16)
    y = product.multiply(blocks, x, bias)      # x [tokens, columns], y [tokens, rows]

The kept values are those of the 2:4 blocks; the metadata is made from their bits, in the order that
the library's kernels name. fp8 weights take inputs in fp8, with a scale for each token. Tests
without a GPU check arguments, strides, metadata and workspace with a library of the same interface
that computes on a CPU.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from secateur.compile.gpu import fp8, sm80, sm90
from secateur.compile.gpu.blocks import Blocks
from secateur.compile.gpu.cutlass.kernels import Kernel
from secateur.compile.gpu.cutlass.library import (
    BUILD,
    Operands,
    SparseGemmLibrary,
    architecture_for,
    open_library,
)
from secateur.compile.gpu.cutlass.tiles import choose, current_table
from secateur.compile.gpu.semi_structured import RULES, Rule
from secateur.errors import EnvironmentFault

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def library_for(device: torch.device) -> SparseGemmLibrary:
    """The library for a GPU.

    Raises:
        EnvironmentFault: there is none, it was not built, or it does not load.
    """
    major, minor = torch.cuda.get_device_capability(device)
    arch = architecture_for((major, minor))
    if arch is None:
        raise EnvironmentFault(
            f"it has no kernels for capability {major}.{minor}", "use a newer GPU"
        )
    return open_library(arch)


def types_of(value_type: str, dtype: torch.dtype) -> str:
    """The kernels' types (a key of `kernels.TYPES`) for values of a type and inputs of another."""
    name = _NAMES[dtype]
    return f"fp8-{name}" if value_type == "fp8" else name


class OwnProduct:
    """Metadata of a 2:4 weight for the library's kernels, and products with it.

    Args:
        library: of the architecture of the blocks' device.
        blocks: 2:4, of bf16, fp16 or fp8 values.
        dtype: of inputs, results and biases: bf16 or fp16; of the values, if they are 16 bits.

    Raises:
        EnvironmentFault: the library has no kernels of these types.
    """

    def __init__(self, library: SparseGemmLibrary, blocks: Blocks, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.types = types_of(blocks.value_type, dtype)
        facts = [one for one in library.kernels if Kernel.parse(one.name).types == self.types]
        if not facts:
            raise EnvironmentFault(f"{library.path} has no kernels of {self.types}", BUILD)
        self._arch, self._step = Kernel.parse(facts[0].name).arch, facts[0].multiples[1]
        self.meta = metadata(blocks, facts[0].meta_tile_k)
        self._numbers: dict[int, int] = {}

    def multiply(
        self, blocks: Blocks, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x [tokens, columns] @ W.T + bias``, rounded once; of fp8 with x rounded to fp8.

        Args:
            blocks: those that the metadata was made of, or the same elsewhere.
        """
        m, k, tokens = blocks.bits.shape[0], 8 * blocks.bits.shape[1], len(x)
        n = tokens + -tokens % self._step
        if (n, k) != x.shape:
            x = pad(x, (0, k - blocks.columns, 0, n - tokens))
        x, scales = x.contiguous(), None
        if blocks.value_type == "fp8":
            x, scales = fp8.round_tokens(x)
        if bias is not None:
            bias = pad(bias, (0, m - len(bias))).contiguous()
        number = self._number(m, n, k, x.device)
        by_token = self.library.kernels[number].d_column_major
        d = x.new_empty((n, m) if by_token else (m, n), dtype=self.dtype)
        size = self.library.workspace_bytes(number, m, n, k)
        workspace = x.new_empty(size, dtype=torch.uint8) if size else None
        operands = Operands(
            *(m, n, k, blocks.values.data_ptr(), self.meta.data_ptr()),
            *(x.data_ptr(), k, d.data_ptr(), d.shape[1]),
            row_scale=_address(blocks.scales),
            column_scale=_address(scales),
            bias=_address(bias),
        )
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
        self.library.launch(number, operands, _address(workspace), size, stream)
        return (d if by_token else d.t())[:tokens, : blocks.rows].contiguous()

    def _number(self, m: int, n: int, k: int, device: torch.device) -> int:
        """The number of the kernel for a product."""
        if n not in self._numbers:
            limit = None
            if device.type == "cuda":
                facts: Any = torch.cuda.get_device_properties(device)
                limit = facts.shared_memory_per_block_optin
            usable = self.library.usable(self.types, m, n, k, limit)
            table = current_table(self._arch, self.library.path.parent)
            self._numbers[n] = self.library.number(choose(table, usable, m, n, k).name)
        return self._numbers[n]

    def __deepcopy__(self, memo: object) -> OwnProduct:
        made = copy(self)
        made.meta = self.meta.clone()
        return made


def metadata(blocks: Blocks, tile_k: int) -> torch.Tensor:
    """Metadata for the values of 2:4 blocks, on their device.

    Args:
        tile_k: of the SM90 layout; 0: in the SM80 layout.
    """
    rule: Rule = "sm90" if tile_k else "sm80"
    bits, itemsize = blocks.bits.cpu().numpy(), blocks.value_bits // 8
    nibbles = RULES[rule][bits & 15] | RULES[rule][bits >> 4] << 4
    if tile_k:
        rows, columns = -len(bits) % sm90.ATOM_ROWS, -bits.shape[1] % (tile_k // 8)
        meta = sm90.reorder(np.pad(nibbles, ((0, rows), (0, columns))), itemsize, tile_k)
    else:
        meta = sm80.reorder(nibbles.view(np.int16 if itemsize == 2 else np.int32))
    return torch.from_numpy(meta).to(blocks.bits.device)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
