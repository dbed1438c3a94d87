"""The C++ tools that DeepSpeed needs on machines without a GPU, checked before it needs them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from data_pipeline.errors import EnvironmentFault


def check_toolchain() -> str:
    """Check compiler and ninja, and set what the build of DeepSpeed's CPU operator reads.   -> the compiler's path

    Raises EnvironmentFault with the remedy.
    """
    bin_dir = str(Path(sys.executable).parent)
    if bin_dir not in os.environ.get("PATH", "").split(os.pathsep):
        # `.venv/bin/rddm` without an activated environment: ninja lies beside the interpreter.
        os.environ["PATH"] = bin_dir + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.access(sys.prefix, os.W_OK):
        # A build belongs to its environment: in torch's one cache per user, two environments rebuild each other's.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    name = os.environ.get("CXX", "c++")
    compiler = shutil.which(name)
    if compiler is None:
        raise EnvironmentFault(
            f"no C++ compiler: {name!r} is not on PATH, and DeepSpeed compiles an operator on CPU machines; "
            "install one (Debian: apt-get install g++) or point CXX to it"
        )
    if shutil.which("ninja") is None:
        raise EnvironmentFault("no ninja on PATH, which DeepSpeed's operator build needs; pip install ninja")
    return compiler
