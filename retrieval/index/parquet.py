"""Moving an index's content as one Parquet file: ids, paths and vectors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from enn_core.files.atomic import replacing
from retrieval.index.catalog import Entry, encode_path
from retrieval.index.manifest import IndexCorrupt, IndexMismatch, Manifest
from retrieval.index.writer import Writer

__all__ = [
    "ROWS",
    "ImportFileError",
    "check_parquet",
    "export_parquet",
    "import_parquet",
    "manifest_of",
]

_METADATA_KEY = b"eigen-index"
_DIGEST_KEY = b"eigen-index-sha256"
_PLAIN = ("id", "sha256", "size", "mtime_ns", "read_ns", "width", "height")
ROWS = 4096  # at once
_UNIT_TOLERANCE = 1e-3
# Ids are given one by one; a file that claims a larger one gets new ids, so that bitmaps over ids
# stay small.
_LARGEST_ID = 2**27


class ImportFileError(ValueError):
    """A Parquet file that is no export of an index, or is damaged."""


def export_parquet(
    manifest: dict[str, Any],
    blocks: Iterable[tuple[list[Entry], np.ndarray]],
    path: str | os.PathLike[str],
) -> int:
    """Write every searchable image of an index; see `EigenIndex.export_parquet`.

    Columns: id, path (relative to the photo folder; a name that is not UTF-8 has replacement
    characters, and path_bytes holds the real one), sha256, size, mtime_ns, read_ns, width, height,
    vector (r float32, unit norm). The metadata entry `eigen-index` holds the index's manifest,
    `eigen-index-sha256` a digest of all that is imported again.

    Args:
        manifest: of the index.
        blocks: entries and their vectors (N, r) float32, some thousand at a time.
        path: the file; one that is there is replaced.

    Returns:
        Number of images.

    Raises:
        OSError: if the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = int(manifest["dim"])
    fields = [
        ("id", pa.int64()),
        ("path", pa.string()),
        ("path_bytes", pa.binary()),
        ("sha256", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("read_ns", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("vector", pa.list_(pa.float32(), dim)),
    ]
    schema = pa.schema(fields, metadata={_METADATA_KEY: json.dumps(manifest).encode()})
    target = Path(path)
    count = 0
    digest = hashlib.sha256(schema.metadata[_METADATA_KEY])
    with (
        replacing(target) as new,
        open(new, "wb") as file,
        pq.ParquetWriter(file, schema, write_page_checksum=True) as out,
    ):
        for entries, vectors in blocks:
            _digest(digest, entries, vectors)
            paths = [encode_path(entry.path) for entry in entries]
            flat = pa.array(vectors.reshape(-1), pa.float32())
            columns: dict[str, Any] = {
                "path": [
                    path.decode("utf-8", "replace") if isinstance(path, bytes) else path
                    for path in paths
                ],
                "path_bytes": [path if isinstance(path, bytes) else None for path in paths],
                "vector": pa.FixedSizeListArray.from_arrays(flat, dim),
            }
            for name in _PLAIN:
                columns[name] = [getattr(entry, name) for entry in entries]
            out.write_table(pa.table(columns, schema=schema))
            count += len(entries)
        out.add_key_value_metadata({_DIGEST_KEY: digest.hexdigest()})
    return count


def _digest(digest: hashlib._Hash, entries: Iterable[Entry], vectors: np.ndarray) -> None:
    """Add rows to a digest: what `_row` makes of them, however many are read at a time."""
    for entry, vector in zip(entries, vectors, strict=True):
        digest.update(repr((entry.path, *(getattr(entry, name) for name in _PLAIN))).encode())
        digest.update(np.ascontiguousarray(vector, "<f4").tobytes())


def manifest_of(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the index that a Parquet file was exported from.

    Raises:
        ImportFileError: if it is no such file, or damaged: an index made of a damaged manifest
            would take no other file.
        FileNotFoundError: if there is none.
    """
    with _opened(path) as file:
        manifest = _manifest(file, path)
        _check_all(file, path, manifest.dim)
        return manifest


def import_parquet(writer: Writer, path: str | os.PathLike[str]) -> int:
    """Add the images of an exported file to an index of the same model.

    The whole file is checked before anything is written. A path that the index has already keeps
    its id and gets the file's vector; a new one keeps the file's id if that is free.

    Args:
        writer: entered.
        path: a file written by `export_parquet`.

    Returns:
        Number of images.

    Raises:
        IndexMismatch: if it comes from another model or preprocessing.
        ImportFileError: if it is no export, or holds unusable paths or vectors.
        FileNotFoundError: if there is no such file.
    """
    with _opened(path) as file:
        manifest = _manifest(file, path)
        _check_all(file, path, manifest.dim)  # first, or damage would look like another model
        writer.manifest.check(manifest, "this file")
        dim = writer.manifest.dim
        count = 0
        with writer.guard():
            for entries, vectors in _checked(file, path, dim):
                _store(writer, entries, vectors)
                writer.publish(final=False)
                count += len(entries)
            writer.publish()
    return count


def check_parquet(path: str | os.PathLike[str]) -> None:
    """Raise ImportFileError if a file is no whole export of an index, OSError if there is none."""
    with _opened(path) as file:
        _check_all(file, path, _manifest(file, path).dim)


def _check_all(file: Any, path: str | os.PathLike[str], dim: int) -> None:
    """Raise ImportFileError unless all rows are fit to be stored, and are those written."""
    seen: set[str] = set()
    digest = hashlib.sha256(file.schema_arrow.metadata[_METADATA_KEY])
    for entries, vectors in _checked(file, path, dim):
        _digest(digest, entries, vectors)
        for entry in entries:
            if entry.path in seen:
                raise ImportFileError(
                    f"{str(path)!r} holds the path {entry.path!r} twice; export it again"
                )
            seen.add(entry.path)
    # Files of 0.1 have none.
    wanted = file.metadata.metadata.get(_DIGEST_KEY, digest.hexdigest().encode())
    if wanted != digest.hexdigest().encode():
        raise ImportFileError(
            f"{str(path)!r} is damaged: its content does not fit its digest; export it again"
        )


def _store(writer: Writer, entries: list[Entry], vectors: np.ndarray) -> None:
    catalog = writer.catalog
    with catalog.writing():
        known = catalog.by_path([entry.path for entry in entries])
        taken = catalog.by_id([entry.id for entry in entries])
        for entry, vector in zip(entries, vectors, strict=True):
            if entry.path in known:
                id_ = known[entry.path].id
            else:
                id_ = entry.id if entry.id not in taken and entry.id <= _LARGEST_ID else 0
            id_ = catalog.put(replace(entry, id=id_))
            catalog.put_vector(id_, vector)
            # An id given just now must not be claimed by a later row of this block.
            taken[id_] = entry


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # A Python file: any path works, and a missing one is the usual error.
    with open(path, "rb") as stream:
        try:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, error) from None
        try:
            with file:
                yield file
        except UnicodeDecodeError as error:  # of a damaged name of a column
            raise _unreadable(path, error) from None


def _batches(file: Any, path: str | os.PathLike[str], columns: list[str]) -> Iterator[Any]:
    import pyarrow as pa

    batches = file.iter_batches(ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        if batch is None:
            return
        yield batch


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ImportFileError:
    reason = (str(error).splitlines() or ["damaged"])[0][:200]
    return ImportFileError(f"{str(path)!r} cannot be read as Parquet: {reason}")


def _manifest(file: Any, path: str | os.PathLike[str]) -> Manifest:
    metadata = file.schema_arrow.metadata or {}
    if _METADATA_KEY not in metadata:
        raise ImportFileError(
            f"{str(path)!r} is not an exported index; give a file written by `enn search export`"
        )
    try:
        return Manifest.from_dict(json.loads(metadata[_METADATA_KEY]))
    except IndexMismatch as error:
        raise ImportFileError(f"{str(path)!r} is of a newer version: {error}") from None
    except (ValueError, IndexCorrupt) as error:
        raise ImportFileError(f"{str(path)!r} has damaged metadata: {error}") from None


def _checked(
    file: Any, path: str | os.PathLike[str], dim: int
) -> Iterator[tuple[list[Entry], np.ndarray]]:
    """Rows of the file in blocks, every one fit to be stored."""
    import pyarrow as pa

    columns = [*_PLAIN, "path", "path_bytes"]
    missing = {*columns, "vector"} - set(file.schema_arrow.names)
    if missing:
        raise ImportFileError(f"{str(path)!r} lacks the column {', '.join(sorted(missing))}")
    start = 0
    for batch in _batches(file, path, [*columns, "vector"]):
        try:
            lists = batch.column("vector").cast(pa.list_(pa.float32(), dim))
            flat = lists.flatten()
            vectors = flat.to_numpy(zero_copy_only=False).reshape(batch.num_rows, dim)
        except (pa.ArrowException, ValueError):
            raise ImportFileError(
                f"{str(path)!r} holds vectors that are not {dim} numbers long near row {start}"
            ) from None
        norms = np.linalg.norm(vectors, axis=1)
        # Written so that NaN fails.
        bad = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))
        if len(bad):
            raise ImportFileError(
                f"{str(path)!r} row {start + bad[0]}: the vector has norm {norms[bad[0]]:.3g} "
                "instead of 1; nothing was imported"
            )
        entries = []
        for number, row in enumerate(batch.select(columns).to_pylist()):
            try:
                entries.append(_row(row))
            except (ValueError, TypeError) as error:
                raise ImportFileError(
                    f"{str(path)!r} row {start + number}: {error}; nothing was imported"
                ) from None
        yield entries, vectors
        start += batch.num_rows


def _row(row: dict[str, Any]) -> Entry:
    raw = row["path_bytes"]
    path = raw.decode("utf-8", "surrogateescape") if raw is not None else row["path"]
    # Searching opens these files: a file of somebody else must not point out of the folder.
    if not isinstance(path, str) or not path or "\0" in path or os.path.isabs(path):
        raise ValueError(f"path {path!r} is not relative to the photo folder")
    if PurePosixPath(path).as_posix() != path or ".." in path.split("/"):
        raise ValueError(f"path {path!r} is not a plain path inside the photo folder")
    sha256 = row["sha256"]
    if sha256 is not None and len(bytes.fromhex(sha256)) != 32:
        raise ValueError(f"sha256 {sha256!r} has not 64 digits")
    if row["id"] is None or row["id"] < 1:
        raise ValueError(f"id {row['id']} is not positive")
    return Entry(
        id=row["id"],
        path=path,
        width=row["width"],
        height=row["height"],
        size=row["size"],
        mtime_ns=row["mtime_ns"],
        sha256=sha256,
        read_ns=row["read_ns"],
    )
