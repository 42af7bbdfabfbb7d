"""Headless Chromium over the DevTools protocol, through two pipes: nothing listens, nothing is installed.

Chromium started with --remote-debugging-pipe reads commands from descriptor 3 and writes answers and events to
descriptor 4, each a JSON text that ends with a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
    # a mouse that can hover, as on a desk; headless browsers have none
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
SHIFT = 8
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "Backspace": 8, "ArrowRight": 39, "ArrowLeft": 37}


def find() -> str | None:
    """Where the browser is, if it is anywhere."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser process; every page has a profile of its own."""

    def __init__(self, path: str, profile: Path) -> None:
        commands, self._commands = _pipe()
        self._replies, replies = _pipe()
        self._pid = os.posix_spawn(
            path,
            [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, commands, 3),
                (os.POSIX_SPAWN_DUP2, replies, 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setsid=True,
        )
        os.close(commands)
        os.close(replies)
        self._buffer = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command's result. Raises RuntimeError with the browser's words, TimeoutError after 30 s."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + 30
        while True:
            message = self._receive(until)
            if message.get("id") != self._last_id:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']['message']}")
            else:
                return message["result"]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._replies], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._replies, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        """End the browser: it ends by itself when told to, and is killed after five seconds otherwise."""
        os.write(self._commands, b'{"id": 0, "method": "Browser.close"}\0')
        until = time.monotonic() + 5
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                os.killpg(self._pid, signal.SIGKILL)
            time.sleep(0.02)
        os.close(self._commands)
        os.close(self._replies)


def _pipe() -> tuple[int, int]:
    """Read and write end, both above the descriptors that the browser will use."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Page:
    """One page with storage of its own."""

    def __init__(self, browser: Chromium, width: int = 1280, height: int = 800) -> None:
        self._browser = browser
        self.context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send(
            "Target.createTarget", url="about:blank", browserContextId=self.context
        )["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to this page."""
        return self._browser.send(method, self._session, **params)

    def browser(self, method: str, **params: Any) -> dict[str, Any]:
        """A command about this page's profile."""
        return self._browser.send(method, browserContextId=self.context, **params)

    def events(self, method: str) -> list[dict[str, Any]]:
        """Parameters of all events of a kind so far."""
        self.js("0")  # reads what has arrived
        return [
            event["params"]
            for event in self._browser.events
            if event.get("method") == method and event.get("sessionId") == self._session
        ]

    def go(self, url: str) -> None:
        """Open an address and wait until it has loaded."""
        self.send("Page.navigate", url=url)
        self.wait(
            f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'"
        )

    def reload(self) -> None:
        """Load the page again; what is in its storage stays."""
        self.js("window.isOld = true")
        self.send("Page.reload")
        until = time.monotonic() + 10
        while True:
            with suppress(RuntimeError):  # between two documents there is none to ask
                if self.js("!window.isOld && document.readyState == 'complete'"):
                    return
            if time.monotonic() > until:
                raise TimeoutError("the page does not load again")
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """The value of an expression; promises are awaited. Raises RuntimeError for an exception."""
        result = self.send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 10) -> None:
        """Until the expression, or what it promises, is true. Raises TimeoutError that says what the page shows."""
        until = time.monotonic() + seconds
        while True:
            if self.js(f"Promise.resolve({expression}).then(Boolean)"):
                return
            if time.monotonic() > until:
                raise TimeoutError(f"{expression}\n{self.js('document.body.innerText')}")
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key of the keyboard."""
        common = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": KEYS[key],
            "modifiers": modifiers,
        }
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text at the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The middle of the first element that the selector finds."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{element}.scrollIntoView({{block: 'nearest'}})")
        box = self.js(f"{element}.getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        """A window, or a phone with touch."""
        scale = 1.5 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def prefer(self, **features: str) -> None:
        """What the reader's system asks for, such as prefers_color_scheme="dark"."""
        listed = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=listed)

    def picture(self, path: Path) -> None:
        """A PNG of what is shown."""
        data = self.send("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """With everything the page has stored."""
        self._browser.send("Target.disposeBrowserContext", browserContextId=self.context)
