"""A real browser without a window: what HELM's page shows in it, and whom it asks for what."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

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
    logged = json.loads(log.read_text())
    started = logged["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in logged["events"] if event["type"] == started and "params" in event]
    # The browser's own errands have no page as their origin.
    asked = [one["url"] for one in requests if one.get("initiator", "not an origin") != "not an origin"]
    return json.loads(html.unescape(found)), asked
