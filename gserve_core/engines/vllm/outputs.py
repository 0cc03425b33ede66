"""Completions of vLLM in gserve's types."""

from typing import Any

from ...messages import FlatLogprobs, FlatOutput, Logprob, Logprobs, ResponseOutput


def converted(it: Any, prompt_logprobs: Any, prompt_tokens: int | None) -> ResponseOutput:
    """Convert a completion of vLLM. `prompt_tokens`: see `ResponseOutput`."""
    plain = it.text, list(it.token_ids), it.finish_reason, it.stop_reason, it.cumulative_logprob
    if it.logprobs is None and prompt_logprobs is None:
        return ResponseOutput(*plain, prompt_tokens=prompt_tokens)
    if isinstance(it.logprobs, list) or isinstance(prompt_logprobs, list):  # this vLLM has no flat log probabilities
        return ResponseOutput(*plain, _logprobs(it.logprobs), _logprobs(prompt_logprobs), prompt_tokens)
    return FlatOutput(
        *plain,
        prompt_tokens=prompt_tokens,
        flat_logprobs=_flat(it.logprobs),
        flat_prompt_logprobs=_flat(prompt_logprobs),
    )


def _logprobs(given: Any) -> Logprobs | None:
    if given is None:
        return None
    return [
        entry and {token: Logprob(it.logprob, it.rank, it.decoded_token) for token, it in entry.items()}
        for entry in given
    ]


def _flat(given: Any) -> FlatLogprobs | None:
    """Convert a `vllm.logprobs.FlatLogprobs`."""
    if given is None:
        return None
    counts = [end - start for start, end in zip(given.start_indices, given.end_indices, strict=True)]
    return FlatLogprobs(counts, given.token_ids, given.logprobs, given.ranks, given.decoded_tokens)
