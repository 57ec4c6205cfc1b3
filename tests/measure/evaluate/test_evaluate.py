"""hamt evaluate: what it measures, writes and refuses."""

import math
import sys
from itertools import pairwise

import pytest
from command_inputs import fails, read_json, words
from evaluation_inputs import WORDS

from hamt.checkpoint import load_checkpoint
from hamt.cli import main
from hamt.measure.evaluate.harness import metric_name
from hamt.measure.perplexity import score_documents
from hamt.output import claim


def run(tmp_path, **options):
    assert main(["evaluate", *words(**options, output_dir=tmp_path)]) == 0
    return read_json(tmp_path / "evaluation.json")


def samples(tmp_path):
    return read_json(tmp_path / "generation_results.json")["samples"]


def test_a_model_is_not_asked_beyond_its_positions(folders, tmp_path, capsys):
    options = {"checkpoint": folders / "gpt2-0.1", "test_text": WORDS, "context": 65}
    error = fails(["evaluate", *words(**options, output_dir=tmp_path)], capsys)
    assert "gpt2-0.1 has 64 positions: give --context 64 or less" in error


def test_a_text_without_spaces_has_no_perplexity_by_word(tmp_path):
    found = run(tmp_path, test_text="国" * 700, context=64)["perplexity"][0]
    assert found["word_perplexity"] is None
    assert found["bits_per_byte"] > 0


