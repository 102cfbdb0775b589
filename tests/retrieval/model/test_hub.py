"""A hub that cannot be reached is told in seconds, whatever keeps it away."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import clip_cases as cases
import pytest

from retrieval.model import hub
from retrieval.model.loading import ModelError, load
from retrieval.model.published import has_architecture, sources_of

SECONDS = 3.0


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as line:
        port = line.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as line:
        yield f"http://127.0.0.1:{line.getsockname()[1]}"


@contextlib.contextmanager
def unroutable() -> Iterator[str]:
    """Drops connections: the queue of those not yet accepted is full."""
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(socket.socket())
        line.bind(("127.0.0.1", 0))
        line.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(line.getsockname())
        yield f"http://127.0.0.1:{line.getsockname()[1]}"


@contextlib.contextmanager
def failing() -> Iterator[str]:
    """A proxy whose own way out is broken."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def unnamed(monkeypatch):
    """A name that takes its time to be not found."""

    def slow(*args: object, **options: object) -> None:
        time.sleep(20)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", slow)


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A function that sets the hub's address; its local cache is empty."""
    import open_clip  # noqa: F401  (importing it is no part of the answer)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return use


NAMES = ("hf-hub:org/name", "openai/clip-vit-base-patch32", "ViT-B-32:openai")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("away", [refusing, silent, unroutable, failing])
def test_an_unreachable_hub_is_told_in_seconds(endpoint, away, name, capfd):
    with away() as address:
        endpoint(address)
        started = time.perf_counter()
        with pytest.raises(ModelError, match=r"hub cannot be reached.*local weights") as caught:
            load(name)
        assert time.perf_counter() - started < SECONDS
    assert "\n" not in str(caught.value)
    assert "Retrying" not in capfd.readouterr().err


@pytest.mark.parametrize("others", [False, True])
def test_a_published_tag_is_answered_without_importing_open_clip(tmp_path, others):
    """Importing it takes longer than the answer about a hub may."""
    code = (
        "import sys; from retrieval.model.loading import ModelError, load\n"
        "try: load('ViT-B-32:openai')\n"
        "except ModelError as error: print(error, 'open_clip' in sys.modules)"
    )
    if others:  # weights of other models are here, by both ways that they come
        (tmp_path / "hub" / "models--google--siglip").mkdir(parents=True)
        (tmp_path / ".cache" / "clip").mkdir(parents=True)
        (tmp_path / ".cache" / "clip" / "other.pt").touch()
    with refusing() as address:
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
        place = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**kept, **place}, capture_output=True, text=True
        )
    assert done.stdout.startswith("cannot fetch ViT-B-32:openai: the hub cannot be reached")
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("tag", "known"), [("openai", True), ("LAION2B-s34b_b79k", True), ("laion", False), ("", False)]
)
def test_published_names_are_open_clips(tag, known):
    import open_clip

    assert bool(sources_of(tag)) is known
    for name, each in open_clip.list_pretrained():
        assert has_architecture(name)
        published = open_clip.get_pretrained_cfg(name, each)
        repository = "/".join(published["hf_hub"].split("/")[:2])
        assert {repository, published["url"]} - {""} <= sources_of(each)


@pytest.mark.parametrize(
    "place", ["hub/models--timm--vit_base_patch32_clip_224.openai", "clip/ViT-B-32.pt"]
)
def test_what_was_fetched_of_a_tag_is_not_out_of_reach(tmp_path, monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_OTHER_CACHE", tmp_path / "clip")
    monkeypatch.setattr(hub, "answers", lambda: False)
    assert hub.is_out_of_reach(sources_of("openai"))
    (tmp_path / place).mkdir(parents=True)
    assert not hub.is_out_of_reach(sources_of("openai"))


def test_a_name_that_does_not_resolve_is_told_in_seconds(endpoint, unnamed):
    endpoint("http://hub.invalid")
    started = time.perf_counter()
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load("org/name")
    assert time.perf_counter() - started < SECONDS


def test_a_slow_line_can_be_given_longer(endpoint, monkeypatch):
    from huggingface_hub import constants

    from retrieval.model.hub import answers

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            time.sleep(0.6)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("retrieval.model.hub.SECONDS", 0.3)
    assert not answers()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
    assert answers()
    server.shutdown()
    server.server_close()


def test_bare_hub_ids_are_understood_and_other_names_are_not_taken_for_them(endpoint, tmp_path):
    with refusing() as address:
        endpoint(address)
        for name in ("org/name", "openai/clip-vit-base-patch32", "a.b/c_d-1.0"):
            with pytest.raises(ModelError, match=f"cannot fetch hf-hub:{name}: the hub"):
                load(name)
        with pytest.raises(ModelError, match="brings its own weights"):
            load("org/name", checkpoint="w.pt")
        for name in ("ViT-B/32", "EVA02-B/16"):
            with pytest.raises(ModelError, match="needs weights"):
                load(name)
        for name in ("a/b/c", "/abs/name", "./name", "../name", "w/file.safetensors"):
            with pytest.raises(ModelError, match="unknown model"):
                load(name)


def test_weights_of_siglip2_without_its_tokenizer_say_so(endpoint, tmp_path):
    file = tmp_path / "siglip2.safetensors"
    cases.save(cases.plain_state(cases.network(cases.tiny())), file)
    with refusing() as address:
        endpoint(address)
        started = time.perf_counter()
        for name, tokenizer in (
            ("ViT-B-16-SigLIP2", "timm/ViT-B-16-SigLIP2"),
            ("ViT-B-16-SigLIP-384", "timm/ViT-B-16-SigLIP"),
            ("roberta-ViT-B-32", "roberta-base"),
        ):
            with pytest.raises(ModelError, match="tokenizer") as caught:
                load(name, checkpoint=file)
            text = str(caught.value)
            assert f"hf download {tokenizer} " in text
            assert "local weights" not in text
            assert "\n" not in text
        assert time.perf_counter() - started < SECONDS
        with pytest.raises(ModelError, match="weights file not found"):
            load("ViT-B-16-SigLIP2", checkpoint=tmp_path / "gone.safetensors")


def test_a_directory_without_its_tokenizer_says_so(endpoint, tmp_path):
    folder = tmp_path / "model"
    config = cases.tiny()
    network = cases.network(config)
    cases.write_architecture(folder / "open_clip_config.json", config)
    cases.save(cases.plain_state(network), folder / "open_clip_model.safetensors")
    change = folder / "open_clip_config.json"
    text = change.read_text()
    assert '"text_cfg": {' in text
    name = "timm/ViT-B-16-SigLIP2"
    change.write_text(
        text.replace('"text_cfg": {', f'"text_cfg": {{"hf_tokenizer_name": "{name}",')
    )
    with refusing() as address:
        endpoint(address)
        with pytest.raises(ModelError, match=f"no tokenizer of {name}") as caught:
            load(str(folder))
    assert str(folder) in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_what_the_hub_has_cached_is_read_without_asking(endpoint, tmp_path):
    folder = tmp_path / "model"
    cases.write_architecture(folder / "open_clip_config.json", cases.tiny())
    cases.save(
        cases.plain_state(cases.network(cases.tiny())), folder / "open_clip_model.safetensors"
    )
    place = tmp_path / "hub" / "models--org--mine"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    with silent() as address:
        endpoint(address)
        started = time.perf_counter()
        assert load("org/mine", runtime="torch").name == "hf-hub:org/mine"
        assert time.perf_counter() - started < SECONDS
    assert Path(place).is_dir()
