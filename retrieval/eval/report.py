"""What becomes of evaluations: file names, one table of many results, the rank of every query."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files import tables
from enn_core.files.atomic import replacing
from retrieval.datasets.captioned import TarImage
from retrieval.eval.ranks import best_captions, own_cosines
from retrieval.eval.recall import DTYPES, Evaluation, split_name

__all__ = ["ReportError", "build_table", "output_path", "write_ranks", "write_table"]

_FIELDS = ("dataset", "model", "pretrained", "protocol", "split", "language", "task")

# Columns of a table that come first.
_FIRST = (
    *("dataset", "protocol", "split", "deviations", "n_images", "n_captions"),
    *("model", "pretrained", "model_fullname", "task", "language"),
)
_CLIP_BENCHMARK = ("mscoco_captions", "flickr30k", "flickr8k")


class ReportError(ValueError):
    """A report that cannot be made; one line that says what was given and what to do."""


def output_path(
    template: str, *, dataset: str, model: str, pretrained: str | None, protocol: str, split: str
) -> Path:
    """The file that a template such as "{dataset}_{model}_{protocol}.json" names.

    Args:
        template: a path; {model} and {pretrained} are those of CLIP_benchmark, {protocol} is
            "karpathy", "longclip" or "own".
        dataset: as the user named it.
        model: as `retrieval.load` takes it.
        pretrained: weights, if they are not in the name.
        protocol: of the data set.
        split: of the data set.

    Raises:
        ReportError: for an unknown field; the message lists the valid ones.
    """
    name, weights = split_name(model)
    values = {
        "dataset": dataset,
        "model": name.removeprefix("local-dir:").rstrip("/"),
        "pretrained": Path(pretrained or weights or "own").name,
        "protocol": protocol.partition(",")[0],
        "split": split,
        "language": "en",
        "task": "zeroshot_retrieval",
    }
    if "/" in values["model"] and not name.startswith("hf-hub:"):
        values["model"] = Path(values["model"]).name
    # What a name brings may not lead into another directory.
    safe = {key: re.sub(r"[^\w.+-]+", "_", value).lstrip(".") for key, value in values.items()}
    try:
        for _, field, form, conversion in string.Formatter().parse(template):
            if field is not None and (field not in safe or form or conversion):
                raise ReportError(
                    f"the output {template!r} has an unknown field {{{field}}}; valid: "
                    + ", ".join(f"{{{key}}}" for key in _FIELDS)
                )
        return Path(template.format(**safe))
    except ReportError:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise ReportError(
            f"the output {template!r} is no valid name: {error}; valid fields: "
            + ", ".join(f"{{{key}}}" for key in _FIELDS)
        ) from error


def same_question(
    path: Path, dataset_hash: str, recall_k: Sequence[int], precision: str = "f32"
) -> bool:
    """Whether a result file answers this: images, captions and precision the same, all these K."""
    try:
        result = _read(path)
    except ReportError:
        return False
    have = all(f"text_retrieval_recall@{k}" in result["metrics"] for k in recall_k)
    same = result.get("dtype", "float32") == DTYPES.get(precision)
    return have and same and result.get("dataset_hash") == dataset_hash


# --- one table of many results -----------------------------------------------------------------


def build_table(
    files: Sequence[str | os.PathLike[str]],
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of result files, ours or CLIP_benchmark's.

    As CLIP_benchmark's `build`: metrics become columns, every other key one too, and
    `model_fullname` is "model pretrained". Rows are ordered by data set, then model.

    Args:
        files: results; of a directory, all .json files in it.

    Raises:
        ReportError: if a file is no result, or two files tested the same data set differently
            (another protocol, split or number of images): such numbers do not belong in one table.
    """
    paths: list[Path] = []
    for file in map(Path, files):
        paths += sorted(file.glob("*.json")) if file.is_dir() else [file]
    if not paths:
        raise ReportError("there are no result files (.json) to build a table of")
    rows = []
    asked: dict[str, tuple[tuple[Any, ...], Path]] = {}
    for path in paths:
        result = _read(path)
        rows.append(
            {
                **result["metrics"],
                **{key: value for key, value in result.items() if key != "metrics"},
                "model_fullname": f"{result['model']} {result['pretrained']}",
            }
        )
        test = _test(result)
        first, where = asked.setdefault(_base(str(result["dataset"])), (test, path))
        if not all(a == b for a, b in zip(first, test, strict=True) if None not in (a, b)):
            raise ReportError(
                f"{where} and {path} tested {_base(str(result['dataset']))} differently "
                f"({_told(first)}; {_told(test)}): build one table of each"
            )
    names = {name for row in rows for name in row}
    leading = [name for name in _FIRST if name in names]
    metrics = sorted((n for n in names if "_retrieval_" in n), key=_natural)
    others = sorted(names - set(leading) - set(metrics))
    rows.sort(key=lambda row: (str(row["dataset"]), row["model_fullname"]))
    return [*leading, *metrics, *others], rows


