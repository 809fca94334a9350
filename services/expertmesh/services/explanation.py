"""What `expertmesh explain` prints."""

from rich.table import Table

from expertmesh.v1 import router_pb2


def tables(token: router_pb2.TokenExplanation) -> list[Table]:
    """The experts considered for a token, and the holders of those that are selected."""
    return [_experts(token), _replicas(token)]


def _experts(token: router_pb2.TokenExplanation) -> Table:
    table = Table(title=f"experts (gate mass given up: {token.given_up_mass:.2%})")
    for name in ("expert", "rank", "logit", "mass", "weight", "selected", "why"):
        table.add_column(name)
    for own in token.experts:
        table.add_row(
            str(own.expert),
            str(own.rank),
            f"{own.logit:.3f}",
            f"{own.mass:.3f}",
            f"{own.weight:.3f}" if own.is_selected else "",
            "yes" if own.is_selected else "",
            own.reason,
        )
    return table


def _replicas(token: router_pb2.TokenExplanation) -> Table:
    table = Table(title="replicas of the selected experts")
    names = ("expert", "replica", "rows", "cost, us", "in flight", "others", "age, ms")
    for name in (*names, "resident", "why"):
        table.add_column(name)
    for expert in token.experts:
        for own in expert.replicas if expert.is_selected else ():
            table.add_row(
                str(expert.expert),
                own.replica,
                str(own.rows or ""),
                f"{own.cost_us:.0f}",
                str(own.in_flight_rows),
                str(own.others_rows),
                str(own.age_ms),
                "yes" if own.resident else "no",
                own.reason,
            )
    return table
