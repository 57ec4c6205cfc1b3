"""From options to all that a run needs. What can be wrong is found out before compute is spent."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hamt.checkpoint import load_checkpoint
from hamt.config import HAMTConfig
from hamt.data.corpus import Corpus, load_corpus
from hamt.data.loader import ORDERS, Batches
from hamt.data.tokenizer import character_tokenizer, load_tokenizer, own_tokenizer
from hamt.data.tokens import TokenisedCorpus, tokenise
from hamt.errors import UserError, user_errors
from hamt.files import check_writable
from hamt.model import HAMTForCausalLM
from hamt.training.accelerator import make_accelerator
from hamt.training.loop import LoopOptions
from hamt.training.optim import OPTIMIZERS, SCHEDULES
from hamt.training.options import SIZES, TrainOptions

COUNTS = ("max_length", "batch_size", "micro_batches", "tbptt_segments", "num_steps", "max_tokens")
INTERVALS = ("log_interval", "eval_interval", "save_interval", "keep_checkpoints")
AT_LEAST = {
    **dict.fromkeys((*COUNTS, *INTERVALS), 1),
    **dict.fromkeys(("weight_decay", "seed", "num_workers", "spike"), 0),
}
POSITIVE = ("num_epochs", "learning_rate", "max_norm", "max_minutes")
SHARES = ("warmup", "final_learning_rate")
CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "order": ORDERS,
    "size": tuple(SIZES),
    "mixed_precision": ("no", "bf16", "fp16"),
    "save_dtype": ("float32", "bfloat16", "float16"),
}


@dataclass
class Plan:
    """All that a run needs."""

    options: TrainOptions
    accelerator: Accelerator
    corpus: TokenisedCorpus
    tokenizer: PreTrainedTokenizerBase
    model: HAMTForCausalLM
    batches: Batches
    loop: LoopOptions

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints to resume from."""
        return Path(self.options.output_dir) / "checkpoints"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all processes."""
        return self.options.batch_size * self.batches.length

    @property
    def identity(self) -> dict[str, object]:
        """What must not have changed when the run is resumed."""
        fixed = (
            "batch_size",
            "max_length",
            "order",
            "documents_flow",
            "micro_batches",
            "tbptt_segments",
            "seed",
        )
        return {
            "text": self.corpus.fingerprint,
            **{name: getattr(self.model.config, name) for name in HAMTConfig.__annotations__},
            "optimizer": self.options.optimizer,
            **{name: getattr(self.options, name) for name in fixed},
        }


def make_plan(options: TrainOptions) -> Plan:
    """Load or make all that a run needs: text, tokenizer, batches, model.

    Raises:
        UserError: for whatever only the user can mend: options, text, folders.
    """
    _check(options)
    accelerator = make_accelerator(options.mixed_precision)
    processes = accelerator.num_processes
    if options.batch_size % (processes * options.micro_batches):
        raise UserError(
            f"--batch_size {options.batch_size} cannot be shared among {processes} processes with "
            f"{options.micro_batches} micro-batches: "
            f"make it a multiple of {processes * options.micro_batches}"
        )
    # The main process learns the tokenizer and tokenises the text; the others wait, and then find
    # both in the cache.
    with accelerator.main_process_first():
        # Now already, only to find mistakes in sizes before minutes are spent on a tokenizer.
        build_config(**_fields(options), vocab_size=options.vocab_size)
        check_writable(options.output_dir, make=not options.dry_run)
        text = load_corpus(
            options.data,
            held_out=options.held_out,
            text_column=options.text_column,
            streaming=options.streaming,
        )
        trained = load_checkpoint(options.init_from) if options.init_from else None
        tokenizer = trained[1] if trained else _tokenizer(options, text)
        corpus = tokenise(text, tokenizer, options.token_cache, options.max_tokens)
    if len(corpus.held_out) < 2:
        raise UserError(
            f"{options.data} is too short to hold any of it out: give more text, or --held_out"
        )
    share = options.batch_size // processes
    batches = Batches(
        corpus.train,
        length=options.max_length * options.tbptt_segments,
        batch_size=options.batch_size,
        order=options.order,
        documents_flow=options.documents_flow or tokenizer.eos_token_id is None,
        seed=options.seed,
        rows=slice(accelerator.process_index * share, (accelerator.process_index + 1) * share),
    )
    torch.manual_seed(options.seed)
    model = _model(options, tokenizer, trained[0] if trained else None)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if processes > 1:  # all have made the same model, but each drops other features
        torch.manual_seed(options.seed + accelerator.process_index)
    return Plan(options, accelerator, corpus, tokenizer, model, batches, _loop(options, batches))


def _tokenizer(options: TrainOptions, text: Corpus) -> PreTrainedTokenizerBase:
    if options.tokenizer == "characters":
        return character_tokenizer(text.train)
    if options.tokenizer not in (None, "none"):
        return load_tokenizer(options.tokenizer)
    return own_tokenizer(text, options.vocab_size, options.token_cache)


def _model(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, trained: HAMTForCausalLM | None
) -> HAMTForCausalLM:
    if trained is None:
        config = build_config(
            **_fields(options),
            vocab_size=len(tokenizer),
            max_position_embeddings=options.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return HAMTForCausalLM(config)
    config = build_config(**{**trained.config.to_dict(), **options.architecture()})
    model = HAMTForCausalLM(config)
    model.load_state_dict(trained.state_dict())
    return model


def build_config(**fields) -> HAMTConfig:
    """A configuration with these fields.

    Raises:
        UserError: if they do not fit together, with what would be right.
    """
    with user_errors():
        return HAMTConfig(**fields)


def _check(options: TrainOptions) -> None:
    for name, least in AT_LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name} must be at least {least}; got {value}")
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be positive; got {value}")
    for name in SHARES:
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name} must lie in [0, 1]; got {getattr(options, name)}")
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run, --overwrite begins anew: leave one out")
    if options.tbptt_segments > 1 and options.order != "contiguous":
        raise UserError(
            "--tbptt_segments needs --order contiguous: shuffled blocks have nothing to carry along"
        )
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise UserError(f"--{name} must be one of {', '.join(choices)}; got {value!r}")
    free = {"dropout", "use_auxiliary_loss", "aux_loss_weight"}
    fixed = {"size", "tokenizer", *options.architecture()} - free
    given = sorted(name for name in fixed if getattr(options, name) is not None)
    if options.init_from and given:
        raise UserError(f"--init_from brings sizes and tokenizer along: leave --{given[0]} out")


def _fields(options: TrainOptions) -> dict:
    return {**(SIZES[options.size] if options.size else {}), **options.architecture()}


def _loop(options: TrainOptions, batches: Batches) -> LoopOptions:
    steps = options.num_steps or max(math.ceil(options.num_epochs * batches.steps_per_epoch), 1)
    same = {field.name for field in fields(LoopOptions)} & {
        field.name for field in fields(TrainOptions)
    }
    return LoopOptions(
        carry_state=options.order == "contiguous",
        max_seconds=60 * options.max_minutes if options.max_minutes else math.inf,
        **{**{name: getattr(options, name) for name in same}, "num_steps": steps},
    )
