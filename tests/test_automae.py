"""automae.py: its pieces against slow formulas; who learns from what; MAE as its special case; its runs."""

import argparse
import itertools
import json
import math
import os
import shutil
import random
import signal
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import automae
import common
import mae

RUN = ("--size 16 --patch 4 --limit 64 --epochs 2 --batch 16 --micro-batch 8 --lr 1e-2 "
       "--device cpu").split()                                              # 8 steps of 16 images, twice


def tiny(grid=(4, 4), heads=None, dtype=torch.float64, **options):
    """A model for images of grid × 4 pixels, with no parameter at a value where mistakes would not show."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, embed_dim=16, depth=2, num_heads=2)
    generator = automae.make_generator(heads, grid) if heads else None
    model = automae.AutoMAE(encoder, common.Decoder(encoder, 8, 1, 2), generator, **options)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def draw_images(count, grid=(4, 4)):
    return torch.randn(count, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)


def draw_attention(count, heads, places):
    return torch.randn(count, heads, places, dtype=torch.float64).softmax(dim=2)


def log_of(folder):
    """The lines of a run's log, without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("seconds", "images_per_s")} for line in lines]


def assert_same(one, two):
    """Nested dictionaries and lists of tensors and numbers, bit for bit."""
    torch.testing.assert_close(one, two, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- generator

def test_the_generator_is_two_convolutions_and_a_softmax():
    generator, attention = automae.make_generator(4, (3, 5)).double(), draw_attention(2, 4, 15)
    first, second = (layer for layer in generator if isinstance(layer, torch.nn.Conv2d))
    hidden = F.conv2d(attention.unflatten(2, (3, 5)), first.weight, first.bias, padding=1).relu()
    scores = F.conv2d(hidden, second.weight, second.bias, padding=1).flatten(1)
    torch.testing.assert_close(generator(attention), scores.log_softmax(dim=1))


def test_the_soft_mask_is_a_draw_from_the_generator_and_keeps_its_gradient():
    model = tiny(heads=4)
    hint = draw_attention(1, 4, 16)
    probability = model.generator(20 * hint).exp()[0]
    count = 4000
    _, _, _, soft_mask = model(draw_images(1).expand(count, -1, -1, -1), 20 * hint.expand(count, -1, -1))
    torch.testing.assert_close(soft_mask.sum(dim=1), torch.ones(count))    # float32, for any precision
    frequency = soft_mask.argmax(dim=1).bincount(minlength=16) / count
    assert ((frequency - probability).abs() < 5 * (probability / count).sqrt()).all()
    assert soft_mask.std(dim=0).min() > 0.005 and soft_mask.requires_grad


def test_highlight_marks_the_highest_and_passes_the_gradient_straight_through():
    soft_mask = torch.rand(5, 12).softmax(dim=1).requires_grad_()
    highlighted = automae.highlight(soft_mask, 3)
    for row, values in zip(highlighted.tolist(), soft_mask.tolist()):
        third = sorted(values)[-3]
        assert row == [float(value >= third) for value in values]           # exactly 0 and 1
    weights = torch.randn(5, 12)
    (highlighted * weights).sum().backward()
    assert torch.equal(soft_mask.grad, weights)


# ---------------------------------------------------------------------------------------------- discriminator

@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (8, 8), (14, 14), (6, 20), (16, 16)])
def test_the_discriminator_has_no_bias_and_is_spectrally_normalised(grid):
    discriminator, soft_mask = automae.make_discriminator(grid).eval(), torch.rand(3, grid[0] * grid[1])
    scores = discriminator(soft_mask)
    assert scores.abs().min() > 0 and (scores.shape[1] == 1 or grid != (14, 14))
    torch.testing.assert_close(discriminator(7 * soft_mask), 7 * scores)
    for layer in discriminator:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


def boxes_without_noise(count, grid, monkeypatch):
    """random_boxes → bool (count, h, w), with noise that is everywhere the same."""
    draw = torch.rand

    def rand(*shape, **options):
        return draw(*shape, **options) * (0 if shape[-1] == grid[0] * grid[1] else 1)
    monkeypatch.setattr(torch, "rand", rand)
    rows = automae.random_boxes(count, grid, "cpu")
    monkeypatch.undo()
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(count))
    height = rows.log() - rows.amin(dim=1, keepdim=True).log()
    inside = height > 0.25
    torch.testing.assert_close(height, 0.5 * inside)
    return inside.unflatten(1, grid)


