"""The page of runs that go on: it follows their files, answers to its own name and method, and touches nothing."""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import CHROMIUM, EVIL, Page, llama, write_run

from weightlora import ConfigError, cli
from weightlora.progress import Now
from weightlora.report import watch
from weightlora.report.reading import Place, read_run
from weightlora.report.watch import Watch
from weightlora.selection import EventLog


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is made again as soon as it is asked for."""
    monkeypatch.setattr(watch, "SOONEST", 0.0)
    monkeypatch.setattr(watch, "REST", 0.0)


@pytest.fixture
def watching() -> Iterator[Callable[..., Watch]]:
    """Starts servers, and ends them."""
    started: list[tuple[Watch, threading.Thread]] = []

    def start(*runs: Path) -> Watch:
        server = Watch(runs, 0)
        thread = threading.Thread(target=server.serve)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.close()
        thread.join(10)
        assert not thread.is_alive()


def ask(server: Watch, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{server.port}", **headers}.items():
            if value:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


def seen(server: Watch, folder: Path) -> Page:
    """The page as of now."""
    status, _, text = ask(server)
    assert status == 200
    file = folder / "seen.html"
    file.write_text(text, encoding="utf-8")
    return Page(file)


def go_on(folder: Path, now: Now | None = None, *, end: str = "", **log: float) -> None:
    """Append to progress.jsonl as a run does."""
    record = EventLog()
    if not (folder / "progress.jsonl").exists():
        (folder / "progress.jsonl").write_text("")
        record.open(folder / "progress.jsonl", resume_at=0)
        record.add("begin", 0, steps=9)
    record._path = folder / "progress.jsonl"
    step = now.step if now is not None else 9
    if log:
        record.add("log", step, values=log)
    if now is not None:
        record.add("end" if end else "now", step, **({"reason": end} if end else {}), **now.to_json())


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


SCOUTING = Now("scouting", 3, 9, cut_at=4, attached=14, kept=14, loss=1.25, step_s=0.5, left_s=65.0)
KEPT = Now("kept", 6, 9, attached=14, kept=5, loss=0.75, step_s=0.25, step_s_at_first=0.5, left_s=1.5, saved_s=12.0,
           saved_bytes=2**20, saved_bytes_of_all=4 * 2**20, operations=0.625, operations_so_far=0.8125)  # fmt: skip


# -- following -------------------------------------------------------------------------------------------------------


def test_a_run_is_followed_from_before_its_first_word_to_its_end(tmp_path: Path, watching: Any) -> None:
    run = tmp_path / "run"
    server = watching(run)
    page = seen(server, tmp_path)
    assert f"Waiting for {run}: no run has written anything there yet" in page.text
    run.mkdir()
    (run / ".weightlora-lock").touch()
    assert "Waiting for" in seen(server, tmp_path).text

    omega = write_run(run, llama(2), keep=5, cut=False, score=None)
    go_on(run, SCOUTING, loss=1.25)
    page = seen(server, tmp_path)
    assert "This run is going on: scouting 14 adapters, cut after step 4." in page.text
    assert "3 of 9" in page.text and "1:05" in page.text and "1.25" in page.text and "Waiting" not in page.text
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])["gates"]
    assert [float(cell["value"]) for cell in page.cells("run-0-map-0").values()] == last
    (bar,) = [attributes for tag, attributes in page.elements if tag == "progress"]
    assert (bar["max"], bar["value"]) == ("9", "3")

    write_run(run, llama(2), keep=5, score=None)
    go_on(run, KEPT, loss=0.75)
    page = seen(server, tmp_path)
    cells = page.cells("run-0-map-0")
    assert {name: float(cell["value"]) for name, cell in cells.items()} == omega
    assert sum(cell["kept"] == "1" for cell in cells.values()) == 5
    assert "This run is going on. 5 of 14 adapters were kept, cut after step 4." in page.text
    assert "12 s, 3 of 4 MiB a step" in page.text and "62.5 %" in page.text and "81.2 %" in page.text
    assert "1.25" in page.text and "progress.jsonl has the log up to step 6" in page.text

    before = files(run)
    write_run(run, llama(2), keep=5)
    go_on(run, KEPT, end="finished")
    page = seen(server, tmp_path)
    assert "This run has finished." in page.text and not [tag for tag, _ in page.elements if tag == "progress"]
    assert files(run) != before  # we have; the server has not:
    before = files(run)
    seen(server, tmp_path)
    assert files(run) == before


def test_a_page_is_sent_once(tmp_path: Path, watching: Any) -> None:
    write_run(tmp_path / "run", llama(1), score=None)
    go_on(tmp_path / "run", SCOUTING)
    server = watching(tmp_path / "run")
    status, headers, text = ask(server)
    assert status == 200 and len(text) > 1000
    for known in (headers["ETag"], f'"other", {headers["ETag"]}'):
        assert ask(server, If_None_Match=known)[::2] == (304, "")
    go_on(tmp_path / "run", KEPT)
    status, again, text = ask(server, If_None_Match=headers["ETag"])
    assert status == 200 and again["ETag"] != headers["ETag"] and "6 of 9" in text


def test_pages_are_made_seldom_and_only_when_asked_for(
    tmp_path: Path, watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = watch._make
    monkeypatch.setattr(watch, "_make", lambda *args: made.append(1) or make(*args))
    write_run(tmp_path / "run", llama(1), score=None)
    server = watching(tmp_path / "run")
    ask(server), ask(server)
    assert len(made) == 1  # nothing is new
    monkeypatch.setattr(watch, "SOONEST", 1000.0)
    go_on(tmp_path / "run", SCOUTING)
    ask(server)
    assert len(made) == 2
    go_on(tmp_path / "run", KEPT)
    assert "3 of 9" in ask(server)[2] and len(made) == 2  # not before its time


@pytest.mark.parametrize("torn", ['{"event": "cut", "step": 4, "kept": ["model.lay', "{", '{"event": "gates", "st'])
def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path, watching: Any, torn: str) -> None:
    run = tmp_path / "run"
    write_run(run, llama(1), cut=False, score=None)
    go_on(run, SCOUTING)
    for name in ("events.jsonl", "progress.jsonl"):
        with (run / name).open("a") as file:
            file.write(torn)
    page = seen(watching(run), tmp_path)
    assert "cannot be read" not in page.text and "is going on: scouting" in page.text
    with (run / "events.jsonl").open("a") as file:
        file.write("\n")
    assert "cannot be read" in seen(watching(run), tmp_path).text  # it was broken, and not half written


def test_a_run_that_falls_silent_is_said_to_and_one_that_failed_says_why(tmp_path: Path, watching: Any) -> None:
    run = tmp_path / "run"
    write_run(run, llama(1), cut=False, score=None)
    go_on(run, SCOUTING)
    server = watching(run)
    assert "is going on" in seen(server, tmp_path).text
    for file in run.iterdir():
        os.utime(file, (time.time() - 600,) * 2)
    page = seen(server, tmp_path)
    assert "Nothing was heard of this run for 10:0" in page.text and "was stopped or killed, or it hangs" in page.text
    go_on(run, SCOUTING, end="OutOfMemoryError: <b>no room</b>")
    page = seen(server, tmp_path)
    assert "This run has ended early: OutOfMemoryError: <b>no room</b>." in page.text
    assert "b" not in {tag for tag, _ in page.elements}
    go_on(run, SCOUTING)  # after a resumption without a `begin`, as of an older file, the end still counts
    with (run / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"event": "begin", "step": 3, "steps": 9}) + "\n")
    go_on(run, SCOUTING)
    assert "is going on" in seen(server, tmp_path).text


def test_slow_steps_are_no_silence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, llama(1), cut=False, score=None)
    go_on(run, Now("scouting", 3, 9, attached=7, kept=7, step_s=200.0))
    os.utime(run / "progress.jsonl", (time.time() - 600,) * 2)
    assert read_run(Place(run)).going_on
    os.utime(run / "progress.jsonl", (time.time() - 900,) * 2)
    assert not read_run(Place(run)).going_on


def test_a_folder_that_goes_away_is_waited_for(tmp_path: Path, watching: Any) -> None:
    for name in "ab":
        write_run(tmp_path / name, llama(1))
    server = watching(tmp_path / "a", tmp_path / "b")
    assert "2 runs side by side" in seen(server, tmp_path).text
    shutil.rmtree(tmp_path / "a")
    page = seen(server, tmp_path)
    assert f"Waiting for {tmp_path / 'a'}:" in page.text and "This run has finished." in page.text


def test_a_folder_that_goes_away_while_it_is_read(
    tmp_path: Path, watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", llama(1))

    def gone(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(watch, "read_run", gone)
    assert f"Waiting for {tmp_path / 'a'}:" in seen(watching(tmp_path / "a"), tmp_path).text


def test_a_suite_is_followed_as_its_runs_come(tmp_path: Path, watching: Any) -> None:
    suite = tmp_path / "out"
    suite.mkdir()
    (suite / "suite.yaml").write_text("tasks: [topics]")
    server = watching(suite)
    assert f"Waiting for {suite}" in seen(server, tmp_path).text
    write_run(suite / "runs/topics/lora/seed-0", llama(1), method="lora", cut=False)
    write_run(suite / "runs/topics/weightlora/seed-0", llama(1), score=None)
    go_on(suite / "runs/topics/weightlora/seed-0", KEPT)
    page = seen(server, tmp_path)
    row = "topics/weightlora/seed-0 kept 5 of 14 adapters 6 of 9 0.75 0.25 s 1.5 s 12 s, 3 of 4 MiB a step"
    assert row.removeprefix("topics/") in page.text and "lora/seed-0 finished" in page.text
    write_run(suite / "runs/topics/weightlora/seed-1", llama(1), seed=1)
    assert "3 runs side by side" in seen(server, tmp_path).text


def test_a_folder_of_runs_is_followed_as_they_come(tmp_path: Path, watching: Any) -> None:
    runs = tmp_path / "runs"
    (runs / "notes").mkdir(parents=True)
    server = watching(runs)
    assert f"Waiting for {runs}" in seen(server, tmp_path).text
    write_run(runs / "a", llama(1), score=None)
    assert "3 of 7 adapters were kept" in seen(server, tmp_path).text
    write_run(runs / "b", llama(1))
    assert "2 runs side by side" in seen(server, tmp_path).text


def test_names_are_text_here_too(tmp_path: Path, watching: Any) -> None:
    run = tmp_path / "<script>run\u202e"
    write_run(run, EVIL, cut=False, score=None)
    go_on(run, Now("<i>scouting</i>", 3, 9, scores={"<u>": 0.5, "\u2066": 1.0}), **{"eval_<s>": 0.5})
    page = seen(watching(run, tmp_path / "<img src=x>\u202e"), tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert not {"i", "s", "u", "img"} & set(tags) and tags.count("script") == 2
    assert not set("\u202e\u2066\ud800\x00\x1b") & set(page.source) and "<img src=x>" in page.text


# -- what it answers -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, watching: Any) -> Watch:
    write_run(tmp_path / "run", llama(1))
    return watching(tmp_path / "run")


def test_it_answers_to_its_own_name_only(server: Watch) -> None:
    port = server.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert ask(server, Host=host)[0] == 200
    for host in ("", "evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"[::1]:{port}",
                 f"127.0.0.1.evil.example:{port}", f"127.0.0.1:{port}, evil.example"):  # fmt: skip
        for method in ("GET", "HEAD", "POST"):
            status, headers, text = ask(server, method=method, Host=host)
            assert status == 403 and "adapters" not in text and "ETag" not in headers, host


def test_it_only_reads(server: Watch) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"):
        status, headers, _ = ask(server, method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method
    status, headers, text = ask(server, method="HEAD")
    assert (status, text) == (200, "") and headers["ETag"] == ask(server)[1]["ETag"]


def test_there_is_no_other_file(server: Watch, tmp_path: Path) -> None:
    for path in ("/run", "/metrics.json", "/../run/metrics.json", "/..%2frun/metrics.json", "//etc/passwd", "/%00",
                 str(tmp_path / "run/metrics.json"), "/index.html", f"{server.address}", "*"):  # fmt: skip
        status, _, text = ask(server, path)
        assert status in (400, 404) and "accuracy" not in text, path
    assert ask(server, "/favicon.ico")[::2] == (204, "")
    assert ask(server, "/?anything")[0] == 200


def test_the_page_may_load_nothing_from_elsewhere(server: Watch, tmp_path: Path) -> None:
    _, headers, _ = ask(server)
    page = seen(server, tmp_path)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert headers["Content-Security-Policy"] == f"{policy}; frame-ancestors 'none'"
    assert policy.startswith("default-src 'none';") and "connect-src 'self'" in policy
    assert not re.search(r"unsafe|https?:|\*", policy)
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert not re.search(r"url\(|@import|https?://", page.source)


def test_it_listens_on_this_machine_alone(server: Watch) -> None:
    assert server._server.server_address == ("127.0.0.1", server.port)
    assert server.address == f"http://127.0.0.1:{server.port}/"


# -- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """
const said = {}, open = () => document.querySelector("details");
window.addEventListener("load", () => {
  open().open = true;
  const plot = document.querySelector(".plot");
  plot.focus();
  plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  said.before = document.getElementById("tip").textContent;
  scrollTo(0, 300);
  const [section] = document.querySelectorAll("section.run");
  let times = 0;
  document.addEventListener("renewed", () => {
    if (!document.querySelector("main").textContent.includes("5 of 14 adapters were kept")) return;
    said.same = section === document.querySelector("section.run") && plot === document.activeElement;
    said.open = open().open;
    said.scrolled = scrollY;
    said.kept = document.querySelectorAll('#run-0-map-0 [data-kept="1"]').length;
    said.tip = document.getElementById("tip").textContent;
    said.now = plot.querySelectorAll(".m.now").length;
    said.over = document.documentElement.scrollWidth - innerWidth;
    said.live = document.getElementById("live").textContent;
    const result = document.createElement("output");
    result.textContent = JSON.stringify(said);
    document.getElementById("tip").after(result);
  }, {once: false});
});
"""


def browse(address: str, folder: Path, width: int = 1440) -> tuple[str, str]:
    """The document after some seconds, and what the console says."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    options += ["--virtual-time-budget=9000", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    done = subprocess.run([str(CHROMIUM), *options, address], capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_real_browser_the_page_follows_the_run(
    tmp_path: Path, watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_run(run, llama(2), keep=5, cut=False, score=None)
    go_on(run, SCOUTING, loss=1.25)
    server = watching(run)
    asked = []
    answer = watch._Handler._answer

    def counting(handler: Any) -> None:
        asked.append(handler.path)
        if len(asked) == 3:  # the run goes on while the page is open
            write_run(run, llama(2), keep=5, score=None)
            go_on(run, KEPT, loss=0.75)
        answer(handler)

    monkeypatch.setattr(watch._Handler, "_answer", counting)
    shown, complaints = browse(server.address, tmp_path)
    assert complaints == "" and set(asked) <= {"/", "/favicon.ico"} and len(asked) >= 3
    assert "5 of 14 adapters were kept" in shown and "Up to date at" in shown

    write_run(run, llama(2), keep=5, cut=False, score=None)
    go_on(run, SCOUTING)
    asked.clear()
    pages = server.pages.page

    def probed() -> tuple[bytes, str]:
        text, tag = pages()
        text = re.sub(rb'<meta http-equiv="Content-Security-Policy"[^>]*>', b"", text)
        return text.replace(b"</body>", f"<script>{PROBE}</script></body>".encode()), tag

    monkeypatch.setattr(server.pages, "page", probed)
    monkeypatch.setattr(watch, "_policy", lambda text: "default-src 'self' 'unsafe-inline'")
    shown, complaints = browse(server.address, tmp_path)
    said = json.loads(html.unescape(re.findall(r"<output>(.*?)</output>", shown)[-1]))
    assert complaints == "" and said["same"] and said["open"] and said["scrolled"] >= 300
    assert said["kept"] == 5 and said["now"] == 1 and said["over"] <= 0
    assert said["before"].startswith(f"{llama(2)[0]}: omega ") and "kept" not in said["before"]
    assert said["tip"].startswith(f"{llama(2)[0]}: omega ") and "kept: " in said["tip"]


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_ends_with_ctrl_c(tmp_path: Path) -> None:
    write_run(tmp_path / "run", llama(1), score=None)
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from weightlora.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "watch", "run", "empty", "runn", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = re.search(r"Watching run, empty, runn at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C", line)
        assert port is not None, line
        assert process.stdout.readline() == "There is no run in empty yet; the page waits for one.\n"
        there = "There is no folder runn yet; the page waits for it; did you mean 'run'?\n"
        assert process.stdout.readline() == there
        connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=20)
        connection.request("GET", "/")
        assert "Waiting for empty" in connection.getresponse().read().decode()
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("No longer watching; the runs go on.\n", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
    assert files(tmp_path) == before


def test_a_mistake_is_one_line(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watching: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("x: 1")
    code, out, err = command("watch", "recipe.yaml")
    assert (code, out) == (2, "") and "is a file; give the folder of a run" in err and err.count("\n") == 1
    taken = watching(tmp_path / "run").port
    code, out, err = command("watch", "run", "--port", str(taken))
    assert (code, out) == (2, "") and f"--port {taken} cannot be used: address already in use" in err
    code, out, _ = command("watch", "--help")
    assert code == 0 and "Example:" in out and "127.0.0.1" in out


def test_without_a_port_any_is_taken(tmp_path: Path, watching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watching(tmp_path / "run").port
    monkeypatch.setattr(watch, "PORT", taken)
    other = Watch([tmp_path / "run"])
    other._server.server_close()
    assert other.port != taken
    with pytest.raises(ConfigError, match="cannot be used"):
        Watch([tmp_path / "run"], 70_000)
