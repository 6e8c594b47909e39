"""The report of runs while they go: a page on this machine that brings itself up to date.

The server reads the files of the runs it was given and writes none, so that nothing it does touches a run. It
listens on 127.0.0.1, has one page, and answers to its own name only: a page of another site that leads its own name to
this address, as DNS rebinding does, is refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weightlora import durable
from weightlora.errors import ConfigError, did_you_mean, short
from weightlora.report import page
from weightlora.report.comparison import compare
from weightlora.report.reading import FILES, STATE_FILE, Place, find_runs, is_run, name_apart, read_run, runs_inside
from weightlora.report.views import view

ADDRESS = "127.0.0.1"
PORT = 8724  # by default, or any other where it is taken
SOONEST = 1.0  # seconds between two looks at the files
REST = 20.0  # times as long as a page took to make, no other is made: the runs need the processor


class Watch:
    """A server of one page about runs, on `address`.

    Args:
        runs: folders of runs or suites, or of several runs, there or not yet.
        port: default: `PORT`, or any that is free; 0 picks one.

    Raises:
        ConfigError: a place is a file, or the port cannot be used.
    """

    def __init__(self, runs: Sequence[str | Path], port: int | None = None) -> None:
        self.pages = _Pages([Path(run) for run in runs])
        self._server = _listen(port)
        self._server.pages = self.pages

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def address(self) -> str:
        return f"http://{ADDRESS}:{self.port}/"

    def waiting(self) -> list[str]:
        """A line for every place without a run as yet, with the folder that may be meant."""
        return [_no_run_in(Path(place)) for place in _find(self.pages.folders)[1]]

    def serve(self) -> None:
        """Answer until `close` is called from another thread, or Ctrl-C is pressed."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def close(self) -> None:
        """End `serve`."""
        self._server.shutdown()


class _Pages:
    """The page as of now, made again when a file has changed and somebody asks."""

    def __init__(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if folder.is_file():
                shown = short(str(folder), 200)
                raise ConfigError(f"{shown} is a file; give the folder of a run, its `output_dir`, or that of a suite.")
        self.folders = folders
        self._lock = threading.Lock()
        self._stamp: Any = None
        self._page, self._tag = b"", ""
        self._not_before = 0.0

    def page(self) -> tuple[bytes, str]:
        """The page and its tag, which differs where the page does."""
        with self._lock:
            if time.monotonic() >= self._not_before:
                started = time.monotonic()
                self._renew()
                done = time.monotonic()
                self._not_before = done + max(SOONEST, REST * (done - started))
            return self._page, self._tag

    def _renew(self) -> None:
        places, waiting = _find(self.folders)
        stamp = waiting, [(place, _stamp(place.folder)) for place in places]
        if stamp == self._stamp:
            return
        text = _make(places, waiting)
        self._page, self._stamp = text.encode(), stamp
        self._tag = f'"{hashlib.sha256(self._page).hexdigest()[:32]}"'


def _find(folders: Sequence[Path]) -> tuple[list[Place], list[str]]:
    """The runs that are there, and the places where there is none yet."""
    places: list[Place] = []
    waiting = []
    for folder in folders:
        try:
            if found := _runs_in(folder):
                places += found
                continue
        except (OSError, ConfigError):  # it has just gone, or a suite has no run yet
            pass
        waiting.append(str(folder))
    once = {place.folder.resolve(): place for place in places}
    return list(once.values()), waiting


def _no_run_in(folder: Path) -> str:
    if folder.is_dir():
        return f"There is no run in {folder} yet; the page waits for one."
    beside = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
    return f"There is no folder {folder} yet; the page waits for it{did_you_mean(folder.name, beside) or '.'}"


def _runs_in(folder: Path) -> list[Place]:
    """The run that it is, or those of the suite that it is, or those that lie in it side by side."""
    if (folder / durable.SUITE_FILE).is_file() or is_run(folder):
        return find_runs([folder])
    runs = runs_inside(folder)
    return find_runs(runs) if runs else []


def _stamp(folder: Path) -> Any:
    """What changes when a run has written something, and when it has been quiet for long."""
    newest = [checkpoint / STATE_FILE for checkpoint in durable.checkpoints(folder)[:2]]
    found = []
    for file in (*(folder / name for name in FILES), *newest):
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((str(file), status.st_mtime_ns, status.st_size))
    latest = max((mtime for _, mtime, _ in found), default=0) / 1e9
    return found, int(max(0.0, time.time() - latest) // 60)


def _make(places: Sequence[Place], waiting: Sequence[str]) -> str:
    runs, waiting = [], list(waiting)
    for place in places:
        try:
            runs.append(read_run(place, live=True))
        except OSError:  # it has just gone
            waiting.append(str(place.folder))
    name_apart(runs)
    comparison = compare(runs) if len(runs) > 1 else None
    return page.page([view(run) for run in runs], comparison, live=True, waiting=waiting)


# -- the server ------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    pages: _Pages

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _listen(port: int | None) -> _Server:
    try:
        return _Server((ADDRESS, PORT if port is None else port), _Handler)
    except (OSError, OverflowError) as error:
        if port is None:
            return _Server((ADDRESS, 0), _Handler)
        why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"--port {port} cannot be used: {why}; give another, or 0 for any that is free.") from None


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of `/`."""

    server: _Server
    server_version, sys_version = "weightlora", ""
    timeout = 10  # seconds for a request to arrive

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if not self._is_for_us():
            return
        path = urlsplit(self.path)
        if path.scheme or path.netloc or path.path not in ("/", "/favicon.ico"):
            self._send(HTTPStatus.NOT_FOUND, b"There is one page here: /\n", "text/plain")
        elif path.path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT)
        else:
            text, tag = self.server.pages.page()
            known = self.headers.get("If-None-Match", "")
            if tag in (entry.strip() for entry in known.split(",")):
                self._send(HTTPStatus.NOT_MODIFIED, tag=tag)
            else:
                self._send(HTTPStatus.OK, text, "text/html", tag, _policy(text))

    def _refuse_method(self) -> None:
        if self._is_for_us():
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"This page is only read.\n", "text/plain")

    def _is_for_us(self) -> bool:
        port = self.server.server_address[1]
        names = {f"{ADDRESS}:{port}", f"localhost:{port}"}
        hosts = [host.strip().lower() for host in self.headers.get_all("Host", [])]
        if len(hosts) == 1 and hosts[0] in names:
            return True
        text = f"This page answers to {' and '.join(sorted(names))} only; a tunnel has to start at that port too.\n"
        self._send(HTTPStatus.FORBIDDEN, text.encode(), "text/plain")
        return False

    def _send(
        self, status: HTTPStatus, body: bytes = b"", kind: str = "", tag: str = "", policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(status)
        headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        if tag:
            headers["ETag"] = tag
        if kind:
            headers |= {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _policy(text: bytes) -> str:
    """The page's own."""
    found = re.search(rb'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    return found[1].decode() if found else "default-src 'none'"
