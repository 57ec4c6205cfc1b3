"""hamt evaluate and hamt compare: what they measure, write and refuse."""

import errno
import json
import math
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_cli import TEXT, fails
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hamt import HAMTConfig, HAMTModel
from hamt.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint, save_pt
from hamt.cli import main
from hamt.commands import compare
from hamt.commands.compare import table
from hamt.data.tokenizer import train_tokenizer
from hamt.evaluation.baselines import load_model
from hamt.evaluation.compare import longest_context, prefill_memory, quality, read, speed
from hamt.evaluation.perplexity import score_documents
from hamt.training.rivals import rivals_folder

WORDS = "one two three four five six seven eight nine ten eleven twelve. " * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 300)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A HAMT checkpoint, and a Llama in a Transformers folder."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_dim": 32, "num_layers": 1, "max_position_embeddings": 16}
    save_checkpoint(root / "ours", HAMTModel(HAMTConfig(**config)), tokenizer)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    for name, model in (("llama", llama), ("gpt2-0.1", gpt2)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def run(tmp_path, *options):
    assert main(["evaluate", *options, "--output_dir", str(tmp_path)]) == 0
    return json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))


def test_a_model_is_not_asked_beyond_its_positions(folders, tmp_path, capsys):
    options = ["--checkpoint", str(folders / "gpt2-0.1"), "--test_text", WORDS, "--context", "65"]
    assert main(["evaluate", *options, "--output_dir", str(tmp_path)]) == 2
    assert "gpt2-0.1 has 64 positions: give --context 64 or less" in capsys.readouterr().err


def test_a_text_without_spaces_has_no_perplexity_by_word(tmp_path):
    found = run(tmp_path, "--test_text", "国" * 700, "--context", "64")["perplexity"][0]
    assert found["word_perplexity"] is None
    assert found["bits_per_byte"] > 0


