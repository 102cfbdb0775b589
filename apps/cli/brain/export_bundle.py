"""`enn brain export-bundle`: a model as a MONAI bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apps.cli.brain.group import BrainModelOption, load_brain
from apps.cli.options import ForceOption
from apps.cli.terminal import EXIT_OK, CommandError, absolute, emit, printable, quote

__all__ = ["app", "export_bundle"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "export-bundle",
    epilog="""\b
Examples:
  enn brain export-bundle brain-age-bundle
  enn brain export-bundle mine --model runs/mine/model.safetensors

\b
Writes configs/metadata.json, configs/inference.json, models/model.pt, LICENSE and docs.
It runs with monai.bundle where this package is installed.

\b
Exit codes: 0 ok, 2 user error.""",
)
def export_bundle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    model: BrainModelOption = None,
    force: ForceOption = False,
) -> int:
    """Write a model as a MONAI bundle."""
    from neuro.age.predict import shipped_weights
    from neuro.bundle import write_bundle

    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{quote(folder)} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise CommandError(f"{quote(folder)} is not empty; give another folder, or --force")
    brain = load_brain(model)
    card = ""
    if model is None:
        card = shipped_weights().with_name("README.md").read_text(encoding="utf-8")
    write_bundle(brain.model, absolute(folder), card)
    emit(f"MONAI bundle in {printable(folder)}")
    return EXIT_OK
