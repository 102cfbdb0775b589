"""Any torch model to an eigen model and back.

`to_enn` factors every linear map it knows by SVD in float64; `fuse` multiplies the factors out.
Both change classes of modules in place (on a copy unless `inplace=True`), so hooks, attributes,
shared modules and the model's own code stay as they are.

>>> import torch
>>> from torch import nn
>>> from enn_core import conversion_report, fuse, to_enn
>>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
>>> eigen = to_enn(model)
>>> list(fuse(eigen).state_dict()) == list(model.state_dict())
True
>>> len(conversion_report(eigen).converted)
2
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from enn_core.bare_parameters import (
    SUFFIX,
    EigenOwner,
    EigenWeight,
    Form,
    known_form,
    owner_class,
)
from enn_core.factors import FactorError
from enn_core.layers import (
    FACTORS,
    EigenLayer,
    ENNConv,
    Factored,
    as_matrix,
    eigen_class,
    is_channels_last,
    make_parameters,
    plain_base,
    replace_parameter,
)

_log = logging.getLogger(__name__)

Patterns = str | Iterable[str] | None


class ConversionError(ValueError):
    """A model that cannot be converted or fused, with the name of the layer."""


@dataclass(frozen=True)
class _Site:
    """One weight of a model: `parameter` of `module`, called `name` in reports."""

    module: nn.Module
    parameter: str
    value: Tensor
    name: str
    form: Form | None  # None for layers

    def key(self) -> tuple[object, ...]:
        """Sites that share a parameter can share factors only if they read it alike."""
        layer = self.form is None
        return (self.form, getattr(self.module, "groups", 1) if layer else 1)


@dataclass(frozen=True)
class ReportRow:
    """One weight of a model.

    `name` is the module's path (or the parameter's, if bare), `shape` the plain weight's, `rank`
    the number of components of each factored matrix (0 if plain), `reason` why it stayed plain.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int = 0
    reason: str = ""


