"""A headless Chromium for tests, spoken to over pipes in the DevTools protocol, with the standard library alone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

VARIABLE = "GRAPHLATHE_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATIENCE = 60.0


def find_chromium() -> str | None:
    """The browser named by the environment variable, or the first one on the path."""
    named = os.environ.get(VARIABLE)
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One window of a headless Chromium.

    Attributes:
        problems: what the page wrote to the console as an error or warning, threw, or tried to load.
    """

    def __init__(self, executable: str, folder: Path, size: tuple[int, int] = (1280, 800)) -> None:
        switches = [
            "--headless",
            "--no-sandbox",  # containers run as root
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={folder}",
            f"--window-size={size[0]},{size[1]}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = self._start(executable, switches)
        self._buffer = b""
        self._events: deque[dict[str, Any]] = deque()
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self.resize(*size)

    def _start(self, executable: str, switches: list[str]) -> int:
        """The process, which reads commands from its file 3 and writes replies to its file 4."""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Numbers above 4, so that neither is overwritten by the other's place.
        high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10) for file in (theirs_in, theirs_out)]
        quiet = [(os.POSIX_SPAWN_OPEN, file, os.devnull, os.O_WRONLY, 0) for file in (1, 2)]
        places = [(os.POSIX_SPAWN_DUP2, file, place) for file, place in zip(high, (3, 4), strict=True)]
        number = os.posix_spawn(executable, [executable, *switches], os.environ, file_actions=[*quiet, *places])
        for file in (theirs_in, theirs_out, *high):
            os.close(file)
        return number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._session = None
            self._send("Browser.close")
        except (OSError, EOFError, TimeoutError):
            os.kill(self._process, signal.SIGKILL)
        end = time.monotonic() + _PATIENCE
        while os.waitpid(self._process, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(self._process, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._in)
        os.close(self._out)

    def open(self, path: Path) -> None:
        """Load a file and wait until it is laid out."""
        self.problems.clear()
        self._events.clear()
        self._send("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.layouts >= 1")
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (awaited).

        Raises:
            AssertionError: it threw.
        """
        reply = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        end = time.monotonic() + _PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}; problems: {self.problems}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until everything that was opened or closed is drawn."""
        self.wait("!('busy' in document.documentElement.dataset)")

    def press(self, key: str, text: str | None = None) -> None:
        """Press a key; ``text`` is what it types."""
        self._send("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": text} if text else {}))
        self._send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def write(self, text: str) -> None:
        """Type a text."""
        self._send("Input.insertText", text=text)

    def click(self, selector: str, times: int = 1) -> None:
        """Click into the middle of the first element that a selector finds, with the mouse.

        Raises:
            AssertionError: there is none, or something else lies above it.
        """
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert found, f"nothing is {selector}"
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self._send(
                    "Input.dispatchMouseEvent", type=kind, x=found[0], y=found[1], button="left", clickCount=count
                )

    def resize(self, width: int, height: int) -> None:
        """Change the size of the window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **metrics)

    def scheme(self, name: str) -> None:
        """What the user prefers: ``dark`` or ``light``."""
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path: Path) -> None:
        """Save what is in the window as PNG."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its reply; notes what the page complains about meanwhile."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self._note(reply)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise EOFError("the browser ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(given["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if given["type"] in ("error", "warning", "assert"):
                self.problems.append(str(given["args"]))
            case "Log.entryAdded" if given["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
            case "Network.requestWillBeSent" if not given["request"]["url"].startswith(("file:", "blob:", "data:")):
                self.problems.append(f"loads {given['request']['url']}")
            case _:
                pass
