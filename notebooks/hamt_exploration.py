# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # HAMT by hand
#
# A holographic memory superposes many items in one vector and gives each back under its key.
# This notebook goes from binding two vectors to a language model that one can look into.
# It runs on a laptop in under three minutes and needs no network.
# In a clone of HAMT run `make setup`, `venv/bin/pip install -e ".[notebook]"`, and then
# `venv/bin/jupyter notebook notebooks/hamt_exploration.ipynb`.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from transformers.utils import logging

from hamt import HAMTConfig, HAMTModel, HolographicMemory
from hamt.memory.algebra import similarity

logging.disable_progress_bar()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. Binding and unbinding
#
# A key is a random member of an algebra: here it is a vector of phases, angles that each rotate a
# pair of the item's features.
# Binding an item to a key keeps the item's norm and makes it look like noise.
# Unbinding with the same key undoes this exactly.

# %%
memory = HolographicMemory(hcm_dim=1024, num_slots=1, binding_type="phasor")
item, key = torch.randn(1024), memory.algebra.random_keys(512)
bound = memory.bind(item, key)
print(f"norm of the item {item.norm():.2f}, bound {bound.norm():.2f}")
print(f"cosine of item and bound:    {similarity(item, bound):.3f}")
print(f"cosine of item and unbound:  {similarity(item, memory.unbind(bound, key)):.3f}")
other = memory.algebra.random_keys(512)
print(f"... unbound with another key: {similarity(item, memory.unbind(bound, other)):.3f}")
assert torch.allclose(memory.unbind(bound, key), item, atol=1e-4)

# %% [markdown]
# ## 2. Superposition: one slot and eight
#
# A *slot* is one vector to which bound items are added.
# Of n items in one slot each comes back with a cosine of about 1/√n, since the others are noise.
# Spread over eight slots, an item shares its slot with an eighth of the others, and comes back with
# √8 times the cosine.
#
# Eight slots are eight times the memory, though.
# With 8 slots of 128 features, as large as 1 of 1,024, the cosine is as high, but so is what chance
# gives: a random vector of 128 features has a cosine of 1/√128 with another.
# In units of that chance one slot and eight tell the same number of items apart.
# What several slots do give at equal size is memory that forgets at several speeds, between which
# the model can choose.


# %%
def mean_cosine(num_slots: int, dim: int, num_items: int, repeats: int = 5) -> float:
    """Mean cosine of what comes back with what was stored, each item written to one slot in turn."""
    memory = HolographicMemory(hcm_dim=dim, num_slots=num_slots)
    found = []
    for _ in range(repeats):
        state = memory.initial_state()
        items = torch.randn(num_items, 1, 1, dim)
        keys = memory.algebra.random_keys(num_items, 1, 1, memory.key_size)
        slots = torch.nn.functional.one_hot(torch.arange(num_items) % num_slots, num_slots).float()[:, None, None]
        for item, key, slot in zip(items, keys, slots, strict=True):
            state = memory.write(state, item, key, write=slot)
        for item, key, slot in zip(items, keys, slots, strict=True):
            found.append(similarity(item, memory.retrieve(state, key, read=slot)).item())
    return float(np.mean(found))


counts = [1, 2, 5, 10, 20, 40]
curves = {
    "1 slot of 1,024": [mean_cosine(1, 1024, n) for n in counts],
    "8 slots of 1,024 (8 times the memory)": [mean_cosine(8, 1024, n) for n in counts],
    "8 slots of 128 (equal memory)": [mean_cosine(8, 128, n) for n in counts],
}
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for (name, values), style in zip(curves.items(), ("o-", "s-", "D--"), strict=True):
    axes.plot(counts, values, style, label=name)
axes.plot(counts, [n**-0.5 for n in counts], "k:", label="theory for one slot, 1/√n")
axes.set_xscale("log")
axes.set_xlabel("items stored")
axes.set_ylabel("cosine with what was stored")
axes.set_ylim(0, 1.05)
axes.legend(fontsize="small", loc="lower left")
display(figure)
plt.close(figure)
for name, values in curves.items():
    features = int(name.split(" of ")[1].split()[0].replace(",", ""))
    print(f"{name}: 40 items {values[-1]:.3f}, {values[-1] * features**0.5:.1f} times what chance gives")
assert abs(curves["1 slot of 1,024"][1] - 2**-0.5) < 0.05

