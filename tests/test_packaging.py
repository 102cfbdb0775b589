"""What the two wheels carry, and what each extra asks of a package index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from apps.cli.extras import EXTRAS
from enn_core.files import shipped as files
from enn_core.files.shipped import NotInstalledError, shipped

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WEIGHTS = tomllib.loads((ROOT / "weights" / "pyproject.toml").read_text(encoding="utf-8"))
FILES = {
    extra: parts["file"]
    for extra, parts in PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"].items()
}

# What setuptools would copy into a wheel, without building one.
_CONTENT = """
from setuptools import Distribution
found = Distribution({"script_name": "setup.py"})
found.parse_config_files(["pyproject.toml"])
command = found.get_command_obj("build_py")
command.ensure_finalized()
print(*command.get_outputs(include_bytecode=False), sep="\\n")
"""


def name_of(requirement: str) -> str:
    """The project that a requirement names, as package indexes spell it."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def required(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [name_of(line) for line in lines if line and not line.startswith("#")]


def in_wheel(folder: Path) -> set[str]:
    major = int(metadata.version("setuptools").partition(".")[0])
    if major < 77:
        pytest.skip("the setuptools here is older than the build's")
    done = subprocess.run(
        [sys.executable, "-c", _CONTENT], cwd=folder, capture_output=True, text=True, check=True
    )
    return {line.removeprefix("build/lib/") for line in done.stdout.splitlines()}


def tracked(*folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }


DATA = ("apps/gallery", "neuro/weights", "retrieval/weights")


def test_the_wheel_of_the_code_has_no_weights_and_photos():
    content = in_wheel(ROOT)
    assert not [file for file in content if file.startswith(DATA)]
    assert {"apps/py.typed", "retrieval/teach/protected.txt"} <= content
    ends = {Path(file).suffix for file in content}
    assert ends == {".py", ".typed", ".json", ".txt", ".css", ".js", ".png"}


def test_the_other_wheel_has_all_of_them_and_no_code():
    content = in_wheel(ROOT / "weights")
    assert content == {f"eigen_suite_weights/{file}" for file in tracked(*DATA)}
    assert not [file for file in content if file.endswith(".py")]
    assert WEIGHTS["project"]["version"] == PROJECT["project"]["version"]


def test_no_dependency_has_a_name_that_is_ours_here_and_free_there():
    asked = [*map(name_of, PROJECT["project"]["dependencies"])]
    asked += [name for file in (ROOT / "requirements").iterdir() for name in required(f"{file}")]
    assert {"dependencies", "optional-dependencies"}.isdisjoint(WEIGHTS["project"])
    assert len(asked) > 50
    assert not [name for name in asked if name.startswith("eigen-suite")]


def test_extras_are_made_of_files():
    own = {extra: f"requirements/{extra}.txt" for extra in FILES}
    assert {file.name for file in (ROOT / "requirements").iterdir()} == {
        f"{extra}.txt" for extra in FILES
    }
    for extra in ("onnx", "demo", "train"):
        assert FILES[extra] == [own["retrieval"], own[extra]]
    for extra in ("retrieval", "neuro", "fast", "docs"):
        assert FILES[extra] == [own[extra]]
    assert sorted(FILES["dev"]) == sorted(own.values())


def test_the_command_knows_the_extra_of_every_package():
    homes: dict[str, set[str]] = {}
    for package, projects in metadata.packages_distributions().items():
        for project in projects:
            homes.setdefault(name_of(project), set()).add(package)
    assert set(EXTRAS) == set(FILES) - {"docs", "dev"}
    for extra, packages in EXTRAS.items():
        projects = required(f"requirements/{extra}.txt")
        assert len(projects) == len(set(packages)), extra
        for project in projects:
            assert homes[project] & set(packages), f"{project} of {extra}"


def without(package: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a module where a package cannot be imported."""
    program = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {['enn', *command]!r}; "
        "runpy.run_module('apps.cli', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_without_extras_the_command_says_which_to_install():
    done = without("typer", "search", "info")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "enn: the package typer is missing; install it with: pip install 'eigen-suite[retrieval]' "
        "or pip install 'eigen-suite[neuro]' (in a clone: '.[retrieval]' or '.[neuro]')\n"
    )


@pytest.mark.parametrize("module", ["apps.cli.extras", "apps.cli.__main__"])
def test_what_starts_the_command_needs_no_extra(module: str):
    program = (
        f"import sys, {module}; from apps.cli.extras import EXTRAS; "
        "sys.exit(bool({p for packages in EXTRAS.values() for p in packages} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An installation without weights and photos."""
    monkeypatch.setattr(files, "__file__", str(tmp_path / "enn_core" / "files" / "shipped.py"))
    monkeypatch.setattr(files, "_PACKAGE", "no_such_package")
    return tmp_path


def refused(call: Callable[[], object], kind: type[Exception], what: str) -> None:
    with pytest.raises(kind, match=f"^{what} is not installed; ") as caught:
        call()
    assert "`pip install ./weights`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named(bare):
    pytest.importorskip("faiss")
    from retrieval import ModelError, load

    refused(lambda: load("long-eclip-mini"), ModelError, "the model long-eclip-mini")


def test_a_missing_brain_model_is_named(bare):
    pytest.importorskip("nibabel")
    from neuro import BrainAge

    refused(BrainAge.load, NotInstalledError, "the brain-age model")


def test_a_missing_gallery_is_named(bare):
    pytest.importorskip("gradio")
    from apps.web.search.serve import serve

    refused(serve, NotInstalledError, "the sample gallery")


def test_weights_are_found_beside_the_code_or_in_their_package(bare, monkeypatch):
    apart = bare / "elsewhere" / "weights_of_a_test" / "apps" / "gallery"
    apart.mkdir(parents=True)
    monkeypatch.syspath_prepend(bare / "elsewhere")
    monkeypatch.setattr(files, "_PACKAGE", "weights_of_a_test")
    assert shipped("apps/gallery", "it", "wait") == apart
    (bare / "apps" / "gallery").mkdir(parents=True)
    assert shipped("apps/gallery", "it", "wait") == bare / "apps" / "gallery"


@pytest.mark.parametrize(
    "place", ["neuro/weights/brain-age-ixi.safetensors", "retrieval/weights/long-eclip-mini"]
)
def test_damaged_weights_are_named(bare, place):
    """One flipped bit of a weight is no error of any reader."""
    from neuro.age.predict import BrainAge
    from retrieval.model.loading import load

    copy = bare / place
    source = ROOT / place
    copy.parent.mkdir(parents=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    use = BrainAge.load if source.is_file() else lambda: load("long-eclip-mini")
    use()
    for file in [copy] if copy.is_file() else sorted(copy.glob("[cm]*.*")):
        whole = file.read_bytes()
        half = bytearray(whole)
        half[len(half) // 2] ^= 1
        file.write_bytes(half)
        with pytest.raises(ValueError, match=f"{file.name}' is not what was released"):
            use()
        file.write_bytes(whole)


def test_a_damaged_photo_is_named(bare):
    from apps.web.search.gallery import gallery

    folder = bare / "apps" / "gallery"
    shutil.copytree(ROOT / "apps" / "gallery", folder)
    assert gallery() == folder
    photo = folder / "gc_alpaca.webp"
    content = bytearray(photo.read_bytes())
    content[len(content) // 2] ^= 1
    photo.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"gc_alpaca\.webp' is not what was released.*git checkout"
    ):
        gallery()
