"""`enn search`: the real commands with the shipped model on real photos."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli_cases import ENN, GALLERY, document, load_models_once, refused, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apps.cli.options import ManyValues
from enn_core.files.digests import sealed

pytest.importorskip("faiss")
PHOTOS = ("gc_alpaca", "gc_bison", "gc_duck", "gc_giraffe_head", "gc_kitten_on_box", "gc_mars")
STRANGE = os.fsdecode(b"na\xefve name\n.webp")  # neither UTF-8 nor one line


@pytest.fixture(autouse=True, scope="module")
def _model_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        load_models_once(patch)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with an awkward name, six photos, one of them awkwardly named, and rubbish."""
    folder = tmp_path_factory.mktemp("cli") / "Fotos – Ünï 日本"
    (folder / "more pictures").mkdir(parents=True)
    for name in PHOTOS[:4]:
        shutil.copy(GALLERY / f"{name}.webp", folder)
    shutil.copy(GALLERY / f"{PHOTOS[4]}.webp", folder / "more pictures")
    try:
        shutil.copy(GALLERY / f"{PHOTOS[5]}.webp", folder / STRANGE)
    except OSError:
        pytest.skip("this file system takes no names that are not UTF-8")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def first(photos) -> dict[str, Any]:
    """The JSON document of the first indexing."""
    return document("index", photos, code=1)


@pytest.fixture
def indexed(photos, first) -> Path:
    return photos


def test_what_is_no_picture_is_counted(tmp_path):
    shutil.copy(GALLERY / "gc_duck.webp", tmp_path / "really a duck.txt")
    for name in ("a.mp4", "b.MP4", "c.nef", "d.txt", "README"):
        (tmp_path / name).write_bytes(b"other")
    done = run("index", tmp_path)
    assert done.code == 0
    assert "left out: 2 .mp4 (video), 1 .nef (RAW), 1 .txt, 1 without an ending" in done.out
    report = document("index", tmp_path)
    assert report["left_out"] == {".mp4": 2, ".nef": 1, ".txt": 1, "": 1}
    assert report["unchanged"] == 1


def test_formats_are_read_alike(tmp_path):
    """A photo in other formats is found beside itself, whatever the files are called."""
    with Image.open(GALLERY / "gc_duck.webp") as photo:
        duck = photo.convert("RGB")
    duck.save(tmp_path / "reference.jpg", quality=90)
    kinds = {"avif": "AVIF", "bmp": "BMP", "ppm": "PPM", "jp2": "JPEG2000", "jpeg": "PNG"}
    for suffix, kind in kinds.items():
        duck.save(tmp_path / f"duck.{suffix}", kind)
    assert document("index", tmp_path)["added"] == 6
    found = document("query", "--image", tmp_path / "reference.jpg", "--index", tmp_path)
    assert len(found["results"]) == 6
    assert min(hit["score"] for hit in found["results"]) > 0.95


def test_limit_of_pixels_is_named_and_raised(tmp_path):
    shutil.copy(GALLERY / "gc_duck.webp", tmp_path)
    done = run("index", tmp_path, "--max-pixels", "1000")
    assert done.code == 1
    wanted = re.search(r"`enn search index (--max-pixels) (\d+)` reads it", done.err)
    assert wanted is not None
    assert document("index", tmp_path, *wanted.groups())["added"] == 1


# --- index and info ----------------------------------------------------------------------------


def test_index_counts_what_it_did(photos, first):
    assert (first["added"], first["total"], first["skipped_total"]) == (6, 6, 1)
    assert first["index"] == str(photos / ".enn-index")
    assert first["folder"] == str(photos)
    assert [skip["path"] for skip in first["skipped_files"]] == ["broken.jpg"]


def test_update_from_a_folder_below(indexed, monkeypatch):
    monkeypatch.chdir(indexed / "more pictures")
    done = run("index")
    assert done.code == 1
    assert "6 pictures are searchable" in done.out
    assert "0 added, 6 unchanged, 1 skipped" in done.out


