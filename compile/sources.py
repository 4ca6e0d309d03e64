"""What the writers of packed forms read: a model, its dense weights and a mask for each linear.

pruned directory                  the masks beside the weights, every one verified
packed directory                  its own masks
anything else: an orphan, or      the pattern that the zeros of each linear have
weights with zeros in place
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from secateur.architecture import ARCHITECTURES
from secateur.artifact import MANIFEST, LayerFacts, Manifest
from secateur.bits import unpack_mask
from secateur.checkpoint import Checkpoint, file_sha256
from secateur.compile.config import LIMITS
from secateur.compile.orphan import GROUP, OrphanCheckpoint
from secateur.compile.packed import PackedCheckpoint
from secateur.compile.quantize import Quantised
from secateur.compile.stored import open_safely
from secateur.compile.zeros import FEWEST, mask_of, pattern_of
from secateur.errors import ModelError
from secateur.model import StreamedModel
from secateur.pattern import Pattern
from secateur.recipe import ValueType

MASKS = "masks.safetensors"
PRUNE_AGAIN = "prune the model again with `secateur prune`"


class Source(ABC):
    """A model to be stored in another form.

    Attributes:
        checkpoint: its dense weights.
        layers: its linears by name; see `LayerFacts`.
        kept_dense: those that were not pruned, and why.
        patterns: the pattern of every other one.
        notes: what to tell about it.
        seed, recipe: how it was pruned, as far as that is known.
        values: int8 or int4 if all quantised linears can be stored as such without rounding, with a
            scale for each 128 columns; fp8 likewise, with one for each row; see `integers`.
        loss: why they cannot, if there are any.
    """

    kind = "pruned"
    values: ValueType | None = None
    loss: str | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layers: dict[str, LayerFacts] = {}
        self.kept_dense: dict[str, str] = {}
        self.patterns: dict[str, Pattern] = {}
        self.notes: list[str] = []
        self.seed: int | None = None
        self.recipe: dict[str, Any] = {}

    def provenance(self) -> dict[str, Any]:
        """What the manifest of the result says of its source."""
        return {"kind": self.kind, "files": self.checkpoint.sha256()}

    @abstractmethod
    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The keep-mask, bool ``[rows, columns]``, of a linear, given its weight as stored.

        Raises:
            ModelError: mask, pattern and weight contradict each other; names the tensor.
        """

    def integers(self, name: str) -> Quantised | None:
        """The integers or fp8 of a linear, if `values` is set; None if it has none."""
        return None

    def decoded(self, tensor: str) -> bool:
        """Whether a tensor is loaded as fp32 because it is stored with scales."""
        return False


