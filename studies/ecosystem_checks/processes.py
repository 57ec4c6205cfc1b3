"""Accelerate, several processes at once, servers, and processes without HAMT."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ecosystem_checks.base import (
    ROOT,
    check,
    close,
    equal,
    greedy,
    needs,
    packaged,
    python,
    random_ids,
    tiny_model,
    tokenizer,
)
from hamt import HAMTConfig, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED

ONE, TWO = "Accelerate, one process", "Accelerate and torch.distributed, two processes"
SERVERS, ALONE = "Servers", "Without HAMT installed"
IDS = random_ids(2, 20)


# ------------------------------------------------------------------ Accelerate in one process


def logits(model: Any) -> torch.Tensor:
    """Logits, without their graph."""
    return model(IDS).logits.detach()


def prepared(**options: Any) -> tuple[Any, Any, Any]:
    """An accelerator, a model and its optimiser."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process has one, and it remembers its precision
    accelerator = Accelerator(cpu=True, **options)
    model = tiny_model().train()
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@check(ONE, "gradient accumulation is a larger batch")
def _accumulated() -> str:
    accelerator, model, _ = prepared(gradient_accumulation_steps=2)
    for row in IDS:
        with accelerator.accumulate(model):
            accelerator.backward(model(row[None], labels=row[None]).loss)
    whole = tiny_model().train()
    whole(IDS, labels=IDS).loss.backward()
    return close(model.lm_head.weight.grad, whole.lm_head.weight.grad)


@check(ONE, "mixed_precision='bf16'")
def _mixed() -> str:
    accelerator, model, _ = prepared(mixed_precision="bf16")
    loss = model(IDS, labels=IDS).loss
    accelerator.backward(loss)
    assert model.lm_head.weight.grad.dtype == torch.float32
    return close(loss.item(), tiny_model()(IDS, labels=IDS).loss.item(), 0.02)


@check(ONE, "save_state and load_state: a run goes on as it would have")
def _state() -> str:
    def step(accelerator: Any, model: Any, optimiser: Any) -> None:
        accelerator.backward(model(IDS, labels=IDS).loss)
        optimiser.step()
        optimiser.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        made = prepared()
        step(*made)
        made[0].save_state(folder)
        step(*made)
        wanted = logits(made[1].eval())
        again = prepared()
        again[0].load_state(folder)
        step(*again)
    return close(logits(again[1].eval()), wanted)


@check(ONE, "init_empty_weights, load_checkpoint_and_dispatch")
def _dispatched() -> str:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = HAMTForCausalLM(HAMTConfig.from_pretrained(PRETRAINED))
    assert all(p.is_meta for p in model.parameters())
    model.tie_weights()
    model = load_checkpoint_and_dispatch(model, str(PRETRAINED), device_map={"": "cpu"}).eval()
    return close(logits(model), logits(packaged()))


@check(ONE, "cpu_offload: a state is carried through modules whose weights come and go")
def _offloaded() -> str:
    from accelerate import cpu_offload

    model = tiny_model()
    wanted = greedy(tiny_model(), IDS, 5)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return equal(found, wanted, "tokens")


@check(ONE, "disk_offload")
def _on_disk() -> str:
    from accelerate import disk_offload

    model, wanted = tiny_model(), logits(tiny_model())
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        return close(logits(model), wanted)


@check(ONE, "infer_auto_device_map keeps each block whole")
def _mapped() -> str:
    from accelerate import infer_auto_device_map

    model = tiny_model(num_layers=4)
    size = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    kept = sum(p.numel() * 4 for p in model.model.embed_tokens.parameters()) + 2.5 * size
    found = infer_auto_device_map(
        model,
        max_memory={0: int(kept), "cpu": 10**9},
        no_split_module_classes=model._no_split_modules,
    )
    assert {"cpu", 0} <= set(found.values())
    assert not [name for name in found if name.startswith("model.layers.") and name.count(".") > 2]
    return f"{len(found)} parts on 2 devices"


# ------------------------------------------------------------------ two processes

WORKED = (
    "DistributedDataParallel",
    "FullyShardedDataParallel (FSDP1)",
    "fully_shard (FSDP2)",
    "distributed checkpoint: saved in pieces, read whole",
    "Accelerator",
    "Trainer",
)


