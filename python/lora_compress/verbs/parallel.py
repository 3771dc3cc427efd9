"""Work on many tensors at once, with bounded memory and results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# Elements of Δ in flight, two bytes each while they are worked on. Tensors run side by side as long as they fit: each
# is read, formed and decomposed by one thread, so one reads while another computes; threads without a tensor help.
IN_FLIGHT = 60_000_000


def ordered_map(
    job: Callable[[Task], Result], tasks: Sequence[Task], cost: Callable[[Task], int]
) -> Iterator[tuple[Task, Result]]:
    """`(task, job(task))` for every task, in the order of `tasks`, whatever order they finish in.

    Jobs run in threads (they release the GIL in the core) while their summed `cost` stays within `IN_FLIGHT`; one job
    always runs. The first exception is raised here and leaves the remaining tasks undone.
    """
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            for task in tasks:
                while waiting and in_flight + cost(task) > IN_FLIGHT:
                    done, future = waiting.popleft()
                    yield done, future.result()
                    in_flight -= cost(done)
                waiting.append((task, pool.submit(job, task)))
                in_flight += cost(task)
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
