"""What a request may ask of the routing of its tokens, checked before anything is computed."""

import asyncio
from collections.abc import Mapping

from expertmesh.router.selection import check_ranks
from expertmesh.router.selection_options import SelectionOptions
from expertmesh.router.selector import Selector, options_from
from expertmesh.runtime.config import validate
from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.missing_experts import Policy, policy_of
from expertmesh.services.forward_scope import RoutingOptions
from expertmesh.v1 import generate_pb2 as pb

_BATCHED = "The engine 'exact' takes it request by request."


class RequestRouting:
    """Of one gateway.

    Args:
        policy: the mesh's, where experts are missing.
        selector: of the served model; without one requests take the mesh's options.
        num_experts: experts of each MoE layer.
        is_batched: whether tokens of several requests share a forward, which has one policy.
    """

    def __init__(
        self,
        policy: Policy = "strict",
        selector: Selector | None = None,
        num_experts: Mapping[int, int] | None = None,
        *,
        is_batched: bool = False,
    ) -> None:
        self._policy = policy
        self._selector = selector
        self._num_experts = num_experts or {}
        self._is_batched = is_batched

    async def of_generate(self, message: pb.GenerateRequest) -> RoutingOptions:
        """What a Generate call asks for.

        Raises:
            InvalidInput, ConfigError: it cannot be had; names the field.
            UnsupportedCheckpoint: the gate of the family is not known.
        """
        policy = policy_of(message.missing_experts, self._policy)
        if self._is_batched and policy != self._policy:
            expected = f"{self._policy!r} or unset, as this gateway batches prompts"
            raise InvalidInput.of(
                "missing_experts", expected=expected, got=repr(policy), hint=_BATCHED
            )
        await self._check_policy(policy)
        if not message.HasField("selection"):
            return RoutingOptions(policy)
        if self._is_batched:
            expected = "unset, as this gateway batches prompts"
            raise InvalidInput.of("selection", expected=expected, got="options", hint=_BATCHED)
        return RoutingOptions(policy, await self._selection(message))

    async def of_score(self, message: pb.ScoreRequest) -> RoutingOptions:
        """What a Score call asks for, as `of_generate`. It never shares a forward."""
        policy = policy_of(message.missing_experts, self._policy)
        await self._check_policy(policy)
        return RoutingOptions(policy)

    async def _check_policy(self, policy: Policy) -> None:
        if policy == "substitute" and policy != self._policy:
            await asyncio.to_thread(self._check_gates, "missing_experts")

    async def _selection(self, message: pb.GenerateRequest) -> SelectionOptions:
        options = validate(SelectionOptions, options_from(message.selection))
        if not options.is_exact:
            await asyncio.to_thread(self._check_gates, "selection")
            for count in self._num_experts.values():
                check_ranks(options, count)
        return options

    def _check_gates(self, field: str) -> None:
        """Reads those that have not been read."""
        if self._selector is None:
            raise InvalidInput.of(field, expected="unset: this gateway knows no gates", got="set")
        for layer in self._num_experts:
            self._selector.check(layer, field)
