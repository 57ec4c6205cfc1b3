"""What MkDocs asks for each page of the site (``make docs``): a hook, named in mkdocs.yml.

Pages are written for a reader of the repository. Here README.md becomes the first page, links to
pages lead to pages and links to other files into the clone around the site, and the reference is
made of the docstrings.
"""

import ast
import logging
import os
import posixpath
import re
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

# Pages that lie elsewhere, or under another name, than their address in the site.
MOVED = {
    "index.md": "README.md",
    "pages.md": "docs/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}

# The reference: of each page the title, what it is about, and what it shows of the package. After
# FIELDS follows a table of the fields of a class.
FIELDS = "fields of "
REFERENCE = {
    "index": (
        "Reference",
        "What `import hamt` gives, and where it is explained. Everything else is imported from its "
        "module, such as `from hamt.checkpoint import load_checkpoint`. Names that begin with an "
        "underscore may change at any time. Shapes are written with the letters of "
        "[the memory](../memory.md#the-idea): B rows, N tokens, d the width, H heads, S slots, F "
        "features of an item, K numbers of a key.",
        (),
    ),
    "memory": (
        "The memory",
        "The recurrence by itself, with tensors alone: see [the memory](../memory.md).",
        (
            "hamt.HolographicMemory",
            "hamt.MemoryState",
            "hamt.memory.Gates",
            "hamt.memory.Tokens",
            "hamt.get_algebra",
            "hamt.similarity",
            "hamt.memory.algebra.Phasor",
            "hamt.memory.algebra.CircularConv",
            "hamt.memory.algebra.Elementwise",
            "hamt.memory.circular_convolve_fft",
            "hamt.memory.rms_normalize",
            "hamt.memory.number_documents",
            "hamt.memory.WriteRule",
            "hamt.memory.write_rules.Gated",
            "hamt.memory.write_rules.Normalized",
            "hamt.memory.write_rules.Convex",
            "hamt.memory.write_rules.Delta",
            "hamt.memory.forms.Form",
            "hamt.memory.forms.recurrent",
            "hamt.memory.forms.chunked",
        ),
    ),
    "config": (
        "Configuration",
        "Every choice of the architecture is a field of `HAMTConfig`, and an option of `hamt "
        "train` under the same name. [The defaults](../defaults.md) says what they rest on.",
        (FIELDS + "hamt.config.HAMTConfig", "hamt.HAMTConfig"),
    ),
    "models": (
        "Models",
        "Models of PyTorch and of Transformers: see [using HAMT](../usage.md#with-transformers).",
        (
            "hamt.HAMTModel",
            "hamt.HAMTForCausalLM",
            "hamt.HAMTBackbone",
            "hamt.HAMTForSequenceClassification",
            "hamt.HAMTForTokenClassification",
            "hamt.HAMTForQuestionAnswering",
            "hamt.model.HAMTCausalLMOutput",
            "hamt.base_model.HAMTPreTrainedModel",
            "hamt.hierarchical_model.HierarchicalHAMTModel",
            "hamt.checkpoint.load_checkpoint",
            "hamt.checkpoint.save_checkpoint",
            "hamt.checkpoint.save_pt",
        ),
    ),
    "layers": (
        "Layers",
        "Token mixers and their parts: see [the memory](../memory.md#the-recurrence), and "
        "[extending HAMT](../extending.md) for mixers of your own.",
        (
            "hamt.HAMTLayer",
            "hamt.parts.GatingNetwork",
            "hamt.parts.RetrievalHead",
            "hamt.rotation.Rotation",
            "hamt.convolution.ShortConvolution",
            "hamt.block.HAMTBlock",
            "hamt.block.HAMTMLP",
            "hamt.mixers.Mixer",
            "hamt.attention.FullAttention",
            "hamt.sliding_attention.SlidingAttention",
            "hamt.hierarchical_memory.HierarchicalHAMTLayer",
            "hamt.hierarchical_memory.HierarchicalMemory",
            "hamt.losses.reconstruction_loss",
            "hamt.losses.contrastive_loss",
        ),
    ),
    "states": (
        "States",
        "The state of a model after a text: see [states](../state.md).",
        (
            "hamt.HAMTCache",
            "hamt.reading.read_on",
            "hamt.generation.continue_tokens",
            "hamt.conversation.Conversation",
        ),
    ),
    "training": (
        "Training",
        "What `hamt train` does: see [training](../training.md#from-python). The fields of "
        "`HAMTConfig` are options, too.",
        (
            FIELDS + "hamt.training.options.TrainOptions",
            "hamt.training.run.train_model",
            "hamt.training.run.FinishedRun",
            "hamt.data.corpus.load_corpus",
            "hamt.utils.model_flops",
            "hamt.utils.compute_flops_per_token",
        ),
    ),
    "measuring": (
        "Measuring",
        "What `hamt evaluate` and its neighbours do: see [measuring](../evaluation.md).",
        (
            "hamt.measure.perplexity.score_documents",
            "hamt.measure.perplexity.Score",
            "hamt.measure.evaluate.run.score_at_contexts",
            "hamt.measure.evaluate.run.continue_prompts",
        ),
    ),
    "analysis": (
        "Analysis",
        "What `hamt analyze` does: see [seeing inside the memory](../analysis.md).",
        (
            "hamt.analysis.record.record",
            "hamt.analysis.record.observe",
            "hamt.analysis.record.Recording",
            "hamt.analysis.record.Trace",
            FIELDS + "hamt.analysis.record.Trace",
            "hamt.analysis.survey.survey",
            "hamt.analysis.survey.LayerSurvey",
            FIELDS + "hamt.analysis.survey.LayerSurvey",
            "hamt.analysis.contributions.contributions",
            "hamt.analysis.contributions.logit_contributions",
            "hamt.analysis.contributions.Contributions",
            FIELDS + "hamt.analysis.contributions.Contributions",
            "hamt.analysis.reading.read_memory",
            "hamt.analysis.reading.retrieval_by_lag",
        ),
    ),
    "converted": (
        "Converted models",
        "Transformers whose attention was taken over: see [converting](../convert.md).",
        (
            "hamt.converted_model.ConvertedForCausalLM",
            "hamt.converted_config.ConvertedConfig",
            "hamt.window_and_memory.mixer.WindowAndMemory",
            "hamt.convert.run.convert",
            "hamt.convert.reading.sources",
            "hamt.analysis.converted.analyse_converted",
            "hamt.analysis.converted.layer_uses",
            "hamt.convert.reading.Sources",
        ),
    ),
}

# Links are looked for outside code; a link's own text may have code in it.
_CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+).*?^(?P=fence)|(?P<ticks>`+)(?!`).*?(?P=ticks)"
    r"|(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)

