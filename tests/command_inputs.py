"""What the tests of commands have in common."""

from hamt.cli import main

TEXT = "".join(
    f"Line {i}: the sum of {i} and {i + 1} is {2 * i + 1}, and that is that.\n" for i in range(600)
)


def fails(arguments, capsys):
    """The one line that a mistake ends in."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err