class PrunedSource(Source):
    """A directory that `secateur prune` wrote."""

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        super().__init__(Checkpoint(path))
        self.manifest = manifest
        transposed = any(layer.transposed for layer in manifest.layers.values())
        refuse_other_modules(self.checkpoint, transposed)
        self.seed, self.recipe = manifest.seed, manifest.recipe
        self.layers, self.notes = manifest.layers, list(manifest.notes)
        for name, layer in manifest.layers.items():
            if layer.kept_dense is not None or layer.pattern == "dense":
                self.kept_dense[name] = layer.kept_dense or "its pattern is dense"
            else:
                self.patterns[name] = Pattern.parse(layer.pattern)
        if not (self.checkpoint.path / MASKS).is_file():
            raise ModelError(
                f"{path} has no {MASKS}: it is not a pruned model, or was copied in part",
                "make it with `secateur prune`, or copy the whole directory",
            )
        self._masks = open_safely(self.checkpoint.path / MASKS)
        self._check_names()

    def provenance(self) -> dict[str, Any]:
        """As of `Source`, with the masks and the source of the pruned model."""
        found = super().provenance()
        found["files"] |= {MASKS: file_sha256(self.checkpoint.path / MASKS)}
        return found | {"source": self.manifest.source}

    def _check_names(self) -> None:
        """Manifest, masks and weights must speak of the same linears."""
        masked = {tensor.removesuffix(".weight") for tensor in self._masks.keys()}  # noqa: SIM118
        for name in self.layers:
            if name in self.patterns and name not in masked:
                raise ModelError(
                    f"{MASKS} has no mask {name + '.weight'!r}, which the manifest calls pruned",
                    PRUNE_AGAIN,
                )
            if name + ".weight" not in self.checkpoint:
                raise ModelError(f"the model has no tensor {name + '.weight'!r}", PRUNE_AGAIN)
        if stray := sorted(masked - self.patterns.keys()):
            raise ModelError(
                f"{MASKS} has a mask {stray[0] + '.weight'!r}, which the manifest does not "
                "call pruned",
                PRUNE_AGAIN,
            )

    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The stored mask, verified against its pattern and the weights."""
        tensor, pattern = name + ".weight", self.patterns.get(name, Pattern())
        if weight.ndim != 2:
            raise ModelError(f"tensor {tensor!r} has {weight.ndim} axes, not 2", PRUNE_AGAIN)
        if pattern.is_dense:
            return torch.ones_like(weight, dtype=torch.bool)
        rows, columns = weight.shape
        bits = self._masks.get_tensor(tensor)
        try:
            if bits.ndim == 2 and bits.shape[0] * pattern.rows != rows:
                raise ValueError(f"{bits.shape[0]} rows of bits for {rows} rows of {pattern}")
            mask = unpack_mask(bits, columns, pattern.rows)
            pattern.check(mask)
        except ValueError as fault:
            raise ModelError(
                f"the mask of {tensor!r} is not valid: {fault}", PRUNE_AGAIN
            ) from fault
        if (alive := (weight != 0) & ~mask).any():
            row, column = (int(i) for i in alive.nonzero()[0])
            raise ModelError(
                f"tensor {tensor!r} is {float(weight[row, column]):g} at row {row}, column "
                f"{column}, which its mask removes",
                PRUNE_AGAIN,
            )
        return mask


class NarrowedSource(Source):
    """A directory that a structured method wrote: all its linears are dense, and smaller."""

    kind = "narrowed"

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        super().__init__(Checkpoint(path))
        self.manifest = manifest
        self.seed, self.recipe = manifest.seed, manifest.recipe
        self.layers, self.notes = manifest.layers, list(manifest.notes)
        self.kept_dense = dict.fromkeys(manifest.layers, "it was made smaller, not sparse")

    def provenance(self) -> dict[str, Any]:
        """As of `Source`, with the source of the narrowed model."""
        return super().provenance() | {"source": self.manifest.source}

    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """All ones."""
        return torch.ones_like(weight, dtype=torch.bool)


class ZerosSource(Source):
    """An orphaned checkpoint, or plain weights with zeros in place: the zeros tell the pattern."""

    kind = "zeros"

    def __init__(self, path: str | Path) -> None:
        orphan = OrphanCheckpoint(path)
        super().__init__(orphan)
        self.orphan = orphan
        self.kind = "orphan" if orphan.quantised or orphan.form != "dense weights" else "zeros"
        self.notes = [f"read from {orphan.form}", *orphan.notes]
        model = StreamedModel(orphan, torch.device("cpu"), None)
        linears = {
            name: linear
            for block in range(len(model.blocks))
            for name, linear in model.linears(block).items()
        }
        refuse_other_modules(orphan, any(linear.transposed for linear in linears.values()))
        for name, linear in linears.items():
            self._survey(name, linear.shape)
        self._settle_integers([name for name in linears if orphan.decoded(name + ".weight")])

    def _settle_integers(self, quantised: list[str]) -> None:
        """Find out whether all integers or fp8 can be kept, and as which."""
        limit, obstacles, four, fp8 = 0, [], False, 0
        for name in quantised:
            found = self.orphan.integers(name + ".weight")
            if isinstance(found, str):
                obstacles.append(f"{name}: {found}")
            elif found.values.is_floating_point():
                fp8 += 1
            else:
                limit = max(limit, int(found.values.abs().max()))
                four |= int(found.values.min()) == -LIMITS["int4"] - 1
        if obstacles:
            self.loss = (
                f"{len(obstacles)} of {len(quantised)} quantised linears have no packed form with "
                f"scales, so all became floats; the first is {obstacles[0]}"
            )
        elif 0 < fp8 < len(quantised):
            self.loss = (
                f"{fp8} of {len(quantised)} quantised linears are fp8 and the others integers, so "
                "all became floats: packed values are of one type"
            )
        elif fp8:
            self.values = "fp8"
        elif quantised:
            self.values = "int4" if limit <= LIMITS["int4"] else "int8"
            if limit == LIMITS["int4"] + 1 and four:
                self.notes.append(
                    "4-bit integers of -8 to 7 stay exact as int8: packed int4 ends at -7"
                )

    def _survey(self, name: str, shape: tuple[int, int]) -> None:
        weight = self.checkpoint.load(name + ".weight")
        if weight.shape != shape:
            raise ModelError(
                f"tensor {name + '.weight'!r} has shape {tuple(weight.shape)}, but config.json "
                f"asks for {shape}",
                "get the checkpoint again",
            )
        pattern, zeros = pattern_of(weight), float((weight == 0).float().mean())
        if pattern.is_dense:
            self.kept_dense[name] = (
                f"{100 * zeros:.1f} % of its weights are zero, and pruned ones have "
                f"{100 * FEWEST:.0f} % or more"
            )
        else:
            self.patterns[name] = pattern
        size = self.checkpoint.nbytes(name + ".weight")
        self.layers[name] = LayerFacts(
            shape=shape,
            pattern=str(pattern),
            kept_dense=self.kept_dense.get(name),
            sparsity=zeros,
            dense_bytes=size,
            bytes=size,
        )

    def provenance(self) -> dict[str, Any]:
        """As of `Source`, with the form in words."""
        return super().provenance() | {"form": self.orphan.form}

    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What the zeros of the weight say, with zeros kept where N:M asks for them."""
        return mask_of(weight, self.patterns.get(name, Pattern()))

    def decoded(self, tensor: str) -> bool:
        """As of `Source`."""
        return self.orphan.decoded(tensor)

    def integers(self, name: str) -> Quantised | None:
        """As of `Source`."""
        if self.values is None or not self.orphan.decoded(name + ".weight"):
            return None
        found = self.orphan.integers(name + ".weight")
        return None if isinstance(found, str) else found


