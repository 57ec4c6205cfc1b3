"""``generate`` continues a state: with new ids only, or with the whole text."""

import pytest
import torch
from model_inputs import padded, ragged_rows, random_ids, tiny_model, variants
from test_generation import generate, greedy_by_recomputation
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hamt import HAMTCache, HAMTModel

MIXERS = {
    "memory": {},
    "attention": {"mixers": "full_attention"},
    "hybrid": {"mixers": ["memory", "full_attention"]},
    "window": {"mixers": ["memory", "sliding_attention"], "sliding_window": 6, "num_sinks": 2},
}
mixers = pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
FIRST, SECOND = ragged_rows(20, 7, 11), ragged_rows(2, 5, 3, seed=7)
OLD, OLD_MASK = padded(FIRST, "left")
NEW, NEW_MASK = padded(SECOND, "left")
TEXTS = [torch.cat(pair) for pair in zip(FIRST, SECOND, strict=True)]


def state_of(model: HAMTModel, ids: Tensor = OLD, mask: Tensor | None = OLD_MASK) -> HAMTCache:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=True).past_key_values


def assert_continues(model: HAMTModel, texts: list[Tensor], written: Tensor, count: int = 6):
    """The last tokens of each row are what the model writes after its text."""
    for text, row in zip(texts, written, strict=True):
        expected = greedy_by_recomputation(model, text, count)
        assert row[-count:].tolist() == expected[-count:]


@pytest.mark.parametrize("chunk", [None, 1, 2, 100])
@mixers
def test_new_ids_go_on_from_the_state(options, chunk):
    """A batch with padding before, and in, the new ids; read at once or in chunks."""
    model = tiny_model(**options)
    state = state_of(model)
    written = generate(
        model, NEW, 6, attention_mask=NEW_MASK, past_key_values=state, prefill_chunk_size=chunk
    )
    assert torch.equal(written[:, :5], NEW)
    assert_continues(model, TEXTS, written)


@variants
def test_new_ids_go_on_with_every_write_rule_and_binding(options):
    model = tiny_model(**options)
    assert_continues(model, TEXTS, generate(model, NEW, 6, past_key_values=state_of(model)))


@pytest.mark.parametrize("length", [1, 4, 12, 13, 40])
def test_new_ids_may_be_fewer_or_more_than_what_was_read(length):
    model, old, new = tiny_model(), random_ids(1, 12), random_ids(1, length, seed=3)
    written = generate(model, new, 6, past_key_values=state_of(model, old, None))
    assert_continues(model, [torch.cat((old[0], new[0]))], written)


@pytest.mark.parametrize("how", ["saved", "forked", "several calls", "detached"])
@mixers
def test_it_does_not_matter_where_the_state_comes_from(options, how, tmp_path):
    model = tiny_model(**options)
    state = state_of(model)
    if how == "saved":
        state.save(tmp_path / "state")
        state = HAMTCache.load(tmp_path / "state")
    elif how == "several calls":
        state = state_of(model, OLD[:, :3], OLD_MASK[:, :3])
        for column in range(3, 20):
            mask = OLD_MASK[:, column : column + 1]
            model(OLD[:, column : column + 1], attention_mask=mask, past_key_values=state)
    else:
        state = state.fork() if how == "forked" else state.detach()
    for ids, mask in ((NEW, NEW_MASK), padded(TEXTS, "left")):
        written = generate(model, ids, 6, attention_mask=mask, past_key_values=state.fork())
        assert_continues(model, TEXTS, written)


