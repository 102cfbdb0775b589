"""Galleries for simulated users: pictures as vectors, concepts, and other words for them.

Vectors of pictures and texts are kept in the system's temporary folder, by the model's weights.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
from feedback_protocol import Concept, concepts

from retrieval.datasets.captioned import load_karpathy
from retrieval.images import decode
from retrieval.index import snapshot
from retrieval.index.catalog import Catalog, Entry
from retrieval.index.eigen_index import EigenIndex
from retrieval.index.writer import ANN_FROM
from retrieval.model.retrieval_model import RetrievalModel

# Other words for CIFAR-10's classes, with the article that their query has.
CIFAR = {
    "an airplane": ("a jet in the sky", "an aircraft on a runway", "a flying plane"),
    "an automobile": ("a car on the road", "a sedan", "a sports car"),
    "a bird": ("a sparrow", "an ostrich in the grass", "an animal with feathers and a beak"),
    "a cat": ("a kitten", "a feline", "a pet with whiskers"),
    "a deer": ("an elk in the woods", "a stag with antlers", "a fawn"),
    "a dog": ("a puppy", "a terrier", "a canine"),
    "a frog": ("a toad", "an amphibian", "a green animal that jumps and croaks"),
    "a horse": ("a pony", "someone riding a stallion", "a mare in a pasture"),
    "a ship": ("a boat on the water", "a cargo vessel at sea", "an ocean liner"),
    "a truck": ("a lorry", "a fire engine", "a large vehicle that carries goods"),
}


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures with what users may look for among them.

    Attributes:
        name: for the tables.
        pictures: N files, or their bytes.
        vectors: (N, r) float32, as an index stores them.
        concepts: what users look for.
        paraphrases: by concept, other words for it.
        captions: M texts, each of the picture in `owners` (M,); empty if there are none.
        texts: coordinates of texts.
    """

    name: str
    pictures: Sequence[Path | bytes]
    vectors: np.ndarray
    concepts: list[Concept]
    paraphrases: dict[str, Sequence[str]]
    captions: Sequence[str]
    owners: np.ndarray
    texts: Texts


@dataclass
class Texts:
    """Coordinates of texts, (r,) float64 each, encoded once."""

    model: RetrievalModel
    known: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file = cache_folder(self.model) / "texts.npz"
        if self.file.exists():
            with np.load(self.file) as kept:
                self.known = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """(n, r) float64."""
        texts = list(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in self.known]
        if missing:
            self.known.update(zip(missing, self.model.text_vectors(missing), strict=True))
            vectors = np.stack(list(self.known.values()))
            np.savez(self.file, texts=np.array(list(self.known)), vectors=vectors)
        rows = [self.known[text] for text in texts]
        return np.array(rows, np.float64).reshape(len(rows), self.model.dim)


def cache_folder(model: RetrievalModel) -> Path:
    """Where vectors of this model are kept between runs."""
    name = f"eigen-suite-benchmarks-{model.weights_hash[:12]}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(exist_ok=True)
    return folder


def flickr8k(
    texts: Texts,
    data: Path,
    split: str,
    limit: int | None = None,
    *,
    chosen: np.ndarray | None = None,
    name: str = "",
) -> Gallery:
    """Flickr8k with the concepts of its captions: all, the first ones, or the chosen pictures."""
    whole = load_karpathy(
        data / "flickr8k" / "dataset_flickr8k.json", data / "flickr8k" / "images", split
    )
    places = np.arange(len(whole.images))[:limit] if chosen is None else np.sort(chosen)
    pictures = [whole.images[i] for i in places]
    kept = np.isin(whole.image_of_caption, places)
    captions = [caption for caption, keep in zip(whole.captions, kept, strict=True) if keep]
    owners = np.searchsorted(places, whole.image_of_caption[kept])
    name = name or f"Flickr8k {split}"
    found = concepts(captions, owners, len(pictures))
    paraphrases = json.loads((data / "feedback" / "paraphrases.json").read_text("utf-8"))
    texts([*captions, *_queries(found), *chain(*paraphrases.values())])
    return Gallery(
        name=name,
        pictures=pictures,
        vectors=_vectors(texts.model, name, pictures),
        concepts=found,
        paraphrases=paraphrases,
        captions=captions,
        owners=owners,
        texts=texts,
    )


def cifar10(texts: Texts, data: Path, split: str, limit: int | None = None) -> Gallery:
    """Small pictures of ten classes, `limit` of each; the classes are the concepts."""
    pictures: list[bytes] = []
    classes: list[int] = []
    with zipfile.ZipFile(data / "cifar10_12k.zip") as file:
        for number, name in enumerate(CIFAR):
            folder = f"{split}/{name.split()[1]}/"
            names = sorted(each for each in file.namelist() if each.startswith(folder))[:limit]
            pictures += [file.read(each) for each in names]
            classes += [number] * len(names)
    is_of = np.array(classes)[None] == np.arange(len(CIFAR))[:, None]
    name = f"CIFAR-10 {split}"
    found = [Concept(word, rows) for word, rows in zip(CIFAR, is_of, strict=True)]
    texts([*_queries(found), *chain(*CIFAR.values())])
    return Gallery(
        name=name,
        pictures=pictures,
        vectors=_vectors(texts.model, name, pictures),
        concepts=found,
        paraphrases=dict(CIFAR),
        captions=[],
        owners=np.empty(0, np.int64),
        texts=texts,
    )


def words(text: str) -> set[str]:
    """The words of a text, as concepts count them."""
    return set(re.findall(r"[a-z]+", text.lower()))


def pixels(model: RetrievalModel, pictures: Sequence[Path | bytes]) -> np.ndarray:
    """(N, H, W, 3) uint8."""
    prepare = model.preprocess
    return np.stack([prepare(decode(each, draft_size=prepare.draft_size)) for each in pictures])


def _vectors(model: RetrievalModel, name: str, pictures: Sequence[Path | bytes]) -> np.ndarray:
    file = cache_folder(model) / f"{name} {len(pictures)}.npy".replace(" ", "-")
    if not file.exists():
        parts = [pictures[start : start + 64] for start in range(0, len(pictures), 64)]
        np.save(file, np.concatenate([model.image_vectors(pixels(model, p)) for p in parts]))
    return np.load(file)


def _queries(found: Iterable[Concept]) -> list[str]:
    return [concept.query for concept in found]


def make_index(
    folder: Path, model: RetrievalModel, count: int, vectors: Iterable[np.ndarray]
) -> None:
    """An index of vectors (rows, r), in blocks, as an update would publish it; ids count from 1."""
    EigenIndex.create(folder, model).close()
    flat, ann = "vectors-1.faiss", None
    digests = snapshot.write(folder, flat, np.arange(1, count + 1), iter(vectors), model.dim)
    if count >= ANN_FROM:
        ann = "ann-1.faiss"
        exact = snapshot.Snapshot(folder, flat, None, model.dim, digests)
        digests = replace(digests, ann=snapshot.build_ann(folder, ann, exact))
    with closing(Catalog.open(folder, write=True)) as catalog, catalog.writing():
        for number in range(count):
            catalog.put(Entry(0, f"{number:07d}.jpg"))
        catalog.commit_snapshot(flat, ann, digests.packed, 1)
