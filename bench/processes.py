"""Commands in processes of their own: what they print, how they fail, how much memory they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.errors import EnvironmentFault, ModelError, SecateurError, UsageError

# On Linux a process starts with the peak memory of the one that forked it, and so does its own
# peak; ours may have held two models. So a small process stands between: it starts the command,
# and prints how it ended and its peak as a last line. Ctrl-C reaches the command by itself.
_LAUNCHER = """
import os, signal, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: os.kill(process.pid, signal.SIGTERM))
_, status, usage = os.wait4(process.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(f"\\n{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss * unit}")
"""


def run_process(
    command: Sequence[str], variables: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Run a command, with further environment variables; what it printed, and its peak memory.

    Raises:
        SecateurError: it failed; with its own sentence if it printed one as JSON.
    """
    # As the secateur command does for itself: one rule for all that is compared.
    environment = {"GOMP_SPINCOUNT": "5000", **os.environ, **(variables or {})}
    with subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as launcher:
        try:
            stdout, stderr = launcher.communicate()
        except BaseException:
            launcher.terminate()  # passed on to the command
            launcher.wait()
            raise
    printed, _, report = stdout.rstrip("\n").rpartition("\n")
    code, peak = map(int, report.split())
    if code != 0:
        raise _fault(code, printed, stderr)
    return printed, peak


def run_secateur(arguments: Sequence[str]) -> tuple[Any, int]:
    """Run ``secateur …`` for its JSON."""
    command = [sys.executable, "-m", "secateur", *arguments, "--quiet", "--json"]
    printed, peak = run_process(command)
    return json.loads(printed), peak


def _fault(code: int, stdout: str, stderr: str) -> SecateurError:
    try:
        said = json.loads(stdout)["error"]
    except (ValueError, LookupError, TypeError):
        if code < 0:
            return SecateurError(
                f"the process was ended by signal {-code}",
                "if the machine ran out of memory, use fewer --samples or a smaller --length",
            )
        last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        return SecateurError(f"the process ended with exit code {code}: {last}")
    kinds = {kind.exit_code: kind for kind in (UsageError, ModelError, EnvironmentFault)}
    return kinds.get(code, SecateurError)(said["message"], said["fix"])
