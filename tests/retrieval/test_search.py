"""Searching: the query language, combinations, and ranking like brute force."""

from __future__ import annotations

import doctest
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_cases import TinyTestModel
from PIL import Image

from retrieval import search
from retrieval.index.eigen_index import EigenIndex, IndexMismatch, NoIndex
from retrieval.queries import Part, QueryError, parse_query
from retrieval.search import Searcher, open_index


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a dog in the snow", [("a dog in the snow", 1)]),
        ("2:red car", [("red car", 2)]),
        ("0.5: red car", [("red car", 0.5)]),
        ("-person", [("person", -1)]),
        ("dog -person", [("dog", 1), ("person", -1)]),
        ("dog - two people", [("dog", 1), ("two people", -1)]),
        ("2:old dog + snow - person", [("old dog", 2), ("snow", 1), ("person", -1)]),
        ("dog -2:person", [("dog", 1), ("person", -2)]),
        ("- 2:person + dog", [("person", -2), ("dog", 1)]),
        ("a well-known x-ray - t-shirt", [("a well-known x-ray", 1), ("t-shirt", -1)]),
        ("a train at 10:30", [("a train at 10:30", 1)]),
        ("10:30 train", [("10:30 train", 1)]),
        ('"rock - paper" - scissors', [("rock - paper", 1), ("scissors", -1)]),
        ('2:"3:4 ratio"', [("3:4 ratio", 2)]),
        ('sign that says "stop - now" at night', [("sign that says stop - now at night", 1)]),
        ('12" record + player', [("12 record", 1), ("player", 1)]),
        ("C++ book", [("C++ book", 1)]),
        ("  two   spaces \n here ", [("two spaces here", 1)]),
        ("dog + + cat", [("dog", 1), ("cat", 1)]),
        ("Katze + 猫 - Hündin", [("Katze", 1), ("猫", 1), ("Hündin", -1)]),
        ("note: blue", [("note: blue", 1)]),
    ],
)  # fmt: skip
def test_queries_are_split_as_documented(text, parts):
    assert parse_query(text) == [Part(t, float(w)) for t, w in parts]


@pytest.mark.parametrize("text", ["", "  ", "+", "-", " - ", '""', "2:", "- + -"])
def test_empty_queries_are_refused(text):
    with pytest.raises(QueryError, match="empty"):
        parse_query(text)


@pytest.mark.parametrize("text", ["0:dog", "1001:dog"])
def test_weights_out_of_range_are_refused(text):
    with pytest.raises(QueryError, match="out of range"):
        parse_query(text)


@given(st.text(max_size=60))
def test_any_text_is_either_parsed_or_refused(text):
    try:
        parts = parse_query(text)
    except QueryError:
        return
    assert parts
    assert all(part.text.strip() == part.text != "" and part.weight for part in parts)


@given(st.lists(st.sampled_from(["dog", "cat", "x-ray", "snow"]), min_size=1, max_size=5))
def test_plain_words_are_one_part(words):
    assert parse_query(" ".join(words)) == [Part(" ".join(words))]


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(search).failed == 0


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """40 pictures of coloured noise in an indexed folder whose name needs care."""
    root = tmp_path_factory.mktemp("my photos ü")
    rng = np.random.default_rng(0)
    for i in range(40):
        colour = rng.integers(0, 256, 3)
        noise = rng.integers(0, 60, (24, 32, 3))
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(root / f"{i}.png")
    model = TinyTestModel()
    with EigenIndex.create(root / ".enn-index", model, root=root) as index:
        index.update(root, model)
    return root


@pytest.fixture
def searcher(gallery):
    with open_index(gallery, TinyTestModel()) as opened:
        yield opened


def all_vectors(searcher: Searcher) -> tuple[np.ndarray, np.ndarray]:
    ids = searcher.index.ids()
    return ids, searcher.index.vectors(ids)


@settings(max_examples=30)
@given(text=st.text("abc ", min_size=1, max_size=8).filter(str.strip), k=st.integers(1, 50))
def test_one_text_ranks_like_brute_force(gallery, text, k):
    with open_index(gallery, TinyTestModel()) as searcher:
        ids, vectors = all_vectors(searcher)
        scores = vectors @ searcher.model.text_vectors([" ".join(text.split())])[0]
        order = np.lexsort((ids, -scores))[:k]
        hits = searcher.search(text, k=k)
    assert [hit.id for hit in hits] == ids[order].tolist()
    np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-6)


