"""Runs the trainer of docs/guides/grpo.md, and reports its pushes and the versions of the answers that it gets.

The folder in which it runs has `grpo.py`. It keeps the weights of each push in a folder `push-NUMBER`.
"""

import sys
from pathlib import Path
from typing import Any

import requests
from safetensors.torch import save_file

sys.path.insert(0, "")
import grpo  # type: ignore[import-not-found]

push, request = grpo.VLLMClient.update_named_params, requests.Session.request


def kept_push(client: Any, metadata: Any, named_params: Any) -> None:
    """Keep the tensors, then push them."""
    tensors = {name: tensor.clone() for name, tensor in named_params}
    folder = Path(f"push-{client.pushes + 1}")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    push(client, metadata, iter(tensors.items()))
    sys.stdout.write(f"pushed {client.pushes}\n")
    sys.stdout.flush()


def shown_request(session: Any, method: str, url: str, *arguments: Any, **named: Any) -> Any:
    """Send a request, and report the version that its answer names."""
    reply = request(session, method, url, *arguments, **named)
    if url.endswith("/v1/completions"):
        sys.stdout.write(f"answered {reply.headers['x-gserve-weight-version']} {len(reply.json()['choices'])}\n")
        sys.stdout.flush()
    return reply


grpo.VLLMClient.update_named_params = kept_push
requests.Session.request = shown_request  # type: ignore[method-assign,assignment]
grpo.train(sys.argv[1])