@cache
def together() -> dict[str, list[str]]:
    """How each check of ``worker`` ended, in two processes that gloo connects."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        told = ("--nproc_per_node", "2", "--master_port", str(free_port()))
        python(
            *("-m", "torch.distributed.run", *told, "-m", "ecosystem_checks.worker", str(path)),
            ACCELERATE_USE_CPU="true",
            PYTHONPATH=str(ROOT / "studies"),
        )
        return json.loads(path.read_text(encoding="utf-8"))


def _worked(name: str) -> str:
    kind, said = together()[name]
    assert kind == "works", said
    return said


for _name in WORKED:
    check(TWO, _name, slow=True)(lambda name=_name: _worked(name))


# ------------------------------------------------------------------ servers


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        return given.getsockname()[1]


class Served:
    """A server in a process of its own, and OpenAI's client for it."""

    def __init__(self, arguments: list[str], port: int, **variables: str) -> None:
        import openai

        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env=env, stdout=self.log, stderr=self.log
        )
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        self.wait(port)

    def wait(self, port: int, seconds: float = 60) -> None:
        """Until it listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        self.log.seek(0)
        tail = self.log.read()[-600:]
        self.close()
        raise AssertionError(f"it does not listen: {tail}")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


PROMPT = "The Congress of the"
SAID: Any = [{"role": "user", "content": "What does the Congress do?"}]
TOLD: Any = {"model": "hamt", "max_tokens": 8, "temperature": 0}


def written(prompt: str = PROMPT, count: int = 8) -> str:
    """What greedy search writes after a prompt."""
    ids = tokenizer()(prompt, return_tensors="pt").input_ids
    return tokenizer().decode(greedy(packaged(), ids, count)[0, ids.shape[1] :])


def _completion(client: Any) -> str:
    found = client.completions.create(prompt=PROMPT, **TOLD).choices[0].text
    assert found == written(), (found, written())
    return repr(found)


def _chat(client: Any) -> str:
    found = client.chat.completions.create(messages=SAID, **TOLD)
    assert found.choices[0].message.content
    assert found.usage.completion_tokens <= 8
    return repr(found.choices[0].message.content)


def _streamed(client: Any) -> str:
    whole = client.chat.completions.create(messages=SAID, **TOLD).choices[0].message.content
    parts = [
        part.choices[0].delta.content or ""
        for part in client.chat.completions.create(messages=SAID, stream=True, **TOLD)
        if part.choices
    ]
    assert "".join(parts) == whole, (parts, whole)
    return f"{len(parts)} parts, together the whole answer"


def _models(client: Any) -> str:
    return ", ".join(each.id for each in client.models.list())


def _unknown(client: Any) -> str:
    import openai

    try:
        client.completions.create(prompt=PROMPT, **TOLD | {"model": "gpt-4"})
    except openai.NotFoundError as error:
        return str(error.body["message"] if isinstance(error.body, dict) else error)
    raise AssertionError("a model that is not there was served")


ASKED: dict[str, Callable[[Any], str]] = {
    "models.list": _models,
    "completions.create: what greedy search writes": _completion,
    "chat.completions.create": _chat,
    "chat.completions.create(stream=True)": _streamed,
    "a model that is not served": _unknown,
}
_served: list[Served] = []


def _ask(name: str) -> str:
    for package in ("openai", "fastapi", "uvicorn"):
        needs(package)
    if not _served:
        port = free_port()
        _served.append(Served(["-m", "hamt", "serve", "--port", str(port)], port))
    try:
        return ASKED[name](_served[0].client)
    finally:
        if name == list(ASKED)[-1]:
            _served.pop().close()


for _name in ASKED:
    check(SERVERS, f"hamt serve, openai: {_name}", slow=True)(lambda name=_name: _ask(name))


LAUNCHER = """
import sys
import hamt
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", *sys.argv[1:]]
main()
"""


@check(SERVERS, "transformers serve, after import hamt", slow=True)
def _transformers_serve() -> str:
    for package in ("openai", "fastapi", "uvicorn"):
        needs(package)
    with tempfile.TemporaryDirectory() as folder:
        model = packaged()
        model.save_pretrained(path := f"{folder}/model")
        kept = tokenizer()
        with mock.patch.object(kept, "chat_template", "{{ messages[-1].content }}"):
            kept.save_pretrained(path)
        (hub := Path(folder) / "hub" / "hub").mkdir(parents=True)
        port, told = free_port(), ["--device", "cpu", "--host", "127.0.0.1"]
        served = Served(["-c", LAUNCHER, *told, "--port", str(port)], port, HF_HOME=str(hub.parent))
        try:
            parts = served.client.chat.completions.create(
                model=path, messages=SAID, stream=True, max_tokens=8, temperature=0
            )
            found = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        finally:
            served.close()
    assert found == (wanted := written(SAID[0]["content"])), (found, wanted)
    return repr(found)


# ------------------------------------------------------------------ without HAMT


@check(ALONE, "trust_remote_code=True: loads, writes, trains, is saved and loaded", slow=True)
def _remote() -> str:
    from test_remote_code import ELSEWHERE

    model, registered = tiny_model(), HAMTConfig._with_code
    HAMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/here")
            files = len(list(Path(folder, "here").glob("*.py")))
            told = (f"{folder}/here", f"{folder}/there", json.dumps(IDS.tolist()))
            found = json.loads(python("-c", ELSEWHERE, *told, HF_HOME=folder).stdout)
    finally:
        HAMTConfig._with_code = registered
    said = equal(torch.tensor(found[1]), greedy(model, IDS, 5), "tokens")
    return f"{files} files of code; {said}"


MISSING = """
import sys
sys.modules["hamt"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@check(ALONE, "a checkpoint without code")
def _missing() -> str:
    from ecosystem_checks.base import Refused

    error = python("-c", MISSING, str(PRETRAINED), code=1).stderr.strip().splitlines()
    (line,) = [each for each in error if "ValueError: " in each][-1:]
    assert "hamt" in line, line
    raise Refused(line.split("ValueError: ")[1])
