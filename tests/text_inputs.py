"""What the tests of texts, tokens and batches have in common."""

import json

TEXT = (
    "The quick brown fox jumps over the lazy dog.\n"
    "Pack my box with five dozen liquor jugs: naïve café ☕.\n"
)


def files(tmp_path, **contents):
    for name, content in contents.items():
        (tmp_path / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return tmp_path


def rows(*texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
