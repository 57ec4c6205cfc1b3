"""hamt compare: what it measures, writes and refuses."""

import errno
from itertools import product

import pytest
import torch
from command_inputs import fails, read_json, words
from evaluation_inputs import SMALL, WORDS

from hamt.baselines.catalogue import with_parameters
from hamt.baselines.loading import load_any_model, longest_context
from hamt.baselines.products import pack_weights, unpack_weights
from hamt.checkpoint import PRETRAINED, load_checkpoint, save_pt
from hamt.cli import main
from hamt.measure.compare import command as compare
from hamt.measure.compare import run
from hamt.measure.compare.report import figure, table
from hamt.measure.compare.run import quality
from hamt.measure.compare.speed import prefill_memory, read, speed
from hamt.output import Output


def load(folders, name):
    return load_any_model(str(folders / name))


def test_any_model_is_loaded_by_name(folders, tokenizer, tmp_path):
    one = tmp_path / "one.pt"
    save_pt(one, load_checkpoint(folders / "ours")[0], tokenizer)
    for name, kind in ((folders / "ours", "hamt"), (folders / "llama", "llama"), (one, "hamt")):
        loaded = load_any_model(str(name))
        assert loaded.model.config.model_type == kind
        assert loaded.name == name.stem
        assert not loaded.model.training
        assert len(loaded.tokenizer) == len(tokenizer)


def test_quality_has_blocks_and_for_hamt_the_carried_state(folders):
    ours, llama = load(folders, "ours"), load(folders, "llama")
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
        model = load(folders, name).model
        cache = read(model, ids[:, :8])
        parameters = {"past_key_values": cache, "use_cache": True}
        logits = model(ids[:, 8:], **parameters).logits[:, -1]
        assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-4)


@pytest.mark.slow
def test_speed_leaves_out_what_a_model_cannot_do(folders):
    """Learned positions end, rotary ones do not."""
    names = ("ours", "llama", "gpt2-0.1")
    models = {name: load(folders, name).model for name in names}
    rows = list(speed(models, [8, 64, 100], [1, 2], decode_steps=2, rounds=1, max_seconds=60))
    cases = product((8, 64, 100), (1, 2), ("prefill", "decode"))
    assert [(row["length"], row["batch"], row["phase"]) for row in rows] == list(cases)
    for found in rows:
        able = found["length"] == 8 or (found["length"] == 64 and found["phase"] == "prefill")
        assert set(found["seconds"]) == set(names if able else names[:2])
        assert set(found["left_out"]) == set(() if able else names[2:])
    assert rows[1]["cache_bytes"]["ours"] == rows[9]["cache_bytes"]["ours"]


def test_a_context_that_takes_too_long_is_named_and_not_dropped(folders):
    models = {name: load(folders, name).model for name in ("ours", "llama")}
    *_, prefill, decode = speed(models, [8, 16], [1], decode_steps=1, rounds=1, max_seconds=1e-9)
    assert prefill["seconds"] == decode["seconds"] == {}
    assert set(prefill["left_out"]) == set(decode["left_out"]) == {"ours", "llama"}


