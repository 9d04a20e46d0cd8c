"""Cache the features heads are trained on: images -> VAE latents -> noise at t -> encoder half of the UNet.

    python -m train.cache_features                                     # the testbed, into runs/cache/testbed
    accelerate launch --num_processes 4 train/cache_features.py --config configs/cache/sd21-parquet.yaml
    python -m train.cache_features folder=runs/cache/my dataset=my.parquet rating_column=score 'target_columns=[score]'

The same command resumes a killed run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from guidance.training.recipes import FeatureRecipe
from guidance.utils.config import option, parse_config
from guidance.utils.errors import friendly_errors


@dataclasses.dataclass
class CacheConfig(FeatureRecipe):
    """Options of this script."""

    folder: str = option("runs/cache/testbed", "folder of the cache")


@friendly_errors("train/cache_features.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    config = parse_config(
        CacheConfig,
        argv,
        prog="python -m train.cache_features",
        description="Cache features of a dataset for training heads.",
        default_config="configs/cache/testbed.yaml",
    )
    from guidance.training.caching import build_cache
    from guidance.utils.processes import join_processes, leave_processes

    state = join_processes()
    cache = build_cache(config, config.folder, state=state)
    if state.is_main_process:
        shape = "x".join(map(str, cache.feature_shape))
        print(f"{len(cache)} rows of {shape} features from {state.num_processes} process(es) in {config.folder}")
    leave_processes(state)


if __name__ == "__main__":
    main()
