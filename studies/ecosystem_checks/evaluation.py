"""lm-evaluation-harness, datasets, scikit-learn, safetensors, Gradio: what reads a model."""

import json
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ecosystem_checks.base import (
    GREEDY,
    check,
    close,
    equal,
    greedy,
    needs,
    packaged,
    random_ids,
    refused,
    tiny_model,
    tokenizer,
)
from hamt.checkpoint import PRETRAINED

HARNESS, DATA = "lm-evaluation-harness", "datasets, scikit-learn, safetensors, Gradio"
ASKED = [
    ("The Congress of the", " United States"),
    ("Our army and our", " navy"),
    ("I ask the", " Congress to"),
]


@cache
def harness(batch_size: int = 1) -> Any:
    """The packaged model as the harness loads it, from its path."""
    needs("lm_eval")
    from lm_eval.models.huggingface import HFLM

    told = {"device": "cpu", "batch_size": batch_size, "dtype": "float32"}
    return HFLM(pretrained=str(PRETRAINED), **told)


def requests(*arguments: tuple) -> list:
    """What the harness asks a model."""
    return [SimpleNamespace(args=each) for each in arguments]


def told(context: str, ending: str) -> tuple[float, bool]:
    """Log-probability of an ending, and whether greedy search would write it."""
    before = tokenizer()(context, add_special_tokens=False).input_ids
    ids = torch.tensor([tokenizer()(context + ending, add_special_tokens=False).input_ids])
    log = packaged()(ids).logits[0, len(before) - 1 : -1].log_softmax(-1).detach()
    asked = ids[0, len(before) :]
    return float(log.gather(1, asked[:, None]).sum()), bool((log.argmax(-1) == asked).all())


def _asked(batch_size: int) -> str:
    found = harness(batch_size).loglikelihood(requests(*ASKED), disable_tqdm=True)
    wanted = [told(*each) for each in ASKED]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    return close([value for value, _ in found], [value for value, _ in wanted], 1e-4)


check(HARNESS, "loglikelihood")(lambda: _asked(1))
check(HARNESS, "loglikelihood, three texts in one padded batch")(lambda: _asked(3))


@check(HARNESS, "loglikelihood_rolling: perplexity of a text")
def _rolling() -> str:
    text = "Fellow citizens of the Senate and of the House of Representatives"
    (found,) = harness().loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    ids = torch.tensor([[harness().prefix_token_id, *ids]])
    wanted = -packaged()(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return close(found, wanted, 1e-4)


@check(HARNESS, "generate_until")
def _until() -> str:
    asked = ("The Congress of the", {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False})
    (found,) = harness().generate_until(requests(asked), disable_tqdm=True)
    ids = tokenizer()(asked[0], return_tensors="pt", add_special_tokens=False).input_ids
    wanted = tokenizer().decode(greedy(packaged(), ids, 8)[0, ids.shape[1] :])
    assert found == wanted, (found, wanted)
    return repr(found)


@check(HARNESS, "a model that is already loaded")
def _loaded() -> str:
    needs("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=packaged(), tokenizer=tokenizer())
    found = model.loglikelihood(requests(ASKED[0]), disable_tqdm=True)
    return close(found[0][0], told(*ASKED[0])[0], 1e-4)


@check(DATA, "Dataset.map with the tokenizer, then with the model")
def _mapped() -> str:
    import datasets

    model, texts = packaged(), [context + ending for context, ending in ASKED]

    def loss(row: dict) -> dict:
        ids = torch.tensor([row["input_ids"]])
        return {"loss": model(ids, labels=ids).loss.item()}

    rows = datasets.Dataset.from_dict({"text": texts})
    rows = rows.map(lambda row: tokenizer()(row["text"])).map(loss)
    ids = [torch.tensor([tokenizer()(text).input_ids]) for text in texts]
    return close(rows["loss"][:], [model(each, labels=each).loss.item() for each in ids])


@check(DATA, "load_dataset of a local file, with_format('torch'), DataLoader")
def _loader() -> str:
    import datasets

    ids = random_ids(4, 12)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))
        rows = datasets.load_dataset("json", data_files=str(file), cache_dir=folder, split="train")
        loader = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=2)
        found = torch.cat([tiny_model()(**batch).logits.detach() for batch in loader])
    return close(found, tiny_model()(ids).logits.detach())


