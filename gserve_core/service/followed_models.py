"""The models of a service that another process owns, and the queue of items for each, as this process uses them."""

import threading
from collections.abc import Callable, Mapping

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..errors import ConfigError, GserveError
from ..weights import Weights
from .attached import Attached
from .model_names import find_model
from .records import ModelRecord
from .remote import Remote

type Pool = Attached | Remote


class FollowedModels:
    """Follows the servers of each model that is used.

    `whole`: follows all servers. Its queue is that of a service with one model.
    `follow`: makes what follows the servers of one model, and has a timeout for them.
    """

    def __init__(self, whole: Pool, follow: Callable[[str, float | None], Pool]) -> None:
        self._whole = whole
        self._follow = follow
        self._pools: dict[str, Pool] = {}
        self._seeds: dict[str, Seeds] = {}
        self._lock = threading.Lock()

    @property
    def models(self) -> Mapping[str, ModelRecord]:
        """The models by name, as their owner has reported them last."""
        return self._whole.models

    def weights(self, name: str | None) -> Weights:
        """Return the weights of a model at this moment.

        Raises ConfigError: there is no such model. Raises GserveError: the service does not answer, or does not tell.
        """
        try:
            models = self._whole.read_models()
        except ConfigError as error:  # the service is restarting, say
            raise GserveError(str(error)) from error
        found = None if not models else models[find_model({it: it for it in models}, name)].weights
        if found is None:
            raise GserveError("the service does not name its weights: an older version of gserve runs it")
        return found

    def seeds(self, name: str | None) -> Seeds:
        """Return the seeds of a model's items. None: the only model. Raises ConfigError: there is no such model."""
        models = self.models
        if not models and name is None:  # a service of an older version, without a ready server
            return self._seeds.setdefault("", Seeds())
        name = find_model({it: it for it in models}, name)
        return self._seeds.setdefault(name, Seeds(models[name].seed))

    def dispatcher(self, name: str | None) -> Dispatcher | None:
        """Return the queue of a model; None if this is closed. None: the only model.

        Raises ConfigError: there is no such model. Raises GserveError: the service cannot be used.
        """
        models = self.models
        is_alone = all(model.is_alone for model in models.values())  # then the names may change at a reload
        if self._whole.dispatcher is None or (is_alone and len(models) <= 1 and name in (None, *models)):
            return self._whole.dispatcher
        name = find_model({it: it for it in models}, name)
        with self._lock:
            pool = self._pools.get(name) or self._pools.setdefault(
                name, self._follow(name, models[name].client_timeout)
            )
        pool.start()
        return pool.dispatcher

    def drain(self, why: str) -> None:
        """Accept no more items in this process. The service continues."""
        for pool in self._all():
            pool.drain(why)

    def ask_to_close(self) -> None:
        """Begin to close the connections, without waiting. May be called from any thread and from a finalizer."""
        for pool in self._all():
            pool.ask_to_close()

    def close(self, drain: float | None = None) -> None:
        """End the open calls, and close the connections. Idempotent. The service continues. `drain` is ignored."""
        for pool in self._all():
            pool.close(drain)

    def _all(self) -> list[Pool]:
        return [*self._pools.values(), self._whole]
