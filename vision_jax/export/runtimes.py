"""Runs exported files and says what came out: a program of its own, for any environment.

    python runtimes.py FORMAT FILE INPUTS.npz OUTPUTS.npz [FILE INPUTS.npz OUTPUTS.npz ...]

It needs NumPy and the format's runtime, and nothing of vision_jax, so that another environment's
Python can run it; and a file that kills its runtime kills this process alone. INPUTS has "0",
"1" ..., u8[B, H, W, C] each; OUTPUTS has "0/NAME" of each, and "seconds" of CPU, of one run of the
last. The last line that it prints is JSON: the runtime and its version. All is on one thread.
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
LEAST_SECONDS, MOST_RUNS = 0.5, 50  # of CPU, to time a run by


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
    """Runs one file after the other and prints what ran."""
    package, load = RUNTIMES[format_]
    found = {"runtime": package, "python": platform.python_version()}
    found["version"] = importlib.metadata.version(package)
    for first in range(0, len(files), 3):
        path, inputs, outputs = files[first : first + 3]
        run_one(load(path), inputs, outputs)
    print(json.dumps(found))


def run_one(run, inputs, outputs):
    """Writes `outputs`."""
    import numpy as np

    given = np.load(inputs)
    results = {}
    for name in given.files:
        images = given[name]
        for output, value in run(images).items():
            results[f"{name}/{output}"] = np.asarray(value)
    begin, runs = time.process_time(), 0
    while runs < MOST_RUNS and time.process_time() < begin + LEAST_SECONDS:
        run(images)
        runs += 1
    results["seconds"] = np.array((time.process_time() - begin) / runs)
    np.savez(outputs, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
