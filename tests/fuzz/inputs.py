"""What the cases work on: texts, recipes, and what tiny runs leave behind."""

import json
import shutil

from fuzz.sandbox import Case, Sandbox

DOCUMENT = "The sum of 3 and 4 is 7"
TINY = {"hidden_dim": 16, "num_layers": 1, "vocab_size": 300, "max_length": 16, "batch_size": 2}
RUN_OPTIONS = {
    **TINY,
    "data": "my_text.txt",
    "num_steps": 2,
    "output_dir": "run",
    "save_interval": 1,
    "keep_checkpoints": 1,
    "token_cache": "tokens",
}
LINES = [f"The sum of {i} and {i + 1} is {2 * i + 1}, and {i * i} is a square." for i in range(400)]
ABLATION = """tasks:
  recall:
    kind: recall
    config: {hidden_dim: 16, num_layers: 1, num_slots: 4, intermediate_dim: 0}
    task: {length: 16, vocab_size: 32, num_kv_pairs: 2}
    training: {batch_size: 4, num_steps: 2, learning_rate: 0.01, eval_interval: 1}
variants:
  base: {}
  delta: {write_rule: delta}
"""


def flags(options: dict) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def prepare(sandbox: Sandbox) -> None:
    """Fill the template with texts, then let tiny runs add a model and their records.

    Raises:
        RuntimeError: if one of those runs fails.
    """
    work = sandbox.template
    (work / "my_text.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    (work / "notes [draft].txt").write_text("\n\n".join(LINES[:200]), encoding="utf-8")
    rows = [json.dumps({"text": line, "number": i}) for i, line in enumerate(LINES)]
    (work / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    table = ["text,number", *(f'"{line}",{i}' for i, line in enumerate(LINES))]
    labels = "text,label\n" + "one,a\ntwo,b\n" * 4
    (work / "labels.csv").write_text(labels, encoding="utf-8")
    (work / "table.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    (work / "docs").mkdir()
    for number in range(4):
        page = "\n".join(LINES[number * 50 : number * 50 + 50])
        (work / "docs" / f"{'abcd'[number]}.md").write_text(page, encoding="utf-8")
    recipe = {name: value for name, value in RUN_OPTIONS.items() if name != "output_dir"}
    lines = "".join(f"{name}: {value}\n" for name, value in recipe.items())
    (work / "recipe.yaml").write_text(lines, encoding="utf-8")
    (work / "ablation.yaml").write_text(ABLATION, encoding="utf-8")
    _check(sandbox, _train)
    _check(sandbox, _recall)
    _check(sandbox, _transformer)
    shutil.copytree(work / "run", work / "model")
    for name in ("checkpoints", "log.jsonl", "loss_curve.png", "README.md", "training_info.json"):
        path = work / "model" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _transformer() -> int:
    """A transformer of Transformers with the tokenizer of the model, for ``hamt convert``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("run")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("transformer")
    tokenizer.save_pretrained("transformer")
    return 0


def _check(sandbox: Sandbox, run) -> None:
    """Run in a fork, whose folder becomes the template."""
    template = sandbox.template

    def kept() -> int:
        code = run()
        shutil.copytree(".", template, dirs_exist_ok=True)
        return code

    everything = [".", str(template)]
    case = Case("what the cases work on", kept, may_write=everything, may_replace=True, limit=180)
    for outcome in sandbox.run_all(iter([case]), until=float("inf"), workers=1):
        if outcome.kind != "ran":
            raise RuntimeError(f"{outcome.kind}: {outcome.said}")


def _train() -> int:
    import torch

    from hamt.checkpoint import load_checkpoint, save_pt
    from hamt.cli import main
    from hamt.conversation import Conversation
    from hamt.generation import Sampling

    code = main(["train", *flags(RUN_OPTIONS)])
    model, tokenizer = load_checkpoint("run")
    save_pt("model.pt", model, tokenizer)
    ids = torch.tensor([tokenizer(DOCUMENT).input_ids])
    model(ids, use_cache=True).past_key_values.save("state.safetensors")
    talk = Conversation(model, tokenizer)
    talk.ask(DOCUMENT, Sampling(max_new_tokens=3))
    talk.save("talk.state")
    return code


def _recall() -> int:
    from fuzz.commands import BASE

    from hamt.cli import main

    code = main(["recall", *flags(BASE["recall"])])
    return code or main(["ablate", *flags(BASE["ablate"])])
