"""What is simulated: one YAML file, checked before anything runs."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from expertmesh.experts.scaling_options import ScalingOptions
from expertmesh.runtime.config import Settings

Fraction = Annotated[float, Field(ge=0, le=1)]


class TraceSettings(Settings):
    """The requests."""

    file: Path = Path("trace.csv")
    """CSV with the columns of the Azure LLM inference traces: TIMESTAMP, ContextTokens,
    GeneratedTokens. A path that is not absolute counts from the scenario's directory."""
    rate: PositiveFloat = 1.0
    """Requests that each row stands for; its copies come within `spread_s` of it."""
    spread_s: NonNegativeFloat = 1.0
    duration_s: PositiveFloat | None = None
    """The trace is repeated or cut to this length; none takes it as long as it is."""
    daily_swing: Fraction = 0.0
    """1 thins the requests out to none at night and leaves all of them at noon (a cosine with a
    period of 24 hours, beginning at midnight); 0 leaves them alone."""


class ModelSettings(Settings):
    """Sizes of the model's MoE layers."""

    layers: PositiveInt = 32
    experts: PositiveInt = 8
    top_k: PositiveInt = 2
    hidden_size: PositiveInt = 4096
    ffn_size: PositiveInt = 14336
    gated: bool = True
    """Whether an expert has three matrices instead of two."""
    weight_bytes: PositiveFloat = 2.0
    """Of one number of a weight: 2 for bfloat16."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most experts, {self.experts}")
        return self

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        return (2 + self.gated) * self.hidden_size * self.ffn_size * self.weight_bytes

    @property
    def row_flops(self) -> float:
        """Of one row through one expert."""
        return 2.0 * (2 + self.gated) * self.hidden_size * self.ffn_size


class CostSettings(Settings):
    """What a call costs beside what the GPU's data sheet says."""

    flops_frac: Fraction = 0.5
    """Of the peak rate that products of many rows reach."""
    bandwidth_frac: Fraction = 0.8
    """Of the memory's peak rate at which weights are read."""
    batch_us: NonNegativeFloat = 50.0
    """Of any batch on a replica."""
    expert_us: NonNegativeFloat | None = None
    """Of each expert of a batch on a replica of speed 1; none reads its weights once."""
    row_us: PositiveFloat | None = None
    """Of each row on a replica of speed 1; none computes it from the GPU's rate."""
    transport_us: NonNegativeFloat = 300.0
    """A message to a replica and back, without the compute."""
    layer_us: NonNegativeFloat = 300.0
    """What the gateway does between two layer calls: attention, plan, combine."""
    layer_token_us: NonNegativeFloat = 0.0
    """The same, for each token of the forward."""


class MeshSettings(Settings):
    """The mesh before anything happens."""

    groups: PositiveInt = 8
    """Expert groups; the placement planner says which experts each of them holds."""
    spare_slots: NonNegativeInt = 0
    """Experts that are held by one more group each (or some by several)."""
    gpus: str = "l4"
    """GPUs that replicas get, one after the other: "l4", or "a100x2,l4x6". A replica with another
    GPU than the first costs other GPU-seconds too: a second of a GPU is a second."""
    gateways: NonNegativeInt = 1
    """Forwards that go on at the same time; 0 gives every request its own (`engine: calls`)."""
    forward_tokens: PositiveInt = 2048
    """Tokens in a forward of one gateway at most."""
    max_batch_rows: PositiveInt = 4096
    """Rows in a batch of a replica at most."""
    costs: CostSettings = CostSettings()


class PopularitySettings(Settings):
    """How often experts are chosen."""

    kind: Literal["uniform", "zipf", "lognormal", "counts"] = "uniform"
    exponent: NonNegativeFloat = 1.0
    """Of "zipf": the n-th expert is chosen in proportion to n to the power of minus this."""
    sigma: NonNegativeFloat = 0.6
    """Of "lognormal": standard deviation of the logarithm."""
    file: Path | None = None
    """Of "counts": JSON with `subjects: {name: {expert_popularity: [layer][expert]}}`."""
    layers: Literal["alike", "own"] = "own"
    """Whether the same experts are hot in every layer, for "zipf" and "lognormal"."""
    drift_s: NonNegativeFloat = 0.0
    """Time after which the popularity changes; 0 never. "counts" goes to the next subject, the
    others permute `drift_frac` of the experts."""
    drift_frac: Fraction = 0.1

    @model_validator(mode="after")
    def _counts_have_a_file(self) -> Self:
        if self.kind == "counts" and self.file is None:
            raise ValueError('kind "counts" needs a file')
        return self


