"""Quantising a whole model: one linear at a time, and block by block along the calibration walk.

The walk is that of pruning: a block's linears see the inputs that the quantised blocks before it
really put out, all of them those of the block as it was. What is finished stays in files of the
partial directory, so that a run that was cut off goes on after its last block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.calibration import calibration_inputs
from secateur.checkpoint import Checkpoint, save_tensors, write_json
from secateur.compile.config import BITMASK, LIMITS, SCALES, VALUES, PackedLayer
from secateur.compile.packed import decode, encode_integers
from secateur.compile.quantize import DAMPING, activation_error, gptq, rtn
from secateur.compile.stored import open_safely
from secateur.device import choose_device
from secateur.errors import ModelError
from secateur.gram import inverse_factor
from secateur.model import StreamedModel
from secateur.pattern import Pattern
from secateur.progress import progress
from secateur.recipe import Calibration, ValueType
from secateur.walk import Walk

if TYPE_CHECKING:
    from secateur.statistics import InputStatistics

FOLDER = "quantised"
_SAMPLES = "calibration.safetensors"

# The verified mask of a linear, given its name and its weight as stored.
MaskOf = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A quantised linear, ready to be stored.

    Attributes:
        layer: its entry in ``quantization_config``.
        tensors: by the end of their names.
        facts: for the manifest, under ``steps.quantize``.
    """

    layer: PackedLayer
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How the linears of a model become integers or fp8.

    Attributes:
        values: int8, int4 or fp8.
        group_size: columns that share a scale; None: all of a row, of fp8.
        method: gptq, or rtn, which reads no inputs.
    """

    values: ValueType
    group_size: int | None
    method: Literal["gptq", "rtn"]

    def solve(
        self,
        name: str,
        weight: torch.Tensor,
        mask: torch.Tensor,
        pattern: Pattern,
        inputs: InputStatistics | None,
    ) -> Encoded:
        """Quantise one linear.

        Args:
            name: of the linear, for errors.
            weight: fp32 ``[rows, columns]``.
            mask: bool ``[rows, columns]``, True = kept; has the pattern.
            inputs: its Gram matrix and a probe; None: rtn, and nothing is measured.

        Raises:
            ModelError: a weight is too large for a scale, or the inputs are not finite.
        """
        limit, size = LIMITS[self.values], self.group_size or weight.shape[1]
        try:
            if inputs is None or self.method == "rtn":
                found = rtn(weight, mask, limit, size)
            else:
                factor = inputs.derived("factor", lambda: inverse_factor(inputs.gram, DAMPING))
                found = gptq(weight, mask, inputs.gram, limit, size, factor=factor)
        except ModelError as fault:
            raise ModelError(f"tensor {name + '.weight'!r}: {fault.what}", fault.fix) from fault
        facts: dict[str, Any] = {"method": self.method, "relative_error": None}
        facts |= {"activation_error": None, "damping_retries": found.damping_retries}
        if inputs is not None:
            after = found.dense()
            facts["relative_error"] = inputs.relative_error(weight, after)
            facts["activation_error"] = activation_error(after, inputs.probe, self.group_size)
        layer, tensors = encode_integers(found, mask, pattern, self.values)
        return Encoded(layer, {end: tensor.cpu() for end, tensor in tensors.items()}, facts)


def usual_text(recipe: Mapping[str, Any]) -> str:
    """The text to calibrate on where none is named: what pruning read, if it is at hand.

    Args:
        recipe: of the pruned model's manifest.

    Returns:
        The name in that recipe if the interpreter or a file has the text; else 'self'.
    """
    data = recipe.get("calibration", {}).get("data")
    here = data == "pydoc" or (isinstance(data, str) and Path(data).is_file())
    return str(data) if here else "self"


class Blocks:
    """The quantised linears of a model in files, one a block.

    Args:
        folder: where; made if it is not there.
        source: the pruned model.
        patterns: of the linears to quantise, by name.

    Attributes:
        tokens: how many tokens of text the walk read.
    """

    def __init__(self, folder: Path, source: Checkpoint, patterns: Mapping[str, Pattern]) -> None:
        self.folder = folder
        self.source = source
        self.patterns = patterns
        self.tokens = 0
        self._found: dict[str, tuple[int, dict[str, Any]]] = {}
        folder.mkdir(exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether a block is finished."""
        return any(self.folder.glob("*.json"))

    def run(
        self,
        quantizer: Quantizer,
        calibration: Calibration,
        mask_of: MaskOf,
        device: str,
        quiet: bool,
    ) -> None:
        """Quantise all blocks that are not finished yet.

        Raises:
            ModelError: as `Quantizer.solve`; or the model, a mask or the text is unfit.
        """
        place = choose_device(device)
        model = StreamedModel(self.source, place, torch.float32 if place.type == "cpu" else None)
        inputs = self._inputs(model, calibration, quiet)
        self.tokens = inputs["input_ids"].numel()
        walk = Walk(model, inputs, frozenset({"norms", "gram", "probe"}))
        with progress("quantising blocks", quiet) as tick:
            for block in range(len(model.blocks)):
                model.load_block(block)
                if not self._file(block, "json").exists():
                    self._solve(walk, block, quantizer, mask_of)
                self._take_over(model, block, quantizer.group_size)
                if block + 1 < len(model.blocks):
                    walk.advance(block)
                model.free_block(block)
                tick(block + 1, len(model.blocks))
        walk.close()
        if absent := sorted(self.patterns.keys() - self._found.keys()):
            raise ModelError(
                f"the manifest speaks of {absent[0]!r}, which is in none of the model's blocks",
                "prune the model again with `secateur prune`",
            )

    def load(self, name: str) -> Encoded:
        """A linear that `run` quantised."""
        block, entry = self._found[name]
        layer = PackedLayer.model_validate(entry["layer"])
        with open_safely(self._file(block, "safetensors")) as handle:
            tensors = {end: handle.get_tensor(name + end) for end in entry["tensors"]}
        return Encoded(layer, tensors, entry["facts"])

    def _file(self, block: int, kind: str) -> Path:
        return self.folder / f"{block:05}.{kind}"

    def _inputs(
        self, model: StreamedModel, calibration: Calibration, quiet: bool
    ) -> dict[str, torch.Tensor]:
        """The calibration samples, kept for a run that goes on."""
        from safetensors.torch import load_file

        kept = self.folder / _SAMPLES
        if not kept.exists():
            save_tensors(kept, calibration_inputs(model, calibration, quiet))
        inputs = load_file(kept)
        inputs.pop("labels", None)
        return inputs

    def _solve(self, walk: Walk, block: int, quantizer: Quantizer, mask_of: MaskOf) -> None:
        """Quantise a loaded block into its files; the one of the facts is written last."""
        linears = walk.model.linears(block)
        names = [name for name in linears if name in self.patterns]
        seen = walk.observe(block, names)
        stored: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        for name, following in zip(names, [*names[1:], ""], strict=True):
            mask = mask_of(name, self.source.load(f"{name}.weight"))
            weight = linears[name].weight.float().contiguous()
            own, pattern = seen[name], self.patterns[name]
            solved = quantizer.solve(name, weight, mask.to(weight.device), pattern, own)
            stored |= {name + end: tensor for end, tensor in solved.tensors.items()}
            entries[name] = {
                "layer": solved.layer.model_dump(mode="json"),
                "tensors": list(solved.tensors),
                "facts": solved.facts,
            }
            if own is not seen.get(following):
                own.forget()
        save_tensors(self._file(block, "safetensors"), stored)
        write_json(self._file(block, "json"), entries)

    def _take_over(self, model: StreamedModel, block: int, group_size: int | None) -> None:
        """Give a loaded block the weights that its files hold."""
        entries = json.loads(self._file(block, "json").read_text(encoding="utf-8"))
        self._found |= {name: (block, entry) for name, entry in entries.items()}
        linears = model.linears(block)
        for name in entries:
            one = self.load(name)
            pieces = one.tensors.get(BITMASK), one.tensors[VALUES], one.tensors[SCALES]
            linears[name].weight.copy_(decode(name, one.layer, *pieces, group_size))
