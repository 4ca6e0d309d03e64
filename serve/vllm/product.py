"""What computes a packed linear in vLLM, on a CPU or a CUDA device; does not import vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.compile import cpu, torch_ops
from secateur.compile.gpu import held as gpu
from secateur.compile.gpu import ops as gpu_ops
from secateur.compile.shard import alike, join
from secateur.compile.stored import Pieces
from secateur.compile.values import VALUE_TYPES
from secateur.serve.linear import narrowest, setting


class Product:
    """``x W.T + bias`` of a linear whose rows are those of several matrices.

    Args:
        held: the matrices, all on one device.

    Attributes:
        how: which layouts compute it.
        nbytes: of all layouts.
    """

    def __init__(self, held: Sequence[torch_ops.HeldMatrix | gpu_ops.HeldGpuMatrix]) -> None:
        self._held = list(held)
        # torch.compile can trace numbers, but not the matrices.
        self._handles = [one.handle for one in held]
        self._linear = gpu_ops.linear if _on_gpu(held[0]) else torch_ops.linear
        self._rows = [_rows(one.matrix) for one in held]
        self.how = " and ".join(sorted({_how(one.matrix) for one in held}))
        self.nbytes = sum(one.matrix.nbytes for one in held)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., columns]`` to ``[..., rows]``."""
        if len(self._handles) == 1:
            whole: torch.Tensor = self._linear(x, self._handles[0], bias)
            return whole
        biases = [None] * len(self._rows) if bias is None else torch.split(bias, self._rows)
        parts = zip(self._handles, biases, strict=True)
        return torch.cat([self._linear(x, handle, added) for handle, added in parts], dim=-1)


def make_product(
    shares: Sequence[Pieces], dtype: torch.dtype, device: torch.device
) -> Product | str:
    """Lay out the parts of a linear; those that are alike become one matrix.

    Args:
        shares: its parts, in the order of their rows.
        dtype: of its inputs.
        device: where it computes.

    Returns:
        The product, or why a dense weight should compute.

    Raises:
        UsageError: SECATEUR_KERNELS, SECATEUR_ACTIVATIONS or SECATEUR_CROSSOVER is not understood.
    """
    if setting("SECATEUR_KERNELS", ("on", "off")) == "off":
        return "SECATEUR_KERNELS=off"
    merged = [join(shares)] if alike(shares) else shares
    if device.type == gpu.DEVICE:
        matrices = []
        for share in merged:
            rounds = setting("SECATEUR_ACTIVATIONS", ("int8", "fp32")) != "fp32"
            matrix = gpu.hold(share, VALUE_TYPES.get(dtype, str(dtype)), device, rounds)
            if isinstance(matrix, str):
                return matrix
            matrices.append(matrix)
        return Product([gpu_ops.HeldGpuMatrix(matrix) for matrix in matrices])
    if device.type != "cpu":
        return f"there are no kernels for {device.type}"
    if not torch_ops.BUILT:
        return "the native module is not built"
    return Product([torch_ops.HeldMatrix(_pack(share)) for share in merged])


def _on_gpu(held: torch_ops.HeldMatrix | gpu_ops.HeldGpuMatrix) -> bool:
    return isinstance(held, gpu_ops.HeldGpuMatrix)


def _rows(matrix: cpu.CpuMatrix | gpu.GpuMatrix) -> int:
    return matrix.weight.rows if isinstance(matrix, gpu.GpuMatrix) else matrix.rows


def _pack(share: Pieces) -> cpu.CpuMatrix:
    """A share in a layout of this CPU."""
    values, value_type = share.values, share.value_type
    if value_type == "fp32":
        narrow = narrowest(torch.from_numpy(values))
        value_type = VALUE_TYPES[narrow.dtype]
        values = (narrow if value_type == "fp32" else narrow.view(torch.uint16)).numpy()
    activations = None
    if share.group_size is not None:
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


def _how(matrix: cpu.CpuMatrix | gpu.GpuMatrix) -> str:
    """What computes a matrix, and why it is dense if it is."""
    if isinstance(matrix, gpu.GpuMatrix):
        return f"{matrix.weight}: {matrix.plan}"
    activations = " x int8 activations" if matrix.activations == "int8" else ""
    why = f" ({matrix.why})" if matrix.why else ""
    called = f", called from Python: {torch_ops.OBSTACLE}" if torch_ops.OBSTACLE else ""
    return f"layout {matrix.layout}{why}, {matrix.value_type} values{activations}{called}"
