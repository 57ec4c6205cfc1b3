"""``hamt train``: nothing is lost when it dies, and it runs the same on one process and on many."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hamt.checkpoint import load_checkpoint
from hamt.cli import main
from hamt.data.tokenizer import train_tokenizer
from hamt.training import checkpoints, run
from hamt.training.held_out import Loss

TEXT = "".join(
    f"Line {i}: the sum of {i} and {i + 1} is {2 * i + 1}, and that is that.\n" for i in range(900)
)
TINY = {
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_slots": 4,
    "vocab_size": 300,
    "max_length": 32,
    "batch_size": 4,
    "num_steps": 40,
    "log_interval": 1,
    "eval_interval": 20,
    "save_interval": 10,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def flags(text, folder, **options):
    values = {"data": text, "output_dir": folder, **TINY, **options}
    return [
        "train",
        *(str(word) for name, value in values.items() for word in (f"--{name}", value)),
    ]


def losses(folder):
    """Step, loss and gradient norm of every step in the log."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def start(arguments, *launcher):
    command = [sys.executable, *launcher, "-m", "hamt.cli", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out


CONTIGUOUS = {"order": "contiguous", "tbptt_segments": 2, "dropout": 0.1}


@pytest.mark.parametrize("options", [{"dropout": 0.1}, CONTIGUOUS], ids=["shuffled", "contiguous"])
def test_a_killed_run_goes_on_bit_for_bit(text, tmp_path, options):
    assert main(flags(text, tmp_path / "straight", **options)) == 0
    process = start(flags(text, tmp_path / "killed", **options))
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "step_20").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it was killed too late"
    finish(start([*flags(text, tmp_path / "killed", **options), "--resume"]))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert [step for step, *_ in losses(tmp_path / "killed")] == list(range(1, 41))
    one, other = (
        load_checkpoint(tmp_path / name)[0].state_dict() for name in ("straight", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_dies_while_it_saves_keeps_the_checkpoint_before(
    text, tmp_path, monkeypatch, capsys
):
    """Killed at any of the moments of a save, all that has a name is whole."""
    folder, save, calls = tmp_path / "run", torch.save, []

    def fail(content, file, *arguments):
        calls.append(Path(file).name)
        if calls.count(checkpoints.STATE) == 2 and Path(file).name == checkpoints.STATE:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, file, *arguments)

    monkeypatch.setattr(torch, "save", fail)
    assert main(flags(text, folder)) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(torch, "save", save)
    assert [path.name for path in checkpoints.find_states(folder / "checkpoints")] == ["step_10"]
    assert not list((folder / "checkpoints").glob(".*"))
    assert main([*flags(text, folder), "--resume"]) == 0
    assert [step for step, *_ in losses(folder)] == list(range(1, 41))


def test_a_termination_is_an_orderly_end(text, tmp_path):
    process = start(flags(text, tmp_path / "run", num_steps=100000))
    for line in process.stdout:
        if "held-out loss" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert "--resume goes on" in finish(process, code=130)
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["interrupted"]
    (state,) = checkpoints.find_states(tmp_path / "run" / "checkpoints")
    assert state.name == f"step_{info['steps']}"


def test_two_processes_reach_the_losses_of_one(text, tmp_path):
    """Equal but for the order of sums, which Muon's bfloat16 iterations enlarge."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0")
    pair = start(flags(text, tmp_path / "two", num_steps=20), *launcher[:4])
    out = finish(pair)
    assert (
        out.count("held-out loss") == 3
    )  # told once, by the main process: steps 0 and 20, and at the end
    assert main(flags(text, tmp_path / "one", num_steps=20)) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-6)
    assert two[0][2] == pytest.approx(one[0][2], rel=1e-3)
    for (_, expected, _), (_, got, _) in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=0.01)


def test_a_run_writes_all_that_tells_how_it_went(text, tmp_path):
    assert main(flags(text, tmp_path, num_epochs=1)) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
        "training_info.json", "log.jsonl", "loss_curve.png", "README.md", "checkpoints",
    }  # fmt: skip
    info = json.loads((tmp_path / "training_info.json").read_text())
    assert info["finished"]
    assert info["steps"] == 40
    assert info["tokens"] == 40 * 4 * 32
    assert info["peak_memory_bytes"] > 10**8
    assert len(info["data_fingerprint"]) == 16
    best, _ = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert best.num_parameters() == info["num_parameters"]
    assert f"{info['num_parameters']:,}" in (tmp_path / "README.md").read_text()


def test_trouble_ends_the_run_with_its_batch_saved(text, tmp_path, capsys):
    assert main(flags(text, tmp_path, learning_rate=1e25)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    batch = torch.load(re.search(r"its batch is in (\S+\.pt)", error).group(1), weights_only=True)
    assert batch["input_ids"].shape == (4, 32)
    assert "--skip_trouble" in error


def test_a_resumed_run_keeps_its_best_model(text, tmp_path, monkeypatch):
    """A later evaluation that is worse does not replace it."""
    measured = iter([5.0, 4.0, 4.5, 4.4, 4.3])
    monkeypatch.setattr(run, "held_out_loss", lambda *_, **__: Loss(next(measured), 1.0))
    options = {"eval_interval": 10, "num_steps": 20, "keep_checkpoints": 2}
    best = tmp_path / "checkpoints" / "best.pt"
    assert main(flags(text, tmp_path, **options)) == 0
    first = best.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoints" / "step_20")
    measured = iter([4.5, 4.4])
    assert main([*flags(text, tmp_path, **options), "--resume"]) == 0
    assert best.stat().st_mtime_ns == first


def test_a_finished_run_can_be_gone_on_with(text, tmp_path, capsys):
    assert main(flags(text, tmp_path, num_steps=6, schedule="constant")) == 0
    assert main([*flags(text, tmp_path, num_steps=9, schedule="constant"), "--resume"]) == 0
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 10))
    assert main([*flags(text, tmp_path, num_steps=9, schedule="constant"), "--resume"]) == 0
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, 10))
    capsys.readouterr()


def test_a_run_on_another_text_is_not_gone_on_with(text, tmp_path, capsys):
    """That a text is the same can be told from its content alone, which older runs did not note."""
    assert main(flags(text, tmp_path, num_steps=2)) == 0
    info = json.loads((tmp_path / "training_info.json").read_text())
    assert info["paths"] == {"data": str(Path(text).resolve())}
    state = tmp_path / "checkpoints" / "step_2" / "training_state.pt"
    content = torch.load(state, weights_only=True)
    content["identity"]["text"] = "another"
    torch.save(content, state)
    assert main([*flags(text, tmp_path, num_steps=3), "--resume"]) == 2
    assert "had another text or tokenizer" in capsys.readouterr().err
    content["identity"]["data"] = content["identity"].pop("text")
    torch.save(content, state)
    assert main([*flags(text, tmp_path, num_steps=3), "--resume"]) == 0


def test_a_model_that_got_worse_is_told(text, tmp_path, monkeypatch, capsys):
    measured = iter([5.0, 4.0, 4.5, 4.4])
    monkeypatch.setattr(run, "held_out_loss", lambda *_, **__: Loss(next(measured), 1.0))
    assert main(flags(text, tmp_path, num_steps=20, eval_interval=10)) == 0
    assert "lowest at step 10 (4.000 nats/token" in capsys.readouterr().out


def test_gradients_may_be_computed_twice_to_save_memory(text, tmp_path):
    """With a state that is carried along, too: the same losses, to the last bit."""
    options = {"order": "contiguous", "tbptt_segments": 2, "num_steps": 6}
    for name, more in (("plain", ()), ("twice", ("--gradient_checkpointing",))):
        assert main([*flags(text, tmp_path / name, **options), *more]) == 0
    assert losses(tmp_path / "twice") == losses(tmp_path / "plain")


def test_micro_batches_take_no_other_steps(text, tmp_path):
    for parts in (1, 2):
        assert (
            main(flags(text, tmp_path / str(parts), num_steps=4, gradient_accumulation_steps=parts))
            == 0
        )
    for (_, expected, _), (_, got, _) in zip(
        losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-3)


def test_tensorboard_has_what_the_log_has(text, tmp_path):
    assert main([*flags(text, tmp_path, num_steps=6), "--use_tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(step, pytest.approx(loss)) for step, loss, _ in losses(tmp_path)]
    assert [event.step for event in events.Scalars("held_out/bits_per_byte")] == [0, 6]


def test_weights_and_biases_works_offline(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start([*flags(text, tmp_path, num_steps=6, run_name="mine"), "--use_wandb"])
    finish(process)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    assert len(losses(tmp_path)) == 6


def test_the_log_tells_the_share_of_the_machine_that_is_used(text, tmp_path):
    assert main(flags(text, tmp_path, num_steps=3)) == 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["flop_utilization"] < 1 for record in records if "loss" in record)


def test_the_documented_gpu_command_runs_here_too(text, tmp_path):
    """With its flags, on a tiny text and with small sizes: bfloat16, compiled, saved, killed, resumed."""
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer([TEXT], 300).save_pretrained(tokenizer)
    documented = """--hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset
    wikitext-103
        --max_seq_length 1024 --batch_size 128 --num_epochs 10 --learning_rate 3e-4
        --mixed_precision bf16 --compile_model --output_dir outputs/hamt_100m --run_name
        hamt-100m-competitive"""
    smaller = f"""--hidden_dim 32 --hcm_dim 64 --num_layers 1 --dataset {text} --tokenizer {tokenizer}
        --max_seq_length 32 --batch_size 4 --output_dir {tmp_path / "run"} --num_workers 1
        --max_steps 2 --save_interval 1 --keep_checkpoints 2 --log_interval 1"""
    script = str(Path(__file__).parents[2] / "train_gpu.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def launch(*more):
        command = [sys.executable, script, *documented.split(), *smaller.split(), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
        assert done.returncode == 0, done.stderr
        assert "recompile_limit" not in done.stderr
        return losses(tmp_path / "run")

    straight = launch()
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["options"]["use_auxiliary_loss"], "as configs/a100.yaml says"
    first, last = checkpoints.find_states(tmp_path / "run" / "checkpoints")
    assert (first.name, last.name) == ("step_1", "step_2")
    shutil.rmtree(last)
    assert launch("--resume") == straight
    assert [step for step, *_ in straight] == [1, 2]


def test_a_dry_run_costs_nothing_and_leaves_nothing(text, tmp_path, capsys):
    assert main([*flags(text, tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "steps", "operations", "GiB", "time on this machine"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_options_come_from_a_file_and_flags_go_before_them(text, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": text, "output_dir": str(tmp_path / "run")}))
    assert main(["train", str(path), "--num_steps", "3", "--max_seq_length", "16"]) == 0
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert (info["options"]["num_steps"], info["options"]["max_length"]) == (3, 16)
    assert info["options"]["hidden_dim"] == 32
    for content, message in (
        (
            "num_stepss: 3\n",
            f"unknown option --num_stepss (in {path}): did you mean --num_steps?",
        ),
        ("a: [1\nb: 2", "line 2"),
        ("- a\n", "must hold lines"),
    ):
        path.write_text(content)
        assert main(["train", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no recipe" in capsys.readouterr().err
    assert main(["train", "--config", text]) == 2
    assert f"a text is given with --data {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "micro_batches": 2}, "make it a multiple of 2"),
        ({"tbptt_segments": 2}, "--tbptt_segments needs --order contiguous"),
        ({"order": "sorted"}, "shuffled, contiguous; got 'sorted'"),
        ({"size": "huge"}, "--size must be one of"),
        ({"mixed_precision": "fp8"}, "no, bf16, fp16; got 'fp8'"),
        ({"max_length": 5000}, "too short for a batch"),
        ({"num_epochs": 0}, "--num_epochs must be positive"),
        ({"optimizer": "sgd"}, "muon, adamw; got 'sgd'"),
        ({"schedule": "step"}, "cosine, wsd, constant; got 'step'"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU: bf16 also works on a CPU"),
        ({"save_interval": 0}, "--save_interval must be at least 1"),
        ({"keep_checkpoints": 0}, "--keep_checkpoints must be at least 1"),
        ({"learning_rate": -1}, "--learning_rate must be positive"),
        ({"max_norm": 0}, "--max_norm must be positive"),
        ({"num_epochs": "inf"}, "--num_epochs must be positive; got inf"),
        ({"seed": -1}, "--seed must lie in [0, 4294967295]; got -1"),
        ({"warmup": 2}, "--warmup must lie in [0, 1]"),
        ({"num_step": 3}, "did you mean --num_steps?"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(
    text, tmp_path, capsys, options, message
):
    assert main(flags(text, tmp_path / "run", **options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_flags_go_before_what_a_file_says_of_options_that_they_replace(text, tmp_path):
    path = tmp_path / "run.yaml"
    content = {**TINY, "data": text, "output_dir": str(tmp_path / "run"), "mixed_precision": False}
    path.write_text(
        yaml.safe_dump(content).replace("mixed_precision: false", "mixed_precision: no")
    )
    assert main(["train", str(path), "--epochs", "0.01", "--size", "tiny"]) == 0
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["steps"] == 2
    assert info["config"]["hidden_dim"] == 64
    assert info["options"]["mixed_precision"] == "no"


def test_another_run_goes_on_from_a_trained_model(text, tmp_path, capsys):
    assert main(flags(text, tmp_path / "first", num_steps=5)) == 0
    small = {
        name: value for name, value in TINY.items() if name not in ("hidden_dim", "num_layers")
    }
    small = {name: value for name, value in small.items() if name not in ("num_heads", "num_slots")}
    options = {
        **small,
        "data": text,
        "init_from": tmp_path / "first",
        "output_dir": tmp_path / "second",
    }
    options |= {"num_steps": 1, "dropout": 0.1}
    command = [
        "train",
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]
    assert main(command) == 0
    first, second = (
        json.loads((tmp_path / name / "training_info.json").read_text())
        for name in ("first", "second")
    )
    assert second["held_out"][0][1] == pytest.approx(first["held_out"][-1][1], rel=1e-6)
    assert second["config"]["dropout"] == 0.1
    assert (
        f"It started from {tmp_path / 'first'}" in (tmp_path / "second" / "README.md").read_text()
    )
    assert main([*command, "--hidden_dim", "64"]) == 2
    assert "leave --hidden_dim out" in capsys.readouterr().err


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs to mount a small disk"
)
def test_a_disk_that_is_really_full_ends_the_run_and_costs_no_checkpoint(text, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        process = start(flags(text, disk / "run", num_steps=60, save_interval=5))
        while not checkpoints.find_states(disk / "run" / "checkpoints"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(b"x" * 10**7)
        _, error = process.communicate(timeout=200)
        assert process.returncode == 2, error
        assert "--resume goes on from" in error.splitlines()[-1]
        assert "Traceback" not in error
        assert len(checkpoints.find_states(disk / "run" / "checkpoints")) == 1
        (disk / "filler").unlink()
        finish(start([*flags(text, disk / "run", num_steps=60, save_interval=100), "--resume"]))
        assert [step for step, *_ in losses(disk / "run")] == list(range(1, 61))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_with_files_of_others_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert main(flags(text, tmp_path, num_steps=3)) == 2
    assert "holds README.md: begin anew by --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_short_run_can_be_resumed_too(text, tmp_path):
    """Ten checkpoints in a run of fewer steps than are usual between two."""
    options = {name: value for name, value in TINY.items() if name != "save_interval"}
    command = {"data": text, "output_dir": tmp_path, **options, "keep_checkpoints": 100}
    assert (
        main(
            [
                "train",
                *(str(word) for name, value in command.items() for word in (f"--{name}", value)),
            ]
        )
        == 0
    )
    steps = [int(path.name[5:]) for path in checkpoints.find_states(tmp_path / "checkpoints")]
    assert steps == list(range(4, 41, 4))


def test_a_copy_of_a_checkpoint_is_left_alone(text, tmp_path):
    assert main(flags(text, tmp_path, num_steps=4)) == 0
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_4", folder / "step_4_good")
    (folder / ".writing-abc").mkdir()
    assert main([*flags(text, tmp_path, num_steps=3), "--overwrite"]) == 0
    assert {path.name for path in folder.iterdir()} == {"best.pt", "step_3", "step_4_good"}


def test_the_clock_of_the_main_process_sets_the_learning_rate_of_all(text, tmp_path):
    """Else weights of two processes drift apart under a time limit."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    finish(
        start(flags(text, tmp_path, num_steps=3000, max_minutes=0.05, save_interval=5), *launcher)
    )
    info = json.loads((tmp_path / "training_info.json").read_text())
    assert info["out_of_time"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-2]["learning_rate"] < 0.005


def test_a_run_is_not_overwritten_or_gone_on_with_by_mistake(text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*flags(text, folder), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(flags(text, folder)) == 0
    assert main(flags(text, folder)) == 2
    assert "go on with it by --resume, begin anew by --overwrite" in capsys.readouterr().err
    assert main([*flags(text, folder, num_slots=8), "--resume"]) == 2
    assert "had num_slots 4, this one has 8" in capsys.readouterr().err
    assert main([*flags(text, folder), "--overwrite"]) == 0
