"""The answers of docs/names.md are files that there are."""

from __future__ import annotations

import re

from places import ROOT


def test_answers_are_files():
    page = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    questions, answers = page.split("\n## Answers\n")
    files = re.findall(r"`([^`]+\.py)`", answers)
    assert questions.count("\n30. ") == answers.count("\n30. ") == 1
    missing = [name for name in files if not (ROOT / name).is_file()]
    assert not missing, "rebuild it: python benchmarks/names.py"
