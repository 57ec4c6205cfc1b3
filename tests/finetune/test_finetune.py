"""hamt finetune: a classifier and a chat model from a checkpoint, on rows that can be learnt."""

import json

import numpy as np
import pytest
import torch
from command_inputs import fails, read_json
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hamt import HAMTConfig, HAMTForCausalLM, HAMTForSequenceClassification
from hamt.checkpoint import load_checkpoint
from hamt.cli import main
from hamt.conversation import Conversation
from hamt.finetune.chat import TEMPLATE
from hamt.finetune.classify import Scores, baselines, classifier, encode, scores
from hamt.finetune.rows import Labelled
from hamt.generation import Sampling
from hamt.output import claim


@pytest.fixture
def rows(tmp_path):
    """The label is a word of the text, which has one of several lengths."""
    words = [("red", "warm"), ("blue", "cold")]
    lines = []
    for i in range(60):
        word, label = words[i % 2]
        lines.append({"text": f"{'the ' * (i % 5)}{word} dog", "label": label})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def run(rows, folder, *more):
    fixed = ["--output_dir", str(folder), "--learning_rate", "0.02", "--batch_size", "4"]
    assert main(["finetune", rows, *fixed, *more]) == 0
    return read_json(folder / "finetune_results.json")


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_a_classifier_learns_and_is_loaded_with_the_names_of_its_labels(
    kind, rows, folders, tmp_path, capsys
):
    found = run(rows, tmp_path / "out", "--checkpoint", str(folders / kind), "--epochs", "4")
    shown = capsys.readouterr().out
    # Each text is there six times, on one side.
    assert "48 rows to train on, 12 held out; 2 labels (cold, warm)" in shown
    assert found["rows"] == {"train": 48, "held_out": 12}
    assert np.sum(found["confusion"]) == 12
    model_scores = found["scores"][kind]
    assert model_scores["accuracy"] == np.trace(found["confusion"]) / 12
    assert model_scores["accuracy"] == 1
    assert found["scores"]["the most frequent label"]["accuracy"] == 0.5
    assert found["scores"]["TF-IDF, logistic regression"]["accuracy"] == 1
    tell = pipeline("text-classification", model=str(tmp_path / "out"))
    told = [each["label"] for each in tell(["the blue dog", "red dog", "the the the blue dog"])]
    assert told == ["cold", "warm", "cold"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_into_an_ordinary_checkpoint(rows, folders, tmp_path):
    options = ("--checkpoint", str(folders / "ours"), "--lora_rank", "4", "--skip_baselines")
    found = run(rows, tmp_path / "out", *options, "--epochs", "4")
    assert list(found["scores"]) == ["ours"]
    assert found["scores"]["ours"]["accuracy"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model) is HAMTForSequenceClassification
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    before = HAMTForCausalLM.from_pretrained(folders / "ours")
    after, given = (m.model.layers[0].mixer.item_proj.weight for m in (model, before))
    assert not torch.equal(after, given)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_the_classifier_begins_as_the_language_model_and_leaves_it_as_it_was(tokenizer):
    torch.manual_seed(0)
    model = HAMTForCausalLM(HAMTConfig(vocab_size=300, hidden_dim=32, num_layers=2))
    made = classifier(model, tokenizer, ["a", "b", "c"])
    assert made.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert made.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.num_labels == 2
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, made.model.state_dict()[name])
    with torch.no_grad():
        made.model.embed_tokens.weight.zero_()
    assert model.model.embed_tokens.weight.any()
    ids = encode(tokenizer, ["the dog", "the " * 50], 9)
    assert [row["input_ids"][0] for row in ids] == [tokenizer.eos_token_id] * 2
    assert [len(row["input_ids"]) for row in ids] == [1 + len(tokenizer("the dog").input_ids), 9]