def test_index_elsewhere_without_skips_ends_with_0(tmp_path):
    photos, place = tmp_path / "p", tmp_path / "the index"
    photos.mkdir()
    shutil.copy(GALLERY / "gc_duck.webp", photos)
    assert run("index", photos, "--index", place).code == 0
    assert not (photos / ".enn-index").exists()
    assert document("index", "--index", place)["unchanged"] == 1
    assert document("query", "a duck", "--index", place)["images"] == 1
    # A folder that holds other things does not become an index.
    assert "holds other files" in refused("index", photos, "--index", photos)


def test_an_empty_mount_is_refused_unless_pruned(tmp_path):
    photos, place = tmp_path / "p", tmp_path / "the index"
    (photos / "@eaDir").mkdir(parents=True)
    for name in PHOTOS[:2]:
        shutil.copy(GALLERY / f"{name}.webp", photos)
        shutil.copy(GALLERY / f"{name}.webp", photos / "@eaDir" / f"{name}_THUMB.webp")
    (photos / "raw.gif").write_bytes(b"no picture")
    index = ("index", photos, "--index", place)
    assert document(*index, "--exclude", "*.gif", "--exclude", "*.raw")["total"] == 2
    photos.rename(tmp_path / "away")
    photos.mkdir()
    assert "2 of the index's 2 pictures are gone" in refused(*index)
    insist = "2 of the index's 2 pictures are gone, so the index keeps them: see that their disk is"
    assert insist in refused(*index, "--rebuild")
    assert "take the patterns of .gitignore" in refused(*index, "--rebuild", "--exclude", "!")
    photos.rmdir()
    assert "is not a folder that can be read" in refused("index", "--index", place, "--rebuild")
    photos.mkdir()
    assert document("info", "--index", place)["images"] == 2
    assert document(*index, "--prune")["deleted"] == 2
    assert document("info", "--index", place)["kept"] == 2
    photos.rmdir()
    (tmp_path / "away").rename(photos)
    done = document(*index, "--exclude", "*.gif")
    assert (done["added"], done["embedded"]) == (2, 0)
    photos.rename(tmp_path / "away")
    photos.mkdir()
    assert document(*index, "--rebuild", "--prune")["total"] == 0
    assert "take the patterns of .gitignore" in refused(*index, "--exclude", "!")


def test_rebuild_replaces_an_index_of_another_model(tmp_path):
    shutil.copy(GALLERY / "gc_duck.webp", tmp_path)
    assert run("index", tmp_path, "--rebuild").code == 0
    manifest = tmp_path / ".enn-index" / "manifest.json"
    content = json.loads(manifest.read_text()) | {"weights": "0" * 64}
    manifest.write_text(json.dumps(sealed(content)))
    assert "--rebuild" in refused("index", tmp_path)
    assert document("index", "--index", tmp_path, "--rebuild")["added"] == 1
    assert len(document("query", "a duck", "--index", tmp_path)["results"]) == 1
    assert document("index", tmp_path)["unchanged"] == 1
    manifest.write_text("{")
    assert "damaged" in refused("index", tmp_path)
    assert document("index", tmp_path, "--rebuild")["added"] == 1


def test_an_index_keeps_its_precision(tmp_path):
    shutil.copy(GALLERY / "gc_duck.webp", tmp_path)
    assert document("index", tmp_path, "--precision", "bf16")["added"] == 1
    assert "computed in bf16" in run("info", "--index", tmp_path).out
    shutil.copy(GALLERY / "gc_duck.webp", tmp_path / "again.webp")
    assert document("index", tmp_path)["added"] == 1
    assert len(document("query", "a duck", "--index", tmp_path)["results"]) == 2
    told = refused("index", tmp_path, "--precision", "f32")
    assert "built in precision bf16, this model is in f32" in told
    assert "--rebuild" in told
    assert document("index", tmp_path, "--precision", "f32", "--rebuild")["added"] == 2
    assert "f32, bf16, got 'int8'" in refused("index", tmp_path, "--precision", "int8")


