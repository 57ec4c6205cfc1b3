"""Commands on a converted checkpoint: what works as with HAMT, and what is refused in one line."""

import json

import pytest
import torch
from command_inputs import BOOK, fails, read_json, typed
from converted_inputs import SEVERAL, convert, tiny_transformer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, pipeline

from hamt.checkpoint import load_checkpoint, save_checkpoint, save_pt
from hamt.cli import main
from hamt.converted_model import ConvertedForCausalLM, ConvertedForSequenceClassification
from hamt.errors import UserError

UP = "model.body.layers.0.mlp.up_proj.weight"
SLOTS = "model.body.layers.0.self_attn.window_and_memory.slots."
deprecated = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(scope="module")
def model(tokenizer):
    told = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    transformer = tiny_transformer(
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1, **told
    )
    return convert(transformer, SEVERAL)


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    save_checkpoint(folder / "made", model, tokenizer)
    return folder / "made"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK[:1500], encoding="utf-8")
    return str(tmp_path / "book.txt")


def test_a_checkpoint_holds_all_that_is_needed(checkpoint, model, tokenizer):
    loaded, own = load_checkpoint(checkpoint)
    assert type(loaded) is ConvertedForCausalLM
    assert not loaded.training
    assert own.get_vocab() == tokenizer.get_vocab()
    ids = torch.randint(len(tokenizer), (1, 40))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")


def test_numbers_of_a_file_may_be_narrow(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, model, tokenizer, torch.bfloat16)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.dtype == torch.float32


def test_a_pt_file_cannot_hold_it(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="use save_checkpoint"):
        save_pt(tmp_path / "model.pt", model, tokenizer)
    assert not any(tmp_path.iterdir())


DAMAGES = {
    "NaN": (lambda w: w[UP][3].fill_(torch.nan), f"hold NaN or infinity: {UP}"),
    "missing": (lambda w: w.pop(f"{SLOTS}offset"), f"are missing: {SLOTS}offset"),
    "too many": (lambda w: w.update(other=torch.ones(1)), "belong to another model: other"),
    "other shape": (lambda w: w.update({UP: w[UP][:-1].clone()}), f"have another shape: {UP}"),
    "fewer layers": (
        lambda w: [w.pop(name) for name in [*w] if ".layers.2." in name],
        "its configuration has 3 layers, its weights are those of 2",
    ),
}
CONFIGS = {
    "layers": (lambda c: c["layers"].pop(), "layers must be a list of 3, one for each layer"),
    "slots": (lambda c: c["layers"][0].__setitem__(2, 5), "have another shape"),
    "kind": (lambda c: c["transformer"].update(model_type="gpt2"), "only models of llama"),
    "many": (
        lambda c: c["transformer"].update(model_type="qwen2", num_hidden_layers=10**9),
        "must be at most 10000; got 1000000000",
    ),
    "width": (lambda c: c["transformer"].update(hidden_size=48), "have another shape"),
    "no transformer": (lambda c: c.update(transformer=[1]), "is not a whole checkpoint"),
}


def copied(checkpoint, folder):
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(folder, advice):
    with pytest.raises(UserError) as raised:
        load_checkpoint(folder)
    assert advice in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_that_are_not_its_own_are_refused(kind, checkpoint, tmp_path):
    damage, advice = DAMAGES[kind]
    folder = copied(checkpoint, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, advice)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_is_not_its_own_is_refused(kind, checkpoint, tmp_path):
    damage, advice = CONFIGS[kind]
    folder = copied(checkpoint, tmp_path / "damaged")
    content = read_json(folder / "config.json")
    damage(content)
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, advice)


def test_it_writes_and_goes_on_from_what_it_has_read(checkpoint, text, tmp_path, capsys):
    told = ["--checkpoint", str(checkpoint), "--temperature", "0", "--max_new_tokens", "20"]
    assert main(["generate", BOOK[:1500], *told]) == 0
    whole = capsys.readouterr().out
    state = str(tmp_path / "state")
    for precision in ("float32", "int8"):
        read = ["--save", state, "--checkpoint", str(checkpoint), "--precision", precision]
        assert main(["read", text, *read]) == 0
        assert "wrote" in capsys.readouterr().out
        assert main(["generate", "--state", state, *told]) == 0
        found = capsys.readouterr().out
        assert precision == "int8" or whole.rstrip().endswith(found.rstrip())
    assert "layers, the model" in fails(["generate", "x", "--state", state], capsys)


