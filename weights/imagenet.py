"""ImageNet-1k's classes in the order of published weights: WordNet's ids and names, from timm."""

from collections import Counter
from functools import cache

__all__ = ["imagenet_ids", "imagenet_names", "is_imagenet"]


@cache
def imagenet_ids() -> tuple[str, ...]:
    """Return WordNet's ids, such as n01440764: the names of ImageNet's folders."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return descriptions, such as "tench, Tinca tinca"; the few that two classes share get the class's number."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(index) for index in range(info.num_classes())]
    counts = Counter(names)
    return tuple(f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names))


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Return whether these are all of ImageNet-1k's classes in their order, by id or by name."""
    return len(classes) == 1000 and classes in (imagenet_ids(), imagenet_names())
