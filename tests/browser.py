"""A headless Chromium, with nothing fetched for it: Debian's browser and driver, or a reason why there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

BROWSER, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what a page would fetch is an error in its console
    "--hide-scrollbars",
    "--window-size=1300,1100",  # clicks outside the window are refused
)
PATIENCE = (
    60.0  # seconds for a page to become what it should: only a broken one, or a machine at a standstill, takes it
)


def missing() -> str | None:
    """Why there is no browser here; None if there is one."""
    absent = [str(path) for path in (BROWSER, DRIVER) if not path.exists()]
    return f"{' and '.join(absent)} not here: apt-get install chromium chromium-driver" if absent else None


class Page:
    """A browser's one tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows ``file``, and waits until its charts are drawn. Below 500 pixels it is a phone with a touch screen."""
        phone = width < 500
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(file.resolve().as_uri())
        self.until("return 'ready' in document.documentElement.dataset")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> Any:
        """What ``script`` returns, as soon as that is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)
        return value

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def button(self, text: str) -> WebElement:
        """The visible button that says ``text``."""
        for found in self.driver.find_elements("css selector", "button"):
            try:
                if found.is_displayed() and found.text == text:
                    return found
            except StaleElementReferenceException:
                continue
        raise NoSuchElementException(text)

    def errors(self) -> list[str]:
        """What the console said since the last call, warnings included."""
        found = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in found if entry["level"] in ("SEVERE", "WARNING")]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """``profile``: a folder that is not there yet."""
    options = Options()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Page(driver)
    finally:
        driver.quit()
