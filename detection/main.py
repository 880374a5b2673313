"""The commands `shvit detect {train,eval,export,predict,configs}`; see shvit/cli.py for how they are called."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from mmengine.config import Config
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional, arg

from shvit import terminal
from shvit.certificate import certificate_path, check_unchanged, write_certificate
from shvit.errors import InputError, RunInstead, some
from shvit.files import atomic_write, check_output_folder, sha256
from shvit.img_size import ImgSize
from shvit.train.data.image_folders import image_files
from shvit.weights.run_info import read_run_info, same_name

from .detector import (
    Detect,
    check_img_size,
    fixed_pipeline,
    forget_initial_weights,
    load_detector,
    own_pipeline,
    preparation,
    torch_detect,
)
from .parsing.config import class_names, list_configs, load_config, only_known, set_data_root
from .parsing.reader import CONFIGS
from .plugin.backbone import resolve_weights

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .verify import Match

Item = TypeVar("Item")
console = terminal.console()


@dataclass(frozen=True, kw_only=True)
class _Command:
    config: Positional[Annotated[str, arg(metavar="CONFIG")]]
    """Name of a bundled config (`shvit detect configs` lists them), or a config's .py file."""
    options: tuple[str, ...] = ()
    """Fields that replace the config's, such as `train_cfg.max_epochs=3 train_dataloader.batch_size=4`."""
    trust_config: bool = False
    """Run code in the config and import the modules that it names; without it, only data is accepted."""

    def _config(self) -> Config:
        return load_config(self.config, self.options, self.trust_config)


@dataclass(frozen=True, kw_only=True)
class _Reads(_Command):
    data: Path | None = None
    """Folder of the images and annotations, in place of the config's data_root."""

    def _config(self) -> Config:
        config = super()._config()
        if self.data is not None:
            set_data_root(config, self.data)
        return config


@dataclass(frozen=True, kw_only=True)
class Train(_Reads):
    """Train a detector, or resume the run that --output holds.

    On several GPUs: torchrun --nproc-per-node=8 -m shvit.detection train CONFIG
    """

    output: Path | None = None
    """Run folder; runs/CONFIG by default."""
    pretrained: str | None = None
    """Initial weights of the backbone: a checkpoint of any layout, a name of `shvit weights list`, or `none`.
    By default the config names them: ImageNet weights, which are downloaded. `none` means random weights."""
    auto_scale_lr: bool = False
    """Scale the learning rate to the batch size. The configs' learning rate is for 16 images in all."""

    def run(self) -> dict[str, Any]:
        from .training import train

        config = self._config()
        if self.pretrained is not None:
            _set_pretrained(config, self.pretrained)
        if not self.trust_config:
            config = only_known(config, self.options)
        return train(config, self.output or Path("runs") / Path(self.config).stem, self.auto_scale_lr)


def _set_pretrained(config: Config, pretrained: str) -> None:
    """Set the backbone's initial weights, in place; `none` removes them."""
    forget_initial_weights(config)
    if pretrained != "none":
        check_backbone(config, pretrained)
        checkpoint = str(Path(pretrained).resolve()) if ".." in Path(pretrained).parts else pretrained
        config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": checkpoint}


def check_backbone(config: Config, pretrained: str) -> None:
    """Raise InputError where a classifier's weights are of another model than the config's backbone."""
    info = read_run_info(resolve_weights(pretrained))
    model = config.model.backbone.get("model")
    if info is None or model is None:
        return
    if info.model.partition(".")[0] != model.partition(".")[0]:
        raise InputError(f"{pretrained}: was trained as {info.model}, and the config's backbone is {model}; give the "
                         f"weights of a {model}, or --options model.backbone.model={info.model}")  # fmt: skip
    preprocessor = config.model.get("data_preprocessor") or {}
    for name in ("mean", "std"):
        own, theirs = getattr(info, name), preprocessor.get(name)
        if own and theirs and any(abs(255 * a - b) > 1 for a, b in zip(own, theirs, strict=False)):
            console.print(f"{pretrained}: was trained with {name} {own}; the config's data_preprocessor has another")


@dataclass(frozen=True, kw_only=True)
class _Detects(_Command):
    checkpoint: Path | None = None
    """Weights of the detector: a file by `shvit detect train`, MMDetection or the reference, or a published name.
    `shvit weights list` has the published names."""
    artifact: Path | None = None
    """Exported detector: an .onnx file that `shvit detect export` wrote."""
    img_size: tuple[int, ...] = ()
    """Height and width in pixels, or one number for both, into which images are fitted.
    By default images are prepared as the config says. An artifact has its own size."""

    def _load(self, config: Config, threads: int | None = None) -> tuple[dict[str, Detect], Sequence[Any]]:
        """Return the detectors by name, and the transforms that prepare an image for them."""
        from .coco.annotations import check_heads

        if self.checkpoint is None and self.artifact is None:
            raise InputError("nothing trained to detect with; give --checkpoint, or --artifact, or both")
        size = check_img_size(self.img_size) if self.img_size else None
        detectors: dict[str, Detect] = {}
        if self.checkpoint is not None:
            detectors["pytorch"] = self._load_checkpoint(config, self.checkpoint)
        classes = class_names(config)
        check_heads(config, classes)
        if self.artifact is not None:
            detectors["onnxruntime"], size = _load_artifact(self.artifact, size, classes, threads)
        return detectors, fixed_pipeline(size) if size else own_pipeline(config)

    def _load_checkpoint(self, config: Config, checkpoint: Path) -> Detect:
        import torch

        model = load_detector(config, resolve_weights(checkpoint))
        if torch.cuda.is_available() and self.artifact is None:  # an artifact is timed beside it, on the CPU
            model.cuda()
        return torch_detect(model)


