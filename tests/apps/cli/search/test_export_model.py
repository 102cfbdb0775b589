"""`enn search export-model`, and a Long-CLIP file at all commands that take a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import clip_cases as cases
import pytest
from cli_cases import GALLERY, document, refused, run

from retrieval.model.loading import load

PHOTOS = sorted(GALLERY.glob("*.webp"))[:3]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.model.runtime.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr("retrieval.eval.feature_cache.default_cache_dir", lambda: tmp_path / "eval")
    monkeypatch.setenv("ENN_ARCHITECTURES", str(tmp_path / "architectures"))


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file of Long-CLIP's layout for the architecture "tiny"."""
    cases.write_architecture(tmp_path / "architectures" / "tiny.json", cases.tiny())
    state = cases.plain_state(cases.network(cases.tiny()))
    return cases.save(cases.long_clip(state), tmp_path / "longclip é.pt")


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("open_clip", {"open_clip_config.json", "open_clip_model.safetensors"}),
        (
            "transformers",
            {
                *("config.json", "model.safetensors", "preprocessor_config.json"),
                *("tokenizer_config.json", "vocab.json", "merges.txt"),
            },
        ),
    ],
)
def test_a_model_is_written_and_read_again(form, files, weights, tmp_path):
    out = tmp_path / "out ü"
    out.mkdir()
    given = ("export-model", out, "--model", "tiny", "--pretrained", weights, "--to", form)
    written = document(*given)
    assert set(written["files"]) == {path.name for path in out.iterdir()} == files
    assert (written["form"], written["folder"]) == (form, str(out))
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert load(out).weights_hash == load("tiny", checkpoint=weights).weights_hash
    assert "holds files already" in refused(*given)


def test_how_to_read_it_is_told(weights, tmp_path):
    done = run("export-model", tmp_path / "a" / "b", "--model", f"tiny:{weights}")
    assert done.code == 0, done.err
    assert f"create_model_and_transforms('local-dir:{tmp_path / 'a' / 'b'}')" in done.out


def test_mistakes_are_one_line(weights, tmp_path):
    out = tmp_path / "out"
    assert "--model" in refused("export-model", out)
    assert "no CLIP network" in refused("export-model", out, "--model", "long-eclip-mini")
    tiny = ("--model", "tiny", "--pretrained", weights)
    told = refused("export-model", out, *tiny, "--to", "tf")
    assert "must be one of open_clip, transformers, onnx, got 'tf'" in told
    assert "is a file" in refused("export-model", weights, *tiny)
    told = refused("export-model", out, "--model", "tiny", "--pretrained", tmp_path / "no.pt")
    assert "not found" in told
    assert not out.exists()


def test_a_long_clip_file_is_indexed_searched_and_measured(weights, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in PHOTOS:
        shutil.copy(photo, folder)
    model = ("--model", "tiny", "--pretrained", weights)
    assert document("index", folder, *model)["added"] == len(PHOTOS)
    assert len(document("query", "a duck", "--index", folder)["results"]) == len(PHOTOS)
    best = document("query", "--image", folder / PHOTOS[0].name, "--index", folder)["results"][0]
    assert best["path"].endswith(PHOTOS[0].name)
    assert best["score"] == pytest.approx(1, abs=1e-4)
    assert document("index", folder)["unchanged"] == len(PHOTOS)
    rows = "".join(f"{photo.name},a photo of {photo.stem}\n" for photo in PHOTOS)
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")
    result = document("eval", "--dataset", folder, *model)
    assert (result["context_length"], result["n_images"]) == (248, len(PHOTOS))
    assert result["weights_hash"] == load("tiny", checkpoint=weights).weights_hash
