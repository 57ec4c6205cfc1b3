"""Make the pictures of the explorer in docs/images, in a headless Chromium.

venv/bin/hamt explore --port 7860 &
venv/bin/python docs/screenshots.py
"""

from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent / "images"

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1180, "height": 1000})
    page.goto("http://127.0.0.1:7860")
    page.get_by_text("tokens read.").wait_for()
    page.locator("#tokens").get_by_text("has").click()
    page.get_by_text("From where").wait_for()
    page.locator("#time input[type=range]").fill("20")
    page.get_by_text("after 20 tokens").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=FOLDER / "explore_read.png", full_page=True)
    page.get_by_role("tab", name="Write").click()
    page.locator("#write").click()
    page.get_by_text("after 80 new tokens").wait_for()
    page.wait_for_timeout(500)
    page.set_viewport_size({"width": 1180, "height": 800})
    page.wait_for_timeout(500)
    page.screenshot(path=FOLDER / "explore_write.png", full_page=True)
    browser.close()
