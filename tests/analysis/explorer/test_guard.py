"""The page answers itself, and keeps little for long: a real server, asked over HTTP."""

import asyncio
import contextlib
import gc
import http.client
import json

import pytest

from hamt.analysis.explorer.session import Explorer, View
from hamt.checkpoint import PRETRAINED, load_checkpoint

# Of Gradio and what it uses.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server():
    """The page, served by this process: its address and the application."""
    pytest.importorskip("gradio")
    from hamt.analysis.explorer.app import build_app, launch

    app = build_app(Explorer(*load_checkpoint(PRETRAINED)), "a model")
    _, address, _ = launch(app, "127.0.0.1", None)
    yield address.split("//")[1].rstrip("/"), app
    app.close()
    loop = asyncio.get_event_loop()  # Gradio leaves one in this thread
    if not loop.is_running():
        loop.close()
        asyncio.set_event_loop(None)


def ask(host, method, path, headers=(), body=None):
    """Status and body of an answer."""
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    said = answer.status, answer.read().decode()
    connection.close()
    return said


def test_its_own_page_is_answered_under_its_own_names(server):
    host, port = server[0], server[0].split(":")[1]
    for name in (host, f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert ask(host, "GET", "/", {"Host": name})[0] == 200
        assert ask(host, "GET", "/", {"Host": name, "Origin": f"http://{name}"})[0] == 200


FOREIGN_HOSTS = ["elsewhere.example", "127.0.0.1.elsewhere.example", "localhost.example", "[", ""]
FOREIGN_ORIGINS = [
    "http://elsewhere.example",
    "https://127.0.0.1.elsewhere.example",
    "null",
    "",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://localhost:{port}",
    "file://",
]


@pytest.mark.parametrize("name", FOREIGN_HOSTS)
def test_a_name_that_is_made_to_point_here_is_refused(server, name):
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join")):
        assert ask(server[0], method, path, {"Host": name})[0] == 400


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/cancel"),
        ("POST", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=a"),
        ("GET", "/"),
    ],
)
def test_another_page_is_refused(server, method, path, origin):
    headers = {"Origin": origin.format(port=server[0].split(":")[1])}
    assert ask(server[0], method, path, headers)[0] == 403


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/upload/", "/upload"])
@pytest.mark.parametrize("size", [100, 10**6])
def test_no_file_is_taken(server, path, size, monkeypatch):
    host, app = server
    part = 'Content-Disposition: form-data; name="files"; filename="a"'
    body = f"--x\r\n{part}\r\n\r\n{'w' * size}\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    kept = set(app.upload_file_set)
    with contextlib.suppress(ConnectionError):  # refused before it was all sent
        assert ask(host, "POST", path, headers, body)[0] == 403
    assert set(app.upload_file_set) == kept


@pytest.mark.parametrize("path", ["/gradio_api/run/read", "/login", "/gradio_api/component_server"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_what_the_page_does_not_use_is_refused(server, method, path):
    assert ask(server[0], method, path, body="{}")[0] == 403


def test_a_body_without_an_end_is_refused(server):
    path = "/gradio_api/queue/join"
    assert ask(server[0], "POST", path, {"Content-Length": str(10**9)})[0] == 413
    assert ask(server[0], "POST", path, {"Transfer-Encoding": "chunked"}, [b"{}"])[0] == 411
    # Of both, the length is not what counts.
    both = {"Transfer-Encoding": "chunked", "Content-Length": "2"}
    assert ask(server[0], "POST", path, both, [b"{}"])[0] == 411


def call(server, name, session, *data):
    """What one of the page's functions answers a visitor at last."""
    host, app = server
    index = next(i for i, function in app.fns.items() if function.name == name)
    told = {"data": data, "fn_index": index, "session_hash": session}
    headers = {"Content-Type": "application/json", "Origin": f"http://{host}"}
    assert ask(host, "POST", "/gradio_api/queue/join", headers, json.dumps(told))[0] == 200
    _, stream = ask(host, "GET", f"/gradio_api/queue/data?session_hash={session}")
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    (done,) = [event for event in events if event["msg"] == "process_completed"]
    assert done["success"], done
    return done["output"]["data"]


def test_of_24_visitors_few_texts_are_kept(server):
    from hamt.analysis.explorer.app import SESSIONS

    for visitor in range(24):
        _, status, *_ = call(server, "read", f"visitor{visitor}", "The state.", 3)
        assert "tokens read" in str(status)
    gc.collect()
    assert sum(isinstance(each, View) for each in gc.get_objects()) <= SESSIONS
