"""``studies/convert.py`` on tiny models: each part, and that it goes on where it was stopped."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from evaluation_inputs import WORDS
from exchange_inputs import WINDOW_ALONE, WITH_EXACT, WITH_SLOTS, tiny_converted, tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

import convert
from convert_checks import loss, recall
from convert_checks import rows as rows_kept
from convert_checks.costs import state_after
from convert_checks.models import Named, named, texts
from convert_checks.page import loss_tables

from hamt.data.facts import PAIRS, text_with_facts
from hamt.errors import UserError
from hamt.measure.beside import beside_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """Folders of a teacher, a converted model and a control, and a text."""
    root = tmp_path_factory.mktemp("study")
    models = {"teacher": tiny_llama(), "memory": tiny_converted(WITH_EXACT, seed=1)}
    models["window"] = tiny_converted(WINDOW_ALONE, seed=1)
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "words.txt").write_text(WORDS, encoding="utf-8")
    lines = [json.dumps({"text": "one two three four"}), json.dumps({"text": "nine ten eleven"})]
    (root / "lambada.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def told(made, output, *words):
    """Options of a study of very little."""
    small = ["--contexts", "40", "--lengths", "400", "--samples", "2", "--least", "0"]
    small += ["--decode_context", "48", "--decode_batch", "2", "--rounds", "2", "--steps", "4"]
    files = ["--teacher", made / "teacher", "--lambada", made / "lambada.jsonl"]
    files += ["--texts", f"words={made / 'words.txt'}", "--prose", made / "words.txt"]
    files += ["--models", *(f"{name}={made / name}" for name in ("memory", "window"))]
    files += ["--output_dir", output]
    return convert.arguments().parse_args([*map(str, files), *small, *words])


def rows(output, part):
    found = json.loads((output / "convert.json").read_text(encoding="utf-8"))["rows"]
    return {row["place"].get("model"): row for row in found if row["place"]["part"] == part}


def numbers(figures):
    """All numbers of figures, in their order."""
    values = [value for figure in figures for value in figure.values()]
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def test_loss_is_that_beside_the_teacher(made, tmp_path, tokenizer):
    convert.measure(told(made, tmp_path, "--parts", "loss", "--tokens", "300"))
    found, (text,) = rows(tmp_path, "loss"), texts(str(made / "words.txt"), tokenizer, 300)
    models = {name: Named(name, str(made / name)).model for name in ("memory", "window")}
    wanted = beside_teacher(Named("", str(made / "teacher")).model, models, tokenizer, [text], 40)
    for name, (figure,) in wanted.items():
        assert found[name]["found"]["bytes"] == len(text)
        assert numbers(found[name]["found"]["from"]) == pytest.approx(
            numbers([loss.as_dict(figure)]), rel=1e-5, abs=1e-6
        )
    page = (tmp_path / "convert.md").read_text(encoding="utf-8")
    nats = wanted["memory"][0]
    shown = f"{nats.nats * nats.tokens / len(text) / 0.6931472:.4f}"
    (line,) = (
        line
        for line in page.splitlines()
        if line.startswith(f"| 40 | {nats.tokens} | memory |") and "/" not in line
    )
    assert shown in line
    assert f"{100 * nats.excess.value:+.2f}" in line
    assert 299 <= nats.tokens <= 300
    (line,) = (line for line in page.splitlines() if line.startswith("| memory |"))
    assert "2 × window of 8, 2 sinks, 5 exact entries and 3 slots" in line


def test_rows_of_other_settings_stand_beside_their_own_teacher():
    """Each has the bits of the text that it was measured on."""

    def row(model, tokens, nats):
        figures = {"start": 0, "tokens": tokens, "teacher": nats, "nats": nats}
        ratios = {name: [0.0, 0.0] for name in ("excess", "divergence", "agreement")}
        settings = {"tokens": tokens, "weights": model, "teacher": f"of {model}", "text": model}
        return {
            "place": {"part": "loss", "text": "words", "context": 40, "model": model},
            "settings": settings,
            "found": {"bytes": tokens, "from": [figures | ratios]},
        }

    page = loss_tables([row("a", 100, 3.0), row("b", 1000, 2.0)])
    for told in (
        "| 40 | 100 | a | 4.3281 | +0.00 ± 0.00 % |",
        "| 40 | 1,000 | b | 2.8854 | +0.00 ± 0.00 % |",
        "| 40 | 1,000 | teacher, nats/token | 2.8854 | 2.0000 |",
    ):
        assert told in page


def test_a_loss_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    options = told(made, tmp_path, "--parts", "loss")
    whole = tmp_path / "whole"
    convert.measure(told(made, whole, "--parts", "loss"))
    monkeypatch.setattr(rows_kept, "KEEP", 0.0)
    original, seen = loss.compared_windows, []

    def stopping(*arguments, **others):
        for each in original(*arguments, **others):
            seen.append(each)
            if len(seen) == 3:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(loss, "compared_windows", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert.measure(options)
    convert.measure(options)
    count = len(seen)
    found, wanted = (rows(folder, "loss") for folder in (tmp_path, whole))
    for name in ("memory", "window"):
        assert numbers(found[name]["found"]["from"]) == pytest.approx(
            numbers(wanted[name]["found"]["from"]), rel=1e-5, abs=1e-6
        )
    convert.measure(options)  # all of it is there
    assert len(seen) == count
    windows = -(-len(tiny_ids(made)) // 40)
    assert count == windows + 1  # the third was lost
    assert not (tmp_path / "convert_partial.json").exists()


def tiny_ids(made):
    (text,) = texts(str(made / "words.txt"), Named("", str(made / "teacher")).tokenizer, 0)
    return Named("", str(made / "teacher")).tokenizer(text, verbose=False).input_ids


def questions(tokenizer):
    prose = tokenizer(WORDS * 3).input_ids
    randomly = random.Random(0)
    return [text_with_facts(PAIRS, tokenizer, prose, 420, 20, randomly) for _ in range(2)]


def by_hand(model, text, question):
    """Loss of an answer, and whether it is found, from one pass over all of it."""
    ids = torch.tensor([[*text.ids, *question.ids, *question.answer]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, -len(question.answer) :].double()
    wanted = torch.tensor(question.answer)
    nats = -logits.log_softmax(dim=-1).gather(1, wanted[:, None]).sum().item()
    return pytest.approx(nats, rel=1e-4), logits.argmax(dim=-1).equal(wanted)


def test_answers_by_the_ways_they_are_asked(tokenizer, monkeypatch):
    monkeypatch.setattr(recall, "SEGMENT", 33)
    model, alone = tiny_converted(WITH_EXACT, seed=1), tiny_converted(WINDOW_ALONE, seed=1)
    drawn = before, text = questions(tokenizer)
    (asked,) = recall.answers(model, True, drawn)
    assert list(asked.ways) == list(recall.WAYS)
    for place, question in enumerate(text.questions):
        for way, judge in ((recall.WHOLE, model), (recall.UNWRITTEN, alone)):
            answer = asked.ways[way][place]
            assert (answer.nats, answer.right) == by_hand(judge, text, question)
        # Nothing that windows of eight hand on gets from the text to the end of the question.
        hidden, never = (asked.ways[way][place].nats for way in (recall.HIDDEN, recall.UNWRITTEN))
        assert hidden == pytest.approx(never, rel=1e-4)
        nats = [asked.ways[way][place].nats for way in recall.WAYS if way != recall.HIDDEN]
        assert len({round(x, 3) for x in nats}) == 4
    wider = tiny_converted(WITH_SLOTS._replace(window=128), seed=1)
    (handed_on,) = recall.answers(wider, True, drawn)
    assert handed_on.ways[recall.HIDDEN][0].nats != pytest.approx(
        handed_on.ways[recall.UNWRITTEN][0].nats, rel=1e-4
    )
    # The memory of the text before, behind the window of this one.
    with torch.no_grad():
        mixed = recall.with_memory_of(*(recall.read(model, each.ids) for each in (text, before)))
        again = [recall.answer(model, mixed, question) for question in before.questions]
    assert again == asked.ways[recall.THEIRS]


@pytest.mark.parametrize("name", ["teacher", "window"])
def test_what_has_no_memory_is_asked_once(tokenizer, name):
    model = tiny_llama() if name == "teacher" else tiny_converted(WINDOW_ALONE)
    _, text = drawn = questions(tokenizer)
    (asked,) = recall.answers(model, False, drawn)
    assert list(asked.ways) == [recall.WHOLE]
    for answer, question in zip(asked.ways[recall.WHOLE], text.questions, strict=True):
        assert (answer.nats, answer.right) == by_hand(model, text, question)


def test_an_answer_is_right_if_all_of_it_would_be_written():
    class Model:
        device = "cpu"

        def __call__(self, ids, logits_to_keep, **others):
            self.ids = ids
            logits = torch.zeros(1, logits_to_keep, 9)
            logits[0, range(logits_to_keep), [3, 4][:logits_to_keep]] = 5.0
            return type("Outputs", (), {"logits": logits})

    model = Model()
    for wanted, right in (([3, 4], True), ([3, 5], False), ([2, 4], False)):
        question = recall.Question("", [7, 8], wanted, 0)
        assert recall.answer(model, None, question).right == right
        assert model.ids.tolist() == [[7, 8, wanted[0]]]


def test_recall_is_summed_up_over_texts(made, tmp_path):
    convert.measure(told(made, tmp_path, "--parts", "recall", "--kinds", "pairs", "--seed", "3"))
    found = {name: row["found"] for name, row in rows(tmp_path, "recall").items()}
    assert list(found) == ["teacher", "memory", "window"]
    assert set(found["memory"]["ways"]) == set(recall.WAYS)
    assert set(found["window"]["ways"]) == set(found["teacher"]["ways"]) == {recall.WHOLE}
    assert all((each["texts"], each["questions"]) == (2, 3) for each in found.values())
    assert all(each["distance"][0] >= WITH_EXACT.window for each in found.values())
    page = (tmp_path / "convert.md").read_text(encoding="utf-8")
    assert all(f"| memory, {way} |" in page for way in recall.WAYS[1:])
    row = recall.Asked({recall.WHOLE: [recall.Answer(True, 1.0), recall.Answer(False, 2.0)]}, 7)
    other = recall.Asked({recall.WHOLE: [recall.Answer(True, 2.0), recall.Answer(True, 4.0)]}, 7)
    ways = recall.summary([row, other], [30, 20])["ways"][recall.WHOLE]
    assert ways == {"accuracy": [0.75, pytest.approx(0.25)], "nats": [2.25, pytest.approx(0.75)]}


def test_where_the_teacher_fails_nobody_else_is_asked(made, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "PROBE", 2)
    words = ("--parts", "recall", "--kinds", "passkey", "--least", "0.5", "--samples", "5")
    convert.measure(told(made, tmp_path, *words))
    found = rows(tmp_path, "recall")
    assert list(found) == ["teacher"]
    assert found["teacher"]["found"]["texts"] == 2


def test_a_recall_that_was_stopped_goes_on(made, tmp_path, monkeypatch):
    options = told(made, tmp_path, "--parts", "recall", "--kinds", "passkey", "--samples", "3")
    whole = tmp_path / "whole"
    words = ("--parts", "recall", "--kinds", "passkey", "--samples", "3")
    convert.measure(told(made, whole, *words))
    monkeypatch.setattr(rows_kept, "KEEP", 0.0)
    original, seen = recall.answers, []

    def stopping(*arguments):
        for each in original(*arguments):
            seen.append(each)
            if len(seen) == 5:  # the second text of the second model
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(recall, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert.measure(options)
    convert.measure(options)
    assert len(seen) == 3 * 3 + 1
    found, wanted = (rows(folder, "recall") for folder in (tmp_path, whole))
    for name, row in wanted.items():
        for way, figures in row["found"]["ways"].items():
            again = found[name]["found"]["ways"][way]
            assert again["accuracy"] == figures["accuracy"]
            assert again["nats"] == pytest.approx(figures["nats"], rel=1e-4)


def test_lambada_and_decoding(made, tmp_path):
    pytest.importorskip("lm_eval")
    convert.measure(told(made, tmp_path, "--parts", "lambada", "decode"))
    found = rows(tmp_path, "lambada")
    assert list(found) == ["teacher", "memory", "window"]
    assert {row["found"]["documents"] for row in found.values()} == {2}
    (decoded,) = (row["found"] for row in rows(tmp_path, "decode").values())
    assert set(decoded["seconds"]) == {"memory", "window", "static", "dynamic"}
    # Keys and values of two layers, two heads of eight numbers each, in float32.
    assert decoded["cache_bytes"]["static"] - 2 * 2 * 2 * 8 * 4 * 2 * 49 < 100
    states = {name: Named(name, str(made / name)).model for name in ("memory", "window")}
    assert decoded["cache_bytes"]["window"] == sum(
        x.nbytes for state in state_after(states["window"], 48, 2).states for x in state.values()
    )
    page = (tmp_path / "convert.md").read_text(encoding="utf-8")
    assert page.index("## LAMBADA") < page.index("## Decoding")
    before = (tmp_path / "convert.json").stat().st_mtime_ns
    convert.measure(told(made, tmp_path, "--parts", "lambada", "decode"))
    assert (tmp_path / "convert.json").stat().st_mtime_ns == before
    room = told(made, tmp_path / "less", "--parts", "decode", "--max_gigabytes", "1e-6")
    convert.measure(room)
    (decoded,) = (row["found"] for row in rows(tmp_path / "less", "decode").values())
    assert set(decoded["left_out"]) == {"static", "dynamic"}


def test_a_state_that_decoding_is_measured_on_is_far_in_its_text():
    model = tiny_converted(WITH_EXACT)
    state = state_after(model, 5000, 3)
    assert state.past.num_tokens.tolist() == [5000] * 3
    turned, taker = [], model.model.layers[0].self_attn.window_and_memory
    original = taker.turn
    taker.turn = lambda keys, places: turned.append(places.max()) or original(keys, places)
    with torch.no_grad():
        model(torch.zeros(3, 1, dtype=torch.long), past_key_values=state)
    assert max(places for places in turned if places < 4900) > 2900  # 5,000 less the reach


def test_what_is_wrong_ends_in_one_line(made, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="NAME=folder"):
        named(["folder"])
    with pytest.raises(UserError, match="no model in"):
        _ = Named("a", str(tmp_path)).weights
    words = ["convert.py", "--teacher", str(made / "teacher"), "--models", f"teacher={made}"]
    monkeypatch.setattr(sys, "argv", words)
    assert convert.main() == 1
    assert capsys.readouterr().err == (
        "error: no model can be called teacher: give another NAME=FOLDER\n"
    )


def test_models_are_trained_further(made, tmp_path):
    words = ["--parts", "finetune", "--finetune_text", made / "words.txt", "--finetune_steps", "4"]
    words += ["--finetune_scored", made / "words.txt", "--finetune_learning_rate", "0.01"]
    convert.measure(told(made, tmp_path, *map(str, words)))
    found = {name: row["found"] for name, row in rows(tmp_path, "finetune").items()}
    assert list(found) == ["teacher", "memory", "window"]
    assert all(each["after"] < each["before"] for each in found.values())
    assert all(each["tokens"] == 4 * 1024 for each in found.values())
    page = (tmp_path / "convert.md").read_text(encoding="utf-8")
    assert f"| memory | 4,096 | {found['memory']['before']:.4f} |" in page
