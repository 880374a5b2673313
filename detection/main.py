"""The commands `shvit detect {train,eval,export,predict,configs}`; see shvit/cli.py for how they are called."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import track
from rich.table import Table

from shvit import terminal
from shvit.certificate import certificate_path, check_unchanged
from shvit.errors import InputError, some
from shvit.files import atomic_write, check_output_folder, sha256
from shvit.weights.run_info import read_run_info, same_name

from .config import CONFIGS, bundled, only_known, open_config, set_data_root
from .detector import (
    Detect,
    check_img_size,
    class_names,
    find_weights,
    fixed_pipeline,
    forget_initial_weights,
    open_detector,
    own_pipeline,
    preparation,
    torch_detect,
)

console = terminal.console()
DEFAULT_SIZE = (512, 512)


@dataclass(frozen=True, kw_only=True)
class _Command:
    config: tyro.conf.Positional[str]
    """A config of ours (`shvit detect configs`), or a .py file."""
    options: tuple[str, ...] = ()
    """Fields in place of the config's: `train_cfg.max_epochs=3`, `train_dataloader.batch_size=4`, …"""
    trust_config: bool = False
    """Run code that the config has, and import what it names; a config that is more than data is refused otherwise."""

    def _config(self) -> Any:
        return open_config(self.config, self.options, self.trust_config)


@dataclass(frozen=True, kw_only=True)
class _Reads(_Command):
    data: Path | None = None
    """The folder of images and annotations, in place of the config's data_root."""

    def _config(self) -> Any:
        config = super()._config()
        if self.data is not None:
            set_data_root(config, self.data)
        return config


@dataclass(frozen=True, kw_only=True)
class Train(_Reads):
    """Trains a detector, or goes on with the run that --output holds. On several GPUs: torchrun … -m shvit.detection"""

    output: Path | None = None
    """The run folder; runs/CONFIG by default."""
    pretrained: str | None = None
    """What the backbone begins with: a checkpoint of any layout, a name of `shvit weights list`, or `none` for random
    weights; by default what the config says, ImageNet weights from timm's hub."""
    auto_scale_lr: bool = False
    """Fit the learning rate to the batch: the configs' is for 16 images in all."""

    def run(self) -> dict[str, Any]:
        from .training import train

        config = self._config()
        if self.pretrained is not None:
            forget_initial_weights(config)
        if self.pretrained not in (None, "none"):
            check_backbone(config, self.pretrained)
            named = str(Path(self.pretrained).resolve()) if ".." in Path(self.pretrained).parts else self.pretrained
            config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": named}
        if not self.trust_config:
            config = only_known(config, self.options)
        return train(config, self.output or Path("runs") / Path(self.config).stem, self.auto_scale_lr)


def check_backbone(config: Any, pretrained: str) -> None:
    """Holds what is known of a classifier's run against the config that takes its weights.

    Raises:
        InputError: the weights are of another model than the config's backbone.
    """
    info = read_run_info(find_weights(pretrained))
    model = config.model.backbone.get("model")
    if info is None or model is None:
        return
    if info.model.partition(".")[0] != model.partition(".")[0]:
        raise InputError(f"{pretrained}: was trained as {info.model}, and the config's backbone is {model}; give the "
                         f"weights of a {model}, or --options model.backbone.model={info.model}")  # fmt: skip
    fed = config.model.get("data_preprocessor") or {}
    for name in ("mean", "std"):
        own, theirs = getattr(info, name), fed.get(name)
        if own and theirs and any(abs(255 * a - b) > 1 for a, b in zip(own, theirs, strict=False)):
            console.print(f"{pretrained}: was trained with {name} {own}; the config's data_preprocessor has another")


@dataclass(frozen=True, kw_only=True)
class _Detects(_Command):
    checkpoint: Path | None = None
    """The detector's weights: a file of our runs, the reference's or MMDetection's, or a name of `shvit weights
    list`."""
    artifact: Path | None = None
    """An .onnx file of `shvit detect export`."""
    img_size: tuple[int, ...] = ()
    """Fit images into this square, or height and width, in pixels; an artifact has its own, and by default a
    checkpoint is fed as its config says."""

    def _open(self, config: Any, threads: int | None = None) -> tuple[dict[str, Detect], list[Any], tuple[str, ...]]:
        """Detectors by name, the transforms for them, and the names of classes."""
        import torch

        from .annotations import check_heads
        from .onnx import open_onnx

        if self.checkpoint is None and self.artifact is None:
            raise InputError("nothing trained to detect with; give --checkpoint, or --artifact, or both")
        size = check_img_size(self.img_size) if self.img_size else None
        detectors: dict[str, Detect] = {}
        if self.checkpoint is not None:
            model = open_detector(config, find_weights(self.checkpoint))
            if torch.cuda.is_available() and self.artifact is None:  # an artifact is timed beside it, on the CPU
                model.cuda()
            detectors["pytorch"] = torch_detect(model)
        classes = class_names(config)
        check_heads(config, classes)
        if self.artifact is not None:
            artifact = open_onnx(self.artifact, threads)
            check_unchanged(self.artifact, sha256(self.artifact))
            if size not in (None, artifact.spec.img_size):
                raise InputError(f"{self.artifact} takes {artifact.spec.img_size} px; leave out --img-size")
            if [*map(same_name, artifact.spec.classes)] != [*map(same_name, classes)]:
                raise InputError(f"{self.artifact} was exported for {some(artifact.spec.classes)}, and the config has "
                                 f"{some(classes)}; give the config that it was exported with")  # fmt: skip
            size = artifact.spec.img_size
            detectors["onnxruntime"] = artifact.detect
        return detectors, fixed_pipeline(size) if size else own_pipeline(config), classes


