"""A page in a real Chromium, over the DevTools protocol: evaluate, wait, take a picture; what it complained of and asked for is kept."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

_ARGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
    "about:blank",
)


class Tab:
    """One page. `complaints` are console errors, exceptions and refusals of the browser's; `asked` the addresses that it asked for.

    Both are of what was opened last.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            waiting = self._waiting.pop(said.get("id", 0), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(said)
            params = said.get("params", {})
            match said.get("method"):
                case "Network.requestWillBeSent":
                    self.asked.append(params["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(str(params["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                    self.complaints.append(str(params["args"]))
                case "Log.entryAdded" if params["entry"]["level"] == "error":
                    self.complaints.append(params["entry"]["text"])

    async def send(self, method: str, **params: Any) -> Any:
        self._last += 1
        number, answer = self._last, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, 20)
        assert "error" not in said, said
        return said["result"]

    async def open(self, url: str, *, width: int = 1280, height: int = 1000, dark: bool = False) -> None:
        for domain in ("Runtime", "Log", "Network", "Page"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.resize(width, height)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[theme])
        # A page that asks every few seconds does so until it is left: what it says then is not the next one's.
        await self._go("about:blank")
        await self.send("Log.clear")
        self.complaints.clear()
        self.asked.clear()
        await self._go(url)

    async def _go(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )  # fmt: skip

    async def run(self, script: str) -> Any:
        """The value of an expression."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, timeout_s: float = 20) -> Any:
        """Wait until an expression is true; returns its value."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := await self.run(script)):
            assert time.monotonic() < deadline_s, (script, await self.text())
            await asyncio.sleep(0.1)
        return value

    async def text(self, selector: str = "body") -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def press(self, key: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "End": 35}[key]
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        got = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(got["data"]))

    async def close(self) -> None:
        await self._socket.close()
        await self._reading


@asynccontextmanager
async def tab() -> AsyncIterator[Tab]:
    """A page of a Chromium of its own, which is gone afterwards."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [CHROMIUM, f"--user-data-dir={profile}", *_ARGS], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        try:
            address = await _address(Path(profile))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json/list") as answer:
                    [page] = [t for t in await answer.json() if t["type"] == "page"]
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    found = Tab(socket)
                    try:
                        yield found
                    finally:
                        await found.close()
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _address(profile: Path, timeout_s: float = 20) -> str:
    """Chromium writes its port down when it listens."""
    file = profile / "DevToolsActivePort"
    deadline_s = time.monotonic() + timeout_s
    while not (lines := file.read_text().split() if file.exists() else []):
        assert time.monotonic() < deadline_s, "chromium does not listen"
        await asyncio.sleep(0.05)
    return f"127.0.0.1:{lines[0]}"
