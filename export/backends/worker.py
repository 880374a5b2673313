"""One runtime with one model in a process of its own, which runs batches on request.

Started by path (`python -I worker.py JOB`), so that nothing but the runtime is loaded: its memory and its start are
then those of a program that ships it. It knows nothing of the rest of the project, except to build a model for PyTorch:
files run so on another processor too, where there is no PyTorch (export/arm64).

The job and all responses are JSON. Commands are lines on the standard input:

    {"batch": 16}       make an input, run it for the first time
    {"seconds": 0.2}    run for at least that long, at least twice, and respond with the time of each call;
                        with "processor": true until that much processor time is used
    {"images": "F.npy", "outputs": "D"}    run images (n, …) one by one, write output number i as D/i.npy, and respond
                        with what the processor has

Times are in seconds. The response to an error is {"error": "one line"}, and the process ends.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]  # runs one batch and returns its outputs in order, each as the runtime holds it
Prepare = Callable[..., Call]
"""Takes a batch size and, of runtimes that files run in on another processor, the images (B, …) as `Spec.feed` returns
them; random ones that stay the same by default."""


def run_onnx(job: dict[str, Any]) -> Prepare:
    """Open a file in ONNX Runtime; `provider` is cpu, cuda or tensorrt."""
    import runpy

    create_session = runpy.run_path(job["sessions"])["create_session"]  # shvit/sessions.py, without PyTorch
    session = create_session(job["path"], job["threads"], provider=job["provider"])

    def prepare(batch: int, images: Any = None) -> Call:
        types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
        inputs = {}
        for each in session.get_inputs():
            inputs[each.name] = random(each.shape, types[each.type], batch) if images is None else images
        return lambda: session.run(None, inputs)

    return prepare


def run_ncnn(job: dict[str, Any]) -> Prepare:
    """Open a .param with its .bin in ncnn, which takes one image at a time.

    ncnn computes any file in float16 where the processor can; `fp16` lets it, for files of that precision alone.
    """
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.num_threads = job["threads"]
    net.opt.use_bf16_storage = job["bf16"]
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = job["fp16"]
    if net.load_param(job["path"]) != 0 or net.load_model(job["path"].removesuffix(".param") + ".bin") != 0:
        raise ValueError("ncnn cannot load it")
    name, *outputs = job["names"]

    def run(mat: Any) -> list[Any]:
        extractor = net.create_extractor()
        extractor.input(name, mat)
        return [extractor.extract(output)[1] for output in outputs]

    def prepare(batch: int, images: Any = None) -> Call:
        if images is None:
            images = np.random.default_rng(0).random((batch, *job["shape"]), dtype=np.float32)
        if images.dtype == np.uint8:  # (B, H, W, C)
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        mats = [ncnn.Mat(image).clone() for image in images]
        return lambda: zip(*[run(mat) for mat in mats], strict=True)

    return prepare


def run_litert(job: dict[str, Any]) -> Prepare:
    """Open a .tflite file in LiteRT, which takes one image at a time."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(job["path"], num_threads=job["threads"])
    interpreter.allocate_tensors()
    outputs = [each["index"] for each in interpreter.get_output_details()]

    def prepare(batch: int, images: Any = None) -> Call:
        for each in interpreter.get_input_details():
            shape = each["shape"].tolist()
            value = random(shape, each["dtype"].__name__, shape[0]) if images is None else images
            interpreter.set_tensor(each["index"], value)

        def call() -> Any:
            for _ in range(batch):
                interpreter.invoke()
            return map(interpreter.get_tensor, outputs)

        return call

    return prepare


def run_executorch(job: dict[str, Any]) -> Prepare:
    """Open a program in ExecuTorch, which takes one image at a time; its binding needs PyTorch, `library` does not."""
    if "library" in job:
        return run_executorch_library(job)
    import torch
    from executorch.extension.pybindings import _C

    _C._unsafe_reset_threadpool(job["threads"])
    module = _C._load_for_executorch(job["path"])

    def prepare(batch: int, images: Any = None) -> Call:
        image = torch.from_numpy(random(job["shape"], job["dtype"], job["shape"][0]) if images is None else images)

        def call() -> Any:
            for _ in range(batch):
                outputs = module.forward([image], clone_outputs=False)
            return outputs

        return call

    return prepare


