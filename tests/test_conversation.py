"""A conversation: its state has read what the chat template writes, and nothing of it twice."""

import json

import pytest
import torch
from evaluation_inputs import WORDS
from model_inputs import tiny_model
from tokenizers import pre_tokenizers

from hamt import HAMTCache, conversation
from hamt.conversation import NEXT_TURN, NOTE, UNDO, Conversation
from hamt.data.tokenizer import train_tokenizer
from hamt.errors import UserError
from hamt.generation import Sampling, load_state

END, START = "<|im_end|>", "<|im_start|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBrief.<|im_end|>\n{% endif %}"
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "transcript": None,
    "ChatML": CHATML,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "with a system": SYSTEM + CHATML,
    "instructions": INSTRUCTIONS,
}
templates = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
MESSAGES = ["Who is there?", "two\nlines  and spaces", "naïve café", "The sum is 7.", "one"]


@pytest.fixture
def speaker():
    """A model and a tokenizer with what templates need."""
    tokenizer = train_tokenizer([WORDS], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    return tiny_model(vocab_size=len(tokenizer)), tokenizer


def talker(speaker, template, state=None) -> Conversation:
    model, tokenizer = speaker
    tokenizer.chat_template = template
    if template is not None and END in template:
        tokenizer.eos_token = END
    return Conversation(model, tokenizer, state)


def told(talk: Conversation, turn: int) -> dict:
    """Answers that are cut, that end after a while, or at once; without other special tokens."""
    tokenizer = talk.tokenizer
    others, end = {*tokenizer.all_special_ids}, tokenizer.eos_token_id
    if turn % 3 == 0:
        return {"suppress_tokens": sorted(others)}
    bias = {"sequence_bias": [[[end], 100.0]], "min_new_tokens": 4 if turn % 3 == 1 else 0}
    return {"suppress_tokens": sorted(others - {end}), **bias}


@pytest.fixture
def turns(monkeypatch):
    """What was read and what was written in each turn, as token ids."""
    noted, original = [], conversation.continue_tokens

    def noting(model, tokenizer, ids, *others, **options):
        written = original(model, tokenizer, ids, *others, **options)
        noted.append((list(ids), written))
        return written

    monkeypatch.setattr(conversation, "continue_tokens", noting)
    return noted


GREEDY = Sampling(max_new_tokens=12, temperature=0)


@templates
def test_answers_are_those_to_the_whole_conversation_which_is_read_once(speaker, template, turns):
    talk, history, ends = talker(speaker, template), [], []
    model, tokenizer = speaker
    for turn, text in enumerate(MESSAGES):
        answer = talk.ask(text, GREEDY, **told(talk, turn))
        history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        read, written = turns[-1]
        before = [token for ids in turns[:-1] for part in ids for token in part] + read
        expected = model.generate(
            torch.tensor([before]), max_new_tokens=len(written), do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=1, **told(talk, turn),
        )  # fmt: skip
        assert written == expected[0, len(before) :].tolist()
        state = talk.said.state
        assert state.get_seq_length() == len(before) + len(written) - 1, "read twice"
        assert state.unread.item() == written[-1]
        ends.append((len(written), written[-1] == tokenizer.eos_token_id))
        # What the state has read is what the template makes of all turns, but for white space
        # around answers, and for what would end the last one.
        whole = tokenizer.apply_chat_template(
            history, chat_template=talk.template, tokenize=False, add_generation_prompt=False
        )
        text = "".join(tokenizer.decode(before + written).split())
        whole = "".join(whole.split())
        assert text.replace(tokenizer.eos_token, "").startswith(
            whole.replace(tokenizer.eos_token, "")
        )
        if template is not None:
            assert whole.startswith(text)
    assert ends == [(12, False), (5, True), (1, True), (12, False), (5, True)]


def test_an_answer_of_a_transcript_ends_where_the_model_writes_the_next_turn(speaker, turns):
    """Which is then not written again."""
    talk = talker(speaker, None)
    tokenizer = speaker[1]
    next_turn = tokenizer(f" twelve.  {NEXT_TURN}", add_special_tokens=False).input_ids
    forced = {"prefix_allowed_tokens_fn": lambda _, ids: [next_turn[len(ids) - talk_length]]}
    talk_length = len(tokenizer(talk.new_text("Hi"), add_special_tokens=False).input_ids)
    size = len(NEXT_TURN)
    assert len(tokenizer(NEXT_TURN, add_special_tokens=False).input_ids) == size, "not the longest"
    assert talk.ask("Hi", Sampling(max_new_tokens=50, temperature=0), **forced) == "twelve."
    assert turns[0][1] == next_turn
    assert talk.said.tail == f"  {NEXT_TURN}"
    assert talk.new_text("Ho") == " Ho\nAssistant:"


def test_only_the_first_turn_has_the_space_that_a_tokenizer_puts_before_a_text(speaker, turns):
    tokenizer = speaker[1]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    talk = talker(speaker, None)
    talk.ask("one", GREEDY)
    talk.ask("two", GREEDY)
    (first, _), (second, _) = turns
    assert tokenizer.decode(first).startswith(" User: one")
    assert tokenizer.decode(second).startswith("\nUser: two")


def test_what_a_token_holds_beyond_the_end_of_an_answer_has_been_read(speaker):
    model, tokenizer = speaker
    tokenizer.add_tokens([f"{NEXT_TURN} I"])
    model.resize_token_embeddings(len(tokenizer))
    talk = talker(speaker, None)
    forced = {"prefix_allowed_tokens_fn": lambda *_: [len(tokenizer) - 1]}
    assert talk.ask("Hi", GREEDY, **forced) == ""
    assert talk.said.tail == f"{NEXT_TURN} I"


TURNS = "{% for m in messages %}{% if m.role == 'user' %}COUNT: {{ m.content }}\n{% else %}"
TURNS += "{{ m.content }}\n{% endif %}{% endfor %}"


@pytest.mark.parametrize("count", ["[Round {{ loop.index0 // 2 + 1 }}]",
                                   "{% if loop.index0 == 2 %}Again{% endif %}"])  # fmt: skip
def test_a_template_that_counts_turns_is_refused(speaker, count):
    with pytest.raises(UserError, match="in another way according to how many there were"):
        talker(speaker, TURNS.replace("COUNT", count))


def test_of_several_templates_one_is_the_default(speaker):
    model, tokenizer = speaker
    tokenizer.chat_template = {"default": CHATML, "tools": TURNS}
    assert Conversation(model, tokenizer).template == CHATML
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match=r"several chat templates \(rag, tools\), none of which is"):
        Conversation(model, tokenizer)


