"""``hamt read`` and ``hamt generate --state``: a text is read once, and continued many times."""

import os
import signal
import sys

import pytest
import torch
from command_inputs import BOOK, fails, typed, words
from safetensors import safe_open

import hamt.reading
from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.checkpoint import load_checkpoint, save_checkpoint
from hamt.cli import main

GREEDY = words(max_new_tokens=6, temperature=0)


def run(capsys, *arguments):
    """What a command prints; its notes and its progress go elsewhere."""
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def read(capsys, *arguments, **options):
    return run(capsys, "read", *arguments, *words(**{"checkpoint": "ours", **options}))


def generate(capsys, *arguments, **options):
    told = {"checkpoint": "ours", **options}
    return run(capsys, "generate", *arguments, *words(**told), *GREEDY)


@pytest.mark.parametrize("segment", [7, 2048])
@pytest.mark.parametrize("source", ["book.txt", "-"])
def test_a_text_that_was_read_is_continued_as_if_it_stood_in_the_prompt(
    source, segment, place, capsys, monkeypatch
):
    monkeypatch.setattr(hamt.reading, "SEGMENT", segment)
    monkeypatch.setattr(hamt.reading, "PIECE", 1000)
    typed(monkeypatch, BOOK)
    told = read(capsys, source, save="new/book.state")
    _, tokenizer = load_checkpoint("ours")
    count = len(tokenizer(BOOK).input_ids)
    assert f"read {count:,} tokens in" in told
    assert "tokens/s)" in told
    size = (place / "new" / "book.state").stat().st_size
    assert f"wrote new/book.state: the state after {count:,} tokens, {size:,} bytes" in told
    for prompt in ([], [" and that"], ["Line 0: the"]):
        expected = generate(capsys, BOOK + "".join(prompt))
        assert expected.startswith(BOOK)
        assert generate(capsys, *prompt, state="new/book.state") == expected[len(BOOK) :]
    state = HAMTCache.load("new/book.state")
    assert state.get_seq_length() == count - 1
    assert state.unread.item() == tokenizer(BOOK).input_ids[-1]


def test_a_text_may_be_read_in_several_files(place, capsys):
    first, second = BOOK.index(" and", 4000), BOOK.index(" and", 4500)  # between words
    parts = BOOK[:first], BOOK[first:second], BOOK[second:]
    for number, part in enumerate(parts):
        (place / f"{number}.txt").write_text(part, encoding="utf-8")
        old = {"state": "part.state"} if number else {}
        told = read(capsys, f"{number}.txt", save="part.state", **old)
    _, tokenizer = load_checkpoint("ours")
    count = sum(len(tokenizer(part).input_ids) for part in parts)
    assert f"the state after {count:,} tokens" in told
    assert [token for part in parts for token in tokenizer(part).input_ids] == tokenizer(
        BOOK
    ).input_ids, "cut the book elsewhere"
    read(capsys, "book.txt", save="whole.state")
    first, second = map(HAMTCache.load, ("part.state", "whole.state"))
    assert torch.equal(first.past.fingerprint, second.past.fingerprint)
    assert first.unread == second.unread


def test_every_part_counts_however_short_and_reading_may_stop_anywhere(place, monkeypatch):
    """What has been read so far, with the last token known as ``unread``, is a state of its own."""
    model, tokenizer = load_checkpoint("ours")
    monkeypatch.setattr(hamt.reading, "SEGMENT", 7)
    ids = tokenizer(BOOK[:200]).input_ids
    state = HAMTCache(1)
    for read in hamt.reading.read_on(model, tokenizer, [BOOK[:200]], state):
        assert state.get_seq_length() == read.tokens - 1
        assert state.unread.item() == ids[read.tokens - 1]
    assert read == (len(ids), 200)
    fork = state.fork()
    for text in ("e", "e"):  # one token
        assert list(hamt.reading.read_on(model, tokenizer, [text], state)) == [(1, 1)]
    assert state.get_seq_length() == len(ids) + 1
    assert fork.unread.item() == ids[-1], "a fork's last token has changed"


def test_a_prompt_that_begins_as_the_text_did_comes_after_it(place, capsys):
    """Where Python would take it for the whole text."""
    (place / "short.txt").write_text("one two", encoding="utf-8")
    read(capsys, "short.txt", save="short.state")
    expected = generate(capsys, "one twoone two three")
    assert "one two" + generate(capsys, "one two three", state="short.state") == expected


