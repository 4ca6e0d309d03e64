"""What calibration learns about the inputs of a linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tokens per layer on which the relative output error is measured.
PROBE_TOKENS = 1024


class InputStatistics:
    """Running statistics of the inputs X of one linear, fed one batch of sequences at a time.

    Attributes:
        sequences, tokens: how many were seen.
        square_norm: ``[in]`` fp32, mean over sequences of Σ_tokens x² (Wanda's ``scaler_row``,
            Sun et al. 2023, eq. 1, before the root).
    """

    def __init__(self, width: int, sequences: int, device: torch.device) -> None:
        import torch

        self.sequences = 0
        self.tokens = 0
        self.square_norm = torch.zeros(width, device=device)
        self._probe: list[torch.Tensor] = []
        self._probe_per_sequence = -(-PROBE_TOKENS // sequences)

    def update(self, inputs: torch.Tensor) -> None:
        """Add a batch: ``[sequences, tokens, in]``."""
        import torch

        batch, length, width = inputs.shape
        flat = inputs.reshape(-1, width).float()
        # The authors' order of operations, so that the scores are theirs to the last bit.
        self.square_norm *= self.sequences / (self.sequences + batch)
        self.sequences += batch
        self.tokens += batch * length
        self.square_norm += torch.linalg.vector_norm(flat.t(), dim=1) ** 2 / self.sequences
        step = max(1, length // self._probe_per_sequence)
        self._probe.append(inputs[:, ::step].reshape(-1, width).float())

    def relative_error(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """‖(W - Ŵ)X‖² / ‖WX‖² over the probe tokens, about `PROBE_TOKENS` spread evenly.

        Args:
            before, after: ``[out, in]``.
        """
        import torch

        probe = torch.cat(self._probe)
        power = (probe @ before.t()).square().sum().double()
        error = (probe @ (before - after).t()).square().sum().double()
        return float(error / power) if power else 0.0
