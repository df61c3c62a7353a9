"""``python -m ept_fast``: the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; say what to install if it cannot run."""
    try:
        from ept_fast.cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("Error: click not installed: pip install ept-fast", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