def box_of(inside):
    """(h, w) → top, left, height, width. Fails unless it is a full rectangle."""
    rows, columns = inside.any(dim=1).nonzero(), inside.any(dim=0).nonzero()
    top, left = rows.min().item(), columns.min().item()
    height, width = rows.max().item() - top + 1, columns.max().item() - left + 1
    assert inside.sum() == height * width
    return top, left, height, width


def test_random_boxes_are_distributed_as_in_the_authors_code(monkeypatch):
    """One rectangle: an area from 40 to 160, a width from 4 to 10, the height that follows, any place."""
    count = 4000
    found = [box_of(inside) for inside in boxes_without_noise(count, (14, 14), monkeypatch)]
    random.seed(0)
    wanted = []
    for _ in range(count):
        area, width = random.randint(40, 160), random.randint(4, 10)
        height = min(14, math.ceil(area / width))
        wanted.append((random.randint(0, 14 - height), random.randint(0, 14 - width), height, width))
    for part in ((0,), (1,), (2, 3)):                                       # top, left, both sides together
        ours = Counter(tuple(box[k] for k in part) for box in found)
        theirs = Counter(tuple(box[k] for k in part) for box in wanted)
        for key in ours | theirs:
            assert abs(ours[key] - theirs[key]) < 5.5 * math.sqrt(ours[key] + theirs[key] + 1), (part, key)


@pytest.mark.parametrize("grid, widths, area", [((8, 8), (2, 6), (13, 53)), ((4, 10), (3, 7), (8, 33))])
def test_limits_of_boxes_grow_with_the_grid(grid, widths, area, monkeypatch):
    boxes = [box_of(inside) for inside in boxes_without_noise(2000, grid, monkeypatch)]
    assert (min(box[3] for box in boxes), max(box[3] for box in boxes)) == widths
    for top, left, height, width in boxes:
        assert top + height <= grid[0] and left + width <= grid[1]
        assert height == grid[0] or area[0] - 1 <= height * width <= area[1] + width


def test_boxes_lie_in_noise():
    rows = automae.random_boxes(500, (14, 14), "cpu").log()
    height = rows.amax(dim=1) - rows.amin(dim=1)                            # noise of 1, and 0.5 for the box
    assert 1.2 < height.min() and height.max() < 1.5


def test_object_boxes_lie_around_the_object():
    masks = torch.zeros(3, 24, 32, dtype=torch.bool)                        # the last one has no foreground
    masks[0, 5:12, 9] = masks[0, 11, 9:21] = True                           # an L
    masks[1, 23, 0] = True
    wanted = torch.zeros(3, 6, 8)
    wanted[0, 1:3, 2:6] = wanted[1, 5, 0] = 1
    assert torch.equal(automae.object_boxes(masks, (6, 8)), wanted.flatten(1))


# ------------------------------------------------------------------------------------------------------ model

@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("grid, ratio", [((4, 4), 0.75), ((4, 6), 0.6)])
def test_with_nothing_added_it_is_mae(grid, ratio, norm_pixels):
    """Loss, prediction, mask and gradients are MAE's, bit for bit: with mask_factor 0, and with random
    masking."""
    images = draw_images(8, grid)
    places = grid[0] * grid[1]
    for factor, hint in ((0.0, torch.rand(8, places)), (0.5, 0.0)):
        model = tiny(grid, norm_pixels=norm_pixels, mask_ratio=ratio, mask_factor=factor)
        other = mae.MAE(model.encoder, model.decoder, norm_pixels)
        torch.manual_seed(3)
        found = model(images, hint)
        torch.manual_seed(3)
        noise = torch.rand(8, places)
        wanted = other(images, ratio, noise=noise)
        for one, two in zip(found[:3], wanted):
            assert torch.equal(one, two)
        parameters = [p for p in other.parameters() if p.requires_grad]
        assert_same(torch.autograd.grad(found[0], parameters), torch.autograd.grad(wanted[0], parameters))


def test_highlighted_patches_are_hidden_more_often_and_surely_with_a_factor_of_one():
    images = draw_images(500)
    hint = torch.zeros(500, 16)
    hint[:, 3:7] = 1
    hidden = {}
    for factor in (0.0, 0.5, 1.0):
        _, _, mask, _ = tiny(mask_factor=factor)(images, hint)
        assert (mask.sum(dim=1) == 12).all()
        hidden[factor] = mask[:, 3:7].mean().item(), mask[:, 7:].mean().item()
    assert abs(hidden[0.0][0] - hidden[0.0][1]) < 0.05
    assert 0.9 < hidden[0.5][0] < 1 and hidden[0.5][1] < 0.72
    assert hidden[1.0][0] == 1


