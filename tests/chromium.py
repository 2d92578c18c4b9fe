"""A real browser without a window: what HELM's page and the demo's show in it, and whom they ask for what."""

import asyncio
import base64
import html
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

# Shows one page after the other in a frame, waits for the text that each must show, and writes down what is in it.
PROBE = """<!doctype html><link rel="icon" href="data:,">
<iframe id="frame" src="index.html" width="1200" height="900"></iframe><pre id="seen"></pre>
<script type="module">
const frame = document.getElementById("frame"), seen = {};
for (const [place, text] of Object.entries(PAGES)) {
  let shown = "", images = [];
  for (let tries = 0; tries < 100; tries++) {
    frame.contentWindow.location.hash = place;
    await new Promise((done) => setTimeout(done, 100));
    shown = frame.contentDocument.body?.innerText ?? "";
    images = [...frame.contentDocument.images];
    if (shown.includes(text) && images.every((image) => image.complete)) break;
  }
  seen[place] = {shown, images: images.map((image) => [new URL(image.src).pathname, image.naturalWidth])};
}
document.getElementById("seen").textContent = JSON.stringify(seen);
</script>"""


def find() -> str | None:
    """Return the program of a Chromium or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(site: Path, address: str, pages: dict[str, str], scratch: Path) -> tuple[dict, list[str]]:
    """Open pages of a site and return what each shows, and all addresses that they asked for.

    Args:
        site: the folder that is served at `address`, into which the probe is put.
        pages: the text to wait for, by page, such as `#/runs`.

    Returns:
        By page `shown`, its text, and `images`, pairs of path and width in pixels (0: not shown).
    """
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)))
    log = scratch / "net-log.json"
    done = subprocess.run(
        [find(), *FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=60000",
         "--dump-dom", f"{address}probe.html"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    return json.loads(html.unescape(found)), requests_in(log)


def requests_in(log: Path) -> list[str]:
    """Return the addresses that pages asked for, by a browser's log of its network."""
    logged = json.loads(log.read_text())
    started = logged["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in logged["events"] if event["type"] == started and "params" in event]
    # The browser's own errands have no page as their origin.
    return [one["url"] for one in requests if one.get("initiator", "not an origin") != "not an origin"]


class Tab:
    """A page that is driven as a person would, by Chrome's devtools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers = socket, count(1)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; RuntimeError if it refuses."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async for message in self._socket:
            # Events lie between.
            if (answer := message.json()).get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
        raise RuntimeError(f"{method}: the browser has gone")

    async def value(self, script: str) -> Any:
        """Return what a script gives, promises awaited."""
        done = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']['exception'].get('description')}")
        return done["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> Any:
        """Return what a script gives as soon as that is true; TimeoutError with the page's text if it never is."""
        for _ in range(int(seconds / 0.05)):
            if found := await self.value(script):
                return found
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{script}: {await self.value('document.body.innerText')}")

    async def click(self, element: str) -> None:
        """Click in the middle of what a script gives, as a mouse does."""
        box = await self.until(
            f"(() => {{const e = {element}; e?.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            " const b = e?.getBoundingClientRect(); return b?.width && [b.x + b.width / 2, b.y + b.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def write(self, selector: str, text: str) -> None:
        """Replace a field's text by the keyboard's."""
        await self.until(f"(e => e && (e.focus(), e.select(), true))(document.querySelector({json.dumps(selector)}))")
        if text:
            await self.call("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                await self.call("Input.dispatchKeyEvent", type=kind, key="Backspace", windowsVirtualKeyCode=8)

    async def give_file(self, selector: str, path: Path) -> None:
        """Choose a file, as its dialog would."""
        await self.until(f"document.querySelector({json.dumps(selector)}) !== null")
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    async def picture(self, path: Path, width: int, height: int | None = None) -> None:
        """Write a PNG of the page at a width, by default as high as it is."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height or 800, deviceScaleFactor=1, mobile=False
        )
        await asyncio.sleep(0.5)
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": height or size["height"], "scale": 1}
        taken = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@asynccontextmanager
async def opened(address: str, scratch: Path, width: int = 1280, height: int = 900) -> AsyncIterator[Tab]:
    """Open a page in a browser that finds no other machine; when it closes, `net-log.json` in `scratch` is written."""
    profile = scratch / "profile"
    browser = await asyncio.create_subprocess_exec(
        find() or "", *FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
        f"--user-data-dir={profile}", f"--log-net-log={scratch / 'net-log.json'}", f"--window-size={width},{height}",
        "about:blank", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (port := profile / "DevToolsActivePort").is_file():
            assert browser.returncode is None, "the browser has ended at once"
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
                (page,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.call("Page.navigate", url=address)
                yield tab
                with suppress(RuntimeError):
                    await tab.call("Browser.close")
        await asyncio.wait_for(browser.wait(), 30)
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()
