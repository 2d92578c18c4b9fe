"""Many threads ask, one thread owns the model and answers in batches."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A question about an image; tuples sort by image first."""

    image_key: str
    question: str


class BatchWorker:
    """Gathers the requests of many threads and answers them on one thread of its own.

    A batch goes when it is full, or when no request has come for a while. If as many threads ask as a batch holds,
    every batch but the last is full; and since its rows are sorted, it is the same batch in every run, whatever order
    the threads came in: the answers do not depend on timing.
    """

    def __init__(
        self, answer: Callable[[Sequence[Asked], Sequence[Any]], list[str]], batch_size: int, patience: float = 0.25
    ):
        """Start the thread; it alone calls `answer`. `patience` is in seconds."""
        self._answer = answer
        self._batch_size = batch_size
        self._patience = patience
        self._requests: queue.SimpleQueue[tuple[Asked, Any, Future[str]]] = queue.SimpleQueue()
        # A daemon: a thread that waits for questions must not keep the process alive.
        threading.Thread(target=self._serve, name="answers", daemon=True).start()

    def ask(self, asked: Asked, image: Any) -> str:
        """Return the answer; blocks, and raises what answering its batch raised."""
        future: Future[str] = Future()
        self._requests.put((asked, image, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            batch = sorted(self._gather(), key=lambda request: request[0])
            futures = [future for _, _, future in batch]
            try:
                answers = self._answer([asked for asked, _, _ in batch], [image for _, image, _ in batch])
                for future, answer in zip(futures, answers, strict=True):
                    future.set_result(answer)
            except BaseException as error:  # noqa: BLE001 - it belongs to those who wait, and the thread must go on
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

    def _gather(self) -> list[tuple[Asked, Any, "Future[str]"]]:
        batch = [self._requests.get()]
        while len(batch) < self._batch_size:
            try:
                batch.append(self._requests.get(timeout=self._patience))
            except queue.Empty:
                break
        return batch
