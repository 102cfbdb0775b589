"""`enn search caption`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from apps.cli.options import JsonOption
from apps.cli.search.group import ModelOption, PretrainedOption, load_model, note_cut
from apps.cli.search.query import check_picture, naming
from apps.cli.terminal import EXIT_OK, CommandError, emit, emit_json, printable, quote

__all__ = ["app", "caption"]

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "caption",
    epilog="""\b
Examples:
  enn search caption photo.jpg --captions list.txt
  enn search caption photo.jpg --captions list.txt -k 1 --json
  printf 'a cat\\na dog\\n' | enn search caption photo.jpg --captions -

\b
Exit codes: 0 ok, 2 user error.""",
)
def caption(
    image: Annotated[Path, typer.Argument(metavar="PHOTO", help="A picture.")],
    captions: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Text file (UTF-8), one caption a line; - reads standard input."
        ),
    ],
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Number of results.")] = 5,
    model: ModelOption = None,
    pretrained: PretrainedOption = None,
    json: JsonOption = False,
) -> int:
    """Find the captions of a list that fit a picture best.

    Prints line number, score and caption, best first. Needs no index.
    """
    from retrieval.search import rank_captions

    check_picture(image)
    lines = _read_captions(captions)
    loaded = load_model(model, pretrained)
    with naming(image):
        ranked = rank_captions(loaded, image, [text for _, text in lines], k=k)
    found = [(lines[i][0], score, text) for i, score, text in ranked]
    note_cut(loaded, "a caption")
    if json:
        emit_json(
            {
                "image": str(image),
                "model": loaded.name,
                "captions": len(lines),
                "results": [
                    {"line": line, "score": round(score, 6), "caption": text}
                    for line, score, text in found
                ],
            }
        )
    else:
        for line, score, text in found:
            emit(f"{line:>7}  {score:7.4f}  {printable(text)}")
    return EXIT_OK


def _read_captions(file: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines that are not blank."""
    name = "standard input" if str(file) == "-" else quote(file)
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CommandError(
            f"cannot read {name}: {error.strerror}; give a text file, one caption a line"
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CommandError(f"{name} is not UTF-8 text (line {line}); save it as UTF-8") from None
    # Not splitlines(): it also cuts at characters that a caption may hold.
    lines = [(i, line.strip()) for i, line in enumerate(text.split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line]
    if not lines:
        raise CommandError(f"{name} holds no captions; write one a line")
    return lines
