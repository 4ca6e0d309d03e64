"""The walls between the stages: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "prune": {"prune"},
    "compile": {"compile"},
    "serve": {"serve", "compile"},
    "bench": {"bench", "serve"},
    "shared": set(),
    "cli": {"prune", "compile", "serve", "bench"},
}


def imports_of(file: Path) -> set[str]:
    """The stages that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "secateur" and len(parts) > 1 and parts[1] in ALLOWED:
                found.add(parts[1])
    return found - {"cli", "shared"}


def test_stages_import_only_what_they_may() -> None:
    files = {
        **{stage: list((ROOT / stage).rglob("*.py")) for stage in list(ALLOWED)[:4]},
        "shared": list((ROOT / "src/secateur").glob("*.py")),
        "cli": list((ROOT / "src/secateur/cli").glob("*.py")),
    }
    for room, members in files.items():
        assert members, f"no files in {room}"
        for file in members:
            extra = imports_of(file) - ALLOWED[room]
            assert not extra, f"{file.relative_to(ROOT)} imports {', '.join(sorted(extra))}"
