"""A trained model as a MONAI bundle: metadata, an inference configuration, weights and licences.

The bundle runs where this package is installed, from raw heads to a table of ages:

>>> from monai.bundle import run                                      # doctest: +SKIP
>>> run(config_file="bundle/configs/inference.json",                  # doctest: +SKIP
...     meta_file="bundle/configs/metadata.json", bundle_root="bundle", dataset_dir="scans")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enn_core.convert import fuse
from enn_core.files.atomic import replacing
from enn_core.files.tables import write_table
from enn_core.files.tensors import write_state
from neuro.age.model import BrainAgeModel, ModelError
from neuro.age.networks import build
from neuro.age.targets import AgeBins, AgeValue, make_target, target_settings
from neuro.scans.find import find_scans
from neuro.scans.grid import GRID, as_input, crop
from neuro.scans.quality import judge
from neuro.scans.read import VolumeError

__all__ = ["AgeTable", "BrainAgeNetwork", "PrepareBrain", "list_scans", "write_bundle"]

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_NO_DIAGNOSIS = "Research use only. Not a medical device, not for diagnosis or treatment."
_LICENSE = """The software, the configuration files and the weights of this bundle are licensed
under the Apache License, Version 2.0 (the "License"); you may not use them except in compliance
with the License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, they are distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
specific language governing permissions and limitations under the License.
"""


class BrainAgeNetwork(nn.Module):
    """All networks of a model as one module: brains -> ages.

    Args:
        members: of each network, `network` (arguments of `neuro.age.networks.build`) and `target`
            (settings of `neuro.age.targets.make_target`).
        answer: "mean" of all heads, or the "last" head.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]], answer: str = "mean") -> None:
        super().__init__()
        self.nets = nn.ModuleList(build(**member["network"]) for member in members)
        self.targets = [make_target(dict(member["target"])) for member in members]
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, i, j, k), 1 at a brain's 99th percentile -> (n, 1) years."""
        ages = []
        for net, target in zip(self.nets, self.targets, strict=True):
            for side in (x, x.flip(2)):
                said = torch.stack([target.ages(head) for head in net(side)], dim=1)
                ages.append(said[:, -1] if self.answer == "last" else said.mean(1))
        return torch.stack(ages).mean(0)[:, None]


class PrepareBrain:
    """MONAI transform of {"image": file}: the file as the networks' input.

    Args:
        kind: what the files show: "head", "brain" or "mni".
    """

    def __init__(self, kind: str = "head") -> None:
        from neuro.scans.preprocess import Preprocessor, check_kind

        self.kind = check_kind(kind)
        self.prepare = Preprocessor()

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Adds `file`, `flags`, `error`; `image` is (1, 80, 96, 80) float32, 0 if it failed."""
        from neuro.scans.batch import prepare_scan

        image, odd, error = np.zeros((1, *GRID), np.float32), "", ""
        try:
            prepared, _ = prepare_scan(item["image"], self.kind, preprocessor=self.prepare)
            image = as_input(crop(prepared.image)[None])[0]
            flags = judge(prepared.quality, image=prepared.image)
            odd = "; ".join(f"{flag.name}: {flag.text}" for flag in flags)
            error = next((flag.text for flag in flags if flag.fatal), "")
        except VolumeError as failure:
            error = str(failure)
        return {
            **item,
            "file": str(item["image"]),
            "image": torch.from_numpy(image),
            "flags": odd,
            "error": error,
        }


class AgeTable:
    """Predicts the ages of a data set and writes them: the bundle's evaluator.

    Args:
        network: a `BrainAgeNetwork`.
        dataset: of `PrepareBrain`'s items.
        inferer: a MONAI inferer.
        device: where to compute.
        path: CSV file to write, with file, predicted_age, flags and error.
    """

    def __init__(
        self, network: nn.Module, dataset: Iterable[Any], inferer: Any, device: Any, path: str
    ) -> None:
        self.network, self.dataset, self.inferer = network, dataset, inferer
        self.device, self.path = device, Path(path)

    @torch.no_grad()
    def run(self) -> list[dict[str, Any]]:
        """Predict and write; the rows of the table."""

        network = self.network.to(self.device).eval()
        rows = []
        for item in self.dataset:
            age = ""
            if not item["error"]:
                said = self.inferer(item["image"][None].to(self.device), network)
                age = f"{max(0.0, float(said)):.2f}"
            row = {"file": item["file"], "predicted_age": age}
            rows.append(row | {"flags": item["flags"], "error": item["error"]})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_table(rows, self.path, ["file", "predicted_age", "flags", "error"])
        return rows


def list_scans(folder: str) -> list[dict[str, str]]:
    """Scans of a folder or list as MONAI's items."""
    return [{"image": str(scan.path)} for scan in find_scans([folder])]