def test_it_chats(checkpoint, monkeypatch, tmp_path, capsys):
    told = ["--checkpoint", str(checkpoint), "--max_new_tokens", "8", "--seed", "0"]
    state = str(tmp_path / "state")
    typed(monkeypatch, "Hello\n/undo\nHello again\n")
    assert main(["chat", *told, "--save", state]) == 0
    assert "the last turn is taken back" in capsys.readouterr().err
    typed(monkeypatch, "And now?\n")
    assert main(["chat", *told, "--state", state]) == 0
    assert "user: Hello again" in capsys.readouterr().err


def test_it_is_evaluated_with_its_state_carried(checkpoint, text, tmp_path, capsys):
    folder = str(tmp_path / "out")
    fixed = ["--checkpoint", str(checkpoint), "--data", text, "--output_dir", folder]
    assert main(["evaluate", *fixed, "--prompts", "Line"]) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert found["perplexity"][-1]["context"] == "carried"
    assert not (tmp_path / "out" / "memory_analysis.png").exists()
    assert read_json(tmp_path / "out" / "generation_results.json")["samples"]
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ours", "baseline"])
def test_it_stands_beside_others(how, checkpoint, folders, text, tmp_path, capsys):
    models = [str(checkpoint), str(folders / "llama")]
    if how == "baseline":
        models = [str(folders / "ours"), str(checkpoint)]
    fast = ["--contexts", "16", "--batch_sizes", "1", "--rounds", "1", "--decode_tokens", "2"]
    fixed = ["--data", text, "--output_dir", str(tmp_path / "out"), *fast]
    assert main(["compare", "--checkpoint", models[0], "--baselines", models[1], *fixed]) == 0
    found = read_json(tmp_path / "out" / "compare.json")
    assert not found["not_available"]
    name = "HAMT (made)" if how == "ours" else "made"
    assert {"blocks", "carried"} == found["models"][name]["perplexity"].keys()
    decoded = next(row for row in found["speed"] if row["phase"] == "decode")
    assert decoded["cache_bytes"][name] > 0
    capsys.readouterr()


def saved_rows(folder, *rows):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "rows.jsonl")


def finetuned(rows, checkpoint, folder, *more):
    fixed = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--batch_size", "4"]
    assert main(["finetune", rows, *fixed, "--learning_rate", "0.01", *more]) == 0
    return read_json(folder / "finetune_results.json")


@deprecated
@pytest.mark.parametrize("adapted", [[], ["--lora_rank", "2"]], ids=["all", "adapters"])
def test_it_learns_to_tell_labels(adapted, checkpoint, tmp_path, capsys):
    words = ("red", "warm"), ("blue", "cold")
    # Numbers keep a text from being another one's copy.
    rows = [{"text": f"{i} {words[i % 2][0]}", "label": words[i % 2][1]} for i in range(40)]
    rows = saved_rows(tmp_path, *rows)
    found = finetuned(rows, checkpoint, tmp_path / "out", "--epochs", "3", *adapted)
    assert adapted or found["scores"]["made"]["accuracy"] == 1
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(again) is ConvertedForSequenceClassification
    tell = pipeline("text-classification", model=str(tmp_path / "out"))
    assert adapted or [each["label"] for each in tell(["blue", "red"])] == ["cold", "warm"]
    capsys.readouterr()


@deprecated
def test_it_learns_conversations(checkpoint, tmp_path, monkeypatch, capsys):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    # Names keep a conversation from being another one's copy.
    rows = [{"messages": [{**turn, "name": str(i)} for turn in turns]} for i in range(20)]
    rows = saved_rows(tmp_path, *rows)
    found = finetuned(rows, checkpoint, tmp_path / "out", "--epochs", "2")
    assert found["losses"]["after"] < found["losses"]["before"]
    typed(monkeypatch, "hello\n")
    assert main(["chat", "--checkpoint", str(tmp_path / "out"), "--max_new_tokens", "4"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command", ["export", "train"])
def test_what_is_about_layers_of_hamt_is_refused(command, checkpoint, text, tmp_path, capsys):
    told = ["--checkpoint", str(checkpoint)]
    if command == "train":
        told = [text, "--init_from", str(checkpoint), "--token_cache", str(tmp_path / "tokens")]
    told += ["--output_dir", str(tmp_path / "out")]
    line = fails([command, *told], capsys)
    assert f"holds a converted model, and hamt {command}" in line
    assert "is for models of HAMT's own layers: give another checkpoint" in line