def test_hits_name_existing_files(searcher, gallery):
    hits = searcher.search("red", k=3)
    assert len(hits) == 3
    assert all(hit.path.is_file() and hit.path.parent == gallery for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_negative_text_ranks_backwards(searcher):
    forwards = [hit.id for hit in searcher.search("red", k=40)]
    assert [hit.id for hit in searcher.search("-red", k=40)] == forwards[::-1]


def test_an_image_finds_itself_in_every_form(searcher, gallery):
    path = gallery / "7.png"
    with Image.open(path) as picture:
        picture.load()
        forms = [path, str(path), path.read_bytes(), picture, picture.convert("RGBA")]
    for form in forms:
        best = searcher.search(image=form, k=1)[0]
        assert best.path == path
        assert best.score == pytest.approx(1, abs=1e-5)


def test_a_rotated_upload_is_turned_upright(searcher, gallery):
    with Image.open(gallery / "3.png") as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)  # to be undone by orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    for form in (buffer.getvalue(), Image.open(buffer)):
        best = searcher.search(image=form, k=1)[0]
        assert best.path.name == "3.png"
        assert best.score == pytest.approx(1, abs=1e-4)


def test_similar_leaves_the_image_itself_out(searcher):
    first = searcher.search("red", k=1)[0].id
    hits = searcher.similar(first, k=5)
    assert len(hits) == 5
    assert first not in [hit.id for hit in hits]
    ids, vectors = all_vectors(searcher)
    scores = vectors @ vectors[ids == first][0]
    scores[ids == first] = -2
    assert hits[0].id == ids[scores.argmax()]
    with pytest.raises(KeyError):
        searcher.similar(10**9)


def test_only_the_given_ids_are_ranked(searcher):
    chosen = [hit.id for hit in searcher.search("red", k=40)][10:13]
    assert [hit.id for hit in searcher.search("red", ids=chosen)] == chosen


def test_parts_of_a_combination_have_equal_say(searcher, gallery):
    """Each part's scores, on their own scale over the gallery, enter with its weight."""
    _, vectors = all_vectors(searcher)
    image = gallery / "7.png"
    q = searcher.query_vector("2:red - blue", image)
    assert np.linalg.norm(q) == pytest.approx(1, abs=1e-6)
    singles = [searcher.query_vector("red"), searcher.query_vector("blue")]
    singles.append(searcher.query_vector(image=image))
    parts = [vectors @ s / (vectors @ s).std() for s in singles]
    expected = 2 * parts[0] - parts[1] + parts[2]
    assert np.corrcoef(vectors @ q, expected)[0, 1] == pytest.approx(1, abs=1e-6)


def test_order_of_parts_and_scale_of_weights_do_not_matter(searcher):
    q = searcher.query_vector("2:red + blue - green")
    for other in ("blue + 2:red - green", "4:red + 2:blue - 2:green"):
        np.testing.assert_allclose(searcher.query_vector(other), q, atol=1e-6)


def test_parts_that_cancel_are_refused(searcher):
    with pytest.raises(QueryError, match="cancel"):
        searcher.search("red - red")


def test_nothing_to_search_for_is_refused(searcher):
    for arguments in ((), ("",), ("  ",)):
        with pytest.raises(QueryError, match="empty"):
            searcher.search(*arguments)


def test_a_gallery_of_one_image_can_be_searched(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "only.png")
    model = TinyTestModel()
    with EigenIndex.create(tmp_path / ".enn-index", model, root=tmp_path) as index:
        index.update(tmp_path, model)
    with open_index(tmp_path, model) as searcher:
        assert len(searcher.search("red + blue", image=tmp_path / "only.png")) == 1
        assert searcher.similar(searcher.search("red")[0].id) == []


def test_an_empty_index_gives_no_hits(tmp_path):
    model = TinyTestModel()
    EigenIndex.create(tmp_path / "index", model).close()
    with open_index(tmp_path / "index", model) as searcher:
        assert searcher.search("red + blue") == []


def test_new_pictures_are_found_by_an_open_searcher(tmp_path):
    model = TinyTestModel()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    with EigenIndex.create(tmp_path / ".enn-index", model, root=tmp_path) as index:
        index.update(tmp_path, model)
        with open_index(tmp_path, model) as searcher:
            assert len(searcher.search("red")) == 1
            Image.new("RGB", (20, 20), "blue").save(tmp_path / "b.png")
            index.update(tmp_path, model)
            assert len(searcher.search("red")) == 2


def test_captions_are_ranked_for_a_picture(searcher, gallery):
    captions = ["red", "green", "blue", "red"]
    ranked = searcher.caption(gallery / "1.png", captions, k=3)
    v = searcher.query_vector(image=gallery / "1.png")
    scores = searcher.model.text_vectors(captions) @ v
    order = np.argsort(-scores, kind="stable")[:3]
    assert [(i, caption) for i, _, caption in ranked] == [(i, captions[i]) for i in order]
    np.testing.assert_allclose([score for _, score, _ in ranked], scores[order], atol=1e-6)
    with pytest.raises(QueryError, match="at least one"):
        searcher.caption(gallery / "1.png", [])


def test_the_wrong_model_or_no_index_is_refused(gallery, tmp_path):
    with pytest.raises(IndexMismatch):
        open_index(gallery, TinyTestModel(seed=1))
    with pytest.raises(NoIndex):
        open_index(tmp_path)
