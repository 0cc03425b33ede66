"""The files that a config names for vLLM: the LoRA adapter of `lora_path`, and a chat template."""

from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...host.folders import expanded


def chat_template(given: Any) -> str | None:
    """Return the text of a chat template that was given as text or as a file.

    Raises ConfigError: it is neither, or the file cannot be read.
    """
    if given is not None and not isinstance(given, str):
        raise ConfigError("expected a chat template as a text or as a file", at="$.llm.llm_kwargs.chat_template")
    if given is None or "{" in given:
        return given
    try:
        return expanded(given).read_text()
    except (OSError, ValueError) as error:  # ValueError: the file is not text
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot read the chat template {given}: {why}", at="$.llm.llm_kwargs.chat_template"
        ) from error


def adapter_folder(path: str | None) -> Path | None:
    """Return the folder of a LoRA adapter that was given as its folder or a file in it; None for None.

    Raises ConfigError: no adapter is there.
    """
    if path is None:
        return None
    given = expanded(path)
    try:
        folder = given.parent if given.is_file() else given
        is_there = (folder / "adapter_config.json").is_file()
    except OSError as error:
        raise ConfigError(f"no LoRA adapter in {given}: {error.strerror}", at="$.llm.lora_path") from error
    if not is_there:
        raise ConfigError(f"no LoRA adapter in {folder}: expected adapter_config.json there", at="$.llm.lora_path")
    return folder.resolve()


def check_adapter_weights(folder: Path) -> None:
    """Check that the adapter of `lora_path` has weights, in any format. Raises ConfigError: it has none."""
    if not any(folder.glob("adapter_model.*")):
        raise ConfigError(f"no LoRA adapter in {folder}: expected adapter_model.safetensors there")