@dataclass(frozen=True, kw_only=True)
class Eval(_Detects, _Reads):
    """COCO's average precision on the config's test images; of a checkpoint and its export also side by side."""

    threads: int = 1
    """CPU threads of PyTorch and ONNX Runtime."""

    def run(self) -> dict[str, Any]:
        import torch

        from .annotations import check_datasets
        from .evaluate import evaluate
        from .report import show
        from .training import plainly

        if self.threads < 1:
            raise InputError(f"--threads {self.threads} is below 1")
        config = self._config()
        show(check_datasets(config, ("test",)), console)
        torch.set_num_threads(self.threads)
        detectors, pipeline, _ = self._open(config, self.threads)
        with plainly():
            result = evaluate(config, detectors, pipeline, _progress)
        figures = list(next(iter(result.results.values())).ap)
        table = Table("figure", *detectors)
        for figure in figures:
            table.add_row(figure, *(f"{each.ap[figure]:.1f}" for each in result.results.values()))
        table.add_row("ms an image", *(f"{each.latency_ms_p50:.0f}" for each in result.results.values()))
        console.print(table)
        if result.match is not None:
            _show_match(result.match)
        if result.latency_ratio is not None:
            console.print(f"time by PyTorch's: {result.latency_ratio:.2f}")
        return asdict(result)


@dataclass(frozen=True, kw_only=True)
class Export(_Command):
    """A verified file: the whole detector as .onnx, or its backbone and neck as .mlpackage, which is what phones run.

    The .onnx takes uint8 pixels of one size and gives any number of detections; it appears only if it finds what
    PyTorch finds, and F.certificate.json stands beside it.
    """

    checkpoint: Path
    """The detector's weights, a file or a name of `shvit weights list`."""
    output: Path
    """F.onnx or F.mlpackage."""
    img_size: tuple[int, ...] = DEFAULT_SIZE
    """Height and width in pixels, or one number for both: a multiple of 32."""
    precision: Literal["fp32", "fp16", "int8", "w8a8"] = "fp32"
    """Of an .mlpackage, as in `shvit export coreml`."""
    images: Path | None = None
    """A folder of images to verify with; scikit-image's bundled ones by default."""

    def run(self) -> dict[str, Any]:
        height, width = check_img_size(self.img_size)
        checkpoint = find_weights(self.checkpoint)
        check_output_folder(self.output.parent)
        if self.output.suffix == ".mlpackage":
            return self._export_pyramid(checkpoint, self.output, height, width)
        if self.output.suffix != ".onnx":
            raise InputError(
                f"--output {self.output} must end in .onnx (the detector) or .mlpackage (its feature maps)"
            )
        if self.precision != "fp32":
            raise InputError("a detector's .onnx is fp32; leave out --precision")
        return self._export_detector(checkpoint, self.output, (height, width))

    def _export_pyramid(self, checkpoint: Path, output: Path, height: int, width: int) -> dict[str, Any]:
        """By `shvit export coreml`, to which backbone and neck are a model with feature maps."""
        from shvit.cli import run

        if height != width:
            raise InputError(f"an .mlpackage takes a square, not {height}×{width}; give --img-size one number")
        if self.options or self.trust_config:
            raise InputError("an .mlpackage is made from the config as it is; leave out --options and --trust-config")
        model = ["--model", f"detector:{self.config}", "--checkpoint", str(checkpoint), "--features"]
        rest = ["--img-size", str(height), "--precision", self.precision, "--output", str(output)]
        images = [] if self.images is None else ["--images", str(self.images)]
        return run(["export", "coreml", *model, *rest, *images])

    def _export_detector(self, checkpoint: Path, output: Path, img_size: tuple[int, int]) -> dict[str, Any]:
        from .annotations import check_heads
        from .onnx import DetectorSpec, detector_graph, open_onnx, write_onnx
        from .verify import certify, require, to_json

        config = self._config()
        check_heads(config, class_names(config))
        model = open_detector(config, checkpoint)
        graph = detector_graph(model, img_size)
        kind = type(model).__name__
        spec = DetectorSpec(
            Path(self.config).stem, kind, img_size, class_names(config), graph.outputs, graph.mask_threshold
        )
        prepare = preparation(fixed_pipeline(img_size))
        prepared = map(prepare, _images(self.images))
        with atomic_write(certificate_path(output)) as certified, atomic_write(output) as partial:
            write_onnx(graph, partial, spec)
            certificate = certify(
                open_onnx(partial),
                torch_detect(model),
                prepared,
                str(self.images or "scikit-image"),
                checkpoint,
                output.name,
            )
            require(certificate)
            certified.write_text(to_json(certificate))
        console.print(f"{output.name} finds what its model finds: {kind} at {img_size[0]}×{img_size[1]} px, "
                      f"{certificate.artifact_bytes / 1e6:.1f} MB")  # fmt: skip
        _show_match(certificate.match)
        return {"artifact": str(output), "certificate": asdict(certificate)}


