"""Ranks as threads of one process: what each holds is its own, and collectives meet at a barrier."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from trl_learnalign.distributed import Ranks


class ThreadedRanks(Ranks):
    """One of several ranks.

    Args:
        index (`int`): Which one.
        slots (`list`): One place for each rank, shared by all.
        barrier (`threading.Barrier`): Where they meet.
    """

    def __init__(self, index, slots, barrier):
        super().__init__()
        self._index, self._slots, self._barrier = index, slots, barrier

    @property
    def index(self):
        return self._index

    @property
    def count(self):
        return len(self._slots)

    def _everyones(self, value):
        self._slots[self._index] = value
        self._barrier.wait(60)
        values = list(self._slots)
        self._barrier.wait(60)
        return values

    def all_sum(self, tensor):
        return sum(self._everyones(tensor.clone()))

    def gather(self, values):
        return [value for each in self._everyones(values) for value in each]

    def from_main(self, value):
        return self._everyones(value)[0]


def on_ranks(count, work):
    """What `work(ranks)` gives on each rank."""
    slots, barrier = [None] * count, threading.Barrier(count)
    ranks = [ThreadedRanks(index, slots, barrier) for index in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, ranks))
