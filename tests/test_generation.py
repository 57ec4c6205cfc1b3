"""``generate`` and step-by-step decoding agree with recomputing everything from the start."""

import pytest
import torch
from model_inputs import (
    assert_close,
    logits_of,
    padded,
    ragged_rows,
    random_ids,
    tiny_model,
    variants,
)
from torch import Tensor
from transformers import TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from hamt import HAMTCache, HAMTModel
from hamt.data.tokenizer import train_tokenizer

GREEDY = {"do_sample": False, "pad_token_id": 0}


def greedy_by_recomputation(model: HAMTModel, row: Tensor, count: int) -> list[int]:
    """The definition: the likeliest token after all tokens so far, ``count`` times."""
    for _ in range(count):
        row = torch.cat((row, logits_of(model, row)[-1:].argmax(dim=-1)))
    return row.tolist()


def generate(model: HAMTModel, ids: Tensor, count: int, **arguments):
    return model.generate(ids, max_new_tokens=count, **{**GREEDY, **arguments})


@pytest.mark.parametrize("prefill", [1, 2, 16, 17, 40])
@variants
def test_decoding_after_a_prefill_equals_the_full_forward(options, prefill):
    """First several new tokens at once on the filled state, then one by one."""
    model, ids = tiny_model(**options), random_ids(2, prefill + 12)
    with torch.no_grad():
        expected = model(ids).logits
        outputs = model(ids[:, :prefill])
        cache, logits = outputs.past_key_values, [outputs.logits]
        for size in (5, 1, 1, 3, 1, 1):
            start = cache.get_seq_length()
            logits.append(model(ids[:, start : start + size], past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1), expected)


@variants
def test_greedy_is_the_argmax_of_the_whole_recomputed(options):
    model, row = tiny_model(**options), random_ids(1, 6)
    written = generate(model, row, 12)[0].tolist()
    assert written == greedy_by_recomputation(model, row[0], 12)
    assert len(set(written[6:])) > 3, "the model repeats itself, the test sees little"
    assert generate(model, row, 12, use_cache=False)[0].tolist() == written


def test_each_token_after_the_prompt_costs_one_token():
    model, lengths = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(random_ids(1, 9), max_new_tokens=4, **GREEDY)
    assert lengths == [9, 1, 1, 1]


@variants
def test_a_padded_batch_generates_as_each_row_alone(options):
    model, rows = tiny_model(**options), ragged_rows(9, 1, 5)
    ids, mask = padded(rows, "left")
    written = generate(model, ids, 8, attention_mask=mask)
    for row, text in zip(rows, written, strict=True):
        assert text[9:].tolist() == greedy_by_recomputation(model, row, 8)[len(row) :]


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_a_prompt_may_be_read_in_chunks(chunk):
    model, rows = tiny_model(), ragged_rows(9, 2, 5)
    ids, mask = padded(rows, "left")
    expected = generate(model, ids, 6, attention_mask=mask)
    written = generate(model, ids, 6, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(written, expected)


def test_a_prompt_may_be_given_as_embeddings():
    model, ids = tiny_model(), random_ids(2, 7)
    written = generate(model, None, 5, inputs_embeds=model.model.embed_tokens(ids))
    assert torch.equal(written, generate(model, ids, 5)[:, 7:])


def test_generation_ends_at_the_end_of_text():
    model, row = tiny_model(), random_ids(1, 6)
    free = greedy_by_recomputation(model, row[0], 8)
    end = free[8]
    stopped = generate(model, row, 8, eos_token_id=end)[0].tolist()
    assert stopped == free[: free.index(end, 6) + 1]


def test_sampling_is_reproduced_by_its_seed_and_by_no_other():
    model, ids = tiny_model(), random_ids(2, 6)

    def sample(seed: int, **options) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, 10, do_sample=True, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, use_cache=False), sample(1))
    assert torch.equal(sample(1, top_k=1)[:, 6:], generate(model, ids, 10)[:, 6:])


def test_several_samples_continue_the_same_prompt():
    model, ids = tiny_model(), random_ids(2, 6)
    torch.manual_seed(0)
    texts = generate(model, ids, 6, do_sample=True, num_return_sequences=3)
    assert texts.shape == (6, 12)
    assert torch.equal(texts[:, :6], ids.repeat_interleave(3, dim=0))
    assert len({tuple(text) for text in texts.tolist()}) == 6


