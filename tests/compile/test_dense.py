"""The dense form: the control in another value type, and the way back from a packed model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.checkpoint import Checkpoint
from secateur.compile import pack_model, write_dense
from secateur.errors import ModelError, UsageError
from secateur.model import load_causal_lm
from secateur.prune import prune_model
from secateur.recipe import Calibration, Prune

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("values", DTYPES)
def test_every_weight_is_rounded_and_nothing_else_changes(
    values: str, tiny: Path, tmp_path: Path
) -> None:
    report = write_dense(tiny, tmp_path / "out", values=values)
    before, after = Checkpoint(tiny), Checkpoint(tmp_path / "out")
    assert before.names() == after.names()
    for name in before.names():
        assert torch.equal(after.load(name), before.load(name).to(DTYPES[values]))
    assert report.dense_bytes == sum(after.nbytes(name) for name in after.names())
    assert load_causal_lm(tmp_path / "out").dtype == DTYPES[values]
    assert {f.name for f in before.companions()} == {f.name for f in after.companions()}


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_packing_and_back_is_the_identity(
    shards: str, tmp_path: Path, text_file: Path, make_model: Callable[..., Path]
) -> None:
    model = make_model(tmp_path / "model", shards=shards)
    prune_model(
        str(model), tmp_path / "pruned", Prune(), Calibration(data=str(text_file)), quiet=True
    )
    pack_model(tmp_path / "pruned", tmp_path / "packed")
    write_dense(tmp_path / "packed", tmp_path / "back")
    pruned, back = Checkpoint(tmp_path / "pruned"), Checkpoint(tmp_path / "back")
    assert pruned.config == back.config
    assert [f.name for f in pruned.files] == [f.name for f in back.files]
    for name in pruned.names():
        assert torch.equal(pruned.load(name).view(torch.int32), back.load(name).view(torch.int32))


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="value type 'bf61'"):
        write_dense(tiny, tmp_path / "out", values="bf61")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="already exists"):
        write_dense(tiny, tiny)
    with pytest.raises(ModelError, match="no model directory"):
        write_dense(tmp_path / "none", tmp_path / "out")