def test_an_answer_is_one_text_whatever_the_checkpoint_says(speaker):
    talk = talker(speaker, CHATML)
    expected = talk.ask("Hi", GREEDY)
    length = talk.said.state.get_seq_length()
    talk.undo()
    told = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    speaker[0].generation_config.update(**told)
    assert talk.ask("Hi", GREEDY) == expected
    assert talk.said.state.get_seq_length() == length
    for name in ("num_beams", "num_return_sequences"):
        before = talk.said
        with pytest.raises(ValueError, match=f"goes on from one answer: leave {name} out"):
            talk.ask("Ho", GREEDY, **{name: 2})
        assert talk.said is before


@pytest.mark.parametrize("template", [
    # earlier answers lose a part; all turns are counted; the latest one comes first
    CHATML.replace("m.content", "m.content.split('el')[-1] if not loop.last else m.content"),
    "{{ messages | length }}" + CHATML,
    CHATML.replace("in messages", "in messages | reverse"),
], ids=["earlier turns change", "a count", "reversed"])  # fmt: skip
def test_a_template_that_writes_earlier_turns_anew_is_refused(speaker, template):
    with pytest.raises(UserError, match="writes earlier turns in another way once there is a"):
        talker(speaker, template)


def test_a_template_that_does_so_for_one_answer_is_refused_then_and_nothing_is_read(speaker):
    talk = talker(speaker, CHATML.replace("m.content", "m.content.split('</think>')[-1]"))
    tokenizer = speaker[1]
    ids = tokenizer("four</think>five<|im_end|>", add_special_tokens=False).input_ids
    length = len(tokenizer(talk.new_text("Hi"), add_special_tokens=False).input_ids)
    talk.ask("Hi", GREEDY, prefix_allowed_tokens_fn=lambda _, x: [ids[len(x) - length]])
    before = talk.said
    with pytest.raises(UserError, match="writes earlier turns in another way"):
        talk.ask("Ho", GREEDY)
    assert talk.said is before


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages + 1 }}", "{% if"])
def test_a_template_that_fails_is_refused_in_one_line(speaker, template):
    with pytest.raises(UserError, match="the chat template fails"):
        talker(speaker, template)


@templates
def test_a_turn_that_is_taken_back_was_never_there(speaker, template):
    talk = talker(speaker, template)
    first = [talk.ask(text, GREEDY) for text in MESSAGES[:3]]
    assert talk.undo()
    assert talk.undo()
    assert [talk.ask(text, GREEDY) for text in MESSAGES[1:3]] == first[1:]
    assert [talk.undo() for _ in range(4)] == [True, True, True, False]
    assert not talk.said.state.has_previous_state()
    assert talk.ask(MESSAGES[0], GREEDY) == first[0]


def test_as_many_turns_can_be_taken_back_as_states_are_kept(speaker, monkeypatch):
    talk = talker(speaker, None)
    short = Sampling(max_new_tokens=1, temperature=0)
    for _ in range(UNDO + 3):
        talk.ask("x", short)
    assert sum(iter(talk.undo, False)) == UNDO


@templates
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_conversation_from_a_file_goes_on(speaker, template, precision, tmp_path):
    talk, path = talker(speaker, template), str(tmp_path / "talk.state")
    for turn, text in enumerate(MESSAGES[:3]):
        talk.ask(text, GREEDY, **told(talk, turn))
    talk.save(path, precision)
    again = talker(speaker, template, load_state(path, speaker[0]))
    assert again.said.messages == talk.said.messages
    assert not again.undo(), "only what was said here can be taken back"
    assert again.new_text("two") == talk.new_text("two")
    answers = [each.ask("two", GREEDY) for each in (talk, again)]
    if precision == "float32":
        assert answers[0] == answers[1]
    for state, other in zip(talk.said.state.states, again.said.state.states, strict=True):
        for name, x in state.items():
            assert (other[name] - x).norm() <= (0.05 if precision == "int8" else 1e-6) * x.norm()


@templates
def test_a_conversation_begins_after_what_was_read(speaker, template, turns):
    model, tokenizer = speaker
    state = model(torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values
    talk = talker(speaker, template, state)
    talk.ask("one", GREEDY)
    assert state.get_seq_length() == 3
    assert talk.said.state.get_seq_length() == 3 + sum(map(len, turns[0])) - 1
    new = talker(speaker, template).new_text("one")
    assert tokenizer.decode(turns[0][0]) == (f"\n{new}" if template is None else new)


@pytest.mark.parametrize("note", [
    "", "[]", "{}", '"x"', "[" * 5000, '{"messages": 3, "tail": ""}', '{"messages": [], "tail": 1}',
    json.dumps({"messages": [{"role": "user", "content": "x"}], "tail": ""}),
    json.dumps({"messages": [{"role": "user"}, {"role": "assistant", "content": 1}], "tail": ""}),
])  # fmt: skip
def test_a_damaged_note_is_refused(speaker, note):
    state = HAMTCache(2)
    state.notes = {NOTE: note}
    with pytest.raises(UserError, match="the conversation in the state is damaged"):
        talker(speaker, None, state)


def test_an_interrupted_turn_leaves_no_trace(speaker):
    talk = talker(speaker, None)
    talk.ask("one", GREEDY)
    before, length = talk.said, talk.said.state.get_seq_length()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("two", GREEDY, prefix_allowed_tokens_fn=stop)
    assert talk.said is before
    assert before.state.get_seq_length() == length
