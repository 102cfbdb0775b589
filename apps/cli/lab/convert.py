"""`enn convert` and `enn fuse`: weights files to eigen form and back."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.cli.terminal import (
    EXIT_OK,
    CommandError,
    Interrupted,
    ProgressLine,
    emit,
    emit_json,
    note,
    printable,
    quote,
    refuse_overwrite,
    size,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONVERT_EPILOG", "FUSE_EPILOG", "convert", "fuse"]

CONVERT_EPILOG = """\b
Examples:
  enn convert vit.pt vit-enn.safetensors --arch ViT-B-16
  enn convert r50.safetensors r50-enn.safetensors --arch timm:resnet50
  enn convert r50.pth r50-enn.safetensors --arch torchvision:resnet50
  enn convert net.pt net-enn.safetensors                 any network, by names alone
  enn convert net.pt net-enn.safetensors --exclude head --exclude "*.attn.*"
  enn convert new.pt new-enn.safetensors --like old-enn.safetensors

\b
Without --arch and --like the network is not known: every tensor called *.weight of two
or more dimensions is factored as (out, rest), except tables whose name ends in
"embedding" or the like and depthwise convolutions; grouped convolutions are factored as
a whole. Exact too, but name the architecture if you can.
Exit codes: 0 ok, 2 user error; then nothing is written."""

FUSE_EPILOG = """\b
Examples:
  enn fuse vit-enn.safetensors vit.safetensors
  enn fuse trained.pt plain.safetensors --arch timm:resnet50
  enn fuse trained.pt plain.safetensors --like original.safetensors

\b
Exit codes: 0 ok, 2 user error; then nothing is written."""

_InputArgument = Annotated[
    Path, typer.Argument(metavar="IN", help="State dict: .safetensors, .pt, .pth, .bin or .ckpt.")
]
_OutputArgument = Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")]
_ArchOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Architecture: an open_clip name, timm:NAME or torchvision:NAME.",
        show_default=False,
    ),
]
_ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite the output file.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def convert(
    source: _InputArgument,
    output: _OutputArgument,
    arch: _ArchOption = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Factor what is factored in this eigen file.", show_default=False
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Factor only these: a name (with all below it) or a pattern; repeatable.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Leave these plain; wins over --include.", show_default=False
        ),
    ] = None,
    force: _ForceOption = False,
    json: _JsonOption = False,
) -> int:
    """Write a plain checkpoint as an eigen state dict, exactly.

    Every weight W is replaced by its factors Q, Lambda, P with W = Q diag(Lambda) P^T (float64
    SVD), under the names that the layers of enn_core use. All names and shapes must fit the
    architecture. Prints which weights were factored, which stayed plain and why.
    """
    _check(source, output, arch, like, force)
    if like is not None and (include or exclude):
        raise CommandError("--like already says what to factor; leave --include and --exclude out")
    from apps.cli.lab.architectures import build
    from enn_core import state_dicts
    from enn_core.files.tensors import write_tensors

    started = time.perf_counter()
    try:
        with ProgressLine() as line:
            done = state_dicts.convert(
                _read(source),
                model=build(arch) if arch is not None else None,
                what=arch or "",
                like=_read(like) if like is not None else None,
                include=include or (),
                exclude=exclude or (),
                progress=line.show,
            )
            write_tensors(output, done.tensors, done.metadata)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    seconds = time.perf_counter() - started
    if json:
        emit_json(
            {
                "input": str(source),
                "output": str(output),
                "parameters_plain": done.report.parameters_fused,
                "parameters_eigen": done.report.parameters_stored,
                "largest_relative_difference": done.error,
                "seconds": round(seconds, 3),
                "weights": [asdict(row) for row in (*done.report.converted, *done.report.plain)],
            }
        )
        return EXIT_OK
    emit(printable_lines(str(done.report)))
    emit(f"largest difference after fusing: {done.error:.1e} of the weight's largest entry")
    emit(f"written to {printable(output)} ({size(output.stat().st_size)}, {seconds:.1f} s)")
    if not done.report.converted:
        note("warning: no weight was factored")
    return EXIT_OK


def fuse(
    source: _InputArgument,
    output: _OutputArgument,
    arch: _ArchOption = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A plain file of the same network, for names and shapes.",
            show_default=False,
        ),
    ] = None,
    force: _ForceOption = False,
    json: _JsonOption = False,
) -> int:
    """Write an eigen state dict as a plain checkpoint.

    The factors are multiplied out in float64. A file that `enn convert` wrote remembers the plain
    names, shapes and types; for any other give --arch or --like. All of them must fit.
    """
    _check(source, output, arch, like, force)
    from apps.cli.lab.architectures import build
    from enn_core import state_dicts
    from enn_core.files.tensors import read_metadata, write_tensors

    try:
        tensors = _read(source)
        metadata = read_metadata(source) if source.suffix == ".safetensors" else {}
        template = _read(like) if like is not None else None
        if arch is not None:
            template = build(arch).state_dict()
        shapes, types = state_dicts.plain_shapes(tensors, metadata, template)
        where = arch or ("the file after --like" if like is not None else "its own metadata")
        plain = state_dicts.fuse(tensors, shapes, types, where)
        write_tensors(output, plain)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written") from None
    counts = {
        "fused": sum(key not in tensors for key in plain),
        "tensors": len(plain),
        "parameters": sum(value.numel() for value in plain.values()),
    }
    if json:
        emit_json({"input": str(source), "output": str(output), **counts})
    else:
        emit(
            f"{counts['fused']:,} of {counts['tensors']:,} tensors fused, "
            f"{counts['parameters']:,} numbers"
        )
        emit(f"written to {printable(output)} ({size(output.stat().st_size)})")
    return EXIT_OK


def printable_lines(text: str) -> str:
    """Several lines, each made printable: tensor names come from files."""
    return "\n".join(printable(line) for line in text.splitlines())


def _check(source: Path, output: Path, arch: str | None, like: Path | None, force: bool) -> None:
    """What can be said before anything is read."""
    if arch is not None and like is not None:
        raise CommandError("--arch and --like exclude each other; give one of them")
    if not source.is_file():
        raise CommandError(f"there is no file {quote(source)}; give a .safetensors or .pt file")
    if output.suffix != ".safetensors":
        raise CommandError(
            f"{quote(output)} must end in .safetensors, the only kind that is written"
        )
    if output.exists() and output.samefile(source):
        raise CommandError(f"{quote(output)} is the input; give another name for the output")
    refuse_overwrite(output, force)


def _read(path: Path) -> dict[str, Tensor]:
    from retrieval.model.checkpoints import read_tensors

    if not path.is_file():
        raise CommandError(f"there is no file {quote(path)}; give a .safetensors or .pt file")
    return read_tensors(path)
