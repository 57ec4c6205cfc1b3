"""One token of a model with its state as plain tensors: what is exported.

    (input_ids, past.num_tokens, past.layers.0.slots, …)
        -> (logits, present.num_tokens, present.layers.0.slots, …)

What comes out under a name with ``present`` goes in under the same name with ``past`` with the next
token. A state of zeros has read nothing. The names behind the first word are those of
``HAMTCache.to_tensors``, and of the files that ``HAMTCache.save`` writes, so that a text which
PyTorch has read can be continued elsewhere.

Shape legend: B batch, V vocab_size.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamt import __version__
from hamt.batch import Batch, Past
from hamt.cache import HAMTCache
from hamt.errors import UserError, reason
from hamt.mixers import State
from hamt.model import HAMTForCausalLM

FORMAT = "hamt-step-1"
PAST, PRESENT, COUNT = "past.", "present.", "num_tokens"
DTYPES = {torch.float32: "float32", torch.int64: "int64"}
BATCH = 2  # rows of the tensors that are traced, which stand for any number

# What computes an exported step: all inputs in order -> all outputs in order.
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Value(NamedTuple):
    """An input or output: its name, the shape of one row, and what its numbers are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def zeros(self, rows: int) -> Tensor:
        """A state that has read nothing, or padding."""
        return torch.zeros(rows, *self.shape, dtype=self.dtype)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        shape = ["batch", *self.shape]
        return {"name": self.name, "shape": shape, "dtype": DTYPES[self.dtype]}


class Step(nn.Module):
    """The module that is exported. ``model`` itself becomes float32, and is set to evaluation.

    Raises:
        UserError: if the state of a layer grows with the text.
    """

    def __init__(self, model: HAMTForCausalLM) -> None:
        super().__init__()
        self.model = model.float().eval()
        self.state = [Value(COUNT, (), torch.int64)]
        self.owners: list[tuple[int, str]] = []  # layer and name of each tensor behind the first
        for index, (block, name) in enumerate(
            zip(model.model.layers, model.config.layer_mixers, strict=True)
        ):
            for part, shape in block.mixer.state_shapes().items():
                if 0 in shape:
                    raise UserError(
                        f"layer {index} is {name!r}, whose state grows with the text: only models "
                        "whose state has a fixed size can be exported"
                    )
                self.state.append(Value(f"layers.{index}.{part}", shape))
                self.owners.append((index, part))

    @property
    def inputs(self) -> list[Value]:
        """What goes in, in order."""
        ids = Value("input_ids", (1,), torch.int64)
        return [ids, *(each._replace(name=PAST + each.name) for each in self.state)]

    @property
    def outputs(self) -> list[Value]:
        """What comes out, in order."""
        logits = Value("logits", (1, self.model.config.vocab_size))
        return [logits, *(each._replace(name=PRESENT + each.name) for each in self.state)]

    def forward(self, input_ids: Tensor, num_tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(B, 1), (B,) and the state -> logits (B, 1, V), (B,) and the state."""
        body = self.model.model
        before: list[State] = [{} for _ in body.layers]
        for (index, name), x in zip(self.owners, state, strict=True):
            before[index][name] = self._begun(index, name, x, num_tokens)
        hidden_states, after = body.embed_tokens(input_ids), []
        batch = Batch.of(past=Past(num_tokens))
        for layer, known in zip(body.layers, before, strict=True):
            hidden_states, new, _ = layer(hidden_states, batch, known)
            after.append(new)
        logits = self.model.lm_head(body.norm(hidden_states))
        return logits, num_tokens + 1, *(after[index][name] for index, name in self.owners)

    def _begun(self, index: int, name: str, x: Tensor, num_tokens: Tensor) -> Tensor:
        """A tensor of the state; before the first token zeros stand for a position of all ones."""
        identity = 0.0
        if name == "position_key":
            identity = self.model.model.layers[index].mixer.memory.algebra.identity
        if identity == 0:
            return x
        return x.where(num_tokens.view(-1, *[1] * (x.ndim - 1)) > 0, identity)

    def describe(self) -> dict[str, Any]:
        """Names, shapes and kinds of all that goes in and comes out, as plain data."""
        return {
            "format": FORMAT,
            "hamt": __version__,
            "inputs": [each.describe() for each in self.inputs],
            "outputs": [each.describe() for each in self.outputs],
        }


def empty_state(step: Step, rows: int) -> list[Tensor]:
    """The state tensors of ``rows`` texts of which nothing has been read."""
    return [each.zeros(rows) for each in step.state]


def state_of(step: Step, cache: HAMTCache) -> list[Tensor]:
    """The state tensors of what a model has read in PyTorch.

    Raises:
        ValueError: if nothing has been read, or by another model.
    """
    tensors = cache.to_tensors()
    found = [tensors.get(each.name) for each in step.state]
    for each, x in zip(step.state, found, strict=True):
        if x is None or tuple(x.shape[1:]) != each.shape:
            raise ValueError(f"this state is empty or another model's: it has no {each.name}")
    return [x.to(each.dtype) for each, x in zip(step.state, found, strict=True) if x is not None]


@torch.no_grad()
def export_program(step: Step) -> torch.export.ExportedProgram:
    """The graph of a step for any number of rows, of PyTorch's own operators.

    Raises:
        UserError: if a part of the model cannot be traced, as one of the user's own may not.
    """
    batch = torch.export.Dim("batch", min=1)
    arguments = tuple(each.zeros(BATCH) for each in step.inputs)
    dynamic = ({0: batch}, {0: batch}, tuple({0: batch} for _ in step.owners))
    try:
        with quiet():
            program = torch.export.export(step, arguments, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever it trips over
        raise UserError(f"this model cannot be exported: {reason(error)}") from error
    own = sorted({str(x.target) for x in program.graph.nodes if "hamt" in str(x.target)})
    assert not own, f"operators that exist in HAMT only: {own}"
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of what no user of them can change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run_eagerly(step: Step) -> Run:
    """The step itself as PyTorch runs it, with all that makes it faster there."""

    @torch.no_grad()
    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return step(*tensors)

    return run


def read_tokens(
    step: Step, run: Run, ids: Tensor, state: Sequence[Tensor] | None = None
) -> Iterator[Sequence[Tensor]]:
    """Read tokens (B, N) one by one.

    Yields:
        All outputs of each, in the order of ``step.outputs``.
    """
    known = empty_state(step, len(ids)) if state is None else list(state)
    for token in ids.split(1, dim=1):
        outputs = run([token, *known])
        known = list(outputs[1 : len(step.state) + 1])
        yield outputs
