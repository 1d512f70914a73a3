"""A headless Chromium, told what to do over the DevTools protocol: JSON through a socket that it is born with."""

import base64
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SECONDS = 60  # for any answer


class Browser:
    """One page. complaints: what it wrote to its console as errors and warnings, and exceptions nobody caught."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.rest, self.number = line, b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setScrollbarsHidden", hidden=True)  # so that a width is the width, as on a phone

    def ask(self, method: str, **parameters: Any) -> Any:
        """One command and its result; what happens meanwhile is noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {} if self.session is None else {"sessionId": self.session}
        self.line.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self.hear()).get("id") != self.number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def hear(self) -> Any:
        """The next message."""
        while b"\0" not in self.rest:
            self.rest += self.line.recv(1 << 16) or b'{"id": -1, "method": "gone"}\0'
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        found = message.get("params", {})
        match message.get("method"):
            case "gone":
                raise ConnectionError("the browser has ended")
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(found["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if found["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(found["args"]))
            case "Log.entryAdded" if found["entry"]["level"] in ("error", "warning"):
                self.complaints.append(found["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
        return message

    def open(self, path: Path | str, width: int = 900, *, dark: bool = False) -> None:
        """Show a file or an address at a width, in light or dark colours, and wait until it is there."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        while self.hear().get("method") != "Page.loadEventFired":
            pass

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a person would press it."""
        code = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Home": 36, "End": 35, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def point(self, selector: str, *, click: bool = False) -> None:
        """The mouse to the middle of an element, scrolled to; and a click on it."""
        code = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))($({selector!r}))"
        box = self.run(code.replace("$(", "document.querySelector("))
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def shoot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """Write the page as it is printed."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"]))


def read_page(path: Path) -> Any:
    """The records that a page holds, without a browser."""
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@contextmanager
def browse(profile: Path) -> Iterator[Browser]:
    """A browser for the length of a `with` block. profile: a folder for what it keeps."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    talking = f'exec "$0" "$@" 3<&{theirs.fileno()} 4>&{theirs.fileno()}'  # it listens on 3 and speaks on 4
    words = ["bash", "-c", talking, str(PROGRAM), *options]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    theirs.close()
    try:
        yield Browser(ours)
    finally:
        ours.close()
        process.terminate()
        process.wait(SECONDS)
