"""`Model`: the calls to one model of a service."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..errors import ConfigError, GserveError, ItemError
from ..messages import Prompt
from ..sampling import params_from
from ..weights import Weights
from .inference import Inference
from .state import ServerState

if TYPE_CHECKING:  # it takes time, and an attached service has none
    from .plan import ModelPlan


class Service(Protocol):
    """The part of a service that a model needs. For the methods see `VLLMService`."""

    @property
    def models(self) -> list[str]:
        """The names of the models."""

    def status(self) -> list[ServerState]:
        """Return the current state of each server."""

    def plan_of(self, name: str | None = None) -> "ModelPlan | None":
        """Return the plan of a model."""

    def weights_of(self, model: str | None = None) -> Weights:
        """Return the weights of a model."""

    def seeds_of(self, name: str | None = None) -> Seeds:
        """Return the seeds of the items of a model."""

    def dispatcher_of(self, name: str | None = None) -> Dispatcher:
        """Return the queue of a model."""


class Model(Inference):
    """The calls to one model of a service: `service[name]`. It keeps the service alive.

    `name`: the name of the model.
    """

    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        self.name = name

    @property
    def _seeds(self) -> Seeds:  # type: ignore[override]
        return self._service.seeds_of(self.name)

    def _dispatcher(self) -> Dispatcher:
        return self._service.dispatcher_of(self.name)

    def status(self) -> list[ServerState]:
        """Return the current state of each server of the model. Never waits."""
        states = self._service.status()
        return states if len(self._service.models) == 1 else [state for state in states if state.pool == self.name]

    def check_params(self, sampling_params: Any) -> None:
        """See `VLLMService.check_params`."""
        check_params(self._service.plan_of(self.name), sampling_params)

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int] | None:
        """See `VLLMService.prompt_lengths`."""
        return prompt_lengths(self._service.plan_of(self.name), prompts)

    def model_facts(self) -> dict[str, Any]:
        """See `VLLMService.model_facts`."""
        return model_facts(self._service, self.name, self.status())


def check_params(plan: "ModelPlan | None", sampling_params: Any) -> None:
    """Check sampling parameters for a model. `plan`: None if another process runs it. Raises ConfigError."""
    try:
        params = params_from(sampling_params)
        if params is not None and plan is not None:
            plan.parts.engine.check_params(params)
    except ItemError as error:
        raise ConfigError(str(error)) from error


def prompt_lengths(plan: "ModelPlan | None", prompts: Sequence[Prompt]) -> list[int] | None:
    """Return the number of tokens of each prompt for a model; None if they cannot be counted here."""
    return None if plan is None else plan.parts.engine.prompt_lengths(plan.llm, prompts)


def model_facts(service: Service, name: str | None, states: Iterable[ServerState]) -> dict[str, Any]:
    """Return what is known about a model of a service.

    `name`: its name; None: the only one. `states`: those of its servers, if another process runs the service.
    """
    from ..rows.fingerprint import model_facts, weight_facts

    if (plan := service.plan_of(name)) is not None:
        return model_facts(plan.llm, plan.parts.engine, plan.weights)
    models = {state.info.model for state in states if state.info is not None}
    facts = {"model": min(models)} if models else {}
    try:
        return facts | weight_facts(service.weights_of(name))
    except ConfigError:
        raise
    except GserveError:  # they cannot be known
        return facts
