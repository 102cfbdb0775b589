"""The journal: what is written is there, by whomever, and what is forgotten is not."""

from __future__ import annotations

import numpy as np

from enn_core.feedback import Journal, latest

IDENTITY = {"weights": "0123abcd", "dim": 4}


def test_events_survive_closing(tmp_path) -> None:
    path = tmp_path / "people" / "me" / "search.sqlite"
    with Journal.open(path, identity=IDENTITY) as journal:
        before = journal.version
        with journal.writing() as writing:
            written = writing.append(
                "teach", "a dog \N{DOG}", {"good": [1, 2]}, {"c": np.float16([1, 0, 0, 0.5])}
            )
        assert journal.version > before
        assert written.seq == 1
        assert written.covers == (1,)
    with Journal.open(path, identity=IDENTITY, create=False) as journal:
        (read,) = journal.events()
        assert (read.uid, read.at, read.subject) == (written.uid, written.at, "a dog \N{DOG}")
        assert read.details == {"good": [1, 2]}
        assert read.arrays["c"].dtype == np.float16
        np.testing.assert_array_equal(read.arrays["c"], [1, 0, 0, 0.5])
        with journal.writing() as writing:
            assert writing.deactivate([1]) == 1
            assert writing.events() == []
        assert journal.events() == []
        assert [event.active for event in journal.events(active=None)] == [False]
        assert latest(journal.events(active=None)) == {}
        with journal.writing() as writing:
            writing.activate([1])
        assert latest(journal.events())["a dog \N{DOG}"].seq == 1
        assert journal.forget() == 1
        assert journal.events(active=None) == []
