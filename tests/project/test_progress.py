"""How far a long task has come, in a terminal and in a log file."""

from __future__ import annotations

import sys

import pytest

from fpt_lightning import progress
from fpt_lightning.progress import Progress, duration, significant, track


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0921, "0.0921"), (98.24, "98.2"), (302.4, "302"), (1234, "1,230"), (0, "0")]
)
def test_a_number_with_few_digits_has_no_exponent(value: float, shown: str) -> None:
    assert significant(value, 3) == shown


class Clock:
    """A clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_log_file_gets_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    task = Progress("preload", 5000)
    for _ in range(130):  # in steps of a second
        clock.now += 1
        task.update(10)
    task.close()
    assert capsys.readouterr().err.splitlines() == [
        "preload: 600 of 5,000 images, 10 a second, about 7 min left",
        "preload: 1,200 of 5,000 images, 10 a second, about 6 min left",
        "preload: 1,300 of 5,000 images in 2 min, 10 a second",
    ]


def test_the_estimate_follows_what_is_measured(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    task = Progress("preload", 1000)
    for count in (10, 90, 300):  # it gets faster
        clock.now += 60
        task.update(count)
    left = [line.rpartition("about ")[2] for line in capsys.readouterr().err.splitlines()]
    assert left == ["1 h 39 min left", "18 min left", "4 min left"]


def test_a_task_that_goes_on_counts_its_own_share(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    task = Progress("epoch 3/4", 400, done=200)
    task.tell("epoch 4/4", "val_auc 0.912")
    clock.now = 61
    task.update(61)
    task.update(139)
    task.close()
    assert capsys.readouterr().err.splitlines() == [
        "epoch 4/4: 261 of 400 images, 1 a second, about 2 min left; val_auc 0.912",
        "epoch 4/4: 400 images in 61 s, 3.28 a second",
    ]


def test_a_brief_task_leaves_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for total in (3, 0):
        assert list(track(range(total), "headers", total)) == list(range(total))
    assert capsys.readouterr().err == ""


def test_what_stops_a_task_is_raised_behind_its_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def items():  # type: ignore[no-untyped-def]
        clock.now = 20
        yield 1
        raise KeyError("the bad one")

    with pytest.raises(KeyError, match="the bad one"):
        list(track(items(), "headers", 3))
    assert capsys.readouterr().err == "headers: 1 of 3 images in 20 s, 0.05 a second\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.tqdm.mininterval", 0, raising=False)
    task = Progress("test", 10)
    task.update(10)
    task.tell("test", "val_auc 0.5")
    task.close()
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert last.startswith("test: 100%|")
    assert "10/10" in last
    assert " image/s" in last
    assert "val_auc 0.5" in last


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (3540, "59 min"), (3599, "1 h 00 min"), (360000, "100 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
