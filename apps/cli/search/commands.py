"""The commands of `enn search`, in the order in which its help lists them: that of work."""

from __future__ import annotations

from apps.cli.search import (
    backup,
    caption,
    compact,
    evaluate,
    export_import,
    export_model,
    history,
    index,
    info,
    query,
    teach,
    train,
    upgrade,
)
from apps.cli.search.group import search_app

__all__ = ["search_app"]

for _module in (
    *(index, query, teach, history, upgrade, caption, info, compact, backup, export_import),
    *(evaluate, train, export_model),
):
    search_app.add_typer(_module.app)
