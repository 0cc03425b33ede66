"""Write what `vllm.LLM` itself answers, as JSON: the other side of the comparison in test_vllm_engine.py.

usage: python reference.py REQUESTS.json ANSWERS.json
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**asked["llm"])
    lora = LoRARequest("adapter", 1, asked["lora_path"]) if asked["lora_path"] else None
    answers = []
    for call in asked["calls"]:
        run = llm.chat if call["kind"] == "chat" else llm.generate
        params = None if call["params"] is None else SamplingParams(**call["params"])
        inputs = [
            {"prompt_token_ids": it} if isinstance(it, list) and call["kind"] != "chat" else it for it in call["inputs"]
        ]
        outputs = run(inputs, params, use_tqdm=False, lora_request=lora, **call["options"])
        answers.append([
            [{"text": it.text, "token_ids": list(it.token_ids), "finish_reason": it.finish_reason,
              "stop_reason": it.stop_reason, "cumulative_logprob": it.cumulative_logprob} for it in request.outputs]
            for request in outputs
        ])  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(answers))
