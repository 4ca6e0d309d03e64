"""Which back ends a GPU can use, and why not the others."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch

from secateur.compile.config import PackedLayer
from secateur.compile.gpu import cusparselt, fp8
from secateur.compile.gpu.blocks import make_blocks
from secateur.compile.gpu.dispatch import NAMES, BackEnd, Machine, Weight, choose
from secateur.compile.gpu.own import OwnProduct, library_for
from secateur.compile.packed import pieces
from secateur.errors import EnvironmentFault
from secateur.pattern import Pattern
from secateur.recipe import ValueType

_ON_GPU: tuple[BackEnd, ...] = (
    *("own", "cutlass", "cusparselt"),
    *("own-fp8", "cusparselt-fp8", "scaled-mm"),
)


@lru_cache
def read(device: torch.device) -> Machine:
    """The facts of a GPU. Of a CPU that plays one: those of sm_80, with Triton interpreted."""
    absent: dict[BackEnd, str] = {}
    if (why := triton_obstacle()) is not None:
        absent["triton"] = why
    if device.type != "cuda":
        absent |= dict.fromkeys(_ON_GPU, "this is no GPU")
        return Machine((8, 0), absent)
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 8:
        major, minor = capability
        absent["cutlass"] = f"torch has it for compute capability 8.x, and this is {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        why = f"torch {torch.__version__} was built without it"
        absent |= dict.fromkeys(("cusparselt", "cusparselt-fp8"), why)
    if capability < (8, 9):
        major, minor = capability
        why = (
            f"tensor cores multiply fp8 from compute capability 8.9 on, and this is {major}.{minor}"
        )
        absent |= dict.fromkeys(("own-fp8", "cusparselt-fp8", "scaled-mm"), why)
    for end in _ON_GPU:
        if end not in absent and (why := _trial(end, device)) is not None:
            absent[end] = why
    return Machine(capability, absent)


def diagnosis() -> dict[str, str]:
    """The back ends for packed linears on the current GPU, and the rule by examples, in words."""
    if not torch.cuda.is_available():
        return {"gpu kernels": f"no CUDA device; {triton_obstacle() or 'triton is installed'}"}
    there = read(torch.device("cuda", torch.cuda.current_device()))
    words: dict[str, str] = {}
    for end in NAMES:
        if end in ("triton", *_ON_GPU):
            absent = there.absent.get(end)
            words[f"gpu {end}"] = f"not used: {absent}" if absent else "can be used"
    examples: tuple[tuple[str, ValueType], ...] = (
        ("2:4", "bf16"),
        ("2:4", "int4"),
        ("2:4", "fp8"),
        ("50%", "bf16"),
    )
    for pattern, values in examples:
        example = Weight(4096, 4096, Pattern.parse(pattern), 0.5, values, "bf16")
        words[f"gpu {pattern} {values}"] = str(choose(example, there))
    return words


def triton_obstacle() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed: `pip install secateur[gpu]`"
    return None


def _trial(end: BackEnd, device: torch.device) -> str | None:
    """Why a product by a back end of many tokens fails or is wrong on a device, or None.

    One small product: a library that is there may still refuse the device when it is called.
    """
    dtype = torch.float16 if end in ("own", "cutlass", "cusparselt") else torch.bfloat16
    weight = torch.zeros(64, 128, dtype=dtype, device=device)
    weight[:, ::4], weight[:, 3::4] = 1, 2
    x = torch.ones(16, 128, dtype=dtype, device=device)
    try:
        result = _product(end, weight, x)
    except (RuntimeError, NotImplementedError) as fault:
        return f"a trial product failed: {str(fault).splitlines()[0]}"
    except EnvironmentFault as fault:
        return fault.what
    if not torch.allclose(result, torch.nn.functional.linear(x, weight), rtol=2**-7):
        return "a trial product was wrong"
    return None


def _product(end: BackEnd, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` by a back end; the weight is 2:4, of small whole numbers."""
    made: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS
    if end == "cusparselt":
        made = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    if end in ("cutlass", "cusparselt"):
        with warnings.catch_warnings():  # that its interface may change, which a trial would show
            warnings.simplefilter("ignore", UserWarning)
            return torch.nn.functional.linear(x, made.from_dense(weight))
    if end in ("cusparselt-fp8", "scaled-mm"):
        values, ones = weight.to(torch.float8_e4m3fn), torch.ones(len(weight), device=x.device)
        if end == "scaled-mm":
            return fp8.scaled_product(values, x, ones, None)
        return fp8.sparse_product(cusparselt.compress(values), x, ones, None)
    library, (rows, columns) = library_for(x.device), weight.shape
    kept = weight[weight != 0].view(rows, -1).cpu()
    layer = PackedLayer(
        pattern=Pattern.parse("2:4"),
        shape=(rows, columns),
        kept=kept.numel(),
        per_row=columns // 2,
    )
    bits = torch.full((rows, columns // 8), 0x99, dtype=torch.uint8)
    scales = None
    if end == "own-fp8":
        kept, scales = kept.to(torch.float8_e4m3fn).view(torch.uint8), torch.ones(rows, 1)
    blocks = make_blocks(pieces("trial", layer, bits, kept, scales)).to(x.device)
    return OwnProduct(library, blocks, x.dtype).multiply(blocks, x)
