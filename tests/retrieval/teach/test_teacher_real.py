"""Five clicks on the sample gallery with the shipped model, remembered in other words."""

from __future__ import annotations

import numpy as np
import pytest
from places import GALLERY

import retrieval

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rule", ["lookup", "adapter", "local"])
def test_five_clicks_are_remembered_in_other_words(tmp_path, monkeypatch, rule):
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    model = retrieval.load()
    with retrieval.EigenIndex.create(tmp_path / "index", model, root=GALLERY) as index:
        index.update(GALLERY, model)

    def places(searcher, words, names, taught):
        found = searcher.search(words, k=len(searcher.index), taught=taught)
        return np.mean(
            [i for i, hit in enumerate(found) if any(name in hit.path.name for name in names)]
        )

    castles = ["castle", "carcassonne", "chambord", "chenonceau"]
    with retrieval.open_index(tmp_path / "index", model, profile="me") as photos:
        hits = photos.search("an old building", k=60)
        good = [h.id for h in hits if any(name in h.path.name for name in castles)][:3]
        bad = [h.id for h in hits if not any(name in h.path.name for name in castles)][:2]
        lesson = photos.teach("an old building", good, bad, rule=rule)
        assert lesson.refused is None
        assert lesson.overlap > 0.9
        assert lesson.seconds < 60
    with retrieval.open_index(tmp_path / "index", model, profile="me") as photos:
        for words in ("an old building", "historic architecture"):
            before, after = (places(photos, words, castles, taught) for taught in (False, True))
            assert after < before
        for words in ("a dog", "a bowl of fruit"):
            plain, taught = (
                [hit.id for hit in photos.search(words, k=10, taught=each)]
                for each in (False, True)
            )
            assert len(set(plain) & set(taught)) >= 8
