"""A real browser for tests of the Spaces: Chromium, `app.py` in a process of its own, isolated sessions.

Nothing outside this machine is reached: requests elsewhere are refused, and :func:`session` keeps their addresses.
With the environment variable SCREENSHOTS set to a folder, :func:`keep` leaves pictures there to look at.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
DESKTOP, PHONE = (1280, 900), (390, 844)
PATIENCE = 300.0  # seconds; only a page that is broken waits for so long
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SERVER_NAME": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "PYTHONUNBUFFERED": "1",
}
RUN = "import runpy, sys; {before}\nrunpy.run_path('app.py', run_name='__main__')"


def find_chromium() -> str:
    """Return the path of Chromium; without it, Playwright or Gradio skip the test, or fail in CI."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    absent = [name for name in ("gradio", "playwright") if find_spec(name) is None] + (
        [] if program else [f"a browser ({', '.join(NAMES)})"]
    )
    if program and not absent:
        return program
    reason = f"not installed: {', '.join(absent)}"
    return pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@contextmanager
def served(folder: Path, *, before: str = "pass", **environment: str) -> Iterator[str]:
    """Run ``app.py`` of a folder in it, as a Space does, and yield its address; stop it at the end.

    `before` is Python that runs first, such as ``"sys.modules['ibke_hf'] = None"``, which hides a package.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder.with_name(f"{folder.name}.log")
    env = {**os.environ, **QUIET, "GRADIO_SERVER_PORT": str(port), **environment}
    with log.open("wb") as output:
        command = [sys.executable, "-c", RUN.format(before=before)]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, f"app.py ended:\n{log.read_text(errors='replace')[-3000:]}"
        try:
            with urlopen(url, timeout=10) as answer:
                answer.read()
            return
        except (URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"app.py does not answer:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless browser, a ``playwright.sync_api.Browser``."""
    executable = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def session(browser: Any, url: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Any:
    """Open a page in a context of its own, with cookies and storage of its own.

    Returns:
        The page; its list `outside` has the addresses beyond this machine that it asked for, all refused, `errors`
        what its scripts threw.
    """
    page = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options).new_page()
    page.outside, page.errors = [], []
    base = "{0.scheme}://{0.netloc}".format(urlsplit(url))

    def answer(route: Any) -> None:
        if route.request.url.startswith((base, "data:", "blob:")):
            return route.continue_()
        page.outside.append(route.request.url)
        return route.abort()

    page.route("**/*", answer)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(url, timeout=PATIENCE * 1000)
    page.wait_for_selector("button", timeout=PATIENCE * 1000)
    return page


def overflow(page: Any) -> int:
    """Return how many pixels of the page lie beyond its right edge, 0 if none do."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return max(pixels, 0)


def keep(page: Any, name: str) -> None:
    """Take a picture of the whole page, if SCREENSHOTS names a folder for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
