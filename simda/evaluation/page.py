"""What the HTML pages have in common: how they begin, and how they link the videos beside them."""

from __future__ import annotations

from html import escape
from pathlib import PurePosixPath
from urllib.parse import quote

from simda.errors import InputError


def page_head(title: str, style: str) -> list[str]:
    """The lines up to and with the heading."""
    return [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        f"<h1>{escape(title)}</h1>",
    ]


def video_link(path: str) -> str:
    """A URL of a video from its path relative to the page.

    Raises:
        InputError: the path is absolute or a URI: the page would not survive being moved or served.
    """
    if not path or "://" in path or PurePosixPath(path).is_absolute():
        raise InputError(
            f"the report's video {path!r} is not a path relative to the page; write it like videos/NAME.mp4"
        )
    # The colon is quoted too, so that no path reads as a scheme.
    return quote(path, safe="/")
