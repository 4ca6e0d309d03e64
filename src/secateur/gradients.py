"""Gradients of a model's weights, one block in memory at a time.

The blocks are run forward and their inputs kept; the loss is computed by the model's own code
around the blocks; then each block, from the last to the first, is run again and differentiated.
That is what autograd computes on the whole model, in the memory of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from secateur.activations import Activations
from secateur.checkpoint import save_tensors
from secateur.progress import Tick, no_tick
from secateur.statistics import GradientNorms, GradientStatistics
from secateur.walk import Walk, one_sample, replaced_blocks

if TYPE_CHECKING:
    import torch

    from secateur.model import Linear, StreamedModel


class _Sums(Protocol):
    def update(self, gradient: torch.Tensor) -> None: ...


Statistics = TypeVar("Statistics", bound=_Sums)


def stream_gradients(
    model: StreamedModel,
    inputs: Mapping[str, torch.Tensor],
    norm: Literal["l1", "l2"],
    directory: Path,
    *,
    half: bool = False,
    spill: bool = False,
    tick: Tick = no_tick,
) -> None:
    """Write the norms over samples of every weight's gradient, a file for each block.

    The loss of a text sample is the mean negative log-likelihood of its tokens after the first; of
    an image, that of its label. The model is in evaluation mode (no dropout). Blocks whose file is
    already there are not written again.

    Args:
        model: the dense model.
        inputs: as for `Walk`; images come with ``labels``.
        norm, half: as for `GradientStatistics`.
        directory: gets `gradient_file` of each block.
        spill: keep the blocks' inputs in files of this directory, not in memory.
    """
    blocks = len(model.blocks)
    if all(gradient_file(directory, block).exists() for block in range(blocks)):
        return

    def write(block: int, found: Mapping[str, GradientStatistics]) -> None:
        if not gradient_file(directory, block).exists():
            norms = {name: statistics.result().norms for name, statistics in found.items()}
            save_tensors(gradient_file(directory, block), norms)

    each_gradient(
        model,
        inputs,
        lambda: GradientStatistics(norm, half),
        write,
        spill=directory if spill else None,
        tick=tick,
    )


def each_gradient(
    model: StreamedModel,
    inputs: Mapping[str, torch.Tensor],
    statistics: Callable[[], Statistics],
    finish: Callable[[int, Mapping[str, Statistics]], None],
    *,
    passed: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    spill: Path | None = None,
    tick: Tick = no_tick,
) -> None:
    """Differentiate the loss of `stream_gradients` by every weight, sample by sample.

    Args:
        model, inputs: as for `stream_gradients`.
        statistics: makes what the gradients of one weight, ``[out, in]``, are added to.
        finish: is given a block, from the last to the first, while its weights are loaded, and
            the statistics by name of the linear.
        passed: is given a block, what goes into it and what comes out, of each sample.
        spill: keep the blocks' inputs in files of this directory; None: in memory.
    """
    import torch

    blocks = len(model.blocks)
    features = {name: tensor for name, tensor in inputs.items() if name != "labels"}

    def store(name: str) -> Activations:
        return Activations(walk.samples, spill / f"states-{name}" if spill else None)

    walk = Walk(model, features, spill=spill / "states-walk" if spill else None)
    kept: list[Activations] = []
    for block in range(blocks):
        model.load_block(block)
        kept.append(store(f"{block:05}"))
        for number in range(walk.samples):
            kept[block][number] = walk.states[number]
        walk.advance(block)
        for number in range(walk.samples if passed else 0):
            passed(block, kept[block][number], walk.states[number])  # type: ignore[misc]
        model.free_block(block)
        tick(block + 1, 3 * blocks)
    slopes = store("slopes")
    model.load_outside(head=True)
    for number in range(walk.samples):
        slopes[number] = _slope_of_loss(walk, inputs, number)
    model.free_outside()
    walk.close()
    for block in reversed(range(blocks)):
        model.load_block(block)
        linears = model.linears(block)
        found = {name: statistics() for name in linears}
        for number in range(walk.samples):
            states = kept[block][number].detach().requires_grad_()
            with _differentiated(linears, found):
                torch.autograd.backward(walk.run(block, states), slopes[number])
            assert states.grad is not None
            slopes[number] = states.grad
        kept[block].close()
        finish(block, found)
        model.free_block(block)
        tick(3 * blocks - 2 * block, 3 * blocks)
    slopes.close()


def gradient_file(directory: Path, block: int) -> Path:
    """Where `stream_gradients` puts the norms of a block."""
    return directory / f"gradients-{block:05}.safetensors"


def regional_gradients(walk: Walk, index: int) -> dict[str, GradientNorms]:
    """Gradients of the norm of a loaded block's own output, by name of the linear.

    The regional gradients of Yang et al. 2025, "Wanda++: Pruning Large Language Models via Regional
    Gradients", eq. 3: of ‖block(x)‖₂, one for each sequence x.
    """
    import torch

    linears = walk.model.linears(index)
    found = {name: GradientStatistics("l2") for name in linears}
    for number in range(walk.samples):
        with _differentiated(linears, found):
            torch.autograd.backward(torch.linalg.vector_norm(walk.run(index, walk.states[number])))
    return {name: statistics.result() for name, statistics in found.items()}


@contextmanager
def _differentiated(linears: dict[str, Linear], found: Mapping[str, _Sums]) -> Iterator[None]:
    """Let autograd see the weights of a block, and add one sample's gradients to ``found``."""
    parameters = [linear.parameter for linear in linears.values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield
    for name, linear in linears.items():
        gradient = linear.gradient
        # None where no token took part, e.g. in a layer of experts that is skipped.
        found[name].update(linear.weight * 0 if gradient is None else gradient)
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)


def _slope_of_loss(walk: Walk, inputs: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    """∂ loss / ∂ (output of the last block) of one sample."""
    output = walk.states[number].detach().requires_grad_()
    loss_of(walk, inputs, number, output).backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    return output.grad


def loss_of(
    walk: Walk, inputs: Mapping[str, torch.Tensor], number: int, output: torch.Tensor
) -> torch.Tensor:
    """The loss of `stream_gradients` of one sample.

    Args:
        inputs: as for `Walk`.
        number: of the sample.
        output: what the last block puts out for it; what lies outside the blocks is loaded.
    """
    calls = 0

    def forward(states: torch.Tensor, *_: object, **__: object) -> object:
        nonlocal calls
        calls += 1
        return walk.wrap(output if calls == len(walk.model.blocks) else states)

    sample = one_sample(walk.model, inputs, number)
    sample.setdefault("labels", sample.get("input_ids"))
    with replaced_blocks(walk.model, forward):
        loss: torch.Tensor = walk.model.module(**sample).loss
    return loss
