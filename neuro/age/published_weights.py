"""Published SFCN weights in our `sfcn`: Peng et al. 2021 and pyment (Leonardsen et al. 2022).

Read as safetensors, or as a torch file with tensors only (`weights_only=True`): nothing in a file
is ever executed. pyment publishes Keras weights; written as safetensors or a torch file under their
Keras names (`sfcn-reg_block-0_conv/kernel:0`, ...), they load as well.

>>> from neuro.age.networks import build
>>> net = build("sfcn", outputs=40, layers="plain")
>>> sorted(map_sfcn(published_names(net)))[:2]
['blocks.0.block.conv.bias', 'blocks.0.block.conv.weight']
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from enn_core.files.tensors import TensorFileError, read_weights
from neuro.age.networks import BrainNet, build

__all__ = [
    "CheckpointError",
    "load_sfcn",
    "map_sfcn",
    "published_names",
    "read_tensors",
    "start_from_",
]

BLOCKS = 6

# Order of the layers in a block of the published network: convolution, then normalisation.
_PENG = re.compile(r"feature_extractor\.conv_(?P<block>\d)\.(?P<layer>[01])\.(?P<name>\w+)")
_PENG_HEAD = re.compile(r"classifier\.conv_6\.(?P<name>weight|bias)")
_KERAS = re.compile(
    r"(?P<net>[\w-]*?)_?(?:block-(?P<block>\d)|top)_(?P<layer>conv|norm)/(?P<name>\w+)(?::0)?"
)
_KERAS_HEAD = re.compile(r"(?P<net>[\w-]*?)[_/]predictions/(?P<name>kernel|bias)(?::0)?")
_KERAS_NAMES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_HEAD = f"blocks.{BLOCKS - 1}.head.out"


class CheckpointError(ValueError):
    """A file that is no published SFCN; the message says what does not fit."""


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file that holds nothing else.

    A state dict may lie under `state_dict`, `model` or `model_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is neither, or holds other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = read_weights(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from None
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: the state dict holds other things than tensors")
    return content


def map_sfcn(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> those of our `sfcn`, Keras kernels transposed to torch's order.

    `module.` in front (from `DataParallel`) and counters of batches are left out.

    Raises:
        CheckpointError: a name that is in no published layout, or that comes twice.
    """
    mapped: dict[str, Tensor] = {}
    for given, value in tensors.items():
        name = given.removeprefix("module.")
        if name.endswith("num_batches_tracked"):
            continue
        ours, tensor = _mapped(name, value)
        if ours is None:
            raise CheckpointError(
                f"{given!r} is in no SFCN that is known (Peng et al. 2021, pyment); the checkpoint "
                "is of another network"
            )
        if ours in mapped:
            raise CheckpointError(f"{given!r} is there twice, under two spellings")
        mapped[ours] = tensor.float()
    return mapped


def load_sfcn(path: Path | str, layers: str = "plain") -> BrainNet:
    """A published SFCN as a network of six blocks, in evaluation mode.

    Only the last head is published; those of the earlier blocks are new and answer nothing yet.
    Inputs must be as published: Peng's 1 mm volumes divided by their mean, pyment's by 255.

    Args:
        path: see `read_tensors`.
        layers: "plain", or "enn" to factor the convolutions (exact).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no SFCN: a missing, unknown or misshapen tensor is named.
    """
    tensors = read_tensors(path)
    try:
        mapped = map_sfcn(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    last = mapped.get(f"{_HEAD}.weight")
    if last is None:
        raise CheckpointError(f"{path}: has no last layer (classifier.conv_6 or predictions)")
    # Keras normalises with an epsilon of 1e-3.
    keras = any("/kernel" in name for name in tensors)
    net = build("sfcn", outputs=last.shape[0], layers="plain", eps=1e-3 if keras else 1e-5)
    own = net.state_dict()
    for name, value in own.items():
        if _is_published(name):
            if name not in mapped:
                raise CheckpointError(f"{path}: lacks {name} of the published network")
            if mapped[name].shape != value.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(mapped[name].shape)}, the published network "
                    f"has {tuple(value.shape)}"
                )
    net.load_state_dict(mapped, strict=False)
    if layers == "enn":
        eigen = build(**{**net.settings, "layers": "enn"})
        eigen.load_state_dict(net.state_dict())
        net = eigen
    return net.eval()


def start_from_(net: BrainNet, path: Path | str) -> None:
    """Give an `sfcn` the blocks of a published one; its heads stay, they are for other ages.

    Args:
        net: changed in place; its settings say how the published blocks normalise.
        path: see `read_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no SFCN, or the network is none.
    """
    if net.settings["name"] != "sfcn":
        raise CheckpointError(
            f"{path}: published weights are those of an sfcn, the network is "
            f"{net.settings['name']}; choose the architecture sfcn"
        )
    published = load_sfcn(path, net.settings["layers"])
    net.settings |= {"norm": "batch", "eps": published.settings["eps"]}
    for unit, known in zip(net.blocks, published.blocks, strict=True):
        unit.block = known.block


def published_names(net: BrainNet) -> dict[str, Tensor]:
    """The tensors of an `sfcn` under the names of Peng et al.'s files, `module.` in front."""
    names: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        if not _is_published(name) and not name.endswith("num_batches_tracked"):
            continue
        _, block, part, *rest = name.split(".")
        if part == "head":
            shaped = value[..., None, None, None] if rest[-1] == "weight" else value
            names[f"module.classifier.conv_{BLOCKS}.{rest[-1]}"] = shaped
        else:
            layer = 0 if rest[0] == "conv" else 1
            names[f"module.feature_extractor.conv_{block}.{layer}.{rest[1]}"] = value
    return names


def _is_published(name: str) -> bool:
    """Whether a published checkpoint has this tensor of ours."""
    if name.endswith("num_batches_tracked"):
        return False
    return ".block." in name or name.startswith(_HEAD)


def _mapped(name: str, value: Tensor) -> tuple[str | None, Tensor]:
    """Our name and tensor for one of Peng's or Keras' names; None if it is neither."""
    if found := _PENG.fullmatch(name):
        layer = "conv" if found["layer"] == "0" else "norm"
        return f"blocks.{found['block']}.block.{layer}.{found['name']}", value
    if found := _PENG_HEAD.fullmatch(name):
        return f"{_HEAD}.{found['name']}", value.reshape(
            value.shape[:2]
        ) if value.ndim == 5 else value
    # h5 files repeat the layer's name: layer/layer/kernel:0.
    parts = name.split("/")
    if len(parts) == 3 and parts[0] == parts[1]:
        name = "/".join(parts[1:])
    if (found := _KERAS.fullmatch(name)) and found["name"] in _KERAS_NAMES:
        block = BLOCKS - 1 if found["block"] is None else int(found["block"])
        if value.ndim == 5:
            value = value.permute(4, 3, 0, 1, 2)
        return f"blocks.{block}.block.{found['layer']}.{_KERAS_NAMES[found['name']]}", value
    if found := _KERAS_HEAD.fullmatch(name):
        return f"{_HEAD}.{_KERAS_NAMES[found['name']]}", value.T if value.ndim == 2 else value
    return None, value
