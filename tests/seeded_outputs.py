"""Prove that a change of the code changes no seeded output: run the same commands before and after it, compare hashes.

    python tests/seeded_outputs.py --against HEAD~3        # this tree against an earlier commit, minutes
    python tests/seeded_outputs.py --record FILE           # hashes of this tree
    python tests/seeded_outputs.py --check FILE            # this tree against them, on the same machine

Images, features, heads, adapters, statistics and reports are hashed; what differs between two runs of the same code
(times, memory, paths) is left out. Hashes hold on one kind of processor, so none are committed: both sides are run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_DATA = "data.train=96 data.validation=48 data.test=48 data.draws=2"
_HEAD = f"{_DATA} epochs=2 hidden=16 batch_size=32"
_DRAW = "num_prompts=4 num_steps=6 batch_size=4 device=cpu"
#: Commands in the order they need each other, run in one empty folder.
COMMANDS = {
    "features": "train.cache_features train=96 validation=48 test=48 draws=2 folder=cache",
    "rating head": f"train.head {_HEAD} cache=cache output=rating",
    "attention head": f"train.head {_HEAD} cache=null kind=attention target=object task=class output=object "
    "expected_weight=0 compare=[]",
    "multiscale head": f"train.head --config configs/head/testbed-multiscale.yaml {_HEAD} cache=deep output=deep-head",
    "embedding head": f"train.head --config configs/head/testbed-clip.yaml {_HEAD} cache=clip-cache output=embedding",
    "discriminator": f"train.head --config configs/head/testbed-discriminator.yaml {_HEAD} cache=up output=real "
    "generated.folder=generated generated.train=32 generated.validation=16 generated.test=16 generated.num_steps=4",
    "adapter": "train.amortise teacher=[{head: rating}] output=adapter pairs=pairs data.num_prompts=20 data.train=80 "
    "data.test=20 data.batch_size=10 data.calls_per_run=4 data.num_steps=[4,6] steps=20 batch_size=16",
    "mid-block": f"sample.guided {_DRAW} head=rating scales=[-1,2] output=midblock",
    "two guides": f"sample.guided {_DRAW} --guide midblock:head=rating,every=2 "
    "--guide clip:clip=testbed,cutouts=2,through=x0,guidance_scale=0.5 cfg_rescale=0.5 cfg_stop=0.7 output=two",
    "embedding guide": f"sample.guided {_DRAW} --guide embedding:head=embedding,clip=testbed output=towards-text",
    "amortised": f"sample.guided {_DRAW} --guide amortised:adapter=adapter scheduler=dpm++ output=amortised",
    "particles": f"sample.guided {_DRAW} head=rating particles=2 output=particles",
    "edits": f"sample.guided {_DRAW} edits=testbed:test head=rating scheduler=euler output=edited",
    "sweep": f"sample.sweep {_DRAW} scale=[1,2] start=[0,0.3] head=rating cfg_matched=true cfg_scales_matched=[6] "
    "output=sweep",
    "evaluation": "eval.images midblock reference_size=64 permutations=19 cache=eval-cache rating=null",
    "edited pairs": "eval.images edited edits=testbed:test reference_size=64 permutations=19 cache=eval-cache",
    "sweep evaluated": "eval.images sweep reference_size=64 permutations=19 cache=eval-cache",
    "recommendation": "eval.recommend sweep",
    "head metrics": "eval.heads rating cache=cache output=head-metrics",
    "null": "eval.null comparisons=40 sets=8 prompts=[20] permutations=19",
    "taps": "guidance.taps random:sd-2.1-base-tiny",
}
#: Names of records that no two runs share, anywhere in JSON.
_VOLATILE = {"seconds", "images_per_second", "toolkit_version", "versions", "command", "created", "seconds_per_image"}
_VOLATILE |= {"time", "date", "machine", "memory", "head_path", "wall", "trained", "elapsed", "peak_memory"}
_SKIPPED = {"config.yaml", "README.md", "train.yaml", "recipe.yaml", "run.yaml", "sampling_seconds"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--against", metavar="REV", help="compare this tree with a commit")
    action.add_argument("--record", metavar="FILE", type=Path, help="write this tree's hashes")
    action.add_argument("--check", metavar="FILE", type=Path, help="compare this tree with written hashes")
    parser.add_argument("--only", nargs="*", help="names of commands to run, with those they need")
    options = parser.parse_args(argv)
    found = hash_outputs(ROOT, options.only)
    if options.record:
        options.record.write_text(json.dumps(found, indent=1))
        return 0
    before = json.loads(options.check.read_text()) if options.check else hash_revision(options.against, options.only)
    wrong = [name for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)]
    if options.only is not None:
        wrong = [name for name in wrong if name in found]
    for name in wrong:
        print(f"differs: {name}")
    print(f"{len(found) - len(wrong)} outputs equal, {len(wrong)} differ")
    return bool(wrong)


def hash_revision(revision: str, only: list[str] | None) -> dict[str, str]:
    """Hash the outputs of a commit, checked out beside this tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            return hash_outputs(tree, only)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def hash_outputs(tree: Path, only: list[str] | None = None) -> dict[str, str]:
    """Run the commands of a tree in an empty folder; hash every file they write, and images of real architectures."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    environment |= {"WANDB_MODE": "offline", "MPLBACKEND": "Agg", "COLUMNS": "100"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        (out / "configs").symlink_to(tree / "configs")
        printed: dict[str, str] = {}
        for name, command in COMMANDS.items():
            if only is None or name in only:
                words = [sys.executable, "-m", *_split(command)]
                print(f"{name} ...", file=sys.stderr, flush=True)
                run = subprocess.run(words, cwd=out, env=environment, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"{name}: {run.stderr[-2000:]}")
                _forget_times(out)
                if name in ("recommendation", "null", "taps"):
                    printed[f"printed: {name}"] = _digest(_plain_text(run.stdout, out).encode())
        print("pipelines ...", file=sys.stderr, flush=True)
        script = [sys.executable, str(Path(__file__).resolve()), "--pipelines"]
        run = subprocess.run(script, cwd=out, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr[-2000:])
        return dict(_hash_files(out)) | printed | json.loads(run.stdout.splitlines()[-1])


def _forget_times(out: Path) -> None:
    """Give every record the same time, which tables and reports of a run show."""
    for file in out.rglob("records*.jsonl"):
        file.write_text(re.sub(r'"seconds": ?[\d.]+', '"seconds": 1.0', file.read_text()))


def _split(command: str) -> list[str]:
    """Split at spaces, but not inside brackets."""
    return re.findall(r"(?:\[[^\]]*\]|\S)+", command)


def _hash_files(out: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        hidden = name.startswith("configs") or file.name in _SKIPPED or name.startswith("eval-cache/")
        if not file.is_file() or hidden:
            continue
        if file.suffix in (".json", ".jsonl"):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            plain = sorted(json.dumps(_stable(json.loads(line)), sort_keys=True) for line in lines)
            yield name, _digest(_plain_text("\n".join(plain), out).encode())
        elif file.suffix in (".html", ".md", ".csv"):
            yield name, _digest(_plain_text(file.read_text(), out).encode())
        elif file.suffix == ".safetensors":
            yield name, _digest(_tensor_bytes(file))
        elif file.suffix != ".parquet":  # the same rows as the CSV
            yield name, _digest(file.read_bytes())


def _tensor_bytes(file: Path) -> bytes:
    from safetensors.torch import load_file

    return b"".join(k.encode() + v.contiguous().numpy().tobytes() for k, v in sorted(load_file(file).items()))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in _VOLATILE}
    return [_stable(v) for v in value] if isinstance(value, list) else value


def _plain_text(text: str, out: Path) -> str:
    text = text.replace(str(out), "OUT")
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?\S*", "DATE", text)
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PNG", text) if "clip-path" in text else text
    return re.sub(r"[\d.]+ (s|seconds|images/s|min)\b", "TIME", text)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def hash_pipelines() -> dict[str, str]:
    """Guide unmodified pipelines with random weights, and hash their images."""
    import torch
    from diffusers import DiffusionPipeline

    from guidance import MidBlockGuide, apply_guidance, build_head, load_pipeline
    from guidance.heads import HeadConfig

    def head_of(channels: int, prediction: str, **more: Any) -> Any:
        torch.manual_seed(0)
        return build_head(HeadConfig(kind="conv", in_channels=channels, hidden=16, prediction_type=prediction, **more))

    def draw(name: str, tap: str, channels: int, prediction: str, **call: Any) -> str:
        pipe: DiffusionPipeline = load_pipeline(name, device="cpu")
        pipe.set_progress_bar_config(disable=True)
        head = head_of(channels, prediction, **({} if tap == "mid_block" else {"tap": tap}))
        call |= {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        with apply_guidance(pipe, [MidBlockGuide(head, guidance_scale=2.0)]):
            return _digest(pipe(**call).images.tobytes())

    text = {"prompt": "a red balloon over the sea at dusk", "guidance_scale": 4.0}
    return {
        "pipeline: SD 2.1": draw("random:sd-2.1-base-tiny", "mid_block", 40, "epsilon", **text),
        "pipeline: SD 1.5": draw("random:sd-1.5-tiny", "mid_block", 40, "epsilon", **text),
        "pipeline: SDXL": draw("random:sdxl-tiny", "mid_block", 40, "epsilon", **text),
        "pipeline: DiT": draw("random:dit-xl-2-256-tiny", "transformer_blocks.1", 32, "epsilon", class_labels=[1]),
        "pipeline: SD3": draw("random:sd3-medium-tiny", "transformer_blocks.0", 48, "flow_prediction", **text),
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["--pipelines"]:
        sys.path.insert(0, str(Path.cwd()))
        print(json.dumps(hash_pipelines()))
    else:
        raise SystemExit(main())
