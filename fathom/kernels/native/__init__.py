"""Our own C++ for decoding on a CPU, compiled when it is first wanted; everything works without it.

`rows.hpp` has the products of a few rows, `attention.hpp` and `experts.hpp` what is made of them,
`block.hpp` the model's blocks, `fathom.cpp` what is called from here. It has no dependency, so that
compiling takes seconds and is needed once: the library is kept in the user's cache, named by a hash
of the text, the compiler's flags and the processor. Where no C++ compiler is found, or
`FATHOM_NATIVE=0` is set, `library()` is None and callers use torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

_SOURCES = sorted(Path(__file__).parent.glob("*.?pp"))
# Not -ffast-math: a library linked with it makes the whole process flush small numbers to zero.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-shared",
    "-fPIC",
)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if os.environ.get("FATHOM_NATIVE") == "0" or compiler is None:
        return None
    for threads in (["-fopenmp"], []):  # Apple's clang comes without OpenMP: one thread, then
        try:
            return ctypes.CDLL(str(_built(compiler, [*_FLAGS, *threads])))
        except (OSError, subprocess.SubprocessError) as problem:
            said = getattr(problem, "stderr", None) or problem
    warnings.warn(f"fathom's C++ could not be compiled, going on without it: {said}", stacklevel=2)
    return None


def _built(compiler: str, flags: list[str]) -> Path:
    """The library for this text, these flags and this processor; compiled if it is not there."""
    texts = [path.read_text(encoding="utf-8") for path in _SOURCES]
    wanted = [*texts, *flags, compiler, _processor()]
    name = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:20]
    folder = _cache_folder()
    found = folder / f"fathom-{name}.so"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "fathom.so"
            source = str(Path(__file__).with_name("fathom.cpp"))
            command = [compiler, *flags, source, "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.replace(found)
    return found


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fathom"


def _processor() -> str:
    """What -march=native depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    except OSError:
        return platform.processor() + platform.machine()
