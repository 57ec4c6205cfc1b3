"""A server that runs, its model and a client."""

import socket
import threading
import time

import openai
import pytest
import torch
import uvicorn
from server_inputs import MAX_TOKENS, NAME

from hamt.checkpoint import load_checkpoint
from hamt.serving.engine import Engine
from hamt.serving.server import Service, build_app
from hamt.serving.states import StateStore


@pytest.fixture(scope="module")
def model(folders):
    """A model and its tokenizer; what it writes is plain text that does not end by itself."""
    torch.manual_seed(3)
    model, tokenizer = load_checkpoint(folders / "ours")
    with torch.no_grad():
        model.model.layers[0].mixer.output_proj.weight.normal_(std=0.5)
        embedding = model.model.embed_tokens.weight.normal_(std=0.3)
        for token in range(model.config.vocab_size):
            text = tokenizer.decode(token)
            if not (text.strip().isalnum() and text.isascii()):
                embedding[token] *= 0.01
    return model, tokenizer


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model[0], StateStore(10**8), 8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(model, engine):
    """Host and port of a server that runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_app(Service(engine, model[1], NAME, MAX_TOKENS), "127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield "127.0.0.1", port
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(address):
    base = "http://{}:{}/v1".format(*address)
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
        yield client
