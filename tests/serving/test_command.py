"""``hamt serve``, as a process of its own, and what it refuses before it serves."""

import signal
import socket
import subprocess
import sys

import openai
import pytest

from hamt.cli import main
from hamt.errors import UserError
from hamt.guard import check_address, in_url


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "0"], "port"),
        (["--host", "203.0.113.1"], "cannot serve at 203.0.113.1"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
    ids=["port", "host", "checkpoint"],
)
def test_a_command_that_cannot_be_is_told_in_one_line(arguments, words, capsys):
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_an_ipv6_address_is_one():
    assert [in_url(host) for host in ("::1", "127.0.0.1")] == ["[::1]", "127.0.0.1"]
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    check_address("::1", None)
    with server, pytest.raises(UserError, match="cannot serve at ::1, port"):
        check_address("::1", server.getsockname()[1])


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folders):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hamt", "serve", "--checkpoint", folders / "ours"]
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line == f"ours: http://127.0.0.1:{port}/v1; Ctrl-C ends it.\n"
            with openai.OpenAI(base_url=line.split()[1].rstrip(";"), api_key="none") as client:
                answer = client.completions.create(model="ours", prompt="the sum", max_tokens=3)
                assert answer.usage.completion_tokens == 3
                stream = client.completions.create(
                    model="ours", prompt="the sum", max_tokens=10**5, stream=True
                )
                next(iter(stream))  # who is being answered holds nothing up
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
