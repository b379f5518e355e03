"""`bellbit serve` answers the openai client, for a checkpoint and for its GGUF export."""

import socket
import subprocess
import sys
import time

import pytest

import bellbit
from bellbit.errors import BellbitError
from bellbit.exporting import export_gguf
from bellbit.loading import locate
from bellbit.serving import serve

openai = pytest.importorskip("openai")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serving():
    """Starts `bellbit serve MODEL` and gives a client once it listens."""
    servers = []

    def start(model):
        port = free_port()
        command = [sys.executable, "-m", "bellbit", "serve", str(model), "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        servers.append(server)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
        raise AssertionError("the server does not listen")

    yield start
    for server in servers:
        server.terminate()
        server.wait(30)


def test_a_checkpoint_and_its_export_answer_in_pieces(serving, tiny_model, tmp_path):
    out = tmp_path / "out"
    bellbit.quantize(tiny_model("llama"), out, "rtn", bits=4)
    export_gguf(out, tmp_path / "model.gguf")
    for model in (out, tmp_path / "model.gguf"):
        client = serving(model)
        name = client.models.list().data[0].id if model != out else str(out)
        stream = client.completions.create(model=name, prompt="Once upon a time", max_tokens=8, stream=True)
        pieces = [piece.choices[0].text for piece in stream if piece.choices]
        assert len(pieces) > 1 and "".join(pieces)


def test_a_taken_port_is_named(tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "bellbit", "serve", str(tiny_model("llama")), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "give another --port" in done.stderr


def test_an_address_of_another_machine_is_told_from_a_taken_port(tiny_model):
    with pytest.raises(BellbitError, match=r"cannot listen on 203\.0\.113\.1:8000: .*; give another --host"):
        serve(locate(str(tiny_model("llama"))), "203.0.113.1", 8000)
