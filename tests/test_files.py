"""Files and folders that are written whole or not at all."""

from hamt.files import write_folder
from hamt.output import claim


def test_a_folder_is_written_in_the_place_of_an_earlier_one(tmp_path):
    """As tokenizers with several chat templates write one; it can be entered."""
    for text in ("old", "new"):

        def fill(target, text=text):
            (target / "templates").mkdir()
            (target / "templates" / text).write_text(text)

        write_folder(tmp_path / "plain", fill)
        with claim(tmp_path / "claimed", "train", ["templates"]) as output:
            output.write(fill)
    for folder in ("plain", "claimed"):
        (file,) = (tmp_path / folder / "templates").iterdir()
        assert file.read_text() == "new"
        assert file.parent.stat().st_mode & 0o111
