"""Output directories: atomic, resumable, never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from secateur.artifact import Artifact, Manifest
from secateur.errors import ModelError, UsageError


def manifest() -> Manifest:
    return Manifest(kind="pruned", source={}, recipe={}, layers={})


def test_commit_names_and_hashes_everything(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with Artifact(output, {"a": 1}, overwrite=False) as artifact:
        (artifact.path / "x.bin").write_bytes(b"abc")
        assert not output.exists()
        written = artifact.commit(manifest(), {"seconds": 1})
    assert not artifact.path.exists()
    assert sorted(f.name for f in output.iterdir()) == ["manifest.json", "timings.json", "x.bin"]
    assert Manifest.read(output) == written
    assert written.files["x.bin"].sha256 == hashlib.sha256(b"abc").hexdigest()
    assert list(written.files) == ["x.bin"]


def test_leaving_without_commit_keeps_the_work(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Artifact(output, {"a": 1}, overwrite=False) as artifact:
        (artifact.path / "half").write_text("x")
    assert not output.exists()
    with Artifact(output, {"a": 1}, overwrite=False) as again:
        assert again.resumed
        assert (again.path / "half").exists()


def test_a_fault_before_any_work_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyError), Artifact(output, {"data": "typo"}, overwrite=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    half = tmp_path / "out.partial" / "half"
    with pytest.raises(ZeroDivisionError), Artifact(output, {"data": "text"}, overwrite=False):
        1 / half.write_text("")
    with Artifact(output, {"data": "text"}, overwrite=False) as again:
        assert again.resumed


def test_a_fault_after_the_commit_is_told(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), Artifact(output, {}, overwrite=False) as artifact:
        1 / len(artifact.commit(manifest(), {}).files)
    assert (output / "manifest.json").exists()


def test_other_work_is_refused_with_the_difference(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Artifact(output, {"prune": {"seed": 1}}, overwrite=False):
        pass
    with (
        pytest.raises(UsageError, match=r"prune\.seed was 1, now 2"),
        Artifact(output, {"prune": {"seed": 2}}, overwrite=False),
    ):
        pass
    with Artifact(output, {"prune": {"seed": 2}}, overwrite=True) as artifact:
        assert not artifact.resumed


def test_a_torn_identity_counts_as_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "identity.json").write_text("{")
    with Artifact(output, {}, overwrite=False) as artifact:
        assert not artifact.resumed


def test_existing_outputs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with Artifact(output, {}, overwrite=False) as artifact:  # an empty directory is no obstacle
        artifact.commit(manifest(), {})
    with pytest.raises(UsageError, match="already exists"), Artifact(output, {}, overwrite=False):
        pass
    (output / "old").write_text("x")
    with Artifact(output, {}, overwrite=True) as artifact:
        artifact.commit(manifest(), {})
    assert not (output / "old").exists()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_text("x")
    with (
        pytest.raises(UsageError, match="not written by secateur"),
        Artifact(foreign, {}, overwrite=True),
    ):
        pass
    assert (foreign / "cat.jpg").exists()


def test_two_writers_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        Artifact(output, {}, overwrite=False),
        pytest.raises(UsageError, match="another process"),
        Artifact(output, {}, overwrite=False),
    ):
        pass


def test_manifests_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "baked"}')
    with pytest.raises(ModelError, match="not a valid manifest"):
        Manifest.read(tmp_path)