def test_as_many_patches_are_highlighted_as_stay_visible():
    _, _, mask, soft_mask = tiny(heads=4, mask_factor=1.0)(draw_images(400), draw_attention(400, 4, 16))
    hidden = mask.gather(1, soft_mask.argsort(dim=1, descending=True)).mean(dim=0)
    assert (hidden[:4] == 1).all()
    assert (hidden[4:] - 8 / 12).abs().max() < 0.12                         # 8 of the other 12, at random


def test_the_score_has_the_gradient_of_its_token():
    """Of a visible token times its gradient in MAE; nothing of a hidden one."""
    model = tiny((4, 6), mask_factor=0.7)
    images = draw_images(4, (4, 6))
    hint = torch.randint(2, (4, 24)).double().requires_grad_()
    embed, tokens = model.encoder.embed, []
    model.encoder.embed = lambda images: tokens.append(embed(images)) or tokens[0].retain_grad() or tokens[0]
    loss, _, mask, _ = model(images, hint)
    loss.backward()
    wanted = 0.7 * (tokens[0] * tokens[0].grad).sum(dim=2)
    torch.testing.assert_close(hint.grad, wanted)
    assert torch.equal(hint.grad != 0, mask == 0)


def test_reconstruction_alone_teaches_the_generator():
    model = tiny(heads=4)
    model(draw_images(8), draw_attention(8, 4, 16))[0].backward()
    weights = [layer.weight for layer in model.generator if isinstance(layer, torch.nn.Conv2d)]
    assert all(weight.grad.abs().max() > 0 for weight in weights)