@check(DATA, "a stream of texts (IterableDataset)")
def _stream() -> str:
    import datasets

    rows = datasets.IterableDataset.from_generator(
        lambda: ({"input_ids": row} for row in random_ids(4, 12).tolist())
    )
    batch = next(iter(torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=4)))
    return close(
        tiny_model()(**batch).logits.detach(), tiny_model()(random_ids(4, 12)).logits.detach()
    )


@check(DATA, "scikit-learn learns from what the model holds of a text")
def _features() -> str:
    needs("sklearn")
    from sklearn.linear_model import LogisticRegression

    ids = random_ids(40, 12)
    labels = (ids[:, -1] % 2).numpy()
    with torch.inference_mode():
        hidden = tiny_model(hidden_dim=64).model(ids).last_hidden_state[:, -1].numpy()
    share = LogisticRegression(C=1e3, max_iter=2000).fit(hidden, labels).score(hidden, labels)
    assert share > 0.9, share
    return f"{share:.0%} of 40 rows"


@check(DATA, "safetensors: names and numbers of the file are those of the model")
def _safetensors() -> str:
    from safetensors.torch import load_file

    found, model = load_file(PRETRAINED / "model.safetensors"), packaged()
    weights = model.state_dict()
    assert set(weights) - set(found) <= {"lm_head.weight", "model.embed_tokens.weight"}
    for name, weight in found.items():
        close(weights[name], weight, 0)
    return f"{len(found)} tensors"


@check(DATA, "safetensors: load_model and save_model, with tied weights")
def _tied() -> str:
    from safetensors.torch import load_model, save_model

    model, again = tiny_model(), tiny_model()
    torch.nn.init.zeros_(again.lm_head.weight)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, file := f"{folder}/model.safetensors")
        load_model(again, file)
    ids = random_ids(2, 9)
    return close(again(ids).logits.detach(), model(ids).logits.detach(), 0)


@check(DATA, "a GGUF file")
def _gguf() -> str:
    needs("gguf")
    from gguf import GGUFWriter

    from hamt import HAMTForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(f"{folder}/model.gguf", "hamt")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return refused(
            lambda: HAMTForCausalLM.from_pretrained(folder, gguf_file="model.gguf"), "hamt"
        )


@check(DATA, "Gradio: a pipeline behind an Interface, asked by its client", slow=True)
def _gradio() -> str:
    needs("gradio")
    import gradio
    from transformers import pipeline

    pipe = pipeline("text-generation", model=packaged(), tokenizer=tokenizer())

    def write(text: str) -> str:
        return pipe(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]

    page = gradio.Interface(write, "text", "text", api_name="write")
    ids = tokenizer()("The Congress of", return_tensors="pt").input_ids
    wanted = tokenizer().decode(greedy(packaged(), ids, 5)[0], skip_special_tokens=True)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True)
    try:
        from gradio_client import Client

        found = Client(address, verbose=False).predict("The Congress of", api_name="/write")
    finally:
        page.close()
    assert found == wanted, (found, wanted)
    return repr(found)


@check(DATA, "tokenizers: the file alone gives the same tokens")
def _tokens() -> str:
    from tokenizers import Tokenizer

    text = "Fellow citizens — 1,000 dollars"
    ids = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json")).encode(text).ids
    assert ids == tokenizer()(text).input_ids
    written = packaged().generate(torch.tensor([ids]), max_new_tokens=3, **GREEDY)
    return equal(written, greedy(packaged(), torch.tensor([ids]), 3), "tokens")
