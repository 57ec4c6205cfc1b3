"""The model card of a trained model: the ``README.md`` beside its weights."""

from pathlib import Path

from hamt.training.held_out import Loss
from hamt.training.loop import TrainingResult
from hamt.training.plan import Plan

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- hamt
---

# {name}

A HAMT language model. Where its token mixer is a holographic memory of fixed size, a token costs
the same and the state has the same size at any context length.

| | |
|---|---|
| parameters | {parameters:,} |
| mixers of tokens | {mixers} |
| tokenizer | {tokenizer}, {vocab_size:,} tokens |
| trained on | {corpus}: {train_tokens:,} tokens; {tokens:,} were read in {steps:,} steps |
| held-out loss | {held_out} |
| scored | {held_out_tokens:,} held-out tokens, each once, in blocks of {length}, nothing padded |

{before} It knows what stands in that text, and writes in its manner.

```python
import hamt
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```
"""


def model_card(plan: Plan, result: TrainingResult[Loss], final: Loss | None) -> str:
    """What the ``README.md`` in the run's folder says."""
    folder, start = Path(plan.options.output_dir), plan.options.init_from
    return CARD.format(
        name=folder.name,
        parameters=plan.model.num_parameters(),
        mixers=plan.model.model.mixer_summary(),
        tokenizer=plan.options.tokenizer or ("as before" if start else "byte-level BPE"),
        before=f"It started from {start}." if start else "It has been trained on nothing else.",
        vocab_size=len(plan.tokenizer),
        corpus=plan.corpus.name,
        train_tokens=len(plan.corpus.train),
        tokens=result.tokens,
        steps=result.steps,
        held_out="not measured, the run was stopped" if final is None else final,
        held_out_tokens=len(plan.corpus.held_out) - 1,
        length=plan.options.max_length,
        folder=folder,
    )
