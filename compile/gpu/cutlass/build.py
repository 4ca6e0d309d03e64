"""Compiling the sparse GEMMs with nvcc: one shared library for each architecture.

A library is found by its name and says itself from which sources, compiler and flags it was made
(`build_key`), so that an old one is noticed. It is linked aside and renamed: never half there.
Each kernel's object file is kept until then, so that an interrupted build goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from secateur.checkpoint import sync_file
from secateur.compile.gpu.cutlass.kernels import (
    ARCHITECTURES,
    Kernel,
    cutlass_path,
    cutlass_version,
    kernels_of,
)
from secateur.compile.gpu.cutlass.library import SparseGemmLibrary, library_path
from secateur.compile.gpu.cutlass.source import HEADERS, kernel_source, registry_source
from secateur.errors import EnvironmentFault, SecateurError, UsageError
from secateur.progress import Tick, no_tick

_SLOW = "Potential Performance Loss"
MEMORY_PER_JOB = 5 << 30
"""Bytes to have for each nvcc: 4.3 GiB were seen with a kernel of sm_90a."""
_FLAGS = (
    "-std=c++17",
    "-O1",  # of the host code; device code is always -O3
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC",
    "-cudart=static",
)


@dataclass(frozen=True, slots=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        path: of nvcc.
        version: as it says, e.g. ``13.0.88``.
    """

    path: Path
    version: str


def find_nvcc(oldest: tuple[int, int] = (12, 4)) -> Nvcc:
    """The nvcc of ``$CUDA_HOME``, or else of ``$PATH``, or else of ``/usr/local/cuda``.

    Raises:
        EnvironmentFault: there is none, it does not run, or it is too old.
    """
    home, least = os.environ.get("CUDA_HOME"), ".".join(map(str, oldest))
    places = [Path(home) / "bin"] if home else [None, Path("/usr/local/cuda/bin")]
    found = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if found is None:
        where = f"in $CUDA_HOME ({home})" if home else "on the PATH or in /usr/local/cuda"
        raise EnvironmentFault(
            f"there is no nvcc {where}",
            f"install the CUDA toolkit {least} or newer (no driver is needed), or set CUDA_HOME",
        )
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as fault:
        raise EnvironmentFault(f"{found} does not run: {fault}", "repair it") from fault
    form = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said.stdout)
    if form is None or (int(form[1]), int(form[2])) < oldest:
        version = form[0] if form else said.stdout.strip().splitlines()[-1:]
        raise EnvironmentFault(
            f"{found} is {version}, and these sparse GEMMs of CUTLASS need {least}",
            "install a newer CUDA toolkit, or set CUDA_HOME to one",
        )
    return Nvcc(Path(found), form[0].removeprefix("V"))


@dataclass(frozen=True, slots=True)
class Built:
    """A library that is there.

    Attributes:
        path: of it.
        kernels: how many it has.
        fresh: whether it was compiled now; False: it was there and up to date.
        warnings: what the compiler said about slow code.
    """

    path: Path
    kernels: int
    fresh: bool
    warnings: tuple[str, ...] = ()


def build_library(
    arch: str,
    directory: str | Path | None = None,
    only: Sequence[Kernel] | None = None,
    jobs: int | None = None,
    progress: Tick = no_tick,
) -> Built:
    """Compile the sparse GEMMs of an architecture, unless an up-to-date library is there.

    Args:
        arch: a key of `kernels.ARCHITECTURES`.
        directory: where to put it; None: the cache, where `library_path` looks.
        only: these kernels; None: all of `kernels.kernels_of`.
        jobs: compilers at once; None: one a core, if half of the memory is enough.
        progress: is told of each kernel compiled.

    Raises:
        UsageError: the architecture is not known, or another process builds the same.
        EnvironmentFault: no nvcc, no CUTLASS, or a compilation failed.
    """
    chosen = kernels_of(arch) if only is None else list(only)
    nvcc = find_nvcc(ARCHITECTURES[arch].nvcc)
    sources = {kernel.name: kernel_source(kernel) for kernel in chosen}
    versions = f"CUTLASS {cutlass_version()}, nvcc {nvcc.version}"
    key = build_key(sources, versions, arch)
    path = library_path(arch, directory)
    if _is(path, key):
        return Built(path, len(chosen), fresh=False)
    work = path.with_name(f"{path.name}.{key[:12]}.partial")
    work.mkdir(parents=True, exist_ok=True)
    sources["registry"] = registry_source(chosen, key, versions)
    compiler = _Compiler(nvcc.path, ARCHITECTURES[arch].codes, work)
    with _alone(work):
        objects = compiler.all(sources, jobs or _jobs(), progress)
        linked = work / path.name
        compiler.call("-shared", *map(str, objects), "-o", str(linked))
        sync_file(linked)
        os.replace(linked, path)
        shutil.rmtree(work)
    return Built(path, len(chosen), fresh=True, warnings=tuple(compiler.warnings))


def build_key(sources: dict[str, str], versions: str, arch: str) -> str:
    """A hash of everything that decides what a library holds."""
    digest = hashlib.sha256()
    headers = {file.name: file.read_text() for file in sorted(HEADERS.glob("*.*h"))}
    for name, text in (headers | sources).items():
        digest.update(f"{name}\0{text}\0".encode())
    digest.update(" ".join((versions, ARCHITECTURES[arch].codes, *_FLAGS)).encode())
    return digest.hexdigest()


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{work} is being written by another process",
                "wait for that process, or give another output directory",
            ) from None
        yield


def _is(path: Path, key: str) -> bool:
    try:
        return path.exists() and SparseGemmLibrary(path).build_key == key
    except SecateurError:  # of another version, or damaged: to be replaced
        return False


def _jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = memory // 2 // MEMORY_PER_JOB
    return int(max(1, min(len(os.sched_getaffinity(0)), fitting)))


@dataclass(frozen=True, slots=True)
class _Compiler:
    nvcc: Path
    codes: str
    work: Path
    warnings: list[str] = field(default_factory=list)

    def all(self, sources: dict[str, str], jobs: int, progress: Tick) -> list[Path]:
        """The object files of sources by name; those that are there already are taken."""
        with ThreadPoolExecutor(jobs) as pool:
            running = [pool.submit(self.one, name, text) for name, text in sources.items()]
            try:
                for done, future in enumerate(as_completed(running)):
                    future.result()
                    progress(done + 1, len(running))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [future.result() for future in running]

    def one(self, name: str, text: str) -> Path:
        target = self.work / f"{name}.o"
        if target.exists():
            return target
        source, aside = self.work / f"{name}.cu", self.work / f"{name}.part.o"
        source.write_text(text)
        includes = f"-I{HEADERS}", f"-I{cutlass_path() / 'include'}"
        self.call("-c", *includes, str(source), "-o", str(aside))
        os.replace(aside, target)
        return target

    def call(self, *arguments: str) -> None:
        command = [str(self.nvcc), *_FLAGS, "-gencode", self.codes, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True)
        self.warnings.extend(line for line in ran.stderr.splitlines() if _SLOW in line)
        if ran.returncode:
            said = [line for line in ran.stderr.splitlines() if "error" in line] or [ran.stderr]
            raise EnvironmentFault(
                f"nvcc failed with status {ran.returncode}: {said[0].strip()[:500]}",
                f"if it makes no sense, report it; the command was: {' '.join(command)}",
            )
