"""Batches that are prepared ahead in a thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Iterable

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from fpt_lightning.data.prefetch import AHEAD, PrefetchingLoader, items_in_threads, pinned, usable_threads


class Numbers(Dataset[int]):
    """Counts what was asked for; fails at one number, if any."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at = count, fails_at
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index == self.fails_at:
            raise KeyError("the bad one")
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        return index

    def in_threads(self, batches: Iterable[list[int]], threads: int) -> Generator[dict[str, torch.Tensor], None, None]:
        return items_in_threads(self.__getitem__, self.gather, batches, threads)

    def gather(self, items: list[int]) -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor(items)}


def prefetching() -> bool:
    return any(thread.name.startswith(("prefetch", "decoding")) for thread in threading.enumerate())


def wait_for(numbers: Numbers, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(numbers.asked) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_all_tensors_of_a_batch_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.neg)  # without a GPU
    one = torch.ones(1)
    batch = {"ids": ["a"], "features": one, "pooled": 2 * one}
    assert pinned(batch) == {"ids": ["a"], "features": -one, "pooled": -2 * one}
    assert batch["features"] is one


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_whole_and_in_order(workers: int) -> None:
    loader = PrefetchingLoader(Numbers(10), batch_size=4, num_workers=workers)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(loader) == 3
    assert not prefetching()


def test_the_thread_is_ahead_but_not_far() -> None:
    numbers = Numbers(20)
    batches = iter(PrefetchingLoader(numbers, batch_size=1))
    assert next(batches).item() == 0
    wait_for(numbers, 3)  # one in the queue, one in the thread's hand
    time.sleep(0.2)
    assert numbers.asked == [0, 1, 2]
    assert numbers.threads == {"prefetch"}


def test_an_error_is_raised_where_its_batch_would_be() -> None:
    batches = iter(PrefetchingLoader(Numbers(10, fails_at=5), batch_size=2))
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(KeyError, match="the bad one") as raised:
        next(batches)
    assert "__getitem__" in [entry.name for entry in raised.traceback]
    assert not prefetching()


def test_leaving_early_stops_the_thread() -> None:
    for _ in PrefetchingLoader(Numbers(1000), batch_size=1):
        break
    assert not prefetching()


def test_an_interrupted_loop_stops_the_thread() -> None:
    def interrupted() -> None:
        for _ in PrefetchingLoader(Numbers(1000), batch_size=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not prefetching()


def test_an_abandoned_loop_stops_the_thread() -> None:
    batches = iter(PrefetchingLoader(Numbers(1000), batch_size=1))
    next(batches)
    del batches
    assert not prefetching()


def test_threads_prepare_items_ahead_but_not_far() -> None:
    numbers = Numbers(40)
    batches = iter(PrefetchingLoader(numbers, threads=3, batch_size=4))
    assert next(batches)["numbers"].tolist() == [0, 1, 2, 3]
    wait_for(numbers, 15)  # one batch in the queue, one in the thread's hand, and one item a thread
    time.sleep(0.2)
    assert sorted(numbers.asked) == list(range(15))
    assert all(name.startswith("decoding") for name in numbers.threads)
    assert [batch["numbers"].tolist() for batch in batches] == [list(range(i, i + 4)) for i in range(4, 40, 4)]
    assert not prefetching()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_that_the_consumer_drops_is_gone(threads: int) -> None:
    """What is alive is the one in use, those that are ready and the one in the thread's hand."""
    made = list[weakref.ref[torch.Tensor]]()

    class Tensors(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros(super().__getitem__(index))

        def gather(self, items: list[torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return self.kept(torch.stack(items))

        def kept(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            made.append(weakref.ref(batch))
            return {"numbers": batch}

    loader = PrefetchingLoader(
        numbers := Tensors(9), threads=threads, batch_size=1, collate_fn=lambda items: numbers.kept(items[0])
    )
    batches = iter(loader)
    for index in range(4):
        batch = next(batches)
        wait_for(numbers, index + 2 + AHEAD)
        time.sleep(0.05)
        assert sum(ref() is not None for ref in made) == 2 + AHEAD
        assert made[index]() is batch["numbers"]
    del batch
    time.sleep(0.05)
    assert sum(ref() is not None for ref in made) == 1 + AHEAD


def test_threads_prepare_items_at_once() -> None:
    """Each waits for the others."""
    together = threading.Barrier(3)

    class Waiting(Numbers):
        def __getitem__(self, index: int) -> int:
            together.wait(10)
            return index

    loader = PrefetchingLoader(Waiting(9), threads=3, batch_size=2)
    assert [batch["numbers"].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_pytorch_starts_no_threads_in_those_of_the_loader() -> None:
    class Threads(Numbers):
        def __getitem__(self, index: int) -> int:
            return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = iter(PrefetchingLoader(Threads(8), threads=2, batch_size=4))
        assert next(batches)["numbers"].tolist() == [1] * 4
        found = [torch.get_num_threads()]
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_the_error_of_an_item_is_raised_where_its_batch_would_be() -> None:
    batches = iter(PrefetchingLoader(Numbers(10, fails_at=5), threads=4, batch_size=2))
    assert [next(batches)["numbers"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(KeyError, match="the bad one"):
        next(batches)
    assert not prefetching()


@pytest.mark.parametrize("batch_size", [1, 100])
def test_leaving_early_stops_all_threads(batch_size: int) -> None:
    for _ in PrefetchingLoader(Numbers(1000), threads=3, batch_size=batch_size):
        break
    assert not prefetching()


@pytest.mark.parametrize(
    ("asked", "processes", "expected"), [(None, 1, 32), (None, 4, 10), (None, 100, 1), (3, 4, 3), (64, 1, 64)]
)
def test_how_many_threads(asked: int | None, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(40)), raising=False)
    assert usable_threads(asked, processes) == expected


def test_the_thread_is_on_the_device_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a thread starts on the first GPU, and pins memory there."""
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: chosen.append((threading.current_thread().name, to)))
    assert len(list(PrefetchingLoader(Numbers(4), batch_size=2))) == 2
    assert chosen == [("prefetch", 1)]


def test_lightning_takes_it_as_any_loader() -> None:
    class Sums(L.LightningModule):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.seen += batch.tolist()
            return self.weight * batch.sum()

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return batch

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.weight], 0.1)

    model = Sums()
    model.seen, model.weight = [], torch.nn.Parameter(torch.ones(()))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    loader = PrefetchingLoader(Numbers(5), batch_size=2)
    trainer.fit(model, loader)
    assert model.seen == [*range(5)] * 2
    predicted = trainer.predict(model, loader)
    assert predicted is not None
    assert torch.cat(list(predicted)).tolist() == [*range(5)]
    assert not prefetching()