def test_values_for_the_log_are_means_over_pixels():
    model, hint, mask = tiny(heads=4), draw_attention(5, 4, 16), torch.randint(2, (5, 16)).float()
    objects = torch.rand(5, 16, 16) < torch.rand(5, 1, 1)
    found = automae.where_it_hides(model, hint, mask, objects)
    probability = model.generator(hint).exp()
    maps = dict(
        hidden=mask, foreground=probability, static=probability.mean(dim=0).expand(5, -1),
        attention=hint.mean(dim=1))
    for name, values in maps.items():
        pixels = values.unflatten(1, (4, 4)).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        inside, outside = pixels[objects].mean().item(), pixels[~objects].mean().item()
        if name == "hidden":
            assert found["hidden_foreground"].item() == pytest.approx(inside, rel=1e-5)
            assert found["hidden_background"].item() == pytest.approx(outside, rel=1e-5)
        else:
            assert found[f"{name}_ratio"].item() == pytest.approx(inside / outside, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, prior included → its folder and its last.pt."""
    out = tmp_path_factory.mktemp("finished") / "run"
    automae.main([*RUN, "--out", str(out)])
    return out, common.read_checkpoint(f"{out}/last.pt")


def test_a_run_leaves_a_plain_encoder_a_log_and_images(finished):
    out, saved = finished
    encoder = common.load_encoder(f"{out}/last.pt")
    assert_same(encoder.state_dict(), saved["encoder"])
    assert encoder.config == saved["args"]["vit"]
    assert common.load_decoder(f"{out}/last.pt", encoder).config == saved["args"]["decoder"]
    line = log_of(out)[-1]
    assert line["step"] == 8 and {
        "loss", "lr", "generator_loss", "discriminator_loss", "foreground_ratio", "static_ratio",
        "attention_ratio", "hidden_foreground", "hidden_background"} <= line.keys()
    assert Image.open(out / "masks.png").width > 10 * 128
    assert not any("generator" in name for name in log_of(out / "prior")[-1])
    for group in saved["optimizer"]["param_groups"] + saved["discriminator_optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(common.learning_rate(7, 1e-2 * 16 / 256, 0.8, 8))
        assert group["betas"] == (0.9, 0.95)
    shape = saved["generator"]["1.weight"].shape                            # a map for each head of the prior
    assert shape[1] == encoder.config["num_heads"]


def stop_in(masking, monkeypatch):
    """SIGTERM in the third step of a run with this masking. It stops at step 4, the epoch's end, at the
    latest."""
    find_hint, counter = automae.find_hint, itertools.count(1)

    def find(args, *others):
        if args.masking == masking and next(counter) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return find_hint(args, *others)
    monkeypatch.setattr(automae, "find_hint", find)


def test_stopped_and_resumed_it_ends_the_same_bit_for_bit(finished, cli, tmp_path, monkeypatch):
    """Once in the prior's training, once in the main one. The prior goes on, and is then used as it is."""
    out, wanted = finished
    here = tmp_path / "run"
    stop_in("random", monkeypatch)
    assert cli(*RUN, "--out", here)[0] == 143
    assert common.read_checkpoint(f"{here}/prior/last.pt")["step"] in (3, 4)
    assert not (here / "last.pt").exists()
    monkeypatch.undo()

    stop_in("learned", monkeypatch)
    assert cli(*RUN, "--out", here)[0] == 143
    assert common.read_checkpoint(f"{here}/last.pt")["step"] in (3, 4)
    monkeypatch.undo()
    before = (here / "prior" / "last.pt").read_bytes()
    assert cli("--out", here, "--resume")[0] == 0
    assert (here / "prior" / "last.pt").read_bytes() == before

    found = common.read_checkpoint(f"{here}/last.pt")
    assert log_of(here) == log_of(out) and log_of(here / "prior") == log_of(out / "prior")
    for name in ("encoder", "decoder", "generator", "discriminator", "optimizer", "discriminator_optimizer"):
        assert_same(found[name], wanted[name])


def test_a_prior_goes_on_only_with_its_own_options_and_a_wrong_path_costs_nothing(finished, cli, tmp_path):
    here = tmp_path / "run"
    shutil.copytree(finished[0], here)
    before = (here / "last.pt").read_bytes()
    code, _, stderr = cli(*RUN, "--out", here, "--overwrite", "--init", "nowhere.pt")
    assert code == 2 and "nowhere.pt" in stderr and (here / "last.pt").read_bytes() == before
    for name in ("last.pt", "args.json"):                                   # as if stopped in its prior
        (here / name).unlink()
    for other in (["--crop", 0.5], ["--no-flip"], ["--norm-pixels"]):
        code, _, stderr = cli(*RUN, "--out", here, *other)
        assert code == 2 and "options" in stderr and not (here / "last.pt").exists()


def test_more_epochs_do_not_train_the_prior_further(finished, cli, tmp_path):
    here = tmp_path / "run"
    shutil.copytree(finished[0], here)
    before = (here / "prior" / "last.pt").read_bytes()
    epochs = common.read_checkpoint(here / "last.pt")["args"]["epochs"]
    assert cli("--out", here, "--resume", "--epochs", epochs + 1)[0] == 0
    assert (here / "prior" / "last.pt").read_bytes() == before
    assert len(log_of(here)) == len(log_of(finished[0])) + 1


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (2, 9), (3, 14)])
def test_small_grids_have_a_discriminator_that_sees_all_patches(grid):
    boxes = automae.random_boxes(2, grid, "cpu").requires_grad_()
    automae.make_discriminator(grid)(boxes).sum().backward()
    assert (boxes.grad != 0).all()


def test_maps_without_objects_leave_no_nan():
    hint, mask, objects = draw_attention(3, 4, 16), torch.ones(3, 16), torch.zeros(3, 16, 16)
    found = automae.where_it_hides(tiny(heads=4), hint, mask, objects)
    assert all(value.isfinite() for value in found.values())


def test_stopped_in_its_prior_a_new_run_does_not_turn_into_the_one_it_replaces(
        finished, cli, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "run")
    words = [*RUN, "--seed", 1, "--overwrite", "--out", tmp_path / "run"]
    stop_in("random", monkeypatch)
    assert cli(*words)[0] == 143
    monkeypatch.undo()
    find_hint, seen = automae.find_hint, []
    monkeypatch.setattr(
        automae, "find_hint", lambda args, *others: seen.append(args.masking) or find_hint(args, *others))
    assert cli(*words, "--resume")[0] == 0
    assert seen.count("random") < 2 * 8                                     # the prior went on
    for name in ("last.pt", "prior/last.pt"):
        saved = common.read_checkpoint(tmp_path / "run" / name)
        assert saved["args"]["seed"] == 1 and saved["step"] == 8


