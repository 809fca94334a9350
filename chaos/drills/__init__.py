"""One module for each kind of fault.

A drill gets what is made once and whether it is to be quick, and says what it found.
"""

from collections.abc import Awaitable, Callable

from chaos.drills import answers, clocks, gateways, hosts, links, logs, processes, routers, state
from chaos.mesh import Kept
from chaos.watch import Drilled

DRILLS: dict[str, Callable[[Kept, bool], Awaitable[Drilled]]] = {
    drill.__name__: drill
    for drill in (
        processes.kill,
        processes.kill_local,
        processes.stop,
        processes.slow,
        processes.gone,
        links.partition,
        links.stall,
        links.cut,
        links.delay,
        links.throttle,
        links.corrupt,
        hosts.host_loss,
        answers.garbage,
        state.redis_kill,
        state.redis_flush,
        state.redis_pause,
        routers.router_kill,
        gateways.gateway,
        gateways.gateway_kill,
        logs.disk_full,
        clocks.clock_jump,
        hosts.ray_head,
    )
}
"""By name, in the order in which they run."""