def test_cells_of_the_comparison_by_hand():
    seconds = {"a": {"low": 0.5, "median": 1.0, "high": 2.0}}
    row = {"batch": 3, "length": 100, "seconds": seconds, "left_out": {"b": "why"}}
    bits = {"token_perplexity": None, "word_perplexity": 2.0, "bits_per_byte": 1.25}
    perplexity = {"blocks": {"context": 7, "tokens": 1234, **bits}}
    entry = {"parameters": 5, "vocabulary": 6, "reference_code": True, "perplexity": perplexity}
    tried = {"steps": 1000, "tokens": 2000, "trouble": None, "own_rate": False}
    rates = [
        {**tried, "learning_rate": 0.003, "held_out_loss": 2.5},
        {**tried, "own_rate": True, "learning_rate": 0.01, "held_out_loss": 2.75},
        {**tried, "learning_rate": 1e-3, "held_out_loss": None, "trouble": "nan"},
    ]
    scored = {"documents": 3, "all_documents": False, "cut": 2, "bytes": 123_456}
    decode = {**row, "phase": "decode", "steps": 4, "cache_bytes": {"a": 1_500_000}}
    result = {
        "options": {"max_characters": 50_000},
        "text": "t",
        "scored": scored,
        "rivals": {"d": rates},
        "models": {"a": entry, "b": {**entry, "reference_code": False}},
        "not_available": {"c": "gone"},
        "speed": [{**row, "phase": "prefill"}, decode],
        "peak_bytes": {"context": 100, "a": 2_000_000},
    }
    text = table(result)
    for line in (
        "| a (speed unoptimised) | b |",
        "| tokens scored | 1,234 | 1,234 |",
        "Text: t: the first 3 documents, 2 of them cut after 50,000 characters, 123,456 bytes;",
        "Rival d: 1,000 steps, 2,000 tokens;",
        "0.001 (nan), 0.003 (2.5000), 0.01 (2.7500, that of the checkpoint); taken: 0.003.",
        "| perplexity by token | – | – |",
        "| prefill, tokens/s, 3 × 100 | 300 (150–600) | – |",
        "| decode, tokens/s, 3 × 100 | 12 (6–24) | – |",
        "| state or cache, MB, 3 × 100 | 1.50 | – |",
        "| prefill, peak MB, 1 × 100 | 2.00 | – |",
        "Not available: c (gone).",
        "Not measured: b at 3 × 100 (why).",
    ):
        assert line in text


def test_the_figure_says_which_speeds_are_unoptimised_and_has_room_for_every_label():
    perplexity = {"blocks": {"bits_per_byte": 1.5}}
    models = {name: {"reference_code": name == "b", "perplexity": perplexity} for name in "ab"}
    seconds = {"a": {"median": 0.5}}  # of the last there is none
    speeds = [{"phase": "prefill", "length": 10, "batch": 1, "seconds": seconds}]
    drawn = figure({"models": models, "speed": speeds})
    assert len(drawn.axes) == 2
    for axes in drawn.axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["a", "b\n(speed unoptimised)"]
        assert axes.get_ylim() == (1.5, -0.5)
    assert [note.get_text() for note in drawn.axes[1].texts] == [" 20", " not measured"]


def test_the_peak_of_a_prefill_grows_with_the_text(folders):
    models = {"llama": load(folders, "llama").model}
    prefill_memory(models, 64)
    short, long = (prefill_memory(models, length)["llama"] for length in (64, 4096))
    if short is None:
        pytest.skip("this system does not tell")
    assert long > 2**20 > short


def compare_of(folders, folder, *others, checkpoint="ours", **options):
    """The words of ``hamt compare`` of these folders and models."""
    paths = {"hamt_checkpoint": folders / checkpoint, "output_dir": folder}
    if others:
        paths["baselines"] = list(others)
    return ["compare", *SMALL, *words(**paths, **options)]


def test_the_comparison_has_a_column_for_every_model_that_could_be_had(folders, tmp_path, capsys):
    assert main(compare_of(folders, tmp_path, folders / "llama", "gpt2")) == 0
    out = capsys.readouterr().out
    content = read_json(tmp_path / "compare.json")
    assert list(content["models"]) == ["HAMT (ours)", "llama"]
    assert list(content["not_available"]) == ["gpt2"]
    assert "Not available: gpt2" in out
    assert "|  | HAMT (ours) | llama |" in out
    for name in ("compare.md", "compare.png"):
        assert (tmp_path / name).stat().st_size > 0
    lines = [line for line in table(content).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4}
    assert any(line.startswith("| decode, tokens/s, 1 × 8 |") for line in lines)


