"""Two processes, each with all weights (DDP) or with a piece of each (FSDP2), against one."""

import os
from pathlib import Path

import pytest
import torch
import two_processes
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from command_inputs import fails, read_json
from safetensors.torch import load_file
from training_inputs import finish, flags, losses, start_python
from two_processes import CASES, FSDP2, IDS, WHOLE, train_rows

from hamt.checkpoint import load_checkpoint
from hamt.errors import UserError
from hamt.model import HAMTForCausalLM
from hamt.training import memory
from hamt.training.cost import Weights, ddp_bytes, fsdp2_bytes
from hamt.training.sharding import check_plugin, wants_shards

pytestmark = pytest.mark.slow

KINDS = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def found(text, tmp_path_factory):
    """The folder of what two processes have found."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    finish(start_python(*launcher, two_processes.__file__, text, folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "case"), [*(("ddp", case) for case in WHOLE), *(("fsdp2", case) for case in CASES)]
)
def test_steps_of_two_processes_are_those_of_one(kind, case, found):
    """Losses, norms of gradients, weights and states of the optimisers."""
    trainer, pairs = train_rows(IDS, **CASES[case])
    two = torch.load(found / kind / f"{case}.pt")
    # bfloat16 rounds sums in another order, and Muon's iterations enlarge such differences.
    loose = {"bf16": 1e-2, "muon": 1e-3}.get(case)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(two["pairs"], pairs, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=(loose or 1e-5) / 10)
        assert norm == pytest.approx(wanted_norm, rel=loose or 1e-5)
    torch.testing.assert_close(
        two["weights"], dict(trainer.model.state_dict()), atol=loose or 1e-5, rtol=0
    )
    wanted = [each.state_dict() for each in trainer.optimizers]
    assert [each["param_groups"] for each in two["optimizers"]] == [
        each["param_groups"] for each in wanted
    ]
    for mine, other in zip(two["optimizers"], wanted, strict=True):
        torch.testing.assert_close(mine["state"], other["state"], atol=loose or 1e-5, rtol=0)


def test_bf16_in_pieces_is_that_of_whole_weights(found):
    """Gates and decays are not rounded to bfloat16 when they are gathered."""
    ddp, fsdp2 = (torch.load(found / kind / "bf16.pt") for kind in KINDS)
    torch.testing.assert_close(fsdp2["weights"], ddp["weights"], atol=1e-5, rtol=0)
    assert fsdp2["pairs"][-1] == pytest.approx(ddp["pairs"][-1], rel=1e-5)


def test_the_recipe_of_100M_parameters_made_small(found):
    """Its steps are the same by both, with dropout, bfloat16 and Muon, and go on bit for bit."""
    ddp, fsdp2 = (losses(found / f"run-{kind}") for kind in KINDS)
    assert [step for step, _, _ in ddp] == [1, 2, 3, 4]
    assert ddp[-1][1] < ddp[0][1]
    for mine, wanted in zip(fsdp2, ddp, strict=True):
        assert mine == pytest.approx(wanted, rel=0.02)
        assert mine[1] == pytest.approx(wanted[1], rel=1e-3)
    for kind in KINDS:
        before, after = (found / f"run-{kind}{name}" for name in ("-before", ""))
        assert losses(after) == losses(before)
        for name, weight in load_file(before / "model.safetensors").items():
            assert torch.equal(load_file(after / "model.safetensors")[name], weight)


@pytest.mark.parametrize("name", ["", "checkpoints/best.pt", "checkpoints/step_4"])
def test_a_checkpoint_of_pieces_is_whole(name, found):
    """One process reads it; of the last step all three are the same weights."""
    folder = found / "run-fsdp2"
    wanted = load_file(folder / "model.safetensors")
    model, _ = load_checkpoint(str(folder / name))
    assert type(model) is HAMTForCausalLM
    weights = model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert read_json(folder / "config.json")["architectures"] == ["HAMTForCausalLM"]


def test_the_configuration_in_the_pages_asks_for_fsdp2(tmp_path, monkeypatch):
    """As Accelerate's launcher tells the processes that it starts."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    (tmp_path / "fsdp2.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    words = ["--config_file", str(tmp_path / "fsdp2.yaml"), "-m", "hamt.cli", "train"]
    told, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_multi_gpu_env(told).items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert told.num_processes == 8
    assert wants_shards()
    assert (
        FSDP2.items() - {("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")} <= os.environ.items()
    )
    check_plugin("bf16")
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(("setting", "word"), [
    ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
    ({"mixed_precision": "fp16"}, "use bf16"),
])  # fmt: skip
def test_what_is_not_supported_is_refused(setting, word, text, tmp_path, capsys, monkeypatch):
    options = {name: value for name, value in setting.items() if name.islower()}
    for name, value in {**FSDP2, **setting}.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
    if options:  # a CPU has no fp16 in the first place
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert word in fails(flags(text, tmp_path / "run", **options), capsys)


def test_bytes_that_are_exchanged_are_those_of_the_cost_model(found):
    model = train_rows(IDS)[0].model
    weights = Weights.of(model)
    ddp, fsdp2 = (torch.load(found / kind / "communication.pt") for kind in KINDS)
    assert ddp[0][1] == {"allreduce_": ddp_bytes(weights)}
    blocks = len(model.model.layers)
    calls, sizes = fsdp2[0]
    assert calls == {"_allgather_base_": 2 * blocks + 1, "_reduce_scatter_base_": blocks + 1}
    assert tuple(sizes.values()) == fsdp2_bytes(weights)
    # Muon orthogonalises whole matrices: of pieces its step takes messages, too.
    assert ddp[1][0] == {}
    assert sum(fsdp2[1][0].values()) > 0


def test_of_weights_in_pieces_a_process_needs_room_for_one(monkeypatch):
    model, device = torch.nn.Linear(100, 100, bias=False), torch.device("cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50_000)
    memory.check_memory(model, device, pieces=4)  # 40,000 of 160,000 bytes
    with pytest.raises(UserError, match="this machine has 0"):
        memory.check_memory(model, device, pieces=2)
