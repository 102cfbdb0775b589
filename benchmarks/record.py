"""Where a benchmark's numbers come from, and the CSV files that keep them."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str]:
    """Command, commit (`+` if the tree has uncommitted changes), machine, load, versions, date."""
    import torch

    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows, each with its provenance, to `results/NAME.csv`, replacing the file."""
    origin = provenance()
    rows = [{**row, **origin} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
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
