"""The code of a model beside its weights, for ``trust_remote_code`` where HAMT is not installed.

Transformers copies a model's file and those that it imports relatively, all into one folder. HAMT's
modules import each other by their full names and lie in several folders, so they are written as
flat modules with relative imports. ``hamt.cpu`` and ``hamt.gpu``, which only make them faster, stay
behind.
"""

import re
from pathlib import Path

INSTALLED = __name__ == "hamt.remote_code"  # and not itself such a copy
SOURCE = Path(__file__).parent
FLAT = {"hamt.model": "modeling_hamt", "hamt.config": "configuration_hamt"}
CLASSES = {
    "AutoModel": "HAMTBackbone",
    "AutoModelForCausalLM": "HAMTForCausalLM",
    "AutoModelForSequenceClassification": "HAMTForSequenceClassification",
    "AutoModelForTokenClassification": "HAMTForTokenClassification",
    "AutoModelForQuestionAnswering": "HAMTForQuestionAnswering",
}
_IMPORT = re.compile(r"^( *)from (hamt[\w.]*) import ", re.MULTILINE)
_FASTER = re.compile(r"^( *)(?:from|import) hamt\.[cg]pu.*$", re.MULTILINE)
_NAMED = re.compile(r'"(hamt[\w.]*):(\w+)"')  # of a class that is imported when it is needed


def auto_map() -> dict[str, str]:
    """Where Transformers finds each class: the entry ``auto_map`` of ``config.json``."""
    found = {auto: f"{FLAT['hamt.model']}.{name}" for auto, name in CLASSES.items()}
    return {"AutoConfig": f"{FLAT['hamt.config']}.HAMTConfig", **found}


def write_code(folder: Path) -> None:
    """Write the modules that the models need into a folder, which is made if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, written = ["hamt.model"], set[str]()
    named: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module in written:
            continue
        written.add(module)
        text = _FASTER.sub(r"\1raise ModuleNotFoundError", _source(module))
        waiting += [match[2] for match in _IMPORT.finditer(text)]
        named |= {name: home for home, name in _NAMED.findall(text)}
        waiting += named.values()
        text = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import ", text)
        text = _NAMED.sub(lambda match: f'f"{{__package__}}.{_flat(match[1])}:{match[2]}"', text)
        (folder / f"{_flat(module)}.py").write_text(text, encoding="utf-8")
    # Transformers copies what is imported from the file that it loads, the configuration first.
    lines = [f"from .{_flat(home)} import {name}  # noqa" for name, home in sorted(named.items())]
    with open(folder / f"{_flat('hamt.config')}.py", "a", encoding="utf-8") as file:
        file.write("\n".join(["", *lines, ""]))


def _flat(module: str) -> str:
    return FLAT.get(module, module.replace(".", "_"))


def _source(module: str) -> str:
    path = SOURCE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")
