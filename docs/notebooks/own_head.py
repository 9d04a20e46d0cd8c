# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A head on your own data
#
# A folder of pictures and a table of ratings become a head, and the head guides. The pictures are drawn on the spot,
# with ratings that rise with brightness, so that it can be seen whether guidance does what the ratings say.

# %%
import csv
import json
import random
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from guidance import MidBlockGuide, load_head, load_pipeline, sample_images
from train import head as training

work = Path("runs/notebooks/own-head")

# %% [markdown]
# ## Data: pictures, captions, ratings from 1 to 10

# %%
folder, rng, rows = work / "ratings", random.Random(0), []
folder.mkdir(parents=True, exist_ok=True)
for i in range(160):
    level, place = rng.randint(20, 235), rng.randint(4, 28)
    colour = rng.choice(["red", "green", "blue"])
    picture = Image.new("RGB", (64, 64), (level, level, level))
    ImageDraw.Draw(picture).ellipse((place, place, place + 28, place + 28), fill=colour)
    picture.save(folder / f"{i:04}.png")
    rows.append([f"{i:04}.png", f"a {colour} ball number {i}", round(1 + 9 * level / 255, 1)])
with open(folder / "metadata.csv", "w", newline="") as file:
    csv.writer(file).writerows([["image", "caption", "rating"], *rows])

figure, axes = plt.subplots(1, 6, figsize=(9, 1.8))
for axis, (name, _, rating) in zip(axes, rows, strict=False):
    axis.imshow(Image.open(folder / name))
    axis.set(title=f"rating {rating}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Cache features, train
#
# Features are cached first, each picture at four random noise levels; then the head is trained. A killed run goes on.
# `python -m train.head --help` lists the options.

# %%
recipe = Path(training.__file__).parents[1] / "configs" / "head" / "own-ratings.yaml"
options = {"data.dataset": folder / "metadata.csv", "cache": work / "cache", "output": work / "head"}
training.main([f"--config={recipe}", *(f"{name}={value}" for name, value in options.items())])

# %% [markdown]
# ## How good is it, at which noise?
#
# On pictures that it has not seen. `skill` is the lower end of a 95% interval, and 0 is chance; guides push where it
# is above.

# %%
head = load_head(work / "head")
metrics = json.loads((work / "head" / "metrics.json").read_text())
print(head.config.metrics, "pushes from", head.config.start, "to", head.config.stop)
bins = metrics["test"]["bins"]
figure, axis = plt.subplots(figsize=(5, 2.5))
axis.plot([(b["low"] + b["high"]) / 2 for b in bins], [b["spearman"] for b in bins], marker="o")
axis.set(xlabel="timestep (0 is clean)", ylabel="rank correlation", ylim=(-1, 1))
plt.show()

# %% [markdown]
# ## Guide
#
# The same noise, pushed towards low and high ratings: images must become darker and brighter.

# %%
pipe = load_pipeline("testbed", device="cpu")
prompts, seeds, scales = ["a boat on the sea at noon", "a red tree in the snow"] * 2, [0, 1, 2, 3], (-2, 0, 2)
images = {
    scale: sample_images(pipe, prompts, seeds, num_steps=10, guides=[MidBlockGuide(head, guidance_scale=scale)])
    for scale in scales
}
brightness = {scale: float(np.mean(found)) for scale, found in images.items()}
print({scale: round(value, 1) for scale, value in brightness.items()})

figure, axes = plt.subplots(len(scales), len(prompts), figsize=(7, 5.5))
for row, scale in zip(axes, scales, strict=True):
    row[0].set_ylabel(f"scale {scale}")
    for axis, image in zip(row, images[scale], strict=True):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# With your own pictures, replace the folder and its table; `docs/own-ratings.md` says what a table may look like, how
# many ratings it takes, and how the same is done with Stable Diffusion.