@pytest.mark.parametrize("command", ["evaluate", "compare", "bench", "recall"])
def test_a_folder_that_cannot_be_written_is_seen_first(command, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    error = fails([command, "--output_dir", str(tmp_path / "file" / "below")], capsys)
    assert "choose another --output_dir" in error


def test_a_hamt_model_is_measured_at_several_contexts(folders, tmp_path, capsys):
    found = run(tmp_path, checkpoint=folders / "ours", test_text=WORDS)
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
    prompts = [sample["prompt"] for sample in samples(tmp_path)]
    assert prompts == [WORDS], "without --prompts the text is continued"


def test_context_and_stride_can_be_given_and_other_models_measured(folders, tmp_path):
    with claim(tmp_path, "evaluate", []) as output:
        output.write_text("memory_analysis.png", "of an earlier run")
    llama = {"checkpoint": folders / "llama", "test_text": WORDS}
    found = run(tmp_path, **llama, context=20, stride=5)
    assert [(row["context"], row["stride"]) for row in found["perplexity"]] == [(20, 5)]
    found = run(tmp_path, **llama)
    assert [row["context"] for row in found["perplexity"]] == [64]
    assert not (tmp_path / "memory_analysis.png").exists()
    new = samples(tmp_path)[0]["new_tokens"]
    assert new > 0, "of a text longer than the positions the end is continued"
    found = run(tmp_path, checkpoint=folders / "ours", test_text=WORDS, carry=True)
    assert [row["context"] for row in found["perplexity"]] == ["carried"]


def test_prompts_are_continued(folders, tmp_path, capsys):
    options = {"checkpoint": folders / "ours", "test_text": WORDS, "carry": True, "seed": 3}
    options |= {"prompts": "one two|three", "max_new_tokens": 4}
    run(tmp_path, **options)
    first = samples(tmp_path)
    assert [sample["prompt"] for sample in first] == ["one two", "three"]
    assert all(0 < one["new_tokens"] <= 4 and one["tokens_per_second"] > 0 for one in first)
    run(tmp_path, **options)
    continued = [[one["continuation"] for one in found] for found in (first, samples(tmp_path))]
    assert continued[0] == continued[1]
    assert first[0]["continuation"] in capsys.readouterr().out


@pytest.mark.slow
def test_tasks_of_the_harness_run_on_the_model(folders, tmp_path):
    pytest.importorskip("lm_eval")
    pages = " = One = \n \n A page with a few words . \n = Two = \n \n Another 1 @,@ 000 words . \n"
    (tmp_path / "wiki.raw").write_text(pages, encoding="utf-8")
    tasks = ["hamt_mqar", "hamt_induction", "hamt_passkey", "hamt_wikitext"]
    options = {"checkpoint": folders / "ours", "test_text": WORDS, "carry": True, "limit": 3}
    found = run(tmp_path, **options, tasks=tasks, task_data=tmp_path / "wiki.raw")["tasks"]
    assert set(found) == set(tasks)
    assert found["hamt_wikitext"]["word_perplexity"] > 1
    assert found["hamt_mqar"]["documents"] == 3
    assert all(one["shots"] == 0 for one in found.values())
    table = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "a context of 2,048 tokens" in table
    assert "| documents | shots |" in table
    assert "| hamt_wikitext | bits_per_byte |" in table
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
    from hamt.measure.evaluate.lm_eval_tasks import local_tasks

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


@pytest.mark.slow
def test_lambada_is_asked_from_a_local_file(folders, tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "lambada.jsonl"
    lines = '{"text": "one two three four"}\n{"text": "five six seven"}\n'
    path.write_text(lines, encoding="utf-8")
    options = {"checkpoint": folders / "ours", "test_text": WORDS, "carry": True}
    found = run(tmp_path, **options, tasks="hamt_lambada", task_data=path)["tasks"]["hamt_lambada"]
    assert 10 < found["perplexity"] < 1e6  # of a model that has learned nothing
    assert found["acc"] == 0


WRONG = [
    (["--checkpoint", "nowhere"], "no model 'nowhere' (it is not on this disk, and"),
    (["--checkpoint", "nowhere.gguf"], "give the path of a .gguf file"),
    (["--data", "nowhere.txt"], "no text nowhere.txt"),
    (["--carry", "--context", "8"], "leave --context out"),
    (["--stride", "8"], "--stride needs --context"),
    (["--prompts", "a", "--context", "64"], "--context needs a text to score, or --tasks"),
    (["--prompts", "a", "--max_documents", "2"], "--max_documents needs documents to score"),
    (["--prompts", "a", "--limit", "3"], "--limit needs --tasks"),
    (["--prompts", "a", "--task_data", "x"], "--task_data needs --tasks"),
    (["--prompts", "a", "--data", "none", "--carry"], "--carry needs a text to score"),
    (["--test_text", "a b c", "--text_column", "zz"], "--text_column needs --data"),
    (["--text_column", "zz"], "--text_column needs --data"),
    (["--temperature", "0.1"], "--temperature needs --prompts or --test_text"),
    (words(test_text="a b", context=8, stride=9), "between 1 and the context, 8; got 9"),
    (["--test_text", ""], "--test_text is empty"),
    (["--limit", "0"], "--limit must be at least 1"),
    (["--context", "8", "--stride", "0"], "--stride must be at least 1"),
    (["--temperature", "-1"], "--temperature must be at least 0; got -1"),
    (["--test_text", "a\udce9"], "is not UTF-8"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_mistakes_end_in_one_line(options, message, tmp_path, capsys):
    silent = "--stride" not in options  # how far it may go is known when the model is
    assert message in fails(["evaluate", *options, "--output_dir", str(tmp_path)], capsys, silent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "message"),
    [(["nothing"], "no task nothing"), (["hamt_lambada"], "give it with --task_data")],
)
def test_tasks_that_cannot_run_are_refused(tasks, message, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    options = words(test_text="a b", context=8, tasks=tasks, output_dir=tmp_path)
    assert message in fails(["evaluate", *options], capsys)


def test_metrics_of_the_harness_keep_their_errors_whatever_filter_they_have():
    keys = {
        "acc,none": "acc",
        "acc_stderr,none": "acc_stderr",
        "exact_match,strict-match": "exact_match,strict-match",
        "exact_match_stderr,strict-match": "exact_match,strict-match_stderr",
    }
    assert {key: metric_name(key) for key in keys} == keys


def test_without_the_harness_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = words(test_text="a b", context=8, tasks="wikitext", output_dir=tmp_path)
    assert "pip install" in fails(["evaluate", *options], capsys)


LIKELY = [
    (["evaluate", "--data", "none"], "nothing to do"),
    (["evaluate", "--test_text", " "], "--test_text is empty"),
    (["evaluate", "--test_text", __file__], f"give it with --data {__file__}"),
    (["recall", "--quick"], "--quick goes with --capacity"),
    (["generate", "Fellow", "citizens"], "stands in quotes"),
]


@pytest.mark.parametrize(("arguments", "message"), LIKELY)
def test_likely_mistakes_are_told(arguments, message, capsys):
    assert message in fails(arguments, capsys)
