"""Where a text begins and ends, for every command that reads one and goes on with it."""

import pytest
import torch
from model_inputs import tiny_model
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hamt import HAMTCache
from hamt.conversation import Conversation
from hamt.data.tokenizer import opening
from hamt.generation import GenerateOptions, continue_tokens, encode_prompt, end_tokens
from hamt.reading import read_on


@pytest.fixture
def beginning(tokenizer):
    """A tokenizer that puts a token before each text, as Llama's does."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        eos_token="<|endoftext|>",
    )
    fast.add_special_tokens({"bos_token": "<s>"})
    template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", fast.bos_token_id)])
    fast.backend_tokenizer.post_processor = template
    return fast


def test_a_text_begins_as_the_tokenizer_has_it(beginning, tokenizer):
    assert opening(beginning) == [beginning.bos_token_id]
    assert encode_prompt(beginning, "one two") == beginning("one two").input_ids
    assert encode_prompt(beginning, "") == [beginning.bos_token_id]
    assert opening(tokenizer) == []
    assert encode_prompt(tokenizer, "one two") == tokenizer("one two").input_ids


def test_a_text_that_is_read_begins_so_once(beginning):
    model = tiny_model(vocab_size=len(beginning))
    wanted, state = beginning("one two three").input_ids, HAMTCache(model.config.num_layers)
    reads = list(read_on(model, beginning, ["one two", " three"], state))
    assert reads[-1].tokens == len(wanted)
    with torch.no_grad():
        expected = model(torch.tensor([wanted[:-1]]), use_cache=True).past_key_values
    for layer, other in zip(state.states, expected.states, strict=True):
        assert all(torch.allclose(layer[name], x, atol=1e-5) for name, x in other.items())
    before = reads[-1].tokens
    (*_, after) = read_on(model, beginning, [" four"], state)
    assert after.tokens == len(beginning(" four", add_special_tokens=False).input_ids)
    assert before + after.tokens > len(wanted)


def test_a_conversation_without_a_template_begins_so(beginning):
    model = tiny_model(vocab_size=len(beginning))
    read = []
    model.register_forward_pre_hook(
        lambda _, inputs, named: read.append(named.get("input_ids", inputs[0] if inputs else None)),
        with_kwargs=True,
    )
    Conversation(model, beginning).ask("one", GenerateOptions(max_new_tokens=2))
    first = next(ids for ids in read if ids is not None)
    assert first[0, 0] == beginning.bos_token_id
    assert not first[0, 1:].eq(beginning.bos_token_id).any()


def test_a_text_ends_with_the_tokens_of_the_tokenizer_and_of_the_checkpoint(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [end]
    model.generation_config.eos_token_id = [7, end]
    assert end_tokens(model, tokenizer) == sorted([7, end])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: the first one is the likeliest
    options = GenerateOptions(max_new_tokens=5, temperature=0.0)
    written = continue_tokens(model, tokenizer, [5], options)
    likeliest = written[0]
    assert len(written) == (1 if likeliest == end else 5)
    model.generation_config.eos_token_id = likeliest
    assert continue_tokens(model, tokenizer, [5], options) == [likeliest]
