"""vLLM's own application for OpenAI's API, over an engine that exists already.

It is built as `vllm serve` builds it: from the namespace of its command line. Nothing of it is written again here.
"""

import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from ...errors import ConfigError, RemoteError, did_you_mean
from ...interfaces import ASGIApp, ASGIMessage, ASGIReceive, ASGISend
from . import differences

PLACES = {  # attribute of `Front`: where vLLM has it, the newest place first
    "Parser": ("vllm.utils.argparse_utils:FlexibleArgumentParser", "vllm.utils:FlexibleArgumentParser"),
    "make_parser": (
        "vllm.entrypoints.common.cli_args:make_arg_parser",
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",
        "vllm.entrypoints.openai.cli_args:make_arg_parser",
    ),
    "validate": (
        "vllm.entrypoints.launchers.launcher:validate_api_server_args",
        "vllm.entrypoints.openai.api_server:validate_api_server_args",
    ),
    "build_app": (
        "vllm.entrypoints.launchers.app:build_app",
        "vllm.entrypoints.openai.api_server:build_app",
    ),
    "init_state": (
        "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
        "vllm.entrypoints.openai.api_server:init_app_state",
    ),
}
FLAGS = {  # whether the flag has a value
    "--chat-template-content-format": True,
    "--enable-force-include-usage": False,
    "--enable-per-request-metrics": False,
    "--enable-prompt-tokens-details": False,
    "--exclude-tools-when-tool-choice-none": False,
    "--fingerprint-mode": True,
    "--fingerprint-value": True,
    "--response-role": True,
    "--return-tokens-as-token-ids": False,
    "--sse-keep-alive-interval": True,
    "--tool-strict-level": True,
}
"""Flags of `vllm serve` that `openai_args` may hold. All of them concern the answers of this API."""
INSTEAD = {
    "--api-key": "set the key of the gateway, or GSERVE_TOKEN",
    "--chat-template": "set llm.llm_kwargs.chat_template",
    "--default-chat-template-kwargs": "set engine.chat_template_kwargs",
    "--enable-auto-tool-choice": "set engine.tool_call_parser",
    "--host": "set serve.host",
    "--lora-modules": "set llm.adapters",
    "--port": "set serve.port",
    "--reasoning-parser": "set llm.llm_kwargs.reasoning_parser",
    "--served-model-name": "set llm.llm_kwargs.served_model_name",
    "--tool-call-parser": "set engine.tool_call_parser",
}
"""Flags of `vllm serve` whose place in a config of gserve is another one."""
KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM would require this key besides the server's token."""


def check_flags(flags: Sequence[str]) -> None:
    """Raise ConfigError unless all flags are in `FLAGS`, and have their values."""
    rest = list(flags)
    while rest:
        flag, equals, _ = rest.pop(0).partition("=")
        if flag not in FLAGS:
            hint = f": {INSTEAD[flag]}" if flag in INSTEAD else did_you_mean(flag, list(FLAGS))
            raise ConfigError(f"'{flag}' is not allowed here{hint}", at="$.engine.openai_args")
        if not equals and FLAGS[flag]:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"'{flag}' needs a value, as in {flag}=…", at="$.engine.openai_args")
            rest.pop(0)
        elif equals and not FLAGS[flag]:
            raise ConfigError(f"'{flag}' has no value: write it alone", at="$.engine.openai_args")


class Front:
    """The arguments of the application, checked before the model is loaded.

    `model`: the name or path under which vLLM loads the model. `names`: its names for clients.
    `template`: text of the chat template that replaces the model's own. `template_kwargs`: its default variables.

    Raises ConfigError: `flags` or the name of a parser is wrong.
    Raises GserveError: this vLLM lacks what gserve needs for this API.
    """

    def __init__(
        self,
        *,
        model: str,
        names: Sequence[str],
        template: str | None,
        template_kwargs: Mapping[str, Any],
        tool_call_parser: str | None,
        reasoning_parser: str | None,
        flags: Sequence[str],
    ) -> None:
        os.environ.pop(KEY_VARIABLE, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._vllm = SimpleNamespace(**{name: differences.find_first(*them) for name, them in PLACES.items()})
        parser = self._vllm.Parser()
        parser.error = _refuse
        line = ["--model", model, "--served-model-name", *names, "--disable-fastapi-docs"]
        if tool_call_parser is not None:
            line += ["--enable-auto-tool-choice", "--tool-call-parser", tool_call_parser]
        self._args: Namespace = self._vllm.make_parser(parser).parse_args([*line, *flags])
        with differences.expected("setting the arguments of OpenAI's API"):
            own: dict[str, Any] = {"chat_template": template, "enable_tokenizer_info_endpoint": True}
            if template_kwargs:
                own["default_chat_template_kwargs"] = dict(template_kwargs)
            for name, value in own.items():
                getattr(self._args, name)
                setattr(self._args, name, value)
            self._args.middleware, self._args.api_key = [], None
            self._args.structured_outputs_config.reasoning_parser = reasoning_parser or ""
        try:
            self._vllm.validate(self._args)
        except KeyError as error:  # one of the two names is not known
            raise ConfigError(str(error.args[0]), at="$.engine") from error

    async def application(self, engine: Any, adapters: dict[str, Any]) -> ASGIApp:
        """Return the application over an `AsyncLLM`. Raises GserveError: this vLLM works otherwise.

        `adapters`: the `LoRARequest` of each adapter by name. The caller may change it while the application runs.
        """
        args = self._args
        args.structured_outputs_config = engine.vllm_config.structured_outputs_config  # it holds the reasoning parser
        args.disable_log_stats = not engine.log_stats
        args.enable_log_requests = False
        with differences.expected("building OpenAI's API"):
            tasks = await engine.get_supported_tasks()
            app = self._vllm.build_app(args, tasks, engine.model_config)
            await self._vllm.init_state(engine, app.state, args, tasks)
            app.state.openai_serving_models.lora_requests = adapters
        app.state.server = SimpleNamespace(should_exit=False)  # vLLM's handler for a dead engine sets it
        built: ASGIApp = app
        return built


def paths(application: Any) -> frozenset[str]:
    """Return the paths of an application's routes."""
    return frozenset(path for route in application.routes if (path := getattr(route, "path", None)) is not None)


def counted(application: ASGIApp, begin: Callable[[], object], end: Callable[[None], object]) -> ASGIApp:
    """Return an application that calls `begin` and `end` for each request that may use the engine.

    It refuses in OpenAI's form the routes that `application` does not have, such as embeddings of a text model.
    """
    known = paths(application)

    async def count(scope: ASGIMessage, receive: ASGIReceive, send: ASGISend) -> None:
        if (path := scope["path"]) not in known:
            raise RemoteError(f"this model does not offer {path}", status=404)
        begin()
        try:
            await application(scope, receive, send)
        finally:
            end(None)

    return count


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message, at="$.engine.openai_args")
