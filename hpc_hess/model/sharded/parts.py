"""What an operator of a user's program is made of, for those who make it again: a run that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_hess.intake.findings import Finding
from hpc_hess.model.sharded.loss import CausalLMObjective
from hpc_hess.model.sharded.own_loss import CallableObjective
from hpc_hess.model.sharded.shard import ShardedModel


@dataclass(frozen=True)
class Parts:
    """What an operator is made of.

    ``settings``: tables of the configuration, as the program gave them. ``loss``: words that tell it from others.
    ``findings``: of the intake.
    """

    model: ShardedModel
    objective: CausalLMObjective | CallableObjective
    settings: Mapping[str, Mapping[str, Any]]
    loss: str
    findings: Sequence[Finding] = ()

    @property
    def half(self) -> bool:
        """Whether the model computes in half precision, in another type than that of the vectors."""
        named = dict(self.model.module.named_parameters())
        return named[self.model.layout.parameters[0].name].dtype != self.model.space.dtype
