"""What benchmarks stand on: a rival that differs in the mixer alone, counted work, fair timing."""

import time
from functools import partial

import pytest
import torch
from model_inputs import assert_close, gradients, random_ids, tiny_config

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.baselines import transformer as rivals
from hamt.baselines.catalogue import non_embedding_parameters, with_parameters
from hamt.environment import environment
from hamt.measure import timing
from hamt.measure.flops import count_flops


def rival(core: str = "sdpa", short_convolution: bool = False, **options) -> HAMTForCausalLM:
    """A rival of the tiny model, with two heads and loud enough for its mixers to be heard."""
    config = tiny_config(hidden_dim=64, initializer_range=0.2, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = rivals.transformer(config, core=core, short_convolution=short_convolution)
        for block in model.model.layers:
            torch.nn.init.normal_(block.mixer.output_proj.weight, std=0.25)
    return model.eval()


def changed_logits(model: HAMTForCausalLM, place: int = 5) -> torch.Tensor:
    """Positions (N,) whose logits change when the token at ``place`` does."""
    ids = random_ids(1, 12)
    other = ids.clone()
    other[0, place] = ids[0, place] % 96 + 1
    difference = (model(ids).logits - model(other).logits).abs().amax(dim=-1)[0]
    return difference > 1e-5


@pytest.mark.parametrize("core", ["sdpa", "eager"])
@pytest.mark.parametrize("short_convolution", [False, True])
def test_transformer_sees_its_past_and_no_future(core, short_convolution):
    changed = changed_logits(rival(core, short_convolution))
    assert changed.tolist() == [False] * 5 + [True] * 7


def test_ceiling_does_not_mix_tokens():
    assert changed_logits(rival("none")).nonzero().tolist() == [[5]]


def test_ceiling_with_short_convolution_reaches_as_far_as_it():
    changed = changed_logits(rival("none", short_convolution=True, num_layers=1))
    assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(("hidden_dim", "num_layers"), [(32, 1), (96, 3), (384, 7)])
@pytest.mark.parametrize("short_convolution", [False, True])
def test_parameters_are_matched(hidden_dim, num_layers, short_convolution):
    sizes = {"hidden_dim": hidden_dim, "num_layers": num_layers, "vocab_size": 64}
    config = HAMTConfig(**sizes)
    with torch.device("meta"):
        ours = HAMTForCausalLM(config)
        options = {**sizes, "short_convolution": short_convolution}
        theirs = with_parameters("transformer", ours.num_parameters(), **options)
    target = non_embedding_parameters(ours)
    assert target == ours.num_parameters() - 64 * hidden_dim
    assert abs(non_embedding_parameters(theirs) / target - 1) < 0.005


def test_ceiling_has_the_parameters_of_the_transformer():
    ceiling, transformer = (rival(core).state_dict() for core in ("none", "sdpa"))
    assert {k: x.shape for k, x in ceiling.items()} == {k: x.shape for k, x in transformer.items()}


def test_sdpa_equals_eager():
    ids = random_ids(2, 33)
    assert_close(rival("sdpa")(ids).logits, rival("eager")(ids).logits, 1e-5)


@pytest.mark.parametrize("core", ["sdpa", "eager", "none"])
@pytest.mark.parametrize("short_convolution", [False, True])
def test_every_parameter_gets_a_gradient(core, short_convolution):
    model, ids = rival(core, short_convolution).train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(model).items():
        unused = core == "none" and ("query_proj" in name or "key_proj" in name)
        assert (gradient.abs().max() > 0) != unused, name


def test_its_maps_are_initialised_by_the_rule_of_the_model():
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=128, num_layers=3, vocab_size=64)
    model = rivals.transformer(config, short_convolution=True)
    for block in model.model.layers:
        mixer = block.mixer
        for each in (mixer.query_proj, mixer.key_proj, mixer.value_proj):
            assert each.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert mixer.output_proj.weight.std().item() == pytest.approx((6 * 128) ** -0.5, rel=0.05)
        assert torch.equal(mixer.conv.weight[-1], torch.ones(128))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="core must be one of"):
        rivals.transformer(tiny_config(), core="flash")
    with pytest.raises(ValueError, match="divide hidden_dim = 40; got 32"):
        rivals.transformer(tiny_config(hidden_dim=40))
    with pytest.raises(ValueError, match="conv_kernel_size"):
        rivals.transformer(tiny_config(conv_kernel_size=0), short_convolution=True)


def test_flops_of_attention_are_those_of_its_causal_half():
    """The same model with the core in eager form has all N² scores counted by torch itself."""
    ids, length, width, layers = random_ids(2, 16), 16, 64, 2
    found = {}
    for core in ("sdpa", "eager", "none"):
        model = rival(core)
        found[core] = count_flops(lambda model=model: model(ids, labels=ids).loss.backward())
    assert found["eager"] - found["none"] == 3 * layers * 2 * (4 * length**2 * width)
    causal = 4 * width * length * (length + 1) // 2
    assert found["sdpa"] - found["none"] == 3 * layers * 2 * causal


def test_flops_count_the_einsum_of_the_memory():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    assert count_flops(lambda: torch.einsum("bij,bjk->bik", a, b)) == 2 * 3 * 4 * 5 * 6


def test_interleave_shuffles_the_order_and_drops_the_warmup():
    calls: list[str] = []
    timings = timing.interleave({name: partial(calls.append, name) for name in "abc"}, 20, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 63, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert len(set(rounds)) == 6
    assert [len(timings[name].times_s) for name in "abc"] == [20] * 3


def test_short_calls_are_measured_more_often():
    brief = timing.interleave({"a": lambda: None}, 3, least=10.0)
    assert len(brief["a"].times_s) == timing.MAX_ROUNDS, "a second of nothing would take all day"
    nap = partial(time.sleep, 0.02)
    napping = timing.interleave({"a": nap, "b": nap}, 2, least=0.15)
    assert 3 <= len(napping["a"].times_s) == len(napping["b"].times_s) <= 4
    assert len(timing.interleave({"a": lambda: None}, 40, least=10.0)["a"].times_s) == 40


def test_ratios_are_taken_within_a_round():
    """One slow round slows both: a ratio of medians would not see that their ratio is constant."""
    assert timing.paired_ratio([2, 20, 6], [1, 10, 3]) == (2, 2, 2)
    assert timing.spread(range(1, 10)) == (3, 5, 7)
    assert timing.spread([1, 2, 3, 4, 5]) == (1, 3, 5)
    assert timing.timing(range(1, 10))[:2] == (5, (3, 7))


def test_header_names_the_machine_and_the_commit():
    header = environment()
    assert all(
        header[name] for name in ("hamt", "torch", "transformers", "python", "processor", "date")
    )
    assert header["cores"] >= 1
    assert header["threads"] == torch.get_num_threads()
    assert {"commit", "omp_wait_policy", "load_average"} <= header.keys()