def run_executorch_library(job: dict[str, Any]) -> Prepare:
    """Open a program in ExecuTorch through the functions of executorch_arm64.cpp."""
    import ctypes

    import numpy as np

    library, program = ctypes.CDLL(job["library"]), ctypes.c_void_p()
    library.program_open.restype = library.program_run.restype = ctypes.c_char_p
    library.output_sizes.restype = ctypes.POINTER(ctypes.c_int32)
    library.output_values.restype = ctypes.POINTER(ctypes.c_float)

    def check(error: bytes | None) -> None:
        if error is not None:
            raise ValueError(f"ExecuTorch: {error.decode()}")

    def output(number: int) -> Any:
        sizes = library.output_sizes(program, number)[: library.output_dims(program, number)]
        return np.ctypeslib.as_array(library.output_values(program, number), sizes)

    check(library.program_open(os.fsencode(job["path"]), ctypes.byref(program)))

    def prepare(batch: int, images: Any = None) -> Call:
        image = random(job["shape"], job["dtype"], job["shape"][0]) if images is None else images
        image = np.ascontiguousarray(image)
        sizes = (ctypes.c_int32 * image.ndim)(*image.shape)

        def call() -> Any:
            for _ in range(batch):
                pixels = image.ctypes.data_as(ctypes.c_void_p)
                check(library.program_run(program, pixels, image.dtype == np.uint8, image.ndim, sizes))
            return map(output, range(library.program_outputs(program)))

        return call

    return prepare


class OpenVINO:
    """An IR or ONNX file in OpenVINO, compiled for the batch size: a dynamic one costs a fifth of S1's speed."""

    def __init__(self, job: dict[str, Any]):
        import openvino as ov
        from openvino import properties

        core = ov.Core()
        model = core.read_model(job["path"])
        precision = properties.hint.inference_precision()
        kind = ov.Type.bf16 if job["bf16"] else ov.Type.f32
        options = {precision: kind, properties.inference_num_threads(): job["threads"]}
        self.shapes = {port.any_name: [dim.get_length() if dim.is_static else None for dim in port.partial_shape]
                       for port in model.inputs}  # fmt: skip
        self.types = {port.any_name: port.element_type.to_dtype().name for port in model.inputs}
        batch = job["batch_size"]
        model.reshape({name: [batch if dim is None else dim for dim in shape] for name, shape in self.shapes.items()})
        compiled = core.compile_model(model, "CPU", options)
        self.lacks_bf16 = job["bf16"] and compiled.get_property(precision) != ov.Type.bf16
        self.request = compiled.create_infer_request()

    def __call__(self, batch: int, images: Any = None) -> Call:
        inputs = {name: random(shape, self.types[name], batch) if images is None else images
                  for name, shape in self.shapes.items()}  # fmt: skip
        return lambda: self.request.infer(inputs, share_inputs=True, share_outputs=True).values()


class CoreML:
    """A package in Core ML, on macOS, through coremltools' benchmarker; a batch runs one image after the other.

    The benchmarker gives Core ML's own durations, of loading the compiled model and of each prediction, without what
    Python does before and after them: that is what an app waits for. A call returns its seconds (`reported_time`).
    """

    def __init__(self, job: dict[str, Any]):
        import asyncio

        import coremltools as ct
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

        units = ct.ComputeUnit[job["compute_units"]]
        model = ct.models.MLModel(job["path"], compute_units=units, skip_model_load=True)
        self.benchmarker = MLModelBenchmarker(model)
        self.run = asyncio.new_event_loop().run_until_complete
        self.inputs = coreml_inputs(model.get_spec().description)
        self.load = 1e-3 * sum(self.run(self.benchmarker.benchmark_load()).samples)

    def __call__(self, batch: int) -> Call:
        def call() -> float:
            return 1e-3 * sum(self.run(self.benchmarker.benchmark_predict(self.inputs, iterations=batch)).samples)

        return call


def coreml_inputs(description: Any) -> dict[str, Any]:
    """Return a random image or tensor for each input in a package's description.

    The benchmarker's own random inputs do not support images (coremltools 9.0).
    """
    import numpy as np
    from PIL import Image

    generator, inputs = np.random.default_rng(0), dict[str, Any]()
    for each in description.input:
        if each.type.WhichOneof("Type") == "imageType":
            image = each.type.imageType
            gray = image.colorSpace == image.ColorSpace.GRAYSCALE
            sizes = (image.height, image.width) if gray else (image.height, image.width, 3)
            inputs[each.name] = Image.fromarray(generator.integers(0, 256, sizes, dtype=np.uint8))
        else:
            sizes = tuple(each.type.multiArrayType.shape)
            inputs[each.name] = generator.standard_normal(sizes, dtype=np.float32)
    return inputs


def run_torch(job: dict[str, Any]) -> Prepare:
    """Open a deployed model in PyTorch, eager or compiled; on a GPU as one CUDA graph."""
    from pathlib import Path

    import torch

    from shvit.deployment import deploy
    from shvit.export.spec import open_model

    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    model, spec = open_model(job["model"], checkpoint, job["img_size"])
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    deployed = deploy(model, spec.img_size).to(device, dtype).to(memory_format=layout)
    predict: Callable[[torch.Tensor], object] = deployed
    if job["compiled"]:
        import torch._inductor.config as inductor

        inductor.freezing = True
        predict = torch.compile(deployed)

    def prepare(batch: int) -> Call:
        x = torch.rand(batch, *spec.shape).to(device, dtype, memory_format=layout)

        def call() -> object:
            with torch.inference_mode():
                return predict(x)

        return call if device.type == "cpu" else cuda_graph(call)

    return prepare


