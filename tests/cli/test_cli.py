"""The command: its names and flags, its output files, its manners."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_inputs import fails, read_json, words
from transformers import AutoModelForCausalLM, AutoTokenizer

from hamt import HAMTConfig
from hamt.chat import ChatOptions
from hamt.checkpoint import load_checkpoint
from hamt.cli import COMMANDS, main
from hamt.errors import UserError, user_errors
from hamt.files import write_file
from hamt.generation import GenerateOptions
from hamt.measure.compare.command import CompareOptions
from hamt.measure.evaluate.command import EvaluateOptions
from hamt.reading import ReadOptions
from hamt.training.demo import DemoOptions
from hamt.training.quick_train import QuickTrainOptions

ROOT = Path(__file__).parents[2]
TINY = words(hidden_dim=32, num_layers=2, vocab_size=300, max_length=32)


@pytest.fixture(scope="module")
def checkpoint(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    options = {"data": text, "num_steps": 60, "log_interval": 20, "output_dir": folder}
    assert main(["quick-train", *TINY, *words(**options)]) == 0
    return folder


def test_names_and_flags_are_pinned():
    assert list(COMMANDS) == [
        "demo", "quick-train", "train", "generate", "read", "chat", "serve", "finetune", "convert",
        "evaluate", "compare", "bench", "recall", "ablate", "analyze", "export", "explore",
        "completion",
    ]  # fmt: skip
    assert list(DemoOptions.__dataclass_fields__) == [
        "output_dir", "data", "num_steps", "max_minutes", "prompt", "seed", "hierarchical"
    ]  # fmt: skip
    assert list(GenerateOptions.__dataclass_fields__) == [
        "checkpoint", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
        "seed", "prompt", "state",
    ]  # fmt: skip
    assert list(ReadOptions.__dataclass_fields__) == [
        "file", "save", "checkpoint", "state", "precision"
    ]  # fmt: skip
    assert list(ChatOptions.__dataclass_fields__)[7:] == ["state", "save", "precision"]
    for options, documented in (
        (QuickTrainOptions, "num_steps batch_size log_interval binding_type num_slots hcm_dim"),
        (QuickTrainOptions, "output_dir"),
        (EvaluateOptions, "checkpoint test_text prompts max_new_tokens temperature"),
        (CompareOptions, "hamt_checkpoint baselines device"),
    ):
        assert set(documented.split()) <= set(options.__dataclass_fields__)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: hamt {command}" in shown
    assert shown.count("(default: ") >= (1 if command == "completion" else 3)


def test_help_without_a_command_lists_them(capsys):
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out.count("quick-train") == 2


def test_help_is_a_command_too(capsys):
    assert main(["help"]) == 0
    assert "usage: hamt COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["help", "generate"])
    assert stop.value.code == 0
    assert "usage: hamt generate [prompt] [--options]" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["hamt", "hamt.cli"])
def test_the_package_runs_as_a_module_and_its_help_needs_no_torch(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "usage: hamt COMMAND" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "transformers"} & loaded


def test_the_command_needs_nothing_of_what_only_makes_a_cpu_faster(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hamt.cpu.process", None)  # as if there was no such file
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hamt ")


def test_quick_train_writes_what_the_documents_say(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    models = {"hamt_quick_60steps.pt", "config.json", "model.safetensors"}
    assert models | {"training_info.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert [name for name in names if name.startswith(".")] == [".hamt"]
    info = read_json(checkpoint / "training_info.json")
    losses = [loss for _, (loss, _) in info["held_out"]]
    assert losses[-1] < losses[0] - 1
    assert info["finished"]
    assert info["held_out_loss"]["nats_per_token"] < info["unigram_loss"]


def test_a_checkpoint_loads_with_the_auto_classes_alone(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Line 5: the sum", return_tensors="pt").input_ids
    expected, same_tokenizer = load_checkpoint(checkpoint)
    assert same_tokenizer("Line 5").input_ids == tokenizer("Line 5").input_ids
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_the_lone_pt_file_holds_the_same_model(checkpoint):
    lone, lone_tokenizer = load_checkpoint(checkpoint / "hamt_quick_60steps.pt")
    folder, tokenizer = load_checkpoint(checkpoint)
    ids = torch.tensor([tokenizer("Line 7: the").input_ids])
    assert lone_tokenizer("Line 7: the").input_ids == ids[0].tolist()
    assert lone_tokenizer.pad_token_id == tokenizer.pad_token_id
    assert torch.equal(lone(ids).logits, folder(ids).logits)


def test_generate_streams_the_prompt_and_its_continuation(checkpoint, capsys):
    arguments = ["generate", "Line 12:", "--checkpoint", str(checkpoint), "--max_new_tokens", "12"]
    assert main([*arguments, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Line 12:")
    assert len(first) > len("Line 12:") + 5
    main([*arguments, "--seed", "1"])
    assert capsys.readouterr().out == first
    main([*arguments, "--temperature", "0"])
    greedy = capsys.readouterr().out
    main([*arguments, "--temperature", "0", "--seed", "9"])
    assert capsys.readouterr().out == greedy


def test_generate_without_a_prompt_starts_a_document(checkpoint, capsys):
    assert main(["generate", "--checkpoint", str(checkpoint), "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_demo_trains_compares_and_writes(text, tmp_path, capsys):
    arguments = ["demo", "--data", text, "--num_steps", "6", "--output_dir", str(tmp_path / "demo")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    losses = ("held-out loss", "unigram", "bigram", "HAMT", "bits/byte")
    for word in (*losses, "Fellow citizens", "tokens/s"):
        assert word in out
    load_checkpoint(tmp_path / "demo")


@pytest.mark.parametrize(("arguments", "message"), [
    (["no-such-command"], "there are demo, quick-train, train, generate"),
    (["quick-train", "--num_stps", "5"], "did you mean --num_steps?"),
    (["quick-train", "--num_steps", "many"], "invalid int value"),
    (["quick-train", "--num_steps", "0"], "--num_steps must be at least 1"),
    (["quick-train", "--data", "/no/such/file"], "no text /no/such/file"),
    (["quick-train", "--hcm_dim", "100"], "try 96 or 104"),
    (["quick-train", "--binding_type", "xor"], "elementwise, circular_conv, phasor"),
    (["quick-train", "--vocab_size", "10"], "at least 258"),
    (["quick-train", "--output_dir", "/proc/no/such"], "choose another --output_dir"),
    (["quick-train", "--output_dir", ""], "--output_dir must name a path; got an empty one"),
    (["ablate", "--table", ""], "--table must name a path; got an empty one"),
    (["train", "--token_cache="], "--token_cache must name a path; got an empty one"),
    (["generate", "hello", "--checkpoint", "/no/folder"], "no checkpoint at /no/folder"),
    (["generate", "hello", "--top_p", "2"], "--top_p must lie in"),
    (["generate", "hello", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
    (["generate", "hello", "--seed", "-1"], "--seed must lie in [0, 4294967295]; got -1"),
    (["demo", "--max_minutes", "0"], "--max_minutes must be positive; got 0.0"),
    (["help", "no-such-command"], "there are demo, quick-train, train, generate"),
])  # fmt: skip
def test_mistakes_end_in_one_line_that_says_what_to_do(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(arguments, capsys)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_waiting_threads_spin_a_little_unless_the_user_says_otherwise(given):
    code = "import sys; sys.argv = ['-m', 'hamt.cli']; sys.orig_argv = ['python', *sys.argv]\n"
    code += "from hamt.cli import main; assert 'torch' not in sys.modules; main(['--help'])\n"
    code += "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command, env = [sys.executable, "-c", code], {**kept, **given}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    expected = {"": "PASSIVE 10000", "OMP_WAIT_POLICY": "ACTIVE None"}
    expected["GOMP_SPINCOUNT"] = "PASSIVE 7"
    assert done.stdout.splitlines()[-1] == expected["".join(given)]


def test_only_refused_values_are_mistakes_of_the_user():
    with pytest.raises(UserError, match=r"^the reason$"), user_errors():
        raise ValueError("in a field:\n   the reason\n")
    with pytest.raises(UserError, match=r"^ValueError$"), user_errors():
        raise ValueError
    with pytest.raises(UserError, match="hidden_dim"), user_errors():
        HAMTConfig(hidden_dim="wide")
    with pytest.raises(AttributeError), user_errors():
        raise AttributeError("a mistake of ours")


def test_what_the_disk_refuses_ends_in_one_line_and_mistakes_of_ours_keep_their_trace(
    capsys, monkeypatch
):
    def fail(error):
        monkeypatch.setattr("hamt.training.demo.main", lambda _: (_ for _ in ()).throw(error))

    fail(PermissionError(errno.EACCES, "Permission denied", "out/compare.md"))
    assert "out/compare.md cannot be written" in fails(["demo"], capsys)
    fail(OSError(errno.EROFS, "Read-only file system"))
    assert "Read-only file system" in fails(["demo"], capsys)
    missing = FileNotFoundError(errno.ENOENT, "No such file", "x")
    for error in (missing, OSError("of a library"), KeyError()):
        fail(error)
        with pytest.raises(type(error)):
            main(["demo"])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=str(tmp_path / "out")):
        write_file(tmp_path / "out" / "a.txt", full)


def test_an_empty_text_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    options = words(data=tmp_path / "empty.txt", output_dir=tmp_path / "out")
    assert "is empty" in fails(["quick-train", *options], capsys)


def test_checkpoints_of_other_models_and_broken_ones_are_refused(checkpoint, tmp_path, capsys):
    def refusal(path):
        return fails(["generate", "x", "--checkpoint", str(path)], capsys)

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2' model" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not a model configuration" in refusal(tmp_path)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert "not a whole checkpoint" in refusal(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"not a checkpoint")
    assert "not a HAMT checkpoint" in refusal(tmp_path / "model.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    assert "not a HAMT checkpoint" in refusal(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "command",
    [
        *(["analyze"], ["chat"], ["compare"], ["evaluate"], ["explore"], ["export"], ["serve"]),
        *(["generate", "x"], ["read", "x.txt", "--save", "x.state"], ["finetune", "x.csv"]),
    ],
    ids=lambda command: command[0],
)
def test_an_empty_checkpoint_is_not_the_model_in_hamt(command, capsys, tmp_path, monkeypatch):
    """As of a shell variable that is not set."""
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("Once upon a time.")
    rows = "".join(f"one {i},a\ntwo {i},b\n" for i in range(20))
    Path("x.csv").write_text("text,label\n" + rows)
    line = fails([*command, "--checkpoint", ""], capsys, silent=False)
    assert "no checkpoint at" in line or "no model ''" in line


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_checkpoint(text, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "quick_train.py"), *TINY, "--data", text]
    process = subprocess.Popen(
        [*command, "--num_steps", "100000", "--output_dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if "held-out loss" in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped after" in out
    model, tokenizer = load_checkpoint(tmp_path)
    info = read_json(tmp_path / "training_info.json")
    assert info["interrupted"]
    assert not info["finished"]
    assert info["steps"] > 0
    assert model(torch.tensor([tokenizer("Line 3").input_ids])).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "command"), [
    ("experiments/demo.py", "demo"),
    ("experiments/advanced_analysis.py", "analyze"),
    ("src/hamt/visualization.py", "analyze"),
])  # fmt: skip
def test_scripts_of_the_documents_are_commands(script, command):
    arguments = [sys.executable, str(ROOT / script), "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert f"usage: hamt {command}" in result.stdout