def test_memory_does_not_grow_with_the_text(place, capsys, monkeypatch):
    """No more of the text is there at a time than a piece, and no forward pass is longer."""
    lengths, pieces = [], []
    forward, encode = hamt.reading.HAMTForCausalLM, hamt.reading.encode_parts

    def noted(parts, *arguments):
        for ids, size in encode(parts, *arguments):
            pieces.append(size)
            yield ids, size

    monkeypatch.setattr(hamt.reading, "encode_parts", noted)
    monkeypatch.setattr(hamt.reading, "PIECE", 500)
    monkeypatch.setattr(hamt.reading, "SEGMENT", 64)
    original = hamt.reading.load_checkpoint

    def watched(path):
        model, tokenizer = original(path)
        model.model.register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1]) if args else None
        )
        assert isinstance(model, forward)
        return model, tokenizer

    monkeypatch.setattr(hamt.reading, "load_checkpoint", watched)
    read(capsys, "book.txt", save="book.state")
    assert max(pieces) < 1000
    assert len(pieces) > 15
    assert max(lengths) == 64
    model, tokenizer = original("ours")
    state = HAMTCache(1)
    assert list(hamt.reading.read_on(model, tokenizer, [BOOK], state))[-1].num_bytes == len(BOOK)
    kept = [*state.past.tensors().values(), *state.states[0].values()]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in kept), "it keeps hidden bytes"


@pytest.mark.parametrize(("precision", "form"), [
    ("float32", "hamt-state-4"), ("bfloat16", "hamt-state-5"), ("int8", "hamt-state-5"),
])  # fmt: skip
def test_a_state_is_written_with_fewer_bits(precision, form, place, capsys):
    read(capsys, "book.txt", save="book.state", precision=precision)
    with safe_open("book.state", "pt") as file:
        assert file.metadata()["format"] == form
    sizes = {"float32": (1, 9), "bfloat16": (0.5, 0.75), "int8": (0.2, 0.6)}
    least, most = sizes[precision]
    slots = 4 * 16 * 64 // 4 * 4
    assert least * slots < (place / "book.state").stat().st_size < most * slots + 3000
    assert generate(capsys, "one", state="book.state").startswith("one")


def test_a_state_takes_the_place_of_a_state_and_of_nothing_else(place, capsys):
    for _ in range(2):
        read(capsys, "book.txt", save="book.state")
    kept = {}
    for name in ("book.txt", "ours/model.safetensors", "ours/config.json"):
        kept[name] = (place / name).read_bytes()
        for arguments in (["read", "book.txt"], ["chat"]):
            told = [*arguments, *words(save=name, checkpoint="ours")]
            assert f"{name} is no HAMT state, and is not written over" in fails(told, capsys)
    (place / "folder").mkdir()
    (place / "link").symlink_to("nowhere")
    for name, message in {
        "folder": "takes the name of a file; 'folder' is none", "link": "is no HAMT state",
        "": "--save must name a path", "/dev/null": "/dev/null is no HAMT state",
        "book.txt/x": "nothing can be written to ", "x" * 300: "name",
    }.items():  # fmt: skip
        assert message in fails(["read", "book.txt", f"--save={name}"], capsys)
    assert all((place / name).read_bytes() == content for name, content in kept.items())


@pytest.mark.parametrize(("arguments", "message"), [
    (["read"], "give a text to read: a file, or - for the standard input"),
    (["read", "book.txt"], "give --save FILE"),
    (["read", "no.txt", "--save", "x"], "no text no.txt"),
    (["read", "ours", "--save", "x"], "ours cannot be read (Is a directory)"),
    (["read", "empty.txt", "--save", "x"], "the text is empty: it must have at least two tokens"),
    (["read", "latin.txt", "--save", "x"], "latin.txt is not UTF-8 text"),
    (["read", "nul.txt", "--save", "x"], "NUL characters"),
    (["read", "book.txt", "--save", "x", "--precision", "int4"], "float32, bfloat16, int8"),
    (["read", "book.txt", "--save", "x", "--state", "no.state"], "no state file no.state"),
    (["read", "book.txt", "--save", "x", "--state", "other.state"], "made by another model"),
    (["generate", "x", "--state", "no.state"], "no state file no.state"),
    (["generate", "x", "--state", "book.txt"], "book.txt is not a safetensors file"),
    (["generate", "x", "--state", "ours/model.safetensors"], "is not a HAMT state"),
    (["generate", "x", "--state", "other.state"], "other.state: this state was made by another"),
    (["generate", "x", "--state", "rows.state"], "rows.state is a state of 2 texts"),
    (["generate", "--state", "read.state"], "has read the last token of its text: give a prompt"),
    (["generate", "x", "--state", "deep.state"], "deep.state: this state has 3 layers"),
    (["generate", "x", "--state", "wide.state"], "wide.state: this state comes from another model"),
    (["chat", "--state", "other.state"], "other.state: this state was made by another model"),
    (["chat", "--state", "note.state"], "note.state: the conversation in the state is damaged"),
])  # fmt: skip
def test_mistakes_end_in_one_line(arguments, message, place, capsys):
    ids = torch.tensor([[5, 6, 7]])
    model, _ = load_checkpoint("ours")
    for name, content in {"empty": b"", "e": b"e", "latin": b"caf\xe9 x", "nul": b"a\0b"}.items():
        (place / f"{name}.txt").write_bytes(content)
    state = model(ids, use_cache=True).past_key_values
    state.save("read.state")
    state.save("note.state", notes={"conversation": "["})
    model(ids.expand(2, -1), use_cache=True).past_key_values.save("rows.state")
    other, _ = load_checkpoint("other")
    other(ids, use_cache=True).past_key_values.save("other.state")
    for name, sizes in {"deep": (32, 3), "wide": (64, 1)}.items():
        config = HAMTConfig(hidden_dim=sizes[0], num_layers=sizes[1], vocab_size=300)
        # The model is gone before the file is written, which then names none.
        HAMTModel(config)(ids, use_cache=True).past_key_values.save(f"{name}.state")
    capsys.readouterr()  # progress bars of what was loaded
    assert message in fails([*arguments, "--checkpoint", "ours"], capsys)
    assert not (place / "x").exists()


