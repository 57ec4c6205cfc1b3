"""A conversion from a transformer to a folder, stage by stage."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hamt.baselines.loading import load_any_model
from hamt.checkpoint import save_checkpoint
from hamt.convert.budget import key_value_floats, layer_sizes, state_floats
from hamt.convert.calibrate import calibrate
from hamt.convert.delta import learn_again, learned, save_delta
from hamt.convert.exchange import exchange, resize
from hamt.convert.known import find_transformer
from hamt.convert.learned_before import add_delta, learned_before
from hamt.convert.objectives import (
    ALPHA,
    Distillation,
    LayerByLayer,
    Objective,
    add_adapters,
    divergence,
    merge_adapters,
    without_adapters,
)
from hamt.convert.options import SOTU, STAGES, ConvertOptions
from hamt.convert.select import sensitivities
from hamt.convert.stage import train_stage
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention
from hamt.data.corpus import load_corpus
from hamt.data.loader import Batches
from hamt.data.tokens import TokenisedCorpus, tokenise
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.files import parse_json
from hamt.output import Output
from hamt.training.loop import LoopOptions, seed_everything
from hamt.training.tracking import HeldOutLines, ProgressBar

RECORD = "convert_info.json"
LEARNED = "stages/{}-learned.pt"


def convert(options: ConvertOptions, console: Console, output: Output) -> None:
    """Convert as the options say, and write the model, what it has learned, and how it went.

    Raises:
        UserError: for whatever only the user can mend.
    """
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    assert options.model is not None
    path, delta = find_transformer(options.model), learned_before(options)
    original, tokenizer, name = load_any_model(path, options.trust_remote_code)
    if delta is not None:
        add_delta(delta, options, console, output, original, tokenizer)
        return
    count = original.config.get_text_config().num_hidden_layers
    if wrong := [layer for layer in options.wide_layers if not 0 <= layer < count]:
        raise UserError(f"--wide_layers: there is no layer {wrong[0]}, they are 0 to {count - 1}")
    with user_errors():
        model = exchange(original, layer_sizes(options, options.wide_layers, count), options.reach)
    console.print(f"{name}: {model.num_parameters():,} parameters")
    run = _Run(options, console, output, model, tokenizer, _text(options, tokenizer))
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
        self.model, self.tokenizer, self.corpus = model, tokenizer, corpus
        self.rows: list[dict[str, Any]] = []  # what each stage brought

    # ------------------------------------------------------------------ stages

    def all_stages(self) -> None:
        """All stages that are asked for; those that are done are taken over."""
        self.measured("window and memory, untrained", 0, 0.0)
        for name in self.stages:
            getattr(self, name)()

    @property
    def stages(self) -> list[str]:
        """Those that are asked for, and have something to learn."""
        able = {"slots": STAGES, "window": ("whole",), "none": ()}[self.options.memory]
        return [name for name in able if not self.options.stages or name in self.options.stages]

    def select(self) -> list[int]:
        """The layers that lose most, as they are chosen once for a folder."""
        options, name = self.options, "stages/select.json"
        path = self.output.folder / name
        if not path.exists():
            rows = self.some(self.corpus.train, options.select_rows, options.calibrate_length)
            lost = sensitivities(self.model, rows)
            if options.dry_run:
                return sorted(range(len(lost)), key=lost.__getitem__)[-options.num_wide :]
            self.output.write_json(name, {"divergence": lost})
        lost = parse_json(path.read_text(encoding="utf-8"))["divergence"]
        chosen = sorted(sorted(range(len(lost)), key=lost.__getitem__)[-options.num_wide :])
        told = ", ".join(f"{layer} ({lost[layer]:.3f})" for layer in chosen)
        self.console.print(f"layers that lose most, divergence in nats: {told}")
        return chosen

    def stage(self, name: str, tokens: int, learn: Callable[[], None]) -> None:
        """Take over what a stage has learned, or let it learn."""
        path = self.output.folder / LEARNED.format(name)
        begin = time.monotonic()
        if path.exists():
            kept = torch.load(path, weights_only=True)
            learn_again(self.model, kept["learned"])
            self.rows.append(kept["row"])
            self.console.print(f"{name}: done before")
            return
        learn()
        self.measured(name, tokens, time.monotonic() - begin)
        state = {"learned": learned(self.model), "row": self.rows[-1]}
        self.output.write_file(LEARNED.format(name), lambda file: torch.save(state, file))
        self.output.remove(f"stages/{name}.pt")

    def calibrate(self) -> None:
        """Addresses, half-lives and offsets, without gradients."""
        options = self.options
        rows = self.some(self.corpus.train, options.calibrate_rows, options.calibrate_length)
        tokens = sum(row.numel() for row in rows)
        self.stage("calibrate", tokens, lambda: calibrate(self.model, rows))

    def layers(self) -> None:
        """Each layer by itself."""
        options = self.options

        def learn() -> None:
            objective = LayerByLayer(self.model, options.layers_windows)
            self.train(
                "layers",
                objective,
                options.layers_length,
                options.layers_steps,
                options.layers_learning_rate,
            )

        self.stage("layers", options.layers_steps * options.layers_length, learn)

    def whole(self) -> None:
        """The whole model, on rows that get longer."""
        options = self.options
        if options.lora_rank:
            add_adapters(self.model, options.lora_rank)
        for length, steps in zip(options.whole_lengths, options.whole_steps, strict=True):
            name = f"whole-{length}"

            def learn(length: int = length, steps: int = steps, name: str = name) -> None:
                objective = Distillation(self.model)
                self.train(name, objective, length, steps, options.whole_learning_rate)

            self.stage(name, steps * length, learn)

    def train(
        self, name: str, objective: Objective, length: int, steps: int, learning_rate: float
    ) -> None:
        """One stage with gradients."""
        options = self.options
        seed_everything(options.seed)
        if options.gradient_checkpointing:
            self.model.model.body.gradient_checkpointing_enable()
        batches = Batches(
            self.corpus.train, length=length, batch_size=1, documents_flow=True, seed=options.seed
        )
        loop = LoopOptions(
            num_steps=steps,
            learning_rate=learning_rate,
            optimizer="adamw",
            weight_decay=0.0,
            log_interval=options.log_interval,
            eval_interval=options.eval_interval,
        )
        result = train_stage(
            name,
            objective,
            batches,
            self.some(self.corpus.held_out, options.eval_rows, length),
            loop,
            mixed_precision=options.mixed_precision,
            output=self.output,
            save_interval=options.save_interval,
            listeners=lambda step: [ProgressBar(steps, step), HeldOutLines(self.console, name)],
        )
        self.model.requires_grad_(False)
        if result.interrupted:
            raise UserError(
                f"stopped after {result.steps:,} steps of {name}: the same command with --resume "
                "goes on"
            )

    def some(self, split: Any, count: int, length: int) -> list[Tensor]:
        """Rows of ids (1, N) from all parts of a text."""
        count = max(min(count, len(split) // length), 1)
        starts = torch.linspace(0, max(len(split) - length, 0), count).long().tolist()
        return [torch.from_numpy(split.ids[a : a + length].astype("int64"))[None] for a in starts]

    # ----------------------------------------------------------------- figures

    @torch.no_grad()
    def measured(self, name: str, tokens: int, seconds: float) -> None:
        """How far the model is from the transformer now, on held-out rows."""
        body, head = self.model.model, self.model.lm_head.weight
        losses = {"nats": 0.0, "of_transformer": 0.0, "divergence": 0.0}
        length = max([*self.options.whole_lengths, self.options.layers_length])
        rows = self.some(self.corpus.held_out, self.options.eval_rows, length)
        for row in rows:
            embedded, targets = body.embed_tokens(row), row[0, 1:]
            with without_adapters(self.model):
                whole = body.run_body(embedded, Pass(instead=full_attention))
            own = body.run_body(embedded, Pass())
            for key, hidden in (("of_transformer", whole), ("nats", own)):
                loss = torch.nn.functional.cross_entropy(hidden[0, :-1] @ head.mT, targets)
                losses[key] += float(loss) / len(rows)
            losses["divergence"] += float(divergence(own, whole, head)) / len(rows)
        excess = losses["nats"] / losses["of_transformer"] - 1
        self.rows.append({"stage": name, "tokens": tokens, "seconds": seconds, **losses})
        self.console.print(
            f"{name}: loss {losses['nats']:.3f} nats/token, {excess:+.1%} of the transformer's; "
            f"divergence {losses['divergence']:.3f} nats"
        )

    def estimate(self) -> None:
        """What each stage will cost, from one row of each kind."""
        options, total = self.options, 0.0
        table = Table("stage", *(Column(x, justify="right") for x in ("rows", "tokens", "hours")))
        plans = [("layers", options.layers_length, options.layers_steps)]
        plans += [
            (f"whole-{length}", length, steps)
            for length, steps in zip(options.whole_lengths, options.whole_steps, strict=True)
        ]
        for name, length, steps in plans:
            stage = name.partition("-")[0]
            if stage not in self.stages:
                continue
            objective = LayerByLayer(self.model) if stage == "layers" else Distillation(self.model)
            row = self.some(self.corpus.train, 1, length)[0]
            begin = time.monotonic()
            loss = objective.measure(row)
            if loss.requires_grad:
                loss.backward()
            hours = (time.monotonic() - begin) * steps / 3600
            total += hours
            table.add_row(name, f"{steps:,}", f"{steps * length:,}", f"{hours:.2f}")
        self.console.print(table)
        self.console.print(f"about {total:.1f} hours on this machine, without evaluations")

    # ------------------------------------------------------------------ result

    def finish(self, name: str) -> None:
        """Write the model, the delta, and the record."""
        about = {"model": name, "options": asdict(self.options), "stages": self.rows}
        scale = ALPHA / self.options.lora_rank if self.options.lora_rank else 0.0
        self.output.write_file(
            "delta.safetensors", lambda path: save_delta(path, self.model, scale, about)
        )
        merge_adapters(self.model)
        self.output.write(lambda fresh: save_checkpoint(fresh, self.model, self.tokenizer))
        self.output.write_json(RECORD, {"environment": environment(), **about})
        self.console.print(_table(self.rows))
        size = (self.output.folder / "delta.safetensors").stat().st_size
        self.console.print(
            f"what was learned is {size / 1e6:.1f} MB; all is in {self.output.folder}"
        )


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = ("tokens", "minutes", "nats/token", "over the transformer", "divergence, nats")
    table = Table("after", *(Column(name, justify="right") for name in columns))
    for row in rows:
        table.add_row(
            row["stage"],
            f"{row['tokens']:,}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['nats']:.3f}",
            f"{row['nats'] / row['of_transformer'] - 1:+.1%}",
            f"{row['divergence']:.3f}",
        )
    return table
