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
# # Quick start: guide a pipeline by a head
#
# On the embedded testbed, on a CPU, in about a minute: train a small head on mid-block features, guide an unmodified
# diffusers pipeline with it, and measure on paired images whether they became better.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from eval.stats.paired import paired_difference
from guidance import MidBlockGuide, apply_guidance, load_head, load_pipeline, sample_images
from guidance.data.prompts import load_prompts
from guidance.testbed.truth import truth_score
from train.head import main as train_head

pipe = load_pipeline("testbed", device="cpu")
pipe.set_progress_bar_config(disable=True)

# %% [markdown]
# ## A head
#
# The head sees the noisy votes of a simulated crowd and predicts an image's rating from the mid-block's features of
# its noised latents. The full recipe is `accelerate launch train/head.py`; if you have run it, its head is used.

# %%
folder = Path("runs/heads/testbed-aesthetic")
if not folder.exists():
    folder = Path("runs/notebooks/quickstart-head")
    sizes = ["data.train=400", "data.validation=120", "data.test=100", "data.draws=2", "hidden=64", "epochs=5"]
    train_head([*sizes, f"output={folder}", "cache=runs/notebooks/quickstart-cache"])
head = load_head(folder)
print(head.config.metrics)

# %% [markdown]
# ## One prompt
#
# Inside `apply_guidance` the pipeline's own call is guided. A negative scale pushes away, which is the quickest test
# of a head. `start` and `stop` are fractions of the steps; left out, a head guides where it was seen to beat chance.

# %%
prompt, scales = "a red balloon over the sea at dusk", (-2.5, 0.0, 2.5)
figure, axes = plt.subplots(1, len(scales), figsize=(7, 2.6))
for axis, scale in zip(axes, scales, strict=True):
    noise = torch.Generator().manual_seed(0)
    with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=scale, start=0.1, stop=1.0)]):
        image = pipe(prompt, generator=noise, guidance_scale=3.0, num_inference_steps=10).images[0]
    axis.imshow(image)
    axis.set(title=f"scale {scale:g}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Many prompts, paired
#
# The same prompts from the same noise, unguided and guided, by the toolkit's own loop. The truth score is a formula
# of pixels that the head has never seen; the interval is over prompts.

# %%
prompts = [prompt.text for prompt in load_prompts("testbed", 16)]
seeds = list(range(len(prompts)))
guides = [MidBlockGuide(head, guidance_scale=2.5, start=0.1, stop=1.0)]
options = {"num_steps": 10, "cfg_scale": 3.0}
plain = sample_images(pipe, prompts, seeds, **options)
guided = sample_images(pipe, prompts, seeds, guides=guides, **options)
change = paired_difference(truth_score(plain), truth_score(guided), prompts)
low, high = change.effect_interval
print(
    f"truth: {change.effect_size:+.2f} sd [{low:+.2f}, {high:+.2f}], better for {change.share_improved:.0%} of prompts"
)

# %%
figure, axes = plt.subplots(2, 6, figsize=(11, 4))
for row, (name, images) in zip(axes, {"unguided": plain, "scale 2.5": guided}.items(), strict=True):
    row[0].set_ylabel(name)
    for axis, image, text in zip(row, images, prompts, strict=False):
        axis.imshow(image)
        axis.set(xticks=[], yticks=[])
        axis.set_title(text, fontsize=5)
plt.show()

# %% [markdown]
# The report of the toolkit says more, with agreement and distances beside the gain: sample with `python -m
# sample.guided`, then run `python -m eval.images` on the folder.