def test_a_closed_input_is_refused_and_one_that_holds_text_is_left_open(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    message = fails(["read", "-", *words(save="x", checkpoint="ours")], capsys)
    assert "standard input cannot be read (it is closed)" in message
    typed(monkeypatch, b"\xef\xbb\xbfone two\r\nthree")
    read(capsys, "-", save="x")
    assert sys.stdin.read() == ""
    (place / "text.txt").write_text("one two\nthree")
    read(capsys, "text.txt", save="y")
    states = [HAMTCache.load(name).past.fingerprint for name in "xy"]
    assert states[0] == states[1]


def test_what_has_come_to_stand_there_while_a_text_was_read_is_not_written_over(
    place, capsys, monkeypatch
):
    encode = hamt.reading.encode_parts

    def writing(*arguments):
        (place / "book.state").write_text("something else")
        yield from encode(*arguments)

    monkeypatch.setattr(hamt.reading, "encode_parts", writing)
    assert main(["read", "book.txt", *words(save="book.state", checkpoint="ours")]) == 2
    assert "book.state is no HAMT state, and is not written over" in capsys.readouterr().err
    assert (place / "book.state").read_text() == "something else"


def test_a_text_of_one_token_is_refused(place, capsys):
    (place / "e.txt").write_text("e")
    assert main(["read", "e.txt", *words(save="x", checkpoint="ours")]) == 2
    assert "hamt: the text is empty: it must have at least two" in capsys.readouterr().err
    assert not (place / "x").exists()


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_while_a_text_is_read_leaves_the_older_state(place, capsys, monkeypatch):
    read(capsys, "book.txt", save="book.state")
    before = (place / "book.state").read_bytes()
    encode = hamt.reading.encode_parts

    def interrupted(*arguments):
        yield next(encode(*arguments))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(hamt.reading, "encode_parts", interrupted)
    monkeypatch.setattr(hamt.reading, "PIECE", 1000)
    assert main(["read", "book.txt", *words(save="book.state", checkpoint="ours")]) == 130
    assert "hamt: interrupted" in capsys.readouterr().err
    assert (place / "book.state").read_bytes() == before
    assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_a_model_with_attention_over_the_whole_text_says_that_its_state_grows(
    place, capsys, caplog, monkeypatch
):
    _, tokenizer = load_checkpoint("ours")
    config = {"vocab_size": 300, "hidden_dim": 32, "num_layers": 2}
    sizes = {}
    for name, mixers in {"full": ["memory", "full_attention"],
                         "window": ["memory", "sliding_attention"]}.items():  # fmt: skip
        model = HAMTModel(HAMTConfig(**config, mixers=mixers, sliding_window=8))
        save_checkpoint(place / name, model, tokenizer)
        for length in (2000, 4000):
            (place / "part.txt").write_text(BOOK[:length])
            read(capsys, "part.txt", save="part.state", checkpoint=name)
            sizes[name, length] = (place / "part.state").stat().st_size
            expected = generate(capsys, BOOK[:length] + " and", checkpoint=name)
            found = generate(capsys, " and", checkpoint=name, state="part.state")
            assert found == expected[length:]
        assert caplog.text.count("its state grows with it") == (2 if name == "full" else 0)
        typed(monkeypatch, "")
        run(capsys, "chat", *words(checkpoint=name))
        assert caplog.text.count("its state grows with it") == (3 if name == "full" else 0)
        caplog.clear()
    assert sizes["full", 4000] > 1.5 * sizes["full", 2000]
    assert abs(sizes["window", 4000] - sizes["window", 2000]) < 64