def test_empty_folder(tmp_path):
    done = run("index", tmp_path)
    assert done.code == 0
    assert "the folder holds no pictures" in done.err
    assert "is its disk there?" in done.err
    done = run("query", "a duck", "--index", tmp_path)
    assert (done.code, done.out) == (0, "")
    assert "no pictures yet" in done.err


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    from retrieval.model import loading as models

    for name in PHOTOS[:3]:
        shutil.copy(GALLERY / f"{name}.webp", tmp_path)
    model = models.load("long-eclip-mini", checkpoint=None)
    embed = model.image_vectors
    calls = []

    def interrupted(pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(pixels)

    monkeypatch.setattr(model, "image_vectors", interrupted)
    done = run("index", tmp_path, "--batch-size", "1")
    assert (done.code, done.out) == (130, "")
    assert "run the same command again to go on" in done.err
    assert document("index", tmp_path)["added"] == 1
    assert len(calls) == 4


def test_info(indexed, photos):
    done = run("info", "--index", photos)
    assert done.code == 0
    assert "6 searchable, 1 skipped" in done.out
    assert "long-eclip-mini" in done.out
    assert "broken.jpg: not a JPEG" in done.out
    stats = document("info", "--index", photos / ".enn-index")
    assert (stats["images"], stats["skipped"], stats["dim"]) == (6, 1, 384)
    assert stats["bytes"] > 6 * 384 * 4
    assert stats["skipped_files"][0]["reason"].startswith("not a JPEG")


def test_info_into_a_closed_pipe_is_no_error(indexed, photos):
    reader, writer = os.pipe()
    os.close(reader)
    command = [ENN, "search", "info", "--index", photos]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_compact_gives_back_the_space_of_deleted_pictures(tmp_path):
    for name in PHOTOS[:3]:
        shutil.copy(GALLERY / f"{name}.webp", tmp_path)
    assert run("index", tmp_path).code == 0
    (tmp_path / f"{PHOTOS[1]}.webp").unlink()
    assert run("index", tmp_path).code == 0
    found = document("query", "an animal", "--index", tmp_path)["results"]
    assert document("info", "--index", tmp_path)["deleted"] == 1
    said = run("compact", "--index", tmp_path)
    assert "0 deleted pictures forgotten" in said.out
    assert "1 deleted are kept until 20" in said.out
    assert "1 deleted, vectors until 20" in run("info", "--index", tmp_path).out
    done = document("compact", "--index", tmp_path, "--drop-deleted")
    assert (done["forgotten"], done["images"], done["kept"]) == (1, 2, 0)
    assert done["bytes"] == document("info", "--index", tmp_path)["bytes"]
    assert document("info", "--index", tmp_path)["deleted"] == 0
    assert document("query", "an animal", "--index", tmp_path)["results"] == found
    said = run("compact", "--index", tmp_path)
    assert said.code == 0
    assert "2 pictures are searchable" in said.out
    assert "0 deleted pictures forgotten" in said.out
    from retrieval.index.writer import index_lock

    with index_lock(tmp_path / ".enn-index"):
        assert "is being written by process" in refused("compact", "--index", tmp_path)


# --- query -------------------------------------------------------------------------------------


def test_query_finds_the_index_above_and_prints_id_score_path(indexed, monkeypatch):
    monkeypatch.chdir(indexed / "more pictures")
    done = run("query", "a giraffe", "-k", "3")
    assert (done.code, done.err) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert len(lines) == 3
    scores = [float(score) for _, score, _ in lines]
    assert scores == sorted(scores, reverse=True)
    assert all(id_.isdigit() for id_, _, _ in lines)
    assert all(path.startswith(str(indexed)) for _, _, path in lines)


def test_query_by_image_finds_the_image_itself(indexed):
    photo = indexed / "gc_duck.webp"
    found = document("query", "--image", photo, "-k", "2", "--index", indexed)
    assert found["results"][0]["path"] == str(photo)
    assert found["results"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert (found["query"], found["image"], found["images"]) == (None, str(photo), 6)
    both = document("query", "an animal - water", "--image", photo, "--index", indexed)
    assert len(both["results"]) == 6


def test_words_need_no_quotes_and_minus_works(indexed):
    plain = document("query", "a", "cat", "--index", indexed)
    assert plain["query"] == "a cat"
    negative = run("query", "--index", indexed, "--json", "--", "-person")
    assert negative.code == 0
    positive = document("query", "person", "--index", indexed)
    names = [hit["path"] for hit in positive["results"]]
    assert [hit["path"] for hit in json.loads(negative.out)["results"]] == names[::-1]
    assert "put `--` before" in refused("query", "-person", "--index", indexed)


def test_paths_are_bytes_of_the_disk(indexed):
    done = run("query", "a planet", "--index", indexed, "-0")
    assert done.code == 0
    found = done.raw.split(b"\0")
    assert found.pop() == b""
    assert len(found) == 6
    assert os.fsencode(indexed / STRANGE) in found
    assert all(Path(os.fsdecode(path)).is_file() for path in found)
    lines = run("query", "a planet", "--index", indexed, "--paths", "-k", "2").raw
    assert lines.splitlines()[:1] == found[0].splitlines()[:1]


def test_strange_names_are_escaped_for_people_and_whole_in_json(indexed):
    done = run("query", "a planet", "--index", indexed)
    assert "na\\xefve name\\n.webp" in done.out
    assert len(done.out.splitlines()) == 6
    found = document("query", "a planet", "--index", indexed)
    assert str(indexed / STRANGE) in [hit["path"] for hit in found["results"]]


# --- caption -----------------------------------------------------------------------------------


def test_caption_from_file_and_standard_input(tmp_path):
    listing = "\ufeffa duck on water\n\n  the planet Mars \nsheet metal\n"
    file = tmp_path / "my list.txt"
    file.write_text(listing, encoding="utf-8")
    photo = GALLERY / "gc_duck.webp"
    found = document("caption", photo, "--captions", file)
    assert found["captions"] == 3
    assert sorted(hit["line"] for hit in found["results"]) == [1, 3, 4]
    assert {hit["caption"] for hit in found["results"]} == {
        "a duck on water",
        "the planet Mars",
        "sheet metal",
    }
    done = run("caption", photo, "--captions", "-", "-k", "1", stdin=listing.encode())
    assert done.code == 0
    assert len(done.out.splitlines()) == 1


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, indexed):
    monkeypatch.chdir(tmp_path)
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"fine\ncaf\xe9\n")
    photo = indexed / "gc_duck.webp"
    cases: list[tuple[list[str | Path], str]] = [
        (["query", "x"], "build one with `enn search index FOLDER`"),
        (["query"], "nothing to search for"),
        (["query", "  "], "nothing to search for"),
        (["query", "x", "--index", "nowhere"], "there is no directory 'nowhere'"),
        (["query", "x", "--json", "--paths"], "exclude each other"),
        (["query", "9999:x", "--index", indexed], "weight 9999 is out of range"),
        (["query", "--image", "no.jpg", "--index", indexed], "there is no file 'no.jpg'"),
        (["query", "--image", indexed, "--index", indexed], "is a folder"),
        (["query", "--image", indexed / "broken.jpg", "--index", indexed], "broken.jpg' cannot be"),
        (["index", "nowhere"], "there is no folder 'nowhere'"),
        (["index", empty], "is a file"),
        (["index", indexed, "--model", "ViT-B-3"], "ViT-B-32"),
        (["index"], "no index in"),
        (["info"], "no index in"),
        (["caption", "no.jpg", "--captions", empty], "there is no file 'no.jpg'"),
        (["caption", photo, "--captions", "no.txt"], "cannot read 'no.txt'"),
        (["caption", photo, "--captions", empty], "holds no captions"),
        (["caption", photo, "--captions", latin], "not UTF-8 text (line 2)"),
        (["export", "out.parquet"], "no index in"),
        (["export", "no/out.parquet", "--index", indexed], "there is no directory"),
        (["import", "no.parquet"], "no.parquet"),
        (["import", empty], "neither pictures (Parquet) nor lessons (JSON)"),
        (["eval", "--dataset", "no.json", "--images", "."], "caption file not found"),
        (["eval", "--dataset", "no.json", "--images", "no"], "there is no folder 'no'"),
        (["train", "--config", "no-such"], "no configuration"),
    ]
    for args, expected in cases:
        assert expected in refused(*args)


