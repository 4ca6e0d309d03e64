"""The ``secateur`` command: thin functions that render what the Python API returns.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported before a command
runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from secateur.errors import EXIT_INTERRUPTED, GateFailed, SecateurError, UsageError

app = typer.Typer(
    name="secateur",
    help="Prune an LLM, pack what is left, serve it, and measure whether it was worth it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure a model against its dense twin.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        import secateur

        print(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command."""


def emit(result: Any) -> None:
    """Print a result as JSON on stdout."""
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False)
    print()


def _fail(fault: SecateurError) -> NoReturn:
    if "--json" in sys.argv:
        said = {"message": fault.what, "fix": fault.fix, "exit_code": fault.exit_code}
        emit((fault.result if isinstance(fault, GateFailed) else {}) | {"error": said})
    print(f"error: {fault}", file=sys.stderr)
    raise SystemExit(fault.exit_code)


def main() -> None:
    """Run the command line; every expected error becomes a sentence and an exit code."""
    # torch's OpenMP threads wait for each other by spinning, for milliseconds; where a core is
    # shared with anybody else they then take turns and run ten times slower. Spin for
    # microseconds, then sleep: as quick on idle cores. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        app()
    except SecateurError as fault:
        if "--debug" in sys.argv:
            raise
        _fail(fault)
    except SystemExit as end:  # typer turns Ctrl-C into this, without a word
        if end.code == EXIT_INTERRUPTED:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        raise SystemExit(0) from None


def parse_pattern_rules(rules: list[str]) -> list[dict[str, str]]:
    """Read repeated ``--layer 'GLOB=PATTERN'`` options into recipe form."""
    parsed = []
    for rule in rules:
        match, equals, pattern = rule.rpartition("=")
        if not equals:
            raise UsageError(
                f"--layer {rule!r} is not of the form GLOB=PATTERN",
                "e.g. --layer '*.down_proj=dense'",
            )
        parsed.append({"match": match, "pattern": pattern})
    return parsed


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """Read repeated ``--set STEP.KEY=VALUE`` options."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise UsageError(
                f"--set {pair!r} is not of the form STEP.KEY=VALUE", "e.g. --set dsnot.cycles=50"
            )
        settings[key] = value
    return settings


# Each module adds its commands to `app`; the order here is the order in --help.
# isort: off
from secateur.cli import prune_command, heal_command, compile_command  # noqa: E402, F401
from secateur.cli import serve_command, chat_command  # noqa: E402, F401
from secateur.cli import bench_command, methods_bench_command, run_command  # noqa: E402, F401
from secateur.cli import kernels_bench_command, packing_bench_command  # noqa: E402, F401
from secateur.cli import serving_bench_command, rivals_bench_command  # noqa: E402, F401
from secateur.cli import ceiling_command, report_command, tune_command  # noqa: E402, F401
from secateur.cli import inspect_command, layer_command  # noqa: E402, F401
