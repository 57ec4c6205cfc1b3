"""A headless Chromium for the pages of ``hamt analyze`` and ``hamt explore``."""

import os
import shutil

import pytest


@pytest.fixture(scope="module")
def chromium():
    """The browser; tests are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        assert "HAMT_TEST_BROWSER" not in os.environ, "there is no Chromium"
        pytest.skip("no Chromium here: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