@pytest.mark.parametrize("command", ["evaluate", "compare", "bench", "recall"])
def test_a_folder_that_cannot_be_written_is_seen_first(command, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main([command, "--output_dir", str(tmp_path / "file" / "below")]) == 2
    assert "choose another --output_dir" in capsys.readouterr().err


# -------------------------------------------------------------------- evaluate


def test_a_hamt_model_is_measured_at_several_contexts(folders, tmp_path, capsys):
    found = run(tmp_path, "--checkpoint", str(folders / "ours"), "--test_text", WORDS)
    assert [row["context"] for row in found["perplexity"]] == [16, 128, 1024, "carried"]
    model, tokenizer = load_checkpoint(folders / "ours")
    for row, context in zip(found["perplexity"], (16, 128, 1024, None), strict=True):
        score = score_documents(model, tokenizer, [WORDS], context=context)
        assert row["nats_per_token"] == pytest.approx(score.nats / score.tokens)
        assert row["token_perplexity"] == pytest.approx(math.exp(row["nats_per_token"]))
        assert (row["words"], row["bytes"]) == (score.words, len(WORDS))
        assert row["by_position"]
    assert "all, the state carried" in capsys.readouterr().out
    assert (tmp_path / "evaluation.md").read_text(encoding="utf-8").startswith("# ours")
    assert (tmp_path / "loss_by_position.png").read_bytes()[:4] == b"\x89PNG"
    samples = json.loads((tmp_path / "generation_results.json").read_text(encoding="utf-8"))["samples"]
    assert [sample["prompt"] for sample in samples] == [WORDS], "without --prompts the text is continued"


def test_context_and_stride_can_be_given_and_other_models_measured(folders, tmp_path):
    (tmp_path / "memory_analysis.png").write_bytes(b"of an earlier run")
    options = ["--checkpoint", str(folders / "llama"), "--test_text", WORDS]
    found = run(tmp_path, *options, "--context", "20", "--stride", "5")
    assert [(row["context"], row["stride"]) for row in found["perplexity"]] == [(20, 5)]
    found = run(tmp_path, *options)
    assert [row["context"] for row in found["perplexity"]] == [64]
    assert not (tmp_path / "memory_analysis.png").exists()
    samples = json.loads((tmp_path / "generation_results.json").read_text(encoding="utf-8"))["samples"]
    assert samples[0]["new_tokens"] > 0, "of a text longer than the positions the end is continued"
    found = run(tmp_path, "--checkpoint", str(folders / "ours"), "--test_text", WORDS, "--carry")
    assert [row["context"] for row in found["perplexity"]] == ["carried"]


def test_prompts_are_continued(folders, tmp_path, capsys):
    options = ["--checkpoint", str(folders / "ours"), "--test_text", WORDS, "--carry", "--seed", "3"]
    options += ["--prompts", "one two|three", "--max_new_tokens", "4"]
    run(tmp_path, *options)
    path = tmp_path / "generation_results.json"
    first = json.loads(path.read_text(encoding="utf-8"))["samples"]
    assert [sample["prompt"] for sample in first] == ["one two", "three"]
    assert all(0 < sample["new_tokens"] <= 4 and sample["tokens_per_second"] > 0 for sample in first)
    run(tmp_path, *options)
    again = json.loads(path.read_text(encoding="utf-8"))["samples"]
    assert [one["continuation"] for one in first] == [one["continuation"] for one in again]
    assert first[0]["continuation"] in capsys.readouterr().out


def test_tasks_of_the_harness_run_on_the_model(folders, tmp_path):
    pytest.importorskip("lm_eval")
    pages = " = One = \n \n A page with a few words . \n = Two = \n \n Another 1 @,@ 000 words . \n"
    (tmp_path / "wiki.raw").write_text(pages, encoding="utf-8")
    options = ["--checkpoint", str(folders / "ours"), "--test_text", WORDS, "--carry", "--limit", "3"]
    options += ["--tasks", "hamt_mqar", "hamt_induction", "hamt_passkey", "hamt_wikitext"]
    found = run(tmp_path, *options, "--task_data", str(tmp_path / "wiki.raw"))["tasks"]
    assert set(found) == {"hamt_mqar", "hamt_induction", "hamt_passkey", "hamt_wikitext"}
    assert found["hamt_wikitext"]["word_perplexity"] > 1
    assert found["hamt_mqar"]["documents"] == 3
    assert all(one["shots"] == 0 for one in found.values())
    table = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "a context of 2,048 tokens" in table
    assert "| documents | shots |" in table
    written = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "| hamt_wikitext | bits_per_byte |" in written
    # The same pages by our own count.
    model, tokenizer = load_checkpoint(folders / "ours")
    bits = found["hamt_wikitext"]["bits_per_byte"]
    assert bits == pytest.approx(_harness_bits(model, tokenizer, pages), rel=1e-4)


def _harness_bits(model, tokenizer, pages):
    """Loss of the detokenised pages over the bytes of the raw ones, as the harness has it."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from hamt.data.corpus import join_articles

    raw = list(join_articles(pages.splitlines(keepends=True)))
    clean = [wikitext_detokenizer({"page": page}) for page in raw]
    score = score_documents(model, tokenizer, clean, context=2048)
    return score.nats / sum(len(page.encode()) for page in raw) / math.log(2)


def test_synthetic_tasks_show_what_they_ask_for():
    """The question stands at the end of the text, and the answer earlier in it."""
    pytest.importorskip("lm_eval")
    from hamt.evaluation.lm_eval_tasks import local_tasks

    for make in (local_tasks.mqar, local_tasks.induction):
        for document in make()["test"]:
            *before, key = document["text"].split()
            pairs = list(pairwise(before))
            assert (key, document["answer"].strip()) in pairs
    for document in local_tasks.passkey()["test"]:
        words = document["text"].split()
        start = words.index("passkey") + 1
        said = words[words.index("question") + 1 :]
        assert words[start : start + len(said) + 1] == [*said, document["answer"].strip()]


def test_lambada_is_asked_from_a_local_file(folders, tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"text": "one two three four"}\n{"text": "five six seven"}\n', encoding="utf-8")
    options = [
        "--checkpoint",
        str(folders / "ours"),
        "--test_text",
        WORDS,
        "--carry",
        "--tasks",
        "hamt_lambada",
    ]
    found = run(tmp_path, *options, "--task_data", str(path))["tasks"]["hamt_lambada"]
    assert found["perplexity"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "no model 'nowhere'"),
        (["--checkpoint", "nowhere.gguf"], "give the path of a .gguf file"),
        (["--data", "nowhere.txt"], "no text nowhere.txt"),
        (["--carry", "--context", "8"], "leave --context out"),
        (["--stride", "8"], "--stride needs --context"),
        (["--test_text", "a b", "--context", "8", "--stride", "9"], "between 1 and the context, 8; got 9"),
        (["--test_text", ""], "--test_text is empty"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--context", "8", "--stride", "0"], "--stride must be at least 1"),
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--test_text", "a\udce9"], "must be UTF-8"),
    ],
)
def test_mistakes_end_in_one_line(options, message, tmp_path, capsys):
    assert main(["evaluate", *options, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [(["nothing"], "no task nothing"), (["hamt_lambada"], "give it with --task_data")],
)
def test_tasks_that_cannot_run_are_refused(tasks, message, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    options = ["--test_text", "a b", "--context", "8", "--tasks", *tasks, "--output_dir", str(tmp_path)]
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ["--test_text", "a b", "--context", "8", "--tasks", "wikitext", "--output_dir", str(tmp_path)]
    assert main(["evaluate", *options]) == 2
    assert "pip install" in capsys.readouterr().err


# --------------------------------------------------------------------- compare


def test_any_model_is_loaded_by_name(folders, tokenizer, tmp_path):
    save_pt(tmp_path / "one.pt", load_checkpoint(folders / "ours")[0], tokenizer)
    for name, kind in (
        (folders / "ours", "hamt"),
        (folders / "llama", "llama"),
        (tmp_path / "one.pt", "hamt"),
    ):
        loaded = load_model(str(name))
        assert loaded.model.config.model_type == kind
        assert loaded.name == name.stem
        assert not loaded.model.training
        assert len(loaded.tokenizer) == len(tokenizer)


def test_quality_has_blocks_and_for_hamt_the_carried_state(folders):
    ours, llama = load_model(str(folders / "ours")), load_model(str(folders / "llama"))
    assert set(quality(ours, [WORDS], 32, 2)) == {"blocks", "carried"}
    found = quality(llama, [WORDS], 20, 2)
    assert set(found) == {"blocks"}
    assert found["blocks"]["context"] == 20
    assert longest_context(llama.model) == 64
    assert longest_context(ours.model) is None


@torch.no_grad()
def test_a_cache_goes_on_where_it_was(folders):
    ids = torch.randint(300, (2, 9))
    for name in ("ours", "llama"):
        model = load_model(str(folders / name)).model
        cache = read(model, ids[:, :8])
        parameters = {"past_key_values": cache, "use_cache": True}
        logits = model(ids[:, 8:], **parameters).logits[:, -1]
        assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-4)


def test_speed_leaves_out_what_a_model_cannot_do(folders):
    """Learned positions end, rotary ones do not."""
    names = ("ours", "llama", "gpt2-0.1")
    models = {name: load_model(str(folders / name)).model for name in names}
    rows = list(speed(models, [8, 64, 100], [1, 2], decode_steps=2, rounds=1, max_seconds=60))
    assert [(row["phase"], row["length"], row["batch"]) for row in rows] == [
        (phase, length, batch)
        for length in (8, 64, 100)
        for batch in (1, 2)
        for phase in ("prefill", "decode")
    ]
    for found in rows:
        able = found["length"] == 8 or (found["length"] == 64 and found["phase"] == "prefill")
        assert set(found["seconds"]) == set(names if able else names[:2])
        assert set(found["left_out"]) == set(() if able else names[2:])
    assert rows[1]["cache_bytes"]["ours"] == rows[9]["cache_bytes"]["ours"]


def test_a_context_that_takes_too_long_is_named_and_not_dropped(folders):
    models = {name: load_model(str(folders / name)).model for name in ("ours", "llama")}
    *_, prefill, decode = speed(models, [8, 16], [1], decode_steps=1, rounds=1, max_seconds=1e-9)
    assert prefill["seconds"] == decode["seconds"] == {}
    assert set(prefill["left_out"]) == set(decode["left_out"]) == {"ours", "llama"}


def test_cells_of_the_comparison_by_hand():
    seconds = {"a": {"low": 0.5, "median": 1.0, "high": 2.0}}
    row = {"batch": 3, "length": 100, "seconds": seconds, "left_out": {"b": "why"}}
    figures = {
        "context": 7,
        "tokens": 1234,
        "token_perplexity": None,
        "word_perplexity": 2.0,
        "bits_per_byte": 1.25,
    }
    entry = {"parameters": 5, "vocabulary": 6, "reference_code": True, "perplexity": {"blocks": figures}}
    tried = {"steps": 1000, "tokens": 2000, "trouble": None}
    result = {
        "options": {"max_characters": 50_000},
        "text": "t",
        "scored": {"documents": 3, "all_documents": False, "cut": 2, "bytes": 123_456},
        "rivals": {
            "d": [
                {**tried, "own_rate": False, "learning_rate": 0.003, "held_out_loss": 2.5},
                {**tried, "own_rate": True, "learning_rate": 0.01, "held_out_loss": 2.75},
                {**tried, "own_rate": False, "learning_rate": 1e-3, "held_out_loss": None, "trouble": "nan"},
            ]
        },
        "models": {"a": entry, "b": {**entry, "reference_code": False}},
        "not_available": {"c": "gone"},
        "speed": [
            {**row, "phase": "prefill"},
            {**row, "phase": "decode", "steps": 4, "cache_bytes": {"a": 1_500_000}},
        ],
        "peak_bytes": {"context": 100, "a": 2_000_000},
    }
    text = table(result)
    assert "| a (speed unoptimised) | b |" in text
    assert "| tokens scored | 1,234 | 1,234 |" in text
    assert "Text: t: the first 3 documents, 2 of them cut after 50,000 characters, 123,456 bytes;" in text
    assert "Rival d: 1,000 steps, 2,000 tokens;" in text
    assert "0.001 (nan), 0.003 (2.5000), 0.01 (2.7500, that of the checkpoint); taken: 0.003." in text
    assert "| perplexity by token | – | – |" in text
    assert "| prefill, tokens/s, 3 × 100 | 300 (150–600) | – |" in text
    assert "| decode, tokens/s, 3 × 100 | 12 (6–24) | – |" in text
    assert "| state or cache, MB, 3 × 100 | 1.50 | – |" in text
    assert "| prefill, peak MB, 1 × 100 | 2.00 | – |" in text
    assert "Not available: c (gone)." in text
    assert "Not measured: b at 3 × 100 (why)." in text


def test_the_figure_says_which_speeds_are_unoptimised_and_has_room_for_every_label():
    perplexity = {"blocks": {"bits_per_byte": 1.5}}
    models = {name: {"reference_code": name == "b", "perplexity": perplexity} for name in "ab"}
    seconds = {"a": {"median": 0.5}}  # of the last there is none
    speeds = [{"phase": "prefill", "length": 10, "batch": 1, "seconds": seconds}]
    drawn = compare.figure({"models": models, "speed": speeds})
    assert len(drawn.axes) == 2
    for axes in drawn.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b\n(speed unoptimised)"]
        assert axes.get_ylim() == (1.5, -0.5)
    assert [note.get_text() for note in drawn.axes[1].texts] == [" 20", " not measured"]


def test_the_peak_of_a_prefill_grows_with_the_text(folders):
    models = {"llama": load_model(str(folders / "llama")).model}
    prefill_memory(models, 64)
    short, long = (prefill_memory(models, length)["llama"] for length in (64, 4096))
    if short is None:
        pytest.skip("this system does not tell")
    assert long > 2**20 > short


def test_the_comparison_has_a_column_for_every_model_that_could_be_had(folders, tmp_path, capsys):
    options = ["--hamt_checkpoint", str(folders / "ours"), "--baselines", str(folders / "llama"), "gpt2"]
    options += ["--max_documents", "1", "--max_characters", "200", "--contexts", "8", "--batch_sizes", "1"]
    options += ["--rounds", "1", "--decode_tokens", "2", "--output_dir", str(tmp_path)]
    assert main(["compare", *options]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == ["HAMT (ours)", "llama"]
    assert list(content["not_available"]) == ["gpt2"]
    assert "Not available: gpt2" in out
    assert "|  | HAMT (ours) | llama |" in out
    for name in ("compare.md", "compare.png"):
        assert (tmp_path / name).stat().st_size > 0
    lines = [line for line in table(content).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4}
    assert any(line.startswith("| decode, tokens/s, 1 × 8 |") for line in lines)


SMALL = ["--max_documents", "1", "--max_characters", "200", "--contexts", "8", "--batch_sizes", "1"]
SMALL += ["--rounds", "1", "--decode_tokens", "2"]


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of three steps, and its text."""
    folder, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    sizes = ["--hidden_dim", "64", "--num_layers", "1", "--vocab_size", "300", "--max_length", "16"]
    command = ["quick-train", *sizes, "--data", str(text), "--num_steps", "3", "--output_dir", str(folder)]
    assert main(command) == 0
    return folder, text


def with_rivals(folder, text, *more):
    """Exit code and ``compare.json`` of a comparison with a Llama."""
    options = ["--hamt_checkpoint", str(folder), "--data", str(text), "--rivals", "llama", *SMALL]
    code = main(["compare", *options, "--output_dir", str(folder.parent / "out"), *more])
    found = folder.parent / "out" / "compare.json"
    return code, json.loads(found.read_text(encoding="utf-8")) if code == 0 else None


def test_rivals_are_trained_as_the_checkpoint_was(trained, capsys):
    folder, text = trained
    capsys.readouterr()
    code, content = with_rivals(folder, text)
    assert code == 0
    assert "step     3   held-out loss" in capsys.readouterr().out, "the training is told as it goes"
    ours, rival = content["models"].values()
    assert abs(rival["parameters"] / ours["parameters"] - 1) < 0.02
    info = json.loads((folder / "rivals" / "llama" / "rival.json").read_text(encoding="utf-8"))
    trained = json.loads((folder / "training_info.json").read_text(encoding="utf-8"))
    assert (info["steps"], info["tokens"]) == (3, trained["tokens"])
    stamp = (folder / "rivals" / "llama" / "model.safetensors").stat().st_mtime_ns
    assert with_rivals(folder, text)[0] == 0
    assert (folder / "rivals" / "llama" / "model.safetensors").stat().st_mtime_ns == stamp


def test_of_several_learning_rates_the_best_is_compared(trained):
    """Each is trained once; one that diverges is no candidate, and not tried again."""
    folder, text = trained
    rates = ["0.01", "1e25", "1e-6"]
    for _ in range(2):
        code, content = with_rivals(folder, text, "--rival_learning_rates", *rates)
        assert code == 0
        tried = content["rivals"]["llama"]
        assert [one["learning_rate"] for one in tried] == [0.01, 1e-6, 1e25]
        assert tried[0]["held_out_loss"] < tried[1]["held_out_loss"]
        assert "nan" in tried[2]["trouble"] or "finite" in tried[2]["trouble"]
        assert Path(tried[0]["folder"]) == folder / "rivals" / "llama", "this is the checkpoint's own rate"
        assert Path(tried[1]["folder"]) == folder / "rivals" / "learning_rate_1e-06" / "llama"
        assert list(content["models"]) == ["HAMT (run)", "llama"]
        written = [path.stat().st_mtime_ns for path in sorted((folder / "rivals").rglob("rival.json"))]
        assert len(written) == 3
    first = written
    code, content = with_rivals(folder, text, "--rival_learning_rates", "1e25")
    assert [path.stat().st_mtime_ns for path in sorted((folder / "rivals").rglob("rival.json"))] == first
    assert list(content["not_available"]) == ["llama"]
    note = (folder.parent / "out" / "compare.md").read_text(encoding="utf-8")
    assert "taken: none" in note


def test_a_rival_that_cannot_be_kept_is_not_trained(trained, capsys, monkeypatch):
    folder, text = trained
    (folder / "rivals").write_text("", encoding="utf-8")
    monkeypatch.setattr("hamt.training.rivals.Trainer", pytest.fail)
    capsys.readouterr()
    assert with_rivals(folder, text)[0] == 2
    error = capsys.readouterr().err
    assert "copy the checkpoint to a folder of yours" in error
    assert error.count("\n") == 1
    (folder / "rivals").unlink()
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("hamt.training.checkpoints.shutil.disk_usage", lambda _: usage)
    assert with_rivals(folder, text)[0] == 2
    assert "free space first" in capsys.readouterr().err


def test_rivals_of_the_model_in_the_package_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rivals_folder(PRETRAINED) == tmp_path / "hamt" / "rivals" / "sotu"
    assert rivals_folder(tmp_path / "mine") == tmp_path / "mine" / "rivals"


def test_the_text_of_a_rival_is_the_same_if_its_content_is(trained, tmp_path, capsys, monkeypatch):
    folder, text = trained
    record = folder / "training_info.json"
    info = json.loads(record.read_text(encoding="utf-8"))

    def train_again():
        shutil.rmtree(folder / "rivals", ignore_errors=True)
        return with_rivals(folder, text)[0]

    os.utime(text, (1, 1))
    monkeypatch.chdir(folder)  # a run may have been given a path that leads nowhere from here
    info["options"]["data"] = "somewhere/else.txt"
    record.write_text(json.dumps(info), encoding="utf-8")
    assert train_again() == 0
    # Older records have no paths, and a fingerprint that cannot be had again.
    old = {**info, "data_fingerprint": "0" * 16, "options": {**info["options"], "data": str(text)}}
    record.write_text(json.dumps({**old, "paths": info["paths"]}), encoding="utf-8")
    assert train_again() == 2
    assert "has changed since" in capsys.readouterr().err
    del old["paths"]
    record.write_text(json.dumps(old), encoding="utf-8")
    assert train_again() == 0
    assert "is taken for the text" in capsys.readouterr().out
    record.write_text(json.dumps({**old, "train_tokens": 1}), encoding="utf-8")
    assert train_again() == 2


def test_what_was_measured_is_kept_when_the_comparison_ends_early(folders, tmp_path, monkeypatch, capsys):
    options = ["--hamt_checkpoint", str(folders / "ours"), "--baselines", str(folders / "llama"), *SMALL]
    options += ["--output_dir", str(tmp_path)]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "prefill_memory", stop)
    assert main(["compare", *options]) == 130
    content = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert len(content["models"]) == len(content["speed"]) == 2
    score = compare.quality
    monkeypatch.setattr(
        compare,
        "quality",
        lambda loaded, *a, **k: stop() if loaded.name == "llama" else score(loaded, *a, **k),
    )
    assert main(["compare", *options]) == 130
    content = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == ["HAMT (ours)"]


