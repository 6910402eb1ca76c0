"""llama.cpp's own server in this process (the wheel xllamacpp), asked over HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

with_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


class LlamaServer:
    """A client of the running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def answer(self, prompt: list[int], tokens: int, lora: Sequence[dict[str, float]] | None = None) -> list[int]:
        """Return the greedy tokens of a prompt, with the scales of the request or else the server's."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", body | ({} if lora is None else {"lora": list(lora)}))["tokens"]

    def scale(self, **scales: float) -> None:
        """Set the server's scales, by adapter: ``scale(_0=1.0, _1=0.0)``."""
        self.ask("/lora-adapters", [{"id": int(name[1:]), "scale": scale} for name, scale in scales.items()])


@contextmanager
def llama_server(model: Path, adapters: Sequence[Path], scale: float = 1.0) -> Iterator[LlamaServer]:
    """Serve a GGUF file with adapters."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_threads_http, params.verbosity = 256, 1, 2, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.fit_params, params.ui = False, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # keys and values as ours are
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), scale) for file in adapters]
    server = xllamacpp.Server(params)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server
