"""Untrained networks by name: open_clip's, timm's and torchvision's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from apps.cli.terminal import CommandError, printable
from retrieval.model.checkpoints import suggest

__all__ = ["build"]


def build(name: str) -> nn.Module:
    """An untrained network: an open_clip name, `timm:NAME` or `torchvision:NAME`.

    Raises:
        CommandError: unknown name; the message has near ones.
    """
    source, _, short = name.rpartition(":")
    makers: dict[str, Callable[[str], nn.Module]] = {
        "": _build_open_clip,
        "open_clip": _build_open_clip,
        "timm": _build_timm,
        "torchvision": _build_torchvision,
    }
    if source not in makers:
        raise CommandError(
            f"unknown source {printable(source)!r} in --arch {printable(name)}; "
            "give an open_clip name, timm:NAME or torchvision:NAME"
        )
    # Libraries warn of missing weights, which are about to be loaded.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return makers[source](short).eval()
    finally:
        logging.disable(previous)


def _check_name(name: str, known: Sequence[str], source: str) -> None:
    if name not in known:
        near = suggest(name, known)
        others = "" if near else f"; it knows {len(known):,}, for example {known[0]}"
        raise CommandError(f"{source} has no architecture {printable(name)!r}{near}{others}")


def _build_open_clip(name: str) -> nn.Module:
    import open_clip

    _check_name(name, open_clip.list_models(), "open_clip")
    model: nn.Module = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    return model


def _build_timm(name: str) -> nn.Module:
    import timm

    _check_name(name.partition(".")[0], timm.list_models(), "timm")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _build_torchvision(name: str) -> nn.Module:
    import inspect

    from torchvision import models

    _check_name(name, models.list_models(), "torchvision")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    model: nn.Module = models.get_model(name, **options)
    return model
