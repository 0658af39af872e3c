"""All weights of a model, checked before any of them is replaced, so that no two policies mix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vrthinker.errors import EngineError


class WholeWeights:
    """The names and shapes that the weights of a checkpoint have in transformers.

    Args:
        config: The checkpoint's transformers configuration.
    """

    def __init__(self, config: Any) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
        model.tie_weights()
        self._weights = dict(model.state_dict(keep_vars=True))
        self._first: dict[int, str] = {}
        for name, tensor in self._weights.items():
            self._first.setdefault(id(tensor), name)

    def checked(self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The weights as pairs, each of them once. Of weights that are tied, one is enough.

        Tied weights go by the name that the model's state has first.

        Raises:
            EngineError: A name is unknown or missing, or a shape differs.
        """
        given: Any = named_tensors.items() if hasattr(named_tensors, "items") else named_tensors
        pairs = list(given)
        for name, tensor in pairs:
            if name not in self._weights:
                raise EngineError(f"update_weights: unknown tensor {name!r}")
            if tuple(tensor.shape) != tuple(self._weights[name].shape):
                got, wanted = tuple(tensor.shape), tuple(self._weights[name].shape)
                raise EngineError(f"update_weights: {name}: got shape {got}, wanted {wanted}")
        there = {id(self._weights[name]) for name, _ in pairs}
        if missing := sorted(name for name, tensor in self._weights.items() if id(tensor) not in there):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise EngineError(
                f"update_weights: got {len(pairs)} tensors, missing {', '.join(missing[:3])}{more}; give "
                "every "
                "weight of the model"
            )
        once: dict[int, tuple[str, Any]] = {}
        for name, tensor in pairs:
            which = id(self._weights[name])
            once.setdefault(which, (self._first[which], tensor))
        return list(once.values())
