"""CLIP_benchmark and ours side by side: the same recalls, each reads the other's files."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import GALLERY

from retrieval.datasets.captioned import load_webdataset
from retrieval.datasets.protocols import open_dataset
from retrieval.eval.recall import evaluate, measure, write_result
from retrieval.eval.report import write_table
from retrieval.model.loading import load
from retrieval.model.retrieval_model import RetrievalModel

open_clip = pytest.importorskip("open_clip")
for package in ("clip_benchmark", "requests"):  # it needs requests and does not say so
    pytest.importorskip(package, reason=f"pip install {package} (the extra [dev] has it)")

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """Name of an architecture small enough for a test."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "enn-tiny-parity.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return "enn-tiny-parity"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder in CLIP_benchmark's Flickr30k form: photos of several shapes, three captions."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["image,caption"]
    for number, file in enumerate(sorted(GALLERY.glob("*.webp"))[:60]):
        with Image.open(file) as image:
            # Large enough that a JPEG decoder could be asked to shrink them.
            width = 300 + 70 * (number % 9)
            image.convert("RGB").resize((width, 500)).save(folder / f"{number}.jpg", quality=95)
        word = file.stem.replace("_", " ")
        lines += [
            f"{number}.jpg,{text}" for text in (word, f"a photo of {word}, {number}", "a photo")
        ]
    (folder / "flickr30k_test_karpathy.txt").write_text("\n".join(lines) + "\n")
    return folder


def random_model(arch: str, folder: Path) -> tuple[RetrievalModel, torch.nn.Module, object]:
    """The same random weights in ours and in open_clip."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model, _, preprocess = open_clip.create_model_and_transforms(arch)
    file = folder / "random.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return load(arch, checkpoint=file, runtime="torch"), model.eval(), preprocess


def theirs(arch: str, model, preprocess, photos: Path, ks: list[int]) -> dict[str, float]:
    """As `clip_benchmark eval --dataset flickr30k --no_amp` does it."""
    from clip_benchmark.datasets.builder import get_dataset_collate_fn
    from clip_benchmark.datasets.flickr import Flickr
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate as measure

    data = Flickr(str(photos), str(photos / "flickr30k_test_karpathy.txt"), transform=preprocess)
    loader = torch.utils.data.DataLoader(
        data, batch_size=16, shuffle=False, collate_fn=get_dataset_collate_fn("flickr30k")
    )
    tokenizer = open_clip.get_tokenizer(arch)
    return measure(model, loader, tokenizer, "cpu", amp=False, recall_k_list=ks)


def compare(arch: str, photos: Path, folder: Path, **options) -> dict:
    ours, model, preprocess = random_model(arch, folder)
    file = photos / "flickr30k_test_karpathy.txt"
    result = evaluate(ours, open_dataset(str(file), images=photos, **options), batch_size=7)
    expected = theirs(arch, model, preprocess, photos, [1, 5, 10])
    assert len(expected) == 6
    for name, value in expected.items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-4), name
    return result


def without_ties(photos: Path, folder: Path, count: int) -> Path:
    """The set without the caption that all images share: their topk leaves ties undefined."""
    lines = (photos / "flickr30k_test_karpathy.txt").read_text().splitlines()
    kept = [line for line in lines if not line.endswith(",a photo")][: 1 + 2 * count]
    for line in kept[1:]:
        name = line.partition(",")[0]
        if not (folder / name).exists():
            (folder / name).symlink_to(photos / name)
    (folder / "flickr30k_test_karpathy.txt").write_text("\n".join(kept) + "\n")
    return folder


def test_recalls_are_those_of_clip_benchmark(tiny, photos, tmp_path):
    result = compare(tiny, without_ties(photos, tmp_path, 60), tmp_path)
    assert (result["n_images"], result["n_captions"]) == (60, 120)
    assert 0 < result["metrics"]["image_retrieval_recall@10"] < 1


def test_large_photos_give_the_vectors_that_open_clip_gives(tiny, photos, tmp_path):
    ours, model, preprocess = random_model(tiny, tmp_path)
    data = open_dataset(str(photos / "flickr30k_test_karpathy.txt"), images=photos, limit=12)
    found = measure(ours, data, bootstrap=0)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in data.images])
        z = model.encode_image(pixels, normalize=True).double().numpy()
        tokens = open_clip.get_tokenizer(tiny)(list(data.captions))
        t = model.encode_text(tokens, normalize=True).double().numpy()
    images, texts = found.images.astype(float), found.texts.astype(float)
    assert abs(images @ images.T - z @ z.T).max() < 1e-6  # 1e-3 where JPEGs are shrunk
    assert abs(texts @ images.T - t @ z.T).max() < 1e-6


@pytest.mark.slow
def test_recalls_are_those_of_clip_benchmark_for_vit_b16(photos, tmp_path):
    result = compare("ViT-B-16", without_ties(photos, tmp_path, 40), tmp_path)
    assert (result["n_images"], result["dim"]) == (40, 512)


def test_their_build_reads_our_results_and_ours_theirs(tiny, photos, tmp_path):
    from clip_benchmark.cli import main_build

    ours, model, preprocess = random_model(tiny, tmp_path)
    data = open_dataset(str(photos / "flickr30k_test_karpathy.txt"), images=photos, limit=20)
    result = evaluate(ours, data, (5,), bootstrap=10)
    write_result(result, tmp_path / "ours.json")
    metrics = theirs(tiny, model, preprocess, photos, [5])
    other = {"dataset": "flickr30k", "model": tiny, "pretrained": "x", "metrics": metrics}
    other |= {"task": "zeroshot_retrieval", "language": "en"}
    (tmp_path / "theirs.json").write_text(json.dumps(other))
    files = [str(tmp_path / "ours.json"), str(tmp_path / "theirs.json")]
    main_build(Namespace(files=files, output=str(tmp_path / "b.csv")))
    write_table(files, tmp_path / "a.csv")
    tables = []
    for name in ("a.csv", "b.csv"):
        with (tmp_path / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append(sorted(rows, key=itemgetter("model_fullname")))
    assert tables[0] == tables[1]
    first = next(row for row in tables[0] if row["protocol"])
    assert float(first["text_retrieval_recall@5"]) == result["metrics"]["text_retrieval_recall@5"]


def test_their_tars_are_read_as_they_read_them(photos, tmp_path):
    pytest.importorskip("webdataset", reason="comes with clip-benchmark")
    import io
    import tarfile

    from clip_benchmark.datasets.builder import build_wds_dataset

    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    (tmp_path / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * 3, shard * 3 + 3):
                tar.add(photos / f"{number}.jpg", f"s{number:04d}.jpg")
                text = f"caption {number}\nzweite Ä {number}\n".encode()
                about = tarfile.TarInfo(f"s{number:04d}.txt")
                about.size = len(text)
                tar.addfile(about, io.BytesIO(text))
    ours = load_webdataset(tmp_path)
    expected = list(build_wds_dataset("x", lambda image: image, "test", str(tmp_path)))
    assert [c for _, texts in expected for c in texts] == list(ours.captions)
    assert ours.image_of_caption.tolist() == [i for i in range(6) for _ in range(2)]
    for image, (photo, _) in zip(ours.images, expected, strict=True):
        assert Image.open(io.BytesIO(image.read())).size == photo.size
