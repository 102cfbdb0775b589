"""Tensors of a TorchScript archive, without running the program in it.

OpenAI's CLIP files are such archives. `torch.load(weights_only=True)` refuses them, and
`torch.jit.load` compiles and links what they contain. The tensors are in the archive as in any
weights file: raw storages, and a pickle that names them. Here that pickle may build tensors and
nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive with a program besides its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name.

    Raises:
        pickle.UnpicklingError: if the archive asks for anything but tensors and modules.
        ValueError: if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
        if name is None:
            raise ValueError("the archive has no data.pkl")
        with archive.open(name) as file:
            root = _Unpickler(file, archive, name.removesuffix("data.pkl")).load()
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors, set())
    return tensors


class _Module:
    """Stands for any module class of the program; only its attributes are kept."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _Storage:
    """Bytes in the archive, read when a tensor needs them."""

    def __init__(self, archive: zipfile.ZipFile, name: str, dtype: torch.dtype) -> None:
        self._archive = archive
        self._name = name
        self.dtype = dtype
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        import torch

        if self._values is None:
            content = bytearray(self._archive.read(self._name))
            if not content:
                self._values = torch.empty(0, dtype=self.dtype)
            else:
                self._values = torch.frombuffer(content, dtype=self.dtype)
        return self._values


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # lists of numbers, which are no weights
        raise pickle.UnpicklingError(f"{module}.{name} is no tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        import torch

        kind, dtype, key = pid[:3]
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {kind!r}")
        name = f"{self._folder}data/{key}"
        if name not in self._storages:
            self._storages[name] = _Storage(self._archive, name, getattr(torch, dtype))
        return self._storages[name]


def _rebuild(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    # as_strided refuses what lies outside the storage.
    return storage.values().as_strided(size, stride, offset).clone()


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    import torch

    # Each module once: a hostile archive could hold a tree of references without end.
    if not isinstance(module, _Module) or id(module) in seen:
        return
    seen.add(id(module))
    for name, value in module.attributes.items():
        # Masks are attributes of tensor kind, but neither parameters nor buffers.
        if isinstance(value, torch.Tensor) and name != "attn_mask":
            tensors[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}.", tensors, seen)
