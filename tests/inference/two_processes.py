"""Run by test_sharding.py: the filter in one process, then in two that jax.distributed joins; each writes what it found.

two_processes.py FOLDER            starts the three
two_processes.py FOLDER alone      one process, one device
two_processes.py FOLDER 0 PORT     process 0 of 2, two devices each
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def start(folder, *arguments):
    return subprocess.Popen([sys.executable, __file__, folder, *arguments])


def start_all(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert start(folder, "alone").wait() == 0
    both = [start(folder, number, port) for number in ("0", "1")]
    codes = [process.wait() for process in both]
    assert codes == [0, 0], codes


def work(folder, name, port):
    if port is not None:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    import jax

    if port is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(name))
    import numpy as np
    import numpyro
    import numpyro.distributions as dist

    import ssm_nn
    from ssm_nn.inference import GaussNewton, Kronecker, LaplaceFilter, LowRank, OnDisk, OnHost
    from ssm_nn.inference.last_layer import Categorical, Full, LastLayerFilter, feature_head
    from ssm_nn.models import RandomWalk
    from ssm_nn.models.networks import mlp

    def program(tasks):
        net = ssm_nn.weights(
            "net", mlp((8, 2)), prior=dist.Normal(0.0, 1.0), transition=RandomWalk(0.1), num_tasks=len(tasks)
        )

        def observe(f, task):
            scale = np.array([0.3, 0.5], np.float32)
            with numpyro.plate("examples", task["x"].shape[0]):
                numpyro.sample("y", dist.Normal(f(task["x"]), scale).to_event(1), obs=task.get("y"))

        net.over(tasks, observe)

    rng = np.random.default_rng(0)
    tasks = [{k: rng.normal(size=(6, n)).astype(np.float32) for k, n in (("x", 8), ("y", 2))} for _ in range(2)]
    mesh = None if port is None else jax.make_mesh((4,), ("weights",))
    engine = LaplaceFilter(program, LowRank(5), estimator=GaussNewton(), mesh=mesh)
    # both processes write into one folder; the second run goes on behind what the first left there
    engine.run(0, tasks[:1], history=OnDisk(Path(folder) / f"history of {'one' if port is None else 'both'}"))
    filtered = engine.run(0, tasks, history=OnDisk(Path(folder) / f"history of {'one' if port is None else 'both'}"))
    posterior = engine.smooth(filtered)
    on_host = engine.smooth(engine.run(0, tasks, history=OnHost()))
    # numbers of all weights together: no process holds more than its own part
    squares = jax.jit(lambda belief: (belief.mean**2).sum())
    spreads = jax.jit(lambda belief: belief.precision.solve(belief.mean) @ belief.mean)
    found = {"evidence": filtered.log_evidence}
    for t, belief in enumerate(posterior.beliefs):
        found |= {f"square {t}": float(squares(belief)), f"spread {t}": float(spreads(belief))}
        assert float(squares(on_host.beliefs[t])) == found[f"square {t}"]
    if port is not None:
        assert len(belief.mean.addressable_shards) == 2
        assert not belief.mean.is_fully_addressable
    layered = LaplaceFilter(program, Kronecker(), estimator=GaussNewton(), mesh=mesh)
    place = OnDisk(Path(folder) / f"factors of {'one' if port is None else 'both'}")
    layered.run(0, tasks[:1], history=place)
    posterior = layered.smooth(layered.run(0, tasks, history=place))
    found["factors evidence"] = posterior.filtered.log_evidence
    for t, belief in enumerate(posterior.beliefs):
        found |= {f"factors square {t}": float(squares(belief)), f"factors spread {t}": float(spreads(belief))}
    batch = {"x": rng.normal(size=(90, 4)).astype(np.float32), "y": np.arange(90) % 3}
    head = LastLayerFilter(feature_head(Categorical(3), 4), Full(), mesh=mesh)
    state, info = head.update(head.init(), batch)
    state, _ = head.remove(state, np.arange(7))
    state, swept = head.sweep(state)
    found |= {"head evidence": info.log_evidence, "swept evidence": swept.log_evidence}
    found |= {f"head weight {i}": float(w) for i, w in enumerate(head.weights(state).ravel())}
    found["head score"] = float(head.predict(state, batch).log_density.sum())
    (Path(folder) / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    if rest:
        work(folder, rest[0], rest[1] if len(rest) > 1 else None)
    else:
        start_all(folder)
