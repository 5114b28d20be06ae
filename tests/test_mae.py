"""mae.py: its masks, loss and judges against slow formulas; its runs killed, stopped and resumed; its answers
to bad input."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import mae
from conftest import log_of
from common import (
    Decoder, InMemoryImages, Run, UserError, ViT, center_crop, load_decoder, load_encoder, parse_args,
    patchify, read_image)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

# Scenes of 32 pixels, 8 steps an epoch; the last line is for tasks, which take model and size from --init.
MODEL = (
    "--model nano --size 32 --patch 8 --limit 64 --batch 8 --epochs 3 --lr 1e-2 --warmup 0.5 --crop 0.5 "
    "--workers 0 --device cpu"
).split()
TASK = "--limit 60 --batch 20 --epochs 6 --warmup 0.5 --workers 0 --device cpu".split()


def tiny(grid=(4, 4), masking="random", norm_pixels=True):
    """A model of some thousand parameters for images of grid × 4 pixels."""
    encoder = ViT((4 * grid[0], 4 * grid[1]), 4, embed_dim=16, depth=2, num_heads=2)
    return mae.MAE(encoder, Decoder(encoder, 8, 1, 2), norm_pixels, masking)


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def args_of(out, *flags):
    return mae.parse([str(flag) for flag in ("--out", out, *flags)])


def saved(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)


def assert_same_training(one, other, tolerance=0):
    """The same weights and moments of AdamW, and a log of the same epochs with the same numbers."""
    for part in ("encoder", "decoder", "optimizer"):
        close(saved(one)[part], saved(other)[part], tolerance)
    lines = [log_of(out) for out in (one, other)]
    for line in lines[0] + lines[1]:
        for name in ("seconds", "images_per_s"):
            line.pop(name, None)
    assert len(lines[0]) == len(lines[1]) == saved(one)["args"]["epochs"] + 1
    for line, wanted in zip(*lines):
        assert line == pytest.approx(wanted, rel=tolerance or 1e-12)


class Spy:
    """A dataset as a user writes one, of images in three tints, that notes which images were asked for."""

    def __init__(self, count, channels=3, size=(32, 32), seed=0):
        random = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(count) % 3
        images = 60 * torch.rand(count, channels, *size, generator=random)
        images[torch.arange(count), self.targets % channels] += 120
        self.images = images.byte()
        self.seen = set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.seen.add(i)
        return self.images[i], self.targets[i].item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ with PNGs of three classes."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 64), ("val", 12)):
        for i, (image, label) in enumerate(Spy(count, size=(40, 36))):
            path = root / part / "red green blue".split()[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model pre-trained on scenes, in moments → its folder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    mae.main(["--out", str(out), *MODEL])
    return out


# ---------------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 6), (7, 5), (1, 9)])
def test_every_kind_of_masking_hides_exactly_as_many_patches(masking, grid):
    places = grid[0] * grid[1]
    for ratio in (0.25, 0.5, 0.6, 0.75, 0.88):
        visible = int(places * (1 - ratio))
        noise = mae.MASKINGS[masking](16, grid, "cpu")
        keep, restore, mask = mae.hide(noise, visible)
        assert keep.shape == (16, visible) and (mask.sum(dim=1) == places - visible).all()
        for b in range(16):
            assert sorted(keep[b].tolist()) == (mask[b] == 0).nonzero().flatten().tolist()
            assert noise[b][mask[b] == 0].max() <= noise[b][mask[b] == 1].min()
            assert restore[b][keep[b]].tolist() == [*range(visible)]


def test_random_masks_are_uniform_and_independent():
    _, _, mask = mae.hide(mae.MASKINGS["random"](20_000, (4, 4), "cpu"), 4)
    shown = (mask == 0).float()
    close(shown.mean(dim=0), torch.full((16,), 0.25), 0.015)  # five standard errors
    assert (shown[:, 5] * shown[:, 6]).mean().item() == pytest.approx(4 / 16 * 3 / 15, abs=0.008)


def test_grid_masks_keep_the_upper_left_patch_of_four():
    _, _, mask = mae.hide(mae.MASKINGS["grid"](3, (6, 8), "cpu"), 12)
    wanted = [[[float(y % 2 or x % 2) for x in range(8)] for y in range(6)]] * 3
    assert mask.unflatten(1, (6, 8)).tolist() == wanted


def test_block_masks_hide_regions_and_differ():
    _, _, block = mae.hide(mae.MASKINGS["block"](64, (14, 14), "cpu"), 98)
    borders = block.unflatten(1, (14, 14)).diff(dim=2).abs().mean()
    assert borders < 0.3 and len(block.unique(dim=0)) == 64  # of random places half are borders


def test_a_block_is_a_rectangle_anywhere():
    inside = (mae.block_noise(4000, (6, 20), "cpu", rectangles=1) >= 1).unflatten(1, (6, 20))
    assert torch.equal(inside, inside.any(dim=2, keepdim=True) & inside.any(dim=1, keepdim=True))
    often = inside.float().mean(dim=0)
    close(often, often.flip(0, 1), 0.06)  # as often at one end as at the other


# ------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_loss_equals_a_slow_loop_over_hidden_patches(norm_pixels):
    model, images = tiny((2, 3), norm_pixels=norm_pixels), torch.rand(2, 3, 8, 12)
    prediction = torch.randn(2, 6, 48)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1]]).float()
    errors = []
    for b, n in mask.nonzero().tolist():
        y, x = 4 * (n // 3), 4 * (n % 3)
        target = images[b, :, y : y + 4, x : x + 4].permute(1, 2, 0).double().numpy().ravel()
        if norm_pixels:
            target = (target - target.mean()) / math.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(np.mean((prediction[b, n].double().numpy() - target) ** 2))
    assert model.loss(images, prediction, mask).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_encoder_never_sees_hidden_pixels_and_every_parameter_learns():
    model, images, noise = tiny(norm_pixels=False), torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    loss, prediction, mask = model(images, noise=noise)
    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 48), 4, 16).bool()
    other_loss, other, _ = model(torch.where(hidden, 9.0, images), noise=noise)
    assert torch.equal(prediction, other) and abs(loss - other_loss) > 0.1
    changed = model(torch.where(hidden, images, images + 1), noise=noise)[1]
    assert ((changed - prediction).abs().amax(dim=(1, 2)) > 1e-4).all()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert name.endswith("pos_embed") or parameter.grad.abs().max() > 0, name


def test_a_mask_of_ones_own_hides_exactly_what_it_says():
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    order = torch.rand(2, 16).argsort(dim=1)
    for count in (1, 7, 15):
        wanted = order < count
        loss, _, mask = model(images, mask=wanted)
        assert torch.equal(mask.bool(), wanted) and loss.isfinite()
        one, _, _ = model(images, mask=wanted[:1])                    # the first image's for all
        close(one, model(images, mask=wanted[:1].expand(2, -1))[0])
    with pytest.raises(UserError):
        model(images, mask=order < torch.tensor([[3], [4]]))


def test_hiding_nothing_or_everything_is_an_error():
    for how in (
        dict(mask_ratio=0),
        dict(mask_ratio=1.0),
        dict(mask_ratio=0.99),
        dict(mask=torch.ones(2, 16).bool()),
    ):
        with pytest.raises(UserError):
            tiny()(torch.rand(2, 3, 16, 16), **how)


@pytest.mark.parametrize("norm_pixels", [False, True])
def test_reconstruct_fills_hidden_patches_and_leaves_the_others(norm_pixels, monkeypatch):
    noise = torch.rand(3, 16)
    monkeypatch.setitem(mae.MASKINGS, "random", lambda batch, grid, device: noise)
    model, images = tiny(norm_pixels=norm_pixels), 3 * torch.randn(3, 3, 16, 16) + 5
    with torch.no_grad():
        _, prediction, mask = model(images)
    parts = [patchify(part, 4) for part in (images, *model.reconstruct(images))]
    for true, shown, filled, guess, hidden in zip(
        *(part.flatten(0, 1) for part in (*parts, prediction, mask))
    ):
        if hidden and norm_pixels:
            guess = guess * math.sqrt(true.double().var(unbiased=True).item() + 1e-6) + true.mean()
        close(shown, true * (1 - hidden), 0)
        close(filled, guess if hidden else true, 1e-4 if hidden else 0)


def test_mae_exports_with_a_free_batch_size():
    model, images, noise = tiny(), torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    free = {0: torch.export.Dim("B")}
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=dict(images=free)).module()
    loss, prediction, mask = exported(images)                         # it draws its masks
    close(loss, model.loss(images, prediction, mask))
    assert mask.sum(dim=1).tolist() == [12] * 5
    exported = torch.export.export(
        model, (images[:2],), dict(noise=noise[:2]), dynamic_shapes=dict(images=free, noise=free)).module()
    close(exported(images, noise=noise), model(images, noise=noise))


def test_mae_runs_in_onnx_with_a_free_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path, batch = tiny().eval(), str(tmp_path / "mae.onnx"), torch.export.Dim("B")
    images, noise = torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    torch.onnx.export(
        model, (images[:2],), path, kwargs=dict(noise=noise[:2]), input_names=["images", "noise"],
        dynamic_shapes=dict(images={0: batch}, noise={0: batch}))
    found = onnxruntime.InferenceSession(path).run(None, dict(images=images.numpy(), noise=noise.numpy()))
    for one, wanted in zip(found, model(images, noise=noise), strict=True):
        close(torch.from_numpy(one), wanted.detach(), 1e-4)


@pytest.mark.parametrize("flags", [(), ("--checkpoint-blocks",)])
def test_a_training_step_compiles_to_one_graph(flags, tmp_path):
    images, found = torch.randn(4, 3, 16, 16), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Run(args_of(tmp_path, *flags)).wrap(tiny(masking="block"))
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        model(images)[0].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    close(*found)


# ------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_readme_promises(trained, cli):
    assert sorted(path.name for path in trained.iterdir()) == [
        "args.json",
        "last.pt",
        "log.jsonl",
        "reconstruction.png",
    ]
    *epochs, judged = log_of(trained)
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 8), (2, 16), (3, 24)]
    assert {"loss", "lr", "images_per_s", "seconds"} <= epochs[0].keys()
    assert epochs[-1]["loss"] < 0.9 * epochs[0]["loss"]
    assert epochs[-1]["val_loss"] == pytest.approx(epochs[-1]["loss"], rel=0.2)
    assert {"linear_trained", "linear_untrained"} <= judged.keys()
    args = json.loads((trained / "args.json").read_text())
    assert (
        args["lr"] == 1e-2
        and args["torch"] == torch.__version__
        and {"python", "cuda", "device_name", "commit"} <= args.keys()
    )
    assert saved(trained)["args"]["vit"] == load_encoder(f"{trained}/last.pt").config

    before = (trained / "last.pt").read_bytes()
    code, _, errors = cli("--out", trained, *MODEL)
    assert code == 2 and errors.count("\n") == 1 and (trained / "last.pt").read_bytes() == before


def test_two_steps_equal_two_by_hand(tmp_path):
    flags = [*MODEL, "--limit", 8, "--epochs", 2, "--micro-batch", 4, "--mask-ratio", 0.5, "--norm-pixels"]
    flags += ["--warmup", 0, "--lr", 0.032, "--weight-decay", 0.2]
    train = Spy(8)
    mae.pretrain(args_of(tmp_path / "run", *flags), train)
    run = Run(args_of(tmp_path / "hand", *flags))
    common.prepare_data(run.args, run, train)
    run.start(8)
    torch.manual_seed(0)
    encoder = ViT(32, 8, embed_dim=128, depth=4, num_heads=4)
    model = mae.MAE(encoder, Decoder(encoder, 64, 1, 4), norm_pixels=True)
    groups = [dict(params=[], weight_decay=0.2), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["token" in name or parameter.ndim == 1]["params"].append(parameter)
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = common.batches(train, common.training_plan(torch.arange(8), run), run, train=True)
    for lr in (1e-3, 0.5e-3):  # 0.032 · 8 / 256, and in the middle of half a cosine
        for group in groups:
            group["lr"] = lr
        for _ in range(2):
            images, _ = next(loader)
            (model(images, 0.5)[0] / 2).backward()
        adam.step()
        adam.zero_grad()
    # The keys' bias has no gradient but rounding errors, and AdamW makes steps of them.
    close(saved(tmp_path / "run")["encoder"], encoder.state_dict(), 2e-5)


def send(number, monkeypatch, step, masking="random", wait=0.0):
    """From now on, the masks of this step send a signal, and after `wait` seconds another."""
    noise, calls = mae.MASKINGS[masking], []

    def noise_and_signal(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
            if wait:
                time.sleep(wait)
                os.kill(os.getpid(), number)
        return noise(*arguments)

    monkeypatch.setitem(mae.MASKINGS, masking, noise_and_signal)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stopped_run_resumes_to_the_same_weights(name, trained, tmp_path, cli, monkeypatch):
    with monkeypatch.context() as patch:
        send(getattr(signal, name), patch, step=11)
        code, _, _ = cli("--out", tmp_path, *MODEL)
    assert code == 128 + getattr(signal, name) and 0 < saved(tmp_path)["step"] < 24
    (tmp_path / "log.jsonl").write_text('{"half a line')
    assert cli("--out", tmp_path, "--resume")[0] == 0
    assert_same_training(tmp_path, trained)


def test_what_nohup_ignores_does_not_stop_a_run(tmp_path, cli, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(signal.SIGHUP, monkeypatch, step=11)
        assert cli("--out", tmp_path, *MODEL)[0] == 0 and saved(tmp_path)["step"] == 24
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_stops_at_once(tmp_path, cli, monkeypatch):
    send(signal.SIGINT, monkeypatch, step=3, wait=1.3)
    code, _, errors = cli("--out", tmp_path, *MODEL)
    assert code == 130 and "Traceback" not in errors and not (tmp_path / "log.jsonl").exists()


# Clocks run 300 times as fast, so that a run saves ten times a second.
HURRY = """import runpy, sys, time
clock = time.monotonic
time.monotonic = lambda: 300 * clock()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def start(out, *flags, launch=("-c", HURRY), script=mae):
    return subprocess.Popen(
        [sys.executable, *launch, script.__file__, "--out", str(out), *map(str, flags)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


TORCHRUN = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=2".split()


def wait_for(process, ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.02)


def stop_after_saving(process, number, out, steps):
    """Waits until a checkpoint of more than so many steps is there, then sends a signal to a process and its
    workers."""
    wait_for(process, lambda: Path(out, "last.pt").exists() and saved(out)["step"] > steps)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number), output


def test_a_killed_run_resumes_to_the_same_weights(folder, tmp_path, cli):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Images of more than 96 pixels are not kept in memory, so that workers read them.
    flags = ["--data", folder, *MODEL, "--size", 128, "--patch", 32, "--epochs", 12]
    stop_after_saving(start(killed, *flags, "--workers", 2), signal.SIGKILL, killed, 0)
    reached = saved(killed)["step"]
    stop_after_saving(start(killed, "--resume", "--workers", 2), signal.SIGINT, killed, reached)
    assert reached < saved(killed)["step"] < 96
    assert cli("--out", killed, "--resume", "--workers", 0)[0] == 0
    assert cli("--out", whole, *flags)[0] == 0
    assert_same_training(killed, whole)


def test_a_run_in_bf16_resumes_in_fp16(tmp_path, cli):
    assert cli("--out", tmp_path, *MODEL, "--epochs", 1, "--precision", "bf16")[0] == 0
    assert cli("--out", tmp_path, "--resume", "--epochs", 2, "--precision", "fp16")[0] == 0
    assert saved(tmp_path)["step"] == 16 and saved(tmp_path)["scaler"]["scale"] > 1


@pytest.mark.parametrize("name, flags", [
    ("mae", ""),
    ("mae", "--task finetune --init {trained}/last.pt --lr 1e-3"),
    ("automae", "--masking random"),
    ("automae", "--epochs 1 --prior {trained}/last.pt"),
    ("mixedae", "--epochs 1"),
    ("mra", "--epochs 1 --labels 6 --lr 3 --augment mra --augmentor {trained}/last.pt"),
])
def test_two_processes_end_with_the_weights_of_one(name, flags, trained, tmp_path):
    script, one, two = importlib.import_module(name), tmp_path / "one", tmp_path / "two"
    flags = [*MODEL, "--micro-batch", "4", *flags.format(trained=trained).split()]
    process = start(two, *flags, launch=TORCHRUN, script=script)
    script.main(["--out", str(one), *flags])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    if "finetune" in flags:
        close(saved(two)["encoder"], saved(one)["encoder"], 1e-3)
        assert log_of(two)[-1]["top5"] == pytest.approx(log_of(one)[-1]["top5"], abs=0.1)
    elif name == "mae":
        assert_same_training(two, one, 1e-3)
    elif name == "mra":                                     # its weights differ by BatchNorm's statistics
        assert log_of(two)[0]["loss"] == pytest.approx(log_of(one)[0]["loss"], rel=1e-3)
    elif "--prior" in flags:                                # the discriminator's step comes at another time
        assert math.isfinite(log_of(two)[-1]["generator_loss"])
    else:
        for part in ("encoder", "decoder", "optimizer"):
            close(saved(two)[part], saved(one)[part], 1e-3)


def test_two_processes_stop_together(tmp_path):
    process = start(tmp_path, *MODEL, "--epochs", 500, launch=TORCHRUN)
    wait_for(process, lambda: (tmp_path / "log.jsonl").exists())
    process.terminate()  # torchrun passes it on
    process.wait(timeout=60)
    assert 8 <= saved(tmp_path)["step"] < 4000


@pytest.mark.parametrize("flags", ["--masking grid", "--task finetune --init {trained}/last.pt"])
def test_accumulation_equals_the_large_batch(flags, trained, tmp_path):
    """With nothing random left: grid masks of even grids are fixed, all of each image is seen."""
    flags = flags.format(trained=trained).split()
    fixed = "--crop 1 --no-flip --drop-path 0 --epochs 1 --lr 1e-3".split()
    found = []
    for micro in ("8", "2"):
        mae.main([*MODEL, *fixed, "--micro-batch", micro, "--out", str(tmp_path / micro), *flags])
        found.append(saved(tmp_path / micro))
    close(found[0]["encoder"], found[1]["encoder"], 1e-4)
    assert not torch.equal(found[0]["encoder"]["cls_token"], saved(trained)["encoder"]["cls_token"])
    # AdamW's steps do not depend on the length of gradients, so look at their mean as well.
    means = [
        torch.cat([state["exp_avg"].flatten() for state in each["optimizer"]["state"].values()])
        for each in found
    ]
    assert (means[0] - means[1]).norm() < 1e-3 * means[1].norm()


def test_more_epochs_are_a_reason_to_resume_and_another_rate_is_not(trained, tmp_path, cli):
    assert cli("--out", tmp_path, *MODEL, "--epochs", 1)[0] == 0
    assert cli("--out", tmp_path, "--resume", "--lr", 5)[0] == 2
    torch.save(saved(tmp_path) | dict(seconds=1000.0), tmp_path / "last.pt")
    assert cli("--out", tmp_path, "--resume", "--epochs", 2)[0] == 0
    assert log_of(tmp_path)[1]["seconds"] > 1000 and log_of(tmp_path)[1]["images_per_s"] < 1
    assert [line["epoch"] for line in log_of(tmp_path) if "loss" in line] == [1, 2]
    assert cli("--out", tmp_path, *MODEL, "--epochs", 1, "--overwrite")[0] == 0
    assert [line["epoch"] for line in log_of(tmp_path) if "loss" in line] == [1]
    assert cli("--out", tmp_path / "none", "--resume")[0] == 2
    before = saved(tmp_path)["encoder"], len(log_of(tmp_path))
    assert cli("--out", tmp_path, "--resume")[0] == 0  # a whole run stays as it is
    close((saved(tmp_path)["encoder"], len(log_of(tmp_path))), before, 0)


def test_a_run_of_another_script_or_size_is_not_continued(trained):
    for parts in (dict(encoder=tiny().encoder), dict(generator=torch.nn.Linear(2, 2))):
        with pytest.raises(UserError):
            Run(args_of(trained, "--resume")).start(64, **parts)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_well(precision, trained, tmp_path, cli):
    assert cli("--out", tmp_path, *MODEL, "--precision", precision)[0] == 0
    losses = [[line["loss"] for line in log_of(out) if "loss" in line] for out in (tmp_path, trained)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path, cli, monkeypatch):
    assert cli("--out", tmp_path, *MODEL, "--epochs", 1)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr(mae, "learning_rate", lambda *arguments: 1e30)
    code, _, errors = cli("--out", tmp_path, "--resume", "--epochs", 2)
    assert code == 2 and errors.count("\n") == 1 and "loss" in errors
    assert (tmp_path / "last.pt").read_bytes() == before


def test_init_goes_on_from_weights_also_without_a_decoder(trained, tmp_path, cli):
    state = saved(trained)
    torch.save(state["encoder"], tmp_path / "timm.pth")
    for init in (f"{trained}/last.pt", tmp_path / "timm.pth"):
        flags = [*MODEL, "--init", init, "--lr", 0, "--epochs", 2, "--overwrite"]
        assert cli("--out", tmp_path / "on", *flags)[0] == 0
        close(saved(tmp_path / "on")["encoder"], state["encoder"], 0)
        if "last.pt" in str(init):  # validation: the same images and masks
            close(saved(tmp_path / "on")["decoder"], state["decoder"], 0)
            assert log_of(tmp_path / "on")[-2]["val_loss"] == pytest.approx(
                log_of(trained)[-2]["val_loss"], rel=1e-5
            )

    # Of a classifier goes on what pre-training trains: no head, no norm behind the mean.
    classifier = ViT(32, 8, embed_dim=16, depth=1, num_heads=2, num_classes=5, global_pool="avg")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    flags = [*MODEL, "--init", tmp_path / "classifier.pth", "--epochs", 1]
    assert cli("--out", tmp_path / "classifier", *flags)[0] == 0
    names = saved(tmp_path / "classifier")["encoder"].keys()
    assert names == ViT(32, 8, embed_dim=16, depth=1, num_heads=2).state_dict().keys()

    for init in ("", tmp_path / "none.pth"):
        code, _, errors = cli("--out", tmp_path / "x", *MODEL, "--init", init)
        assert code == 2 and errors.count("\n") == 1


def test_a_dataset_of_ones_own_trains_saves_and_draws(tmp_path):
    out, train = tmp_path / "run", Spy(60, channels=2, size=(96, 160))
    flags = "--model nano --patch 16 --limit 8 --batch 4 --epochs 1 --workers 0 --mean 1 2 --std 3 4".split()
    mae.pretrain(args_of(out, *flags), train, Spy(5, channels=2, size=(96, 160)))
    assert len(train.seen) <= 1 + 8 + 8  # the first; --limit in training and in judging
    encoder = load_encoder(f"{out}/last.pt")
    assert (encoder.in_chans, encoder.img_size, encoder.mean, encoder.std) == (2, (96, 160), [1, 2], [3, 4])
    assert encoder.feature_map(torch.randn(1, 2, 96, 160)).shape == (1, 128, 6, 10)
    assert load_decoder(f"{out}/last.pt", encoder).decoder_pred.out_features == 2 * 16 * 16
    assert Image.open(out / "reconstruction.png").width > 5 * 160


def test_torchvisions_datasets_go_by_their_names(tmp_path, cli, monkeypatch):
    class Fake(torch.utils.data.TensorDataset):
        classes = ["a", "b"]

        def __init__(self, root, train, download, transform):
            images = (torch.rand(40, 1, 28, 28) * 255).byte()
            super().__init__(images, torch.arange(40) % 2)

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Fake)
    flags = "--data fashion-mnist --batch 8 --epochs 1 --device cpu --workers 0".split()
    assert cli("--out", tmp_path, *flags)[0] == 0
    assert saved(tmp_path)["args"]["vit"]["in_chans"] == 1 and "linear_trained" in log_of(tmp_path)[-1]

    def fail(*arguments, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    code, _, errors = cli("--out", tmp_path / "x", *flags)
    assert code == 2 and errors.count("\n") == 1


def test_folders_without_classes_pretrain_and_are_no_task(folder, tmp_path, cli):
    flags = ["--data", folder / "val" / "red", *MODEL, "--batch", 2, "--epochs", 1]
    assert cli("--out", tmp_path / "flat", *flags)[0] == 0
    code, _, errors = cli("--out", tmp_path / "probe", *flags, "--task", "probe")
    assert code == 2 and errors.count("\n") == 1
    (tmp_path / "data" / "val").mkdir(parents=True)
    os.symlink(folder / "train", tmp_path / "data" / "train")
    os.symlink(folder / "val" / "red" / "0.png", tmp_path / "data" / "val" / "0.png")
    assert cli("--out", tmp_path / "flat-val", "--data", tmp_path / "data", *MODEL)[0] == 0


# ----------------------------------------------------------------------------------------- judging an encoder


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_are_what_a_head_would_get(pool):
    vit = ViT(16, 4, embed_dim=16, depth=2, num_heads=2, global_pool=pool)    # without a head
    images = torch.randn(2, 3, 16, 16)
    close(mae.extract_features(vit, images, pool), vit(images))
    if pool == "token":
        close(mae.extract_features(vit, images, "avg"), vit.feature_map(images).mean(dim=(2, 3)))


def test_images_without_a_label_are_no_labelled_ones():
    data = InMemoryImages(torch.zeros(30, 3, 4, 4).byte(), [-1] * 10 + [0, 1] * 10, "ab")
    ids = mae.labelled_ids(data, limit=12)
    assert len(ids) == 12 and (data.targets[ids] >= 0).all()


def test_a_run_that_learns_nothing_reports_what_an_untrained_encoder_has(trained, tmp_path, cli):
    assert cli("--out", tmp_path, *MODEL, "--lr", 0, "--epochs", 1)[0] == 0
    found, wanted = log_of(tmp_path)[-1], log_of(trained)[-1]
    assert found["linear_trained"] == found["linear_untrained"] == wanted["linear_untrained"]
    assert wanted["linear_trained"] != wanted["linear_untrained"]


@pytest.mark.parametrize("flags", [[], ["--mean", 1, 2, 3, "--std", 4, 5, 6]])
def test_images_are_normalised_as_the_encoder_knows_them_unless_told_otherwise(flags, trained, tmp_path):
    args = args_of(tmp_path, "--task", "finetune", "--init", f"{trained}/last.pt", "--device", "cpu", *flags)
    mae.prepare(args, Run(args), Spy(20), Spy(20))
    assert args.mean == ([1, 2, 3] if flags else saved(trained)["args"]["mean"])
    assert (args.size, args.patch) == ((32, 32), 8)
    with pytest.raises(UserError):
        mae.prepare(args, Run(args), Spy(20, channels=2))


def test_nearest_neighbours_equal_a_slow_vote():
    features, labels, queries = torch.randn(50, 8), torch.arange(50) % 4, torch.randn(6, 8)
    found = mae.knn(features, labels, queries, 4, k=7, temperature=0.2)
    for query, scores in zip(queries, found):
        cosine = [torch.dot(query, other).item() / (query.norm() * other.norm()).item() for other in features]
        votes = [0.0] * 4
        for i in np.argsort(cosine)[-7:]:
            votes[labels[i]] += math.exp(cosine[i] / 0.2)
        assert scores.tolist() == pytest.approx(votes, rel=1e-4)


def test_linear_is_a_ridge_regression():
    features, labels, queries = 3 + 5 * torch.randn(80, 6), torch.arange(80) % 3, torch.randn(7, 6)
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x, q = [F.pad((part - mean) / std, (0, 1), value=1.0).double() for part in (features, queries)]
    # The penalty is what seven more images would cost, each with one feature, whose scores should be 0.
    x = torch.cat([x, math.sqrt(10) * torch.eye(7)])
    targets = F.pad(F.one_hot(labels, 3), (0, 0, 0, 7)).double()
    wanted = q @ torch.linalg.lstsq(x, targets).solution
    close(mae.linear(features, labels, queries, 3, ridge=10.0).double(), wanted)


def test_evaluate_equals_a_slow_count(tmp_path):
    images = torch.rand(300, 64).argsort(dim=1).view(300, 1, 8, 8).byte()  # no two pixels alike
    labels = torch.randint(0, 7, (300,))
    args = args_of(tmp_path, "--size", 8, "--mean", 0, "--std", 1)
    args.classes = range(7)
    ids = torch.randperm(300)[:270]

    class FirstPixels(torch.nn.Module):
        def forward(self, batch):
            return batch[:, 0, 0, :7]

    result = mae.evaluate(FirstPixels(), InMemoryImages(images, labels, range(7)), ids, Run(args))
    right, right5 = 0, 0
    for i in ids.tolist():
        order = images[i, 0, 0, :7].float().topk(5).indices
        right += int(order[0] == labels[i])
        right5 += int(labels[i] in order)
    assert result["top1"] == pytest.approx(right / 270)
    assert result["top5"] == pytest.approx(right5 / 270)
    mae.evaluate(FirstPixels(), InMemoryImages(images, labels, range(7)), ids[:0], Run(args))  # of two


def test_lars_gives_gradients_of_matrices_a_part_of_the_weights_length():
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))]
    gradients = [torch.randn(4, 3), torch.randn(4)]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    mae.lars(torch.optim.SGD(parameters), None, None)
    gradients[0] *= 0.001 * parameters[0].detach().norm() / gradients[0].norm()
    close([parameter.grad for parameter in parameters], gradients, 1e-6)


