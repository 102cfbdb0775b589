"""Time and memory from a raw head to its age, each run in a process of its own.

    python benchmarks/brain_speed.py            # about 3 minutes on 2 quiet cores

The heads are a full-resolution scan of another scanner and one of IXI at 2 mm. Nothing comes from
a cache. Writes `results/brain_speed.csv`, one row a run: seconds of the imports, of loading the
model, of each step, and of all but the imports; processor seconds; peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import write_rows

HEADS = ("t1w_misc/IXI533-Guys-1066-T1_fullres.nii.gz", "ixi_hh/heads_2mm")


def one(path: Path) -> dict[str, Any]:
    """A run in this process, which has imported nothing yet."""
    start = time.perf_counter()
    import ants  # noqa: F401
    import deepbet  # noqa: F401
    import monai  # noqa: F401

    from neuro.age.predict import BrainAge
    from neuro.scans.batch import prepare_scan

    imported = time.perf_counter()
    brain = BrainAge.load()
    loaded = time.perf_counter()
    prepared, _ = prepare_scan(path)
    ready = time.perf_counter()
    estimate = brain.estimate(brain.look(prepared))
    end = time.perf_counter()
    steps = {step["step"].replace(" ", "_"): step["seconds"] for step in prepared.record["steps"]}
    return {
        "scan": path.name,
        "imports_s": round(imported - start, 2),
        "model_s": round(loaded - imported, 2),
        **{f"{name}_s": round(seconds, 2) for name, seconds in steps.items()},
        "age_s": round(end - ready, 2),
        "after_imports_s": round(end - imported, 2),
        "cpu_s": round(time.process_time(), 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "age": round(estimate.age, 2),
        "low": round(estimate.low, 2),
        "high": round(estimate.high, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    data = Path(os.environ.get("ENN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    heads = [data / head for head in HEADS]
    heads = [sorted(head.iterdir())[0] if head.is_dir() else head for head in heads]
    rows = []
    for _ in range(options.repeats):
        for head in heads:
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(head)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    print(write_rows("brain_speed", rows))


if __name__ == "__main__":
    main()
