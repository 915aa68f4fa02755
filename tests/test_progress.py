import io

from rich.console import Console

from fastguard.progress import rich_progress


def shown(terminal):
    screen = io.StringIO()
    with rich_progress(Console(file=screen, force_terminal=terminal, width=100)) as report:
        report("align", 0.0, "")
        report("align", 0.5, "step 3, loss 1.20")
        report("attack [0]", 0.0, "")
        report("align", 1.0, "done in 9 s")
        report("attack [0]", 1.0, "found")
    return screen.getvalue()


def test_without_a_terminal_each_finished_stage_is_one_line():
    assert shown(False).splitlines() == ["align: done in 9 s", "attack [0]: found"]


def test_on_a_terminal_every_stage_has_a_bar():
    text = shown(True)
    assert "done in 9 s" in text and "attack [0]" in text
