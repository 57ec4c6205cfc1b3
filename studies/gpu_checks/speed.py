"""How fast recipes train and models decode, and what they need: HAMT beside its transformer.

Both have the same parts, the same number of parameters, and bfloat16 under autocast in training. A
model that does not fit is measured with half as many rows.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.baselines.catalogue import with_parameters
from hamt.measure.timing import interleave
from hamt.options import parse
from hamt.peak_memory import call_peak_memory
from hamt.training.optim import build_optimizers
from hamt.training.options import SIZES, TrainOptions

from .agreement import only

RECIPES = ("100M", "50M", "a100")
VOCABULARY = 50_257  # GPT-2's
# What is measured, and what computes the mixers of tokens in it.
FORMS = {"hamt, fla": "fla", "transformer, FlashAttention": None, "hamt, chunked": "chunked"}
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """How much is done: ``rows`` in training, tokens of a text that is read, and written."""

    rows: int = 32
    context: int = 512
    steps: int = 32
    decoded_rows: tuple[int, ...] = (1, 64)
    rounds: int = 10
    warmup: int = 3
    backend: str = "inductor"


TINY = Scale(
    rows=1, context=9, steps=2, decoded_rows=(1, 2), rounds=1, warmup=0, backend="aot_eager"
)


class Clock:
    """The seconds that are left; what runs when they are over is interrupted."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Not above zero when it is over."""
        return self.end - time.monotonic()

    @contextmanager
    def limit(self, share: float = 1.0) -> Iterator[None]:
        """A context that ends, with a TimeoutError, after this share of what is left."""

        def ring(*_: object) -> None:
            raise TimeoutError("no time was left")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(share * self.left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def configuration(recipe: str, tiny: bool) -> HAMTConfig:
    """That of a recipe; a tiny one has its choices, and next to no size."""
    options = parse(TrainOptions, ["--config", recipe], "train")
    fields = {**(SIZES[options.size] if options.size else {}), **options.architecture()}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": options.max_length}
    if tiny:
        fields |= {"hidden_dim": 32, "hcm_dim": 32, "num_heads": 2, "num_layers": 1}
        sizes = {"vocab_size": 97, "max_position_embeddings": 17}
    return HAMTConfig(**{**fields, **sizes}, use_cache=False)


def build(config: HAMTConfig, name: str, device: str) -> HAMTForCausalLM:
    """One of ``FORMS``, with as many parameters as HAMT has."""
    torch.manual_seed(0)
    model = HAMTForCausalLM(config)
    if FORMS[name] is None:
        fields = ("hidden_dim", "num_layers", "vocab_size", "max_position_embeddings", "use_cache")
        sizes = {field: getattr(config, field) for field in fields}
        model = with_parameters("transformer", model.num_parameters(), **sizes)
    return model.to(device)


def computing(name: str) -> AbstractContextManager[None]:
    """A context in which models compute as the name says."""
    form = FORMS[name]
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if form is None else only(form)


def fitting(call: Callable[[int], T], rows: int) -> T | None:
    """``call`` with as many rows as fit; None if a single one does not."""
    while rows:
        try:
            return call(rows)
        except torch.OutOfMemoryError:
            rows //= 2
        torch.cuda.empty_cache()
    return None


def training(
    config: HAMTConfig, name: str, device: str, scale: Scale, backend: str | None = None
) -> dict[str, Any]:
    """Steps of training, compiled if there is a ``backend``: tokens a second, and peak memory."""

    def measure(rows: int) -> dict[str, Any]:
        model = build(config, name, device).train()
        run = model if backend is None else torch.compile(model, dynamic=False, backend=backend)
        optimizers = build_optimizers(
            model, "muon", learning_rate=1e-4, weight_decay=0.1, eps=1e-10
        )
        length = config.max_position_embeddings
        ids = torch.randint(config.vocab_size, (rows, length), device=device)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = run(ids, labels=ids, return_logits=False).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        timed = interleave({name: step}, scale.rounds, scale.warmup)[name]
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        return {
            "parameters": model.num_parameters(),
            "rows": rows,
            "length": length,
            "tokens_per_second": ids.numel() / timed.median_s,
            "seconds": timed._asdict(),
            "peak_bytes": before + call_peak_memory(step, device),
        }

    if backend is not None:
        torch._dynamo.reset()
    return fitting(measure, scale.rows) or {"left_out": "a single row does not fit"}


@torch.no_grad()
def decoding(config: HAMTConfig, name: str, device: str, scale: Scale, rows: int) -> dict[str, Any]:
    """Tokens a second, written after a text, with weights in bfloat16; reading it is timed, too."""
    model = build(config, name, device).to(torch.bfloat16).eval()

    def measure(rows: int) -> dict[str, Any]:
        ids = torch.randint(config.vocab_size, (rows, scale.context), device=device)

        def read() -> Any:
            return model(ids, use_cache=True, logits_to_keep=1).past_key_values

        state = read()

        def write() -> None:
            token, cache = ids[:, -1:], state.fork()
            for _ in range(scale.steps):
                logits = model(token, past_key_values=cache, logits_to_keep=1).logits
                token = logits.argmax(dim=-1)

        calls = {"read": read, "write": write}
        timed = interleave(calls, scale.rounds, scale.warmup)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        return {
            "rows": rows,
            "context": scale.context,
            "steps": scale.steps,
            "read_tokens_per_second": ids.numel() / timed["read"].median_s,
            "tokens_per_second": rows * scale.steps / timed["write"].median_s,
            "seconds": {each: timing._asdict() for each, timing in timed.items()},
            "peak_bytes": before + call_peak_memory(write, device),
        }

    return fitting(measure, rows) or {"left_out": "a single row does not fit"}


def measurements(device: str, scale: Scale, tiny: bool, clock: Clock) -> Iterator[dict[str, Any]]:
    """All that is measured, the most wanted first; what there is no time for says so."""
    plans: list[tuple[str, str, str, Callable[..., dict[str, Any]], tuple]] = []
    ours, theirs = "hamt, fla", "transformer, FlashAttention"
    for recipe in RECIPES:
        plans += [(recipe, name, "training", training, ()) for name in FORMS]
        if recipe == RECIPES[0]:
            plans += [
                (recipe, name, f"decoding {rows} rows", decoding, (rows,))
                for name in (ours, theirs)
                for rows in scale.decoded_rows
            ]
    plans += [
        (RECIPES[0], name, "training, compiled", training, (scale.backend,))
        for name in (ours, theirs)
    ]
    for recipe, name, what, measure, more in plans:
        try:
            # Kernels are compiled and tuned at first use: what comes later keeps half of the time.
            with clock.limit(0.5), computing(name):
                row = measure(configuration(recipe, tiny), name, device, scale, *more)
        except Exception as error:  # the others are still worth their time
            row = {"left_out": reason(error)}
        yield {"recipe": recipe, "model": name, "what": what, **row}
        if device == "cuda":
            torch.cuda.empty_cache()
