"""What `pack_model` and `write_dense` tell about their work."""

from __future__ import annotations

from pydantic import BaseModel

from secateur.recipe import Calibration, ValueType


class LayerReport(BaseModel):
    """Size of one packed linear, in bytes, without a bias, and what quantising it cost.

    Attributes:
        dense_bytes: of all its weights in the same value type, with their scales.
        packed_bytes: as stored.
        quantization_error: ‖(W - Ŵ)X‖² / ‖WX‖², W being the pruned weight, Ŵ the values
            times their scales and X the calibration inputs; None if not measured.
        activation_error: ‖Ŵ(X - X̂)‖ / ‖ŴX‖ for inputs X̂ in 8 bits; None if not measured.
    """

    shape: tuple[int, int]
    pattern: str
    kept: int
    dense_bytes: int
    packed_bytes: int
    ratio: float
    quantization_error: float | None = None
    activation_error: float | None = None


class PackReport(BaseModel):
    """What a writer of a format made.

    Attributes:
        output: the directory.
        values: type of the stored weights; None: as they were.
        group_size: of int8 and int4: columns that share a scale.
        quantize: of int8, int4 and fp8: the method; "kept": the values are those of the source.
        calibration, calibration_tokens: the text that was asked for, and how much of it there was;
            None if none was read.
        layers: the packed linears by module name.
        kept_dense: the linears left dense by pruning, and why. Integers quantise them, too.
        notes: what to know of the result; they are in its manifest, too.
        linears_dense_bytes, linears_packed_bytes: sums over `layers`.
        source_bytes: the weights of the model as they were stored.
        dense_bytes: the weights of the model in the value types of the output.
        packed_bytes: the weights of the output, everything included.
        seconds: wall time.
    """

    output: str
    format: str = "packed"
    values: ValueType | None
    group_size: int | None = None
    quantize: str | None = None
    calibration: Calibration | None = None
    calibration_tokens: int | None = None
    layers: dict[str, LayerReport]
    kept_dense: dict[str, str]
    notes: list[str] = []
    linears_dense_bytes: int
    linears_packed_bytes: int
    source_bytes: int
    dense_bytes: int
    packed_bytes: int
    seconds: float
