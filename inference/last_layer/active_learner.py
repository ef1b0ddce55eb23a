"""Active learning on the last layer: a strategy asks for labels of a pool, the engine takes them in in closed form.

    ask -> labels -> tell (update) -> ... -> after each batch a sweep: the belief that all labels together give

``ask`` and ``tell`` suit people who label; ``run`` does the loop with an oracle, scores test points after each batch, and goes
on from its checkpoint where it was stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssm_nn.inference.checkpoints import CheckpointError, load, save
from ssm_nn.inference.checks import check_count
from ssm_nn.inference.last_layer.acquisition import Pool, Strategy
from ssm_nn.inference.last_layer.acquisition_curves import LearningCurve, scores_of
from ssm_nn.inference.last_layer.last_layer_filter import HeadState, LastLayerFilter, UpdateInfo
from ssm_nn.inference.last_layer.sites import Sites
from ssm_nn.inference.last_layer.split_conditioning import check_whole
from ssm_nn.inference.map_problem import NOT_FINITE

__all__ = ["ActiveLearner", "ActiveState"]

Array = Any
Oracle = Callable[[np.ndarray], Any]
Progress = Callable[[int, int, dict[str, float]], None]


class ActiveState(NamedTuple):
    """What is known so far.

    Attributes:
        head: the engine's state.
        chosen: (n,), indices of the pool's points whose labels are known, in the order in which they came.
    """

    head: HeadState
    chosen: np.ndarray


class ActiveLearner:
    """Chooses points of a pool, and learns their labels.

    Args:
        engine: its belief is updated; with ``keep_sites`` (the default) the points are linearised anew after each batch.
        strategy: which points.
        pool: the inputs of N points, or a mapping with them; labels in it are not read.
        batch_size: labels between two sweeps, and between two scores.
        start: the engine's state after earlier labels; by default the prior.
        candidates: so many unlabelled points, drawn anew each time, are looked at; None looks at all.
        labels: name of the labels in the engine's batches.
        seed: of all randomness of the choices.

    Raises:
        ValueError: arguments of another kind, features that do not fit the engine.
    """

    def __init__(
        self,
        engine: LastLayerFilter,
        strategy: Strategy,
        pool: Mapping[str, Any] | Any,
        *,
        batch_size: int = 10,
        start: HeadState | None = None,
        candidates: int | None = None,
        labels: str = "y",
        seed: int = 0,
    ):
        if not isinstance(strategy, Strategy):
            raise ValueError(f"strategy is {strategy!r}; a Strategy such as Margin() is accepted")
        check_whole("ActiveLearner", engine.mesh)
        check_count(batch_size=batch_size)
        if candidates is not None:
            check_count(batch_size, candidates=candidates)
        check_count(0, seed=seed)
        inputs = pool[engine.head.inputs] if isinstance(pool, Mapping) else pool
        self.engine, self.strategy, self.batch_size, self.candidates = engine, strategy, batch_size, candidates
        self._inputs, self._labels, self._seed = np.asarray(inputs), labels, seed
        self._features = engine.features(self._inputs)
        self._start = engine.init() if start is None else start
        # strategies see the earlier points behind those of the pool, as labelled ones
        self._seen = np.concatenate([self._features, self._start.sites.features])
        known = self._start.sites.ids
        self._first_id = int(known.max()) + 1 if len(known) else 0

    @property
    def num_points(self) -> int:
        """N of the pool."""
        return len(self._features)

    def init(self) -> ActiveState:
        """Nothing of the pool is labelled."""
        return ActiveState(self._start, np.zeros(0, np.int64))

    def ask(self, state: ActiveState, size: int | None = None) -> np.ndarray:
        """Indices of the points to label next; the same for the same state.

        Args:
            size: how many; by default what is left of the batch, or less where the strategy wants to learn in between.

        Raises:
            ValueError: where the pool has fewer points left, or nothing at all.
        """
        left = np.setdiff1d(np.arange(self.num_points), state.chosen)
        if not len(left):
            raise ValueError(f"all {self.num_points} points of the pool are labelled")
        if size is None:
            missing = self.batch_size - len(state.chosen) % self.batch_size
            size = min(self.strategy.at_once(missing), len(left))
        key = jax.random.fold_in(jax.random.key(self._seed), len(state.chosen))
        drawing, choosing = jax.random.split(key)
        if self.candidates is not None and max(self.candidates, size) < len(left):
            drawn = jax.random.choice(drawing, len(left), (max(self.candidates, size),), replace=False)
            left = left[np.sort(np.asarray(drawn))]
        head = state.head
        labelled = np.concatenate([state.chosen, np.arange(self.num_points, len(self._seen))])
        pool = Pool(self.engine.head.likelihood, head.belief, head.mean, self._seen, left, labelled)
        return self.strategy.select(pool, size, choosing)

    def tell(self, state: ActiveState, indices: Any, labels: Any) -> tuple[ActiveState, UpdateInfo]:
        """The state with these labels; after a whole batch all points are linearised anew.

        Raises:
            ValueError: indices outside the pool, given twice or labelled before; labels that the likelihood refuses.
            FloatingPointError: an update that came to nothing.
        """
        places = np.asarray(indices)
        if places.ndim != 1 or places.dtype.kind not in "iu" or len(np.unique(places)) < len(places):
            raise ValueError(f"indices is {indices!r}; whole numbers of shape (n,), each once, are accepted")
        if len(places) and not (places.min() >= 0 and places.max() < self.num_points):
            raise ValueError(
                f"indices runs from {places.min()} to {places.max()}; 0 to {self.num_points - 1} are accepted"
            )
        met = np.intersect1d(places, state.chosen)
        if met.size:
            raise ValueError(f"indices holds {met[:5].tolist()}, whose labels are known")
        batch = {self.engine.head.inputs: self._inputs[places], self._labels: np.asarray(labels)}
        ids = self._first_id + places if self.engine.keep_sites else None
        head, info = self.engine.update(state.head, batch, ids=ids)
        if info.status == NOT_FINITE:
            raise FloatingPointError(f"the labels of {places[:5].tolist()} were not taken in: {info.message}")
        chosen = np.concatenate([state.chosen, places.astype(np.int64)])
        if self.engine.keep_sites and len(chosen) // self.batch_size > len(state.chosen) // self.batch_size:
            head, _ = self.engine.sweep(head)
        return ActiveState(head, chosen), info

    def run(
        self,
        oracle: Oracle,
        num_batches: int,
        test: Mapping[str, Any],
        *,
        path: str | Path | None = None,
        progress: Progress | None = None,
    ) -> tuple[ActiveState, LearningCurve]:
        """Batch after batch, with a score of the test points before the first and after each.

        Args:
            oracle: from indices (n,) to their labels; ``all_labels.__getitem__`` where they are known.
            num_batches: of ``batch_size`` labels.
            test: a batch with labels.
            path: a checkpoint, written after each batch; where there is one, the run goes on from it.
            progress: called after each batch with its number, the number of labels and the scores: a ``LabellingBar``.

        Raises:
            ValueError: more labels than the pool has points, a test batch without labels.
            CheckpointError: a checkpoint of another learner.
        """
        check_count(num_batches=num_batches)
        if num_batches * self.batch_size > self.num_points:
            raise ValueError(
                f"num_batches is {num_batches}: {num_batches * self.batch_size} labels, but the pool has "
                f"{self.num_points} points"
            )
        if not self.engine.head.has_labels(test):
            raise ValueError(f"test has {sorted(test)}; inputs and labels are accepted")
        record = _Record(self)
        state = self.init()
        if path is not None and Path(path).exists():
            state = record.read(path)
        if not record.rows:
            record.add(self._scores(state, test), 0.0)
        while record.num_batches < num_batches:
            began, waited = time.perf_counter(), 0.0
            for _ in range(self.batch_size):
                if len(state.chosen) == (record.num_batches + 1) * self.batch_size:
                    break
                indices = self.ask(state)
                asked = time.perf_counter()
                labels = oracle(indices)
                waited += time.perf_counter() - asked
                state, _ = self.tell(state, indices, labels)
            jax.block_until_ready(state.head.mean)
            seconds = time.perf_counter() - began - waited
            scores = self._scores(state, test)
            record.add(scores, seconds)
            if path is not None:
                record.write(path, state)
            if progress is not None:
                progress(record.num_batches, self._start.sites.num_points + len(state.chosen), scores)
        return state, record.curve(state)

    def _scores(self, state: ActiveState, test: Mapping[str, Any]) -> dict[str, float]:
        return scores_of(self.engine.predict(state.head, test), test[self._labels])

    def _words(self) -> str:
        """All that the choices depend on, but for the engine, the labels, and rounding in what was computed before."""
        sites = self._start.sites
        arrays = (self._inputs, sites.ids, sites.labels)
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
        return f"{self.strategy!r} {self.batch_size} {self.candidates} {self._seed} {self._labels} {digests}"


class _Record:
    """The scores of a run, and its checkpoint: arrays of a size that the learner fixes, whatever has been labelled.

    Points of the pool that are labelled, and scores of batches that are done, come first; the rest is 0.
    """

    def __init__(self, learner: ActiveLearner):
        self._learner = learner
        self.names: tuple[str, ...] = ()
        self.rows: list[tuple[float, ...]] = []  # seconds, then the scores

    @property
    def num_batches(self) -> int:
        return len(self.rows) - 1

    def add(self, scores: dict[str, float], seconds: float) -> None:
        self.names = tuple(scores)
        self.rows.append((seconds, *scores.values()))

    def curve(self, state: ActiveState) -> LearningCurve:
        table = np.array(self.rows)
        before = self._learner._start.sites.num_points
        counts = before + self._learner.batch_size * np.arange(len(table))
        scores = {name: table[:, n + 1] for n, name in enumerate(self.names)}
        return LearningCurve(counts, scores, table[1:, 0], state.chosen)

    def write(self, path: str | Path, state: ActiveState) -> None:
        tree = self._empty()
        tree["belief"], tree["mean"], tree["step"] = state.head.belief, state.head.mean, state.head.step
        tree["batches"], tree["width"] = len(self.rows), len(self.names)
        tree["names"][: len("\n".join(self.names))] = np.frombuffer("\n".join(self.names).encode(), np.uint8)
        tree["rows"][: len(self.rows), : len(self.names) + 1] = self.rows
        tree["chosen"][: len(state.chosen)] = state.chosen
        sites = state.head.sites
        for name in ("outputs", "labels", "weights", "ids", "steps"):
            tree[name][: sites.num_points] = getattr(sites, name)
        tree["sites"], tree["labelled"] = sites.num_points, len(state.chosen)
        save(path, tree)

    def read(self, path: str | Path) -> ActiveState:
        tree = load(path, self._empty())
        learner = self._learner
        if bytes(tree["learner"]) != self._digest():
            raise CheckpointError(
                f"the checkpoint {path} is of another learner: its strategy, pool, start or seed differ"
            )
        self.names = tuple(bytes(tree["names"]).rstrip(b"\0").decode().split("\n"))
        self.rows = [tuple(row[: tree["width"] + 1]) for row in tree["rows"][: tree["batches"]]]
        chosen = tree["chosen"][: tree["labelled"]]
        count = tree["sites"]
        features = np.concatenate([learner._start.sites.features, learner._features[chosen]])[:count]
        kept = [tree[name][:count] for name in ("outputs", "labels", "weights", "ids", "steps")]
        head = HeadState(tree["step"], jnp.asarray(tree["mean"]), tree["belief"], Sites(features, *kept))
        return ActiveState(head, chosen)

    def _digest(self) -> bytes:
        return hashlib.sha256(self._learner._words().encode()).digest()

    def _empty(self) -> dict[str, Any]:
        learner = self._learner
        start, size = learner._start, learner._start.sites.num_points + learner.num_points
        wide = {
            name: np.zeros((size, *getattr(start.sites, name).shape[1:]), getattr(start.sites, name).dtype)
            for name in ("outputs", "labels", "weights", "ids", "steps")
        }
        return wide | {
            "learner": np.frombuffer(self._digest(), np.uint8),
            "belief": start.belief,
            "mean": start.mean,
            "step": 0,
            "batches": 0,
            "width": 0,
            "sites": 0,
            "labelled": 0,
            "names": np.zeros(256, np.uint8),
            "rows": np.zeros((learner.num_points // learner.batch_size + 1, 16)),
            "chosen": np.zeros(learner.num_points, np.int64),
        }
