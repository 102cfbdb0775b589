"""`enn search eval` and `eval-build`, with a small model: the commands around the measuring."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cli_cases import GALLERY, document, refused, run
from index_cases import TinyTestModel
from PIL import Image

from retrieval.eval import feature_cache
from retrieval.model import loading as models

pytest.importorskip("faiss")
PHOTOS = sorted(GALLERY.glob("*.webp"))[:6]


class Model(TinyTestModel):
    truncated_texts = 0


@pytest.fixture(autouse=True)
def _small_models(tmp_path, monkeypatch) -> None:
    """Models called "a" and "b"; vectors of unfinished runs below tmp_path."""

    def load(
        name: str = models.MINI, *, checkpoint: str | None = None, precision: str = "f32"
    ) -> Model:
        if name == "broken":
            raise models.ModelError("unknown model 'broken'")
        model = Model(seed=len(name + (checkpoint or "")))
        model.name = f"{name}:{checkpoint}" if checkpoint else name
        model.precision = precision
        return model

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(feature_cache, "default_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv("ENN_DATA", raising=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photos with a table of captions."""
    made = tmp_path / "set ü"
    made.mkdir()
    lines = ["image,caption"]
    for number, photo in enumerate(PHOTOS):
        with Image.open(photo) as image:
            image.convert("RGB").save(made / f"{number}.png")
        lines += [f"{number}.png,a photo of {photo.stem}", f'{number}.png,"{photo.stem}, again"']
    (made / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return made


def test_a_folder_with_everything_that_is_written(folder, tmp_path):
    out = tmp_path / "{dataset}_{model}_{protocol}.json"
    ranks, sheet = tmp_path / "{model}.parquet", tmp_path / "worst-{model}.png"
    given = ["eval", "--dataset", folder, "--model", "a", "--output", out]
    done = run(*given, "--ranks", ranks, "--failures", sheet)
    assert done.code == 0, done.err
    assert "set ü all: 6 images, 12 captions (own, all captions)" in done.out
    assert "rank: median" in done.out
    result = json.loads((tmp_path / "set_ü_a_own.json").read_text())
    assert (result["n_images"], result["n_captions"], result["seed"]) == (6, 12, 0)
    assert not (tmp_path / "cache").exists()
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    assert len(rows) == 18
    to_image = [row["rank"] for row in rows if row["direction"] == "text_to_image"]
    hits = sum(rank <= 5 for rank in to_image) / 12
    assert hits == pytest.approx(result["metrics"]["image_retrieval_recall@5"])
    assert rows[1]["caption"] == f"{PHOTOS[0].stem}, again"
    assert json.loads(table.schema.metadata[b"evaluation"])["dataset"] == "set ü"
    with Image.open(tmp_path / "worst-a.png") as picture:
        assert picture.width > 1000
    assert "--force" in refused(*given)


def test_several_models(folder, tmp_path):
    listed, out = tmp_path / "list.txt", tmp_path / "{model}_{pretrained}.json"
    listed.write_text("# models\na\n\nbb,x\nbroken\n")
    given = ["eval", "--dataset", folder, "--models", listed, "--output", out]
    done = run(*given)
    assert done.code == 1
    assert done.err == "broken: unknown model 'broken'\n"
    assert {p.name for p in tmp_path.glob("*.json")} == {"a_own.json", "bb_x.json"}
    again = run(*given, "--skip-existing")
    assert "2 results there already" in again.err
    assert again.code == 1
    (tmp_path / "a_own.json").unlink()
    listed.write_text("a\nbb,x\n")
    results = document(*given, "--skip-existing")
    assert [result["model"] for result in results] == ["a"]
    assert "would be written twice" in refused(*given[:-1], tmp_path / "r.json")
    assert "not both" in refused(*given, "--model", "a")
    listed.write_text("\n")
    assert "names no models" in refused(*given)


def test_a_result_of_something_else_is_not_skipped(folder, tmp_path):
    out = tmp_path / "r.json"
    given = ["eval", "--dataset", folder, "--model", "a", "--output", out, "--skip-existing"]
    quick = run(*given, "--limit", "2")
    assert quick.code == 0
    assert "first 2 of 6 images" in quick.out
    assert json.loads(out.read_text())["deviations"] == "first 2 of 6 images"
    assert "does not hold this evaluation" in refused(*given)
    assert run(*given, "--force").code == 0
    assert "1 result there already" in run(*given).err
    assert "does not hold this evaluation" in refused(*given, "--recall-k", "3")
    assert "does not hold this evaluation" in refused(*given, "--precision", "bf16")
    assert run(*given, "--precision", "bf16", "--force").code == 0
    assert json.loads(out.read_text())["dtype"] == "bfloat16"
    assert "1 result there already" in run(*given, "--precision", "bf16").err
    assert "needs --output" in refused("eval", "--dataset", folder, "--skip-existing")


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    from retrieval.eval import recall as evaluate

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    given = ["eval", "--dataset", folder, "--model", "a"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "retrieval_ranks", stop)
        done = run(*given)
    assert done.code == 130
    assert "start it again" in done.err
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert document(*given)["images_from_cache"] == 6
    assert not (tmp_path / "cache").exists()
    kept = ["--features", tmp_path / "kept"]
    assert document(*given, *kept)["images_from_cache"] == 0
    assert document(*given, *kept)["images_from_cache"] == 6


def test_mistakes_are_one_line(folder, tmp_path):
    cases = [
        (["--dataset", "flicker30k"], "give coco, flickr30k"),
        (["--dataset", "flickr30k"], "where is flickr30k? give its folder with --images"),
        (["--dataset", "flickr30k", "--images", folder], "on a form"),
        (["--dataset", "flickr30k", "--protocol", "x", "--images", folder], "it has karpathy"),
        (["--dataset", folder, "--split", "test", "--limit", "1"], "leave --split out"),
        (["--dataset", f"wds:{folder}"], "has no split 'test' with tars"),
        (["--dataset", folder, "--failures", "x.gif"], "must end in .png"),
        (["--dataset", folder, "--output", "{what}.json"], "valid: {dataset}, {model}"),
        (["--dataset", folder, "--output", "{"], "no valid name"),
        (["--dataset", folder, "--output", "r.csv"], "valid is .json (results)"),
        (["--dataset", folder, "--models", "no.txt"], "cannot read 'no.txt'"),
    ]
    for args, expected in cases:
        assert expected in refused("eval", *args)


# --- eval-build --------------------------------------------------------------------------------


def test_one_table(folder, tmp_path):
    out = tmp_path / "results" / "{model}.json"
    out.parent.mkdir()
    for model in ("bb", "a"):
        run("eval", "--dataset", folder, "--model", model, "--output", out)
    table = tmp_path / "benchmark.csv"
    done = run("eval-build", *sorted(out.parent.glob("*.json")), "--output", table)
    assert done.code == 0, done.err
    assert "2 results" in done.err
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["a", "bb"]
    assert list(rows[0])[:4] == ["dataset", "protocol", "split", "deviations"]
    assert rows[0]["model_fullname"].startswith("a ")
    result = json.loads((out.parent / "a.json").read_text())
    for name, value in result["metrics"].items():
        assert float(rows[0][name]) == value
    assert "--force" in refused("eval-build", out.parent, "--output", table)
    assert run("eval-build", out.parent, "--output", table, "--force").code == 0


def test_other_tests_of_the_same_photos_do_not_share_a_table(tmp_path):
    common = {"model": "m", "pretrained": "p", "metrics": {"image_retrieval_recall@5": 0.5}}
    one = {"dataset": "flickr30k", "protocol": "karpathy", "split": "test", "n_images": 1000}
    files = {
        "karpathy.json": one,
        "longclip.json": {"dataset": "flickr30k-longclip", "protocol": "longclip"},
        "limited.json": {**one, "n_images": 100},
        "val.json": {**one, "split": "val"},
        "theirs.json": {"dataset": "flickr30k", "task": "zeroshot_retrieval"},
        "wds.json": {"dataset": "wds/flickr30k"},
        "coco.json": {"dataset": "mscoco_captions", "protocol": "karpathy"},
        "coco17.json": {"dataset": "coco-longclip", "protocol": "longclip"},
    }
    for name, about in files.items():
        (tmp_path / name).write_text(json.dumps(common | about))

    def build(*names: str) -> list[str]:
        return ["eval-build", *(str(tmp_path / n) for n in names), "--output", str(tmp_path / "t")]

    mixed = [("karpathy", other) for other in ("longclip", "limited", "val")]
    for pair in [*mixed, ("theirs", "longclip"), ("coco", "coco17")]:
        said = refused(*build(*(f"{name}.json" for name in pair)))
        assert "differently" in said
        assert "one table of each" in said
    assert run(*build("karpathy.json", "theirs.json", "wds.json", "coco.json")).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "as JSON"), ("[]", "no metrics"), ('{"metrics": {}}', "no 'dataset'")],
)
def test_files_that_are_no_results(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    assert message in refused("eval-build", tmp_path, "--output", tmp_path / "t.csv")
    assert "valid is .csv (a table)" in refused("eval-build", tmp_path, "--output", "t.json")
    assert "not found" in refused("eval-build", tmp_path / "y.json", "--output", tmp_path / "t.csv")
