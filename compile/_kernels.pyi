"""Native kernels of secateur (C++17, no torch)."""

from collections.abc import Sequence
from typing import Any

def cpu_features() -> list[str]:
    """Names of the instruction sets of this CPU that secateur's kernels can use."""

class Matrix:
    """A weight [rows, columns] in a layout of this CPU."""

    rows: int
    columns: int
    nbytes: int
    facts: dict[str, Any]
    streams: dict[str, Any]
    def clone(self) -> Matrix: ...
    def decode(self) -> Any: ...
    def multiply(self, x: Any, out: Any, bias: Any | None, act8: bool) -> None: ...

def pack(
    *,
    rows: int,
    columns: int,
    type: str,
    values: Any,
    count: int,
    bits: Any | None,
    block: int,
    scales: Any | None,
    group: int,
    kind: str,
    window: int,
    keep: int,
    rest: bool,
) -> Matrix: ...
def map(
    *,
    rows: int,
    columns: int,
    type: str,
    count: int,
    block: int,
    group: int,
    kind: str,
    window: int,
    keep: int,
    rest: bool,
    data: Any,
    starts: Any,
    rest_data: Any | None = None,
    rest_starts: Any | None = None,
) -> Matrix:
    """A matrix on streams in memory, 64 bytes behind each; their content is trusted."""

def checksum(data: Any) -> int:
    """A number that changes when the bytes do; of whole words of 64 bits."""

def compress_groups(
    *, rule: Any, width: int, weight: Any, bits: Any | None, values: Any, nibbles: Any
) -> int:
    """Write the stored values and nibbles of a weight; the first row that keeps too many, or -1."""

def expand_groups(*, rule: Any, width: int, values: Any, nibbles: Any, weight: Any) -> int:
    """Write the dense weight; the first row with a nibble that the rule does not know, or -1."""

def multiply_all(
    matrices: Sequence[Matrix],
    x: Any,
    outs: Sequence[Any],
    biases: Sequence[Any | None],
    act8: Sequence[bool],
) -> None: ...
def hold(matrix: Matrix, act8: bool) -> int:
    """A number for a matrix, good until it is released."""

def release(handle: int) -> None: ...
def held(handle: int) -> tuple[Matrix, bool]:
    """The matrix of a number, and whether its activations are int8."""

def table() -> int:
    """Address of the table in table.h."""

def set_threads(count: int, pin: bool) -> None: ...
def threads() -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def read_bandwidth(nbytes: int, rounds: int) -> list[float]: ...

class Sampler:
    """How one sequence chooses its tokens, and those it has chosen."""

    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        logit_bias: Sequence[tuple[int, float]],
        prompt: Sequence[int],
    ) -> None: ...

def sample(samplers: Sequence[Sampler], logits: Any, rows: Any, uniforms: Any) -> list[int]:
    """A token for each row of the logits; -1 where they are not numbers."""

def logprobs(
    logits: Any, rows: Any, tokens: Any, counts: Any
) -> list[tuple[float, list[tuple[int, float]]]]:
    """The log-probability of a token of each row, and the best with theirs."""

class Decoder:
    """A decoder-only transformer with a paged KV cache."""

    max_length: int
    cache_bytes: int
    def add_layer(self, **parts: Any) -> None: ...
    def step(self, tokens: Any, starts: Any, positions: Any, tables: Any, wanted: Any) -> Any:
        """Logits float32 [wanted, vocabulary], good until the next step."""

def decoder(**parts: Any) -> Decoder: ...