def test_layers_near_the_image_learn_more_slowly():
    layers = {
        "patch_embed.proj.weight": 13,
        "cls_token": 13,
        "pos_embed": 13,
        "blocks.0.attn.qkv.weight": 12,
        "blocks.11.mlp.fc2.bias": 1,
        "fc_norm.weight": 0,
        "norm.bias": 0,
        "head.weight": 0,
    }
    for name, distance in layers.items():
        assert mae.layer_scale(name, 12, 0.65) == pytest.approx(0.65**distance), name


def judge(task, out, init, *flags, train=None, val=None):
    """Runs a task on scenes or on three tints that are easy to tell apart → the log's last line."""
    args = args_of(out, "--task", task, *TASK, *flags, *(["--init", init] if init else MODEL))
    mae.TASKS[task](args, train or Spy(120, seed=1), val or Spy(60, seed=2))
    return log_of(out)[-1]


@pytest.mark.parametrize(
    "task, flags",
    [
        ("probe", ["--pool", "avg"]),
        ("probe", ["--pool", "token"]),
        ("finetune", ["--lr", 5e-3]),
        ("finetune", ["--lr", 5e-3, "--pool", "token", "--train-blocks", 1]),
    ],
)
def test_classifiers_learn_and_their_best_checkpoint_keeps_its_accuracy(task, flags, trained, tmp_path):
    before = saved(trained)["encoder"]
    result = judge(task, tmp_path / "run", f"{trained}/last.pt", *flags)
    assert result["task"] == task and result["top1"] > 0.5 and result["top5"] == 1
    best = saved(tmp_path / "run", "best.pt")
    assert best["top1"] == max(line["top1"] for line in log_of(tmp_path / "run"))
    again = judge(task, tmp_path / "eval", tmp_path / "run" / "best.pt", "--eval")
    assert again["top1"] == pytest.approx(best["top1"], abs=1e-9)

    def part(name):
        return name.split(".")[1] if name.startswith("blocks.") else name.split(".")[0]

    after = best["encoder"]
    changed = {part(name) for name in before if name in after and not torch.equal(before[name], after[name])}
    if "--train-blocks" in flags:
        assert changed == {"3", "norm"}
    elif task == "finetune":
        assert changed == {"patch_embed", "cls_token", "pos_embed", *"0123"}
    else:
        assert not changed
    if task == "finetune":
        groups = saved(tmp_path / "run")["optimizer"]["param_groups"]
        rate = log_of(tmp_path / "run")[-2]["lr"]
        assert all(group["lr"] == pytest.approx(rate * group["lr_scale"]) for group in groups)
        assert "--train-blocks" in flags or len({group["lr_scale"] for group in groups}) == 6

    # Its classes and normalisation are in the file. And a classifier of other classes is not evaluated.
    classifier, val = load_encoder(str(tmp_path / "run" / "best.pt")).eval(), Spy(60, seed=2)
    mean, std = torch.tensor([classifier.mean, classifier.std])[..., None, None]
    right = classifier((val.images - mean) / std).argmax(dim=1) == val.targets
    assert classifier.classes == ["0", "1", "2"]
    assert right.float().mean().item() == pytest.approx(best["top1"], abs=1e-6)
    val.classes = ["b", "a", "c"]
    with pytest.raises(UserError):
        judge(task, tmp_path / "other", tmp_path / "run" / "best.pt", "--eval", train=val, val=val)


