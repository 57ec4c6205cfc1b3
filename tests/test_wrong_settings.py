"""Files of a checkpoint that are whole, and ask for what cannot be."""

import json

import pytest
from command_inputs import read_json
from model_inputs import tiny_model

from hamt.checkpoint import save_checkpoint
from hamt.cli import main


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    save_checkpoint(tmp_path / "model", tiny_model(vocab_size=len(tokenizer)), tokenizer)
    return tmp_path / "model"


def change(file, how):
    content = read_json(file)
    how(content)
    file.write_text(json.dumps(content), encoding="utf-8")


WRONG_SETTINGS = {
    "output_hidden_states": [float("inf"), "x"],
    "min_new_tokens": ["x", 1e308],
    "min_p": [[], -1],
    "no_repeat_ngram_size": ["x", True],
    "forced_eos_token_id": [{}, "x"],
    "exponential_decay_length_penalty": [[], -1],
    "sequence_bias": [[[]]],
    "guidance_scale": ["x"],
    "stop_strings": ["x"],
    "prompt_lookup_num_tokens": [3],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG_SETTINGS.items() for value in values],
)
def test_settings_of_generation_that_do_not_work_are_named(checkpoint, capsys, name, value):
    change(checkpoint / "generation_config.json", lambda content: content.update({name: value}))
    told = ["--checkpoint", str(checkpoint), "--max_new_tokens", "3", "--seed", "0"]
    assert main(["generate", "Hello", *told]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hamt: ")]
    assert f"generation_config.json asks, with {name} (" in line


def test_a_tokenizer_with_a_token_of_a_number_that_no_table_could_have(
    checkpoint, capsys, tmp_path
):
    def renumber(content):
        vocabulary = content["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 2**31

    change(checkpoint / "tokenizer.json", renumber)
    told = ["--tokenizer", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--data", "sotu", *told]) == 2
    assert "has the number 2,147,483,648" in capsys.readouterr().err