@variants
def test_beam_search_with_the_state_equals_beam_search_without(options):
    model = tiny_model(**options)
    ids, mask = padded(ragged_rows(9, 5), "left")
    told = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    told |= {"return_dict_in_generate": True, "output_scores": True}
    found = (generate(model, ids, 8, use_cache=use_cache, **told) for use_cache in (True, False))
    with_state, without = found
    assert torch.equal(with_state.sequences, without.sequences)
    assert_close(with_state.sequences_scores, without.sequences_scores)
    assert with_state.beam_indices.diff(dim=1).any(), "no beam was taken over, the test sees little"


@variants
def test_a_returned_state_continues_as_if_written_in_one_go(options):
    model, rows = tiny_model(**options), ragged_rows(7, 4)
    ids, mask = padded(rows, "left")
    whole = generate(model, ids, 10, attention_mask=mask)
    first = generate(model, ids, 4, attention_mask=mask, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, HAMTCache)
    assert cache.get_seq_length() == 10  # the last token is not read yet
    mask = torch.cat((mask, torch.ones(2, 4, dtype=torch.long)), dim=1)
    second = generate(model, first.sequences, 6, attention_mask=mask, past_key_values=cache)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_second_turn_of_several_tokens_goes_on_from_the_state(chunk):
    """A batch of conversations: the turns are padded on the left, the second one inside the row."""
    model, first, second = tiny_model(), ragged_rows(7, 4), ragged_rows(2, 5, seed=5)
    ids, mask = padded(first, "left")
    turn = generate(model, ids, 3, attention_mask=mask, return_dict_in_generate=True)
    more, more_mask = padded(second, "left")
    ids = torch.cat((turn.sequences, more), dim=1)
    mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.long), more_mask), dim=1)
    told = {"attention_mask": mask, "past_key_values": turn.past_key_values}
    written = generate(model, ids, 6, prefill_chunk_size=chunk, **told)
    for b in range(2):
        prompt = torch.cat((first[b], turn.sequences[b, 7:], second[b]))
        assert written[b, -6:].tolist() == greedy_by_recomputation(model, prompt, 6)[-6:]


def test_one_prompt_read_once_is_continued_many_times():
    model, prompt = tiny_model(), random_ids(1, 9)
    with torch.no_grad():
        cache = model(prompt).past_key_values
    for seed in range(3):
        more = torch.cat((prompt, random_ids(1, 3, seed=seed)), dim=1)
        written = generate(model, more, 5, past_key_values=cache.fork())
        assert written[0].tolist() == greedy_by_recomputation(model, more[0], 5)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_is_refused(how):
    """It takes rejected tokens back, which a superposition cannot."""
    model, value = tiny_model(), tiny_model(1) if how == "assistant_model" else 3
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, random_ids(1, 6), 4, **{how: value})


TEXTS = ["The state of the union is strong. ", "We the people. "]
TEXTS.append("Ask not what your country can do for you. ")


@pytest.fixture(scope="module")
def speaker():
    """A tokenizer trained on the texts, and a model with its vocabulary."""
    tokenizer = train_tokenizer(TEXTS * 5, 300)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    ends["pad_token_id"] = tokenizer.pad_token_id
    return tiny_model(vocab_size=len(tokenizer), **ends), tokenizer


def test_the_pipeline_writes_what_generate_writes_alone_and_in_batches(speaker):
    model, tokenizer = speaker
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = model.generate(ids, **arguments)[0]
        expected.append(tokenizer.decode(written, skip_special_tokens=True))
        assert expected[-1].startswith(text)
        assert write(text, **arguments)[0]["generated_text"] == expected[-1]
    assert len(tokenizer(TEXTS[0]).input_ids) != len(tokenizer(TEXTS[1]).input_ids)
    for batch_size in (1, 3):
        batch = write(TEXTS, batch_size=batch_size, **arguments)
        assert [results[0]["generated_text"] for results in batch] == expected
    several = write(TEXTS[0], do_sample=True, num_return_sequences=4, max_new_tokens=8)
    assert len({result["generated_text"] for result in several}) > 1


def test_a_streamer_gets_each_token_as_it_is_written(speaker):
    model, tokenizer = speaker
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    pieces = []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            pieces.append(value.flatten().tolist())

        def end(self) -> None:
            pieces.append("end")

    arguments = {"max_new_tokens": 5, "do_sample": False}
    (written,) = model.generate(ids, streamer=Streamer(), **arguments).tolist()
    prompt, new = ids[0].tolist(), written[ids.shape[1] :]
    assert pieces == [prompt, *([token] for token in new), "end"]
    assert len(new) == 5 or new[-1] == tokenizer.eos_token_id
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(ids, streamer=text, **arguments)
    assert "".join(text) == tokenizer.decode(new)
