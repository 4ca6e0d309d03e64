"""The command line as its user meets it: help at once, one-sentence errors, exit codes, JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from secateur.cli import app
from secateur.errors import ModelError

Command = Callable[..., Any]
COMMANDS = ("prune", "compile", "serve", "bench", "run", "inspect", "doctor", "methods", "formats")


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['secateur', '--help']\n"
        "try:\n    from secateur.cli import main; main()\n"
        "finally:\n    print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') "
        "if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
    )
    assert ran.stdout.rstrip().endswith("[]")
    for name in COMMANDS:
        assert f"  {name} " in ran.stdout


def test_every_command_explains_itself() -> None:
    command = typer.main.get_command(app)
    for name, sub in [*command.commands.items(), *command.commands["bench"].commands.items()]:
        assert sub.help, name
        for parameter in sub.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_version(secateur_command: Command) -> None:
    assert secateur_command("--version").stdout == "secateur 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prnue"], 2, "prune"),
        (["prune", "MODEL", "-o", "out", "--patern", "2:4"], 2, "--pattern"),
        (["prune", "MODEL", "-o", "out", "--pattern", "4:2"], 2, "N of N:M is the number kept"),
        (["prune", "MODEL", "-o", "out", "--method", "wnada"], 2, "did you mean 'wanda'"),
        (["prune", "MODEL", "-o", "out", "--compat", "old"], 2, "compat = 'old'"),
        (["prune", "MODEL", "-o", "out", "--layer", "down_proj"], 2, "GLOB=PATTERN"),
        (["prune", "MODEL", "-o", "out", "--layer", "*.down=2:4"], 2, "matches no linear layer"),
        (["prune", "MODEL", "-o", "out", "--samples", "0"], 2, "samples = 0"),
        (["prune", "MODEL", "-o", "MODEL"], 2, "already exists"),
        (["prune", "MODEL", "-o", "MODEL", "--overwrite"], 2, "not written by secateur"),
        (["prune", "MODEL", "-o", "out", "--pattern", "3:5", "--strict"], 2, "cannot be 3:5"),
        (["prune", "nowhere", "-o", "out"], 3, "no model at nowhere"),
        (["prune", "MODEL", "-o", "out", "--data", "none.txt"], 3, "none.txt cannot be read"),
        (["prune", "TRUNCATED", "-o", "out"], 3, "is truncated"),
        (["prune", "FOREIGN", "-o", "out"], 3, "'mamba' is not supported (supported: bloom"),
        (["inspect", "nowhere"], 3, "no model directory"),
        (["compile", "MODEL", "-o", "out"], 3, "has no pruned layer to pack"),
        (["run", "none.yaml"], 2, "cannot be read"),
        (["serve", "nowhere"], 3, "no model directory"),
        (["bench", "accuracy", "nowhere"], 3, "no model directory"),
    ],
)
def test_bad_input_gets_a_sentence_a_fix_and_its_code(
    arguments: list[str],
    code: int,
    says: str,
    tiny: Path,
    tmp_path: Path,
    secateur_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "MODEL")
    shutil.copytree(tiny, tmp_path / "TRUNCATED")
    weights = tmp_path / "TRUNCATED" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(tiny, tmp_path / "FOREIGN")
    config = tmp_path / "FOREIGN" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    ran = secateur_command(*arguments)
    assert ran.returncode == code, ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_errors_are_json_where_json_is_asked_for(secateur_command: Command) -> None:
    ran = secateur_command("inspect", "nowhere", "--json")
    assert ran.returncode == 3
    error = json.loads(ran.stdout)["error"]
    assert error["exit_code"] == 3
    assert "no model directory" in error["message"]
    assert error["fix"]


def test_debug_shows_the_traceback(secateur_command: Command) -> None:
    with pytest.raises(ModelError):
        secateur_command("--debug", "inspect", "nowhere")


def test_the_console_script_and_the_module_are_the_command() -> None:
    script = Path(sys.executable).with_name("secateur")
    for command in ([str(script)], [sys.executable, "-m", "secateur"]):
        ran = subprocess.run([*command, "inspect", "nowhere"], capture_output=True, text=True)
        assert ran.returncode == 3
        assert ran.stderr.startswith("error: there is no model directory at nowhere")


def test_prune_prints_its_plan_and_its_result(
    tiny: Path, text_file: Path, tmp_path: Path, secateur_command: Command
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", tiny, "-o", out, "--data", text_file, "--samples", 4, "--length", 32]
    plan = secateur_command(*arguments, "--dry-run", "--layer", "*.down_proj=dense")
    assert "12 of 14 linear layers" in plan.stdout
    assert "the recipe says so" in plan.stdout
    assert not out.exists()
    as_json = json.loads(secateur_command(*arguments, "--dry-run", "--json").stdout)
    assert len(as_json["layers"]) == 14
    done = secateur_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "50.00 %" in done.stdout
    assert "pruning blocks: 2/2" in done.stderr
    again = json.loads(secateur_command(*arguments, "--overwrite", "--json", "-q").stdout)
    assert again["manifest"]["layers"]["model.layers.0.mlp.up_proj"]["sparsity"] == 0.5


def test_interrupted_prune_exits_130_and_goes_on(
    text_file: Path, tmp_path: Path, make_model: Callable[..., Path], secateur_command: Command
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=24)
    out = tmp_path / "out"
    arguments = ["prune", model, "-o", out, "--data", text_file, "--samples", 8, "--length", 64]
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "out.partial" / "facts-00002.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "resumed at block" in secateur_command(*arguments).stdout


def test_lists(secateur_command: Command) -> None:
    listed = secateur_command("methods").stdout
    assert "magnitude" in listed
    assert "wanda" in listed
    names = [method["name"] for method in json.loads(secateur_command("methods", "--json").stdout)]
    assert {"magnitude", "wanda"} <= set(names)
    assert "packed" in secateur_command("formats").stdout
    assert "packed" in secateur_command("formats", "--json").stdout


def test_doctor_gives_reasons(secateur_command: Command) -> None:
    facts = json.loads(secateur_command("doctor", "--json").stdout)
    assert facts["kernels"].startswith("native module built")
    assert facts["torch op"] == "C++"
    assert "none" in facts["gpu"] or "sm_" in facts["gpu"]
    assert facts["torch"] in secateur_command("doctor").stdout


def test_inspect_shows_every_kind_of_directory(
    tiny: Path, text_file: Path, tmp_path: Path, secateur_command: Command
) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    secateur_command("prune", tiny, "-o", pruned, "--data", text_file, "--samples", 2)
    secateur_command("compile", pruned, "-o", packed, "--values", "bf16")
    assert "dense llama" in secateur_command("inspect", tiny).stdout
    shown = json.loads(secateur_command("inspect", pruned, "--json").stdout)
    assert shown["kind"] == "pruned"
    assert shown["layers"]["model.layers.1.mlp.down_proj"]["zeros"] == 0.5
    shown = json.loads(secateur_command("inspect", packed, "--json").stdout)
    layer = shown["layers"]["model.layers.1.mlp.down_proj"]
    assert layer["bytes"] / layer["dense_bytes"] == 0.5625
    table = secateur_command("inspect", packed, "--layers").stdout
    assert "model.layers.0.self_attn.q_proj" in table
    assert "0.562" in table or "0.563" in table
