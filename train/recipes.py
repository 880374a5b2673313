"""The recipes, as values that differ by `replace`."""

from dataclasses import replace

from .recipe import Augment, Data, Optim, Recipe

# Real photographs in a minute or two on two cores: mono- and polycrystalline solar cells from the PyPI package
# elpv-dataset. Colour says nothing in greyscale photographs, so it is left alone; a cell has no up and down.
DEMO = Recipe(
    model="shvit_s1",
    img_size=96,
    epochs=8,
    batch_size=64,
    ema_decay=0.98,
    data=Data(workers=1),
    augment=Augment(color_jitter=0.0, vflip=0.5),
    optim=Optim(lr=8e-3),
)

# A few hundred photographs in half a minute: does everything fit together?
DEBUG = replace(DEMO, img_size=64, epochs=3, batch_size=32)

RECIPES = {"demo": DEMO, "debug": DEBUG}
DESCRIPTIONS = {
    "demo": "S1 from scratch at 96 px on real photographs of solar cells, or on yours, in a minute or two",
    "debug": "S1 at 64 px for three epochs: does everything fit together?",
}
