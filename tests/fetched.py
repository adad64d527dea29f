"""What the scripts fetch, for tests on real weights and data."""

import importlib
import sys

import pytest
import runs


def fetch(name, folder):
    """What scripts/NAME.py writes into a folder; the test is skipped where it can't be had."""
    scripts, before = runs.ROOT / "scripts", set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scripts))
        try:
            return importlib.import_module(name).fetch(folder)
        except SystemExit as error:
            pytest.skip(str(error))
        finally:
            for one in set(sys.modules) - before:
                if (scripts / f"{one}.py").is_file():
                    del sys.modules[one]
