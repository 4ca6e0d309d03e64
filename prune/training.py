"""The loop of `heal`: steps of AdamW, measured, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from secateur.checkpoint import save_tensors
from secateur.errors import ModelError, UsageError
from secateur.progress import Tick, no_tick
from secateur.prune.distill import (
    choose_trained,
    learning_rate,
    merge_low_rank,
    state_error,
    token_divergence,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.recipe import Heal

STATE = "training.safetensors"
BEST = "best.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Training:
    """A student on its way to its teacher.

    Args:
        student, teacher: the models, fp32.
        blocks: where the student's blocks are.
        masks: keep-masks by name of the weight.
        text: token ids ``[tokens]``; its last windows are measured on, never trained on.
        heal: the recipe's section.
        path: directory that gets what a later run needs to go on.

    Raises:
        ModelError: the text is too short, or the vocabularies differ.
        UsageError: hidden states of models with different numbers of blocks are to be compared.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    blocks: str
    masks: dict[str, torch.Tensor]
    text: torch.Tensor
    heal: Heal
    path: Path
    trained: dict[str, torch.nn.Parameter] = field(init=False)
    step: int = field(default=0, init=False)
    history: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        from accelerate import Accelerator

        heal = self.heal
        if self.student.config.vocab_size != self.teacher.config.vocab_size:
            raise ModelError(
                f"the teacher knows {self.teacher.config.vocab_size} tokens and the pruned model "
                f"{self.student.config.vocab_size}",
                "give the model that was pruned as --teacher",
            )
        counts = [len(model.get_submodule(self.blocks)) for model in (self.student, self.teacher)]
        if heal.hidden and counts[0] != counts[1]:
            raise UsageError(
                f"hidden states cannot be compared: {counts[0]} blocks, and {counts[1]} before",
                "use --hidden 0",
            )
        longest = int(getattr(self.student.config, "max_position_embeddings", heal.length))
        self.length = length = min(heal.length, longest)
        windows = self.text[: len(self.text) // length * length].view(-1, length)
        if len(windows) < 2 * heal.held_out:
            raise ModelError(
                f"the text has {len(windows)} windows of {length} tokens, and "
                f"{heal.held_out} are measured on",
                "give a longer text, or a smaller --length or --held-out",
            )
        self.windows, self.held_out = windows[: -heal.held_out], windows[-heal.held_out :]
        torch.manual_seed(heal.seed)
        self.trained = choose_trained(self.student, self.blocks, self.masks, heal.train, heal.rank)
        if heal.checkpointing:
            self.student.activation_checkpointing_enable({"use_reentrant": False})
            self.student.train()  # checkpoints only then; these models have no dropout
        precision = {"fp32": "no", "bf16": "bf16"}[heal.precision]
        self.accelerator = Accelerator(mixed_precision=precision, cpu=heal.device == "cpu")
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=heal.rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.prepared, self.optimizer = self.accelerator.prepare(self.student, optimizer)
        self.teacher.requires_grad_(False).to(self.accelerator.device)

    @property
    def steps(self) -> int:
        """Steps that the token budget is worth."""
        return max(1, self.heal.tokens // (self.heal.batch * self.length))

    def run(self, tick: Tick = no_tick) -> dict[str, Any]:
        """Train until the budget is spent or the divergence stops falling.

        Returns:
            The facts of `secateur.prune.heal.HealResult`.
        """
        self._resume()
        if not self.history:
            self._measure()
        while self.step < self.steps and not self._stalled():
            self._train()
            tick(self.step, self.steps)
            if self.step % self.heal.every == 0 or self.step == self.steps:
                self._measure()
        return {
            "before": self.history[0],
            "after": min(self.history),
            "tokens": self.step * self.heal.batch * self.length,
            "steps": (self.step, self.steps),
            "stopped_early": self.step < self.steps,
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """The best weights, by name."""
        best = load_file(self.path / BEST)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(best[name])
        merge_low_rank(self.student)
        return {name: tensor.cpu() for name, tensor in self.student.state_dict().items()}

    def _train(self) -> None:
        rate = learning_rate(self.step, self.steps, self.heal.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for windows in self._batch():
            with self.accelerator.autocast():
                divergence, error = self._compare(windows)
            share = len(windows) / self.heal.batch
            self.accelerator.backward(share * (divergence + self.heal.hidden * error))
        self.accelerator.clip_grad_norm_(self.trained.values(), self.heal.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _batch(self) -> Iterator[torch.Tensor]:
        """The windows of this step, a few at a time; every window once before any comes again."""
        count, batch = len(self.windows), self.heal.batch
        numbers = []
        for place in range(self.step * batch, (self.step + 1) * batch):
            order = list(range(count))
            Random(self.heal.seed + place // count).shuffle(order)
            numbers.append(order[place % count])
        chosen = self.windows[numbers].to(self.accelerator.device)
        yield from torch.split(chosen, self.heal.at_once)

    def _compare(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """KL from the teacher, and how far the blocks' outputs are from its own."""
        options = {"use_cache": False, "output_hidden_states": self.heal.hidden > 0}
        with torch.no_grad():
            dense = self.teacher(input_ids=windows, **options)
        own = self.prepared(input_ids=windows, **options)
        divergence = token_divergence(own.logits, dense.logits)
        if not self.heal.hidden:
            return divergence, 0.0
        # The first is the embedding, the last is normed.
        return divergence, state_error(own.hidden_states[1:-1], dense.hidden_states[1:-1])

    def _measure(self) -> None:
        """Divergence on the windows that are held out; the best weights are kept."""
        with torch.no_grad(), self._evaluating():
            losses = [
                float(self._compare(window[None].to(self.accelerator.device))[0])
                for window in self.held_out
            ]
        self.history.append(sum(losses) / len(losses))
        trained = {name: parameter.detach() for name, parameter in self.trained.items()}
        if self.history[-1] == min(self.history):
            save_tensors(self.path / BEST, trained)
        self._save(trained)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.student.training
        self.student.eval()
        yield
        self.student.train(training)

    def _stalled(self) -> bool:
        """Whether the best measurement is more than `patience` ones ago."""
        best = self.history.index(min(self.history))
        return len(self.history) - 1 - best >= self.heal.patience

    def _save(self, trained: dict[str, torch.Tensor]) -> None:
        tensors = {f"weight.{name}": tensor for name, tensor in trained.items()}
        for name, parameter in self.trained.items():
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = value
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64)
        tensors["steps"] = torch.tensor(self.step)
        save_tensors(self.path / STATE, tensors)

    def _resume(self) -> None:
        if not (self.path / STATE).exists():
            return
        tensors = load_file(self.path / STATE)
        self.step, self.history = int(tensors["steps"]), tensors["history"].tolist()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weight.{name}"])
                moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if self.step}
                if moments:
                    moments["step"] = moments["step"].cpu()
                    self.optimizer.state[parameter] = moments
