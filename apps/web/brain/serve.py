"""The brain demo: loads the model and serves the page that predicts age and learns from true ages.

    from apps.web.brain.serve import serve
    serve()

The page itself is in `apps.web.brain.page`, the protection around it in `apps.web.server`.
"""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from apps.web import server

server.prepare_environment()  # before anything imports gradio

if TYPE_CHECKING:
    from fastapi import FastAPI

    from apps.web.brain.handlers import OfferedScan
    from apps.web.brain.session import Desk, Session, Sessions
    from neuro.age.predict import BrainAge
    from neuro.teach import Site

__all__ = ["create_app", "offered_scans", "routes", "serve", "session_csv"]


COLUMNS = (
    "scan",
    "predicted_age",
    "flags",
    "interval_low",
    "interval_high",
    "age",
    "gap",
    "before_teaching",
    "bias_corrected",
    "qc_dice",
    "qc_brain_ml",
    "qc_field_of_view",
    "qc_flags",
    "out_of_distribution",
    "error",
)


def create_app(
    brain: BrainAge, sessions: Sessions, desk: Desk, offered: Mapping[str, OfferedScan]
) -> FastAPI:
    """A FastAPI application with the page, its files and /healthz; run it behind a `Guard`."""
    from fastapi import FastAPI

    from apps.web.brain.files import add_brain_routes
    from apps.web.brain.handlers import BrainHandlers
    from apps.web.brain.page import TITLE, build, head, theme
    from apps.web.visitors import Shelf
    from neuro.teach import Site, journal_of

    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    sites = Shelf(journal_of, Site.open)

    def table(session: Session, site: Site) -> str:
        return session_csv(brain, session, site)

    add_brain_routes(app, sessions, desk, sites, table)
    return server.mount_page(
        app,
        build(BrainHandlers(brain, sessions, desk, sites, offered)),
        theme=theme(),
        head=head(),
    )


def routes() -> tuple[server.Route, ...]:
    """What of the application may be reached."""
    from apps.web.brain.files import BRAIN_ROUTES

    health = server.Route("GET", "/healthz", public=True)
    return (health, *server.GRADIO_ROUTES, *BRAIN_ROUTES)


def serve(
    model: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth_file: Path | None = None,
    open_browser: bool = False,
    forwarded_allow_ips: str = "",
) -> None:
    """Loads the model and serves the page until Ctrl+C.

    Args:
        model: a file of `enn brain train`. None: the one that comes along.
        host, port, auth_file, open_browser, forwarded_allow_ips: see `apps.web.server.run`.

    Raises:
        ValueError: no brain-age model.
        OSError: no such file, the port is taken, and the like.
    """
    if auth_file is not None:
        server.read_auth_file(auth_file, warn=lambda _: None)  # fail before the slow part
    server.check_port(host, port, forwarded_allow_ips)
    _say("Loading the model…")
    from apps.web.brain.session import Desk, Sessions
    from neuro.age.predict import BrainAge

    brain = BrainAge.load(model)
    sessions = Sessions()
    desk = Desk(brain)
    desk.warm_up()
    try:
        offered = {scan.sample.key: scan for scan in offered_scans(sessions.root)}
        server.run(
            create_app(brain, sessions, desk, offered),
            routes=routes(),
            host=host,
            port=port,
            auth_file=auth_file,
            title="The brain page",
            visitors_can="upload scans and teach",
            open_browser=open_browser,
            forwarded_allow_ips=forwarded_allow_ips,
        )
    finally:
        desk.close()
        sessions.close()


def offered_scans(folder: Path) -> Iterator[OfferedScan]:
    """Scans to try: the template, and heads of ENN_DATA if that is set.

    Args:
        folder: where the template is written.
    """
    from apps.web.brain.handlers import OfferedScan
    from apps.web.brain.html import Sample
    from neuro.scans.find import ScanError, find_scans

    note = "The MNI152 template: an average of 152 people, no person. It has no age."
    template = folder / "mni152"
    _write_template(template)
    yield OfferedScan(Sample("mni152", "MNI152 template", note), template, "mni")
    data = os.environ.get("ENN_DATA")
    if not data:
        return
    for place, origin in (
        ("t1w_misc", "From another scanner than the training scans."),
        ("ixi_hh/heads_2mm", "IXI, Hammersmith: the shipped model has learned from this person."),
    ):
        try:
            scans = find_scans([Path(data) / place])
        except (ScanError, OSError):
            continue
        for scan in scans:
            known = "" if scan.age is None else f" Age {scan.age:g}."
            sample = Sample(f"{place}/{scan.name}", scan.name, origin + known)
            yield OfferedScan(sample, scan.path, "head", scan.age)


def session_csv(brain: BrainAge, session: Session, site: Site | None) -> str:
    """The session's scans as CSV, in the columns of `COLUMNS`."""
    from apps.web.brain.handlers import CONFIDENCE

    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, COLUMNS)
    table.writeheader()
    for scan in list(session.scans.values()):
        row: dict[str, object] = {"scan": _cell(scan.label), "age": scan.age, "error": scan.error}
        if scan.looked is not None:
            estimate = brain.estimate(
                scan.looked.seen,
                site=site,
                bias=brain.model.bias,
                confidence=CONFIDENCE,
            )
            quality = scan.looked.prepared.quality
            row |= {
                "predicted_age": _years(estimate.age),
                "interval_low": _years(estimate.low),
                "interval_high": _years(estimate.high),
                "gap": _years(estimate.gap),
                "before_teaching": "" if estimate.age is None else _years(estimate.raw),
                "bias_corrected": _years(estimate.corrected),
                "qc_dice": quality.dice,
                "qc_brain_ml": quality.brain_ml,
                "qc_field_of_view": quality.field_of_view,
                "flags": "; ".join(f"{flag.name}: {flag.text}" for flag in estimate.flags),
                "qc_flags": " ".join(flag.name for flag in estimate.flags),
                "out_of_distribution": _years(estimate.out_of_distribution),
                "error": estimate.error,
            }
        table.writerow(row)
    return stream.getvalue()


def _years(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def _cell(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in "=+-@\t" else text


def _write_template(path: Path) -> None:
    import nibabel

    from neuro.scans.template import MNI_AFFINE, load_template

    path.write_bytes(nibabel.Nifti1Image(load_template()[0], MNI_AFFINE).to_bytes())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
