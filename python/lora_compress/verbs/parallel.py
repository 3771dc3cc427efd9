"""Work on many tensors at once, with bounded memory and results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from lora_compress._native import threads

Task = TypeVar("Task")
Result = TypeVar("Result")

# Elements of Δ in flight, two bytes each while they are worked on. Small tensors run side by side; one that is large
# has all threads to itself, and the next is read from the disk meanwhile.
IN_FLIGHT = 60_000_000


def ordered_map(
    job: Callable[[Task], Result],
    tasks: Sequence[Task],
    cost: Callable[[Task], int],
    announce: Callable[[Task], None] = lambda _: None,
) -> Iterator[tuple[Task, Result]]:
    """`(task, job(task))` for every task, in the order of `tasks`, whatever order they finish in.

    Jobs run in as many threads as the core uses (they release the GIL there) while their summed `cost` stays within
    `IN_FLIGHT`; one job always runs. `announce(task)` is called ahead of time, while the task before is worked on. The
    first exception is raised here and leaves the remaining tasks undone.

    Meanwhile NumPy's BLAS has one thread: its own would wait for processors that the core's are on, which makes small
    products forty times slower, and the last bits of large ones would depend on how many there are.
    """
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    in_flight = 0
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(max_workers=threads()) as pool:
        try:
            for number, task in enumerate(tasks):
                while waiting and in_flight + cost(task) > IN_FLIGHT:
                    done, future = waiting.popleft()
                    yield done, future.result()
                    in_flight -= cost(done)
                waiting.append((task, pool.submit(job, task)))
                in_flight += cost(task)
                for following in tasks[number + 1 : number + 2]:
                    announce(following)
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