def test_index_of_another_model_is_refused(tmp_path, indexed):
    manifest = json.loads((indexed / ".enn-index" / "manifest.json").read_text())
    shutil.copytree(indexed / ".enn-index", tmp_path / "other")
    manifest |= {"weights": "0" * 64}
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert "index the folder again" in refused("query", "x", "--index", tmp_path / "other")


def test_a_second_writer_is_refused(indexed):
    from retrieval.index.writer import index_lock

    with index_lock(indexed / ".enn-index"):
        assert "being written by process" in refused("index", indexed)


@pytest.mark.parametrize(
    ("name", "form"), [("duck.jpg", "JPEG"), ("my duck.png", "PNG"), ("sub/duck", "WEBP")]
)
def test_a_picture_given_as_the_words_is_searched_as_one(
    indexed, tmp_path, monkeypatch, name, form
):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    with Image.open(GALLERY / "gc_duck.webp") as duck:
        duck.convert("RGB").save(name, form)
    wanted = document("query", "--image", name, "--index", indexed)
    # Words that a shell has taken apart are one path again.
    for parts in ([name], name.split(" "), [f"./{name}"], [os.path.abspath(name)]):
        done = run("query", *parts, "--index", indexed, "--json")
        found = json.loads(done.out)
        assert found["results"] == wanted["results"]
        assert (found["query"], Path(found["image"]).name) == (None, Path(name).name)
        assert "is a picture: these are pictures like it" in done.err