def test_without_out_nothing_trained_is_replaced(cli, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "finetune", "--limit", 40, "--epochs", 1, "--init", f"{trained}/last.pt"]
    flags += ["--batch", 20]
    best = tmp_path / "runs/mae-finetune/best.pt"
    assert cli(*flags)[0] == 0
    weights = best.read_bytes()
    evaluation = ["--task", "finetune", "--eval", "--limit", 40, "--init", best]
    assert [cli(*evaluation)[0] for _ in range(2)] == [0, 0] and cli(*flags)[0] == 2
    assert best.read_bytes() == weights
    assert cli(*flags, "--overwrite")[0] == 0


@pytest.mark.parametrize("task", ["probe", "finetune", "segment"])
def test_a_stopped_task_resumes_to_the_same_classifier(task, trained, tmp_path, cli, monkeypatch):
    flags = ["--task", task, *TASK, "--limit", 40, "--mixup", 0.8, "--drop-path", 0.5, "--randaugment", 5]
    flags += ["--init", f"{trained}/last.pt"]
    assert cli("--out", tmp_path / "whole", *flags)[0] == 0
    with monkeypatch.context() as patch:  # at the end of the third epoch
        evaluate, calls = mae.evaluate, []

        def evaluate_and_signal(*arguments):
            calls.append(os.kill(os.getpid(), signal.SIGTERM) if len(calls) == 2 else None)
            return evaluate(*arguments)

        patch.setattr(mae, "evaluate", evaluate_and_signal)
        assert cli("--out", tmp_path / "stopped", *flags)[0] == 143
    assert saved(tmp_path / "stopped")["step"] == 6
    assert cli("--out", tmp_path / "stopped", "--task", task, "--resume")[0] == 0
    for name in ("last.pt", "best.pt"):
        found, wanted = (saved(tmp_path / out, name) for out in ("stopped", "whole"))
        for part in {"encoder", "head", "optimizer"} & wanted.keys():
            close(found[part], wanted[part], 0)
    measure = "mean_iou" if task == "segment" else "top1"
    scores = [[line[measure] for line in log_of(tmp_path / out)] for out in ("stopped", "whole")]
    assert scores[0] == scores[1]


