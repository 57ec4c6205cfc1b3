# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train HAMT on a GPU
#
# This notebook trains a model on Colab or on any machine with a GPU.
# You choose one of the recipes `configs/50M.yaml`, `100M.yaml` and `200M.yaml` (named by the
# parameters they have), train, resume after a disconnect, and download the result.
# The recipes name what they should take on an A100; these are estimates, since they have not been
# run.
#
# Without a GPU, or with `HAMT_TINY=1` in the environment, every cell runs with a tiny model on a
# small text, to show that everything works.

# %% [markdown]
# ## Set up
#
# On Colab: *Runtime → Change runtime type → GPU*, and upload or clone the HAMT repository next to
# this notebook.

# %%
import os
import subprocess
import sys
from pathlib import Path

import torch

TINY = bool(os.environ.get("HAMT_TINY")) or not torch.cuda.is_available()
SIZE = "50M"  # or "100M", "200M"
ROOT = next((p for p in (Path.cwd(), *Path.cwd().parents, Path("hamt")) if (p / "pyproject.toml").exists()), None)
if ROOT is None:
    raise SystemExit("There is no HAMT here: clone or upload its repository as the folder hamt, then run this cell again.")
if "google.colab" in sys.modules:  # elsewhere it is installed already: make setup
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(ROOT)], check=True)
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "| tiny:", TINY)

# %% [markdown]
# On Colab, what is written goes to Drive, so that a disconnect costs no more than the time since
# the last checkpoint.

# %%
OUTPUT = Path(os.environ.get("HAMT_OUTPUT", "outputs")) / ("tiny" if TINY else f"hamt_{SIZE}")
if "google.colab" in sys.modules:
    from google.colab import drive

    drive.mount("/content/drive")
    OUTPUT = Path("/content/drive/MyDrive") / OUTPUT
print("writes to", OUTPUT)


# %%
def hamt(*arguments: str) -> None:
    """Run the ``hamt`` command, its output below the cell."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hamt.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        print(line, end="")
    if process.wait():
        raise RuntimeError(f"hamt {arguments[0]} ended with {process.returncode}")


# %% [markdown]
# ## What it will cost
#
# `--dry_run` measures a few steps, and says how long the whole run will take and how much memory it
# needs.

# %%
if TINY:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    text = OUTPUT.parent / "tiny.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    recipe = ["--data", str(text), "--hidden_dim", "32", "--num_layers", "1", "--num_slots", "4"]
    recipe += ["--max_length", "32", "--batch_size", "4", "--max_steps", "6", "--save_interval", "3"]
else:
    recipe = [str(ROOT / "configs" / f"{SIZE}.yaml")]
recipe += ["--output_dir", str(OUTPUT)]
hamt("train", *recipe, "--dry_run")

# %% [markdown]
# ## Train
#
# You may interrupt the run (■) whenever you like: it finishes its step and writes a checkpoint.

# %%
hamt("train", *recipe)

# %% [markdown]
# ## Resume
#
# The same command with `--resume` goes on from the last checkpoint, on a CPU bit for bit.
# After a finished run it says that nothing is left to do, unless more steps are asked for than
# before.

# %%
more = ["--max_steps", "8"] if TINY else []
hamt("train", *recipe, *more, "--resume")

# %% [markdown]
# ## Try it, and take it home

# %%
hamt("generate", "The state of the Union", "--checkpoint", str(OUTPUT), "--max_new_tokens", "20", "--seed", "0")

# %%
import shutil

archive = shutil.make_archive(str(OUTPUT), "zip", OUTPUT)
print(archive, f"{Path(archive).stat().st_size / 1e6:.1f} MB")
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(archive)
