"""The brain page's server with a tiny model, behind its guard, in a thread of the tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import uvicorn
from tiny_brain_models import tiny_model

from apps.web import server
from apps.web.brain.serve import create_app, offered_scans, routes
from apps.web.brain.session import Desk, Sessions
from apps.web.brain.worker import Worker
from apps.web.connections import Proxies
from apps.web.visitors import Visitors
from neuro.age.calibrate import Conformal
from neuro.age.model import features_of
from neuro.age.population import summarise
from neuro.age.predict import BrainAge

__all__ = ["LiveBrainServer", "tiny_brain"]


def tiny_brain() -> BrainAge:
    """Random weights with all that teaching and intervals need."""
    rng = np.random.default_rng(0)
    model = tiny_model()
    model.conformal = Conformal(tuple(rng.normal(0, 6, 60)))
    inputs = np.abs(rng.normal(size=(8, 2, 8, 10, 12, 10))).astype(np.float16)
    model.population = summarise([features_of(model, each) for each in inputs])
    return BrainAge(model, None, "ab" * 32, (20.0, 82.0))


class LiveBrainServer:
    """Serves until `stop`.

    Args:
        root: folder for sessions.
        users: names and passwords, or None.
        loopback: whether it behaves as if only this machine could reach it.
        worker: prepares scans; a new one by default.
    """

    def __init__(
        self,
        root: Path,
        *,
        users: Mapping[str, str] | None = None,
        loopback: bool = True,
        worker: Worker | None = None,
    ) -> None:
        self.brain = tiny_brain()
        self.sessions = Sessions(root)
        self.desk = Desk(self.brain, worker)
        self.offered = {scan.sample.key: scan for scan in offered_scans(root)}
        app = create_app(self.brain, self.sessions, self.desk, self.offered)
        visitors = Visitors(passwords=users is not None, loopback=loopback)
        guarded = server.Guard(app, routes=routes(), users=users, visitors=visitors)
        self._listener = server._listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        config = server.configuration(guarded, Proxies())
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        self.desk.close()
        self.sessions.close()
