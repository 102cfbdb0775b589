"""Where a number comes from: command, commit, machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["provenance"]


def provenance() -> dict[str, str]:
    """Command, commit (`+` if the tree has uncommitted changes), machine, load, versions, date."""
    import torch

    program = Path(sys.argv[0])
    called = ["enn"] if program.stem == "enn" else ["python", os.path.relpath(program)]
    return {
        "command": shlex.join([*called, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    features = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    return " ".join([*model[:1], *features])
