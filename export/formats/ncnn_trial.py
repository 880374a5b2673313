"""Runs an ncnn model once on a black image, in a process of its own: `python -I ncnn_trial.py PARAM BIN C H W NAMES…`.

ncnn does not check that the layers of a graph fit each other, and reads beyond its memory where they do not.
"""

import sys


def main(param: str, weights: str, channels: str, height: str, width: str, image: str, *outputs: str) -> str | None:
    """Return what is wrong, in one line; None where the model runs."""
    import ncnn
    import numpy as np

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = 1
    if net.load_param(param) != 0 or net.load_model(weights) != 0:
        return "ncnn cannot load it"
    black = np.zeros((int(channels), int(height), int(width)), np.float32)
    extractor = net.create_extractor()
    extractor.input(image, ncnn.Mat(black))
    for name in outputs:
        status, mat = extractor.extract(name)
        if status != 0 or mat.empty():
            return f"ncnn does not compute {name}"
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
