"""torch.compile, torch.export, ONNX, AOTInductor, pages; flops and shapes without memory."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ecosystem_checks.base import check, close, needs, packaged, random_ids, refused, tiny_model
from hamt.cli import main
from hamt.export.check import compare
from hamt.export.step import Step, export_program

GROUP = "Export and compilation"


@check(GROUP, "torch.export of one token, any number of rows")
def _step() -> str:
    step = Step(tiny_model())
    run = export_program(step).module()
    worst = max(
        compare(step, lambda tensors: run(*tensors), random_ids(rows, 12)).difference
        for rows in (1, 5)
    )
    assert worst < 1e-5
    return f"with 1 row and with 5: off by {worst:.0e} of the largest"


class Logits(torch.nn.Module):
    """A model as a function of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(num_layers=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, N, V)."""
        return self.model(ids, use_cache=False).logits


@check(GROUP, "torch.export of a text of fixed length")
def _text() -> str:
    module, ids = Logits(), random_ids(2, 20)
    program = torch.export.export(module, (ids,), strict=False)
    own = [str(node.target) for node in program.graph.nodes if "hamt" in str(node.target)]
    assert not own, own
    other = random_ids(2, 20, seed=1)
    return close(program.module()(other).detach(), module(other).detach())


@check(GROUP, "torch.jit.trace of a text of fixed length")
def _trace() -> str:
    module, ids = Logits(), random_ids(2, 20)
    traced = torch.jit.trace(module, (ids,), check_trace=False)
    other = random_ids(2, 20, seed=1)
    return close(traced(other).detach(), module(other).detach())


@check(GROUP, "torch.export of a text of any length")
def _dynamic() -> str:
    length = torch.export.Dim("length", min=2, max=512)
    return refused(
        lambda: torch.export.export(
            Logits(), (random_ids(2, 20),), dynamic_shapes=({1: length},), strict=False
        ),
        "texts of any length",
    )


@check(GROUP, "hamt export --format onnx, by onnxruntime", slow=True)
def _onnx() -> str:
    needs("onnxruntime")
    needs("onnxscript")
    from hamt.export.onnx_file import load_onnx

    with tempfile.TemporaryDirectory() as folder:
        assert main(["export", "--format", "onnx", "--output_dir", folder]) == 0
        run = load_onnx(Path(folder) / "model.onnx")[0]
        step = Step(packaged())
        worst = max(compare(step, run, random_ids(rows, 40)).difference for rows in (1, 5))
        size = (Path(folder) / "model.onnx").stat().st_size
    assert worst < 1e-4
    return f"{size / 1e6:.1f} MB; off by {worst:.0e} of the largest over 40 tokens"


@check(GROUP, "hamt export --format web", slow=True)
def _web() -> str:
    needs("onnxruntime")
    needs("onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        code = main(["export", "--format", "web", "--output_dir", folder])
        files = [x for x in Path(folder).rglob("*") if x.is_file() and ".hamt" not in x.parts]
    assert code == 0
    return f"{len(files)} files"


@check(GROUP, "torch.compile of the forward pass, eager backend")
def _compiled() -> str:
    model, ids = tiny_model(), random_ids(2, 20)
    compiled = torch.compile(model, backend="aot_eager")
    return close(compiled(ids).logits.detach(), model(ids).logits.detach())


@check(GROUP, "torch.func.grad")
def _func() -> str:
    model, ids = tiny_model(), random_ids(1, 12)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (ids,), {"labels": ids}).loss

    return refused(lambda: torch.func.grad(loss)(weights), "setup_context")


@check(GROUP, "the meta device: shapes without memory")
def _meta() -> str:
    from hamt import HAMTConfig, HAMTForCausalLM

    with torch.device("meta"):
        model: Any = HAMTForCausalLM(HAMTConfig.from_preset("200M"))
        shape = model(torch.zeros(2, 16, dtype=torch.long)).logits.shape
    assert shape == (2, 16, 50257)
    return f"{model.num_parameters() / 1e6:.0f}M parameters"


@check(GROUP, "FlopCounterMode")
def _flops() -> str:
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = tiny_model(), random_ids(1, 32)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    least = 2 * 32 * sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert counter.get_total_flops() >= least
    return f"{counter.get_total_flops():,} operations; linear maps alone {least:,}"


@check(GROUP, "AOTInductor", slow=True)
def _aoti() -> str:
    from hamt.export.aoti import load_aoti, write_aoti

    step = Step(tiny_model(num_layers=1))
    with (
        tempfile.TemporaryDirectory() as folder,
        torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}),
    ):
        write_aoti(step, path := Path(folder) / "model.pt2")
        run = load_aoti(path)[0]
        worst = compare(step, run, random_ids(3, 12)).difference
    assert worst < 1e-5
    return f"off by {worst:.0e} of the largest"