_CODE_OR_FORMULA = re.compile(
    r"^```math\n(?P<block>.*?)^```$|^(?P<fence>```+).*?^(?P=fence)|(?P<ticks>`+)(?!`).*?(?P=ticks)"
    r"|\$(?P<inline>[^$\n]+)\$",
    re.DOTALL | re.MULTILINE,
)

_ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)  # of a docstring


def on_startup(command, dirty):
    """Let pass what Griffe does not understand and no page shows: names that an import may lack."""

    def matters(record):
        return "hamt.products.pack" not in record.getMessage()

    for name in ("griffe", "mkdocs.plugins.griffe"):
        logging.getLogger(name).addFilter(matters)


def on_files(files, config):
    """Add the pages that do not lie in docs/ as they are."""
    for address, path in MOVED.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    for name, page in REFERENCE.items():
        files.append(File.generated(config, f"api/{name}.md", content=reference_page(*page)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links lead where they lead in the repository."""
    address = page.file.src_uri
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # of which a page without neighbours has none
    here = posixpath.dirname(in_repository(address))
    if address.startswith("results/") and address != "results/README.md":
        page.meta["search"] = {"exclude": True}  # tables of numbers
    elif address in ("LOG.md", "changelog.md"):
        page.meta["search"] = {"boost": 0.3}  # behind what explains
    pages = {
        in_repository(file.src_uri): file.src_uri for file in files if file.inclusion.is_included()
    }

    def link(match):
        target = urlsplit(match["target"] or "")
        if not target.path or target.scheme or address.startswith("api/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target.path))
        anchor = f"#{target.fragment}" if target.fragment else ""
        for name in (path, f"{path}/README.md"):
            if name in pages:
                to = posixpath.relpath(pages[name], posixpath.dirname(address) or ".")
                return f"{match['picture']}[{match['text']}]({to}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # which MkDocs refuses
        to = os.path.relpath(ROOT / path, Path(config.site_dir, page.file.dest_uri).parent)
        return f'<a href="{Path(to).as_posix()}{anchor}">{match["text"]}</a>'

    return with_mathml(_CODE_OR_LINK.sub(link, markdown))


def with_mathml(markdown):
    """Formulas in TeX as MathML, which browsers draw by themselves; code stays as it is."""

    def formula(match):
        if match["block"]:
            # The library knows aligned equations by the name that they have outside formulas.
            block = match["block"].replace("{aligned}", "{align*}")
            return f"\n{convert(block, display='block')}\n"
        # In a span: what begins a line with <math> would be a block.
        return f"<span>{convert(match['inline'])}</span>" if match["inline"] else match[0]

    return _CODE_OR_FORMULA.sub(formula, markdown)


def in_repository(address):
    """The path in the repository of a page of the site."""
    return MOVED.get(address, f"docs/{address}")


def reference_page(title, about, names):
    """The Markdown of a page of the reference, of which mkdocstrings fills in the docstrings."""
    parts = [f"# {title}", about]
    if not names:
        parts.append(table_of_names())
    for name in names:
        if name.startswith(FIELDS):
            path = name.removeprefix(FIELDS)
            parts += [f"## Fields of {path.rpartition('.')[2]}", table_of_fields(path)]
        else:
            parts.append(f"::: {name}")
    return "\n\n".join(parts)


@cache
def source():
    """The package as Griffe reads it, without importing anything."""
    return griffe.load("hamt", search_paths=[str(ROOT / "src")])


def table_of_names():
    """What ``import hamt`` gives, each with the first sentence of its docstring."""
    pages = {name: page for page, (_, _, names) in REFERENCE.items() for name in names}
    package = source()
    rows = ["| name | what it is |", "|---|---|"]
    for name, member in sorted(package.members.items()):
        if f"hamt.{name}" in pages:
            says = member.final_target.docstring.value.split("\n\n")[0]
            page = f"{pages[f'hamt.{name}']}.md#hamt.{name}"
            rows.append(f"| [`{name}`]({page}) | {in_one_line(says)} |")
    return "\n".join(rows)


def table_of_fields(path):
    """Names, types, defaults and meanings of a class of fields, as they stand in its source."""
    fields = source()[path.removeprefix("hamt.")]
    meanings = dict(_ARGUMENT.findall(fields.docstring.value))
    rows = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for field in fields.attributes.values():
        if "property" in field.labels:
            continue
        kind, default = str(field.annotation), field.value
        meaning = meanings.get(field.name) or comment(field, fields)
        if isinstance(default, griffe.ExprCall) and str(default.function) == "option":
            default, told = default.arguments[:2]
            meaning = ast.literal_eval(str(told))
        if not field.name.startswith("_") and not kind.startswith(("ClassVar", "None")):
            shown = "" if default is None else f"`{default}`"
            rows.append(f"| `{field.name}` | `{kind}` | {shown} | {in_one_line(meaning)} |")
    return "\n".join(rows)


def comment(field, fields):
    """What stands behind a field, or above it, as a comment."""
    behind = field.lines[-1].partition("  # ")[2]
    if behind:
        return re.sub(r"noqa: \w+", "", behind)
    above, line = [], field.lineno - fields.lineno - 1
    while fields.lines[line].strip().startswith("# "):
        above.insert(0, fields.lines[line].strip().removeprefix("# "))
        line -= 1
    return " ".join(above)


def in_one_line(text):
    """Text for a cell of a table."""
    return " ".join(text.split())
