"""Probes of a model's memories: figures that are known beforehand, and commands that write them."""

import json
import math
import re
import time
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.analysis.contributions import contributions
from hamt.analysis.reading import Retrieval, largest_by_chance, read_memory, retrieval_by_lag
from hamt.analysis.record import Trace, record
from hamt.analysis.report import TRACED, analyse, token_texts
from hamt.analysis.silencing import loss_without_slots
from hamt.analysis.sources import recall_sources
from hamt.analysis.survey import LayerSurvey, effective_rank, effective_slots, survey
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main
from hamt.data.tasks import MQAR
from hamt.evaluation.peak_memory import peak_memory_of
from hamt.memory import HolographicMemory
from hamt.training.tasks import train_on_task
from hamt.visualization import contribution_matrix, gates_over_text, save_figure

SIZES = {"hidden_dim": 16, "hcm_dim": 24, "num_layers": 2, "num_heads": 2, "num_slots": 4, "vocab_size": 30}


def build(**options) -> HAMTForCausalLM:
    torch.manual_seed(0)
    return HAMTForCausalLM(HAMTConfig(**{**SIZES, **options})).eval()


def text(length, rows=1):
    return torch.randint(30, (rows, length), generator=torch.Generator().manual_seed(0))


def random_trace(algebra, items, features=512, slots=1, decay=1.0):
    """Random items under random keys, each written whole to every slot and read from all."""
    generator = torch.Generator().manual_seed(0)
    memory = HolographicMemory(features, slots, 1, algebra)
    values = torch.randn(1, items, 1, features, generator=generator)
    keys = memory.algebra.random_keys(1, items, 1, memory.key_size, generator=generator)
    gates = torch.ones(1, items, 1, slots)
    forget = math.log(decay) * gates
    output, after = memory(values, keys, keys, gates, gates, forget)
    before = memory.initial_state()
    lifted = memory.algebra.lift(values)
    return Trace(memory, lifted, keys, keys, gates, gates, forget, None, before, after, output)


# ------------------------------------------------------------------- reading


@pytest.mark.parametrize("algebra", ["elementwise", "circular_conv", "phasor"])
def test_a_memory_gives_back_what_was_bound_to_a_key(algebra):
    """Of n superposed items each comes back with a cosine of 1/√n, and no other item is near."""
    trace = random_trace(algebra, 5)
    for token in range(5):
        found = read_memory(trace, after=4, token=token, head=0, slot=0, count=3)
        assert found.positions[0] == token
        assert found.rank == 0
        assert found.cosines[0] == found.stored == pytest.approx(5**-0.5, abs=0.1)
        assert len(found.cosines) == 3
        assert found.stored > 2 * max(found.cosines[1], found.theory, found.permuted)
    early = read_memory(trace, after=2, token=1, head=0)
    assert early.stored == pytest.approx(3**-0.5, abs=0.1)
    assert set(early.positions) == {0, 1, 2}, "what is written later is not there yet"
    alone = read_memory(trace, after=0, token=0, head=0)
    assert alone.stored == pytest.approx(1, abs=1e-5)
    assert abs(alone.permuted) < 0.1


def test_the_level_of_chance_is_that_of_random_directions():
    generator = torch.Generator().manual_seed(0)
    for count, features in ((50, 64), (1000, 256), (1000, 8), (3, 2), (5, 1)):
        directions = F.normalize(torch.randn(400, count, features, generator=generator), dim=-1)
        largest = directions[..., 0].amax(dim=1)
        error = largest.std().item() / 400**0.5
        assert largest_by_chance(count, features) == pytest.approx(largest.mean().item(), abs=4 * error)
    assert largest_by_chance(1, 16) == pytest.approx(0, abs=1e-6)


def test_what_fades_is_read_back_less_the_longer_ago_it_was():
    trace = random_trace("phasor", 40, decay=0.8)
    states = torch.stack(list(trace.states([36, 38, 40])), dim=1)
    found = retrieval_by_lag(trace, [35, 37, 39], states, [0, 2, 8, 100])
    assert found.lags == [0, 2, 8]
    total = 1 / math.sqrt(1 - 0.8**2)  # of what fades evenly, in items
    wanted = [0.8**lag / total for lag in found.lags]
    assert found.right.tolist() == pytest.approx(wanted, abs=0.06)
    assert found.wrong.abs().max() < 0.1
    assert retrieval_by_lag(trace, [0], next(trace.states([1]))[:, None], [0]).lags == []


