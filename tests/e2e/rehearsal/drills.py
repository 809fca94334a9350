"""What is done to the cluster while callers go on. docs/operations.md tells of each."""

from tests.e2e.rehearsal.callers import Callers
from tests.e2e.rehearsal.stage import Rehearsal

START_S = 200.0
RECOVER_S = 90.0
SCALE_S = 60.0
LIGHT = (1, 0.4)
"""Callers, and seconds each pauses between two calls."""
HEAVY = (4, 0.0)
CALM = (1, 5.0)


def start(rehearsal: Rehearsal, callers: Callers) -> None:
    """Apply everything; it serves, and the client gets transformers' tokens."""
    rehearsal.apply()
    cluster, found = rehearsal.cluster, rehearsal.found
    callers.start()
    head_s = rehearsal.until(
        "the head is ready", START_S, lambda: any(pod.ready for pod in cluster.of(ray="head"))
    )
    running_s = rehearsal.until("applications run", START_S, rehearsal.operator.running)
    ready_s = rehearsal.until("all Pods are ready", START_S, rehearsal.all_ready)
    callers.wait_ready()
    callers.change(*LIGHT)
    callers.more(8, "as transformers would answer")
    found["start"] = {"head_s": head_s, "running_s": running_s, "ready_s": ready_s}
    found["pods"] = {pod.name: pod.restarts for pod in cluster.pods.values()}


def lose_head(rehearsal: Rehearsal, callers: Callers) -> None:
    """Serving goes on without a head; a new one remembers everything."""
    [head] = rehearsal.cluster.of(ray="head")
    puts, replicas = rehearsal.operator.num_puts, rehearsal.operator.lives()
    head.kill()
    rehearsal.say("the head is dead")
    callers.more(8, "without a head")
    rehearsal.operator.replace(head)
    rehearsal.until(
        "a new head is ready",
        RECOVER_S,
        lambda: any(pod.ready for pod in rehearsal.cluster.of(ray="head")),
    )
    rehearsal.until("applications run again", RECOVER_S, rehearsal.operator.running)
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    callers.more(8, "with the new head")
    rehearsal.found["head"] = {
        "puts": rehearsal.operator.num_puts - puts,
        "same_replicas": rehearsal.operator.lives() == replicas,
    }


def lose_worker(rehearsal: Rehearsal, callers: Callers) -> None:
    """The other replicas answer; a new Pod comes and takes work."""
    worker = rehearsal.cluster.of(ray="worker")[0]
    worker.kill()
    rehearsal.say(f"{worker.name} is dead")
    rehearsal.operator.replace(worker)
    callers.more(8, "with one worker")
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    rehearsal.until(
        "two replicas of each group take rows",
        RECOVER_S,
        lambda: rehearsal.operator.replicas() == {"g0": 2, "g1": 2},
    )
    callers.more(8, "with the new worker")


def drain(rehearsal: Rehearsal, callers: Callers) -> None:
    """A worker's Pod is deleted, as `kubectl drain` does: its replicas move before it goes."""
    worker = rehearsal.cluster.of(ray="worker")[0]
    rehearsal.operator.delete(worker)
    rehearsal.until(
        "the Pod is gone", RECOVER_S, lambda: worker.name in rehearsal.operator.deleted_s
    )
    said = [line for line in worker.containers[0].tail().splitlines() if "preStop" in line]
    took_s = rehearsal.operator.deleted_s[worker.name]
    rehearsal.say(f"it took {took_s:.1f} s: {said}")
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    rehearsal.until(
        "two replicas of each group take rows",
        RECOVER_S,
        lambda: rehearsal.operator.replicas() == {"g0": 2, "g1": 2},
    )
    callers.more(8, "with another worker in its place")
    rehearsal.found["drained"] = {"took_s": round(took_s, 1), "said": said}


def change(rehearsal: Rehearsal, callers: Callers) -> None:
    """Another mesh.yaml: gateway, router and controllers are rolled, Serve takes the new rule."""
    cluster = rehearsal.cluster
    names = ("gateway", "router", "controller")
    old = [pod for name in names for pod in cluster.of(app=name)]
    replicas = rehearsal.operator.lives()
    changed = rehearsal.apply(mode="on")
    rehearsal.until(
        "Pods with the new configuration are ready, and the old ones gone",
        RECOVER_S,
        lambda: (
            all(pod.name in rehearsal.deployments.deleted_s for pod in old)
            and rehearsal.all_ready()
        ),
    )
    rehearsal.until("applications run", RECOVER_S, rehearsal.operator.running)
    callers.more(8, "with the new configuration")
    rehearsal.found["change"] = {
        "lines": changed,
        "same_replicas": rehearsal.operator.lives() >= replicas,  # the rule may have added some
        "gateway_s": [
            round(rehearsal.deployments.deleted_s[pod.name], 1)
            for pod in old
            if pod.name.startswith("gateway")
        ],
    }


def grow(rehearsal: Rehearsal, callers: Callers) -> None:
    """More calls: a group grows, Ray's autoscaler asks for a Pod, and gets it."""
    callers.change(*HEAVY)
    rehearsal.until(
        "Ray's autoscaler asks for a third worker", SCALE_S, lambda: rehearsal.workers() == 3
    )
    rehearsal.until("all Pods are ready", SCALE_S, rehearsal.all_ready)
    rehearsal.until(
        "a third replica runs", SCALE_S, lambda: 3 in rehearsal.operator.replicas().values()
    )
    callers.more(30, "with a third replica")
    rehearsal.found["grown"] = rehearsal.operator.replicas()


def shrink(rehearsal: Rehearsal, callers: Callers) -> None:
    """Hardly any calls: the replica goes, and then its Pod."""
    callers.change(*CALM)
    rehearsal.until(
        "two replicas of each group",
        SCALE_S,
        lambda: rehearsal.operator.replicas() == {"g0": 2, "g1": 2},
    )
    rehearsal.until(
        "Ray's autoscaler takes a worker back", SCALE_S, lambda: rehearsal.workers() == 2
    )
    rehearsal.until(
        "its Pod is gone", SCALE_S, lambda: len(rehearsal.cluster.of(ray="worker")) == 2
    )
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    callers.more(2, "with two workers")
    rehearsal.found["shrunk"] = rehearsal.operator.replicas()


def lose_state(rehearsal: Rehearsal, callers: Callers) -> None:
    """Routing goes on without redis-state; a new, empty one hears of all replicas."""
    [redis] = rehearsal.cluster.of(app="redis-state")
    redis.kill()
    rehearsal.say(f"{redis.name} is dead")
    callers.more(3, "without redis-state")
    rehearsal.cluster.forget(redis)
    rehearsal.until("all Pods are ready", RECOVER_S, rehearsal.all_ready)
    rehearsal.until(
        "the router hears all replicas",
        RECOVER_S,
        lambda: rehearsal.status() == {"g0": 2, "g1": 2},
    )
    callers.more(3, "with a new redis-state")


STEPS = (lose_head, lose_worker, drain, change, grow)
