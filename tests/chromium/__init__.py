"""A headless Chromium driven over its DevTools protocol, through two pipes and the standard library alone.

Only what the tests of the HTML report need: open a page, run expressions in it, and know what it logged, asked for and
showed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from select import select
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # containers run tests as root, and the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
)
# Chromium reads commands from descriptor 3 and writes to 4; the shell puts the pipes there.
ON_PIPES = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
TIMEOUT = 30.0


def executable() -> str | None:
    """Path of a Chromium: `LORA_COMPRESS_CHROMIUM`, or the first that is installed."""
    given = os.environ.get("LORA_COMPRESS_CHROMIUM")
    names = (given,) if given else NAMES
    return next((found for found in map(shutil.which, names) if found is not None), None)


class BrowserError(Exception):
    """Chromium refused a command, died or did not answer."""


class Browser:
    """One process."""

    def __init__(self, program: str, profile: Path) -> None:
        from_us, to_browser = map(_high, os.pipe())
        from_browser, to_us = map(_high, os.pipe())
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", ON_PIPES, "bash", str(from_us), str(to_us), *command],  # noqa: S607
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._commands, self._answers = to_browser, from_browser
        self._received = b""
        self._number = 0
        self._events: deque[dict[str, Any]] = deque()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError, BrowserError):
            self.send("Browser.close")
        os.close(self._commands)
        os.close(self._answers)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        payload = json.dumps(message).encode() + b"\0"
        while payload:
            payload = payload[os.write(self._commands, payload) :]
        deadline = time.monotonic() + TIMEOUT
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                break
            self._events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def events(self) -> Iterator[dict[str, Any]]:
        """Events that have come since they were last asked for."""
        while self._events:
            yield self._events.popleft()

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select([self._answers], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(self._answers, 1 << 20) if ready else b""
            if not piece:
                raise BrowserError("Chromium did not answer" if not ready else "Chromium has ended")
            self._received += piece
        line, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


class Tab:
    """A page, and what it has done that a quiet page does not: `logged`, `requested` and `dialogs`."""

    def __init__(self, browser: Browser, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.logged: list[str] = []
        self.requested: list[str] = []
        self.dialogs: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to this page."""
        result = self._browser.send(method, self._session, **parameters)
        self._note_events()
        return result

    def open(self, file: Path, ready: str = "true") -> None:
        """Open a file and wait until an expression holds in it."""
        self.send("Page.navigate", url=file.resolve().as_uri())
        self.wait(f"document.readyState === 'complete' && ({ready})")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression holds."""
        deadline = time.monotonic() + TIMEOUT
        while not self.run(expression):
            if time.monotonic() > deadline:
                raise BrowserError(f"never held: {expression}; logged: {self.logged}")
            time.sleep(0.02)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of what is seen of it."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        file.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        """Close the page."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _note_events(self) -> None:
        for event in self._browser.events():
            method, parameters = event.get("method"), event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if method == "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.logged.append(json.dumps(parameters["exceptionDetails"])[:2000])
            elif method == "Runtime.consoleAPICalled":
                self.logged.append(json.dumps(parameters["args"])[:2000])
            elif method == "Log.entryAdded":
                self.logged.append(parameters["entry"]["text"])
            elif method == "Page.javascriptDialogOpening":
                self.dialogs.append(parameters["message"])
                self._browser.send("Page.handleJavaScriptDialog", self._session, accept=False)


def _high(descriptor: int) -> int:
    """The same file at a descriptor of 10 or more, out of the way of 3 and 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
