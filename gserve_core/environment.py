"""What a server must not take over from the environment that it inherits."""

from collections.abc import Collection, Mapping

WEAKENING = {
    "VLLM_SERVER_DEV_MODE": "0",  # routes that reset caches, put the engine to sleep, and call any method of it
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # clients load adapters from any path
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # pickle, which runs what it reads
    "PYTHONOPTIMIZE": "",  # takes out assert statements, some of which are vLLM's checks (CVE-2026-41523)
}
"""Variables that open vLLM to attacks, and the values that do not."""


RESERVED = {
    "GSERVE_TOKEN": "each server has a token of its own, which clients of the same user find by themselves",
    "GSERVE_ID": "gserve finds a server's processes by it",
    "GSERVE_OWNER": "gserve finds a server's processes by it",
    "GSERVE_SERVER": "gserve finds a server's processes by it",
    "GSERVE_ATTACH": "it names a launched service for clients, not for servers",
}
"""Variables that gserve itself sets for servers, or that mean nothing to them, and why a config cannot set them."""


def weakening(environ: Mapping[str, str], chosen: Collection[str]) -> dict[str, str]:
    """Return the variables to set over those of `environ` that weaken vLLM, but for those that a config has chosen."""
    return {
        name: harmless
        for name, harmless in WEAKENING.items()
        if name not in chosen and environ.get(name, harmless) != harmless
    }
