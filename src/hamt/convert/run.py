"""A conversion from a transformer to a folder, stage by stage."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hamt.baselines.loading import load_any_model
from hamt.checkpoint import save_checkpoint
from hamt.convert.budget import (
    check_sizes,
    key_value_floats,
    layer_sizes,
    possible_sizes,
    state_floats,
)
from hamt.convert.calibrate import calibrate
from hamt.convert.delta import learn_again, learned, save_delta
from hamt.convert.exchange import exchange, resize
from hamt.convert.figures import figures, stage_table, told
from hamt.convert.known import find_transformer
from hamt.convert.learned_before import DELTA, RECORD, add_delta, learned_before, next_step
from hamt.convert.objectives import (
    ALPHA,
    Distillation,
    LayerByLayer,
    Objective,
    adapters_of_peft,
    add_adapters,
    merge_adapters,
)
from hamt.convert.options import SOTU, ConvertOptions
from hamt.convert.plan import Stage, begin, check_folder, kinds, with_gradients
from hamt.convert.rows import Rows
from hamt.convert.salience import learn_salience
from hamt.convert.select import sensitivities
from hamt.convert.stage import kept, train_stage
from hamt.converted_model import ConvertedForCausalLM
from hamt.data.corpus import load_corpus
from hamt.data.tokens import TokenisedCorpus, tokenise
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.files import parse_json
from hamt.output import Output
from hamt.training.divergence import DivergenceError
from hamt.training.loop import LoopOptions, seed_everything
from hamt.training.tracking import HeldOutLines, ProgressBar

LEARNED = "stages/{}-learned.pt"


def convert(options: ConvertOptions, console: Console, output: Output) -> None:
    """Convert as the options say, and write the model, what it has learned, and how it went.

    Raises:
        UserError: for whatever only the user can mend.
    """
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    assert options.model is not None
    check_sizes(possible_sizes(options, [None]))  # reading a model takes a minute
    path, delta = find_transformer(options.model), learned_before(options)
    check_folder(options, output, console)
    original, tokenizer, name = load_any_model(path, options.trust_remote_code)
    if delta is not None:
        add_delta(delta, options, console, output, original, tokenizer)
        return
    count = original.config.get_text_config().num_hidden_layers
    if wrong := [layer for layer in options.wide_layers if not 0 <= layer < count]:
        raise UserError(f"--wide_layers: there is no layer {wrong[0]}, they are 0 to {count - 1}")
    seed_everything(options.seed)
    with user_errors():
        model = exchange(original, layer_sizes(options, options.wide_layers, count), options.reach)
    console.print(f"{name}: {model.num_parameters():,} parameters")
    run = _Run(options, console, output, model, tokenizer, _text(options, tokenizer))
    run.check()
    if options.resume or not options.dry_run:
        begin(options, output, model, run.rows.corpus.fingerprint)
    if options.num_wide and not options.wide_layers:
        with user_errors():
            resize(model, layer_sizes(options, run.select(), count))
    numbers, each = state_floats(model), key_value_floats(model)
    console.print(
        f"{model.model.mixer_summary()}; carried are {numbers:,} numbers a row, as many as keys "
        f"and values of {numbers / each:,.0f} tokens"
    )
    if options.dry_run:
        run.estimate()
        return
    run.all_stages()
    run.finish(name)


def _text(options: ConvertOptions, tokenizer: PreTrainedTokenizerBase) -> TokenisedCorpus:
    text = load_corpus(options.data or SOTU, held_out=options.held_out)
    return tokenise(text, tokenizer, options.token_cache, options.max_tokens)


class _Run:
    """A conversion on its way."""

    def __init__(
        self,
        options: ConvertOptions,
        console: Console,
        output: Output,
        model: ConvertedForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        corpus: TokenisedCorpus,
    ) -> None:
        self.options, self.console, self.output = options, console, output
        self.model, self.tokenizer = model, tokenizer
        self.sizes = possible_sizes(options, model.config.own_windows())
        self.kinds = kinds(options, self.sizes)
        beyond = max(sizes.window for sizes in self.sizes)
        self.rows = Rows(options, tokenizer, corpus, beyond)
        self.brought: list[dict[str, Any]] = []  # by each stage

    # ------------------------------------------------------------------ stages

    def all_stages(self) -> None:
        """All stages that are asked for; those that are done are taken over."""
        self.measured("untrained", 0, 0.0)
        for kind in self.kinds:
            if kind == "calibrate":
                self.at_once(kind, calibrate, self.rows.prose())
            if kind == "exact":
                self.at_once(kind, learn_salience, self.rows.facts)
            if kind == "whole" and self.options.lora_rank:
                seed_everything(self.options.seed)
                add_adapters(self.model, self.options.lora_rank)
            for stage in with_gradients(self.options, kind):
                self.stage(stage.name, stage.steps * stage.length, partial(self.train, stage))

    def check(self) -> None:
        """Find out before compute is spent what the stages would trip over.

        Raises:
            UserError: if sizes do not fit, the text is too short for a stage, or PEFT is needed
                and not there.
        """
        check_sizes(self.sizes)
        if len(self.rows.corpus.held_out) < 2:
            raise UserError("the text is too short to hold any of it out: give more, or --held_out")
        for kind in self.kinds:
            if kind == "exact":
                _ = self.rows.facts
            if kind == "whole" and self.options.lora_rank:
                adapters_of_peft()
            for stage in with_gradients(self.options, kind):
                self.rows.batches(stage)

    def select(self) -> list[int]:
        """The layers that lose most, as they are chosen once for a conversion."""
        options, name = self.options, "stages/select.json"
        path = self.output.folder / name
        if options.resume and path.exists():
            with kept(path):
                lost = parse_json(path.read_text(encoding="utf-8"))["divergence"]
        else:
            rows = self.rows.train(options.select_rows, options.calibrate_length)
            lost = sensitivities(self.model, rows)
            if not options.dry_run:
                self.output.write_json(name, {"divergence": lost})
        chosen = sorted(sorted(range(len(lost)), key=lost.__getitem__)[-options.num_wide :])
        layers = ", ".join(f"{layer} ({lost[layer]:.3f})" for layer in chosen)
        self.console.print(f"layers that lose most, divergence in nats: {layers}")
        return chosen

    def stage(self, name: str, tokens: int, learn: Callable[[], float]) -> None:
        """Take over what a stage has learned, or let it learn, which tells the seconds it took.

        Raises:
            UserError: if what it had learned cannot be read.
        """
        path = self.output.folder / LEARNED.format(name)
        if path.exists():
            with kept(path):
                state = torch.load(path, weights_only=True)
                learn_again(self.model, state["learned"])
                self.brought.append(state["row"])
            self.console.print(f"{name}: done before")
            return
        self.measured(name, tokens, learn())
        state = {"learned": learned(self.model), "row": self.brought[-1]}
        self.output.write_file(LEARNED.format(name), lambda file: torch.save(state, file))
        self.output.remove(f"stages/{name}.pt")

    def at_once(self, kind: str, learns: Callable[..., None], rows: list[Tensor]) -> None:
        """A stage without gradients."""

        def learn() -> float:
            begin = time.monotonic()
            learns(self.model, rows)
            return time.monotonic() - begin

        self.stage(kind, sum(row.numel() for row in rows), learn)

    def objective(self, stage: Stage) -> Objective:
        """What a stage learns."""
        if self.options.gradient_checkpointing:
            self.model.model.body.gradient_checkpointing_enable()
        if stage.name == "layers":
            return LayerByLayer(self.model, self.options.layers_windows)
        return Distillation(self.model)

    def train(self, stage: Stage) -> float:
        """One stage with gradients, from where it was stopped; the seconds that it took in all."""
        options, name, steps = self.options, stage.name, stage.steps
        seed_everything(options.seed)
        loop = LoopOptions(
            num_steps=steps,
            learning_rate=stage.learning_rate,
            optimizer="adamw",
            weight_decay=0.0,
            log_interval=options.log_interval,
            eval_interval=options.eval_interval,
        )
        try:
            result = train_stage(
                name,
                self.objective(stage),
                self.rows.batches(stage),
                self.rows.held_out(stage.length),
                loop,
                mixed_precision=options.mixed_precision,
                output=self.output,
                save_interval=options.save_interval,
                listeners=lambda step: [ProgressBar(steps, step), HeldOutLines(self.console, name)],
            )
        except DivergenceError as error:
            raise UserError(f"{name}: {error}; begin anew with a lower learning rate") from error
        self.model.requires_grad_(False)
        if result.interrupted:
            raise UserError(
                f"stopped after {result.steps:,} steps of {name}: the same command with --resume "
                "goes on"
            )
        return result.wall_seconds

    # ----------------------------------------------------------------- figures

    def measured(self, name: str, tokens: int, seconds: float) -> None:
        """How far the model is from the transformer now, on held-out rows."""
        length = max([*self.options.whole_lengths, self.options.layers_length])
        found = figures(self.model, self.rows.held_out(length), self.rows.judged)
        self.brought.append({"stage": name, "tokens": tokens, "seconds": seconds, **found})
        self.console.print(f"{name}: {told(found)}")

    def estimate(self) -> None:
        """What each stage will cost, from one row of each kind."""
        options, total = self.options, 0.0
        table = Table("stage", *(Column(x, justify="right") for x in ("rows", "tokens", "hours")))
        half = torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=options.mixed_precision == "bf16"
        )

        def add(name: str, length: int, steps: int, once: Callable[[Tensor], None]) -> float:
            row = self.rows.train(1, length)[0]
            start = time.monotonic()
            once(row)
            hours = (time.monotonic() - start) * steps / 3600
            table.add_row(name, f"{steps:,}", f"{steps * length:,}", f"{hours:.2f}")
            return hours

        def learn(objective: Objective, row: Tensor) -> None:
            with half:
                loss = objective.measure(row)
            loss.backward()

        def at_once(learns: Callable[..., None], row: Tensor) -> None:
            learns(self.model, [row])

        for kind in self.kinds:
            if kind == "calibrate":
                once = partial(at_once, calibrate)
                total += add(kind, options.calibrate_length, options.calibrate_rows, once)
            if kind == "exact":
                once = partial(at_once, learn_salience)
                total += add(kind, options.exact_length, options.exact_rows, once)
            if kind == "whole" and options.lora_rank:
                add_adapters(self.model, options.lora_rank)
            for stage in with_gradients(options, kind):
                once = partial(learn, self.objective(stage).train())
                total += add(stage.name, stage.length, stage.steps, once)
        self.console.print(table)
        self.console.print(f"about {total:.1f} hours on this machine, without evaluations")

    # ------------------------------------------------------------------ result

    def finish(self, name: str) -> None:
        """Write the model, the delta, and the record."""
        about = {"model": name, "options": asdict(self.options), "stages": self.brought}
        scale = ALPHA / self.options.lora_rank if self.options.lora_rank else 0.0
        self.output.write_file(DELTA, lambda path: save_delta(path, self.model, scale, about))
        merge_adapters(self.model)
        self.output.write(lambda fresh: save_checkpoint(fresh, self.model, self.tokenizer))
        self.output.write_json(RECORD, {"environment": environment(), **about})
        self.console.print(stage_table(self.brought))
        size = (self.output.folder / DELTA).stat().st_size
        self.console.print(
            f"what was learned is {size / 1e6:.1f} MB; all is in {self.output.folder}; "
            f"{next_step(self.options)}"
        )
