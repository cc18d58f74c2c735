# SPDX-License-Identifier: Apache-2.0
"""Compiles ``cpu/*.cpp`` against torch's headers. Standard library only: the wheel's build runs it.

One library serves every Python and every torch from 2.11 on: it includes no Python.h, and of torch
the stable ABI alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
TORCH_TARGET_VERSION = 0x020B000000000000
"""2.11 in torch's counting: the oldest one that the library may meet."""
_INSTRUCTION_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": ("-march=x86-64",),
        "avx2": ("-march=x86-64-v3",),
        # For random bits and conversions; floats stay in 256 bits, see cpu/simd.h.
        "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=256"),
    },
}
"""Per architecture: names of instruction sets in the sources, and the compiler's flags for them.
Elsewhere the compiler's own default serves: NEON on aarch64."""
_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT_S = 1800.0


class CannotBuildError(RuntimeError):
    """No compiler, no headers, or the compiler has refused; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """Where an installed torch has what is compiled and linked against."""

    include: Path
    lib: Path


def digest() -> str:
    """Of all sources: it stands in a library's name and inside it."""
    found = hashlib.sha256()
    for path in (*sorted(SOURCES.iterdir()), Path(__file__)):
        if path.suffix in {".cpp", ".h", ".py"}:
            found.update(path.name.encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def library_name() -> str:
    """Of the library that these sources make on this machine."""
    return f"kernels-{platform.machine().lower()}-{digest()}.so"


def torch_at(folder: Path) -> Torch | None:
    """What a folder of installed packages has of torch."""
    found = Torch(include=folder / "torch" / "include", lib=folder / "torch" / "lib")
    has_headers = (found.include / "torch/csrc/stable/library.h").is_file()
    return found if has_headers and list(found.lib.glob("libtorch_cpu.*")) else None


def build(torch: Torch, folder: Path) -> Path:
    """Compile the library into a folder, where libraries of other sources go.

    Raises:
        CannotBuildError: nothing in the folder has changed then.
    """
    compiler = _compiler()
    target = folder / library_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kernels-", dir=folder) as work:
            made = _compile(compiler, torch, Path(work))
            made.replace(target)  # at once: others may be loading
    except OSError as error:
        raise CannotBuildError(
            f"the kernels must be written to {folder}; that failed: {error}. Name a folder that "
            "can be written, or change its owner."
        ) from error
    for old in folder.glob("kernels-*.so"):
        if old != target:
            old.unlink()
    return target


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if shutil.which(name):
            return name
    raise CannotBuildError(
        f"a C++ compiler must be on the path; there is no {wanted or 'g++ and no clang++'}. "
        "Install g++ (apt-get install g++), or name one by CXX."
    )


def _compile(compiler: str, torch: Torch, work: Path) -> Path:
    objects = list(_objects(torch, work))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda one: _call([compiler, *one[0], "-o", str(one[1])]), objects))
    made = work / "library.so"
    linked = [str(path) for _, path in objects]
    # torch is only named: whoever loads the library has loaded that, wherever it is installed.
    _call([compiler, "-shared", "-o", str(made), *linked, f"-L{torch.lib}", "-ltorch_cpu"])
    return made


def _objects(torch: Torch, work: Path) -> Iterator[tuple[Sequence[str], Path]]:
    """Arguments of each compilation, and what it makes."""
    # Contracted sums of products would differ from those of torch's operators.
    exact = (*_COMMON, "-O3", "-ffp-contract=off")
    stable = (
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#x}",
        f"-DFLORA_SOURCE={digest()}",
        "-isystem",
        str(torch.include),
    )
    for name in ("library", "gradients", "records"):
        yield (*exact, *stable, "-c", str(SOURCES / f"{name}.cpp")), work / f"{name}.o"
    yield (*exact, "-c", str(SOURCES / "settle.cpp")), work / "settle.o"
    sets = _INSTRUCTION_SETS.get(platform.machine().lower(), {"baseline": ()})
    for name, own in sets.items():
        flags = (*_COMMON, "-O3", "-Wno-psabi", f"-DFLORA_ISA={name}", *own)
        yield (*flags, "-c", str(SOURCES / "isa.cpp")), work / f"{name}.o"


def _call(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuildError(f"the compiler did not finish: {error}") from error
    if done.returncode != 0:
        raise CannotBuildError(
            f"the compiler has refused with exit code {done.returncode}: {' '.join(command)}\n"
            f"{done.stderr.strip()}"
        )
