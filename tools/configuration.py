"""Writes docs/configuration.md from the types of the settings: `python -m tools.configuration [--check]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import typer

from bear_grpc.cli import app
from bear_grpc.config.fields import all_settings
from bear_grpc.config.reference import reference
from bear_grpc.config.sources import FLAGS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def flags_of_serve() -> dict[str, str]:
    """The flags of `bear serve` by the names of their settings."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    names = {flag: name for name, flag in FLAGS.items()}
    flags = {option.name: max(option.opts, key=len) for option in serve.params}
    return {
        names.get(flag, name): flag for name, flag in flags.items() if names.get(flag, name) in all_settings()
    }


def main(arguments: list[str] | None = None) -> int:
    """Gives the exit code: 1 if the page is not as the types tell it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    page = reference(flags_of_serve())
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/configuration.md is not up to date: python -m tools.configuration writes it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
