"""The page of ``hamt analyze`` in a real browser."""

import pytest

from hamt.cli import main

TEXT = "The Congress of the United States has the power to act, and the people expect it to act. "


@pytest.fixture(scope="module")
def page(tmp_path_factory, chromium):
    folder = tmp_path_factory.mktemp("page")
    arguments = ["--text", TEXT, "--skip_silencing", "--output_dir", str(folder)]
    assert main(["analyze", *arguments]) == 0
    errors: list[str] = []
    view = chromium.new_page(viewport={"width": 1280, "height": 1000})
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(f"file://{folder / 'dashboard.html'}")
    yield view
    assert errors == []


def test_a_token_tells_its_sources(page):
    page.locator("#text button").nth(9).click()
    assert "came from: " in page.locator("#sources").inner_text()
    assert page.locator("#text button.source").count() >= 1


def test_slots_are_numbered_and_tell_their_half_lives(page):
    """They are those of the layer that is chosen."""
    rows = page.locator("#slots tr")
    assert rows.nth(0).inner_text().split() == ["slot", *map(str, range(16))]
    heads = [rows.nth(head + 1).inner_text().split() for head in range(4)]
    assert [row[:2] for row in heads] == [["head", str(head)] for head in range(4)]
    assert all(float(half_life) > 0 for row in heads for half_life in row[2:])
    page.locator("#layer").select_option("0")
    assert rows.nth(1).inner_text().split() != heads[0]


def test_rows_stay_low_in_a_narrow_window(page):
    page.set_viewport_size({"width": 420, "height": 900})
    heights = page.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => row.getBoundingClientRect().height)"
    )
    assert len(heights) > 12
    assert max(heights) < 80
