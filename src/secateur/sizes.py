"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from secateur.errors import UsageError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Read a size like ``2GiB``, ``800MB`` or ``1.5 GiB``, in bytes.

    Raises:
        UsageError: it is not one.
    """
    form = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]i?)?B)", text.strip(), re.IGNORECASE)
    if form is None:
        raise UsageError(f"the size {text!r} is not understood", "write e.g. 2GiB or 800MB")
    return int(float(form[1]) * _UNITS[form[2].upper()])
