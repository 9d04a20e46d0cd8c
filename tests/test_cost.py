"""Cost of guidance: FLOPs against known formulas, meters against known allocations, and the script."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eval.cost import __main__ as cost
from eval.cost.meters import count_flops, count_saved, counted, peak_memory, time_run
from eval.cost.methods import METHODS, NUM_STEPS, CostBench, list_phases
from guidance.apply import apply_guidance
from guidance.guides import ClipGuide
from guidance.models.pipelines import load_pipeline
from train.amortise import AmortiseConfig

TINY = "random:sd-2.1-base-tiny"


@pytest.fixture(scope="module")
def bench() -> CostBench:
    return CostBench(load_pipeline(TINY, parts=("unet", "vae")), 2, 8, "testbed")


def test_the_adapter_is_the_one_that_training_makes(bench) -> None:
    adapter, trained = bench.amortised().network.config, AmortiseConfig()
    assert (adapter.width, adapter.depth, adapter.patch) == (trained.width, trained.depth, trained.patch)


# ---- meters -------------------------------------------------------------------------------------------------------
def test_attention_is_counted_as_two_matrix_products_and_its_gradient_as_five() -> None:
    q, k, v = torch.randn(3, 2, 4, 32, 16).unbind(0)
    product = 2 * 2 * 4 * 32 * 32 * 16
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    leaf = q.clone().requires_grad_()

    def pulled() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(leaf, k, v).sum(), leaf)

    assert count_flops(pulled) == 2 * product + 5 * product


def test_saved_activations_are_counted_once_and_weights_never() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Tanh()).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    assert count_saved(lambda: net(x), [net]) == 2 * 4 * 16 * 4  # both tanh keep their output, in float32
    assert count_saved(lambda: torch.autograd.grad(net(x).sum(), x), [net]) == 2 * 4 * 16 * 4
    assert count_saved(lambda: net(x.detach()), [net]) == 0

    def hidden() -> None:  # as forward_with_gradient shields what is kept at the tap
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x), counted():
            net(x)

    assert count_saved(hidden, [net]) == 2 * 4 * 16 * 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    small = peak_memory(lambda: None, "cpu")
    if small is None:
        pytest.skip("the kernel does not tell the peak of a process")
    large = peak_memory(lambda: torch.ones(64_000_000), "cpu")
    again = peak_memory(lambda: None, "cpu")
    assert large is not None and again is not None
    assert 200e6 < large - small < 320e6 and abs(again - small) < 60e6


def test_time_is_cpu_time() -> None:
    import time

    assert time_run(lambda: time.sleep(0.2), "cpu") < 0.1


# ---- phases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"every": 2}, {"start": 0.1, "every": 3}, {"start": 0.3, "stop": 0.7, "every": 4}]
)
def test_phases_are_the_steps_that_a_guided_run_takes(bench, options) -> None:
    """The number of gradients of a whole run, counted by the guide itself."""
    guide, calls = bench.mid_u(**options), []
    score = guide.score

    def counting(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return score(h, t)

    guide.score = counting
    with apply_guidance(bench.pipe, [guide], parts=2):
        for i in range(NUM_STEPS):
            bench.step(i)
    run = len(calls)
    phases = list_phases([bench.mid_u(**options)])
    assert sum(share for _, share in phases) == pytest.approx(1)
    fresh = 0.0
    with apply_guidance(bench.pipe, [guide], parts=2):
        for i, share in phases:
            before = len(calls)
            bench.step(i)
            fresh += (len(calls) - before) * share
    assert fresh == pytest.approx(run / NUM_STEPS)


def test_two_guides_have_phases_of_their_own() -> None:
    guides = [ClipGuide(**options) for options in ({"stop": 0.5}, {"every": 2})]
    assert list_phases(guides, 4) == [(0, 0.25), (1, 0.25), (2, 0.25), (3, 0.25)]


# ---- methods ------------------------------------------------------------------------------------------------------
def test_a_guided_step_costs_its_gradient_of_the_encoder_half_alone(bench) -> None:
    names = ("unguided", "mid-u", "full graph", "full graph, both parts", "second forward", "the head alone")
    flops = {name: METHODS[name][1](bench).measure(count_flops)[0] for name in names}
    gradient = flops["mid-u"] - flops["unguided"]
    assert 0.1 < gradient / flops["unguided"] < 0.45
    # the same gradient of the same part, whatever graph is kept; once more for the other part; a forward more
    assert flops["full graph"] == flops["mid-u"]
    head = flops["the head alone"]
    assert flops["full graph, both parts"] - flops["unguided"] == pytest.approx(2 * gradient, rel=0.02)
    assert flops["second forward"] == flops["full graph"] + flops["unguided"] // 2
    assert 0 < head < 0.3 * gradient  # a model of a few channels; less than 0.1% of Stable Diffusion


def test_less_is_kept_for_the_gradient_than_by_the_whole_graph(bench) -> None:
    saved = {}
    for name in ("mid-u", "full graph", "full graph, both parts", "CLIP through UNet, VAE"):
        method = METHODS[name][1](bench)
        (saved[name],) = method.measure(lambda run: count_saved(run, bench.networks()))
    assert saved["mid-u"] < 0.5 * saved["full graph"]
    assert saved["full graph, both parts"] == pytest.approx(2 * saved["full graph"], rel=0.02)
    assert saved["CLIP through UNet, VAE"] > saved["full graph"]


def test_a_capture_that_stops_at_the_tap_costs_the_encoder_half(bench) -> None:
    full, half = (count_flops(METHODS[f"capture, {k}"][1](bench).phases[0][0]) for k in ("full", "encoder"))
    assert 0.2 < half / full < 0.5


# ---- the script ---------------------------------------------------------------------------------------------------
def test_the_script_writes_table_json_and_plot(tiny_folder, tmp_path, capsys) -> None:
    words = [f"model={tiny_folder}", "repeats=2", f"output={tmp_path}", "latent_size=8", "clip=testbed"]
    assert cost.main(words) == 0
    file = tmp_path / f"{tiny_folder.name}-8.json"
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["against"] == METHODS[name][0] and (row["ratio"] is None) == (row["against"] is None)
        if row["against"]:  # each run against the mean of those before and after it
            base, runs = rows[row["against"]]["runs"], row["runs"]
            assert len(runs) == 2 and len(base) == 3
            low, high = sorted(runs[i] / (0.5 * base[i] + 0.5 * base[i + 1]) for i in range(2))
            ratios = [row[k] for k in ("ratio_min", "ratio", "ratio_max")]
            assert ratios == pytest.approx([low, (low + high) / 2, high])
    assert 1 < rows["mid-u, fast"]["floor"] < rows["mid-u, every 2"]["floor"] < rows["mid-u"]["floor"] < 1.6
    # the gradient is of the conditional part alone
    assert rows["mid-u"]["floor"] < rows["mid-u, no CFG"]["floor"]
    assert rows["capture, encoder"]["floor"] < 0.8
    assert "| mid-u |" in capsys.readouterr().out
    with Image.open(file.with_suffix(".png")) as image:
        assert image.size[0] > 500


def test_the_script_times_any_guide(tiny_folder, tmp_path) -> None:
    words = [f"model={tiny_folder}", "repeats=1", f"output={tmp_path}", "latent_size=8", "methods=[amortised]"]
    assert cost.main([*words, 'guides=["clip:clip=testbed,texts=[a house],every=2"]']) == 0
    rows = json.loads((tmp_path / f"{tiny_folder.name}-8.json").read_text())["rows"]
    assert list(rows) == ["unguided", "amortised", "clip:clip=testbed,texts=[a house],every=2"]
    assert all(row["floor"] > 1 for row in list(rows.values())[1:])


def test_a_transformer_is_tapped_half_way(tmp_path) -> None:
    words = ["model=random:dit-xl-2-256-tiny", "repeats=1", f"output={tmp_path}"]
    assert cost.main([*words, "methods=[mid-u, the head alone]"]) == 0
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert 0.15 < rows["mid-u"]["floor"] - rows["the head alone"]["floor"] - 1 < 0.6


@pytest.mark.parametrize("words", ["methods=[midu]", "guides=[midblok]", "repeats=0"])
def test_bad_words_are_refused(words, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        cost.main([words])
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err