def write_table(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> int:
    """Write `build_table` as CSV, complete or not at all; returns the number of rows."""
    columns, rows = build_table(files)
    tables.write_table(rows, Path(output), columns)
    return len(rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"result file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"cannot read {path} as JSON: {str(error).splitlines()[0]}") from error
    needed = ("dataset", "model", "pretrained", "metrics")
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise ReportError(f"{path} is no result of an evaluation: it has no metrics")
    absent = [key for key in needed if key not in result]
    if absent:
        raise ReportError(f"{path} is no result of an evaluation: it has no {absent[0]!r}")
    return result


def _base(dataset: str) -> str:
    """One name for all tests of the same photos."""
    name = dataset.removeprefix("wds/").removesuffix("-longclip")
    return "coco" if name == "mscoco_captions" else name


def _test(result: dict[str, Any]) -> tuple[Any, ...]:
    """What decides whether numbers can be compared; None where a file does not say."""
    name = str(result["dataset"]).removeprefix("wds/")
    known = "karpathy" if name in _CLIP_BENCHMARK else None
    keys = ("split", "n_images", "n_captions")
    return (result.get("protocol", known), *(result.get(key) for key in keys))


def _told(test: tuple[Any, ...]) -> str:
    protocol, split, images, captions = test
    parts = [protocol, split and f"split {split}", images and f"{images:,} images"]
    return ", ".join(str(part) for part in (*parts, captions and f"{captions:,} captions") if part)


def _natural(name: str) -> list[Any]:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


# --- every query -------------------------------------------------------------------------------


def write_ranks(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """The rank of every query, as Parquet.

    Columns: direction ("text_to_image" or "image_to_text"), query (position of the caption or the
    image), image, caption (for images: their best), rank (1 the best), score (cosine of the right
    answer). What was tested with what is in the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = evaluation.dataset
    owners = np.asarray(data.image_of_caption)
    best = best_captions(evaluation.texts, evaluation.images, owners)
    cosines = own_cosines(evaluation.texts, evaluation.images, owners)
    # A name that is not UTF-8 cannot be in Parquet; it keeps its bytes as escapes.
    names = [_name(image).encode("utf-8", "backslashreplace").decode() for image in data.images]
    texts = [caption.encode("utf-8", "replace").decode() for caption in data.captions]
    kind = pa.dictionary(pa.int8(), pa.string())
    directions = ["text_to_image"] * len(owners) + ["image_to_text"] * len(best)
    table = pa.table(
        {
            "direction": pa.array(directions, kind),
            "query": pa.array(np.concatenate([np.arange(len(owners)), np.arange(len(best))])),
            "image": [*(names[i] for i in owners), *names],
            "caption": [*texts, *(texts[i] for i in best)],
            "rank": np.concatenate([evaluation.to_image, evaluation.to_text]).astype(np.int32),
            "score": np.concatenate([cosines, cosines[best]]),
        }
    )
    about = {k: v for k, v in evaluation.result.items() if k != "metrics"}
    table = table.replace_schema_metadata({"evaluation": json.dumps(about)})
    with replacing(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _name(image: Path | TarImage) -> str:
    return image.name
