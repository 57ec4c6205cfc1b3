"""The shape of the code: imports flow one way, files stay short, and names are pinned."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hamt

SOURCE = Path(hamt.__file__).parent

# Each layer may import those to its left. Packages (data, evaluation, ...) count as one layer each.
LAYERS = (
    {"again", "errors", "fingerprint"},
    {"console", "environment", "guard", "files", "locks", "recipes"},
    {"loading", "options", "output", "remote_code", "visualization"},
    {"memory"},
    {"cpu", "gpu"},
    {"batch", "passes", "peak_memory", "products"},
    {"adapters", "cross_entropy", "losses", "mixers"},
    {"config_values", "standard_config"},
    {"config"},
    {"boundaries", "convolution", "identity", "registration", "rotation", "state_file"},
    {"parts"},
    {"cache_layer", "layers", "utils"},
    {"attention", "block", "cache", "hierarchical_memory", "rerouting"},
    {"continuation", "decoding", "sliding_attention", "window_and_memory"},
    {"base_model"},
    {"model"},
    {"converted_config", "hierarchical_model"},
    {"converted_model"},
    {"checkpoint"},
    {"data"},
    {"generation"},
    {"conversation", "reading"},
    {"chat", "serving"},
    {"training"},
    {"baselines"},
    {"convert"},
    {"analysis", "finetune"},
    {"export"},
    {"measure"},
    {"command_table"},
    {"completion"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(file: Path) -> str:
    """``hamt.data.corpus``; a package is its ``__init__``."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """Modules that a file imports, wherever in the file, as absolute names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES) or {node.module}
    return found


def own_imports(file: Path) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == "hamt" and name != "hamt"}


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent != SOURCE or f.name != "__init__.py"], ids=module_name
)
def test_imports_flow_one_way(file):
    own = layer(module_name(file))
    assert own in RANK, f"give {own} its place in LAYERS"
    for name in own_imports(file):
        flows = layer(name) == own or RANK[layer(name)] < RANK[own]
        assert flows, f"{module_name(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_is_imported_by_way_of_the_package(file):
    """``from hamt import HAMTModel`` inside the package would hide where an arrow leads."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "hamt":
            assert {alias.name for alias in node.names} <= {"__version__"}


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("cpu", {"hamt.decoding", "hamt.passes", "hamt.peak_memory", "hamt.products"}),
        ("gpu", {"hamt.products"}),
    ],
)
def test_little_reaches_for_what_only_makes_a_machine_faster(folder, expected):
    """So that the folder can be deleted (``tests/cpu/test_deletable.py``)."""
    reaching = {
        module_name(file)
        for file in FILES
        if layer(module_name(file) + ".") != folder
        and any(f".{folder}" in name for name in own_imports(file))
    }
    assert reaching == expected


def test_no_circle_of_imports():
    TopologicalSorter({module_name(file): own_imports(file) for file in FILES}).prepare()


@pytest.mark.parametrize("file", sorted((SOURCE / "memory").rglob("*.py")), ids=module_name)
def test_the_memory_knows_nothing_of_models(file):
    """It takes tensors and numbers: no configuration, no Transformers."""
    found = imports(file)
    outside = {module.split(".")[0] for module in found} - sys.stdlib_module_names
    assert outside <= {"torch", "hamt"} | {"torchhd"} & {file.stem.split("_")[0]}
    assert not found & {"hamt.config", "hamt.model", "hamt.cache", "hamt.layers"}


def test_files_stay_short():
    files = [*FILES, *Path(__file__).parent.rglob("*.py")]
    lengths = {str(f): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_every_file_says_what_it_is():
    for file in FILES:
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_exported_names():
    assert hamt.__all__ == [
        "HAMTBackbone", "HAMTCache", "HAMTConfig", "HAMTForCausalLM",
        "HAMTForQuestionAnswering", "HAMTForSequenceClassification", "HAMTForTokenClassification",
        "HAMTLayer", "HAMTModel", "HolographicMemory", "MemoryState", "get_algebra", "similarity",
    ]  # fmt: skip
    for name in hamt.__all__:
        assert getattr(hamt, name).__name__ in (name, "HAMTForCausalLM")
        assert name in dir(hamt)
    with pytest.raises(AttributeError, match="'hamt' has no attribute 'Nothing'"):
        _ = hamt.Nothing


def test_type_checkers_know_the_exported_names_and_where_they_come_from():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in ast.walk(tree) if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (home, name) for name, home in hamt._HOME.items()}
    assert (SOURCE / "py.typed").is_file()


def test_models_and_tokenizers_are_loaded_in_one_place():
    """Which never runs code of theirs; a model's class and a configuration bring none along."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                told = {keyword.arg for keyword in node.keywords}
                known = {"kind.config_class.from_pretrained", "super().from_pretrained"}
                allowed = "trust_remote_code" in told and file.name == "loading.py"
                assert ast.unparse(node.func) in known or allowed, f"{file}: {ast.unparse(node)}"


DOCUMENTED = [
    ("hamt", ("HAMTModel", "HAMTConfig", "HolographicMemory", "HAMTLayer")),
    ("hamt.layers", ("RetrievalHead", "GatingNetwork")),
]


@pytest.mark.parametrize(("module", "names"), DOCUMENTED)
def test_documented_imports(module, names):
    for name in names:
        assert isinstance(getattr(importlib.import_module(module), name), type)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


AS_COMMAND = """
import sys
sys.argv[0] = "/usr/bin/hamt"
from hamt.cli import main
code = main()
print("torch" in sys.modules, "transformers" in sys.modules, code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["--version"]], ids=str)
def test_the_command_answers_without_torch(arguments):
    """The console script starts with ``sys.argv[0]`` ending in ``hamt``."""
    out = run(AS_COMMAND, *arguments).stdout
    assert out.splitlines()[-1] == "False False 0"
    assert "usage: hamt" in out or f"hamt {hamt.__version__}" in out