def cuda_graph(call: Call) -> Call:
    """Record the kernels that a call launches, and return a call that launches them as one CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


RUNNERS: dict[str, Callable[[dict[str, Any]], Prepare]] = {
    "onnx": run_onnx,
    "ncnn": run_ncnn,
    "litert": run_litert,
    "executorch": run_executorch,
    "openvino": OpenVINO,
    "coreml": CoreML,
    "torch": run_torch,
}


def random(shape: list[Any], dtype: str, batch: int) -> Any:
    """Return a random input of that shape; the first size, if dynamic, is the batch's."""
    import numpy as np

    sizes = [size if isinstance(size, int) else batch for size in shape]
    if sizes[0] != batch:
        raise RuntimeError(f"the file takes batches of {sizes[0]}, not of {batch}")
    generator = np.random.default_rng(0)
    if dtype == "uint8":
        return generator.integers(0, 256, sizes, dtype=np.uint8)
    return generator.standard_normal(sizes, dtype=np.float32).astype(dtype)


MAX_WALL_RATIO = 4  # wall time over processor time in a round that is measured by processor time


def time_calls(
    call: Call, seconds: float, time_one: Callable[[Call], float], processor: bool = False
) -> dict[str, Any]:
    """Return the time of each call, and the mean processor time of a call.

    Args:
        processor: continue until `seconds` of processor time are used, however much of the core others take.
    """
    call()  # refills the caches after another case's round
    times: list[float] = []
    cpu, start = time.process_time(), time.perf_counter()

    def lasts() -> bool:
        waited = time.perf_counter() - start  # processor time is asked for last: each question may let others in
        return waited < seconds or (
            processor and waited < MAX_WALL_RATIO * seconds and time.process_time() - cpu < seconds
        )

    while len(times) < 2 or lasts():
        times.append(time_one(call))
    return {"wall": times, "cpu": (time.process_time() - cpu) / len(times)}


def wall_time(call: Call) -> float:
    """Return the seconds of a call by this machine's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_time(call: Call) -> float:
    """Return the seconds of what a call launches, by the GPU's clock."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def reported_time(call: Call) -> float:
    """Return the seconds that the call itself reports."""
    return call()


def peak_memory() -> int | None:
    """Return the peak memory of the process so far, in bytes; None where the system does not report it (Windows)."""
    if os.path.exists("/proc/self/status"):  # noqa: PTH110  (getrusage counts the parent's memory before exec, too)
        with open("/proc/self/status") as status:  # noqa: PTH123
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def run_images(prepare: Prepare, images: str, folder: str) -> None:
    """Run images one by one, as files with a batch of 1 need it, and write each output of all of them."""
    import numpy as np

    results = [[np.array(output) for output in prepare(1, image[None])()] for image in np.load(images)]
    for number, outputs in enumerate(zip(*results, strict=True)):
        np.save(os.path.join(folder, f"{number}.npy"), np.concatenate(outputs).astype(np.float32))  # noqa: PTH118


def capabilities() -> dict[str, Any]:
    """Return the processor's kind, and what Linux says that it has: the two words of AT_HWCAP and AT_HWCAP2."""
    import platform
    import struct

    with open("/proc/self/auxv", "rb") as file:  # noqa: PTH123
        vector = dict(struct.iter_unpack("QQ", file.read()))
    return {"machine": platform.machine(), "hwcap": [vector.get(16, 0), vector.get(26, 0)]}


def main() -> None:
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a runtime prints is not a response
    job = json.loads(sys.argv[1])

    def respond(**result: Any) -> None:
        responses.write(json.dumps(result) + "\n")
        responses.flush()

    try:
        if job["cores"]:
            os.sched_setaffinity(0, job["cores"])
        on_gpu = job.get("device") == "cuda"
        time_one = gpu_time if on_gpu else reported_time if job["runner"] == "coreml" else wall_time
        start = time.perf_counter()
        prepare = RUNNERS[job["runner"]](job)
        load = prepare.load if isinstance(prepare, CoreML) else time.perf_counter() - start
        respond(load=load, lacks_bf16=isinstance(prepare, OpenVINO) and prepare.lacks_bf16)
        for line in sys.stdin:
            command = json.loads(line)
            if "images" in command:
                run_images(prepare, command["images"], command["outputs"])
                respond(**capabilities())
            elif "batch" in command:
                call = prepare(command["batch"])
                start = time.perf_counter()
                call()
                if on_gpu:
                    gpu_time(lambda: None)  # waits for the GPU
                respond(first=time.perf_counter() - start)
                call()
            else:
                times = time_calls(call, command["seconds"], time_one, command.get("processor", False))
                respond(**times, peak=peak_memory())
    except Exception as error:
        lines = str(error).strip().splitlines()
        respond(error=f"{type(error).__name__}: {lines[0] if lines else ''}"[:300])
        sys.exit(1)


if __name__ == "__main__":
    main()