def test_one_step_equals_one_by_hand(finished, tmp_path):
    """Of two micro-batches. The discriminator learns boxes → 1 and masks → 0, and steps in the last of them;
    then the others learn."""
    words = [*RUN, "--limit", "16", "--epochs", "1", "--prior", f"{finished[0]}/prior/last.pt", "--out"]
    automae.main([*words, f"{tmp_path}/found"])
    found = common.read_checkpoint(f"{tmp_path}/found/last.pt")
    assert not (tmp_path / "found" / "prior").exists()

    words.append(f"{tmp_path}/hand")
    args = common.parse_args(automae.options(), "automae", lambda args, kind: automae.SMALL, words)
    run = common.Run(args)
    train, _ = map(common.label_objects, common.prepare_data(args, run))
    run.start(16)
    prior = common.load_encoder(args.prior).eval()
    args.mean, args.std = prior.mean, prior.std                             # as in the prior's training
    torch.manual_seed(0)
    encoder = common.ViT(16, 4, embed_dim=128, depth=4, num_heads=4)
    decoder = common.Decoder(encoder, 64, 1, 4)
    generator, discriminator = automae.make_generator(4, (4, 4)), automae.make_discriminator((4, 4))
    model = automae.AutoMAE(encoder, decoder, generator, norm_pixels=False)
    learned = [p for group in common.decay_groups(model, 0.05) for p in group["params"]]
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-2 * 16 / 256, betas=(0.9, 0.95))
    gradients = []
    for images, _ in common.batches(train, common.training_plan(torch.arange(16), run), run, train=True):
        hint = prior.attention_map(images).detach()
        fake = F.gumbel_softmax(generator(hint)).detach()
        real = automae.random_boxes(8, (4, 4), "cpu")
        loss = (discriminator(real) - 1) ** 2 + discriminator(fake) ** 2
        (loss.mean() / 2).backward()
        if gradients:
            adam.step()
        loss, _, _, soft_mask = model(images, hint)
        loss = loss + 0.2 * ((discriminator(soft_mask) - 1) ** 2).mean()
        gradients.append(torch.autograd.grad(loss / 2, learned))

    # After one step Adam's moving average is a tenth of the gradient.
    judged = [p.grad for p in discriminator.parameters()]
    for name, wanted in (("discriminator_optimizer", judged), ("optimizer", map(sum, zip(*gradients)))):
        for state, gradient in zip(found[name]["state"].values(), wanted, strict=True):
            torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-8)


def test_attention_alone_highlights_where_it_is_highest():
    attention, args = draw_attention(5, 4, 16), argparse.Namespace(masking="attention")
    found = automae.find_hint(args, lambda images: attention, None, None, argparse.Namespace(num_visible=4))
    for row, values in zip(found, attention.mean(dim=1)):
        assert set(row.nonzero().flatten().tolist()) == set(values.topk(4).indices.tolist())


def test_init_continues_from_an_encoder(finished, cli, tmp_path):
    init = ["--init", finished[0] / "last.pt", "--lr", 0, "--masking", "random"]
    assert cli(*RUN[4:], *init, "--out", tmp_path)[0] == 0                  # size and patch are the encoder's
    assert_same(common.read_checkpoint(f"{tmp_path}/last.pt")["encoder"], finished[1]["encoder"])


def test_other_maskings(finished, cli, tmp_path):
    hidden = {}
    for masking in ("boxes", "random", "attention"):
        code, _, stderr = cli(*RUN, "--masking", masking, "--prior", finished[0] / "prior/last.pt",
                              "--out", tmp_path / masking, "--mask-factor", 1)
        assert code == 0, stderr
        line = log_of(tmp_path / masking)[-1]
        hidden[masking] = line["hidden_foreground"] - line["hidden_background"]
        assert "generator_loss" not in line
    assert hidden["boxes"] > 0.1 > abs(hidden["random"])


def test_boxes_need_data_with_maps(tmp_path):
    images = common.InMemoryImages(torch.zeros(8, 3, 16, 16).byte(), [0] * 8, "a")
    with pytest.raises(common.UserError, match="--masking"):
        automae.main([*RUN, "--masking", "boxes", "--out", str(tmp_path)], images)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_in_16_bits(precision, finished, cli, tmp_path):
    prior = finished[0] / "prior" / "last.pt"
    assert cli(*RUN, "--epochs", 1, "--precision", precision, "--prior", prior, "--out", tmp_path)[0] == 0
