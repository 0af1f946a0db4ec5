"""A function of a model that doesn't keep it alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class Bound:
    """function(model, …) for an attribute of one of the model's attributes: no cycle of references, so that the memory is freed
    with the model's last name. A deep copy or a pickle of the model has it bound to the copy."""

    def __init__(self, function: Callable[..., Any], model: nn.Module):
        self.function, self._model = function, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        model = self._model()
        return Bound(self.function, memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.function, self._model())