def test_a_full_disk_costs_no_measurement(folders, tmp_path, monkeypatch, capsys):
    """Measuring goes on, the table is printed, and one line says what could not be written."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    monkeypatch.setattr(compare, "write_json", full)
    monkeypatch.setattr(compare, "write_report", full)
    options = ["--hamt_checkpoint", str(folders / "ours"), *SMALL, "--output_dir", str(tmp_path)]
    assert main(["compare", *options]) == 2
    captured = capsys.readouterr()
    assert "| bits/byte |" in captured.out
    assert (
        captured.err == "hamt: there cannot be written or read: No space left on device (the disk is full)\n"
    )


def test_how_much_of_the_text_was_scored_is_told(folders, tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / "text" / f"{index}.txt").write_text("naïve " * 10 * (index + 1), encoding="utf-8")
    options = ["--hamt_checkpoint", str(folders / "ours"), "--data", str(tmp_path / "text"), *SMALL]
    options += ["--output_dir", str(tmp_path)]
    for more, told in (
        (
            ["--max_documents", "2", "--max_characters", "100"],
            "the first 2 documents, 1 of them cut after 100",
        ),
        (["--max_documents", "3"], "all 3 documents, 420 bytes"),
    ):
        assert main(["compare", *options, *more]) == 0
        assert told in (tmp_path / "compare.md").read_text(encoding="utf-8")
        content = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
        (row,) = content["models"].values()
        assert content["scored"]["bytes"] == row["perplexity"]["blocks"]["bytes"]


def test_the_first_model_is_a_hamt_model(folders, tmp_path, capsys):
    options = ["compare", "--hamt_checkpoint", str(folders / "llama"), "--output_dir", str(tmp_path)]
    assert "a 'llama' model, not a HAMT model: give a HAMT checkpoint, and others with --baselines" in fails(
        options, capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rivals", "rnn"], "no rival rnn; there are gpt2"),
        (["--hamt_checkpoint", "nowhere"], "no model 'nowhere'"),
        (["--rounds", "0"], "at least 1"),
        (["--rival_learning_rates", "0.1"], "needs --rivals"),
        (["--rivals", "llama", "--rival_learning_rates", "0"], "must be positive"),
        (["--device", "cuda"], "no device cuda here"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(options, message, tmp_path, capsys):
    assert message in fails(["compare", *options, "--output_dir", str(tmp_path)], capsys)


def test_a_rival_needs_the_record_of_a_run(folders, capsys):
    assert "which hamt train writes" in fails(
        ["compare", "--hamt_checkpoint", str(folders / "ours"), "--rivals", "llama"], capsys
    )


def test_the_model_in_the_package_is_the_default():
    assert load_model(str(PRETRAINED)).name == "sotu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--data", "none"], "nothing to do"),
        (["evaluate", "--test_text", " "], "--test_text is empty"),
        (["evaluate", "--test_text", __file__], f"give it with --data {__file__}"),
        (["recall", "--quick"], "--quick goes with --capacity"),
        (["generate", "Fellow", "citizens"], "stands in quotes"),
    ],
)
def test_likely_mistakes_are_told(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
