"""Settings of training runs on the command line, and in their directories."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.cli.terminal import CommandError

__all__ = ["SETTINGS", "changed", "json_value", "keep_settings", "plain_json"]

# The settings of a run, in its directory: a configuration file like any other.
SETTINGS = "settings.json"


def changed(given: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Settings with `name=value` applied; `a.b=value` changes one entry of an object."""
    result = dict(given)
    for change in changes:
        name, equals, text = change.partition("=")
        if name in ("recipe", "description"):
            raise CommandError(f"--set {name}: {name} is no setting; give another --config")
        if not equals or not name:
            raise CommandError(f"--set needs NAME=VALUE, as in lr=1e-3; got {change!r}")
        value = json_value(text)
        outer, dot, inner = name.strip().partition(".")
        if dot:
            held = result.get(outer, {})
            if not isinstance(held, Mapping):
                raise CommandError(f"--set {name}: {outer} is {held!r}, it has no entries")
            result[outer] = {**held, inner: value}
        else:
            result[outer] = value
    return result


def json_value(text: str) -> Any:
    """JSON, else the text itself: `--set rule=local` needs no quotes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def keep_settings(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run into its directory, which is made."""
    from enn_core.files.atomic import replacing

    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def plain_json(value: Any) -> Any:
    """What JSON can say: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