def _load_artifact(
    path: Path, size: tuple[int, int] | None, classes: Sequence[str], threads: int | None
) -> tuple[Detect, tuple[int, int]]:
    """Return an artifact's detector and its image size, given the size that was asked for and the config's classes."""
    from .onnx import load_onnx

    artifact = load_onnx(path, threads)
    spec = artifact.spec
    check_unchanged(path, sha256(path))
    if size not in (None, spec.img_size):
        raise InputError(f"{path} takes {spec.img_size} px; leave out --img-size")
    if [*map(same_name, spec.classes)] != [*map(same_name, classes)]:
        raise InputError(f"{path} was exported for {some(spec.classes)}, and the config has {some(classes)}; give the "
                         "config that it was exported with")  # fmt: skip
    return artifact.detect, spec.img_size


@dataclass(frozen=True, kw_only=True)
class Eval(_Detects, _Reads):
    """Measure COCO average precision on the config's test images.

    With both --checkpoint and --artifact, they are compared on the same images.
    """

    threads: int = 1
    """CPU threads of PyTorch and ONNX Runtime."""

    def run(self) -> dict[str, Any]:
        import torch

        from .coco.annotations import check_datasets
        from .coco.report import show
        from .evaluate import evaluate
        from .training import plainly

        if self.threads < 1:
            raise InputError(f"--threads {self.threads} is below 1")
        config = self._config()
        show(check_datasets(config, ("test",)), console)
        torch.set_num_threads(self.threads)
        detectors, pipeline = self._load(config, self.threads)
        with plainly():
            result = evaluate(config, detectors, pipeline, _progress)
        _show_evaluation(result)
        return asdict(result)


def _show_evaluation(result: "Evaluation") -> None:
    """Print a table of the detectors' figures, and how they compare."""
    table = Table("figure", *result.results)
    for figure in next(iter(result.results.values())).ap:
        table.add_row(figure, *(f"{each.ap[figure]:.1f}" for each in result.results.values()))
    table.add_row("ms per image", *(f"{each.latency_ms_p50:.0f}" for each in result.results.values()))
    console.print(table)
    if result.match is not None:
        _show_match(result.match)
    if result.latency_ratio is not None:
        console.print(f"latency relative to PyTorch: {result.latency_ratio:.2f}")


@dataclass(frozen=True, kw_only=True)
class Export(_Command):
    """Export a verified detector: all of it to .onnx, or its backbone and neck to .mlpackage for phones.

    The .onnx takes uint8 images of one size and returns any number of detections. It is only written if its detections
    match PyTorch's; its certificate, OUTPUT.certificate.json, is written beside it.
    """

    checkpoint: Path
    """Weights of the detector: a file, or a name of `shvit weights list`."""
    output: Path
    """File to write, which ends in .onnx or .mlpackage."""
    img_size: tuple[int, ...] = (512, 512)
    """Height and width in pixels, or one number for both; multiples of 32."""
    precision: Literal["fp32", "fp16", "int8", "w8a8"] = "fp32"
    """Precision of an .mlpackage, as in `shvit export coreml`; an .onnx is fp32."""
    images: Path | None = None
    """Folder of images to verify with; scikit-image's bundled ones by default."""

    def run(self) -> dict[str, Any]:
        img_size = check_img_size(self.img_size)
        checkpoint = resolve_weights(self.checkpoint)
        check_output_folder(self.output.parent)
        if self.output.suffix == ".mlpackage":
            raise self._export_pyramid(checkpoint, img_size)
        if self.output.suffix != ".onnx":
            raise InputError(
                f"--output {self.output} must end in .onnx (the detector) or .mlpackage (its feature maps)"
            )
        if self.precision != "fp32":
            raise InputError("a detector's .onnx is fp32; leave out --precision")
        return self._export_detector(checkpoint, img_size)

    def _export_pyramid(self, checkpoint: Path, img_size: tuple[int, int]) -> RunInstead:
        """Return the command that exports the backbone and the neck, which are a model with feature maps."""
        if self.options or self.trust_config:
            raise InputError("an .mlpackage is made from the config as it is; leave out --options and --trust-config")
        model = ("--model", f"detector:{self.config}", "--checkpoint", str(checkpoint), "--features")
        rest = ("--img-size", str(ImgSize(*img_size)), "--precision", self.precision, "--output", str(self.output))
        images = () if self.images is None else ("--images", str(self.images))
        return RunInstead("export", "coreml", *model, *rest, *images)

    def _export_detector(self, checkpoint: Path, img_size: tuple[int, int]) -> dict[str, Any]:
        from .coco.annotations import check_heads
        from .graphs import create_graph
        from .onnx import DetectorSpec, load_onnx, write_onnx
        from .verify import certify, require

        config = self._config()
        classes = class_names(config)
        check_heads(config, classes)
        model = load_detector(config, checkpoint)
        graph = create_graph(model, img_size)
        name = type(model).__name__
        spec = DetectorSpec(Path(self.config).stem, name, img_size, classes, graph.outputs, graph.mask_threshold)
        images = map(preparation(fixed_pipeline(img_size)), image_files(self.images))
        source = str(self.images or "scikit-image")
        with atomic_write(certificate_path(self.output)) as certified, atomic_write(self.output) as partial:
            write_onnx(graph, partial, spec)
            artifact = load_onnx(partial)
            certificate = certify(artifact, torch_detect(model), images, source, checkpoint, self.output.name)
            require(certificate)
            write_certificate(certificate, certified)
        console.print(f"{self.output.name} matches its model: {name} at {img_size[0]}×{img_size[1]} px, "
                      f"{certificate.artifact_bytes / 1e6:.1f} MB")  # fmt: skip
        _show_match(certificate.match)
        return {"artifact": str(self.output), "certificate": asdict(certificate)}


