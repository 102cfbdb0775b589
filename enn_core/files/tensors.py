"""Tensor files: the one place where they are written and read.

Tensors by name are a safetensors file, with texts as its metadata; the state of what goes on later
is a file that torch saves. Neither runs code when it is read. Files appear whole or not at all, and
whoever may read other new files may read them.

What is read is what was written, or is refused: a safetensors file of ours has a digest of its
content in its metadata, and torch's files have a checksum for each record, which torch itself does
not look at. Files without (of other programs, of earlier versions) are read as they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enn_core.files.atomic import replacing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DamagedFileError",
    "TensorFileError",
    "read_metadata",
    "read_state",
    "read_stored",
    "read_tensors",
    "read_weights",
    "write_state",
    "write_tensors",
]

DIGEST = "eigen_sha256"
"""Name of the digest among a safetensors file's metadata; readers never see it."""

_PIECE = 2**20  # bytes hashed at once
_IS_FOLDER = 0x10  # among the attributes of a zip's entry
_TORCH_ZIP = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class TensorFileError(ValueError):
    """A file that is damaged or of another kind; the message is one line and names the file."""


class DamagedFileError(TensorFileError):
    """A file whose content is not what was written."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device as a safetensors file, and texts by name as its metadata."""
    from safetensors.torch import save

    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # Tied weights are one tensor in two places; the file holds both.
        own[name] = value.clone() if storage in storages else value
        storages.add(storage)
    with replacing(path) as temporary:
        # Not `save_file`: its files are readable by their owner alone, their names UTF-8.
        content = memoryview(save(own, metadata={"format": "pt", **(metadata or {})}))
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        digest = _header_digest(header)
        digest.update(content[start:])
        header["__metadata__"][DIGEST] = digest.hexdigest()
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(content[start:])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU.

    Raises:
        OSError: it is missing or cannot be read.
        TensorFileError: it is damaged or something else.
    """
    from safetensors.torch import load, load_file

    _check_digest(path)
    try:
        # By name it is mapped, not copied, but only by a name in UTF-8.
        return load_file(path) if _is_utf8(path) else load(path.read_bytes())
    except OSError:
        raise
    except Exception as error:  # safetensors has no common class for what it finds
        raise _not_safetensors(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Texts of a safetensors file by name; raises as `read_tensors` does.

    Its digest is not checked, which takes reading the whole file: `read_tensors` does.
    """
    return {name: text for name, text in _header(path)[1].items() if name != DIGEST}


def read_stored(path: Path) -> dict[str, tuple[str, list[int], memoryview]]:
    """Type, shape and bytes of tensors by name, as they are in a safetensors file: for hashes.

    Raises as `read_tensors` does.
    """
    _check_digest(path)
    header, _, start = _header(path)
    content = memoryview(path.read_bytes())[start:]
    stored = {}
    try:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(content):
                raise ValueError("cut off")
            stored[name] = entry["dtype"], entry["shape"], content[begin:end]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_safetensors(path, error) from error
    return stored


def write_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`torch.save`, all or nothing, on disk when it returns.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # Of a disk that is full torch says only that something was not where it should be.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_state(path: str | os.PathLike[str]) -> Any:
    """What torch saved in a file, on the CPU: tensors, numbers, texts and containers of these.

    Raises:
        OSError: it is missing or cannot be read.
        TensorFileError: it is damaged or holds other things.
    """
    import torch

    _check_records(Path(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise
        # What torch says of pickled code is how to run it.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({_one_line(error)})"
        raise TensorFileError(
            f"{os.fspath(path)} is damaged or holds pickled code, which is never run{reason}; "
            "save its tensors alone, as a state_dict or as safetensors"
        ) from error


def read_weights(path: Path) -> dict[str, Any]:
    """A state dict of any program: of a .safetensors file, or of one that torch saved.

    Wrappers of training programs are taken off; what is in it besides tensors is left in.

    Raises:
        OSError: it is missing or cannot be read.
        TensorFileError: it is damaged, or holds no state dict.
    """
    content = read_tensors(path) if path.suffix == ".safetensors" else read_state(path)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        kind = type(content).__name__
        raise TensorFileError(f"{path} holds no state dict; expected a state_dict, got {kind}")
    return dict(content)


def _check_digest(path: Path) -> None:
    """Raise DamagedFileError if a safetensors file has a digest that does not fit."""
    header, metadata, start = _header(path)
    if DIGEST not in metadata:
        return
    digest = _header_digest({**header, "__metadata__": metadata})
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(_PIECE):
            digest.update(piece)
    if digest.hexdigest() != metadata[DIGEST]:
        raise _damaged(path, "its content does not fit its digest")


def _header_digest(header: Mapping[str, Any]) -> hashlib._Hash:
    """Of a safetensors header without its own digest; the bytes of the tensors follow."""
    texts = {k: v for k, v in header["__metadata__"].items() if k != DIGEST}
    text = json.dumps({**header, "__metadata__": texts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode())


def _check_records(path: Path) -> None:
    """Raise DamagedFileError if a record of a file of torch does not fit its checksum.

    Or if the archive around the records is damaged.
    """
    with path.open("rb") as file:
        if file.read(len(_TORCH_ZIP)) != _TORCH_ZIP:
            return  # of a torch before 1.6, or something else
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if not any(record.CRC for record in records):
                    return  # saved after `set_crc32_options(False)`
                # torch would leave the memory of such a record as it happens to be.
                bad = [
                    each.filename
                    for each in records
                    if each.file_size and each.external_attr & _IS_FOLDER
                ]
                bad += filter(None, [archive.testzip()])
        except Exception as error:  # zipfile and zlib have a dozen kinds for damaged structures
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise  # a seek to nowhere is damage, too
            raise _damaged(path, _one_line(error)) from error
    if bad:
        raise _damaged(path, f"its record {bad[0]!r} does not fit its checksum")


def _damaged(path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: {why}; restore it from a copy, or make it again")


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Entries of the tensors, metadata, and where the bytes of tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            if size > os.fstat(file.fileno()).st_size:
                raise ValueError("header too large")
            header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise TypeError("metadata that is no text")
            return header, metadata, 8 + size
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise _not_safetensors(path, error) from error


def _not_safetensors(path: Path, error: Exception) -> TensorFileError:
    return TensorFileError(f"{path}: no intact safetensors file ({_one_line(error)})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_utf8(path: Path) -> bool:
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
