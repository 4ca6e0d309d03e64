"""The one walk over a model's decoder blocks, shared by everything that calibrates.

Block by block: load it, run the calibration sequences through it while statistics of every
linear's inputs are collected, let the visitor change it, run the sequences again so that the next
block sees what the changed one really puts out, and free it. Within a block all linears see the
inputs of the unchanged block, as in the code of Wanda, SparseGPT and their descendants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur.statistics import InputStatistics, Need

if TYPE_CHECKING:
    import torch

    from secateur.model import StreamedModel


class _Captured(Exception):
    """Raised by the last block to end a capture."""


class Walk:
    """The calibration sequences on their way through the blocks.

    Args:
        model: the streamed model.
        tokens: ``[samples, length]`` token ids.
        needs: what to collect of the inputs of each linear.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: torch.Tensor,
        needs: frozenset[Need] = frozenset({"norms"}),
    ) -> None:
        import torch

        self.model = model
        self.needs = needs
        self._kwargs: list[dict[str, Any]] = []
        model.load_outside()
        with torch.no_grad():
            self._states = [self._capture(row[None].to(model.device)) for row in tokens]
        model.free_outside()

    def _capture(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed one sequence, and note what the model passes to each of its blocks.

        Every block's own ``forward`` is replaced by one that returns its input, so the model's
        real code decides on masks, positions and rotary embeddings, per block where they differ.
        """
        kwargs: list[dict[str, Any]] = []
        seen: list[torch.Tensor] = []
        blocks = list(self.model.blocks)

        def forward(states: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
            seen.append(states)
            kwargs.append(options)
            if len(kwargs) == len(blocks):
                raise _Captured
            return states

        for block in blocks:
            block.forward = forward
        try:
            self.model.module(input_ids=tokens, use_cache=False)
        except _Captured:
            pass
        finally:
            for block in blocks:
                del block.forward
        if not self._kwargs:  # sequences of one length share masks and positions
            self._kwargs = kwargs
        return seen[0]

    def observe(self, index: int) -> dict[str, InputStatistics]:
        """Run the sequences through a loaded block; statistics by full name of its linears."""
        import torch

        statistics: dict[str, InputStatistics] = {}
        seen: list[tuple[torch.Tensor, InputStatistics]] = []
        leaders: set[str] = set()

        def watch(name: str) -> Any:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                (states,) = inputs
                if name not in statistics:  # the first sequence finds out who shares an input
                    shared = [known for tensor, known in seen if tensor is states]
                    if not shared:
                        leaders.add(name)
                        shared = [self._statistics(states)]
                        seen.append((states, shared[0]))
                    statistics[name] = shared[0]
                if name in leaders:
                    statistics[name].update(states.reshape(1, -1, states.shape[-1]))

            return hook

        handles = [
            linear.register_forward_pre_hook(watch(name))
            for name, linear in self.model.linears(index).items()
        ]
        try:
            with torch.no_grad():
                for states in self._states:
                    self._run(index, states)
                    seen.clear()
        finally:
            for handle in handles:
                handle.remove()
        return statistics

    def advance(self, index: int) -> None:
        """Replace the sequences by what the loaded block puts out for them."""
        import torch

        with torch.no_grad():
            for number, states in enumerate(self._states):
                self._states[number] = self._run(index, states)

    def _statistics(self, states: torch.Tensor) -> InputStatistics:
        return InputStatistics(states.shape[-1], self.samples, states.device, self.needs)

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(self._states)

    def _run(self, index: int, states: torch.Tensor) -> torch.Tensor:
        output = self.model.blocks[index](states, **self._kwargs[index])
        # Blocks return a tensor, or in older code a tuple that starts with it.
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result
