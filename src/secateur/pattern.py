"""Pattern: which positions of a weight matrix may be non-zero.

Grammar (N and M whole numbers, P a decimal number, R one of 4, 8, 16)::

    dense          every position
    N:M            keep N of every M consecutive inputs of a row      2:4  4:8  4:16  1:4
    P%             remove P percent of the positions, anywhere        50%  62.5%
    N:M@Rx1        the same choice for R consecutive output rows at once (a block of
    P%@Rx1         R rows x 1 column is kept or removed whole)        50%@8x1  2:4@16x1

A matrix is ``[out, in]`` as in ``torch.nn.Linear``; its *block rows* are ``out / R`` groups of
R consecutive rows (R = 1 without ``@``). A mask is boolean, True = kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from secateur.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

BLOCK_HEIGHTS = (4, 8, 16)
GRAMMAR = "'N:M' (keep N of M), 'P%' (remove P percent), either with '@Rx1', or 'dense'"
_FORM = re.compile(r"(?:(?P<n>\d+):(?P<m>\d+)|(?P<percent>\d+(?:\.\d+)?)%)(?:@(?P<rows>\d+)x1)?")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A sparsity pattern; build one with `Pattern.parse`.

    Attributes:
        n, m: keep ``n`` of every ``m`` consecutive columns; 0, 0 if the pattern is not N:M.
        removed: the fraction of positions that the pattern removes; 0 for ``dense``.
        rows: R, the number of consecutive rows that share one mask row.
    """

    n: int = 0
    m: int = 0
    removed: Fraction = Fraction(0)
    rows: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern from its text.

        Raises:
            UsageError: the text is not in the grammar or describes an empty or full matrix.
        """
        text = str(text).strip()
        if text == "dense":
            return cls()
        form = _FORM.fullmatch(text)
        if form is None:
            raise UsageError(f"pattern {text!r} is not understood", f"write {GRAMMAR}")
        rows = int(form["rows"] or 1)
        if form["rows"] and rows not in BLOCK_HEIGHTS:
            raise UsageError(
                f"pattern {text!r} has blocks of {rows} rows",
                f"use a block height of {', '.join(map(str, BLOCK_HEIGHTS))}",
            )
        if form["percent"] is not None:
            removed = Fraction(form["percent"]) / 100
            if not 0 < removed < 1:
                raise UsageError(
                    f"pattern {text!r} removes {form['percent']} % of the weights",
                    "remove more than 0 % and less than 100 %; to remove none, write 'dense'",
                )
            return cls(removed=removed, rows=rows)
        n, m = int(form["n"]), int(form["m"])
        if not 0 < n < m:
            raise UsageError(
                f"pattern {text!r} keeps {n} of every {m} weights",
                "N of N:M is the number kept and lies between 1 and M - 1; "
                "to keep all, write 'dense'",
            )
        return cls(n=n, m=m, removed=1 - Fraction(n, m), rows=rows)

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        blocks = f"@{self.rows}x1" if self.rows > 1 else ""
        if self.is_nm:
            return f"{self.n}:{self.m}{blocks}"
        percent = self.removed * 100
        whole = percent.denominator == 1
        return f"{percent.numerator if whole else float(percent)}%{blocks}"

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self.removed == 0

    @property
    def is_nm(self) -> bool:
        """Whether the pattern is N:M, in blocks or not."""
        return self.m > 0

    def obstacle(self, rows: int, columns: int) -> str | None:
        """Why a ``[rows, columns]`` matrix cannot hold this pattern, or None if it can."""
        if self.is_nm and columns % self.m:
            return f"{columns} inputs are not a multiple of {self.m}"
        if rows % self.rows:
            return f"{rows} outputs are not a multiple of {self.rows}"
        return None

    def removed_of(self, positions: int) -> int:
        """How many of ``positions`` equal positions are removed: rounded down."""
        return int(positions * self.removed)

    def check(self, mask: np.ndarray[Any, Any] | Any) -> None:
        """Assert that a keep-mask has this pattern.

        Args:
            mask: boolean ``[out, in]``, True = kept; a numpy array or a CPU torch tensor.

        Raises:
            ValueError: names the first place that breaks the pattern. For ``P%`` the removed
                fraction may differ from P by less than one column (rows round down).
        """
        import numpy as np

        kept = np.asarray(mask)
        if kept.dtype != np.bool_ or kept.ndim != 2:
            raise ValueError(f"a mask is a boolean matrix, not {kept.dtype} of {kept.ndim} axes")
        rows, columns = kept.shape
        if self.is_dense:
            if not kept.all():
                raise ValueError(f"'dense' but {(~kept).sum()} positions are removed")
            return
        if (why := self.obstacle(rows, columns)) is not None:
            raise ValueError(f"{self} does not fit: {why}")
        blocks = kept.reshape(rows // self.rows, self.rows, columns)
        if self.rows > 1 and (torn := (blocks != blocks[:, :1]).any(axis=1)).any():
            row, column = map(int, np.argwhere(torn)[0])
            raise ValueError(
                f"{self}: the {self.rows}x1 block at row {row * self.rows}, column {column} "
                "is kept only in part"
            )
        if self.is_nm:
            # Column by column of the groups: numpy is slow at sums of few elements.
            first = blocks[:, 0].view(np.uint8)
            counts = np.zeros((len(first), columns // self.m), np.min_scalar_type(self.m))
            for i in range(self.m):
                counts += first[:, i :: self.m]
            if (wrong := counts != self.n).any():
                row, group = map(int, np.argwhere(wrong)[0])
                raise ValueError(
                    f"{self}: row {row * self.rows} keeps {counts[row, group]} of the columns "
                    f"{group * self.m} to {group * self.m + self.m - 1}"
                )
            return
        removed = 1 - np.count_nonzero(kept) / kept.size
        if abs(removed - float(self.removed)) >= 1 / columns - 1e-9:
            raise ValueError(f"{self}: {100 * removed:.3f} % of the positions are removed")

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic models hold a Pattern, written as its text."""
        from pydantic_core import core_schema

        def read(value: Any) -> Pattern:
            return value if isinstance(value, Pattern) else cls.parse(value)

        return core_schema.no_info_before_validator_function(
            read,
            core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
            json_schema_input_schema=core_schema.str_schema(),
        )