@dataclass(frozen=True, kw_only=True)
class Predict(_Detects):
    """Draw the detected boxes and masks on images."""

    images: Path | None = None
    """Folder of images; scikit-image's bundled ones by default."""
    output: Path = Path("predictions")
    """Folder to write the drawn images to."""
    score: float = 0.3
    """Lowest score of a detection that is drawn, from 0 to 1."""

    def run(self) -> dict[str, Any]:
        if not 0 <= self.score <= 1:
            raise InputError(f"--score {self.score} is out of range; choose 0 to 1")
        check_output_folder(self.output)
        if self.images is not None and self.output.resolve().is_relative_to(self.images.resolve()):
            raise InputError(f"--output {self.output}: is inside of --images {self.images}, among the images that are "
                             "read; choose a place outside")  # fmt: skip
        config = self._config()
        detectors, pipeline = self._load(config)
        if len(detectors) > 1:
            raise InputError("--checkpoint and --artifact exclude each other here; `shvit detect eval` compares them")
        (detect,) = detectors.values()
        labels, skipped = self._draw_all(detect, pipeline, class_names(config))
        if skipped and not labels:
            raise InputError(f"none of {len(skipped)} images can be used: {next(iter(skipped.values()))}")
        left_out = f"; {len(skipped)} damaged ones were skipped" if skipped else ""
        number = sum(map(len, labels.values()))
        console.print(f"{number} objects on {len(labels)} images, drawn in {self.output}{left_out}")
        return {"output": str(self.output), "found": labels, "skipped": skipped}

    def _draw_all(
        self, detect: Detect, pipeline: Sequence[Any], classes: tuple[str, ...]
    ) -> tuple[dict[str, list[str]], dict[str, str]]:
        """Draw on all images; return the classes on each by its new name, and why others were skipped by their own."""
        from .draw import draw
        from .training import plainly

        prepare = preparation(pipeline)
        labels: dict[str, list[str]] = {}
        skipped: dict[str, str] = {}
        with plainly():
            for path in _progress(image_files(self.images)):
                name = path.name if self.images is None else str(path.relative_to(self.images))
                try:
                    image = prepare(path)
                except InputError as error:  # a damaged image does not end the run
                    skipped[name] = str(error)
                    terminal.report(f"skipped {error}")
                    continue
                detections = detect(image).above(self.score)
                draw(path, detections, classes, self.output / f"{name}.png")
                labels[f"{name}.png"] = [classes[label] for label in detections.labels]
        return labels, skipped


@dataclass(frozen=True, kw_only=True)
class Configs:
    """List the bundled configs and the folder that they are in."""

    path: bool = False
    """Print only the folder, as in SHVIT_CONFIGS=$(shvit detect configs --path), for MMDetection's own tools."""

    def run(self) -> dict[str, Any]:
        if self.path:
            print(CONFIGS)
            raise SystemExit(0)
        for name in list_configs():
            console.print(name)
        return {"folder": str(CONFIGS), "configs": list_configs()}


DETECT = {"train": Train, "eval": Eval, "export": Export, "predict": Predict, "configs": Configs}


def _progress(items: Iterable[Item]) -> Iterator[Item]:
    """Iterate with a progress bar on a terminal."""
    items = list(items)
    return iter(track(items, "images", console=console, transient=True) if terminal.is_terminal() else items)


def _show_match(match: "Match") -> None:
    iou = f"boxes by an IoU of {match.box_iou_mean:.4f} (lowest {match.box_iou_lowest:.3f})"
    if match.mask_iou_mean is not None:
        iou += f", masks {match.mask_iou_mean:.4f} ({match.mask_iou_lowest:.3f})"
    console.print(
        f"{match.detections} detections on {match.images} images: {match.matched_percent:.1f} % match, {iou}, "
        f"scores within {match.score_error:.1e}"
    )
