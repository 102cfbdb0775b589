"""`enn search export-model`: a model as plain files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import ModelName, PretrainedOption, load_model
from apps.cli.terminal import EXIT_OK, CommandError, emit, emit_json, printable, quote, size

__all__ = ["app", "export_model"]

app = typer.Typer(rich_markup_mode=None)

# How each form is read, for the last line of the report.
_READ = {
    "open_clip": "open_clip.create_model_and_transforms('local-dir:{}')",
    "transformers": "transformers.CLIPModel.from_pretrained('{}')",
    "onnx": "onnxruntime.InferenceSession('{}/image.onnx')",
}


@app.command(
    "export-model",
    epilog="""\b
Examples:
  enn search export-model longclip-b16 --model long-eclip-b16 \\
      --pretrained longclip-B.pt --to transformers
  enn search export-model towers --model ViT-B-32:laion2b_s34b_b79k --to onnx

\b
open_clip: open_clip_config.json and open_clip_model.safetensors; loads here, too
(--model FOLDER). transformers: a CLIPModel with image processor and tokenizer.
onnx: image.onnx (uint8 pixels, resized and cropped) and text.onnx (token ids), both to
unit vectors, compared with torch before they are kept; needs eigen-suite[onnx].
Eigen factors are multiplied out, Long-CLIP's two position tables become one: nothing of
this package is needed to read the files.
Exit codes: 0 ok, 2 user error (no such model, the folder is not empty, ...).""",
)
def export_model(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to make; it may exist if it is empty.")
    ],
    model: ModelName,
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORM", help="open_clip, transformers or onnx."),
    ] = "open_clip",
    pretrained: PretrainedOption = None,
    json: JsonOption = False,
) -> int:
    """Write a model as plain files for open_clip, transformers or ONNX runtimes."""
    from retrieval.model.export import FORMS, check_target, export

    # Before a large model is read.
    if to not in FORMS:
        raise CommandError(f"--to must be one of {', '.join(FORMS)}, got {to!r}")
    check_target(folder)
    loaded = load_model(model, pretrained)
    target = export(loaded, folder, to)
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    if json:
        emit_json({"model": loaded.name, "form": to, "folder": str(target), "files": files})
        return EXIT_OK
    emit(f"{printable(loaded.name)} written to {quote(target)} for {to}")
    for name, count in files.items():
        emit(f"  {name}  {size(count)}")
    emit(f"read it with {_READ[to].format(printable(target))}")
    return EXIT_OK