def test_words_stay_words_whatever_lies_here(indexed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GALLERY / "gc_duck.webp", "duck")
    Path("notes.txt").write_text("no picture")
    Path("a.folder").mkdir()
    words = ["duck", "notes.txt", "a.folder", "gone.jpg", "x" * 5000 + ".jpg", "duck.webp - person"]
    for text in words:
        done = run("query", text, "--index", indexed, "--json")
        assert json.loads(done.out)["image"] is None
        assert "is a picture" not in done.err
        # Whoever meant a file hears that it is not there.
        assert ("there is no file" in done.err) is text.endswith(".jpg")
    Path("broken.jpg").write_bytes(b"no picture")
    assert "'broken.jpg' cannot be read" in refused("query", "broken.jpg", "--index", indexed)
    shutil.copy("duck", "duck.webp")
    both = ("query", "duck.webp", "--image", "duck", "--index", indexed)
    assert "--image gives another" in refused(*both)


# --- models ------------------------------------------------------------------------------------


def test_model_list_shows_the_names(tmp_path):
    from retrieval.model.loading import list_models

    for command in (["index", tmp_path], ["caption"], ["eval"], ["export-model"]):
        done = run(*command, "--model", "list")
        assert (done.code, done.out.splitlines(), done.err) == (0, list_models(), "")
    assert (
        run("index", "--model", "list", "--json").out
        == run("index", "--json", "--model", "list").out
    )
    assert document("index", "--model", "list") == list_models()
    assert not any(tmp_path.iterdir())


def test_an_unknown_model_is_answered_with_where_the_names_are(tmp_path):
    assert "`--model list`" in refused("index", tmp_path, "--model", "qqqqqqqqqqqq")


# --- export and import -------------------------------------------------------------------------


