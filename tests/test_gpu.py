"""What only a GPU shows. Without CUDA all of it is skipped. Most of the time goes into compiling. With the
package pytest-xdist that happens in parallel: `pytest -n 11 tests/test_gpu.py` took 2 min 38 s on 16 cores
and one H200.

Every script and every task runs for some steps, in three precisions, compiled and not. The GPU computes what
the CPU computes, and a compiled model what it computes uncompiled. A model is one graph. No step waits for
the GPU. A stopped run resumes to the same weights. DDP works over NCCL. Memory does not grow.
"""

import json
import math
import signal

import pytest
import torch
from torch import distributed as dist

import automae
import common
import mae
import mixedae
import mra

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

SCRIPTS = {"mae": mae, "automae": automae, "mixedae": mixedae, "mra": mra}
# automae.py and mra.py train another model first, a prior and an augmentor.
DEFAULTS = ["mae", "mixedae", "automae", "mra --labels 5 --batch 10 --augment mra"]
# Other tasks begin with checkpoints in the folder {root}.
FINETUNE = "mae --task finetune --init {root}/mae/last.pt --drop-path 0.1 --mixup 0.8 --erasing 0.5"
SEGMENT = "mae --task segment --init {root}/mae/last.pt --head conv"
AUGMENTOR = " --augmentor {root}/augmentor/last.pt"
TASKS = [
    FINETUNE,
    SEGMENT,
    "mae --task segment --init {root}/mae/last.pt --head linear",
    "mae --task probe --init {root}/mae/last.pt",
    "mae --task knn --init {root}/mae/last.pt",
    "mae --task reconstruct --init {root}/mae/last.pt",
    "mae --task finetune --eval --init {root}/classifier/best.pt",
    "mra --task augmentor",
    "mra --task semi --labels 2" + AUGMENTOR,
    "mra --task fewshot --labels 5 --limit 400" + AUGMENTOR,
    "mra --task occlusion --compare {root}/mra/last.pt" + AUGMENTOR,
]

# The largest error, as a part of the length of the right vector. MixedAE chooses keys and MRA patches by
# comparing numbers. 16 bits can turn a comparison around, so these two are compared in float32 alone.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def start(command, out, root, *options):
    """Runs a script's command line for some steps: every loss in its log has to be finite. Of an option that
    is given twice the command's value counts."""
    name, *words = command.format(root=root).split()
    tiny = ["--limit", "64", "--epochs", "3", "--workers", "0"]
    SCRIPTS[name].main([*tiny, "--device", DEVICE, "--out", str(out), *options, *words])
    with open(f"{out}/log.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert lines and all(math.isfinite(line.get("loss", 0)) for line in lines)
    if command in ("mae", "mixedae"):
        assert all(0 < line["mfu"] < 1 for line in lines if "loss" in line)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    """→ the folder with the checkpoints that tasks ask for. Throughout this file the default encoder has one
    block, which compiles quickly, and MRA's augmentor trains for four steps."""
    root = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.VITS["nano"], "depth", 1)
        patch.setitem(mra.PRESETS["scenes augmentor"], "steps", 4)
        start("mae", root / "mae", root, "--no-compile")
        start(FINETUNE, root / "classifier", root, "--no-compile")
        start("mra --task augmentor", root / "augmentor", root, "--no-compile")
        start("mra --labels 5" + AUGMENTOR, root / "mra", root, "--no-compile")
        yield root


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before counts, no TF32 (scripts turn it on), and waiting is allowed again."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")


def before_each_step(patch, look):
    """From now on every training loop calls look(run, step) before a step, and look(run, None) after it."""
    original = common.Run.steps

    def steps(run):
        for step in original(run):
            look(run, step)
            yield step
            look(run, None)

    patch.setattr(common.Run, "steps", steps)


# ----------------------------------------------------------------------------------- every script, every task

@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("command", DEFAULTS + TASKS)
def test_every_task_runs_in_every_precision(command, precision, root, tmp_path):
    start(command, tmp_path / "run", root, "--precision", precision, "--no-compile")


@pytest.mark.parametrize(
    "command",
    [*DEFAULTS, FINETUNE, SEGMENT, "mae --checkpoint-blocks", "mixedae --checkpoint-blocks"],
)
def test_runs_compile(command, root, tmp_path):
    # A function that is compiled for the ninth time would run uncompiled from then on, with a mere warning.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        start(command, tmp_path / "run", root, "--compile")           # such small ones do not by themselves
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# ------------------------------------------------------------------------------------------- the same numbers

