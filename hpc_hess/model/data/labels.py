"""What a column says a sample's label is: a class, or numbers, as the model's configuration has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpc_hess.errors import DataError
from hpc_hess.intake.masks import IGNORED
from hpc_hess.model.sharded.loss import Loss

_KINDS: dict[str, Loss] = {
    "single_label_classification": "cross_entropy",
    "regression": "mse",
    "multi_label_classification": "bce",
}


class Labels:
    """Reads labels for a classifier's configuration.

    ``count``: of its outputs. ``loss``: of `problem_type` of config.json; where it says nothing, one output is a number,
    more are classes. ``left_out``: labels of -1 or -100 so far, which say that there is none.
    """

    def __init__(self, hf_config: Any) -> None:
        self.count = int(hf_config.num_labels)
        kind = getattr(hf_config, "problem_type", None)
        self.loss: Loss = _KINDS[kind] if kind else "mse" if self.count == 1 else "cross_entropy"
        self._names = {str(name): int(number) for name, number in (hf_config.label2id or {}).items()}
        self.left_out = 0

    def __call__(self, value: Any, place: str) -> Any:
        """Return a class number, or numbers float64 (count,); None where there is no label.

        Raises
        ------
        DataError : it is not one that the model can predict; names ``place``.

        """
        return self._class(value, place) if self.loss == "cross_entropy" else self._numbers(value, place)

    def _class(self, value: Any, place: str) -> int | None:
        if isinstance(value, str):
            if value not in self._names:
                known = ", ".join(self._names) or "nothing"
                raise DataError(f"{place} holds '{value}', which label2id of config.json does not have (it has {known})")
            return self._names[value]
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise DataError(f"{place} is {type(value).__name__}: it should be a class number, or a name of label2id")
        if value in (-1, IGNORED):
            self.left_out += 1
            return None
        if not 0 <= value < self.count:
            raise DataError(
                f"{place} holds the label {value}, and the model has {self.count} classes, 0 to {self.count - 1}: the data, "
                "or num_labels (id2label) of config.json, belong to another task"
            )
        return int(value)

    def _numbers(self, value: Any, place: str) -> np.ndarray:
        try:
            found = np.atleast_1d(np.asarray(value, np.float64))
        except (TypeError, ValueError):
            found = np.full(0, np.nan)
        wrong = found.shape != (self.count,) or not np.isfinite(found).all()
        if wrong or (self.loss == "bce" and not np.isin(found, (0, 1)).all()):
            what = "0 or 1 for each of" if self.loss == "bce" else "a number for each of"
            raise DataError(f"{place} holds {value!r:.60}: it should be {what} the model's {self.count} outputs")
        return found
