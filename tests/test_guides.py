"""The guides: every command in them runs, made small, and their figures have sources."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from command_inputs import TEXT, typed
from test_docs import PAGES, ROOT, blocks, run, shell_lines

from hamt.checkpoint import load_checkpoint, save_pt
from hamt.cli import COMMANDS, main
from hamt.training.quick_train import folder_of

pytestmark = pytest.mark.slow

GUIDES = [page for page in PAGES if page.startswith("docs/guides/")]
CLAIMS = "docs/guides/CLAIMS.md"

# What the first documents tell their reader to run; each stands in a guide as it stood there.
DOCUMENTED = """
source venv/bin/activate
python -c "from hamt import HAMTModel; print('✅ HAMT installed correctly')"
python experiments/demo.py
pytest tests/ -v
python experiments/quick_train.py --num_steps 500 --batch_size 8 --log_interval 50
python experiments/quick_train.py --binding_type elementwise --num_steps 500
python experiments/quick_train.py --binding_type circular_conv --num_steps 500
python experiments/quick_train.py --num_slots 16 --num_steps 300
python experiments/quick_train.py --hcm_dim 512 --num_steps 300
python experiments/quick_train.py --hcm_dim 2048 --num_steps 300
python experiments/quick_train.py --hcm_dim 4096 --num_steps 300
python experiments/quick_train.py
python experiments/train.py --hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 8 --batch_size 16 --num_epochs 20 --output_dir ./checkpoints/wikitext
python experiments/train.py --hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 8 --batch_size 16 --num_epochs 10
python experiments/train.py --max_length 1024 --num_epochs 5
python experiments/train.py --num_epochs 20
python experiments/evaluate.py --checkpoint checkpoints/quick_train/hamt_quick_500steps.pt --test_text "Your test text here" --max_new_tokens 30 --temperature 0.8
python experiments/evaluate.py --checkpoint your_checkpoint.pt --prompts "First prompt|Second prompt|Third prompt" --max_new_tokens 50 --temperature 1.0
jupyter notebook notebooks/hamt_exploration.ipynb
python train_your_llm.py --size small --epochs 5
python demo_hierarchical.py
python experiments/benchmark.py
python experiments/advanced_analysis.py
python experiments/ablation_study.py
python src/hamt/visualization.py
python train_gpu.py --hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset wikitext-103 --batch_size 128 --num_epochs 10 --mixed_precision bf16 --compile_model --use_wandb --output_dir outputs/hamt_100m
python train_gpu.py --hidden_dim 512 --hcm_dim 2048 --num_layers 8 --num_slots 16 --dataset wikitext-103 --max_seq_length 1024 --batch_size 128 --num_epochs 10 --learning_rate 3e-4 --mixed_precision bf16 --compile_model --use_wandb --output_dir outputs/hamt_100m --run_name hamt-100m-competitive
python compare_baselines.py --hamt_checkpoint outputs/hamt_100m/checkpoints/best.pt --baselines distilgpt2 gpt2 --device cuda
pip install torch transformers datasets wandb
nvidia-smi
"""  # noqa: E501

DATA = "--data my_text.txt"
SMALL = "--tokenizer none --vocab_size 300 --hidden_dim 32 --hcm_dim 64 "
SMALL += "--num_layers 1 --num_slots 2 --max_length 32 --num_steps 2"
# Options that make a command small, after those that it was given.
REDUCED = {
    "quick-train": SMALL,
    "train": f"{SMALL} --batch_size 128 --compile_model false --num_workers 0 --token_cache tokens",
    "generate": "--max_new_tokens 4",
    "evaluate": "--max_new_tokens 4",
    "analyze": "--max_tokens 40 --skip_silencing",
    "ablate": "--recipe tiny.yaml --workers 1",
    "compare": f"--device cpu {DATA} --max_documents 1 --max_characters 400 "
    "--context 16 --contexts 16 --batch_sizes 1 --decode_tokens 1 --rounds 1",
    "bench": "--parts model --hidden_dim 64 --num_layers 1 --vocab_size 64 --lengths 16 "
    "--train_lengths 16 --step_tokens 16 --matmul_size 64 --rounds 1 --warmup 0",
}
RECIPE = """
tasks:
  recall:
    kind: recall
    config: {hidden_dim: 32, num_layers: 1, num_slots: 2, num_heads: 2}
    task: {length: 12, vocab_size: 12, num_kv_pairs: 2}
    training: {batch_size: 2, num_steps: 2, learning_rate: 0.01, eval_interval: 1}
variants:
  base: {}
