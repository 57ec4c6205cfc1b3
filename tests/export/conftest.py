"""What the tests of pages need: Node.js, and the files of onnxruntime-web."""

import json
import shutil
import subprocess
from importlib.resources import files

import pytest

from hamt.errors import UserError
from hamt.export.runtime import find_runtime


@pytest.fixture(scope="session")
def javascript(tmp_path_factory):
    """Run a function of one argument with the page's scripts as modules; gives what it returns.

    ``run("tokenizer", "({Tokenizer}, given) => ...", given)``; what goes in and out is plain data.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js here: apt install nodejs")
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "package.json").write_text('{"type": "module"}')
    for script in files("hamt.export").joinpath("page").iterdir():
        if script.name.endswith(".js"):
            (folder / script.name).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")

    def run(module, function, given):
        program = (
            f'import * as module from "./{module}.js";\n'
            'import {readFileSync} from "node:fs";\n'
            f'const given = JSON.parse(readFileSync(0, "utf8"));\n'
            f"console.log(JSON.stringify(({function})(module, given)));\n"
        )
        done = subprocess.run(
            [node, "--input-type=module", "--eval", program],
            cwd=folder,
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=120,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def runtime():
    """onnxruntime-web, which npm fetches once for this user."""
    try:
        return find_runtime(None)[0]
    except UserError as error:
        pytest.skip(str(error))
