"""Runs exported files and says what came out: a program of its own, for any environment.

    python runtimes.py FORMAT FILE INPUTS.npz OUTPUTS.npz [FILE INPUTS.npz OUTPUTS.npz ...]

It needs NumPy and the format's runtime, and nothing of vision_jax, so that another environment's
Python can run it; and a file that kills its runtime kills this process alone. INPUTS has "0",
"1" ..., u8[B, H, W, C] each; OUTPUTS has "0/NAME" of each, and "seconds" of CPU, of one run of the
last, where all files take turns. The last line that it prints is JSON: the runtime and its version.
All is on one thread.
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time

import numpy as np

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
TURNS, SECONDS, MOST_RUNS = 7, 0.1, 20  # of CPU, of a turn to time a file by


def load_stablehlo(path):
    """A function from images to {name: array}, by JAX."""
    os.environ["XLA_FLAGS"] = ONE_THREAD
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    with open(path, "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    run = jax.jit(exported.call)  # else it is compiled again in each call
    return lambda images: jax.block_until_ready(run(images))


def load_onnx(path):
    """The same, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = session.get_inputs()[0].name
    return lambda images: dict(zip(names, session.run(names, {taken: images}), strict=True))


def load_tflite(path):
    """The same, by LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    signature = Interpreter(model_path=path, num_threads=1).get_signature_runner("serving_default")
    return lambda images: signature(images=images)


def load_openvino(path):
    """The same, by OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", settings)
    # A tensor has the names of all nodes that hand it on; an output's own has no number behind.
    own = re.compile(r"(?!.*_\d+_\d+$)")
    names = [next(filter(own.match, output.get_names())) for output in model.outputs]
    return lambda images: {
        name: value.copy() for name, value in zip(names, model(images).values(), strict=True)
    }


RUNTIMES = {  # format -> (the package that runs it, how it is loaded)
    "stablehlo": ("jax", load_stablehlo),
    "onnx": ("onnxruntime", load_onnx),
    "tflite": ("ai-edge-litert", load_tflite),
    "openvino": ("openvino", load_openvino),
}


def main(format_, *files):
    """Runs one file after the other, times them by turns and prints what ran."""
    package, load = RUNTIMES[format_]
    found = {"runtime": package, "python": platform.python_version()}
    found["version"] = importlib.metadata.version(package)
    ran = []
    for first in range(0, len(files), 3):
        path, inputs, outputs = files[first : first + 3]
        ran.append((outputs, *run_one(load(path), inputs)))
    for (outputs, results, _), seconds in zip(
        ran, time_by_turns([one[2] for one in ran]), strict=True
    ):
        np.savez(outputs, **results, seconds=np.array(seconds))
    print(json.dumps(found))


def run_one(run, inputs):
    """({"0/NAME": array}, a function that runs the last images again)."""
    given = np.load(inputs)
    results = {}
    for name in given.files:
        images = given[name]
        for output, value in run(images).items():
            results[f"{name}/{output}"] = np.asarray(value)
    return results, lambda: run(images)


def time_by_turns(runs):
    """CPU seconds of each: the least over turns, which a busy machine changes least."""
    least = [float("inf")] * len(runs)
    for _ in range(TURNS):
        for place, run in enumerate(runs):
            begin, count = time.process_time(), 0
            while count < MOST_RUNS and time.process_time() < begin + SECONDS:
                run()
                count += 1
            least[place] = min(least[place], (time.process_time() - begin) / count)
    return least


if __name__ == "__main__":
    main(*sys.argv[1:])
