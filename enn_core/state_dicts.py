"""State dicts to eigen form and back, with or without the network that they belong to.

In an eigen state dict `layer.weight` is replaced by `layer.Q`, `layer.Lambda` and `layer.P`, and a
bare map such as `visual.proj` by `visual.proj_eigen.Q` and so on: the names of the eigen layers.
The metadata entry `eigen` of its file remembers the plain shapes and types, so that fusing needs
nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from enn_core.bare_parameters import KNOWN_FORMS, SUFFIX, known_form
from enn_core.convert import (
    ConversionError,
    ConversionReport,
    ReportRow,
    conversion_report,
    is_selected,
    matches,
    to_enn,
)
from enn_core.factors import FactorError, svd_factors

__all__ = ["Converted", "convert", "fuse", "plain_shapes"]

_FACTORS = ("Q", "Lambda", "P")
_METADATA_KEY = "eigen"
_HALF = (torch.float16, torch.bfloat16)
# Lookup tables are called weights too, but they map nothing.
_TABLES = ("embed", "embedding", "embeddings", "embed_tokens", "wte", "wpe")

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Converted:
    """An eigen state dict.

    Attributes:
        tensors: by name.
        metadata: to be written with them.
        report: what was factored, what stayed plain and why.
        error: largest difference of a refused weight, relative to that weight's largest entry.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    report: ConversionReport
    error: float


def convert(
    tensors: State,
    *,
    model: nn.Module | None = None,
    what: str = "the network",
    like: State | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Converted:
    """Factor a plain state dict exactly.

    Tensors that stay plain are passed on untouched. Half precision weights get float32 factors, or
    they would not be exact.

    Args:
        tensors: the plain state dict.
        model: an untrained network that it fits; what `to_enn` factors in it is factored.
        what: the model's name, for messages.
        like: an eigen state dict; what is factored there is factored. With neither, every weight
            that looks like a linear map or convolution by its name and shape.
        include, exclude: names (with all below them) or patterns, as `to_enn` takes them.
        progress: called with "factoring", how many are done, and of how many.

    Raises:
        ConversionError: tensors are missing, left over, of another shape, or not finite.
    """
    if _groups(tensors):
        raise ConversionError("the input is in eigen form already; `enn fuse` goes back")
    if model is not None:
        out, report = _convert_by_model(tensors, model, what, include, exclude)
    else:
        forms = _forms_like(tensors, like) if like is not None else None
        out, report = _convert_by_name(tensors, forms, include, exclude, progress)
    groups = _groups(out)
    shapes = {key: tuple(tensors[key].shape) for key in groups.values()}
    note = {"shapes": shapes, "dtypes": _changed_types(tensors, groups.values())}
    error = 0.0
    for prefix, key in groups.items():
        plain = tensors[key].double()
        fused = _dense(out, prefix).reshape(_form_shape(key, plain))
        if _transposed(prefix, key):
            fused = fused.mT
        scale = max(float(plain.abs().max()), torch.finfo(torch.float32).tiny)
        error = max(error, float((fused.reshape(plain.shape) - plain).abs().max()) / scale)
    return Converted(out, {_METADATA_KEY: json.dumps(note)}, report, error)


def _changed_types(tensors: State, keys: Iterable[str]) -> dict[str, str]:
    halves = (key for key in keys if tensors[key].dtype in _HALF)
    return {key: str(tensors[key].dtype).removeprefix("torch.") for key in halves}


def _convert_by_model(
    tensors: State, model: nn.Module, what: str, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, Tensor], ConversionReport]:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_same(own, {name: tuple(value.shape) for name, value in tensors.items()}, what)
    if any(value.dtype is torch.float64 for value in tensors.values()):
        model.double()
    model.load_state_dict(dict(tensors))
    to_enn(model, include=list(include) or None, exclude=list(exclude) or None, inplace=True)
    state = model.state_dict()
    out = {name: tensors.get(name, value) for name, value in state.items()}
    return out, conversion_report(model)


