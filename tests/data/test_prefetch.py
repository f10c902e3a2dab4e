"""Batches that are prepared ahead in a thread."""

from __future__ import annotations

import threading
import time

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from fpt_lightning.data.prefetch import PrefetchingLoader


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


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def wait_for(numbers: Numbers, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(numbers.asked) < count and time.monotonic() < deadline:
        time.sleep(0.01)


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
    wait_for(numbers, 4)  # two in the queue, one in the thread's hand
    time.sleep(0.2)
    assert numbers.asked == [0, 1, 2, 3]
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
