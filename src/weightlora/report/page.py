"""The report as one HTML file that loads nothing: style, script and pictures are inside; a policy forbids the rest."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from weightlora import __version__, durable
from weightlora.errors import ConfigError, short
from weightlora.report import svg
from weightlora.report.charts import Table, readable
from weightlora.report.comparison import Comparison
from weightlora.report.views import RunView, table_of_runs

GENERATOR = "weightlora report"
MOST_BYTES = 2_900_000  # of the page
MOST_ROWS = 2400  # of the table behind a picture
_FOLDER = Path(__file__).parent


def page(
    views: Sequence[RunView], comparison: Comparison | None, *, live: bool = False, waiting: Sequence[str] = ()
) -> str:
    """The whole file, as text. Runs for which there is no room are named and left out.

    Args:
        live: it asks its server for itself again, and shows what is new.
        waiting: places of runs that have written nothing yet.
    """
    templates = _templates()
    style, script, renewing = (_text(file) for file in ("page.css", "page.js", "live.js"))
    parts, links, left_out = [], [], []
    if live:
        parts.append(templates.get_template("live.html").render(runs=table_of_runs(views), waiting=waiting))
    if comparison is not None:
        parts.append(templates.get_template("comparison.html").render(found=comparison))
        links.append(("comparison", "Side by side"))
    size = sum(len(part.encode()) for part in parts)
    for i, view in enumerate(views):
        own = templates.get_template("run.html").render(view=view, id=f"run-{i}", alone=len(views) == 1)
        if size + len(own.encode()) > MOST_BYTES and links:
            left_out.append(readable(view.run.name))
            continue
        size += len(own.encode())
        parts.append(own)
        links.append((f"run-{i}", view.run.name))
    if left_out:
        text = f"There was no room for {len(left_out)} runs; make another report for them: {', '.join(left_out[:50])}."
        parts.insert(0, Markup('<p class="problem" role="note">{}</p>').format(text))
    methods = list(dict.fromkeys(readable(view.run.method) for view in views))
    tasks = list(dict.fromkeys(readable(view.run.task) for view in views if view.run.task))
    single = views[0].run if len(views) == 1 else None
    title = readable(single.name) if single else f"{len(views)} runs side by side" if views else "Waiting for runs"
    return templates.get_template("page.html").render(
        generator=GENERATOR,
        version=__version__,
        title=title,
        subtitle=" · ".join([", ".join(methods[:12]), *([", ".join(tasks[:12])] if tasks else [])]),
        links=links if len(links) > 1 else [],
        parts=[Markup(part) for part in parts],
        count=len(views),
        live=Markup(renewing) if live else "",
        live_hash=_hash(renewing),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def write(text: str, out: Path, *, force: bool) -> None:
    """Writes the page whole or not at all.

    Raises:
        ConfigError: `out` is a folder, or a file that is no report of ours and `force` is not given.
    """
    shown = short(str(out), 200)
    if out.is_dir():
        raise ConfigError(f"`out` {shown} is a folder; give a file, such as {short(str(out / 'report.html'), 200)}.")
    if out.exists() and not force and not is_report(out):
        raise ConfigError(
            f"{shown} is there already and no report; choose another file, or pass --force to replace it."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_whole(out, text)


def is_report(file: Path) -> bool:
    """Whether we have written it."""
    with file.open("rb") as opened:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in opened.read(1024)


@functools.cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _templates() -> Any:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters |= {
        "readable": readable,
        "readable_long": svg.readable_long,
        "right_aligned": _right_aligned,
        "ticks": _ticks,
    }
    made.globals |= {"draw": svg.draw, "capped": _capped}
    return made


def _ticks(text: str) -> Markup:
    """Words of ours, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _right_aligned(table: Table) -> list[bool]:
    """Which columns hold numbers."""
    header, rows = table
    found = []
    for i in range(len(header)):
        cells = [row[i] for row in rows[:200] if row[i] not in ("", "–", "reference")]
        found.append(bool(cells) and all(re.fullmatch(r"[-+]?[\d,.]+(e[-+]?\d+)?( .*|–\d+)?", cell) for cell in cells))
    return found


def _capped(table: Table) -> tuple[Table, str]:
    header, rows = table
    note = f"The first {MOST_ROWS} of {len(rows)} rows." if len(rows) > MOST_ROWS else ""
    return (header, rows[:MOST_ROWS]), note
