"""Configurations by Hypothesis: what validates is built, trained a step, decoded, saved, loaded."""

import dataclasses
import math
import tempfile
from collections.abc import Iterator

import torch
from fuzz.sandbox import Case
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hamt import HAMTConfig, HAMTModel
from hamt.config_values import CHOICES
from hamt.memory import ALGEBRAS
from hamt.mixers import MIXERS

TOKENS = st.none() | st.integers(-1, 80)
NAMES = st.sampled_from([*MIXERS])
EXAMPLES = 8  # of a case
ODD = st.sampled_from([0.0, 1.0, -1.0, 1e-40, 1e-8, 1e8, 1e30, 1e38, math.inf, math.nan, 2, -3])
SMALL = {
    "vocab_size": st.integers(0, 70), "hidden_dim": st.integers(0, 40),
    "hcm_dim": st.none() | st.integers(0, 64), "num_layers": st.integers(0, 3),
    "num_slots": st.integers(0, 9), "num_heads": st.integers(0, 5),
    "chunk_size": st.integers(-1, 40), "conv_kernel_size": st.integers(-1, 6),
    "attention_head_dim": st.none() | st.integers(0, 16),
    "intermediate_dim": st.none() | st.integers(-1, 40),
    "max_position_embeddings": st.integers(0, 40),
    "binding_type": st.sampled_from([*ALGEBRAS, "xor"]),
    "mixers": st.none() | NAMES | st.lists(NAMES, max_size=3),
    "bos_token_id": TOKENS, "pad_token_id": TOKENS,
    "eos_token_id": TOKENS | st.lists(st.integers(0, 80), max_size=2),
    **{name: st.sampled_from([*table]) for name, table in CHOICES.items()},
}  # fmt: skip
FITTING = {
    "vocab_size": st.just(50), "hidden_dim": st.sampled_from([8, 16, 32]),
    "num_heads": st.sampled_from([1, 2]), "hcm_dim": st.sampled_from([None, 16, 32]),
    "num_layers": st.integers(1, 2), "num_slots": st.integers(1, 5),
}  # fmt: skip


def strategies() -> dict[str, st.SearchStrategy]:
    """One for each field: small sizes, choices, and numbers of every magnitude."""
    found = {}
    for field in dataclasses.fields(HAMTConfig):
        if field.name not in HAMTConfig.__annotations__:
            continue
        if field.name in SMALL:
            found[field.name] = SMALL[field.name]
        elif isinstance(field.default, bool):
            found[field.name] = st.booleans()
        elif isinstance(field.default, float):
            found[field.name] = ODD | st.floats(0, 1) | st.floats() | st.just(field.default)
    return found


@st.composite
def configurations(draw) -> dict:
    """Fields that fit together, and some that are drawn at will."""
    fields = {name: draw(strategy) for name, strategy in FITTING.items()}
    at_will = strategies()
    for name in draw(st.lists(st.sampled_from([*at_will]), max_size=5, unique=True)):
        fields[name] = draw(at_will[name])
    return fields


def survives(fields: dict) -> None:
    """Everything that is done with a model.

    Raises:
        AssertionError: if a model that validates does not do it.
    """
    try:
        config = HAMTConfig(**fields)
    except (ValueError, StrictDataclassError):
        return
    torch.manual_seed(0)
    model = HAMTModel(config)
    ids = torch.randint(config.vocab_size, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = model.train()(ids, labels=ids).loss
        assert loss.isfinite(), f"loss {loss}"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    written = model.generate(ids[:, :3], max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 3
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = HAMTModel.from_pretrained(folder).eval()
        # Weights of a file lie elsewhere in memory, which may change the last bit of a product.
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def case(number: int) -> Case:
    """A few examples from one seed; Hypothesis reports the smallest that fails."""

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(configurations())
    def examples(fields):
        survives(fields)

    return Case(f"--part configurations --seed {number}", lambda: examples(), limit=90.0)


def cases(first: int) -> Iterator[Case]:
    """Cases without end."""
    while True:
        yield case(first)
        first += 1
