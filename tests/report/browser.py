"""Opens pages in a headless Chromium, without a network, as a phone or a desktop shows them."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

SECONDS = 60
"""Longest wait for all plots; they take one or two on an idle machine."""


class Browser:
    """One Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, page: Path, *, width: int = 1400, scheme: str = "light") -> None:
        """Open a page and wait until its plots are drawn."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        looks = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", looks)
        self._driver.get(page.resolve().as_uri())
        deadline = time.monotonic() + SECONDS
        while self.run("return document.querySelectorAll('figure[data-points]:not([data-drawn])').length"):
            assert time.monotonic() < deadline, f"plots are missing; the console says {self.console()}"
            time.sleep(0.1)

    def run(self, script: str) -> Any:
        """Run a script in the page, and return what it returns."""
        return self._driver.execute_script(script)

    def console(self) -> list[str]:
        """Return what the page has written to the console since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses of everything that the page loaded, itself aside."""
        return list(self.run("return performance.getEntriesByType('resource').map(entry => entry.name)"))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a Chromium with a new profile, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
