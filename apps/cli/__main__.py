"""Where `enn` and `python -m apps.cli` start: without its extras it says which to install."""

from __future__ import annotations

import os
import sys

from apps.cli.extras import missing_package

__all__ = ["main"]


def main() -> None:
    """Run the command line; 2 and one line where a package is missing that it needs to start."""
    try:
        from apps.cli.main import app
    except ModuleNotFoundError as error:
        if os.environ.get("ENN_DEBUG"):
            raise
        print(f"enn: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
