"""A real browser for tests of pages: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_START_S = 60.0
_ANSWER_S = 60.0


class Tab:
    """One tab of the browser. What a page complains of and asks the network for is kept.

    Args:
        loop: runs the connection.
        socket: of the tab.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: Any) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.problems: list[str] = []
        """Errors and warnings of the console, exceptions, and what the page was refused."""
        self.requests: list[str] = []
        """Addresses of all that was loaded."""
        self._is_loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Load a page in a window of this size, on a light or a dark desktop."""
        self.problems, self.requests, self._is_loaded = [], [], False
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=file.as_uri())
        self._loop.run_until_complete(asyncio.wait_for(self._until_loaded(), _ANSWER_S))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; its Content-Security-Policy is not
        asked."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page as it would be printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        return self._loop.run_until_complete(
            asyncio.wait_for(self._call(method, parameters), _ANSWER_S)
        )

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    async def _until_loaded(self) -> None:
        while not self._is_loaded:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((await self._socket.receive()).data)
        match message.get("method"):
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.problems.append(json.dumps(message["params"]))
            case "Runtime.consoleAPICalled":
                self.problems.append(json.dumps(message["params"]["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        return message


@contextlib.contextmanager
def chromium_tab(folder: Path) -> Iterator[Tab]:
    """A browser of one's own, its profile below `folder`; it is gone afterwards."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    browser = subprocess.Popen(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    loop = asyncio.new_event_loop()
    try:
        with contextlib.closing(loop):
            session, socket = loop.run_until_complete(_connect(_port(profile)))
            try:
                yield Tab(loop, socket)
            finally:
                loop.run_until_complete(session.close())
    finally:
        browser.kill()
        browser.wait()


def _port(profile: Path) -> int:
    """The port the browser has chosen."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + _START_S
    while not (file.exists() and len(file.read_text().splitlines()) == 2):
        assert time.monotonic() < deadline, f"Chromium did not start within {_START_S:g} s"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


async def _connect(port: int) -> tuple[aiohttp.ClientSession, Any]:
    session = aiohttp.ClientSession()
    deadline = time.monotonic() + _START_S
    while True:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
        if tabs:
            break
        assert time.monotonic() < deadline, "Chromium opened no tab"
        await asyncio.sleep(0.05)
    socket = await session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)
    return session, socket
