"""The fronts of an engine's models, by name."""

from __future__ import annotations

from collections.abc import Iterable

from crosspool.core.errors import InvalidRequestError, ModelNotFoundError
from crosspool.core.info import EngineInfo
from crosspool.text.front import ModelFront


class Fronts:
    """Every model that serves has a front; for the others ``get`` says that they do not."""

    def __init__(self, info: EngineInfo, fronts: Iterable[ModelFront]) -> None:
        self._info = info
        self._fronts = {front.model.name: front for front in fronts}

    @classmethod
    def open(cls, info: EngineInfo) -> Fronts:
        """Read tokenizer and chat template of each model that serves. Takes some tenths of a second each."""
        return cls(info, [ModelFront.open(model) for model in info.models if model.error is None])

    def get(self, name: str | None) -> ModelFront:
        """The front of a model, which need not be named where there is only one.

        Raises ModelNotFoundError or ModelUnavailableError.
        """
        names = [model.name for model in self._info.models]
        if name is None:
            if len(names) != 1:
                raise InvalidRequestError(f"model must be one of {', '.join(names)}", parameter="model")
            name = names[0]
        model = self._info.model(name)
        if model is None:
            raise ModelNotFoundError(
                f"there is no model {name!r}; there are {', '.join(names)}", parameter="model"
            )
        model.check_serves()
        return self._fronts[name]

    def close(self) -> None:
        for front in self._fronts.values():
            front.close()
