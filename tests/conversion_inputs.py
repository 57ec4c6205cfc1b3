"""A tiny conversion by the command: its options, and how it is run."""

from command_inputs import words

from hamt.cli import main

SIZES = {"window": 16, "block": 4, "num_sinks": 2, "num_slots": 4}
SIZES |= {"wide_window": 24, "wide_slots": 6, "wide_exact": 4, "wide_layers": 1}
STAGES = {"calibrate_rows": 2, "calibrate_length": 64, "layers_steps": 6, "layers_length": 64}
STAGES |= {"exact_rows": 2, "exact_length": 640}
STAGES |= {"layers_windows": 8, "whole_lengths": [64, 96], "whole_steps": [6, 3], "lora_rank": 2}
STAGES |= {"eval_interval": 3, "save_interval": 2, "eval_rows": 1}
NAMES = ["untrained", "calibrate", "exact", "layers", "whole-64", "whole-96"]


def convert(teacher, data, folder, **options):
    given = {**SIZES, **STAGES, **options}
    return main(["convert", teacher, *words(data=data, output_dir=folder, **given)])
