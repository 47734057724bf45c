from __future__ import annotations

import io

from rich.console import Console

from krdistill.console import ConsoleEvents, duration, print_table


def _line(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "epochs": 2, "loss": {"total": 1.25}, "test": {"top1": 0.5}}


def test_last_epoch_stays_on_the_screen_of_a_terminal_too() -> None:
    for terminal in (False, True):
        screen = io.StringIO()
        events = ConsoleEvents(Console(file=screen, force_terminal=terminal, width=80))
        events.stage("teacher", "resnet8")
        for epoch in (1, 2):
            events.progress("teacher", epoch, 2)
            events.epoch("teacher", _line(epoch))
        events.close()
        assert "epoch 2/2, loss 1.250, 50.0% test" in screen.getvalue().splitlines()[-1]


def test_wide_tables_are_cut_into_parts_that_fit() -> None:
    screen = io.StringIO()
    headers = ["network", *(f"column{i}" for i in range(8))]
    print_table(Console(file=screen, width=50), headers, [["student [bold]", *(f"{i}.0%" for i in range(8))]])
    shown = screen.getvalue()
    assert all(len(line.rstrip()) <= 50 for line in shown.splitlines())
    assert all(f"column{i}" in shown and f"{i}.0%" in shown for i in range(8))
    assert shown.count("student [bold]") > 1  # markup is shown as it is


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 200, 599, 3000, 7300)] == [
        "0 s", "59 s", "1 min", "3 min 20 s", "9 min 59 s", "50 min", "2 h 1 min",
    ]  # fmt: skip