# %% [markdown]
# ## 3. A whole model
#
# In the model keys, items and gates are learned from data. `HAMTModel` is a causal language model
# of Transformers.

# %%
config = HAMTConfig(hidden_dim=128, num_layers=2, num_slots=8, vocab_size=1000)
model = HAMTModel(config)
ids = torch.randint(1000, (2, 64))
output = model(ids, labels=ids)
print(model.model.layers[0].mixer.memory)
print(f"{model.num_parameters():,} parameters; logits {tuple(output['logits'].shape)}; loss {output['loss']:.3f}")
print(f"a model that knows nothing: {np.log(1000):.3f}")

# %% [markdown]
# ## 4. Inside a trained memory
#
# HAMT comes with a small model trained on two centuries of State of the Union addresses.
# `survey` reads a text and measures every slot: its norm while the text is read, how long it keeps
# what was written, and which share of the writing and reading it gets.

# %%
from hamt.analysis.contributions import contributions
from hamt.analysis.pictures import contribution_matrix, memory_evolution
from hamt.analysis.record import record
from hamt.analysis.survey import survey
from hamt.analysis.tokens import token_texts
from hamt.checkpoint import PRETRAINED, load_checkpoint

trained, tokenizer = load_checkpoint(PRETRAINED)
text = "The state of the Union is strong. The Congress of the United States has the power to act, and the people of the United States expect it to act."
prompt = torch.tensor(tokenizer(text).input_ids)
layers = survey(trained, prompt[None])
for index, layer in layers.items():
    half_lives = layer.half_lives().flatten()
    print(
        f"layer {index}: half-lives {half_lives.min():.1f} to {half_lives.max():.0f} tokens, "
        f"cosine of a write read back at once {layer.retrieval.right[0]:.2f}, dead slots {len(layer.dead())}"
    )
display(memory_evolution(layers))

# %% [markdown]
# From where does a token's read-out come?
# With the keys and gates that the text had this is known exactly: the shares of all earlier
# positions add up to one.
# (After the short convolution a position is a mixture of its token and the few before it.)

# %%
trace = record(trained, prompt[None]).traces[3]
shares = contributions(trace, range(len(prompt)))
print("sums of the shares:", shares.sum()[0, :3, 0].tolist())
display(contribution_matrix(shares.tokens[0].mean(dim=1).numpy(), token_texts(tokenizer, prompt), "layer 3, mean of heads"))
assert torch.allclose(shares.sum(), torch.ones(()), atol=1e-3)

# %% [markdown]
# ## 5. Writing
#
# The state is all that the model keeps of a text, and it is as large after ten tokens as after ten
# thousand.

# %%
from hamt import HAMTCache

torch.manual_seed(1)
start = tokenizer("Fellow citizens, the state of the Union is", return_tensors="pt")
written = trained.generate(**start, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(written[0]))
cache = HAMTCache(trained.config.num_layers)
sizes = []
with torch.no_grad():
    for length in (10, 1000):
        trained(torch.randint(2048, (1, length)), past_key_values=cache)
        sizes.append(sum(state["slots"].nbytes for state in cache.states))
print(f"bytes of memory after 10 and 1,010 tokens: {sizes}")
assert sizes[0] == sizes[1]

# %% [markdown]
# ## 6. What a token costs
#
# Here is what a token costs by formula, and then by the clock.
# Attention compares each token with all before it; the memory does the same amount of work for
# every token.
# The measured comparison of whole models is in `docs/results/bench`.

# %%
from hamt.utils import compute_flops_per_token

base = HAMTConfig(hidden_dim=256, num_layers=4, vocab_size=1000)
for length in (512, 2048, 8192, 32768):
    found = compute_flops_per_token(base, seq_len=length)
    print(
        f"{length:>6} tokens: HAMT {found['hamt_gflops']:.4f} GFLOP a token, a transformer {found['standard_gflops']:.4f}"
    )

lengths, seconds = [256, 512, 1024, 2048, 4096], []
with torch.no_grad():
    for length in lengths:
        tokens = torch.randint(2048, (1, length))
        trained.model(tokens)
        start_time = time.perf_counter()
        for _ in range(3):
            trained.model(tokens)
        seconds.append((time.perf_counter() - start_time) / 3)
slope = np.polyfit(np.log(lengths), np.log(seconds), 1)[0]
print({length: f"{1000 * s:.1f} ms" for length, s in zip(lengths, seconds, strict=True)})
print(f"time grows as the {slope:.2f}th power of the length (1 is linear)")
