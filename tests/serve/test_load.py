"""The load test of benchmarks/serving.py, small: many clients, hostile ones among them."""

import importlib
import re
import signal
import subprocess
import sys
import threading

import pytest
import runs
import serving_runs

pytest.importorskip("starlette", reason="the extra serve")

NEVER_COMPILED = """
import sys
import jax
from vision_jax.commands import serve
from vision_jax.serve import model

def compile_programs(*_):  # stands for one that takes minutes: it never comes back, as XLA doesn't
    jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: x / 2, x))(1.0).item()

model.compile_programs = compile_programs
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_server_under_load(monkeypatch, capsys):
    """A process of its own: no wrong answer, nothing compiled late, memory as before, and 0."""
    monkeypatch.syspath_prepend(runs.ROOT)
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    serving = importlib.import_module("benchmarks.serving")
    flags = ["--peers", "--requests=1000", "--clients=100", "--photos=20"]
    monkeypatch.setattr(sys, "argv", ["serving", *flags])
    assert serving.main() == 0
    shown = capsys.readouterr().out
    assert "compiled after the start: 0; wrong answers: 0" in shown
    for name in ("a terabyte", "leaves before the answer", "900 million pixels"):
        assert re.search(rf"^  {name} +\d+ +\d+$", shown, re.M)
    memory = [int(row) for row in re.findall(r"^ +\d+ +(\d+) +\d+ +\d+ +\d+ +0$", shown, re.M)]
    assert len(memory) == 10
    assert memory[-1] < 1.2 * memory[1]


@pytest.mark.long
def test_sigterm_answers_what_is_there(monkeypatch, rng):
    """Twenty large photos wait when it comes: each is answered, nobody else is, the end is good."""
    monkeypatch.syspath_prepend(runs.ROOT)
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    serving = importlib.import_module("benchmarks.serving")
    data = serving_runs.photo(rng, 1500, 1500)
    answers = []
    with serving.served("-m", "vision_jax", "serve", serving.WEIGHTS, "--port=0") as server:
        threads = [
            threading.Thread(
                target=lambda: answers.append(serving_runs.predict(server.port, data)[0])
            )
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        taken = "vision_jax_seats_taken"
        serving_runs.wait_until(lambda: serving_runs.gauge(server.port, taken) == 20)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        server.process.wait(60)
        with pytest.raises(ConnectionRefusedError):
            serving_runs.predict(server.port, data)
    assert answers == [200] * 20


@pytest.mark.long
def test_sigterm_while_it_compiles_ends_in_time():
    flags = ["embedded:vit_cifar10", "--port=0", "--deadline=0.5", "--no-cache"]
    command = [sys.executable, "-c", NEVER_COMPILED, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runs.ROOT) as process:
        try:
            assert "compiling" in process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert process.stdout.read() == "stopped, with everything answered\n"
        finally:
            process.kill()
