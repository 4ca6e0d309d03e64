"""A packed linear as a torch module, and which of them a model computes with which kernels.

The weight is brought into the layouts that suit it on a CPU (`secateur.compile.cpu`) or a CUDA
device (`secateur.compile.gpu.held`), and only kept in those and in its stored form: there is no
dense copy. Where that cannot be, the module computes with a dense copy in torch; `kernel_report`
counts all of them, with the reasons.

    SECATEUR_KERNELS=off        always the dense copy
    SECATEUR_ACTIVATIONS=fp32   activations are not rounded: to int8 with int8 and int4 values, on a
                                CPU; to fp8 with fp8 values, on a GPU
    SECATEUR_CROSSOVER=…        see `secateur.compile.gpu.crossover`
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from secateur.compile import cpu, torch_ops
from secateur.compile.config import BITMASK, SCALES, VALUES, PackedConfig, PackedLayer
from secateur.compile.gpu import held as gpu
from secateur.compile.gpu import ops as gpu_ops
from secateur.compile.packed import decode, pieces
from secateur.compile.values import DTYPES, VALUE_TYPES
from secateur.errors import ModelError, UsageError, did_you_mean
from secateur.recipe import ValueType

Activations = Literal["fp32", "int8"]


class SparseLinear(torch.nn.Module):
    """A linear layer stored as bitmask and kept values.

    Moving, casting, copying or loading the module makes its layout or dense copy anew. Values that
    were changed in place need a call of `prepare`.

    Attributes:
        weight_bitmask: uint8 ``[rows / R, ceil(columns / 8)]``; None if no weight was removed.
        weight_values: ``[rows, per_row]`` or ``[kept]``; of int4 uint8 ``[ceil(kept / 2)]``; of fp8
            uint8, the bits.
        weight_scales: fp16 ``[rows, ceil(columns / group_size)]`` of integer values, fp32
            ``[rows, 1]`` of fp8, else None. Casting the model leaves it as it is.
        value_type: int8, int4 or fp8, else None.
        group_size: of integer values, else None.
        dtype: of the dense weight, if there are scales.
        bias: ``[rows]`` or None.
        weight: the dense copy ``[rows, columns]``, not saved; None where the kernels compute.
        matrix: the weight in a layout; None where the dense copy computes.
        obstacle: why there is a dense copy; None if there is none.
    """

    weight_bitmask: torch.Tensor | None
    weight_scales: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.nn.Parameter | None
    obstacle: str | None
    _held: torch_ops.HeldMatrix | gpu_ops.HeldGpuMatrix | None
    _on_gpu: bool  # whether _held is there
    _handle: int  # of _held; 0: there is none
    _source: int | None  # where the values lay that _held or weight was made from

    def __init__(
        self,
        name: str,
        layer: PackedLayer,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        value_type: ValueType | None = None,
        group_size: int | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.value_type, self.group_size = value_type, group_size
        self.activations = activations
        self.dtype = dtype or torch.get_default_dtype()
        self.out_features, self.in_features = layer.shape
        # Which tensors there are, and their shapes: as in a file of this layer alone.
        config = PackedConfig.of(value_type or "fp32", group_size, {name: layer})
        shapes = {tensor: shape for tensor, (_, shape) in config.stored(name).items()}
        bytewise = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.uint8}
        kind = bytewise.get(value_type or "", dtype)
        values = torch.empty(shapes[name + VALUES], dtype=kind, device=device)
        self.weight_values = torch.nn.Parameter(values, requires_grad=False)
        scale = torch.float32 if value_type == "fp8" else torch.float16
        for end, kind in ((BITMASK, torch.uint8), (SCALES, scale)):
            shape = shapes.get(name + end)
            held = None if shape is None else torch.empty(shape, dtype=kind, device=device)
            self.register_buffer(end.removeprefix("."), held)
        self.register_parameter("bias", None)
        if bias:
            added = torch.empty(self.out_features, dtype=dtype, device=device)
            self.bias = torch.nn.Parameter(added, requires_grad=False)
        self.register_buffer("weight", None, persistent=False)
        self._forget()

    @property
    def matrix(self) -> cpu.CpuMatrix | gpu.GpuMatrix | None:
        """See the class."""
        return None if self._held is None else self._held.matrix

    @property
    def qweight(self) -> torch.Tensor:
        """The stored values, by the name at which PEFT looks for the device of such a layer."""
        return self.weight_values

    def prepare(self) -> None:
        """Check the loaded tensors and make the layout, or else the dense copy.

        Raises:
            ModelError: names the tensor that contradicts the model's config.
            UsageError: ``SECATEUR_KERNELS``, ``SECATEUR_ACTIVATIONS`` or ``SECATEUR_CROSSOVER``
                cannot be obeyed.
        """
        self._forget()
        self.obstacle = self._find_obstacle()
        if self.obstacle is None:
            held = self._hold()
            if isinstance(held, str):
                self.obstacle = held
            else:
                self._held, self._handle = held, held.handle
                self._on_gpu = isinstance(held, gpu_ops.HeldGpuMatrix)
        if self.obstacle is not None:
            self.weight = self.dense()
        self._source = self.weight_values.data_ptr()

    def dense(self) -> torch.Tensor:
        """The dense weight, checked like `prepare` does."""
        values, scales = self.weight_values.detach(), self.weight_scales
        dtype = None if scales is None else self.dtype
        return decode(
            self.name, self.layer, self.weight_bitmask, values, scales, self.group_size, dtype
        )

    def to_dense(self) -> torch.nn.Linear:
        """The same layer as a plain `torch.nn.Linear`; shares the memory of a dense copy."""
        linear = torch.nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = torch.nn.Parameter(self.dense() if self.weight is None else self.weight)
        if self.bias is not None:
            linear.bias = torch.nn.Parameter(self.bias)
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        # Values that came by a way that tells nobody (`tensor.data = …`) are found by their place.
        if not torch.compiler.is_compiling() and (
            self._parameters["weight_values"].data_ptr() != self._source  # type: ignore[union-attr]
        ):
            self.prepare()
        if self._handle:
            if x.requires_grad and torch.is_grad_enabled():
                product: torch.Tensor = _Product.apply(x, self._held, self.bias)  # type: ignore[no-untyped-call]
                return product
            linear = gpu_ops.linear if self._on_gpu else torch_ops.linear
            result: torch.Tensor = linear(x, self._handle, self._parameters["bias"])
            return result
        if self.weight is None:
            raise ModelError(
                f"{self.name} was loaded or copied after its last use",
                "run the model once before it is compiled",
            )
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and pattern, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, pattern={self.layer.pattern}"
        )

    def _hold(self) -> torch_ops.HeldMatrix | gpu_ops.HeldGpuMatrix | str:
        """The stored tensors in a layout of the device that they are on, or why there is none."""
        device = self.weight_values.device
        if device.type != gpu.DEVICE:
            return torch_ops.HeldMatrix(self._pack())
        bits, scales = (
            None if tensor is None else tensor.cpu()
            for tensor in (self.weight_bitmask, self.weight_scales)
        )
        values = self.weight_values.detach().cpu()
        parts = pieces(self.name, self.layer, bits, values, scales, self.group_size)
        dtype = self.dtype if self.value_type else values.dtype
        name = VALUE_TYPES.get(dtype, str(dtype))
        matrix = gpu.hold(parts, name, device, self._rounding() != "fp32")
        if isinstance(matrix, str):
            return matrix
        matrix.share(self.weight_values.detach(), self.weight_bitmask)
        return gpu_ops.HeldGpuMatrix(matrix)

    def _pack(self) -> cpu.CpuMatrix:
        """The stored tensors in a layout of this CPU."""
        values = self.weight_values.detach()
        if values.dtype == torch.float32:
            values = narrowest(values)
        parts = pieces(
            self.name, self.layer, self.weight_bitmask, values, self.weight_scales, self.group_size
        )
        activations = None
        if self.group_size is not None:
            activations = self._rounding()
        return cpu.pack(
            parts.values,
            parts.bitmask,
            self.layer.shape,
            self.layer.pattern,
            parts.value_type,
            scales=parts.scales,
            group_size=parts.group_size,
            activations=activations,  # type: ignore[arg-type]
        )

    def _rounding(self) -> str | None:
        """What inputs are rounded to, of those that may be; None: as is usual."""
        return self.activations or setting("SECATEUR_ACTIVATIONS", ("int8", "fp32"))

    def _find_obstacle(self) -> str | None:
        """Why the kernels cannot compute this layer."""
        if setting("SECATEUR_KERNELS", ("on", "off")) == "off":
            return "SECATEUR_KERNELS=off"
        device = self.weight_values.device.type
        if device not in ("cpu", gpu.DEVICE):
            return f"there are no kernels for {device}"
        dtype = self.weight_values.dtype if self.value_type is None else self.dtype
        if dtype not in VALUE_TYPES:
            return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
        if device != gpu.DEVICE and not torch_ops.BUILT:
            return "the native module is not built"
        return None

    def _forget(self) -> None:
        """Have neither layout nor dense copy."""
        self._held = self._source = self.weight = None
        self._handle, self._on_gpu = 0, False
        self.obstacle = "it was not prepared"

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        """Move or cast; the scales are moved only."""
        scales, values, source = self.weight_scales, self.weight_values, self._source
        before, dtype = (values.dtype, values.device), self.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        applied = self.weight_scales
        if scales is not None and applied is not None and applied.dtype != scales.dtype:
            self.weight_scales = scales.to(applied.device)
        values = self.weight_values
        if self.value_type is None:
            self.dtype = values.dtype
        else:
            self.dtype = fn(torch.empty(0, dtype=dtype, device=before[1])).dtype
        if source is None:
            return self
        obstacle = self._find_obstacle()
        if values.is_meta:
            self._forget()
        elif self.weight is not None and obstacle is not None:  # the copy was moved and cast, too
            self.obstacle, self._source = obstacle, values.data_ptr()
        elif (
            self.obstacle != obstacle
            or (values.data_ptr(), values.dtype, values.device) != (source, *before)
            or (self._on_gpu and self.dtype != dtype)  # of which its plan is
        ):
            self.prepare()
        return self

    def _load_from_state_dict(
        self,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        prepared = self._source is not None
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        self._forget()
        if prepared and not missing and not errors:  # else torch will complain
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None, "_handle": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._source is not None:
            self.prepare()


class _Product(torch.autograd.Function):
    """The product with the gradient of its inputs; the weight has none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        held: torch_ops.HeldMatrix | gpu_ops.HeldGpuMatrix,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The product."""
        ctx.held = held
        return held.linear(x.detach(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """As if the activations had not been rounded, if they are int8."""
        weight = ctx.held.dense().float()
        return (gradient.float() @ weight).to(gradient.dtype), None, None


def narrowest(values: torch.Tensor) -> torch.Tensor:
    """fp32 values as bf16 or fp16, if all of them are such numbers: half the bytes to read."""
    for dtype in (DTYPES["bf16"], DTYPES["fp16"]):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values


def setting(name: str, known: tuple[str, ...]) -> str | None:
    """An environment variable with few possible values; None if it is not set."""
    value = os.environ.get(name) or None
    if value is not None and value not in known:
        raise UsageError(f"{name}={value!r} is not known", did_you_mean(value, known))
    return value


@dataclass(frozen=True)
class KernelUse:
    """Packed linears of a model that are computed alike.

    Attributes:
        linears: how many.
        path: "kernels": on a CPU, on the packed form; "gpu": likewise on a GPU; "dense": in torch,
            on a dense copy.
        layout: of `CpuMatrix`; of a GPU the pattern, the values and the shape; "dense" of a copy.
        values: the value type that is multiplied with.
        activations: of `CpuMatrix`; of a dense copy its type.
        nbytes: bytes of all layouts or copies together; the stored form comes on top.
        why: why the copy or the layout is dense, or None; of a GPU the plan.
    """

    linears: int
    path: Literal["kernels", "gpu", "dense"]
    layout: str
    values: str
    activations: str
    nbytes: int
    why: str | None

    def __str__(self) -> str:
        linears = f"{self.linears} packed linear{'s' if self.linears > 1 else ''}"
        megabytes = f"{self.nbytes / 1e6:.1f} MB"
        if self.path == "dense":
            return f"{linears}: dense copy in torch, {self.values}, {megabytes}: {self.why}"
        if self.path == "gpu":
            return f"{linears}: {self.layout}, {megabytes}: {self.why}"
        activations = " x int8 activations" if self.activations == "int8" else ""
        called = f"; called from Python: {torch_ops.OBSTACLE}" if torch_ops.OBSTACLE else ""
        return (
            f"{linears}: CPU kernels ({cpu.isa()}, {cpu.threads()} threads), layout {self.layout}, "
            f"{self.values} values{activations}, {megabytes}"
            f"{f': {self.why}' if self.why else ''}{called}"
        )


def kernel_report(model: torch.nn.Module) -> list[KernelUse]:
    """What computes the packed linears of a model, most linears first; empty if it has none."""
    counts: Counter[tuple[Any, ...]] = Counter()
    sizes: Counter[tuple[Any, ...]] = Counter()
    for module in model.modules():
        if not isinstance(module, SparseLinear):
            continue
        key: tuple[Any, ...]
        if isinstance(matrix := module.matrix, gpu.GpuMatrix):
            weight = matrix.weight
            key = ("gpu", str(weight), weight.values, weight.dtype, str(matrix.plan))
            size = matrix.nbytes
        elif matrix is not None:
            key = ("kernels", matrix.layout, matrix.value_type, matrix.activations, matrix.why)
            size = matrix.nbytes
        else:
            dtype = str(module.dtype).removeprefix("torch.")
            key = ("dense", "dense", dtype, dtype, module.obstacle)
            size = 0 if module.weight is None else module.weight.nbytes
        counts[key] += 1
        sizes[key] += size
    return [
        KernelUse(count, path, layout, values, activations, sizes[key], why)
        for key, count in counts.most_common()
        for path, layout, values, activations, why in [key]
    ]
