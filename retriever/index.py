"""Vectors to the ids of the nearest: an inner-product index that grows, shrinks and is saved.

Knows nothing of texts or models. Three kinds, by the number of vectors, all of faiss:

    kind  from       search                          removal
    flat  0          all vectors; exact              at once
    hnsw  50,000     along a graph of neighbours     masked; the graph is built again when a quarter is dead
    ivf   250,000    the lists of the nearest cells  at once

A graph finds more in less time than cells do, but building it takes many times as long, and it cannot lose a vector.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from chunkcache.errors import DocumentError, InputError

faiss: Any = _faiss  # its type stubs lack much of what is used here
Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

KINDS = ("auto", "flat", "hnsw", "ivf")
HNSW_FROM = 50_000
IVF_FROM = 250_000

_LINKS, _EF_BUILD, _EF_SEARCH = 16, 80, 96
_VECTORS_PER_CELL = 250
_PROBED, _LEAST_PROBED = 1 / 8, 16  # share of the cells that is searched, and how many at least
_SLICE = 256  # vectors added while a search waits


class VectorIndex:
    """The best inner products over vectors `[n, dim]`, each under an id of the caller's; any thread may call it.

    Searches go on while an index of another kind is built. HNSW and IVF are approximate: they may miss a vector.

    Args:
        dim: length of a vector.
        kind: `flat`, `hnsw`, `ivf`; or `auto`, which takes the kind that suits the number of vectors, as it grows.

    Raises:
        InputError: there is no such kind.
    """

    def __init__(self, dim: int, kind: str = "auto") -> None:
        if kind not in KINDS:
            raise InputError(f"there is no index kind {kind!r}: give one of {', '.join(KINDS)}")
        self.dim = dim
        self._wanted = kind
        self._writing = threading.RLock()  # held by the one that changes it
        self._using = threading.Lock()  # held by whoever is inside faiss
        self._ids: set[int] = set()
        self._index: Any
        self._mapped: bool
        self._dead: Ids
        self._selector: Any
        self._adopt(*self._built(self._kind_for(0), np.empty(0, np.int64), np.empty((0, dim), np.float32)), 0)

    @property
    def kind(self) -> str:
        """The kind it has now: `flat`, `hnsw` or `ivf`."""
        return self._kind

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> frozenset[int]:
        """Return the ids of all vectors."""
        with self._writing:
            return frozenset(self._ids)

    def vectors(self) -> tuple[Ids, Vectors]:
        """Return a copy of all ids `[n]` and their vectors `[n, dim]`."""
        with self._writing:
            return self._held()

    def add(self, ids: Ids | Iterable[int], vectors: Vectors) -> None:
        """Add vectors `[n, dim]` under new ids `[n]`: all of them, or none if it fails.

        Raises InputError when the shapes do not fit, or an id is negative, there twice, or there already.
        """
        numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        vectors = self._checked(vectors)
        if numbers.shape != (len(vectors),):
            raise InputError(f"{len(numbers)} ids for {len(vectors)} vectors: give one id for each")
        fresh = set(numbers.tolist())
        with self._writing:
            if len(fresh) < len(numbers) or not fresh.isdisjoint(self._ids) or min(fresh, default=0) < 0:
                raise InputError("each id has to be new, and 0 or more: give ids that the index does not hold")
            kind = self._kind_for(len(self) + len(fresh))
            if kind != self._kind or self._outgrown(len(fresh)) or not fresh.isdisjoint(self._dead.tolist()):
                held, old = self._held()
                self._rebuild(kind, np.concatenate([held, numbers]), np.concatenate([old, vectors]))
            else:
                self._append(numbers, vectors)
            self._ids |= fresh

    def remove(self, ids: Iterable[int]) -> None:
        """Remove vectors; raises InputError when an id is not there, and then removes none."""
        gone = set(map(int, ids))
        with self._writing:
            if not gone <= self._ids:
                raise InputError(f"there is no vector {min(gone - self._ids)}: give ids that the index holds")
            self._discard(np.fromiter(gone, np.int64, len(gone)))
            self._ids -= gone
            if len(self._dead) > len(self) / 3:  # a quarter of all that the graph holds
                self._rebuild(self._kind_for(len(self)), *self._held())

    def search(self, query_vectors: Vectors, k: int) -> tuple[Vectors, Ids]:
        """Return scores and ids `[queries, min(k, len(self))]`, best first, equal scores by id.

        Where an approximate index found fewer, scores of -inf and ids of -1 fill up. Raises InputError when
        `query_vectors` is not `[queries, dim]` or `k` is below 1.
        """
        if k < 1:
            raise InputError(f"k = {k} asks for no results: give 1 or more")
        queries = self._checked(query_vectors)
        with self._using:
            size = int(self._index.ntotal) - len(self._dead)
            k = min(k, size)
            if k == 0:
                return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            # faiss drops any of the vectors that tie for the last place: ask until that place's tie is complete.
            asked = min(k + 1, size)
            scores, ids = self._ask(queries, asked)
            while asked < size and ((scores[:, -1] == scores[:, k - 1]) & (ids[:, -1] >= 0)).any():
                asked = min(2 * asked, size)
                scores, ids = self._ask(queries, asked)
        scores = np.where(ids < 0, -np.inf, scores).astype(np.float32)
        order = np.lexsort((ids, -scores))[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def save(self, path: Path) -> dict[str, Any]:
        """Write the vectors to a file; return the facts that `load` asks for, fit for JSON."""
        with self._writing:
            faiss.write_index(self._index, str(path))
            return {
                "kind": self._kind,
                "wanted": self._wanted,
                "dim": self.dim,
                "vectors": int(self._index.ntotal),
                "built_for": self._built_for,
                "dead": self._dead.tolist(),
                **digest(path),
            }

    @classmethod
    def load(cls, path: Path, facts: Mapping[str, Any], mmap: bool = True) -> VectorIndex:
        """Read what `save` wrote, or map it, so that it costs memory only where it is searched.

        A mapped index is copied to memory before it changes. faiss trusts what it reads: nothing of a file that
        `facts` do not vouch for is shown to it. Take both from one source that you trust.

        Raises:
            DocumentError: the file is missing, or not the one that the facts tell of.
        """
        try:
            loaded = cls(_count(facts, "dim"), str(facts["wanted"]))
            kind, total, built_for = str(facts["kind"]), _count(facts, "vectors"), _count(facts, "built_for")
            dead = np.array(facts["dead"], dtype=np.int64).reshape(-1)
            if kind not in KINDS[1:] or digest(path) != {name: facts[name] for name in ("bytes", "sha256")}:
                raise ValueError("it is not the file that was saved")
            if _count(facts, "bytes") < 4 * total * loaded.dim:
                raise ValueError("it is too short for its vectors")
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
            if (_kind_of(index), index.d, index.ntotal) != (kind, loaded.dim, total):
                raise ValueError("it holds another index")
            loaded._adopt(kind, index, built_for)
            ids = _ids_of(index)
            loaded._ids = set(ids.tolist()) - set(dead.tolist())
            if len(loaded._ids) != total - len(dead) or ids.min(initial=0) < 0:
                raise ValueError("its ids are not one for each vector")
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise DocumentError(
                f"the vectors in {str(path)!r} cannot be used ({error}): build the index again"
            ) from error
        loaded._mapped = mmap
        loaded._mask(dead)
        return loaded

    def _kind_for(self, size: int) -> str:
        if self._wanted != "auto":
            return self._wanted
        return "flat" if size < HNSW_FROM else "hnsw" if size < IVF_FROM else "ivf"

    def _outgrown(self, more: int) -> bool:
        return self._kind == "ivf" and len(self) + more > 4 * self._built_for

    def _ask(self, queries: Vectors, k: int) -> tuple[Vectors, Ids]:
        params = None
        if self._kind == "hnsw":
            params = faiss.SearchParametersHNSW(efSearch=max(_EF_SEARCH, 2 * k), sel=self._selector)
        elif self._kind == "ivf":
            params = faiss.SearchParametersIVF(nprobe=max(_LEAST_PROBED, int(self._index.nlist * _PROBED)))
        scores, ids = self._index.search(queries, k, params=params)
        return scores, ids

    def _held(self) -> tuple[Ids, Vectors]:
        """Ids and vectors of what is alive."""
        ids = _ids_of(self._index)
        alive = ~np.isin(ids, self._dead)
        return ids[alive], _vectors_of(self._index)[alive]

    def _append(self, ids: Ids, vectors: Vectors) -> None:
        self._own()
        done = 0
        try:
            for done in range(0, len(ids), _SLICE):
                with self._using:
                    self._index.add_with_ids(vectors[done : done + _SLICE], ids[done : done + _SLICE])
        except BaseException:
            self._discard(np.intersect1d(ids[: done + _SLICE], _ids_of(self._index)))
            raise

    def _discard(self, ids: Ids) -> None:
        if self._kind == "hnsw":  # its graph cannot lose a vector
            self._mask(np.union1d(self._dead, ids))
        elif len(ids):
            self._own()
            with self._using:
                self._index.remove_ids(ids)

    def _mask(self, dead: Ids) -> None:
        among = faiss.IDSelectorBatch(dead) if len(dead) else None
        with self._using:
            self._dead = dead
            self._selector = faiss.IDSelectorNot(among) if among else None

    def _own(self) -> None:
        """Copy a mapped index to memory: faiss ends the process when one is written to."""
        if self._mapped:
            copy = faiss.deserialize_index(faiss.serialize_index(self._index))
            with self._using:
                self._index, self._mapped = copy, False

    def _rebuild(self, kind: str, ids: Ids, vectors: Vectors) -> None:
        built = self._built(kind, ids, vectors)
        with self._using:
            self._adopt(*built, len(ids))

    def _adopt(self, kind: str, index: Any, built_for: int) -> None:
        self._kind, self._index, self._built_for = kind, index, built_for
        self._mapped = False
        self._dead = np.empty(0, np.int64)
        self._selector = None

    def _built(self, kind: str, ids: Ids, vectors: Vectors) -> tuple[str, Any]:
        index: Any
        if kind == "ivf":
            cells = max(1, len(ids) // _VECTORS_PER_CELL)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, cells, faiss.METRIC_INNER_PRODUCT)
            # Few vectors are no reason to warn: with one cell, all are searched.
            index.cp.niter, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 10, 1, 64
            if len(ids):
                index.train(vectors)
        elif kind == "hnsw":
            graph = faiss.IndexHNSWFlat(self.dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = _EF_BUILD
            index = faiss.IndexIDMap(graph)
        else:
            index = faiss.IndexIDMap(faiss.IndexFlatIP(self.dim))
        if len(ids):
            index.add_with_ids(vectors, ids)
        return kind, index

    def _checked(self, vectors: Vectors) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"vectors of shape {list(vectors.shape)} do not fit an index of dimension {self.dim}: "
                f"give [n, {self.dim}], embedded with the model the index was built with"
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def digest(path: Path) -> dict[str, Any]:
    """Return the size of a file, `bytes`, and its `sha256` in hexadecimal."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha.hexdigest()}


def _count(facts: Mapping[str, Any], name: str) -> int:
    value = facts[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


def _kind_of(index: Any) -> str:
    if isinstance(index, faiss.IndexIVFFlat):
        return "ivf"
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else None
    return {faiss.IndexHNSWFlat: "hnsw", faiss.IndexFlatIP: "flat"}.get(type(inner), "another")


def _ids_of(index: Any) -> Ids:
    if not isinstance(index, faiss.IndexIVFFlat):
        return np.asarray(faiss.vector_to_array(index.id_map))
    lists = index.invlists
    cells = [faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)) for cell in range(index.nlist)]
    return np.asarray(np.concatenate(cells), dtype=np.int64)


def _vectors_of(index: Any) -> Vectors:
    """The vectors `[n, dim]`, in the order of `_ids_of`."""
    if not isinstance(index, faiss.IndexIVFFlat):
        return np.asarray(index.index.reconstruct_n(0, index.ntotal))
    lists, width = index.invlists, index.code_size
    cells = [faiss.rev_swig_ptr(lists.get_codes(cell), lists.list_size(cell) * width) for cell in range(index.nlist)]
    vectors: Vectors = np.concatenate(cells).view(np.float32).reshape(-1, index.d)
    return vectors