@dataclass(frozen=True, kw_only=True)
class Predict(_Detects):
    """Draws boxes and masks on images."""

    images: Path | None = None
    """A folder of images; scikit-image's bundled ones by default."""
    output: Path = Path("predictions")
    """The folder for the pictures."""
    score: float = 0.3
    """Draw what has at least this score."""

    def run(self) -> dict[str, Any]:
        from .draw import draw
        from .training import plainly

        if not 0 <= self.score <= 1:
            raise InputError(f"--score {self.score} is out of range; choose 0 to 1")
        check_output_folder(self.output)
        if self.images is not None and self.output.resolve().is_relative_to(self.images.resolve()):
            raise InputError(f"--output {self.output}: is inside of --images {self.images}, among the images that are "
                             "read; choose a place outside")  # fmt: skip
        config = self._config()
        detectors, pipeline, classes = self._open(config)
        if len(detectors) > 1:
            raise InputError("--checkpoint and --artifact exclude each other here; `shvit detect eval` compares them")
        (detect,) = detectors.values()
        prepare = preparation(pipeline)
        folder = self.images
        found: dict[str, list[str]] = {}
        skipped: dict[str, str] = {}
        with plainly():
            for path in _progress(_images(folder)):
                name = f"{path.name}.png" if folder is None else f"{path.relative_to(folder)}.png"
                try:
                    image = prepare(path)
                except InputError as error:  # a damaged image does not end the run
                    skipped[name.removesuffix(".png")] = str(error)
                    terminal.report(f"skipped {error}")
                    continue
                detections = detect(image).above(self.score)
                draw(path, detections, classes, self.output / name)
                found[name] = [classes[label] for label in detections.labels]
        number = sum(map(len, found.values()))
        if skipped and not found:
            raise InputError(f"none of {len(skipped)} images can be used: {next(iter(skipped.values()))}")
        left_out = f"; {len(skipped)} damaged ones were skipped" if skipped else ""
        console.print(f"{number} objects on {len(found)} images, drawn in {self.output}{left_out}")
        return {"output": str(self.output), "found": found, "skipped": skipped}


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Names of the configs that come with the package, and the folder that they are in."""

    path: bool = False
    """Print the folder alone, as in SHVIT_CONFIGS=$(shvit detect configs --path), for MMDetection's own tools."""

    def run(self) -> dict[str, Any]:
        if self.path:
            print(CONFIGS)
            raise SystemExit(0)
        for name in bundled():
            console.print(name)
        return {"folder": str(CONFIGS), "configs": bundled()}


DETECT = {"train": Train, "eval": Eval, "export": Export, "predict": Predict, "configs": Configs}


def _images(folder: Path | None) -> list[Path]:
    from shvit.train.folders import image_files

    return image_files(folder)


def _progress(items: Iterable[Any]) -> Iterator[Any]:
    """A bar on a terminal."""
    items = list(items)
    return iter(track(items, "images", console=console, transient=True) if terminal.is_terminal() else items)


def _show_match(match: Any) -> None:
    iou = f"boxes by an IoU of {match.box_iou_mean:.4f} (lowest {match.box_iou_lowest:.3f})"
    if match.mask_iou_mean is not None:
        iou += f", masks {match.mask_iou_mean:.4f} ({match.mask_iou_lowest:.3f})"
    console.print(
        f"{match.detections} detections on {match.images} images: {match.matched_percent:.1f} % match, {iou}, "
        f"scores within {match.score_error:.1e}"
    )
