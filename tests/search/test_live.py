"""What a search shows while it goes: a table in place on a terminal, a line where there is none."""

import pytest
import runs

from vision_jax.commands import search as command
from vision_jax.logging import live_table
from vision_jax.search import drive, uniform
from vision_jax.search.search import Search, Settings
from vision_jax.search.space import check_space


@pytest.mark.long
@pytest.mark.parametrize("terminal", [False, True])
def test_new_figures_are_shown(terminal, tmp_path, monkeypatch, capsys):
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", "120")
    config = runs.tiny_config()
    space = check_space({"optim.lr": uniform(1e-3, 1e-2)}, config)
    search = Search(config, space, Settings(trials=2), tmp_path)
    drive.keep_settings(search)
    with live_table() as show:
        watch = command._Watch(show)
        watch(search)
        search.journal.scores("evaluation", 3, {0: {"top1": 0.25}, 1: {"top1": 0.5}})
        watch(search)
    shown = capsys.readouterr().out
    if terminal:
        assert "The best of 2 trials" in shown
        assert shown.index("0.5") < shown.index("0.25")
    else:
        assert shown == (
            "0 of 2 trials finished, 2 begun; best so far: trial 1, top1 0.5000 at step 3\n"
        )