def conversation(model: HAMTModel, **options) -> tuple[list[Tensor], HAMTCache]:
    """Texts written by ``generate`` and the state that it returns: all rows but one end early."""
    texts = []
    for row in FIRST:
        texts.append(torch.tensor(greedy_by_recomputation(model, row, 9)))
    end = texts[1][len(FIRST[1]) + 2].item()
    for b, text in enumerate(texts):
        ends = [n for n in range(len(FIRST[b]), len(text)) if text[n] == end]
        texts[b] = text[: ends[0] + 1] if ends else text
    told = {"eos_token_id": end, "pad_token_id": options.pop("pad_token_id", end)}
    told |= {"attention_mask": OLD_MASK, "return_dict_in_generate": True}
    output = generate(model, OLD, 9, **told, **options)
    for row, text, prompt in zip(output.sequences, texts, FIRST, strict=True):
        written = text[len(prompt) :]
        assert torch.equal(row[20 : 20 + len(written)], written)
    return texts, output.past_key_values


@pytest.mark.parametrize("padding", ["pad_token_id=0", "as the end of text"])
@mixers
def test_a_state_that_generate_made_has_read_each_row_to_its_end(options, padding):
    """The token written last is read first; a row that ended early has read no padding."""
    model = tiny_model(**options)
    texts, state = conversation(model, **({"pad_token_id": 0} if "0" in padding else {}))
    assert len({len(text) - len(row) for text, row in zip(texts, FIRST, strict=True)}) > 1
    whole = [torch.cat(pair) for pair in zip(texts, SECOND, strict=True)]
    for fork in (state.fork(), HAMTCache.from_tensors(state.to_tensors())):
        written = generate(model, NEW, 6, attention_mask=NEW_MASK, past_key_values=fork)
        assert_continues(model, whole, written)
    ids, mask = padded(whole, "left")
    written = generate(model, ids, 6, attention_mask=mask, past_key_values=state)
    assert_continues(model, whole, written)


def test_a_conversation_of_many_turns_equals_one_text():
    model, state, text = tiny_model(), HAMTCache(2), torch.empty(0, dtype=torch.long)
    for turn in range(5):
        new = random_ids(1, turn + 1, seed=turn)
        written = generate(model, new, 4, past_key_values=state)
        text = torch.cat((text, new[0]))
        assert_continues(model, [text], written, 4)
        text = torch.cat((text, written[0, turn + 1 :]))


