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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_layer_of_attention_has_sources_and_no_slots(hybrid, tmp_path, chromium):
    arguments = ["--checkpoint", str(hybrid), "--text", TEXT, "--skip_silencing"]
    assert main(["analyze", *arguments, "--output_dir", str(tmp_path)]) == 0
    errors: list[str] = []
    view = chromium.new_page()
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(f"file://{tmp_path / 'dashboard.html'}")
    assert view.locator("#layer").input_value() == "2"
    assert view.locator("#slots").is_visible()
    assert view.locator("#layer option").nth(1).inner_text() == "1 (window of 6 and 1 first tokens)"
    view.locator("#layer").select_option("1")
    assert not view.locator("#slots").is_visible()
    assert not view.locator("#held").is_visible()
    view.locator("#text button").nth(9).click()
    assert "came from: " in view.locator("#sources").inner_text()
    sources = view.locator("#text button.source")
    assert 1 <= sources.count() <= 6
    view.locator("#layer").select_option("0")
    assert view.locator("#slots").is_visible()
    assert errors == []
