"""What may be asked of selection. Imports no torch: the configuration has these fields, too."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from expertmesh.runtime.config import Settings

MAX_LAYERS = 1024
_Multiple = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_MOST = 1 - 1e-6
"""A budget is below 1."""


class SelectionOptions(Settings):
    """How far the choice of experts may be from the gate's own."""

    quality_budget: float = Field(default=0.0, ge=0, lt=1)
    """Share of a token's gate mass (the sum of its chosen experts' scores) that may be given up for
    experts that are computed sooner; 0 keeps the gate's choice, bit for bit."""
    policy: Literal["budget", "cache_prior", "max_rank"] = "budget"
    """How experts are swapped within the budget: one by one where it pays ("budget"), by a bonus
    for cheap experts ("cache_prior"), or freely among the best `max_rank` ("max_rank")."""
    cache_prior: NonNegativeFloat = 0.5
    """Bonus of cheap experts as a share of the range of a token's scores."""
    max_rank: NonNegativeInt = 0
    """Rank up to which max_rank may swap; 0 is twice the experts per token."""
    layer_budgets: tuple[_Multiple, ...] = Field(default=(), max_length=MAX_LAYERS)
    """Budget of each decoder layer as a multiple of `quality_budget`, the first layer first; layers
    beyond have 1, and so has every layer by default. Layers are not equally sensitive."""
    top_k: NonNegativeInt = 0
    """Experts per token; 0 is the model's own number."""
    max_groups: NonNegativeInt = 0
    """Expert groups that a token's experts may come from at most; 0 is any number."""

    @property
    def is_exact(self) -> bool:
        """Whether the gate's own choice is what comes out."""
        return not (self.quality_budget or self.top_k or self.max_groups)

    def of_layer(self, layer: int) -> "SelectionOptions":
        """The same with the layer's own quality budget."""
        if layer >= len(self.layer_budgets) or not self.quality_budget:
            return self
        budget = min(self.quality_budget * self.layer_budgets[layer], _MOST)
        return self.model_copy(update={"quality_budget": budget, "layer_budgets": ()})