def test_places_that_do_not_exist_are_refused():
    trace = random_trace("phasor", 5)
    for wrong in ({"after": 5}, {"token": 3}, {"head": 1}, {"slot": 1}, {"after": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must lie from 0"):
            read_memory(trace, **{"after": 2, "token": 1, "head": 0, **wrong})


# -------------------------------------------------------------------- survey


def test_entropies():
    assert effective_slots(torch.full((4,), 0.25)) == pytest.approx(4)
    assert effective_slots(torch.tensor([1.0, 0, 0])) == pytest.approx(1)
    one = torch.randn(3, 1) @ torch.randn(1, 8)
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(3 * torch.eye(5, 9)).item() == pytest.approx(5)
    assert effective_rank(torch.zeros(3, 8)) == 0


@pytest.mark.parametrize("rule", ["gated", "convex", "delta"])
def test_a_survey_is_what_was_recorded(rule):
    model, ids = build(write_rule=rule, rotation="data_dependent"), text(50, rows=2)
    traces = record(model, ids).traces
    for index, found in survey(model, ids, times=3, segment=20).items():
        trace = traces[index]
        torch.testing.assert_close(found.write, trace.write)
        torch.testing.assert_close(found.read, trace.read)
        kept = trace.log_forget.exp()
        if rule == "delta":
            kept = kept * (1 - trace.beta[..., None] * trace.write**2)
        torch.testing.assert_close(found.keep, kept)
        assert found.times == [1, 10, 20, 21, 30, 40, 41, 46, 50]
        states = torch.stack(list(trace.states(found.times)), dim=1)
        torch.testing.assert_close(found.norms, states.norm(dim=-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.turn, trace.turn)
        strength = 1.0 if trace.beta is None else trace.beta
        torch.testing.assert_close(found.written, trace.items.norm(dim=-1) * strength)


def test_shares_are_of_what_is_written_and_read():
    """Three tokens and two slots, one head: by hand."""
    none = torch.zeros(0)
    found = LayerSurvey(
        write=torch.tensor([[[[0.5, 0.5]], [[-1.0, 0.0]], [[0.0, 0.0]]]]),
        read=torch.tensor([[[[0.0, 1.0]], [[0.5, -1.0]], [[1.0, 0.0]]]]),
        keep=torch.tensor([[[[0.5, 0.25]], [[0.5, 1.0]], [[0.5, 0.5]]]]),
        written=torch.tensor([[[2.0], [3.0], [1.0]]]),
        times=[1, 3],
        norms=torch.tensor([[[[2.0, 1.0]], [[4.0, 2.0]]]]),
        rank=none,
        retrieval=Retrieval([], none, none),
        turn=None,
    )
    assert found.write_share()[0].tolist() == pytest.approx([0.8, 0.2])  # 1 + 3 and 1
    # 0.5 · 3 + 1 · 4, and 1 · 1 + 1 · 1.5: at the second token norms are halfway between those on its sides.
    assert found.read_share()[0].tolist() == pytest.approx([5.5 / 8, 2.5 / 8])
    assert found.half_lives()[0].tolist() == pytest.approx([1, 1])  # an eighth is left after all three
    assert found.dead() == []


def test_the_half_life_of_a_corrected_slot_counts_what_writes_erase():
    """Of the first state of a slot, passed on through the recurrence, half is left after about as long."""
    model = build(write_rule="delta", min_half_life=50, max_half_life=500, num_slots=8, hcm_dim=32)
    trace = record(model, text(300)).traces[0]
    kept = trace.log_forget.exp()
    half_lives = survey(model, text(300))[0].half_lives()
    for head in range(2):
        state, left = torch.eye(8), []
        for token in range(300):
            write, beta = trace.write[0, token, head], trace.beta[0, token, head]
            state = kept[0, token, head][:, None] * state
            state = state - beta * torch.outer(write, write @ state)
            left.append(state.diagonal().abs())
        real = (torch.stack(left) > 0.5).sum(dim=0).double().clamp(min=1)
        forgotten = math.log(2) / -kept[0, :, head].log().mean(dim=0)  # by the forget gates alone
        error, error_without = ((x.double() / real).log().abs().mean() for x in (half_lives[head], forgotten))
        assert error < 0.5 * error_without


def test_half_lives_are_those_of_the_gates():
    model = build(use_gating=False, min_half_life=3, max_half_life=300)
    (found, _) = survey(model, text(40)).values()
    wanted = [3 * 100 ** (rank / 7) for rank in range(8)]
    assert sorted(found.half_lives().flatten().tolist()) == pytest.approx(wanted, rel=1e-3)


def test_constant_rotations_are_found():
    model = build(rotation="constant", rotation_base=100.0)
    (found, _) = survey(model, text(9)).values()
    assert found.turn[1].tolist() == pytest.approx([100 ** (-k / 6) for k in range(6)])


@pytest.mark.parametrize("what", ["write", "read"])
def test_a_slot_that_is_shut_is_reported_dead(what):
    model = build()
    layer = model.model.layers[1].mixer
    assert all(not one.dead() for one in survey(model, text(60)).values())
    head, slot, slots = 1, 2, 4
    index = head * slots + slot
    with torch.no_grad():
        if what == "write":  # its logits come after those of the forget gates
            layer.gating.weight[8 + index], layer.gating.bias[8 + index] = 0, -30
        else:
            layer.retrieval.read_proj.weight[index], layer.retrieval.read_bias[index] = 0, 0
    found = survey(model, text(60))
    assert found[1].dead() == [(head, slot)]
    assert found[0].dead() == []


def test_a_slot_that_is_read_seldom_is_not_dead():
    """Whatever tokens lie between the states that are looked at."""
    model = build()
    (found, _) = survey(model, text(60), times=3).values()
    found.read[..., 2] = 0
    assert found.dead() == [(0, 2), (1, 2)]
    found.read[:, 40, :, 2] = 60 * found.read.abs().mean()
    assert found.dead() == []


def test_the_loss_without_a_slot_is_that_of_a_model_that_cannot_read_it():
    model, ids = build(), text(30)[0]
    loss, rises = loss_without_slots(model, ids, layers=[1])
    assert rises.keys() == {1}
    assert loss == pytest.approx(model(ids[None], labels=ids[None]).loss.item(), rel=1e-5)
    retrieval = model.model.layers[1].mixer.retrieval
    with torch.no_grad():
        retrieval.read_proj.weight[6], retrieval.read_bias[6] = 0, 0  # head 1, slot 2
    without = model(ids[None], labels=ids[None]).loss.item()
    assert rises[1][1, 2].item() == pytest.approx(without - loss, abs=1e-6)
    assert abs(without - loss) > 1e-5
    assert loss_without_slots(model, ids, layers=[1])[1][1][1, 2].item() == pytest.approx(0, abs=1e-6)


def test_a_survey_costs_little_more_than_what_it_watches():
    """Twice a forward pass at most (docs/results/probes); three times here, where others run beside it."""
    model, _ = load_checkpoint(PRETRAINED)
    ids = torch.randint(2048, (1, 1024), generator=torch.Generator().manual_seed(0))

    def seconds(run):
        start = time.process_time()
        run()
        return time.process_time() - start

    with torch.no_grad():
        pairs = [(seconds(lambda: model.model(ids)), seconds(lambda: survey(model, ids))) for _ in range(6)]
    assert median(watched / plain for plain, watched in pairs[1:]) < 3


def test_a_long_text_takes_memory_for_its_gates_only():
    model = build(num_heads=1, num_slots=2, hcm_dim=128, num_layers=1)
    sizes = {n: peak_memory_of(lambda n=n: survey(model, text(n), segment=256)) for n in (512, 4096)}
    # write, read, keep, and the norm of what was written; items and keys would be 4 · 128 floats a token.
    grown = (sizes[4096] - sizes[512]) / (4096 - 512)
    assert grown < 2 * 4 * (3 * 2 + 1) + 64


# ------------------------------------------------------------------- sources


def test_answers_come_from_where_the_values_stand():
    """A small model that has learned to recall, and one that has not."""
    task = MQAR(length=16, vocab_size=24, num_kv_pairs=3)
    torch.manual_seed(0)
    config = {"hidden_dim": 32, "hcm_dim": 64, "num_layers": 1, "num_heads": 1, "num_slots": 4}
    model = HAMTForCausalLM(HAMTConfig(**config, vocab_size=24, intermediate_dim=0, conv_kernel_size=2))
    options = {"batch_size": 64, "num_steps": 250, "learning_rate": 0.02, "eval_interval": 250}
    assert train_on_task(model, task, seed=0, **options).final_accuracy > 0.9
    found = recall_sources(model.eval(), task, 40, seed=1)
    assert found["queries"] == 120
    assert found["accuracy"] > 0.9
    assert found["reach"] == 1
    assert found["hits"] > 0.95
    # By hand, as the task places queries: positions within one of the value, of those up to the query.
    inputs, targets = task.sample(40, torch.Generator().manual_seed(1))
    shares = []
    for row, query in (targets >= 0).nonzero().tolist():
        value = 1 + 2 * inputs[row, 1:6:2].tolist().index(int(targets[row, query]))
        shares.append((min(value + 1, query) - value + 2) / (query + 1))
    assert found["chance"] == pytest.approx(sum(shares) / len(shares), abs=0.02)
    assert sum(found["distances"].values()) == round(found["accuracy"] * 120)
    assert found["exact"] == found["distances"][0] / sum(found["distances"].values())


# ------------------------------------------------------------------- command


def test_the_command_writes_figures_pictures_and_a_page(tmp_path, capsys):
    text = "Fellow citizens, </script><b>the state of the Union is strong & growing." * 3
    assert main(["analyze", "--text", text, "--output_dir", str(tmp_path)]) == 0
    assert "wrote" in capsys.readouterr().out
    results = json.loads((tmp_path / "analysis_results.json").read_text())
    layer = results["layers"]["0"]
    assert {"commit", "torch"} <= results["environment"].keys()
    assert len(layer["half_life_tokens"]) == len(layer["loss_without"]) == 4
    assert layer["retrieval"]["lag"][0] == 0
    assert np.array(layer["norms"]).shape == (len(layer["after_tokens"]), 4, 16)
    assert len(layer["write_gate_of_the_end"]) == len(results["tokens_of_the_end"]) == results["tokens"]
    asked = layer["held"]
    assert [row["back"] for row in asked] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert asked[0]["cosine"] > 0.8 > asked[0]["chance_theory"]
    assert asked[0]["rank"] == 0
    assert asked[0]["nearest"][0] == {"token": asked[0]["token"], "back": 0, "cosine": asked[0]["cosine"]}
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"memory_evolution", "slots", "retrieval", "gates", "contributions_layer_3"} <= pictures
    page = (tmp_path / "dashboard.html").read_text()
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in words.replace("http-equiv", ""), "nothing is fetched"
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert "<!--" not in page


def test_pages_show_the_end_of_a_long_text():
    """Sources, gates and what is held are those of the last tokens, each under its own word."""
    model, tokenizer = load_checkpoint(PRETRAINED)
    ids = torch.tensor(
        tokenizer("The people of the United States expect the Congress to act. " * 30).input_ids
    )
    found = analyse(model, tokenizer, ids, silence=False)
    assert len(ids) > TRACED == len(found.tokens)
    trace = record(model, ids[None]).traces[2]
    assert found.write[2][-1] == pytest.approx(trace.write[0, -1].abs().mean().item(), rel=1e-4)
    shares = contributions(trace, [len(ids) - 1]).tokens[0, 0].mean(dim=0)
    position, share = found.sources[2][-1][0]
    assert len(ids) - TRACED + position == int(shares.argmax())
    assert share == pytest.approx(shares.max().item(), abs=1e-3)
    picture = found.figures["contributions_layer_2"].axes[0]
    drawn = picture.images[0].get_array()
    assert drawn[-1, -1] == pytest.approx(shares[-1].item(), abs=1e-3)
    assert picture.get_xticklabels()[-1].get_text() == found.tokens[-1]


def test_tokens_are_words_and_no_formulas(tmp_path):
    """A lone pair of dollars is no formula, and a script that the font lacks no warning."""
    names = ["$$", "${\\foo}$", "漢", "🙂"]
    save_figure(tmp_path / "a.png", contribution_matrix(np.eye(4), names, "words"))
    save_figure(tmp_path / "b.png", gates_over_text(names, {"layer": np.ones(4)}, "all tokens"))
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_mistakes_end_in_a_line(tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    for arguments, message in (
        (["--text", ""], "at least two tokens"),
        (["--text", "  \n"], "at least two tokens"),
        (["--text", str(tmp_path / "latin")], f"give it with --file {tmp_path / 'latin'}"),
        (["--text", "a b c", "--file", "x"], "not both"),
        (["--file", str(tmp_path / "none")], "no text"),
        (["--file", str(tmp_path / "latin")], "not UTF-8"),
        (["--max_tokens", "1"], "at least 2"),
        (["--demo", "--text", "a b"], "--demo has its own"),
        (["--checkpoint", str(tmp_path)], "config.json"),
    ):
        assert main(["analyze", *arguments, "--output_dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_tokens_are_shown_with_their_spaces():
    class Tokenizer:
        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    def texts(written: bytes):
        return token_texts(Tokenizer(), torch.tensor(list(written)))

    assert texts(b"a \n") == ["a", "·", "↵"]
    assert texts("é🙂x".encode()) == ["…", "é", "…", "…", "…", "🙂", "x"]
    assert texts("é".encode()[1:] + b"xy") == ["…", "x", "y"], "a text may begin within a character"
    assert texts(b"\xff" * 5) == ["…", "…", "…", "∅", "…"]
    assert texts(b"") == []
