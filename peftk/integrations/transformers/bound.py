"""A method that doesn't keep its model alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class Bound:
    """function(model, …) as a callable that others of the model's attributes may hold: no cycle of references, so that a model's
    memory is freed with its last name. A deep copy or a pickle of the model has it bound to the copy."""

    def __init__(self, function: Callable[..., Any], model: nn.Module):
        self.function, self._model = function, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        model = self._model()
        return Bound(self.function, memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.function, self._model())
