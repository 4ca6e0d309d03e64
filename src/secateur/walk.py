"""The one walk over a model's blocks, shared by everything that calibrates.

Block by block: load it, run the calibration sequences through it while statistics of every
linear's inputs are collected, let the visitor change it, run the sequences again so that the next
block sees what the changed one really puts out, and free it. Within a block all linears see the
inputs of the unchanged block, as in the code of Wanda, SparseGPT and their descendants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.activations import Activations
from secateur.statistics import InputStatistics, Need

if TYPE_CHECKING:
    import torch

    from secateur.model import Linear, StreamedModel


class _Captured(Exception):
    """Raised by the last block to end a capture."""


class Walk:
    """The calibration sequences on their way through the blocks.

    Args:
        model: the streamed model.
        inputs: what the model takes, by argument, e.g. ``{"input_ids": [samples, length]}``; one
            sample is fed at a time.
        needs: what to collect of the inputs of each linear.
        spill: a file to keep the sequences in; None: in memory.
    """

    def __init__(
        self,
        model: StreamedModel,
        inputs: Mapping[str, torch.Tensor],
        needs: frozenset[Need] = frozenset({"norms"}),
        spill: Path | None = None,
    ) -> None:
        self.model = model
        self.needs = needs
        self.states = Activations(len(next(iter(inputs.values()))), spill)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._tuples = False
        model.load_outside()
        for number in range(self.samples):
            self.states[number] = self._capture(inputs, number)
        model.free_outside()

    def _capture(self, inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
        """Embed one sample, and note what the model passes to each of its blocks.

        Every block's own ``forward`` is replaced by one that returns its input, so the model's
        real code decides on masks, positions and rotary embeddings, per block where they differ.
        """
        import torch

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        seen: list[torch.Tensor] = []

        def forward(states: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            seen.append(states)
            calls.append((rest, options))
            if len(calls) == len(self.model.blocks):
                raise _Captured
            return states

        try:
            with torch.no_grad(), replaced_blocks(self.model, forward):
                self.model.module(**one_sample(self.model, inputs, number))
        except _Captured:
            pass
        if not self._calls:  # samples of one shape share masks and positions
            self._calls = calls
        return seen[0]

    def observe(
        self,
        index: int,
        names: Collection[str] | None = None,
        *,
        advance: bool = False,
        needs: frozenset[Need] | None = None,
    ) -> dict[str, InputStatistics]:
        """Run the sequences through a loaded block, and collect statistics.

        Args:
            index: the block.
            names: the linears to collect of; None: all.
            advance: also let the sequences go on to the next block, as the block is now.
            needs: what to collect; None: what the walk was made for.

        Returns:
            Statistics by name of the linear. Linears that share an input share them.
        """
        import torch

        linears = self.model.linears(index)
        wanted = [linears[name] for name in (linears if names is None else names)]
        watch = _Watch(self.samples, self.needs if needs is None else needs)
        handles = [
            module.register_forward_pre_hook(watch.hook(own)) for module, own in _by_module(wanted)
        ]
        try:
            with torch.no_grad():
                for number in range(self.samples):
                    states = self.run(index, self.states[number])
                    watch.seen.clear()
                    if advance:
                        self.states[number] = states
        finally:
            for handle in handles:
                handle.remove()
        return watch.statistics

    def advance(self, index: int) -> None:
        """Replace the sequences by what the loaded block puts out for them."""
        import torch

        with torch.no_grad():
            for number in range(self.samples):
                self.states[number] = self.run(index, self.states[number])

    def close(self) -> None:
        """Drop the sequences."""
        self.states.close()

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(self.states)

    def run(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """What a loaded block makes of one sequence's hidden states ``[1, tokens, hidden]``."""
        rest, options = self._calls[index]
        output = self.model.blocks[index](states, *rest, **options)
        # Blocks return a tensor, or in older code a tuple that starts with it.
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        self._tuples = isinstance(output, tuple)
        return result

    def wrap(self, states: torch.Tensor) -> Any:
        """Hidden states as the blocks of this model return them."""
        return (states,) if self._tuples else states


@contextmanager
def replaced_blocks(model: StreamedModel, forward: Any) -> Iterator[None]:
    """Run the code around the blocks without them: every block's forward becomes ``forward``."""
    blocks = list(model.blocks)
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def one_sample(
    model: StreamedModel, inputs: Mapping[str, torch.Tensor], number: int
) -> dict[str, Any]:
    """The arguments of the model's forward for one calibration sample."""
    sample: dict[str, Any] = {
        name: tensor[number : number + 1].to(model.device) for name, tensor in inputs.items()
    }
    if "input_ids" in sample:
        sample["use_cache"] = False
    return sample


def _by_module(linears: Iterable[Linear]) -> list[tuple[torch.nn.Module, list[Linear]]]:
    groups: dict[int, tuple[torch.nn.Module, list[Linear]]] = {}
    for linear in linears:
        groups.setdefault(id(linear.module), (linear.module, []))[1].append(linear)
    return list(groups.values())


class _Watch:
    """Statistics of the inputs of some linears while sequences run through them."""

    def __init__(self, samples: int, needs: frozenset[Need]) -> None:
        self.samples = samples
        self.needs = needs
        self.statistics: dict[str, InputStatistics] = {}
        self.seen: list[tuple[torch.Tensor, InputStatistics]] = []  # inputs of this sequence
        self._leaders: set[str] = set()

    def hook(self, own: list[Linear]) -> Any:
        """A forward pre-hook for the module of these linears."""
        if own[0].part == "whole":
            return lambda _, inputs: self._see(own[0].name, inputs[0])
        return lambda _, inputs: self._see_experts(own, *inputs)

    def _see(self, name: str, states: torch.Tensor) -> None:
        if name not in self.statistics:  # the first sequence finds out who shares an input
            shared = [known for tensor, known in self.seen if tensor is states]
            if not shared:
                self._leaders.add(name)
                shared = [
                    InputStatistics(states.shape[-1], self.samples, states.device, self.needs)
                ]
                self.seen.append((states, shared[0]))
            self.statistics[name] = shared[0]
        if name in self._leaders:
            self.statistics[name].update(states.reshape(1, -1, states.shape[-1]))

    def _see_experts(
        self, own: list[Linear], states: torch.Tensor, chosen: torch.Tensor, *_: object
    ) -> None:
        """Give each expert the tokens that are routed to it: states [tokens, hidden]."""
        import torch

        module: Any = own[0].module
        for expert in sorted({linear.expert for linear in own}):
            mine = states[(chosen == expert).any(dim=-1)]
            inner: torch.Tensor | None = None
            for linear in own:
                if linear.expert != expert:
                    continue
                if linear.part != "down":
                    self._see(linear.name, mine)
                    continue
                if inner is None:
                    both = torch.nn.functional.linear(mine, module.gate_up_proj[expert])
                    gate, up = both.chunk(2, dim=-1)
                    inner = module.act_fn(gate) * up
                self._see(linear.name, inner)
