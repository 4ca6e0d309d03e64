"""Regions of a block, its attention and its MLP: what the dense ones make of their inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secateur.activations import Activations
from secateur.prune.method import Region

if TYPE_CHECKING:
    import torch

    from secateur.model import Linear
    from secateur.walk import Walk


@dataclass
class RecordedRegion:
    """A child module of a block, and its inputs and outputs while the block was dense.

    Attributes:
        name: of the module within the block.
        linears: the weight matrices inside it by name.
    """

    name: str
    module: torch.nn.Module
    linears: dict[str, Linear]
    inputs: Activations
    targets: Activations
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def open(self, masks: Mapping[str, torch.Tensor]) -> Region:
        """The region as it is now, with the weights of ``masks`` free to change.

        Args:
            masks: ``[out, in]`` bool, by name of the linear.
        """
        import torch

        kept: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}
        for name, mask in masks.items():
            linear = self.linears[name]
            whole = linear.parameter
            _, all_kept = kept.setdefault(
                id(whole), (whole, torch.zeros_like(whole, dtype=torch.bool))
            )
            linear.part_of(all_kept).copy_(mask)
        return Region(self.name, self._forward, self.inputs, self.targets, list(kept.values()))

    def _forward(self, number: int) -> torch.Tensor:
        states, (rest, options) = self.inputs[number], self.calls[number]
        if "hidden_states" in options:
            return _first(self.module(**{**options, "hidden_states": states}))
        return _first(self.module(states, *rest, **options))

    def close(self) -> None:
        """Drop the inputs and outputs."""
        self.inputs.close()
        self.targets.close()


def record_regions(walk: Walk, index: int, names: Collection[str]) -> list[RecordedRegion]:
    """Run the sequences through a dense block, and keep what goes in and out of its regions.

    Args:
        walk: with the block's inputs.
        index: the block, loaded.
        names: the linears that count; children of the block without any of them are no region.
    """
    import torch

    block = walk.model.blocks[index]
    linears = walk.model.linears(index)
    regions = []
    for name, child in block.named_children():
        inside = {id(module) for module in child.modules()}
        own = {key: linears[key] for key in names if id(linears[key].module) in inside}
        if own and next(iter(own.values())).module is not child:
            stores = Activations(walk.samples), Activations(walk.samples)
            regions.append(RecordedRegion(name, child, own, *stores))
    number = 0

    def watch(region: RecordedRegion) -> Any:
        def hook(_: object, rest: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            states = rest[0] if rest else options["hidden_states"]
            # Copies: some blocks add to the output in place.
            region.inputs[number] = states.clone()
            region.targets[number] = _first(output).clone()
            region.calls.append((rest[1:], options))

        return hook

    handles = [
        region.module.register_forward_hook(watch(region), with_kwargs=True) for region in regions
    ]
    with torch.no_grad():
        for number in range(walk.samples):
            walk.run(index, walk.states[number])
    for handle in handles:
        handle.remove()
    return regions


def _first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result
