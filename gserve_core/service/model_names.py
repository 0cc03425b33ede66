"""The search for a model by the name that a user gives."""

from collections.abc import Mapping

from ..errors import ConfigError, did_you_mean


def find_model(keys: Mapping[str, str], name: str | None, *, of_several: bool = False) -> str:
    """Return the key of a model, of `keys` by name. None: the only model. Raises ConfigError: see `Plan.key_of`.

    `of_several`: whether `keys` are the models of several services.
    """
    if name is None and len(keys) == 1:
        return next(iter(keys.values()))
    known = ", ".join(f"'{it}'" for it in keys)
    if name is None:
        raise ConfigError(f"this service has several models: choose one of {known}")
    if name not in keys:
        hint = hint if "did you mean" in (hint := did_you_mean(name, list(keys))) else ""
        who, whose = ("these services have", "their") if of_several else ("this service has", "its")
        raise ConfigError(f"{who} no model '{name}'{hint}; {whose} models: {known}")
    return keys[name]
