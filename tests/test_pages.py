"""Reports and live pages before axe-core, in a real Chromium. `scripts/test-pages` brings both, and runs it."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import CHROMIUM, llama, write_run
from test_watch import KEPT, SCOUTING, ask, at_once, go_on, watching

from weightlora import write_report
from weightlora.selection import EventLog

assert at_once and watching  # fixtures

AXE = os.environ.get("WEIGHTLORA_AXE")  # axe.min.js
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
ASK = """
axe.run(document, {runOnly: RULES}).then((found) => {
  const said = {
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: innerWidth,
    over: document.documentElement.scrollWidth - innerWidth,
    passes: found.passes.length,
    violations: found.violations.map((v) => [v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 120)).slice(0, 3)]),
  };
  const result = document.createElement("output");
  result.id = "axe";
  result.textContent = JSON.stringify(said);
  document.body.append(result);
});
""".replace("RULES", json.dumps(RULES))


def examined(page: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What axe-core says of a page."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    script = Path(str(AXE)).read_text(encoding="utf-8")
    file = folder / "examined.html"
    scripts = f"<script>{script}</script><script>{ASK}</script>"
    file.write_text(text.replace("</body>", f"{scripts}</body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    options += ["--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shown = subprocess.run([str(CHROMIUM), *options, file.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.findall(r'<output id="axe">(.*?)</output>', shown)[0]))


def one_run(folder: Path, watching: Callable[..., Any]) -> str:
    write_run(folder / "run", llama(2), keep=5)
    return write_report([folder / "run"], folder / "report.html").read_text(encoding="utf-8")


def several(folder: Path, watching: Callable[..., Any]) -> str:
    runs = [folder / f"{method}-{seed}" for method in ("weightlora", "lora") for seed in (0, 1)]
    for i, run in enumerate(runs):
        write_run(run, llama(2), keep=5, seed=i % 2, method=run.name.split("-")[0], score=0.5 + i / 10)
    return write_report(runs, folder / "report.html").read_text(encoding="utf-8")


def by_evidence(folder: Path, watching: Callable[..., Any]) -> str:
    """Maps of several rules."""
    scores = write_run(folder / "run", llama(2), keep=5, cut=False)
    log = EventLog()
    log._path = folder / "run/events.jsonl"
    rules = dict.fromkeys(("snr", "kfac", "coverage", "leave_one_out", "output"), scores)
    log.add("evidence", 4, rule="kfac", steps=4, scores=rules, effective_rank=2.5, curve=[0.5, 1.0])
    return write_report([folder / "run"], folder / "report.html").read_text(encoding="utf-8")


def waiting(folder: Path, watching: Callable[..., Any]) -> str:
    return ask(watching(folder / "not-there"))[2]


def scouting(folder: Path, watching: Callable[..., Any]) -> str:
    write_run(folder / "run", llama(2), keep=5, cut=False, score=None)
    go_on(folder / "run", SCOUTING, loss=1.25)
    return ask(watching(folder / "run"))[2]


def kept(folder: Path, watching: Callable[..., Any]) -> str:
    write_run(folder / "run", llama(2), keep=5, score=None)
    go_on(folder / "run", KEPT, loss=0.75)
    return ask(watching(folder / "run"))[2]


PAGES = [one_run, several, by_evidence, waiting, scouting, kept]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or AXE is None, reason="WEIGHTLORA_AXE names no axe.min.js: scripts/test-pages")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 500])  # Chromium's windows are never narrower
@pytest.mark.parametrize("made", PAGES, ids=lambda made: made.__name__)
def test_nothing_stands_in_anybodys_way(
    made: Callable[..., str], width: int, dark: bool, tmp_path: Path, watching: Callable[..., Any]
) -> None:
    said = examined(made(tmp_path, watching), tmp_path, width, dark)
    assert said["violations"] == [] and said["passes"] > 10
    assert said["dark"] == dark and said["over"] <= 0