@mixers
def test_beam_search_from_a_state_equals_beam_search_over_the_whole_text(options):
    model = tiny_model(**options)
    told = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    state, (ids, mask) = state_of(model), padded(TEXTS, "left")
    expected = generate(model, ids, 6, attention_mask=mask, **told)
    found = generate(model, NEW, 6, attention_mask=NEW_MASK, past_key_values=state, **told)
    assert torch.equal(found.sequences[:, -6:], expected.sequences[:, -6:])
    assert state.get_seq_length() == 20, "the given state has changed"
    # The state that is returned is that of the sequences, not of the beams that were running.
    more = random_ids(6, 3, seed=11)
    texts = [torch.cat((TEXTS[b // 2], found.sequences[b, 5:], more[b])) for b in range(6)]
    for state in (found.past_key_values, expected.past_key_values):
        assert_continues(model, texts, generate(model, more, 6, past_key_values=state))


STEPS = {"greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "top_k": 1}}


@pytest.mark.parametrize("told", STEPS.values(), ids=STEPS)
@mixers
def test_a_prefix_that_was_read_once_is_continued_by_a_batch_of_prompts(options, told):
    """Each row as if the model had read prefix and prompt; the state itself stays as it is."""
    model, prefix = tiny_model(**options), random_ids(1, 20)
    state = state_of(model, prefix, None)
    before = [x.clone() for x in state.to_tensors().values()]
    whole, whole_mask = padded([torch.cat((prefix[0], row)) for row in SECOND], "left")
    told = {**told, "num_return_sequences": 1 if not told else 2, "return_dict_in_generate": True}
    expected = generate(model, whole, 6, attention_mask=whole_mask, **told)
    found = generate(model, NEW, 6, attention_mask=NEW_MASK, past_key_values=state, **told)
    assert torch.equal(found.sequences[:, 5:], expected.sequences[:, 25:])
    assert (
        len(found.sequences)
        == found.past_key_values.batch_size
        == 3 * told.pop("num_return_sequences")
    )
    after = state.to_tensors().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("nothing", [None, torch.empty(3, 0, dtype=torch.long), torch.empty(3, 0)])
@pytest.mark.parametrize("told", STEPS.values(), ids=STEPS)
@mixers
def test_without_ids_a_text_goes_on_from_its_last_token(options, told, nothing):
    model = tiny_model(**options)
    first = generate(model, OLD, 4, attention_mask=OLD_MASK, return_dict_in_generate=True)
    mask = torch.cat((OLD_MASK, OLD_MASK.new_ones(3, 4)), dim=1)
    expected = generate(model, first.sequences, 6, attention_mask=mask, **told)
    given = {} if nothing is None else {"attention_mask": nothing}
    written = generate(model, nothing, 6, past_key_values=first.past_key_values, **given, **told)
    assert torch.equal(written, expected[:, 23:])


@pytest.mark.parametrize("new", [0, 1, 5])
def test_a_state_has_advanced_by_what_is_documented(new):
    """By the new ids and what was written but for its last token, and by the last one before."""
    model = tiny_model()
    state = state_of(model, OLD[:1], None)
    generate(model, NEW[1:2], 4, past_key_values=state)
    assert state.get_seq_length() == state.past.num_tokens.item() == 20 + 5 + 3
    before = state.past.unread.item()
    ids = random_ids(1, new, seed=5) if new else None
    written = generate(model, ids, 4, past_key_values=state)
    assert state.get_seq_length() == state.past.num_tokens.item() == 28 + 1 + new + 3
    assert state.past.unread.item() == written[0, -1]
    assert new or written[0, 0] == before


def test_several_samples_continue_one_state():
    model = tiny_model()
    state = state_of(model)
    torch.manual_seed(0)
    written = generate(
        model, NEW, 6, attention_mask=NEW_MASK, past_key_values=state, do_sample=True, top_k=1,
        num_return_sequences=2,
    )  # fmt: skip
    assert_continues(model, [text for text in TEXTS for _ in range(2)], written)
    assert len(state.past.num_tokens) == 3


def test_the_whole_text_may_be_padded_otherwise_than_it_was_read():
    model = tiny_model()
    for length in (25, 30):
        ids, mask = padded(TEXTS, "left", length)
        written = generate(model, ids, 6, attention_mask=mask, past_key_values=state_of(model))
        assert_continues(model, TEXTS, written)


ALL_NEW = {"all_new": True}
BOTH = {"attention_mask": torch.ones(1, 8, dtype=torch.long)}


@pytest.mark.parametrize("told", [BOTH, ALL_NEW], ids=["mask", "all_new"])
def test_ids_may_be_said_to_be_new(told):
    """Also where they begin with all that was read."""
    model, old = tiny_model(), random_ids(1, 3)
    new = torch.cat((old, random_ids(1, 2, seed=5)), dim=1)
    state = state_of(model, old, None)
    written = generate(model, new, 6, past_key_values=state.fork(), **told)
    assert_continues(model, [torch.cat((old[0], new[0]))], written)
    assert_continues(model, [new[0]], generate(model, new, 6, past_key_values=state))


@pytest.mark.parametrize("told", [{}, {"num_beams": 3}, {"prefill_chunk_size": 2}])
@pytest.mark.parametrize("rows", [1, 3])
def test_new_ids_come_after_the_token_that_was_written_last(rows, told):
    """With padding before them, and where they repeat all that was read."""
    model, state, (ids, mask) = tiny_model(), HAMTCache(2), padded(FIRST[:rows], "left")
    written = generate(model, ids, 4, attention_mask=mask, past_key_values=state)
    texts = [torch.cat((text, row[-4:])) for text, row in zip(FIRST, written, strict=False)]
    ids, mask = padded(texts, "left")
    told = {
        **told,
        "attention_mask": mask,
        "past_key_values": state,
        "return_dict_in_generate": True,
    }
    found = generate(model, ids, 6, **ALL_NEW, **told)
    for text, row in zip(texts, found.sequences, strict=True):
        whole = torch.cat((text, text))[None]
        expected = generate(model, whole, 6, num_beams=told.get("num_beams", 1))
        assert row[-6:].tolist() == expected[0, -6:].tolist()
    assert found.past_key_values.get_seq_length() == ids.shape[1] * 2 - 1 + 6


def test_a_packed_state_is_continued_in_its_last_document():
    model, documents = tiny_model(), ragged_rows(20, 9)
    names = torch.repeat_interleave(torch.arange(2), torch.tensor([20, 9]))[None]
    state = model(torch.cat(documents)[None], seq_idx=names, use_cache=True).past_key_values
    new = random_ids(1, 4, seed=5)
    text = torch.cat((documents[1], new[0]))
    for ids in (new, text[None]):
        written = generate(model, ids, 6, past_key_values=state.fork())
        assert_continues(model, [text], written)


def test_what_was_read_as_embeddings_is_continued_with_ids():
    model = tiny_model()
    state = model(inputs_embeds=model.model.embed_tokens(OLD), attention_mask=OLD_MASK,
                  use_cache=True).past_key_values  # fmt: skip
    written = generate(model, NEW, 6, attention_mask=NEW_MASK, past_key_values=state)
    assert_continues(model, TEXTS, written)


def test_only_new_tokens_are_read_and_streamed():
    model, lengths, pieces = tiny_model(), [], []
    old = random_ids(1, 40)
    state = state_of(model, old, None)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            pieces.append(value.numel())

        def end(self) -> None:
            pieces.append("end")

    new = random_ids(1, 3, seed=2)
    generate(model, new, 3, past_key_values=state.fork(), streamer=Streamer())
    generate(model, torch.cat((old, new), dim=1), 3, past_key_values=state)
    assert lengths == [3, 1, 1, 3, 1, 1]
    assert pieces == [3, 1, 1, 1, "end"]


ALIKE = torch.cat((OLD[:1], random_ids(1, 3, seed=9)), dim=1)
EDITED = ALIKE.clone()
EDITED[0, 18] += 1


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (OLD[:1], {}, "has already read these ids"),
        (EDITED, {}, "begin as what the state has read, and then differ"),
        (OLD[:1, :18], {}, "begin as what the state has read, and then differ"),
        (NEW[1:2], {"attention_mask": torch.ones(1, 9)}, "covers 9 tokens, .* read 20 and 5"),
        (NEW[1:2], {"attention_mask": torch.ones(1, 26)}, "make it 5 long, or 25"),
        (NEW[1:2], {"use_cache": False}, "not used with use_cache=False"),
        (None, {}, "has read its last token: give at least one"),
        (NEW[:, :0], {}, "has read its last token: give at least one"),
        (None, {"inputs_embeds": torch.zeros(1, 3, 32)}, "continues a state with token ids"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(ids, arguments, message):
    model = tiny_model()
    state = state_of(model, OLD[:1], None)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, 3, past_key_values=state, **arguments)
    assert state.get_seq_length() == 20, "the state has changed"


def test_rows_of_which_some_repeat_what_was_read_are_refused():
    model = tiny_model()
    state = state_of(model, random_ids(2, 4), None)
    ids = torch.cat((random_ids(2, 4)[:1], random_ids(1, 4, seed=5)))
    with pytest.raises(ValueError, match="in some rows only"):
        generate(model, ids, 3, past_key_values=state)


def test_a_state_of_several_rows_takes_as_many_prompts():
    model = tiny_model()
    state = state_of(model, OLD[1:], OLD_MASK[1:])
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"2 rows, the input {rows}"):
            generate(model, NEW[:rows], 3, past_key_values=state)