def _convert_by_name(
    tensors: State,
    forms: Mapping[str, int] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress | None,
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Factor by name: `forms` has the blocks of every weight to factor, None guesses."""
    out: dict[str, Tensor] = {}
    report = ConversionReport()
    _check_patterns(tensors, [*include, *exclude])
    for done, (key, value) in enumerate(tensors.items(), 1):
        name = key.removesuffix(".weight")
        reason, blocks = _looks_linear(key, value)
        if forms is not None:
            reason, blocks = ("", forms[key]) if key in forms else ("plain there", 1)
        elif not reason and not is_selected(name, list(include) or None, list(exclude)):
            reason = "not selected"
        if reason:
            out[key] = value
            if value.ndim >= 2:
                report.plain.append(ReportRow(name, "tensor", tuple(value.shape), reason=reason))
            continue
        prefix = _prefix(key)
        matrix = value.mT if _transposed(prefix, key) else value
        matrix = matrix.reshape(matrix.shape[0], -1)
        if blocks > 1:
            matrix = matrix.reshape(blocks, matrix.shape[0] // blocks, -1)
        try:
            factors = svd_factors(matrix)
        except FactorError as error:
            raise ConversionError(f"{key}: {error}") from None
        dtype = torch.float32 if value.dtype in _HALF else value.dtype
        for factor, part in zip(_FACTORS, factors, strict=True):
            out[_join(prefix, factor)] = part.to(dtype)
        report.converted.append(ReportRow(name, "tensor", tuple(value.shape), factors[1].shape[-1]))
        if progress is not None:
            progress("factoring", done, len(tensors))
    report.parameters_stored = sum(value.numel() for value in out.values())
    report.parameters_fused = sum(value.numel() for value in tensors.values())
    return out, report


def _looks_linear(key: str, value: Tensor) -> tuple[str, int]:
    """Why a tensor of an unknown network stays plain (empty if it does not), and its blocks.

    Factored are tensors called `*.weight` of two or more dimensions, taken as (out, rest), and
    bare maps under the names that `enn_core` knows (`in_proj_weight`, `proj`, ...). Embedding
    tables are left alone by their names, depthwise convolutions by their shape.
    """
    leaf = key.rpartition(".")[2]
    if value.ndim < 2:
        return "not a matrix", 1
    if not value.is_floating_point():
        return f"{value.dtype} tensor", 1
    if leaf != "weight":
        form = known_form(leaf, value)
        if form is None or min(value.shape) < 2:
            return "not known to be a linear map", 1
        return "", form.blocks
    owner = key.removesuffix(".weight").rpartition(".")[2].lower()
    if value.ndim == 2 and owner.endswith(_TABLES):
        return "a table by its name", 1
    if value.ndim > 2 and value.shape[1] == 1:
        return "depthwise, or one input channel", 1
    if min(value.shape[0], prod(value.shape[1:])) < 2:
        return "rank 1", 1
    return "", 1


def _forms_like(tensors: State, like: State) -> dict[str, int]:
    """Blocks of every weight that is factored in `like`; everything must fit."""
    groups = _groups(like)
    if not groups:
        raise ConversionError("the file after --like has no factored weights; give an eigen file")
    wanted = {key: tuple(value.shape) for key, value in like.items() if not _is_factor(key, groups)}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    for prefix, key in groups.items():
        if key in tensors:
            Q, P = like[_join(prefix, "Q")], like[_join(prefix, "P")]
            blocks = Q.shape[0] if Q.ndim == 3 else 1
            out, n = blocks * Q.shape[-2], P.shape[-2]
            found = tensors[key].mT if _transposed(prefix, key) else tensors[key]
            fits = found.ndim >= 2 and (found.shape[0], prod(found.shape[1:])) == (out, n)
            wanted[key] = given[key] if fits else (out, n)
        else:
            wanted[key] = ()
    _check_same(wanted, given, "the file after --like")
    return {
        key: like[_join(prefix, "Q")].shape[0] if like[_join(prefix, "Q")].ndim == 3 else 1
        for prefix, key in groups.items()
    }


def plain_shapes(
    tensors: State, metadata: Mapping[str, str], like: State | None = None
) -> tuple[Shapes, Mapping[str, str]]:
    """Shapes, and types where they differ, of the plain form of an eigen state dict.

    Args:
        tensors: the eigen state dict.
        metadata: of its file; `convert` notes the plain shapes there.
        like: a plain state dict of the same network, which says them instead.

    Raises:
        ConversionError: the input has no factors, or nothing says the shapes.
    """
    groups = _groups(tensors)
    if not groups:
        raise ConversionError(
            "the input has no factored weights (*.Q, *.Lambda, *.P); nothing to do"
        )
    if like is not None:
        types = _changed_types(like, [key for key in groups.values() if key in like])
        return {key: tuple(value.shape) for key, value in like.items()}, types
    if _METADATA_KEY not in metadata:
        raise ConversionError(
            "the input does not say the shapes of its plain weights; "
            "give --arch NAME, or --like with a plain file of the same network"
        )
    try:
        noted = json.loads(metadata[_METADATA_KEY])
        shapes = {str(key): tuple(map(int, shape)) for key, shape in noted["shapes"].items()}
        types = {str(key): str(name) for key, name in noted["dtypes"].items()}
        if not all(size >= 0 for shape in shapes.values() for size in shape):
            raise ValueError("a negative length")
        if not all(isinstance(getattr(torch, name, None), torch.dtype) for name in types.values()):
            raise ValueError("no type of numbers")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConversionError("the input's metadata is damaged; give --arch or --like") from None
    for key, value in tensors.items():
        if not _is_factor(key, groups):
            shapes[key] = tuple(value.shape)
    return shapes, types


def fuse(
    tensors: State, shapes: Shapes, types: Mapping[str, str], what: str = "its plain form"
) -> dict[str, Tensor]:
    """The plain state dict: all factors multiplied out in float64.

    Args:
        tensors: eigen state dict.
        shapes, types: from `plain_shapes`.
        what: where they come from, for messages.

    Raises:
        ConversionError: the plain names or shapes are not those of `shapes`.
    """
    groups = _groups(tensors)
    found: dict[str, tuple[int, ...]] = {}
    dense: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not _is_factor(key, groups):
            dense[key], found[key] = value, tuple(value.shape)
    for prefix, key in groups.items():
        matrix = _dense(tensors, prefix).flatten(0, -2)
        if _transposed(prefix, key):
            matrix = matrix.mT
        wanted = shapes.get(key, tuple(matrix.shape))
        fits = matrix.numel() == prod(wanted) and matrix.shape[0] == wanted[0]
        found[key] = wanted if fits else tuple(matrix.shape)
        if fits:
            dtype = (
                getattr(torch, types[key]) if key in types else tensors[_join(prefix, "Q")].dtype
            )
            dense[key] = matrix.reshape(wanted).to(dtype).contiguous()
    _check_same(shapes, found, what)
    return {key: dense[key] for key in shapes}


def _groups(tensors: State) -> dict[str, str]:
    """Prefix of every complete set of factors, with the plain key that it stands for."""
    found = {}
    for key in tensors:
        if key.rpartition(".")[2] != "Lambda":
            continue
        prefix = key.rpartition(".")[0]
        parts = [tensors.get(_join(prefix, factor)) for factor in _FACTORS]
        if any(part is None for part in parts):
            raise ConversionError(f"{prefix} has a Lambda, but not both Q and P")
        Q, scale, P = (part for part in parts if part is not None)
        ranks = Q.shape[-1:] == scale.shape[-1:] == P.shape[-1:]
        blocks = Q.shape[:-2] == scale.shape[:-1] == P.shape[:-2]
        if not (ranks and blocks and Q.ndim == P.ndim in (2, 3)):
            raise ConversionError(
                f"the factors of {prefix} do not fit each other: Q {tuple(Q.shape)}, "
                f"Lambda {tuple(scale.shape)}, P {tuple(P.shape)}"
            )
        bare = prefix.endswith(SUFFIX)
        found[prefix] = prefix.removesuffix(SUFFIX) if bare else _join(prefix, "weight")
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _prefix(key: str) -> str:
    if key == "weight":
        return ""
    return key.removesuffix(".weight") if key.endswith(".weight") else key + SUFFIX


def _is_factor(key: str, groups: Mapping[str, str]) -> bool:
    prefix, _, leaf = key.rpartition(".")
    return leaf in _FACTORS and prefix in groups


def _transposed(prefix: str, key: str) -> bool:
    form = KNOWN_FORMS.get(key.rpartition(".")[2]) if prefix.endswith(SUFFIX) else None
    return form is not None and form.transposed


def _dense(tensors: State, prefix: str) -> Tensor:
    """(..., out, n) in float64."""
    Q, scale, P = (tensors[_join(prefix, factor)].double() for factor in _FACTORS)
    return (Q * scale.unsqueeze(-2)) @ P.mT


def _form_shape(key: str, plain: Tensor) -> tuple[int, int]:
    """(out, n) of the matrix that a plain tensor holds."""
    form = KNOWN_FORMS.get(key.rpartition(".")[2])
    if form is not None and form.transposed:
        return plain.shape[1], plain.shape[0]
    return plain.shape[0], prod(plain.shape[1:])


def _check_patterns(tensors: State, patterns: Sequence[str]) -> None:
    names = [key.removesuffix(".weight") for key in tensors]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConversionError(f"pattern {pattern!r} matches no tensor; the first is {names[0]}")


def _check_same(wanted: Shapes, given: Shapes, what: str) -> None:
    """Refuse anything but the same names and shapes."""
    problems = []
    for label, keys in (
        ("missing", [key for key in wanted if key not in given]),
        ("not in it", [key for key in given if key not in wanted]),
        ("other shape", [k for k in wanted if k in given and wanted[k] != given[k]]),
    ):
        if keys:
            first = ", ".join(_with_shapes(key, wanted, given) for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{label}: {first}{more}")
    if problems:
        raise ConversionError(f"the input does not fit {what}: {'; '.join(problems)}")


def _with_shapes(key: str, wanted: Shapes, given: Shapes) -> str:
    if key in wanted and key in given:
        return f"{key} (is {given[key]}, should be {wanted[key]})"
    return key