def build(name):
    """→ a small model and its inputs. Given noise leaves nothing to chance but AutoMAE's masks."""
    torch.manual_seed(0)
    encoder = common.ViT(32, 4, embed_dim=64, depth=2, num_heads=4)
    decoder = common.Decoder(encoder, 32, 2, 2)
    images, noise, hint = torch.randn(8, 3, 32, 32), torch.rand(8, 64), torch.rand(8, 4, 64)
    if name == "MAE":
        return mae.MAE(encoder, decoder), (images, 0.75, noise)
    if name == "AutoMAE":
        return automae.AutoMAE(encoder, decoder, automae.make_generator(4, encoder.grid)), (images, hint)
    if name == "MixedAE":
        return mixedae.MixedAE(encoder, decoder), (images, noise[:2])
    encoder.mean = encoder.std = None
    return mra.MRA(encoder, decoder), (images,)


def results(model, inputs, device, dtype=torch.float32, **options):
    """→ what a model answers, and the gradient of its loss, which MRA has not: a list of vectors. options: to
    compile the model with."""
    model.to(device).zero_grad()
    inputs = [value.to(device) if torch.is_tensor(value) else value for value in inputs]
    forward = torch.compile(model, **options) if options else model
    torch.manual_seed(0)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        outputs = forward(*inputs)
    if torch.is_tensor(outputs):
        return [outputs.flatten().cpu()]
    outputs[0].backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return [outputs[1].detach().float().flatten().cpu(), torch.cat(gradients).cpu()]


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("name, dtype", [
    *(("MAE", dtype) for dtype in TOLERANCE), ("MixedAE", torch.float32), ("MRA", torch.float32)])
def test_the_gpu_computes_what_the_cpu_computes(name, dtype):
    model, inputs = build(name)
    expected = results(model, inputs, "cpu")
    assert_close(results(model, inputs, DEVICE, dtype), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["MAE", "AutoMAE", "MixedAE", "MRA"])
def test_a_model_is_one_graph_and_computes_what_it_does_uncompiled(name):
    model, inputs = build(name)
    expected = results(model, inputs, DEVICE)
    # Compiled code draws its random numbers in another way, unless it falls back on those of PyTorch.
    options = {"fallback_random": True, "reorder_for_peak_memory": False}
    found = results(model, inputs, DEVICE, fullgraph=True, dynamic=False, options=options)
    assert_close(found, expected, TOLERANCE[torch.float32])


# --------------------------------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("command", [*DEFAULTS, FINETUNE, SEGMENT, "mae --compile"])
def test_no_step_waits_for_the_gpu(command, root, tmp_path, monkeypatch):
    # All of a step counts: images, forward, backward, optimizer, log. The first steps compile, and set up the
    # optimizer; at an epoch's end a run evaluates.
    def look(run, step):
        busy = step is not None and step > 2 and (step + 1) % run.steps_per_epoch
        torch.cuda.set_sync_debug_mode("error" if busy else "default")

    before_each_step(monkeypatch, look)
    start(command, tmp_path / "run", root, "--no-compile", "--limit", "320")


@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
@pytest.mark.parametrize("command", ["mae", "mixedae"])
def test_a_stopped_run_resumes_to_the_same_weights(command, flag, root, tmp_path, monkeypatch):
    # Attention sums its gradients in any order, unless it is asked not to.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        start(command, tmp_path / "whole", root, flag)
        with monkeypatch.context() as patch:
            before_each_step(patch, lambda run, step: step == 3 and signal.raise_signal(signal.SIGTERM))
            with pytest.raises(SystemExit):
                start(command, tmp_path / "stopped", root, flag)
        assert common.read_checkpoint(f"{tmp_path}/stopped/last.pt")["step"] == 4
        start(command, tmp_path / "stopped", root, flag, "--resume")
    finally:
        torch.use_deterministic_algorithms(False)
    weights = []
    for out in ("stopped", "whole"):
        state = common.read_checkpoint(f"{tmp_path}/{out}/last.pt")["encoder"]
        weights.append(torch.cat([weight.flatten() for weight in state.values()]))
    assert_close(weights[:1], weights[1:], 1e-3)


@pytest.mark.parametrize("command", [*DEFAULTS, "mae --compile --checkpoint-blocks"])
def test_ddp_runs_over_nccl(command, root, tmp_path, monkeypatch):
    # A run that takes itself for one of two processes wraps its models in DDP; its group has one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        start(command, tmp_path / "run", root, "--no-compile")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("command", DEFAULTS[:3])
def test_memory_does_not_grow(command, root, tmp_path, monkeypatch):
    peaks = []

    def look(run, step):
        if step in (50, 125, 199):
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    before_each_step(monkeypatch, look)
    start(command, tmp_path / "run", root, "--no-compile", "--limit", "160", "--epochs", "20")
    *_, early, late = peaks                                           # automae.py trains a prior before
    assert late <= 1.01 * early
