"""Selection for one served model: its gates, what its experts cost now, and how good it was.

T tokens, D hidden size, K experts per token.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from expertmesh.router.core import RouterCore
from expertmesh.router.expert_costs import ExpertCosts
from expertmesh.router.gate import Scored, score
from expertmesh.router.selection import Selection, select
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.served_model import Gate, ServedModel
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.metrics import Metrics
from expertmesh.v1 import router_pb2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Selected:
    """A selection and what it was made from."""

    scored: Scored
    costs: ExpertCosts
    selection: Selection


class Selector:
    """Selects experts as callers or the configuration want it.

    Args:
        default: for calls that say nothing.
        exact_sample_frac: share of the calls that give up mass whose error is measured.
    """

    def __init__(
        self,
        model: ServedModel,
        core: RouterCore,
        metrics: Metrics,
        default: SelectionOptions,
        exact_sample_frac: float = 0.0,
        random: Random | None = None,
    ) -> None:
        self.default = default
        self._model = model
        self._core = core
        self._metrics = metrics
        self._exact_sample_frac = exact_sample_frac
        self._random = random or Random()
        self._measuring: set[asyncio.Task[None]] = set()

    def options(self, request: Any) -> SelectionOptions:
        """What a request asks for (a message with a field `selection`).

        Raises:
            ConfigError: an option out of range; names it.
        """
        if not request.HasField("selection"):
            return self.default
        return validate(SelectionOptions, options_from(request.selection))

    def select(self, layer: int, hidden_TD: torch.Tensor, options: SelectionOptions) -> Selected:
        """The experts for some tokens.

        Raises:
            InvalidInput: the options do not fit the model.
            UnsupportedCheckpoint: the gate of the family is not known.
        """
        scored = self.scored(layer, hidden_TD)
        costs = self._core.expert_costs(layer)
        with torch.inference_mode():
            return Selected(scored, costs, select(scored, costs, options.of_layer(layer)))

    def scored(self, layer: int, hidden_TD: torch.Tensor, field: str = "selection") -> Scored:
        """What the layer's gate thinks of every expert; raises as `check`."""
        gate = self.check(layer, field)
        with torch.inference_mode():
            return score(gate.spec, hidden_TD, gate.weights)

    def check(self, layer: int, field: str = "selection") -> Gate:
        """The layer's gate, if experts can be selected by it.

        Args:
            field: what is asked for, for the error.

        Raises:
            InvalidInput: they cannot; says why.
            UnsupportedCheckpoint: the gate of the family is not known.
        """
        gate = self._model.gate(layer)
        for needed, cannot in (
            ("a gate that scores experts independently", gate.spec.select == "sparsemixer"),
            ("weights that multiply an expert's output", gate.spec.apply == "before"),
        ):
            if cannot:
                got = f"layer {layer} of {self._model.name}"
                raise InvalidInput.of(
                    field, expected=needed, got=got, hint="This model selects exactly."
                )
        return gate

    def account(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        out_TD: torch.Tensor,
        given_up_T: torch.Tensor,
        options: SelectionOptions,
    ) -> None:
        """Count what an answered call gave up; of some calls, measure in the background by how much
        the answer is wrong. On the event loop.

        Args:
            hidden_TD, out_TD: what the call got and gave.
        """
        for given_up in given_up_T.tolist():
            self._metrics.given_up_mass.record(given_up, self._model.name)
        if not bool(given_up_T.any()) or self._random.random() >= self._exact_sample_frac:
            return
        # copies: blocks of transformers add to what their experts got and gave
        measuring = self._measure(layer, hidden_TD.clone(), out_TD.clone(), options)
        task = asyncio.get_running_loop().create_task(measuring)
        self._measuring.add(task)
        task.add_done_callback(self._measured)

    def _measured(self, task: asyncio.Task[None]) -> None:
        self._measuring.discard(task)
        if not task.cancelled() and task.exception():
            logger.warning("the error of a selection was not measured: %s", task.exception())

    async def _measure(
        self,
        layer: int,
        hidden_TD: torch.Tensor,
        out_TD: torch.Tensor,
        options: SelectionOptions,
    ) -> None:
        """Compute the call exactly, too, and account by how much its answer differs: the norm of
        the difference over the norm of the exact answer.

        Args:
            options: of the call; its number of experts stays.
        """
        exact = SelectionOptions(top_k=options.top_k)
        routing = self.select(layer, hidden_TD, exact).selection
        exact_TD = await self._core.dispatch(
            layer,
            hidden_TD,
            routing.experts_TK,
            routing.weights_TK,
            self._model.combine_mode(layer),
        )
        difference = (out_TD.float() - exact_TD.float()).norm()
        error = difference / exact_TD.float().norm().clamp(min=1e-30)
        self._metrics.selection_error.record(float(error), self._model.name)


def options_from(message: router_pb2.SelectionOptions) -> Mapping[str, Any]:
    """The options of a message, by name."""
    values: dict[str, Any] = {
        "quality_budget": message.quality_budget,
        "policy": message.policy or "budget",
        "max_rank": message.max_rank,
        "layer_budgets": tuple(message.layer_budgets),
        "top_k": message.top_k,
        "max_groups": message.max_groups,
    }
    if message.HasField("cache_prior"):
        values["cache_prior"] = message.cache_prior
    return values
