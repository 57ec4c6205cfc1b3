"""From options to all that a run needs. What can be wrong is found out before compute is spent."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hamt.checkpoint import load_checkpoint
from hamt.config import HAMTConfig
from hamt.data.corpus import Corpus, load_corpus
from hamt.data.loader import Batches
from hamt.data.tokenizer import (
    character_tokenizer,
    load_tokenizer,
    own_tokenizer,
    vocabulary_size,
)
from hamt.data.tokens import TokenisedCorpus, tokenise
from hamt.errors import UserError, user_errors
from hamt.model import HAMTForCausalLM
from hamt.options import check
from hamt.training.accelerator import make_accelerator
from hamt.training.loop import LoopOptions
from hamt.training.memory import check_memory
from hamt.training.options import SIZES, TrainOptions
from hamt.training.sharding import wants_shards

# The options that a resumed run must share with the run that it goes on with.
FIXED = (
    *("optimizer", "batch_size", "max_length", "order"),
    *("documents_flow", "micro_batches", "tbptt_segments", "seed"),
)


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
        return {
            "text": self.corpus.fingerprint,
            **{name: getattr(self.model.config, name) for name in HAMTConfig.__annotations__},
            **{name: getattr(self.options, name) for name in FIXED},
        }


def make_plan(options: TrainOptions) -> Plan:
    """Load or make all that a run needs: text, tokenizer, batches, model.

    Raises:
        UserError: for whatever only the user can mend: options, text, folders.
    """
    check_options(options)
    accelerator = make_accelerator(options.mixed_precision)
    processes = accelerator.num_processes
    parts = processes * options.micro_batches
    if options.batch_size % parts:
        raise UserError(
            f"--batch_size {options.batch_size} cannot be shared among {processes} processes with "
            f"{options.micro_batches} micro-batches: make it a multiple of {parts}"
        )
    # The main process learns the tokenizer and tokenises the text; the others wait, and then find
    # both in the cache.
    with accelerator.main_process_first():
        # Now already, only to find mistakes in sizes before minutes are spent on a tokenizer.
        _config(**_fields(options), vocab_size=options.vocab_size)
        text = load_corpus(
            options.data,
            held_out=options.held_out,
            text_column=options.text_column,
            streaming=options.streaming,
        )
        trained = None
        if options.init_from is not None:
            trained = load_checkpoint(options.init_from, "hamt train --init_from")
        tokenizer = trained[1] if trained else _tokenizer(options, text)
        corpus = tokenise(text, tokenizer, options.token_cache, options.max_tokens)
    if len(corpus.held_out) < 2:
        raise UserError(
            f"{options.data} is too short to hold any of it out: give more text, or --held_out"
        )
    rows = options.batch_size // processes
    first = rows * accelerator.process_index
    batches = Batches(
        corpus.train,
        length=options.max_length * options.tbptt_segments,
        batch_size=options.batch_size,
        order=options.order,
        documents_flow=options.documents_flow or tokenizer.eos_token_id is None,
        seed=options.seed,
        rows=slice(first, first + rows),
    )
    with torch.device("meta"):  # no memory is taken before it is known that there is enough
        model = _model(options, tokenizer, trained)
    every, slow = model.config.boundary_every, "hierarchical_memory" in model.config.layer_mixers
    if slow and options.order != "contiguous" and options.max_length <= every:
        raise UserError(
            f"slow slots take over every {every} tokens, and learn from what comes after that: "
            f"make --max_length larger than {every}, or --boundary_every smaller"
        )
    if not options.dry_run:
        check_memory(model, accelerator.device, processes if wants_shards() else 1)
        torch.manual_seed(options.seed)
        model = _model(options, tokenizer, trained)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if processes > 1:  # all have made the same model, but each drops other features
        torch.manual_seed(options.seed + accelerator.process_index)
    return Plan(options, accelerator, corpus, tokenizer, model, batches, _loop(options, batches))


def _tokenizer(options: TrainOptions, text: Corpus) -> PreTrainedTokenizerBase:
    if options.tokenizer == "characters":
        return character_tokenizer(text.train)
    if options.tokenizer not in (None, "none"):
        return load_tokenizer(options.tokenizer, options.trust_remote_code)
    return own_tokenizer(text, options.vocab_size, options.token_cache)


def _model(
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    trained: tuple[HAMTForCausalLM, PreTrainedTokenizerBase] | None,
) -> HAMTForCausalLM:
    if trained is None:
        return _new_model(options, tokenizer)
    model = HAMTForCausalLM(_config(trained[0].config.changed, **options.architecture()))
    if model.device.type != "meta":
        model.load_state_dict(trained[0].state_dict())
    return model


def _new_model(options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> HAMTForCausalLM:
    config = _config(
        **_fields(options),
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=options.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return HAMTForCausalLM(config)


def _fields(options: TrainOptions) -> dict[str, Any]:
    """The fields of the configuration that the options name, by a size or one by one."""
    return {**(SIZES[options.size] if options.size else {}), **options.architecture()}


def _config(make: Callable[..., HAMTConfig] = HAMTConfig, **fields: Any) -> HAMTConfig:
    with user_errors():
        return make(**fields)


def check_options(options: TrainOptions) -> None:
    """Refuse values that an option does not take, and options that do not go with others.

    Raises:
        UserError: with what to change.
    """
    check(options)
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with a run, --overwrite begins anew: leave one out")
    if options.tbptt_segments > 1 and options.order != "contiguous":
        raise UserError(
            "--tbptt_segments needs --order contiguous: shuffled blocks have nothing to carry along"
        )
    asked = options.architecture()
    for name in ("auxiliary_loss", "contrastive_temperature"):
        there = asked.get("use_auxiliary_loss") or options.init_from
        if asked.get(name) is not None and not there:
            raise UserError(f"--{name} is of the auxiliary loss: give --use_aux_loss, too")
    free = {"dropout", "use_auxiliary_loss", "aux_loss_weight", "auxiliary_loss"}
    free |= {"contrastive_temperature", "chunk_size"}
    named = {"size": options.size, "tokenizer": options.tokenizer, **asked}
    given = sorted(name for name in named.keys() - free if named[name] is not None)
    if options.init_from is not None and given:
        raise UserError(f"--init_from brings sizes and tokenizer along: leave --{given[0]} out")


def _loop(options: TrainOptions, batches: Batches) -> LoopOptions:
    """The options of the loop: most have the same name there, three are worked out."""
    same = LoopOptions.__dataclass_fields__.keys() & TrainOptions.__dataclass_fields__.keys()
    values = {name: getattr(options, name) for name in same}
    values["num_steps"] = options.num_steps or max(
        # A share such as 0.07 is not exact: without rounding it would cost one step more.
        math.ceil(round(options.num_epochs * batches.steps_per_epoch, 6)),
        1,
    )
    values["carry_state"] = options.order == "contiguous"
    values["max_seconds"] = 60 * options.max_minutes if options.max_minutes else math.inf
    return LoopOptions(**values)
