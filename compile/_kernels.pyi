"""Native kernels of secateur (C++17, no torch)."""

def cpu_features() -> list[str]:
    """Names of the instruction sets of this CPU that secateur's kernels can use."""