"""
# Files that a command leaves, by words of it.
WRITTEN = {
    "--log_interval 50": "checkpoints/quick_train/training_info.json",
    "--num_slots 4 --num": "checkpoints/quick_train-num_steps_300-num_slots_4/config.json",
    "./checkpoints/wikitext": "checkpoints/wikitext/checkpoints/best.pt",
    "hamt_quick_500steps.pt": "analysis_output/memory_analysis.png",
    "First prompt": "analysis_output/generation_results.json",
    "--run_name hamt-100m-competitive": "outputs/hamt_100m/checkpoints/best.pt",
    "--baselines distilgpt2 gpt2": "compare_output/compare.json",
    "checkpoints/mine": "checkpoints/mine-inside/dashboard.html",
    "train_your_llm.py --size": "checkpoints/train/model.safetensors",
}
# Words that stand for something else here.
PLACES = {"500steps": "2steps", "/content/drive/MyDrive": "drive"}
# What changes the machine, needs a GPU, or is run by another test.
LEFT_OUT = {"source", "pip", "nvidia-smi", "jupyter", "make"}
LEFT_OUT_SCRIPTS = {"studies/gpu_check.py"}  # in tests/gpu


def documented(line):
    return shlex.split(line, comments=True)


def test_the_commands_of_the_first_documents_are_in_the_guides():
    found = [documented(line) for page in GUIDES for line in shell_lines(page)]
    for line in DOCUMENTED.strip().splitlines():
        assert documented(line) in found, line


@pytest.fixture
def clone(tmp_path, monkeypatch, folders, tokenizer):
    """A folder with what the commands need, where they run small and write what they like."""
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("configs", "experiments", "notebooks", "src"):
            (tmp_path / path.name).symlink_to(path)
    for name in ("my_text.txt", "wiki.train.tokens", "wiki.valid.tokens"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    for name in ("gpt2", "distilgpt2"):
        (tmp_path / name).symlink_to(folders / "gpt2-0.1")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    save_pt(tmp_path / "your_checkpoint.pt", load_checkpoint(folders / "ours")[0], tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    typed(monkeypatch, "")
    for command, (module, _) in COMMANDS.items():
        module = importlib.import_module(module)

        def parse(options, arguments, name, original=module.parse, command=command, **others):
            more = REDUCED.get(command, "").split()
            if command == "quick-train":  # the folder that the command as it stands writes to
                more += ["--output_dir", folder_of(original(options, arguments, name, **others))]
            if command in ("train", "quick-train"):
                more += ["--overwrite"] if "--resume" not in arguments else []
                more += DATA.split() if DATA.split()[1] not in arguments else []
            return original(options, [*arguments, *more], name, **others)

        monkeypatch.setattr(module, "parse", parse)
    return tmp_path


def execute(line, monkeypatch):
    """Run one line of a shell; returns its exit code."""
    for word, here in PLACES.items():
        line = line.replace(word, here)
    program, *arguments = shlex.split(line, comments=True) or ["source"]
    if program == "hamt":
        return main(arguments)
    if program == "pytest":  # one test of all that it names
        words = [*arguments[1:], "tests/test_hamt.py", "-k", "test_1", "-p", "no:cacheprovider"]
        return subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT).returncode
    if program == "python" and arguments[0] == "-c":
        if "torch.cuda.get" not in line or torch.cuda.is_available():
            exec(arguments[1], {})
    elif program == "python" and arguments[0] not in LEFT_OUT_SCRIPTS:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(arguments[0], run_name="__main__")
        return stop.value.code
    else:
        assert program in LEFT_OUT | {"python"}, line
    return 0


# Of a plot of one point, and of Weights & Biases.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in GUIDES if shell_lines(page)])
def test_every_command_of_a_guide_runs(page, clone, monkeypatch, capfd):
    for line in shell_lines(page):
        assert not execute(line, monkeypatch), (line, capfd.readouterr().err)
        for words, path in WRITTEN.items():
            assert words not in line or (clone / path).is_file(), (line, path)


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "text")])
def test_what_a_guide_prints_is_what_stands_beside_it(page):
    for block in blocks(page, "text"):
        assert block in run(page)[1]


# In CLAIMS.md, and not of the pages beside them: published figures, a difference of two that stand
# there, what --dry_run said, an arXiv number.
OTHER_FIGURES = {"29.94", "18.6", "0.10", "4.3", "2302.10866"}


def figures_without_a_source(page):
    """Numbers with a decimal point, in the last cell of a row, that no page linked there has."""
    for row in (line for line in PAGES[page].splitlines() if line.startswith("| ")):
        measured = row.split(" | ")[-1]
        links = re.findall(r"\]\(([^)#]+\.md)", measured)
        linked = "".join((ROOT / page).parent.joinpath(link).read_text("utf-8") for link in links)
        for number in re.findall(r"(?<![\w.^])\d[\d,]*\.\d+", re.sub(r"\]\([^)]*", "", measured)):
            if links and number not in OTHER_FIGURES and number not in linked:
                yield number, row


def test_figures_beside_claims_are_those_of_the_tables_that_they_link_to():
    assert list(figures_without_a_source(CLAIMS)) == []
