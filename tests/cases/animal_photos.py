"""Photos of animals, and what is taught on them by tests of `enn search teach` and others."""

from __future__ import annotations

from pathlib import Path

from cli_cases import document

__all__ = ["BAD", "GOOD", "OTHERS", "QUERY", "everything_below", "ranking"]

QUERY = "animal with horns"
GOOD, BAD = ("gc_bison", "gc_nubian_ibex", "gc_mountain_goat"), ("gc_discus_fish", "gc_goldfish")
OTHERS = ("gc_calf", "gc_moose", "gc_panda", "gc_pika", "gc_boarfish", "gc_kangaroo", "gc_alpaca")
OTHERS += ("gc_duck", "gc_mars", "gc_kitten_on_box", "gc_giraffe_head", "gc_horse_herd")


def ranking(query: str = QUERY, *options: str) -> list[int]:
    return [hit["id"] for hit in document("query", query, "-k", "99", *options)["results"]]


def everything_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