def write_bundle(model: BrainAgeModel, folder: Path | str, card: str = "") -> Path:
    """Write a model as a MONAI bundle.

    Args:
        model: to write; `about` may hold `name`, `data`, `data_licence` and `version`.
        folder: to make or to fill.
        card: text of the model card, docs/README.md.

    Returns:
        The folder.

    Raises:
        ModelError: the model has a target without a form on disk.
    """
    folder = Path(folder)
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    members, state = [], {}
    for number, member in enumerate(model.members):
        if not isinstance(member.target, (AgeValue, AgeBins)):
            raise ModelError(f"target {type(member.target).__name__} has no form on disk")
        members.append(
            {
                # Plain layers: the same function, without a factorisation at each start.
                "network": {**member.net.settings, "layers": "plain"},
                "target": target_settings(member.target),
            }
        )
        for name, value in fuse(member.net).state_dict().items():
            state[f"nets.{number}.{name}"] = value.detach().float().contiguous()
    write_state(state, folder / "models" / "model.pt")
    _write_json(folder / "configs" / "metadata.json", _metadata(model))
    _write_json(folder / "configs" / "inference.json", _inference(members, model.answer))
    data = model.about.get("data_licence", "Not told; it is that of the scans it was trained on.")
    texts = {
        "LICENSE": _LICENSE,
        "docs/README.md": card or f"# Brain age\n\n{_NO_DIAGNOSIS}\n",
        "docs/data_license.txt": f"{model.about.get('data', 'Training data')}\n\n{data}\n",
    }
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder


def _metadata(model: BrainAgeModel) -> dict[str, Any]:
    about = model.about
    scores = about.get("out_of_fold", {})
    ages = about.get("ages", ["unknown", "unknown"])
    # MONAI's own properties want the versions as they are, without +cpu.
    versions = {name: version(name).partition("+")[0] for name in ("monai", "torch", "numpy")}
    needed = ("antspyx", "deepbet", "nibabel", "nilearn")
    about_it = (
        f"Predicts the age of adults ({ages[0]} to {ages[1]} years in training) from a T1-weighted "
        f"head. {_NO_DIAGNOSIS}"
    )
    return {
        "schema": _SCHEMA,
        "version": str(about.get("version", "1.0.0")),
        "changelog": {str(about.get("version", "1.0.0")): "first version"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {
            "eigen-suite": version("eigen-suite"),
            **{name: version(name) for name in needed},
        },
        "name": str(about.get("name", "Brain age")),
        "task": "Brain age from T1-weighted MRI",
        "description": about_it,
        "authors": "The Eigen Suite authors",
        "copyright": "The Eigen Suite authors",
        "data_source": str(about.get("data", "not told")),
        "data_type": "nibabel",
        "image_classes": "one channel, a brain in MNI152 space at 2 mm, 1 at its 99th percentile",
        "label_classes": "age in years",
        "pred_classes": "age in years",
        "eval_metrics": {f"out_of_fold_{name}": value for name, value in scores.items()},
        "intended_use": _NO_DIAGNOSIS,
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": 1,
                    "spatial_shape": list(GRID),
                    "dtype": "float32",
                    "value_range": [0, 1.275],
                    "is_patch_data": False,
                    "channel_def": {"0": "T1-weighted brain"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "value",
                    "format": "age",
                    "num_channels": 1,
                    "spatial_shape": [],
                    "dtype": "float32",
                    "value_range": [0, 120],
                    "is_patch_data": False,
                    "channel_def": {"0": "age in years"},
                }
            },
        },
    }


def _inference(members: Sequence[Mapping[str, Any]], answer: str) -> dict[str, Any]:
    return {
        "imports": ["$import torch", "$from neuro.bundle import list_scans"],
        "bundle_root": ".",
        "dataset_dir": "scans",
        "output_dir": "$@bundle_root + '/eval'",
        "kind": "head",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "neuro.bundle.BrainAgeNetwork",
            "members": members,
            "answer": answer,
        },
        "weights": "$torch.load(@bundle_root + '/models/model.pt', map_location='cpu', "
        "weights_only=True)",
        "load": "$@network_def.load_state_dict(@weights)",
        "preprocessing": {"_target_": "neuro.bundle.PrepareBrain", "kind": "@kind"},
        "dataset": {
            "_target_": "Dataset",
            "data": "$list_scans(@dataset_dir)",
            "transform": "@preprocessing",
        },
        "inferer": {"_target_": "SimpleInferer"},
        "evaluator": {
            "_target_": "neuro.bundle.AgeTable",
            "network": "@network_def",
            "dataset": "@dataset",
            "inferer": "@inferer",
            "device": "@device",
            "path": "$@output_dir + '/ages.csv'",
        },
        "initialize": ["$@load"],
        "run": ["$@evaluator.run()"],
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