@dataclass
class ConversionReport:
    """Which weights of a model are factored, and how many parameters it has either way."""

    converted: list[ReportRow] = field(default_factory=list)
    plain: list[ReportRow] = field(default_factory=list)
    parameters_stored: int = 0
    parameters_fused: int = 0

    def __str__(self) -> str:
        rows = [("weight", "kind", "shape", "rank", "kept plain because")]
        for row in [*self.converted, *self.plain]:
            shape = "x".join(map(str, row.shape))
            rows.append((row.name, row.kind, shape, str(row.rank or "-"), row.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        lines.append(
            f"{len(self.converted)} converted, {len(self.plain)} plain; parameters: "
            f"{self.parameters_stored:,} stored, {self.parameters_fused:,} fused"
        )
        return "\n".join(lines)


def to_enn(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    inplace: bool = False,
) -> nn.Module:
    """Convert a model's linear and convolution layers and projections to eigen form, exactly.

    Converted: `nn.Linear`, `nn.Conv1d/2d/3d` and their subclasses (which keep their own forward),
    packed attention projections and the bare projections named in `bare_parameters.KNOWN_FORMS`.
    Left plain: depthwise convolutions, weights of rank 1, and whatever `conversion_report` lists.
    Create the optimizer after converting: the parameters are new. How many weights were converted
    is logged (INFO); it warns if a model has weights and none was.

    Args:
        model: any module; it is not changed unless `inplace`.
        include: names or globs of modules or parameters to convert (a name covers what is below
            it); all by default.
        exclude: likewise, to leave plain; wins over `include`.
        inplace: convert `model` itself instead of a deep copy.

    Returns:
        The converted model.

    Raises:
        ConversionError: a weight holds NaN or infinity, or a pattern matches nothing.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    if not inplace:
        model = copy.deepcopy(model)
    by_parameter: dict[int, list[_Site]] = {}
    names = []
    for site in _sites(model):
        names.append(site.name)
        by_parameter.setdefault(id(site.value), []).append(site)
    _check_patterns(model, names, [*(include or ()), *(exclude or ())])
    done = 0
    for sites in by_parameter.values():
        if any(_why_plain(site) for site in sites) or len({site.key() for site in sites}) > 1:
            continue
        if any(not is_selected(site.name, include, exclude) for site in sites):
            continue
        done += len(sites)
        try:
            _convert(sites)
        except FactorError as error:
            raise ConversionError(f"{sites[0].name}: {error}") from error
    _log.info("to_enn converted %d of %d weights", done, len(names))
    if names and not done and not (include or exclude) and not _has_factors(model):
        kinds = ", ".join(
            sorted({_kind(site) for sites in by_parameter.values() for site in sites})
        )
        warnings.warn(
            f"to_enn converted none of the model's {len(names)} weights (in {kinds}); "
            "conversion_report(model) says why",
            stacklevel=2,
        )
    return model


def _has_factors(model: nn.Module) -> bool:
    return any(isinstance(module, Factored) for module in model.modules())


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give the plain model back: every factored weight multiplied out in float64.

    The state dict has exactly the keys, in the order, of the model that `to_enn` was given.

    Args:
        model: any module, with or without eigen layers.
        inplace: fuse `model` itself instead of a deep copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    done: dict[int, nn.Parameter] = {}  # shared factors give a shared weight
    for module in model.modules():
        if isinstance(module, Factored):
            module.settle()
    for module in list(model.modules()):
        if isinstance(module, EigenLayer):
            _fuse_layer(module, done)
        elif isinstance(module, EigenOwner):
            _fuse_owner(module, done)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """List the factored and the plain weights (two or more dimensions) of a model."""
    report = ConversionReport()
    counted: set[int] = set()
    saved = 0
    for name, module in model.named_modules():
        if isinstance(module, EigenLayer):
            shape, kind = module.weight_shape, type(module).__name__
            label = name or module.plain_class.__name__
        elif isinstance(module, EigenWeight):
            shape, kind, label = module.shape, "parameter", name.removesuffix(SUFFIX)
        else:
            continue
        report.converted.append(ReportRow(label, kind, shape, module.Lambda.shape[-1]))
        factors = [module.Q, module.Lambda, module.P]
        if id(module.Q) not in counted:
            counted.add(id(module.Q))
            saved += sum(f.numel() for f in factors) - prod(shape)
    sites = list(_sites(model))
    users: dict[int, list[str]] = {}
    for site in sites:
        users.setdefault(id(site.value), []).append(site.name)
    for site in sites:
        shared = [other for other in users[id(site.value)] if other != site.name]
        reason = _why_plain(site) or (f"shared with {shared[0]}" if shared else "not selected")
        shape = () if isinstance(site.value, UninitializedParameter) else tuple(site.value.shape)
        report.plain.append(ReportRow(site.name, _kind(site), shape, reason=reason))
    report.parameters_stored = sum(
        p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter)
    )
    report.parameters_fused = report.parameters_stored - saved
    return report


def _patterns(given: Patterns) -> list[str] | None:
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a weight, something above it, or fits it as file names do."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def is_selected(name: str, include: list[str] | None, exclude: list[str] | None) -> bool:
    """Whether a weight is to be converted; `exclude` wins, no `include` includes all."""
    if include is not None and not any(matches(name, p) for p in include):
        return False
    return not any(matches(name, p) for p in exclude or ())


def _check_patterns(model: nn.Module, names: list[str], patterns: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            top = ", ".join(name for name, _ in model.named_children())
            raise ConversionError(
                f"pattern {pattern!r} matches no weight of this model; its children are: {top}"
            )


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Every plain parameter with two or more dimensions, except factors."""
    for path, module in model.named_modules():
        layer = plain_base(type(module)) is not None
        for name, value in module._parameters.items():
            if value is None or isinstance(module, EigenLayer | EigenWeight):
                continue
            if isinstance(value, UninitializedParameter):
                yield _Site(module, name, value, path or type(module).__name__, None)
            elif value.ndim >= 2:
                if name == "weight":
                    yield _Site(module, name, value, path or type(module).__name__, None)
                else:
                    form = None if layer else known_form(name, value)
                    yield _Site(module, name, value, f"{path}.{name}".lstrip("."), form)


def _kind(site: _Site) -> str:
    return type(site.module).__name__ if site.parameter == "weight" else "parameter"


def _why_plain(site: _Site) -> str:
    """Why a weight cannot or should not be factored; empty if it can."""
    module, value = site.module, site.value
    if isinstance(value, UninitializedParameter):
        return "not initialised yet"
    if site.parameter == "weight":
        base = plain_base(type(module))
        if base is None:
            return "no eigen twin"
        if not value.is_floating_point():
            return f"{value.dtype} weight"
        if base is nn.Linear:
            if value.shape != (module.out_features, module.in_features):
                return "shape is not (out_features, in_features)"
            return "rank 1" if min(value.shape) < 2 else ""
        groups: int = module.groups  # type: ignore[assignment]
        if groups > 1 and value.shape[1] == 1:
            return "depthwise"
        if value.shape[2:] != tuple(module.kernel_size):  # type: ignore[arg-type]
            return "shape is not (out, in/groups, kernel)"
        return "rank 1" if min(value.shape[0] // groups, value[0].numel()) < 2 else ""
    if site.form is None:
        return "not known to be a linear map"
    if not value.is_floating_point():
        return f"{value.dtype} weight"
    return "rank 1" if min(value.shape) < 2 else ""


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def _convert(sites: list[_Site]) -> None:
    """Factor one parameter and give the factors to all modules that use it."""
    shared: dict[str, nn.Parameter] = {}
    for site in sites:
        if site.form is None:
            _convert_layer(site.module, shared)
        else:
            _convert_bare(site, site.form, shared)


def _convert_layer(layer: nn.Module, shared: dict[str, nn.Parameter]) -> None:
    plain = layer._parameters["weight"]
    if plain is None:  # for the type checker: a site has a value
        return
    if not shared:
        matrix = as_matrix(plain, getattr(layer, "groups", 1))
        shared.update(zip(FACTORS, make_parameters(matrix, plain.requires_grad), strict=True))
    channels_last = is_channels_last(plain)
    replace_parameter(layer, "weight", shared)
    _set_class(layer, eigen_class(type(layer)))
    if isinstance(layer, ENNConv):
        layer._channels_last = channels_last


def _convert_bare(site: _Site, form: Form, shared: dict[str, nn.Parameter]) -> None:
    module, name = site.module, site.parameter
    child = EigenWeight(tuple(site.value.shape), form, shared or _factors(site.value, form))
    shared.update({factor: child._parameters[factor] for factor in FACTORS})  # type: ignore[misc]
    child.train(module.training)
    if isinstance(module, EigenOwner):
        names, cls = module.eigen_names, module.plain_class
        child.plain_order = module.eigen_weight(names[0]).plain_order
    else:
        names, cls = (), type(module)
        child.plain_order = tuple(module._parameters)
    del module._parameters[name]
    _set_class(module, owner_class(cls, (*names, name)))
    module._modules[name + SUFFIX] = child


def _factors(value: Tensor, form: Form) -> dict[str, nn.Parameter]:
    factors = make_parameters(form.as_matrix(value), value.requires_grad)
    return dict(zip(FACTORS, factors, strict=True))


def _fuse_layer(layer: EigenLayer, done: dict[int, nn.Parameter]) -> None:
    """Put the plain weight of `layer` where its factors stand."""
    weight = _fused(layer, done)
    for name in FACTORS[1:]:
        del layer._parameters[name]
    replace_parameter(layer, "Q", {"weight": weight})
    for name in ("_cache", "_looked_at", "_lineage", "is_held", "_channels_last"):
        layer.__dict__.pop(name, None)
    _set_class(layer, layer.plain_class)


def _fuse_owner(owner: EigenOwner, done: dict[int, nn.Parameter]) -> None:
    """Put the bare parameters of `owner` back, in their places."""
    parameters: dict[str, nn.Parameter | None] = dict(owner._parameters)
    order: tuple[str, ...] = ()
    for name in owner.eigen_names:
        child = owner.eigen_weight(name)
        order = child.plain_order
        parameters[name] = _fused(child, done)
        del owner._modules[name + SUFFIX]
    owner._parameters.clear()
    owner._parameters.update({name: parameters.pop(name) for name in order if name in parameters})
    owner._parameters.update(parameters)
    owner.__dict__.pop("_bound", None)
    _set_class(owner, owner.plain_class)


def _fused(module: EigenLayer | EigenWeight, done: dict[int, nn.Parameter]) -> nn.Parameter:
    """Dense weight of `module` as a parameter in its plain shape."""
    Q, Lambda, P = module.Q, module.Lambda, module.P
    known = done.get(id(Q))
    if known is not None:
        return known
    with torch.no_grad():
        device = Q.device if Q.device.type != "mps" else torch.device("cpu")
        q, scale, p = (t.to(device, torch.float64) for t in (Q, Lambda, P))
        weight: Tensor = (q * scale.unsqueeze(-2)) @ p.mT
        weight = module._shaped(weight.to(Q.device, Q.dtype))
        if isinstance(module, EigenWeight):
            weight = weight.contiguous()  # the transpose of a product
    done[id(Q)] = nn.Parameter(weight, requires_grad=Q.requires_grad)
    return done[id(Q)]