class PackedSource(Source):
    """A packed directory."""

    kind = "packed"

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        checkpoint = PackedCheckpoint(path)
        super().__init__(checkpoint)
        self.packed = checkpoint.packed
        self.seed, self.recipe = manifest.seed, manifest.recipe
        self.layers, self.notes = manifest.layers, list(manifest.notes)
        for name, layer in self.packed.layers.items():
            if not layer.pattern.is_dense:
                self.patterns[name] = layer.pattern
        self.kept_dense = {
            name: layer.kept_dense or "its pattern is dense"
            for name, layer in self.layers.items()
            if name not in self.patterns
        }
        config = self.packed.config
        self.values = config.values if config.group_size == GROUP else None
        if config.values == "fp8":
            self.values = "fp8"

    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The stored mask."""
        if name not in self.packed.layers:
            return torch.ones_like(weight, dtype=torch.bool)
        return self.packed.mask(name)

    def decoded(self, tensor: str) -> bool:
        """As of `Source`."""
        assert isinstance(self.checkpoint, PackedCheckpoint)
        return self.checkpoint.decoded(tensor)

    def integers(self, name: str) -> Quantised | None:
        """As of `Source`."""
        if self.values is None or name not in self.packed.layers:
            return None
        return self.packed.integers(name)


def open_source(path: str | Path, packed: bool = False) -> Source:
    """Open a directory that another form can be made of.

    Args:
        path: of a pruned or narrowed model, an orphan, or weights with zeros in place.
        packed: whether it may be a packed model.

    Raises:
        ModelError: it is a packed model and may not be one, is damaged, or no model.
    """
    manifest = Manifest.read(path) if (Path(path) / MANIFEST).exists() else None
    if manifest is not None and manifest.kind == "pruned":
        return PrunedSource(path, manifest)
    if manifest is not None and manifest.kind == "narrowed":
        return NarrowedSource(path, manifest)
    if manifest is not None and manifest.kind == "packed":
        if packed:
            return PackedSource(path, manifest)
        raise ModelError(f"{path} is a packed model, not a pruned one", PRUNE_AGAIN)
    return ZerosSource(path)


def refuse_other_modules(checkpoint: Checkpoint, transposed: bool) -> None:
    """Packed forms are read back into ``torch.nn.Linear`` modules of the same names.

    Raises:
        ModelError: the model has others.
    """
    kind = checkpoint.config.get("model_type", "")
    architecture = ARCHITECTURES.get(kind)
    renamed = architecture is not None and (architecture.experts or architecture.stored)
    if renamed or transposed:
        raise ModelError(
            f"{kind} models cannot be packed: transformers holds their weights fused, transposed, "
            "or under other names",
            "use the pruned directory as it is; it is an ordinary model with zeros in place",
        )