def test_scores_are_those_of_their_formulas():
    found = scores([0, 0, 1, 1], [0, 1, 1, 1])
    assert found == Scores(0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5), pytest.approx(11 / 15))
    rows = Labelled(["a", "b", "b"], [0, 1, 1], ["a", "b"], [0, 1], ["x", "y"])
    assert baselines(rows)["the most frequent label"].accuracy == 0.5


@pytest.fixture
def talk(tmp_path):
    lines = []
    for i in range(30):
        colour = ("red", "blue")[i % 2]
        messages = [("user", f"say {colour}"), ("assistant", f"{colour} dog")] * (1 + i % 2)
        # The name keeps one conversation from being another one's copy.
        told = [{"role": role, "content": text, "name": f"n{i}"} for role, text in messages]
        lines.append(json.dumps({"messages": told}))
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


# Of TRL, which Transformers 5.23 has overtaken.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapters", [(), ("--lora_rank", "8")])
def test_a_model_learns_to_answer_and_its_answers_end(adapters, talk, folders, tmp_path):
    pytest.importorskip("trl")
    options = ("--checkpoint", str(folders / "ours"), "--epochs", "6", *adapters)
    found = run(talk, tmp_path / "out", *options)
    assert found["rows"] == {"train": 27, "held_out": 3}
    assert found["losses"]["after"] < found["losses"]["before"] * (0.95 if adapters else 0.25)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == TEMPLATE
    if not adapters:
        chat = Conversation(*load_checkpoint(tmp_path / "out"))
        greedy = Sampling(temperature=0, max_new_tokens=20)
        assert chat.ask("say red", greedy) == "red dog"
        assert chat.ask("say blue", greedy) == "blue dog"


@pytest.mark.parametrize(
    "messages",
    [
        *([], ["hello"], [{"role": "user"}], None, [{"role": "user", "content": None}]),
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ],
)
def test_rows_that_are_no_conversations_are_refused(messages, folders, tmp_path, capsys):
    pytest.importorskip("trl")
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join([json.dumps({"messages": messages})] * 20), encoding="utf-8")
    arguments = ["finetune", str(path), "--checkpoint", str(folders / "ours")]
    arguments += ["--output_dir", str(tmp_path / "out")]
    assert "holds no conversation: 'messages' is a list of" in fails(arguments, capsys, False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("lines", "message"), [
    ([[("user", "hi"), ("assistant", "ho")]] * 9, "has one conversation alone: give --held_out"),
    ([[("user", f"hi {i}")] for i in range(9)], "row 1 (train) has no answer of the assistant"),
])  # fmt: skip
def test_conversations_that_cannot_be_learnt_are_refused(lines, message, folders, tmp_path, capsys):
    pytest.importorskip("trl")
    rows = [[{"role": a, "content": b} for a, b in line] for line in lines]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    given = ["finetune", str(path), "--checkpoint", str(folders / "ours")]
    told = fails([*given, "--output_dir", str(tmp_path / "out")], capsys, False)
    assert message in told


def test_a_fine_tuning_is_replaced_only_if_asked_for(rows, folders, tmp_path, capsys):
    """And nothing of the one before stays."""
    options = ("--checkpoint", str(folders / "ours"), "--epochs", "0.1", "--skip_baselines")
    run(rows, tmp_path / "out", *options)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = ["finetune", rows, "--output_dir", str(tmp_path / "out"), *options]
    assert "replace it by --overwrite" in fails(again, capsys, False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with claim(tmp_path / "out", "finetune", [r"chat_template\.jinja"]) as output:
        output.write_text("chat_template.jinja", "of a conversation")
    assert main([*again, "--overwrite", "--learning_rate", "0.1"]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_texts_without_a_word_cost_no_model(folders, tmp_path, capsys):
    lines = [json.dumps({"text": " " * (i + 1), "label": i % 2}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run(str(tmp_path / "rows.jsonl"), tmp_path / "out", "--checkpoint", str(folders / "ours"))
    assert "no baselines: " in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