def test_few_labels_are_that_many_of_each_class(trained, tmp_path):
    train = Spy(120)
    judge("finetune", tmp_path / "run", f"{trained}/last.pt", "--labels", 4, "--epochs", 3, train=train)
    seen = torch.tensor(sorted(train.seen - {0}))
    assert set(train.targets[seen].bincount().tolist()) <= {3, 4} and len(seen) in (11, 12)
    with pytest.raises(UserError):
        judge("finetune", tmp_path / "more", f"{trained}/last.pt", "--labels", 50, train=train)


def test_from_scratch_all_layers_learn_alike(tmp_path):
    judge("finetune", tmp_path, None, "--epochs", 1)
    assert {group["lr_scale"] for group in saved(tmp_path)["optimizer"]["param_groups"]} == {1.0}


def test_the_papers_augmentations_run_on_files(folder, trained, tmp_path, cli):
    flags = "--mixup 0.8 --cutmix 1 --erasing 0.5 --randaugment 9 --label-smoothing 0.1".split()
    flags += ["--data", folder, "--task", "finetune", "--init", f"{trained}/last.pt", *TASK, "--epochs", 1]
    assert cli("--out", tmp_path, *flags)[0] == 0
    assert math.isfinite(log_of(tmp_path)[0]["loss"]) and "top1" in log_of(tmp_path)[0]

    # README's lines for images without labels.
    model, paths = load_encoder(f"{tmp_path}/best.pt").eval(), [*folder.glob("val/*/*.png")]
    prepare = v2.Compose([v2.ToDtype(torch.float32), v2.Normalize(model.mean, model.std)])
    found = [model.classes[model(prepare(center_crop(read_image(path), model.img_size))[None]).argmax()]
             for path in paths]
    right = sum(name == path.parent.name for name, path in zip(found, paths)) / len(paths)
    assert right == pytest.approx(saved(tmp_path, "best.pt")["top1"])


