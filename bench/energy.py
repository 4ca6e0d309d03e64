"""Energy that the processor has used, where the machine counts it (RAPL, Linux powercap)."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of all processor packages, whatever ran on them.

    The counters of RAPL wrap around, some within a minute of full load: `read` must be called more
    often than that.

    Args:
        root: where the kernel's counters are.

    Attributes:
        obstacle: why there is nothing to read; None if there is.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        self.obstacle: str | None = None
        self._joules = 0.0
        self._zones = [
            zone
            for zone in sorted(root.glob("*-rapl:*"))
            if zone.name.count(":") == 1 and (zone / "energy_uj").exists()  # packages, not parts
        ]
        if not self._zones:
            self.obstacle = f"this machine counts no energy (no RAPL package under {root})"
            return
        try:
            self._ranges = [_number(zone / "max_energy_range_uj") for zone in self._zones]
            self._last = self._counters()
        except (OSError, ValueError) as fault:
            self.obstacle = f"the energy counters cannot be read: {fault}"

    def read(self) -> float | None:
        """Joules so far; None if there is nothing to read."""
        if self.obstacle is not None:
            return None
        now = self._counters()
        for before, after, whole in zip(self._last, now, self._ranges, strict=True):
            self._joules += (after - before + (whole if after < before else 0)) / 1e6
        self._last = now
        return self._joules

    @property
    def description(self) -> str:
        """What is counted, or why nothing is."""
        if self.obstacle is not None:
            return self.obstacle
        return f"RAPL, {len(self._zones)} package(s), whatever ran on them"

    def _counters(self) -> list[int]:
        return [_number(zone / "energy_uj") for zone in self._zones]


def _number(file: Path) -> int:
    return int(file.read_text())
