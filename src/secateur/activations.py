"""Hidden states of the calibration sequences, in memory or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Activations:
    """Tensors of one shape and type by number.

    Args:
        count: how many there will be.
        file: where to keep them; None: in memory. The file is removed by `close`.
    """

    def __init__(self, count: int, file: Path | None = None) -> None:
        self._kept: list[torch.Tensor | None] = [None] * count
        self._file = file.open("w+b") if file is not None else None
        self._path = file
        self._like: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> torch.Tensor:
        """A tensor, on the device that it came from."""
        import torch

        if self._file is None:
            kept = self._kept[number]
            assert kept is not None
            return kept
        like = self._like
        assert like is not None
        raw = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8)
        self._file.seek(number * raw.numel())
        self._file.readinto(raw.numpy().data)
        return raw.view(like.dtype).view(like.shape).to(like.device)

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        import torch

        if self._file is None:
            self._kept[number] = tensor
            return
        self._like = tensor.new_empty(()).expand(tensor.shape)
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._file.seek(number * raw.nbytes)
        self._file.write(raw.data)

    def close(self) -> None:
        """Drop all tensors."""
        self._kept = [None] * len(self._kept)
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
