"""The pages: Python in them runs, commands, links and names exist, and README stays short."""

import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
from contextlib import ExitStack, chdir, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from pydoc import locate
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
from command_inputs import TEXT
from matplotlib.figure import Figure

import hamt
from hamt.cli import COMMANDS, main
from hamt.config import HAMTConfig
from hamt.memory import WRITE_RULES
from hamt.mixers import GATING_NETWORKS, MIXERS, RETRIEVAL_HEADS
from hamt.serving.bodies import ChatBody
from hamt.serving.server import CHAT

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PATHS += sorted((ROOT / "docs").glob("*.md"))
PATHS += sorted((ROOT / "docs" / "guides").glob("*.md"))
PATHS.append(ROOT / "docs" / "results" / "README.md")
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
# A block of Python that cannot run everywhere has this comment, with the reason, above it.
NOT_RUN = "<!-- not run: "
LOG = "docs/LOG.md"  # its commands and names are those of their day


def without_blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """The fenced blocks of a page in one language, without those that are marked as not run."""
    pattern = rf"(?:{NOT_RUN}[^\n]*-->\n+)?^```{language}\n.*?^```"
    found = re.findall(pattern, PAGES[page], re.DOTALL | re.MULTILINE)
    return [block.split("\n", 1)[1][:-3] for block in found if not block.startswith(NOT_RUN)]


@cache
def run(page):
    """Run the Python of a page in one namespace, in a folder with a ``my_text.txt``.

    Returns:
        The names that it leaves, and what it prints.
    """
    names, printed = {}, StringIO()
    with (
        TemporaryDirectory() as folder,
        chdir(folder),
        redirect_stdout(printed),
        pytest.MonkeyPatch.context() as patch,
        ExitStack() as tables,
    ):
        # What a page adds goes with it.
        for table in (GATING_NETWORKS, MIXERS, RETRIEVAL_HEADS, WRITE_RULES):
            tables.enter_context(mock.patch.dict(table))
        patch.setattr(HAMTConfig, "_with_code", False)
        patch.setenv("XDG_CACHE_HOME", folder)
        Path("my_text.txt").write_text(TEXT, encoding="utf-8")
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)
    return names, printed.getvalue()


# What PEFT and TRL ask of Transformers, and what PyTorch says of its own quantisation.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_in_a_page_runs(page):
    names, _ = run(page)
    assert len(names) > 1


NUMBER = r"[-+]?\d\.\d+"


def assert_prints(page, expected, within):
    """The last digits may differ with the order of sums on another processor."""
    printed = run(page)[1]
    assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", expected)
    pairs = zip(re.findall(NUMBER, printed), re.findall(NUMBER, expected), strict=True)
    assert all(abs(float(a) - float(b)) < within for a, b in pairs)


def test_the_example_of_the_readme_prints_the_output_beside_it():
    (code,), (expected,) = blocks("README.md", "python"), blocks("README.md", "text")
    assert len(code.splitlines()) <= 20
    assert len(re.findall(NUMBER, expected)) == 6
    assert_prints("README.md", expected, within=0.002)


def test_the_mathematics_prints_what_stands_below_it():
    page = "docs/mathematics.md"
    assert_prints(page, "".join(blocks(page, "text")), within=0.02)


def test_the_bytes_of_a_session_are_those_that_the_page_prints():
    (expected,) = (block for block in blocks("docs/state.md", "text") if "bytes" in block)
    assert run("docs/state.md")[1].endswith(expected)


def test_shares_of_the_analysis_add_up_to_one():
    names, printed = run("docs/analysis.md")
    assert abs(names["shares"].sum() - 1).max() < 1e-4
    assert "tensor" in printed


@pytest.mark.parametrize("script", sorted((ROOT / "docs").glob("draw_*.py")), ids=lambda p: p.stem)
def test_pictures_are_drawn(script):
    names = runpy.run_path(str(script))
    assert isinstance(names["draw"](), Figure)
    shown = {
        (ROOT / page).parent / target
        for page, text in PAGES.items()
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    }
    assert names["TARGET"] in shown


def test_examples_stand_under_the_word_that_the_reference_knows():
    """Under ``Example`` their lines would run into each other there."""
    sources = (ROOT / "src").rglob("*.py")
    assert not [path for path in sources if re.search(r"^ *Example:$", path.read_text(), re.M)]


