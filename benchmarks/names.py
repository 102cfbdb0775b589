"""Is a file found from its name? Questions from history, for a reader who sees names alone.

python benchmarks/names.py              writes docs/names.md
python benchmarks/names.py --questions  prints what a reader gets: subjects and file names
"""

from __future__ import annotations

import argparse
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "names.md"
END = "cd42012"  # the last commit before files moved into rooms
COUNT = 30

# What a commit changed lies elsewhere, and git, which follows whole files, cannot see it:
# commit -> files today, and why.
BY_HAND = {
    "6782e8f": (
        ("enn_core/files/tensors.py",),
        "its writer of weights files left both files for the one that all packages use",
    ),
    "d6b3d11": (
        ("retrieval/search.py", "retrieval/queries.py"),
        "the language of queries, half of what it wrote, has a module of its own",
    ),
    "c3d14b0": (
        ("retrieval/teach/guard.py",),
        "what it changed, the encoding of protected queries, went to the guard that reads them",
    ),
}

RULE = f"""\
# Names of files

Is the file that a change needs guessed from its name? The questions are subjects of commits, the
answers the files that they changed. A reader gets the questions and the list of file names, nothing
else, and names one file for each; right is any file of the answer.

- Asked of: the commits up to {END}, oldest first as `git log` lists them, that touch one or two
  product files (`*.py` in enn_core, retrieval, neuro and apps), whatever else they touch.
- Drawn: the first {COUNT} of `random.Random(0).sample(commits, len(commits))` of whose files one is
  left today. None is left out by hand.
- Answers have today's names: git follows renamed files from the commit on. Where it cannot, the
  answer says why.

`benchmarks/names.py` writes this page; with `--questions` it prints what the reader gets.

Two readers were right first for 17 and 16 of the {COUNT}, a third one with the flat folders of
{END} for 15; of the other 86 commits one reader each was right for 56 (rooms) and 53 (flat),
`names.csv`. So rooms help little where a subject is all there is to go by: of the questions that
both missed, eight speak of something else than the product file that changed (3, 8, 10, 14, 18,
19, 25, 27).
"""


@dataclass(frozen=True)
class Commit:
    """A commit: its short hash, its subject, and (status, old name, new name) of its files."""

    hash: str
    subject: str
    files: tuple[tuple[str, str, str], ...]

    @property
    def product(self) -> list[tuple[str, str]]:
        """(status, name) of the product files that it touches."""
        return [(status, new) for status, _, new in self.files if is_product(new)]


def is_product(name: str) -> bool:
    return name.startswith(("enn_core/", "retrieval/", "neuro/", "apps/")) and name.endswith(".py")


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), "-c", "diff.renameLimit=10000", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def history() -> list[Commit]:
    """All commits, oldest first."""
    # -B: a file that moved is followed even if another one has its old name now.
    form = ("--reverse", "--no-merges", "--abbrev=7", "--format=%x00%h%x09%s")
    commits = []
    for text in git("log", *form, "--name-status", "-M", "-B").split("\0")[1:]:
        head, *lines = text.strip().splitlines()
        rows = [line.split("\t") for line in lines if line]
        hash_, _, subject = head.partition("\t")
        commits.append(Commit(hash_, subject, tuple((r[0][0], r[1], r[-1]) for r in rows)))
    return commits


def name_today(name: str, later: list[Commit]) -> str | None:
    """Where a file is after some commits; None if it is gone."""
    for commit in later:
        for status, old, new in commit.files:
            if old == name and status in "RC":
                name = new
                break
            if old == name and status == "D":
                return None
    return name


def drawn() -> list[tuple[Commit, list[str]]]:
    """The commits asked for, with today's names of the product files that they touched."""
    commits = history()
    end = [commit.hash for commit in commits].index(END) + 1
    asked = [n for n, commit in enumerate(commits[:end]) if 1 <= len(commit.product) <= 2]
    rows = []
    for n in random.Random(0).sample(asked, len(asked)):
        touched = [name for status, name in commits[n].product if status != "D"]
        names = [name_today(name, commits[n + 1 :]) for name in touched]
        if left := [name for name in names if name]:
            rows.append((commits[n], left))
    return rows[:COUNT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", action="store_true", help="print questions and file names")
    args = parser.parse_args()
    rows = drawn()
    questions = [f"{n}. {commit.subject}" for n, (commit, _) in enumerate(rows, 1)]
    if args.questions:
        print("\n".join([*questions, "", *filter(is_product, git("ls-files").splitlines())]))
        return
    answers = []
    for n, (commit, names) in enumerate(rows, 1):
        right, why = BY_HAND.get(commit.hash, (names, ""))
        files = ", ".join(f"`{name}`" for name in right)
        answers.append(f"{n}. {commit.hash}: {files}{why and f' ({why})'}")
    parts = [RULE, "## Questions\n", *questions, "\n## Answers\n", *answers]
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
