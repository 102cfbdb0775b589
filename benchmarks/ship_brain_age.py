"""Make a trained model the one that comes with the package.

    enn brain train $ENN_DATA/ixi_hh/brains_mni_2mm --input mni --out runs/brain_final
    python benchmarks/ship_brain_age.py runs/brain_final/model.safetensors

Adds what the file lacks of the statistics of its training scans (a minute and a half), and where
they come from; the weights stay as they are, bit by bit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from ixi import find_ixi

from neuro.age.model import BrainAgeModel
from neuro.age.predict import BrainAge
from neuro.dataset import BrainDataset
from neuro.train import describe_scans_

SHIPPED = Path(__file__).parents[1] / "neuro" / "weights" / "brain-age-ixi.safetensors"
ABOUT = {
    "name": "brain-age-ixi",
    "version": "1.0.0",
    "data": "IXI (brain-development.org), Hammersmith Hospital, Philips 3 T: T1-weighted scans of "
    "151 healthy adults aged 20 to 82",
    "data_licence": "CC BY-SA 3.0",
    "use": "Research use only, not a medical device",
}
MAX_BYTES = 25 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = BrainAgeModel.load(args.model)
    if model.reference is None or model.population is None:
        data = BrainDataset.read(find_ixi() / "brains_mni_2mm")
        if len(data) != model.about.get("subjects"):
            sys.exit(
                f"the model was trained on {model.about.get('subjects')} scans, not on these "
                f"{len(data)}"
            )
        describe_scans_(model, data, lambda line: print(line, flush=True))
    model.about = {**model.about, **ABOUT}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model.save_beside(args.model, args.out)
    args.out.chmod(0o644)
    size = args.out.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"{args.out} has {size:,} bytes; the package takes at most {MAX_BYTES:,}")
    brain = BrainAge.load(args.out)
    print(f"{args.out}: {size:,} bytes, weights {brain.sha256}, ages {brain.trained_ages}")


if __name__ == "__main__":
    main()
