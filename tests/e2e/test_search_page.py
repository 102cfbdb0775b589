"""The search page in a real browser, served by the real server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

import pytest
from places import GALLERY

pytest.importorskip("gradio")
pytest.importorskip("playwright")

from search_driver import SearchPage, Server

from apps.web.search.api import ENDPOINTS


def test_a_visitor_sees_the_collection(visit):
    page = visit()
    assert "pictures" in page.status
    assert len(page.names) >= 20
    page.wait_pictures()
    assert page.page.title() == "Eigen Search"
    assert page.server.get("favicon.ico") == 200


def test_words_find_pictures_and_enter_searches(visit):
    page = visit()
    page.search("a horse in the grass")
    assert len(page.names) == 24
    page.wait_pictures()
    scores = [float(s) for s in page.page.locator(".enn-card .enn-score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    widths = page.page.eval_on_selector_all(
        ".enn-card .enn-bar i", "all => all.map(i => parseInt(i.style.width))"
    )
    assert widths[0] == 100
    assert min(widths) >= 3


def test_words_find_what_they_name(visit):
    page = visit()
    expected = {
        "horses running in a field": {"gc_horse_herd.webp"},
        "a drum kit and a guitar": {"gc_drum_kit_and_guitar.webp"},
        "a bridge at night with city lights": {"gc_tower_bridge_night.webp"},
        "a bee on a flower": {"pp_honey_bee.webp"},
        "a monkey in a tree": {"gc_macaque.webp", "gc_proboscis_monkey.webp"},
        "a cat looking at the camera": {"si_tabby_cat.webp"},
    }
    found = []
    for query, names in expected.items():
        page.search(query)
        if names & set(page.names[:3]):
            found.append(query)
    assert len(found) >= 4, found


def test_examples_and_number_of_results(visit):
    page = visit()
    page.page.click(".enn-chip >> nth=0")
    page.wait_status("best 24 of")
    asked = page.page.input_value("#enn-text :is(textarea, input)")
    assert asked == page.page.inner_text(".enn-chip >> nth=0")
    page.page.click("#enn-count input")
    page.page.click("role=option[name='Show 12']")
    page.wait_status("best 12 of")
    assert len(page.names) == 12
    page.page.click("text=Clear search")
    page.wait_status("A look into")
    assert page.page.input_value("#enn-text :is(textarea, input)") == ""


def test_a_link_can_carry_a_search(visit):
    page = visit("?q=two%20birds")
    page.wait_status("“two birds”")
    assert page.page.input_value("#enn-text :is(textarea, input)") == "two birds"


def test_weights_and_negatives_are_understood_or_explained(visit):
    page = visit()
    page.search("2:animals + grass - people")
    assert len(page.names) == 24
    page.page.fill("#enn-text :is(textarea, input)", "-")
    page.page.press("#enn-text :is(textarea, input)", "Enter")
    page.page.wait_for_selector("#enn-results .enn-message")
    assert "the query is empty" in page.page.inner_text("#enn-results").lower()


def test_a_picture_finds_itself_then_both_then_neither(visit, photos):
    page = visit()
    mine = sorted(p for p in photos.glob("*.webp") if p.name[0] not in "<$")[3]
    page.choose_picture(mine)
    page.wait_status("Like the picture")
    assert page.names[0] == mine.name
    assert page.page.locator("#enn-picker .enn-preview img").count() == 1
    page.page.fill("#enn-text :is(textarea, input)", "at night")
    page.page.click("#enn-go")
    page.wait_status("“at night” together with the picture")
    assert len(page.names) == 24
    page.page.click("#enn-picker .enn-remove")
    page.wait_status("“at night”:")
    assert page.page.locator("#enn-picker .enn-drop").count() == 1


def test_pictures_can_be_pasted(visit, photos):
    page = visit()
    mine = sorted(p for p in photos.glob("*.webp") if p.name[0] not in "<$")[5]
    page.page.evaluate(
        """bytes => {
             const data = new DataTransfer();
             data.items.add(new File([new Uint8Array(bytes)], "x.webp", {type: "image/webp"}));
             document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
           }""",
        list(mine.read_bytes()),
    )
    page.wait_status("Like the picture")
    assert page.names[0] == mine.name


def test_bad_uploads_get_one_friendly_line(visit):
    page = visit()
    line = page.page.locator("#enn-picker .enn-problem")
    for name, data, says in (
        ("broken.jpg", b"\xff\xd8\xff" + b"nothing of use" * 20, "damaged image"),
        ("page.html", b"<script>alert(1)</script>", "not a JPEG"),
        ("empty.png", b"", "empty file"),
    ):
        page.choose_picture({"name": name, "mimeType": "image/jpeg", "buffer": data})
        page.page.wait_for_selector(f"#enn-picker .enn-problem:has-text('{says}')")
        assert "\n" not in line.inner_text()
    page.page.evaluate(  # made there: sending it to the browser would take half a minute
        """() => {
             const data = new DataTransfer();
             data.items.add(new File([new Uint8Array(20 * 1024 * 1024 + 1)], "huge.jpg"));
             const input = document.querySelector("#enn-picker input[type=file]");
             input.files = data.files;
             input.dispatchEvent(new Event("change", {bubbles: true}));
           }"""
    )
    page.page.wait_for_selector("#enn-picker .enn-problem:has-text('20 MB at most')")
    # A refused file is an ordinary reply with status 422, which browsers report on the console.
    page.problems = [p for p in page.problems if "422" not in p]
    page.search("a bird")  # the page goes on


def test_more_like_this_from_a_card_and_from_the_larger_view(visit):
    page = visit()
    first, second = page.names[:2]
    page.page.click(".enn-card >> nth=0 >> text=More like this")
    page.wait_status("Like the picture")
    assert first not in page.names  # the picture itself is no answer
    page.page.click("text=Clear search")
    page.wait_status("A look into")
    page.open(1)
    assert page.page.inner_text("#enn-dialog-name") == second
    page.page.click(".enn-dialog >> text=More like this")
    page.wait_status("Like the picture")
    assert second not in page.names
    page.page.fill("#enn-text :is(textarea, input)", "water")
    page.page.press("#enn-text :is(textarea, input)", "Enter")
    page.wait_status("“water” together with the picture")


def test_the_larger_view_shows_where_a_picture_is(visit):
    page = visit()
    page.search("an animal in the zoo")
    page.page.click("#enn-count input")
    page.page.click("role=option[name='Show 96']")
    page.wait_status("best 4")
    at = page.page.eval_on_selector_all(
        ".enn-card", "all => all.findIndex(c => c.dataset.folder === 'Zoo & Park')"
    )
    page.open(at)
    facts = page.page.inner_text(".enn-facts")
    assert "Zoo & Park" in facts
    assert "pixels" in facts
    assert "similarity" in facts
    page.page.wait_for_function(
        "document.querySelector('.enn-dialog img').src.includes('pictures/large/')"
    )
    assert str(GALLERY.parent) not in page.page.content()


def test_keyboard_alone(visit):
    page = visit()
    keys = page.page.keyboard
    page.page.locator("#enn-text :is(textarea, input)").focus()
    keys.type("mountains")
    keys.press("Enter")
    page.wait_status("“mountains”")
    for _ in range(40):
        keys.press("Tab")
        if page.page.evaluate("document.activeElement.matches('.enn-open')"):
            break
    keys.press("ArrowRight")
    keys.press("Enter")
    page.page.wait_for_selector(".enn-dialog[open]")
    assert page.page.inner_text("#enn-dialog-name") == page.names[1]
    keys.press("ArrowRight")
    assert page.page.inner_text("#enn-dialog-name") == page.names[2]
    assert page.page.evaluate("document.activeElement.innerText") == "More like this"
    keys.press("Escape")
    page.page.wait_for_selector(".enn-dialog", state="hidden")
    page.page.wait_for_function(
        "name => document.activeElement.closest('.enn-card')?.dataset.name === name",
        arg=page.names[2],
    )
    keys.press("/")
    assert page.page.evaluate("document.activeElement.closest('#enn-text') !== null")


def test_captions_are_ranked(visit, photos):
    page = visit()
    page.tab("Captions")
    page.page.wait_for_selector("#enn-ranking .enn-message")
    page.choose_picture(next(photos.glob("*.webp")), "#enn-subject")
    page.page.wait_for_selector("#enn-ranking .enn-captions li")
    assert page.page.locator(".enn-captions li").count() >= 20
    page.page.fill("#enn-lines textarea", "a dog\n\n a <b>cat</b> \na dog\n2:x - y")
    page.page.click("#enn-rank")
    page.page.wait_for_function("document.querySelectorAll('.enn-captions li').length === 3")
    captions = page.page.locator(".enn-captions .enn-caption").all_inner_texts()
    assert sorted(captions) == ["2:x - y", "a <b>cat</b>", "a dog"]
    page.page.fill("#enn-lines textarea", "  \n ")
    page.page.click("#enn-rank")
    page.page.wait_for_selector("#enn-ranking >> text=No captions")


def test_a_found_picture_can_be_captioned(visit):
    page = visit()
    page.open(0)
    page.page.click(".enn-dialog >> text=Match captions")
    page.page.wait_for_selector("#enn-ranking .enn-captions li")
    assert page.page.locator("#enn-subject .enn-preview img").count() == 1


def test_the_collection_can_be_updated_while_searching(visit, photos):
    page = visit()
    page.tab("Collection")
    page.page.wait_for_selector(".enn-tile")
    table = page.page.inner_text("#enn-skipped")
    assert "broken.jpg" in table
    assert "empty.png" in table
    before = int(page.page.inner_text(".enn-tile >> nth=0 >> dd"))
    new = photos / "später dazu.webp"
    new.write_bytes(sorted(GALLERY.glob("*.webp"))[7].read_bytes())
    try:
        page.page.click("#enn-update")
        page.page.wait_for_selector("#enn-job >> text=Up to date")
        assert "1 new" in page.page.inner_text("#enn-job")
        page.page.wait_for_function(
            f"document.querySelector('.enn-tile dd').innerText === '{before + 1}'"
        )
        page.tab("Search")
        page.choose_picture(new)
        page.wait_status("Like the picture")
        assert page.names[0] == new.name
    finally:
        new.unlink()
    page.tab("Collection")
    page.page.click("#enn-update")  # other tests search here too
    page.page.wait_for_selector("#enn-job >> text=1 removed")


def test_light_and_dark(visit):
    page = visit(color_scheme="dark")
    assert page.dark
    page.page.click(".enn-theme")
    assert not page.dark
    page.page.reload()
    page.page.wait_for_selector(".enn-card")
    assert not page.dark  # the choice is remembered
    assert not visit(color_scheme="light").dark


def test_phone_width(visit):
    page = visit(viewport={"width": 360, "height": 740})
    page.search("flowers")
    wide = page.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    page.page.evaluate("document.querySelector('.enn-chips').lastChild.click()")
    page.page.wait_for_function(
        """() => { const box = document.querySelector('.enn-chips').lastChild
                     .getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; }"""
    )
    page.open(0)
    box = page.page.locator(".enn-dialog").bounding_box()
    assert box is not None
    assert box["width"] <= 360


def test_visitors_do_not_share_state(visit, photos):
    ann, bob = visit(locale="de-DE"), visit(locale="en-GB")
    ann.choose_picture(next(photos.glob("*.webp")))
    ann.wait_status("Like the picture")
    bob.search("a train")
    ann.page.fill("#enn-text :is(textarea, input)", "at dusk")
    ann.page.click("#enn-go")
    ann.wait_status("“at dusk” together with the picture")
    bob.page.click("#enn-count input")
    bob.page.click("role=option[name='Show 12']")
    bob.wait_status("“a train”: best 12")
    assert bob.page.locator("#enn-picker .enn-preview").count() == 0


def test_names_of_files_are_never_code(visit):
    page = visit()
    page.page.click("#enn-count input")
    page.page.click("role=option[name='Show 192']")
    page.page.wait_for_function("document.querySelectorAll('.enn-card').length > 30")
    odd = [n for n in page.names if "hacked" in n]
    assert len(odd) == 2
    for name in odd:
        page.open(page.names.index(name))
        assert page.page.inner_text("#enn-dialog-name") == name
        page.page.click(".enn-dialog >> text=Match captions")
        page.page.wait_for_selector("#enn-ranking .enn-captions li")
        page.tab("Search")
    assert page.page.title() == "Eigen Search"


def test_long_and_odd_text(visit):
    page = visit()
    box = "#enn-text :is(textarea, input)"
    page.page.evaluate(
        """text => { const box = document.querySelector('#enn-text :is(textarea, input)');
             box.removeAttribute('maxlength'); box.value = text;
             box.dispatchEvent(new Event('input', {bubbles: true})); }""",
        "\u202e𝕯og\u0000\u0007 🐕‍🦺 ${alert(1)} <b>" + "w " * 50_000,
    )
    page.page.press(box, "Enter")
    page.wait_status("<b>")
    assert len(page.status) < 160
    assert len(page.names) == 24


# -- requests that no page of ours makes -----------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=http://127.0.0.1:1/",
        "gradio_api/proxy=http://127.0.0.1:1/",
        "file=/etc/passwd",
        "assets/..%2f..%2f..%2f..%2fetc/passwd",
        "static//etc/passwd",
        "pictures/card/..%2f..%2fetc%2fpasswd",
        "pictures/huge/AAAA",
        "uploads/AAAA",
        "gradio_api/upload_progress?upload_id=1",
        "gradio_api/openapi.json",
        "docs",
        "monitoring",
    ],
)
def test_files_and_addresses_cannot_be_fetched(server, path):
    assert server.get(path) == 404


def test_a_symbolic_link_is_not_served_by_path(server, photos):
    link = photos / "link.webp"
    link.symlink_to("/etc/passwd")
    try:
        for path in (f"gradio_api/file={link}", "pictures/card/link.webp", "link.webp"):
            assert server.get(urllib.request.quote(path)) == 404
    finally:
        link.unlink()


def test_requests_cannot_make_the_server_open_files_or_addresses(server):
    with urllib.request.urlopen(server.url + "config") as reply:
        config = json.load(reply)
    public = {d["api_name"] for d in config["dependencies"] if d["api_visibility"] != "private"}
    assert public == set(ENDPOINTS)
    for path in ("http://127.0.0.1:1/x.png", "/etc/passwd", str(GALLERY / "credits.csv")):
        for dependency in config["dependencies"]:
            file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
            body = {
                "data": [file] * max(1, len(dependency["inputs"])),
                "fn_index": dependency["id"],
                "session_hash": "probe",
            }
            assert _post(server, "gradio_api/queue/join", json.dumps(body).encode()) == 400


def test_foreign_pages_and_hosts_are_refused(server):
    assert server.get("config", Host="evil.example") == 403
    assert _post(server, "uploads", b"x", Origin="http://evil.example") == 403
    assert _post(server, "gradio_api/upload", b"x") == 404
    assert _post(server, "uploads", b"x" * (21 * 1024 * 1024)) == 413


def test_pictures_carry_no_metadata_and_may_be_kept(visit, server):
    page = visit()
    page.wait_pictures()
    source = page.page.get_attribute(".enn-card img >> nth=0", "src")
    with urllib.request.urlopen(server.url + source) as reply:
        data = reply.read()
        assert reply.headers["content-type"] == "image/jpeg"
        assert "immutable" in reply.headers["cache-control"]
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert data[:3] == b"\xff\xd8\xff"
    assert b"Exif" not in data
    forged = source[:-1] + ("A" if source[-1] != "A" else "B")
    assert server.get(forged) == 404


def _post(server: Server, path: str, body: bytes, **headers: str) -> int:
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (BrokenPipeError, ConnectionResetError, urllib.error.URLError):
        return 413  # refused while the body was still being sent


def test_passwords_and_a_crash(chrome, photos, tmp_path):
    """With an auth file nothing is shown to strangers; after kill -9 the server starts again."""
    auth = tmp_path / "users"
    auth.write_text("ann:s3cret\n", encoding="utf-8")
    auth.chmod(0o600)
    first = Server(photos, auth_file=auth)
    try:
        assert first.get("") == 401
        assert first.get("config") == 401
        assert first.get("healthz") == 200
        sign_in: Any = {"http_credentials": {"username": "ann", "password": "s3cret"}}
        page = SearchPage(chrome.new_context(**sign_in), first)
        page.search("a castle")
        before = page.names
        first.kill()
        second = Server(photos, auth_file=auth, port=first.port)
        try:
            page.page.reload()
            page.page.wait_for_selector(".enn-card")
            page.search("a castle")
            assert page.names == before
            page.wait_pictures()
            page.close()
            if os.name == "posix":
                assert second.stop() == 0
                assert "Traceback" not in second.output()
        finally:
            second.kill()
    finally:
        first.kill()