def test_what_was_measured_is_kept_when_the_comparison_ends_early(
    folders, tmp_path, monkeypatch, capsys
):
    arguments = compare_of(folders, tmp_path, folders / "llama")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "prefill_memory", stop)
    assert main(arguments) == 130
    content = read_json(tmp_path / "compare.json")
    assert len(content["models"]) == len(content["speed"]) == 2
    score = run.quality

    def stop_at_llama(loaded, *arguments, **options):
        return stop() if loaded.name == "llama" else score(loaded, *arguments, **options)

    monkeypatch.setattr(run, "quality", stop_at_llama)
    assert main(arguments) == 130
    assert list(read_json(tmp_path / "compare.json")["models"]) == ["HAMT (ours)"]


def test_a_full_disk_costs_no_measurement(folders, tmp_path, monkeypatch, capsys):
    """Measuring goes on, the table is printed, and one line says what could not be written."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    monkeypatch.setattr(Output, "write_json", full)
    monkeypatch.setattr(compare, "write_report", full)
    assert main(compare_of(folders, tmp_path)) == 2
    captured = capsys.readouterr()
    assert "| bits/byte |" in captured.out
    told = "there cannot be written or read: No space left on device (the disk is full)"
    assert captured.err == f"hamt: {told}\n"


@pytest.mark.slow
def test_how_much_of_the_text_was_scored_is_told(folders, tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(3):
        text = "naïve " * 10 * (index + 1)
        (tmp_path / "text" / f"{index}.txt").write_text(text, encoding="utf-8")
    cut = "the first 2 documents, 1 of them cut after 100"
    for more, told in (
        ({"max_documents": 2, "max_characters": 100}, cut),
        ({"max_documents": 3}, "all 3 documents, 420 bytes"),
    ):
        assert main(compare_of(folders, tmp_path, data=tmp_path / "text", **more)) == 0
        assert told in (tmp_path / "compare.md").read_text(encoding="utf-8")
        content = read_json(tmp_path / "compare.json")
        (row,) = content["models"].values()
        assert content["scored"]["bytes"] == row["perplexity"]["blocks"]["bytes"]


def test_the_first_model_is_a_hamt_model(folders, tmp_path, capsys):
    told = "a 'llama' model, not a HAMT model: give a HAMT checkpoint, and others with --baselines"
    assert told in fails(compare_of(folders, tmp_path, checkpoint="llama"), capsys)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_are_timed_with_all_of_their_matrices_packed(kind):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 768, "num_layers": 1, "vocab_size": 300, "context": 16}
    model, ids = with_parameters(kind, 8_000_000, **sizes).eval(), torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        packed = pack_weights(model)
        assert packed > 0.6 * sum(x.nbytes for x in model.parameters() if x.ndim == 2)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        unpack_weights(model)
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_that_was_saved_without_a_cache_decodes_with_one():
    """As after fine-tuning with gradient checkpointing."""
    sizes = {"hidden_dim": 32, "num_layers": 1, "vocab_size": 300, "context": 16}
    model = with_parameters("llama", 30_000, **sizes).eval()
    model.config.use_cache = False
    assert read(model, torch.arange(8)[None]).get_seq_length() == 8


RIVALS = "hybrid, gpt2, llama, mamba2, gated-deltanet, transformer"
WRONG = [
    (["--rivals", "rnn"], f"--rivals must be one of {RIVALS}; got 'rnn'"),
    (["--hamt_checkpoint", "nowhere"], "no model 'nowhere'"),
    (["--rounds", "0"], "at least 1"),
    (["--rival_learning_rates", "0.1"], "needs --rivals"),
    (["--rivals", "llama", "--rival_learning_rates", "0"], "must lie in"),
    (["--device", "cuda"], "no device cuda here"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_comparisons_that_cannot_be_are_refused(options, message, tmp_path, capsys):
    assert message in fails(["compare", *options, "--output_dir", str(tmp_path)], capsys)


def test_the_model_in_the_package_is_the_default():
    assert load_any_model(str(PRETRAINED)).name == "sotu"