def test_every_regulariser_changes_what_is_learned(trained, tmp_path):
    found = {}
    for flags in ("", "--mixup 0.8", "--cutmix 1", "--erasing 1", "--randaugment 9", "--label-smoothing 0.5",
                  "--drop-path 0.9"):
        out = tmp_path / f"run {flags}"
        judge("finetune", out, f"{trained}/last.pt", "--epochs", 1, "--drop-path", 0, *flags.split())
        found[flags] = saved(out)["encoder"]["cls_token"]
    plain = found.pop("")
    for flags, token in found.items():
        assert not torch.equal(token, plain), flags


def test_random_erasing_leaves_an_image_without_room_as_it_is():
    torch.manual_seed(0)
    images = torch.zeros(300, 3, 16, 224)                             # one rectangle in ten fits nowhere
    mae.erase(images, 0.5)
    parts = (images[:, 0] != 0).float().mean(dim=(1, 2))              # of an image
    assert 0.35 < (parts > 0).float().mean() < 0.55 and parts.max() < 0.4
    noise = images[images != 0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_checkpoint_says_whether_it_predicts_normalised_pixels(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(mae, "save_image_rows", lambda path, rows: sheets.append(rows))
    mae.main([*MODEL, "--epochs", "1", "--norm-pixels", "--out", f"{tmp_path}/run"])
    init = f"{tmp_path}/run/last.pt"
    mae.main([*TASK, "--task", "reconstruct", "--init", init, "--out", f"{tmp_path}/images"])
    assert sheets[0].keys() == sheets[1].keys()                       # a title says it


def test_neighbours_and_reconstruction_are_tasks_too(trained, tmp_path, cli):
    exact = judge("knn", tmp_path / "knn", f"{trained}/last.pt")["top1"]
    halved = judge("knn", tmp_path / "bf16", f"{trained}/last.pt", "--precision", "bf16")["top1"]
    assert exact > 0.7 and halved == pytest.approx(exact, abs=0.1)
    flags = ["--task", "reconstruct", "--init", f"{trained}/last.pt", "--limit", 40, "--device", "cpu"]
    assert cli("--out", tmp_path / "images", *flags)[0] == 0
    assert (tmp_path / "images" / "reconstruction.png").exists()
    for flags in (
        ["--task", "knn"],
        ["--task", "finetune", "--eval", "--init", f"{trained}/last.pt", "--limit", 20],
        ["--task", "segment", "--eval", "--init", f"{trained}/last.pt", "--limit", 20],
    ):
        code, _, errors = cli("--out", tmp_path / "x", *flags)
        assert code == 2 and errors.count("\n") == 1


# ----------------------------------------------------------------------------------------------- segmentation

def test_intersection_over_union_equals_a_slow_count(tmp_path):
    maps = torch.randint(0, 4, (6, 8, 8)).byte()                      # class 4 never occurs
    maps[torch.rand(6, 8, 8) < 0.2] = 255                             # and of some pixels nobody knows
    images = torch.randint(0, 6, (6, 1, 8, 8)).byte()                 # what is predicted: the pixel itself
    images[images > 3] = 0
    args = args_of(tmp_path, "--size", 8, "--mean", 0, "--std", 1)
    args.classes = "abcde"
    model = mae.Segmenter(tiny((2, 2)).encoder, 5, "linear")
    model.predict = lambda batch: F.one_hot(batch[:, 0].long(), 5).movedim(-1, 1).float()
    result = mae.evaluate(model, InMemoryImages(images, maps, "abcde"), torch.arange(6), Run(args))
    known = maps != 255
    ious = []
    for k in range(4):
        truth, answer = (maps == k) & known, (images[:, 0] == k) & known
        ious.append((truth & answer).sum().item() / (truth | answer).sum().item())
    close(result["class_iou"][:4], ious, 1e-6)
    assert result["mean_iou"] == pytest.approx(sum(ious) / 4)
    right = (maps == images[:, 0])[known].float().mean().item()
    assert result["pixel_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (40, 24), (16, 77)])
def test_a_large_image_is_seen_through_windows(size):
    model = mae.Segmenter(tiny((4, 6)).encoder, 3, "conv").eval()
    images = torch.randn(2, 3, *size)
    scale = max(16 / size[0], 24 / size[1])
    h, w = max(16, round(scale * size[0])), max(24, round(scale * size[1]))
    resized = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    total, count = torch.zeros(2, 3, h, w), torch.zeros(h, w)
    rows, columns = math.ceil(h / 16), math.ceil(w / 24)
    for row in range(rows):
        for column in range(columns):
            y = round(row * (h - 16) / max(1, rows - 1))
            x = round(column * (w - 24) / max(1, columns - 1))
            total[:, :, y : y + 16, x : x + 24] += model(resized[:, :, y : y + 16, x : x + 24]).detach()
            count[y : y + 16, x : x + 24] += 1
    close(model.predict(images), F.interpolate(total / count, size, mode="bilinear"), 1e-4)


@pytest.mark.parametrize("head, epochs", [("linear", 15), ("conv", 6)])
def test_segmentation_learns_and_its_checkpoint_keeps_its_figures(head, epochs, trained, tmp_path, cli):
    flags = ["--task", "segment", "--head", head, "--workers", 0, "--device", "cpu", "--limit", 60]
    flags += ["--batch", 20, "--epochs", epochs, "--init"]
    code, _, _ = cli("--out", tmp_path / "run", *flags, f"{trained}/last.pt")
    assert code == 0 and (tmp_path / "run" / "segmentation.png").exists()
    *epochs, result = log_of(tmp_path / "run")
    best = saved(tmp_path / "run", "best.pt")
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"] and len(result["class_iou"]) == 11
    before = saved(trained)["encoder"]
    assert (head == "linear") == all(torch.equal(before[name], best["encoder"][name]) for name in before)
    assert cli("--out", tmp_path / "eval", *flags, tmp_path / "run" / "best.pt", "--eval")[0] == 0
    assert log_of(tmp_path / "eval")[-1]["mean_iou"] == pytest.approx(best["mean_iou"])

    # Used in a program of one's own it is as good.
    train, val = mae.open_maps(args_of(tmp_path / "x", *flags, f"{trained}/last.pt", "--size", 32))
    assert [set(labels.unique().tolist()) for labels in train.targets[:10]] == [{0, k} for k in range(1, 11)]
    model = mae.load_segmenter(tmp_path / "run" / "best.pt")
    mean, std = torch.tensor([model.encoder.mean, model.encoder.std])[..., None, None]
    right = model.predict((val.images - mean) / std).argmax(dim=1) == val.targets
    assert right.float().mean().item() == pytest.approx(best["pixel_accuracy"], abs=1e-4)


def test_maps_of_ones_own_and_two_channels_are_segmented(tmp_path, monkeypatch):
    def data(count):
        maps = torch.randint(0, 3, (count, 32, 32)).byte()
        return InMemoryImages(60 * maps[:, None].repeat(1, 2, 1, 1), maps, ["a", "b", "c"])

    def predict(model, images, predict=mae.Segmenter.predict):
        assert not model.training                                     # also for the image at the end
        return predict(model, images)

    monkeypatch.setattr(mae.Segmenter, "predict", predict)
    args = args_of(tmp_path, "--task", "segment", "--model", "nano", *TASK, "--epochs", 1)
    mae.segment(args, data(40), data(10))
    assert log_of(tmp_path)[-1]["task"] == "segment" and (tmp_path / "segmentation.png").exists()


@pytest.fixture
def maps_folder(tmp_path):
    """ADE20K's layout: images of many sizes, and maps with the classes 1 to 3 and 0 for unknown."""
    random = np.random.default_rng(0)
    for part, count in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / part).mkdir(parents=True)
        for i in range(count):
            size = (40 + 9 * i, 33)
            pixels = random.integers(0, 255, (*size, 3), np.uint8)
            labels = random.integers(0, 4 if part == "training" else 3, size, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "ade" / "images" / part / f"{i}.jpg")
            Image.fromarray(labels).save(tmp_path / "ade" / "annotations" / part / f"{i}.png")
    return tmp_path / "ade"


def test_a_folder_of_images_and_maps_is_segmented(maps_folder, trained, tmp_path, cli):
    flags = ["--task", "segment", "--data", maps_folder, "--init", f"{trained}/last.pt", "--workers", 0]
    flags += ["--batch", 3, "--epochs", 2, "--crop", 0.3, "--device", "cpu", "--out", tmp_path / "run"]
    assert cli(*flags, "--size", 32, 48)[0] == 0
    result = log_of(tmp_path / "run")[-1]
    assert len(result["class_iou"]) == 3 and 0 < result["pixel_accuracy"] < 1
    data = mae.open_maps(args_of(tmp_path / "x", "--data", maps_folder))[1]
    assert {int(value) for i in range(3) for value in data[i][1].unique()} == {0, 1, 255}
    assert saved(tmp_path / "run", "best.pt")["args"]["classes"] == ["1", "2", "3"]
    with pytest.raises(UserError):
        mae.load_segmenter(trained / "last.pt")

    # Files are cropped at random unless told otherwise, so that all of an oblong image is seen.
    assert args_of(tmp_path / "x", *flags[:4]).crop == 0.25
    assert args_of(tmp_path / "x", *flags[:2]).crop == 1


def test_a_segmenter_is_not_evaluated_on_other_classes(tmp_path):
    def data(classes):
        maps = torch.randint(0, 2, (8, 32, 32)).byte()
        return InMemoryImages(60 * maps[:, None].repeat(1, 3, 1, 1), maps, classes)

    flags = "--task segment --model nano --batch 4 --epochs 1 --workers 0 --device cpu".split()
    mae.segment(args_of(tmp_path / "run", *flags), data("ab"), data("ab"))
    again = args_of(tmp_path / "eval", *flags, "--eval", "--init", tmp_path / "run" / "best.pt")
    with pytest.raises(UserError):
        mae.segment(again, data("ba"), data("ba"))
    mae.segment(again, data("ab"), data("ab"))


def test_every_weight_of_a_segmenter_is_trained(tmp_path, monkeypatch):
    def check(run, model, *rest):
        model(torch.rand(2, 3, 32, 32)).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
        run.rank = 1                                                  # the end: nothing is drawn

    classifier = ViT(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=5, global_pool="avg")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    monkeypatch.setattr(mae, "fit", check)
    flags = "--task segment --head conv --limit 8 --batch 4 --device cpu".split()
    mae.segment(args_of(tmp_path / "run", *flags, "--init", tmp_path / "classifier.pt"))


@pytest.mark.parametrize("name, base, folders, parts, line, values, wanted, num_classes", [
    ("voc", "VOCdevkit/VOC2012", ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
     ("train", "val"), "{}\n", (0, 255, 20), {0, 20, 255}, 21),
    ("pets", "oxford-iiit-pet", ("images", "annotations/trimaps", "annotations"),
     ("trainval", "test"), "{} 1 2 1\n", (2, 3, 1), {0, 1, 2}, 3),
])
def test_voc_and_pets_are_read_as_torchvision_lays_them_out(
        name, base, folders, parts, line, values, wanted, num_classes, tmp_path, cli):
    """values: what the maps hold on the background, on the border and on the object."""
    images, maps, lists = (tmp_path / "data" / base / folder for folder in folders)
    for folder in (images, maps, lists):
        folder.mkdir(parents=True, exist_ok=True)
    for part, count in zip(parts, (6, 3)):
        names = [f"Great_Dane_{part}{i}" for i in range(count)]
        (lists / f"{part}.txt").write_text("".join(line.format(image) for image in names))
        for i, image in enumerate(names):
            labels = np.full((40, 50 + i), values[0], np.uint8)
            labels[9:31, 9:31], labels[10:30, 10:30] = values[1:]
            labels = Image.fromarray(labels, "P")                         # VOC's have a palette
            labels.putpalette([*range(256)] * 3)
            labels.save(maps / f"{image}.png")
            Image.new("RGB", labels.size, (9 * i, 0, 0)).save(images / f"{image}.jpg")

    flags = ["--task", "segment", "--data", name, "--root", tmp_path / "data", "--device", "cpu"]
    train, val = mae.open_maps(args_of(tmp_path / "x", *flags))
    assert len(train) == 6 and len(val) == 3 and len(train.classes) == num_classes
    assert all(set(train[i][1].unique().tolist()) == wanted for i in range(6))
    flags += ["--size", 32, "--patch", 8, "--batch", 3, "--epochs", 1, "--workers", 0]
    assert cli(*flags, "--out", tmp_path / "run")[0] == 0
    assert len(log_of(tmp_path / "run")[-1]["class_iou"]) == num_classes


@pytest.mark.parametrize("name, damage", [
    ("annotations/training/0.png", lambda path: path.unlink()),
    ("annotations/training/0.png", lambda path: Image.new("L", (5, 5)).save(path)),
    ("annotations/training/0.png", lambda path: Image.new("RGB", (33, 40)).save(path)),
    ("annotations/validation/0.png", lambda path: Image.new("L", (33, 40), 77).save(path)),
    ("images/training/0.jpg", lambda path: path.write_bytes(path.read_bytes()[:400])),
])
def test_bad_maps_are_one_clear_line(name, damage, maps_folder, trained, tmp_path, cli):
    damage(maps_folder / name)
    flags = ["--task", "segment", "--data", maps_folder, "--init", f"{trained}/last.pt", "--workers", 0]
    code, _, errors = cli(*flags, "--batch", 3, "--epochs", 2, "--device", "cpu", "--out", tmp_path / "run")
    assert code == 2 and errors.count("\n") == 1 and "/0." in errors, errors


# ----------------------------------------------------------------------------------------------- command line

# The paper's options for each task: for all models, then for ViT-B, ViT-L and ViT-H.
RECIPES = {
    "pretrain": [
        "--epochs 800 --batch 4096 --lr 1.5e-4 --warmup 40 --weight-decay 0.05 --crop 0.2 --size 224 "
        "--mask-ratio 0.75 --masking random --norm-pixels",
        "--model base --patch 16",
        "--model large --patch 16",
        "--model huge --patch 14",
    ],
    "probe": [
        "--batch 16384 --lr 0.1 --warmup 10 --pool token --crop 0.08",
        "--epochs 90",
        "--epochs 50",
        "--epochs 50",
    ],
    "finetune": [
        "--batch 1024 --warmup 5 --weight-decay 0.05 --label-smoothing 0.1 --mixup 0.8 --cutmix 1 "
        "--randaugment 9 --erasing 0.25 --pool avg",
        "--epochs 100 --lr 5e-4 --layer-decay 0.65 --drop-path 0.1",
        "--epochs 50 --lr 1e-3 --layer-decay 0.75 --drop-path 0.2",
        "--epochs 50 --lr 1e-3 --layer-decay 0.75 --drop-path 0.3",
    ],
}


@pytest.mark.parametrize("task", RECIPES)
def test_imagenet_gets_the_papers_recipe(task, tmp_path):
    """Given on the command line, the paper's options change nothing."""

    def parse(*words):
        return parse_args(mae.options(), "mae", lambda args, kind: mae.preset(args, "imagenet"), words)

    shared, *by_size = RECIPES[task]
    for width, name, recipe in zip((768, 1024, 1280), ("base", "large", "huge"), by_size):
        flags = ["--out", "out", "--task", task]
        if task == "pretrain":
            flags += ["--model", name] if name != "base" else []
        else:
            path = str(tmp_path / "init.pth")
            torch.save(ViT(32, 16, embed_dim=width, depth=1, num_heads=16).state_dict(), path)
            flags += ["--init", path]
        args = parse(*flags)
        assert args == parse(*flags, *shared.split(), *recipe.split())
        assert args.min_lr == (1e-6 if task == "finetune" else 0)         # these two are no options
        assert args.decoder == dict(embed_dim=512, depth=8, num_heads=16)
        assert (args.size is None) == (task != "pretrain")                # then it is that of the encoder


def test_pixels_without_a_label_do_not_count_in_the_loss(tmp_path, monkeypatch):
    """A segmenter that cannot decide between two classes has a loss of log 2, wherever anything is known."""
    forward = mae.Segmenter.forward
    monkeypatch.setattr(mae.Segmenter, "forward", lambda model, images: 0 * forward(model, images))
    maps = torch.full((8, 32, 32), 255).byte()
    maps[4:, :7] = torch.randint(0, 2, (4, 7, 32))  # four maps know a part, four nothing
    data = InMemoryImages(torch.randint(0, 255, (8, 3, 32, 32)).byte(), maps, ["a", "b"])
    flags = "--task segment --model nano --batch 4 --micro-batch 1 --epochs 2 --device cpu".split()
    mae.segment(args_of(tmp_path, *flags), data, data)
    for line in log_of(tmp_path)[:2]:
        assert line["loss"] == pytest.approx(math.log(2) / 2)


def test_short_runs_on_large_data_keep_nothing_of_the_long_recipe(tmp_path):
    args = args_of(tmp_path, "--task", "segment", "--head", "conv")
    values = mae.preset(args, "imagenet")
    assert values["steps"] == 600 and values["epochs"] is values["warmup"] is None


def test_a_small_folder_gets_a_small_recipe(folder, tmp_path):
    for task in ("pretrain", "finetune"):
        args = args_of(tmp_path, "--data", folder, "--task", task)
        assert args.model == "nano" and args.batch <= 64 and args.epochs is None and args.steps <= 5000


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask-ratio", 1.5],
        ["--data", "nowhere"],
        ["--size", 33, "--patch", 8],
        ["--mask-ratio", 0],
        ["--batch", 7, "--micro-batch", 2],
    ],
)
def test_bad_options_end_in_a_line(flags, tmp_path, cli):
    code, _, errors = cli("--out", tmp_path, *MODEL, *flags)
    assert code == 2 and "Traceback" not in errors and "error" in errors.splitlines()[-1]


@pytest.mark.parametrize("name", ["mae", "automae", "mixedae", "mra"])
def test_help_shows_the_defaults_for_these_data(name, cli):
    code, output, _ = cli("--help", script=importlib.import_module(name))
    assert code == 0 and "(MAE: 1.5e-4) (default: 0." in " ".join(output.split())


@pytest.mark.skipif("SLOW" not in os.environ, reason="minutes of training: SLOW=1")
def test_the_first_command_learns_features(tmp_path, cli):
    assert cli("--out", tmp_path)[0] == 0
    assert log_of(tmp_path)[-1]["linear_trained"] >= 0.55
