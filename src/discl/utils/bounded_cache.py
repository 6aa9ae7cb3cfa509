"""A cache of values by key that forgets the oldest ones beyond a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedCache(Generic[T]):
    """The values that were used last, as far as they fit; safe for threads.

    - `capacity`: bytes of all values. The last value stays even if it is larger.
    - `size_of`: returns the bytes of a value.
    """

    def __init__(self, capacity: int, size_of: Callable[[T], int]) -> None:
        self.capacity, self.size_of = capacity, size_of
        self.size = 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not there. Two threads may make the same value."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self.size += self.size_of(value)
            while self.size > self.capacity and len(self._values) > 1:
                self.size -= self.size_of(self._values.popitem(last=False)[1])
        return value
