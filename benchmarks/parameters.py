"""Parameters of the published networks: plain, as eigen layers, and fused again.

    python benchmarks/parameters.py        # about 2 CPU minutes, most of them decompositions

The paper gives 44.61, 60.22 and 86.97 million for its ResNet-101, ResNet-152 and ViT-B/16. Stored
are more, fused as many as in the plain network. Writes `results/core/parameters.csv`.
"""

from __future__ import annotations

import argparse
from typing import Any

from record import write_rows

from enn_core import conversion_report, fuse, to_enn
from enn_core.lab.classify.networks import build_network

NETWORKS = ("resnet50", "resnet101", "resnet152", "vit-b16")


def count(arch: str) -> dict[str, Any]:
    plain = build_network(arch, (3, 224, 224), 1000)
    row: dict[str, Any] = {"network": arch, "plain": sum(p.numel() for p in plain.parameters())}
    eigen = to_enn(plain, inplace=True)
    row["stored"] = conversion_report(eigen).parameters_stored
    row["trainable"] = sum(p.numel() for p in eigen.parameters() if p.requires_grad)
    row["fused"] = sum(p.numel() for p in fuse(eigen).parameters())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    rows = []
    for arch in options.networks:
        rows.append(count(arch))
        print(rows[-1], flush=True)
    print(write_rows("core/parameters", rows))


if __name__ == "__main__":
    main()
