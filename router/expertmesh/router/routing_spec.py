"""How a model family turns hidden states into expert ids and weights, as plain data.

`gate.route` interprets a RoutingSpec; `families.routing_spec` makes one from a transformers config.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from expertmesh.router.combine import CombineMode
from expertmesh.runtime.errors import ConfigError

MAX_TOP_K = 16
"""Most experts per token that the mesh serves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSpec:
    """The routing of one MoE layer, reproducing the router of transformers 5.23 bit for bit.

    Raises:
        ConfigError: a value out of range, or values that contradict each other; names the field.
    """

    num_experts: int
    """E, routed experts of the layer."""
    top_k: int
    """K, experts per token; 1 to 16 and at most `num_experts`."""

    gate_dtype: Literal["model", "fp32"] = "model"
    """What transformers keeps the gate weight in, whatever the dtype of the model."""
    linear_bias: bool = False
    """Whether the gate is a linear layer with a bias (gpt_oss)."""
    logits: Literal["native", "fp32"] = "native"
    """Gate product in the dtype of its operands, or with both cast to fp32 first."""
    logit_softcap: float = 0.0
    """logits = tanh(logits / c) * c in fp32; 0 is off."""

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """Function from logits to scores. `select="sparsemixer"` has its own."""
    score_dtype: Literal["fp32", "native"] = "fp32"
    """Scores computed in fp32, or in the dtype of the logits."""
    select: Literal["scores", "logits", "sparsemixer"] = "scores"
    """scores: score all experts, take the top k. logits: take the top k logits, score those k.
    sparsemixer: pick one expert after the other, each weighted among its close rivals (phimoe)."""
    score_all: bool = False
    """select="logits": score all experts and keep the chosen k (llama4). The same numbers up to the
    last bit, which a vectorised sigmoid makes depend on the position in the tensor."""
    jitter_eps: float = 0.0
    """sparsemixer: rivals have a logit within 2 * jitter_eps (relative) of the best."""

    correction_bias: bool = False
    """Whether a per-expert bias is added for the choice, but not to the weights."""
    correction_dtype: Literal["model", "fp32"] = "fp32"
    """What transformers keeps that bias in."""

    n_group: int = 1
    """Experts are split into this many equal consecutive groups."""
    topk_group: int = 1
    """Groups a token may choose from; equal to `n_group` means all."""
    group_score: Literal["top2sum", "max"] = "top2sum"
    """A group's rank: the sum of its two best scores, or its best one."""
    group_fill: float = float("-inf")
    """Score for the choice of experts outside the chosen groups."""
    weights_from_choice: bool = False
    """Weights are the scores after masking (deepseek_v2), not the ones before."""

    renorm: bool = False
    """Divide the K weights by their norm."""
    renorm_p: float | None = None
    """Order p of that norm (dbrx); None is the plain sum."""
    renorm_eps: float = 0.0
    """Added to the norm."""
    renorm_min: float = 0.0
    """Lower bound of the norm; 0 is none."""
    scale: float = 1.0
    """Factor on the weights, after renormalisation."""
    weights_dtype: Literal["score", "input"] = "score"
    """Weights stay in the dtype they were computed in, or are cast to that of the hidden states."""
    topk_sorted: bool = True
    """`sorted` of torch.topk. The slot order matters: a slot sum adds in it."""

    apply: Literal["after", "before"] = "after"
    """Weights multiply an expert's output, or its input (llama4). With "before", scale the rows
    sent to the experts and combine with weights of one."""
    combine: CombineMode = "slot_sum"
    """How transformers sums a token's K expert outputs by default: see `combine.combine`."""

    def __post_init__(self) -> None:
        self._check_choices()
        _require(self.num_experts >= 1, "num_experts", "at least 1", self.num_experts)
        limit = min(MAX_TOP_K, self.num_experts)
        _require(1 <= self.top_k <= limit, "top_k", f"1 to {limit}", self.top_k)
        self._check_groups()
        for name in ("logit_softcap", "jitter_eps", "renorm_eps", "renorm_min"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        if self.renorm_p is not None:
            _require(self.renorm_p > 0, "renorm_p", "above 0, or None", self.renorm_p)
        if self.linear_bias:
            _require(self.logits == "native", "logits", "native with a linear_bias", self.logits)
        if self.select == "sparsemixer":
            _require(self.top_k == 2, "top_k", "2, as sparsemixer picks twice", self.top_k)

    @property
    def is_grouped(self) -> bool:
        """Whether the choice is limited to some of the groups."""
        return self.topk_group < self.n_group

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _require(value in allowed, name, f"one of {', '.join(allowed)}", repr(value))

    def _check_groups(self) -> None:
        _require(
            self.n_group >= 1 and self.num_experts % self.n_group == 0,
            "n_group",
            f"a divisor of num_experts={self.num_experts}",
            self.n_group,
        )
        limit = self.n_group
        _require(1 <= self.topk_group <= limit, "topk_group", f"1 to {limit}", self.topk_group)
        if not self.is_grouped:
            return
        group_size = self.num_experts // self.n_group
        reachable = self.topk_group * group_size
        _require(self.top_k <= reachable, "top_k", f"at most {reachable} in the groups", self.top_k)
        if self.group_score == "top2sum":
            _require(group_size >= 2, "n_group", "groups of at least 2 experts", self.n_group)


def _require(holds: bool, field: str, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError.of(field, expected=expected, got=got)


def _choices(spec_type: Any) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(spec_type)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


_CHOICES = _choices(RoutingSpec)
