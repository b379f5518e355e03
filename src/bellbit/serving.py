"""An OpenAI-compatible endpoint by what exists: transformers' server for checkpoints, llama.cpp's for GGUF files."""

from __future__ import annotations

import errno
import socket
import threading

from bellbit.errors import BellbitError, first_line
from bellbit.loading import Location, load_config


def serve(location: Location, host: str, port: int) -> None:
    """Answer requests until Ctrl-C.

    Raises BellbitError if the model or the package that serves it is missing, the port is taken or the host not here.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise BellbitError(f"cannot listen on {host}:{port}: {error.strerror}; give another {other}") from None
    if location.gguf:
        _serve_gguf(location, host, port)
    else:
        _serve_checkpoint(location, host, port)


def _serve_checkpoint(location: Location, host: str, port: int) -> None:
    load_config(location)  # an unknown model is told before a server starts
    from transformers.cli.serve import Serve

    try:
        Serve(force_model=location.path, host=host, port=port)
    except ImportError as error:
        raise BellbitError(f"serving is not installed ({first_line(error)}): pip install 'bellbit[serve]'") from None


def _serve_gguf(location: Location, host: str, port: int) -> None:
    try:
        import xllamacpp
    except ImportError:
        raise BellbitError("serving a GGUF file needs llama.cpp: pip install 'bellbit[serve]'") from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = f"{location.path}/{location.gguf}"
    parameters.hostnames, parameters.port = [host], port
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise BellbitError(f"llama.cpp cannot serve {location.spec!r}: {first_line(error)}") from None
    assert server is not None  # it answers from threads of its own while it is kept
    threading.Event().wait()
