"""The README's example prints what the README says."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_the_output_beside_it(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    expected = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 20
    exec(compile(code, "README.md", "exec"), {})
    printed = re.findall(r"[-+]?\d\.\d{3}", capsys.readouterr().out)
    numbers = re.findall(r"[-+]?\d\.\d{3}", expected)
    assert len(numbers) == 6
    # The last digit may differ with the order of sums on another processor.
    assert all(abs(float(a) - float(b)) < 0.002 for a, b in zip(printed, numbers, strict=True))


def test_the_example_of_the_analysis_runs(capsys):
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(
        compile(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), "analysis.md", "exec"),
        names,
    )
    assert abs(names["shares"].sum() - 1).max() < 1e-4
    assert "tensor" in capsys.readouterr().out