def test_export_and_import(tmp_path, indexed):
    file = tmp_path / "aus fuhr é.parquet"
    assert document("export", file, "--index", indexed)["images"] == 6
    assert "--force" in refused("export", file, "--index", indexed)
    assert run("export", file, "--index", indexed, "--force").code == 0
    made = document("import", file, "--index", tmp_path / "new")
    assert (made["images"], made["total"]) == (6, 6)
    # Into a folder that holds the same pictures, where nothing needs to be read again.
    copy = tmp_path / "copy"
    shutil.copytree(indexed, copy, ignore=shutil.ignore_patterns(".enn-index"))
    assert document("import", file, "--folder", copy)["index"] == str(copy / ".enn-index")
    queries = ("query", "a giraffe", "--index")
    here = document(*queries, indexed)["results"]
    there = document(*queries, copy)["results"]
    assert [(hit["id"], hit["score"]) for hit in there] == [
        (hit["id"], hit["score"]) for hit in here
    ]
    assert there[0]["path"].startswith(str(copy))
    assert document("index", copy, code=1)["embedded"] == 0


# --- eval --------------------------------------------------------------------------------------


def test_eval_writes_the_result(tmp_path):
    rows = [
        {
            "filename": f"{name}.webp",
            "split": "val" if i else "test",
            "sentences": [{"raw": f"a photo of a {name[3:]}"}, {"raw": f"one {name[3:]}"}],
        }
        for i, name in enumerate(PHOTOS)
    ]
    dataset, output = tmp_path / "karpathy.json", tmp_path / "r.json"
    dataset.write_text(json.dumps({"images": rows}))
    common = ["eval", "--dataset", dataset, "--images", GALLERY, "--split", "val"]
    rest = ["--model", "long-eclip-mini", "--recall-k", "1", "5", "10", "--output", output]
    done = run(*common, *rest)
    assert done.code == 0, done.err
    assert "text to image  R@1 " in done.out
    result = json.loads(output.read_text())
    assert (result["n_images"], result["n_captions"]) == (5, 10)
    assert result["metrics"]["image_retrieval_recall@5"] == 1.0
    assert {"text_retrieval_recall@1", "text_retrieval_recall@10"} <= set(result["metrics"])
    assert "--force" in refused(*common, *rest)
    assert "has no split 'tset'; it has test (1 images)" in refused(*common[:-1], "tset")
    ours = document(*common, "--recall-k=2", "--captions-per-image", "1")
    assert "image_retrieval_recall@2" in ours["metrics"]
    assert "image_retrieval_recall@1" not in ours["metrics"]
    assert "Invalid value" in refused(*common, "--recall-k", "1", "0")
    assert "unexpected extra argument" in refused(*common, "7")


@given(
    st.sampled_from(ManyValues.options),
    st.lists(st.integers(0, 10**6), min_size=1),
    st.booleans(),
    st.booleans(),
)
def test_values_after_one_flag(option, values, equals, followed):
    words = [str(value) for value in values]
    first = [f"{option}={words[0]}"] if equals else [option, words[0]]
    rest = ["--json", "3"] * followed + ["--", option, "1", "2"]
    further = [word for value in words[1:] for word in (option, value)]
    expected = ["--split", "5", *first, *further, *rest]
    given = ["--split", "5", *first, *words[1:], *rest]
    assert list(ManyValues(name="eval")._repeated(given)) == expected


# --- the installed command ---------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted_process_resumes(tmp_path):
    """Ctrl-C in a real process: exit code 130, one line, and the next run completes the index."""
    total = 0
    for photo in sorted(GALLERY.glob("*.webp"))[:120]:
        shutil.copy(photo, tmp_path)
        total += 1
    command = [ENN, "search", "index", tmp_path, "--batch-size", "4", "--json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / ".enn-index" / "manifest.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == total


@pytest.mark.slow
def test_installed_query_prints_strange_paths(photos, first):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [ENN, "search", "query", "a planet", "--index", photos]
    done = subprocess.run([*command, "-0"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(photos / STRANGE) in done.stdout.split(b"\0")
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