def test_the_reference_has_what_import_hamt_gives():
    hook = (ROOT / "docs" / "site_pages.py").read_text(encoding="utf-8")
    assert [name for name in hamt.__all__ if f'"hamt.{name}"' not in hook] == []


LOOP = re.compile(r"^for (\w+) in ([^;]*); do\n(.*?)\ndone$", re.DOTALL | re.MULTILINE)


def shell_lines(page):
    """The lines of the bash blocks of a page, with loops written out."""

    def turns(loop):
        return "\n".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

    found = []
    for block in blocks(page, "bash"):
        found += map(str.strip, LOOP.sub(turns, block).replace("\\\n", " ").splitlines())
    return [line for line in found if line and not line.startswith("#")]


def commands(page):
    """Lines of the shell in a page: those of bash blocks, and commands in sentences and tables."""
    yield from shell_lines(page)
    for code in re.findall(r"`([^`]+)`", without_blocks(page)):
        line = " ".join(code.split())
        command = re.match(r"(\w+=\S+ )*(venv/bin/)?(hamt|python|make|pip|torchrun) ", line)
        # Words such as FILE and NAME stand for something.
        if command and not re.search(r"(?<![\w=/])[A-Z]{4,}(?![\w=])", line):
            yield line


LINES = sorted({(page, line) for page in PAGES if page != LOG for line in commands(page)})


class Parsed(SystemExit):
    """The options of a command are in order; it is not to run."""


@pytest.fixture(scope="module")
def clone_with_a_text(tmp_path_factory):
    """A folder with all that the repository has, and the text that the pages train on."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "my_text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def only_parse(monkeypatch, clone_with_a_text):
    """Let each command end when its options have been read."""
    monkeypatch.chdir(clone_with_a_text)
    for module, _ in COMMANDS.values():
        module = importlib.import_module(module)

        def parse(*arguments, original=module.parse, **options):
            original(*arguments, **options)
            raise Parsed

        monkeypatch.setattr(module, "parse", parse)


@pytest.mark.parametrize(("page", "line"), [line for line in LINES if line[1].strip()])
def test_commands_and_their_options_exist(page, line, only_parse, monkeypatch, capsys):
    words = shlex.split(line.rpartition(" | ")[2], comments=True)  # what is behind a pipe
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    program, *arguments = words or ["#"]
    program = program.removeprefix("venv/bin/")
    if program in ("torchrun", "accelerate"):
        program, arguments = "hamt", arguments[arguments.index("hamt.cli") + 1 :]
    if program == "hamt":
        try:
            code = main(arguments)
        except SystemExit as end:  # Parsed, or help
            code = end.code
        assert not code, capsys.readouterr().err
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in arguments if "=" not in word]  # PYTHON=... is a variable
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.findall(r"\[([\w,-]+)\]", line)
        assert set(",".join(extras).split(",")) - {""} <= project["optional-dependencies"].keys()
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], line, "exec")
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    elif program == "python":
        script, *arguments = arguments
        if script == "-m":
            return  # of Python itself
        source = (ROOT / script).read_text(encoding="utf-8")
        if "from hamt.cli import main" in source:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            flags = [word for word in arguments if word.startswith("--")]
            assert all(f'"{flag}"' in source for flag in flags)
    elif program == "curl":
        body = json.loads(arguments[arguments.index("-d") + 1])
        assert arguments[0].endswith(CHAT)
        ChatBody.model_validate(body)
    else:
        assert program in ("#", "source", "jupyter", "nvidia-smi", "pytest")
        if program in ("jupyter", "pytest"):
            assert (ROOT / arguments[-1 if program == "jupyter" else 0]).exists()


def anchors(page):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG])
def test_names_of_the_package_exist(page):
    for name in re.findall(r"`(hamt(?:\.\w+)+)", without_blocks(page)):
        assert locate(name) is not None, name


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG])
def test_paths_of_the_repository_exist(page):
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"venv", "checkpoints"}
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", PAGES[page]):
        if path.split("/")[0] in tops:
            assert (ROOT / path).exists(), path


def test_the_page_of_use_has_every_command_and_every_extra():
    page = PAGES["docs/usage.md"]
    assert set(re.findall(r"^\| `hamt ([\w-]+)` \|", page, re.MULTILINE)) == set(COMMANDS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"test", "dev", "docs"}
    assert set(re.findall(r'install -e "\.\[([\w-]+)\]"', page)) == extras


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 100


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_lines_are_short(page):
    """But for tables, pictures and blocks."""
    text = without_blocks(page)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []
