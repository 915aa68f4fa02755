"""Restoring: an interrupt at any instruction of it, of the change and of the restoration."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
from types import FrameType
from typing import Any

import pytest

from fastguard.nested import guard as module
from fastguard.nested.guard import Restoring


class Thing:
    """Two values that belong together."""

    def __init__(self) -> None:
        self.a = self.b = 0
        self.finished: bool | None = None

    def change(self, fails: bool) -> None:
        with Restoring() as guard:

            def restore(finished: bool) -> None:
                self.finished = finished
                self.a = 0
                self.b = 0

            guard.on_exit(restore)
            self.a = 1
            self.b = 1
            guard.release()
            assert self.a == self.b
            if fails:
                raise ZeroDivisionError


def interrupted_at(number: int, run: Any) -> bool:
    """Run with Ctrl-C at the number-th place; False if there are fewer.

    Places are all instructions of the guard and all lines of the block. Python looks for signals at calls; what leads
    from a block's last line to the call of ``__exit__`` has none.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        code = frame.f_code
        if code.co_filename == module.__file__:
            frame.f_trace_opcodes = True
        elif code.co_filename != __file__ or code.co_name not in ("change", "restore"):
            return None
        elif "with Restoring" in linecache.getline(__file__, frame.f_lineno):
            return trace
        seen += 1
        if seen == number:
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return seen >= number


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_at_any_instruction(fails):
    number, inside = 0, set()
    went_on = True
    while went_on:
        number += 1
        thing = Thing()

        def run(thing: Thing = thing) -> None:
            with contextlib.suppress(ZeroDivisionError):
                thing.change(fails)

        try:
            went_on = interrupted_at(number, run)
            assert not went_on, f"{number}: the interrupt was swallowed"
        except KeyboardInterrupt:
            inside.add(thing.finished)
        assert (thing.a, thing.b) == (0, 0), number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, number
    assert number > 100
    assert inside == ({None, False} if fails else {None, False, True})


def test_an_exception_of_the_restoration_puts_the_handler_back():
    def fails(finished: bool) -> None:
        raise ValueError(finished)

    with pytest.raises(ValueError, match="True"), Restoring() as guard:
        guard.on_exit(fails)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nested_blocks_restore_from_the_inside_out():
    order: list[str] = []
    with pytest.raises(KeyboardInterrupt), Restoring() as outer:
        outer.on_exit(lambda finished: order.append(f"outer {finished}"))
        outer.release()
        with Restoring() as inner:
            inner.on_exit(lambda finished: (signal.raise_signal(signal.SIGINT), order.append(f"inner {finished}")))
            inner.release()
        order.append("not reached")
    assert order == ["inner True", "outer False"]
