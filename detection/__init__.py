"""SHViT inside Mask R-CNN and RetinaNet, as a plug-in of MMDetection. Installed as `shvit.detection`.

Importing it, as a config does with `custom_imports = dict(imports=["shvit.detection"])`, registers the backbones,
the neck and transforms with MMDetection, and the names of models that begin with `detector:`. It puts torchvision's
operators in place of mmcv's compiled ones where these are missing.
"""

from shvit.create import register_scheme

from .plugin.ops import stand_in

stand_in()  # before anything that imports mmcv.ops

from .plugin.backbone import SHViTBackbone, TimmBackbone  # noqa: E402
from .plugin.neck import TransposedFPN  # noqa: E402
from .plugin.transforms import Border, LoadImage  # noqa: E402
from .pyramid import create_pyramid  # noqa: E402

__all__ = ["Border", "LoadImage", "SHViTBackbone", "TimmBackbone", "TransposedFPN"]

register_scheme("detector", create_pyramid)