class StartSettings(Settings):
    """How long a new replica takes until it is ready."""

    start_s: NonNegativeFloat = 4.0
    """Process, framework, announcement."""
    load_bytes_per_s: PositiveFloat = 4e9
    """Rate at which its experts' weights arrive."""
    spread_frac: Fraction = 0.2
    """Each start takes up to so much more or less, at random."""
    drain_s: NonNegativeFloat = 1.0
    """From the decision to take one away until its GPU is free."""


class ScalingSettings(Settings):
    """Who decides how many replicas there are."""

    policy: Literal["groups", "whole", "static"] = "groups"
    """"groups" scales every group by itself with the rule of the running system
    (`experts/scaling.py`), "whole" gives all groups what the one in need of most gets, "static"
    changes nothing."""
    replicas: tuple[PositiveInt, ...] = (1,)
    """Replicas of each group at the beginning; one number is meant for all groups."""
    decide_s: PositiveFloat = 1.0
    """Time between two looks at the load."""
    sees: Literal["gateways", "replicas"] = "replicas"
    """What the rule is told: rows that have come to replicas, as in a running mesh, or also those
    of prompts that wait at gateways until there is room for them in a forward."""
    rule: ScalingOptions = ScalingOptions()


class Fault(Settings):
    """Something that goes wrong."""

    kind: Literal["kill", "slow", "pause"]
    """"kill" ends replicas, which are started anew; "slow" multiplies their times by `factor`;
    "pause" has them compute nothing."""
    at_s: NonNegativeFloat
    group: NonNegativeInt | None = None
    """Group of the replicas; none takes any."""
    replicas: PositiveInt = 1
    """How many, drawn at random."""
    for_s: PositiveFloat = 60.0
    """How long it lasts, for "slow" and "pause"."""
    factor: Annotated[float, Field(gt=1)] = 10.0
    """For "slow"."""


class Objective(Settings):
    """What users are promised; policies are compared where both hold it."""

    ttft_p99_s: PositiveFloat = 5.0
    """99 of 100 requests have their first token by then."""


class SamplingSettings(Settings):
    """How much of what happens is simulated one by one."""

    engine: Literal["windows", "calls"] = "windows"
    """"calls" simulates every layer call. "windows" goes forward in steps of `window_s`; it plans
    calls to `layers` layers every `every_s`, and when the mesh, the popularity or the size of
    forwards has changed, and takes all forwards until then to be like these."""
    window_s: PositiveFloat = 0.25
    """Step of the virtual clock, for "windows"."""
    every_s: PositiveFloat = 10.0
    forwards: PositiveInt = 4
    """Forwards that are planned together, at most, for "windows"; they stand for those of all
    gateways."""
    layers: PositiveInt = 2
    """Layers simulated; each stands for as many of the model's as it takes to make up all."""


class Scenario(Settings):
    """Everything a simulation depends on: the same scenario gives the same numbers."""

    trace: TraceSettings = TraceSettings()
    model: ModelSettings = ModelSettings()
    mesh: MeshSettings = MeshSettings()
    popularity: PopularitySettings = PopularitySettings()
    start: StartSettings = StartSettings()
    scaling: ScalingSettings = ScalingSettings()
    faults: tuple[Fault, ...] = ()
    objective: Objective = Objective()
    sampling: SamplingSettings = SamplingSettings()
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mesh.groups > self.model.experts:
            raise ValueError(f"mesh.groups must be at most model.experts, {self.model.experts}")
        if self.mesh.gateways == 0 and self.sampling.engine == "windows":
            raise ValueError('mesh.gateways 0 needs sampling.engine "calls"')
        if len(self.scaling.replicas) not in (1, self.mesh.groups):
            raise ValueError(f"scaling.replicas must be one number or {self.mesh.groups} of them")
        least, most = self.scaling.rule.min_replicas, self.scaling.rule.max_replicas
        for own in self.scaling.replicas if self.scaling.policy != "static" else ():
            if not least <= own <= most:
                raise ValueError(
                    f"scaling.replicas {own} is not within min_replicas {least} and max_replicas "
                    f"{most} of scaling.rule"
                )
        for number, fault in enumerate(self.faults):
            if fault.group is not None and fault.group >= self.mesh.groups:
                raise ValueError(f"faults.{number}.group must be below {self.mesh.groups}")
        return self
