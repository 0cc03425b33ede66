"""The weights that a server's engine has, beside those with which it was started."""

from msgspec import Struct

FIRST = "0"
"""The version of the weights with which an engine starts."""


class Weights(Struct, frozen=True):
    """The weights of a model. `version`: the name that the user gives them. `path`: their folder; "": the model's
    own, or those of no folder.

    All servers of a model have the same weights, or are about to have them.
    """

    version: str = FIRST
    path: str = ""

    @property
    def are_pushed(self) -> bool:
        """Whether a trainer has pushed them to the servers. They are in no folder: only another push brings them."""
        return self.version != FIRST and not self.path


ORIGINAL = Weights()
"""Those with which an engine starts."""
