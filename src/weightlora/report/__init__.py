"""What a run, or several, came to, as a page to look at: from the files they wrote to one HTML file and pictures.

reading      files as plain data; what cannot be read is said
evidence     the numbers a method went by, and the reason for every kept adapter
comparison   several runs: spread, paired differences, agreement, score against cost
charts       pictures as data; svg draws them for the page, paper for papers
views, page  what is said of a run, and the file

Nothing here imports PyTorch, so a report takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from weightlora.report.reading import find_runs, name_apart, read_run

__all__ = ["write_report"]


def write_report(
    runs: Iterable[str | Path],
    out: str | Path = "report.html",
    *,
    figures: str | Path | None = None,
    reference: str | None = None,
    force: bool = False,
) -> Path:
    """Write one self-contained HTML file on one or more runs.

    Args:
        runs: folders of runs, finished or not, or of a suite, which stands for all its runs, or one that holds runs.
        out: the file. An earlier report there is replaced.
        figures: a folder for every picture as PNG and SVG.
        reference: the group that differences are from; by default plain LoRA, else the first.
        force: replace a file that is no report, and write pictures beside other files.

    Returns:
        `out`.

    Raises:
        ConfigError: a folder is no run, no group is called `reference`, or `out` or `figures` is in use.
    """
    from weightlora.report import page, paper
    from weightlora.report.comparison import compare
    from weightlora.report.views import all_charts, view

    out = Path(out)
    found = [read_run(place) for place in find_runs(runs)]
    name_apart(found)
    if figures is not None:
        paper.check_folder(Path(figures), force=force)
    compared = compare(found, reference)
    comparison = compared if len(found) > 1 else None
    views = [view(run) for run in found]
    page.write(page.page(views, comparison), out, force=force)
    if figures is not None:
        charts = {v.run.name: all_charts(v) for v in views}
        if comparison is not None:
            charts = {"comparison": [chart for _, part in comparison.charts for chart in part], **charts}
        paper.save(charts, Path(figures))
    return out
