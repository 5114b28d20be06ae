"""mra.py: what it paints, its losses, samples and episodes against slow loops; its runs; its answers to bad input."""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import common
import mae
import mra
from test_common import shake, steps
from test_mae import (SMALL, class_folders, cut, epochs_of, finish, log_of, losses, paint_folder, saved, start, tensors)
from test_mixedae import slow_token

start = functools.partial(start, script=mra)
MEAN, STD = (120.0, 100.0, 90.0), (60.0, 50.0, 70.0)                                    # the augmentor's own
OTHER = dict(mean=(110.0, 130.0, 80.0), std=(40.0, 70.0, 55.0))
UNIT = dict(mean=0, std=255)                                                            # pictures of 0 … 1
COUNT, PER_EPOCH, FIRST = 160, 5, 5                                                     # pictures; steps of an epoch; augmentor's
ANY = [*SMALL, *f"--limit {COUNT} --epochs 2 --batch 24 --micro-batch 12 --warmup 0.5 --workers 0 --device cpu".split()]
RUN = [*"--labels 12 --classifier conv4".split(), *ANY]                                 # 16 places
ALONE = [*RUN, "--augmentor-epochs", "1"]                                               # trains an augmentor first
SEMI = ["--task", "semi", *RUN, *"--limit 80 --labels 4 --batch 2 --micro-batch 1".split()]    # 5 steps an epoch, too
FEWSHOT = ["--task", "fewshot", *RUN, *"--epochs 1 --ways 3 --queries 4 --shots 1 2 --episodes 40 --copies 2".split()]

# ------------------------------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def tiny(grid=(4, 4), channels=3, dtype=torch.float32, **how):
    """An MRA of some thousand parameters, none of them 0 or 1, for pictures of grid × 4 pixels."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, channels, dim=16, depth=2, heads=2)
    decoder = common.Decoder(encoder, 8, 1, 2)
    shake(encoder, 0.3), shake(decoder, 0.3)
    return mra.MRA(encoder, decoder, own=(MEAN[:channels], STD[:channels]), **how).to(dtype)

def normal(pixels, mean=MEAN, std=STD):
    """Pixels 0 … 255 (B, C, H, W) → normalised."""
    mean, std = (torch.as_tensor(values, dtype=pixels.dtype).view(-1, 1, 1)[:pixels.shape[1]] for values in (mean, std))
    return (pixels - mean) / std

def pixels_of(images, mean=MEAN, std=STD):
    mean, std = (torch.as_tensor(values, dtype=images.dtype).view(-1, 1, 1)[:images.shape[1]] for values in (mean, std))
    return images * std + mean

def pictures(count, grid=(4, 4), channels=3, dtype=torch.float32):
    """Pixels 0 … 255, float."""
    return torch.randint(0, 256, (count, channels, 4 * grid[0], 4 * grid[1])).to(dtype)

def changed(before, after, patch=4):
    """Where any pixel of a patch is another: bool (B, N)."""
    return torch.tensor([[not torch.equal(*both) for both in zip(cut(a, patch), cut(b, patch))] for a, b in zip(before, after)])

def slow_attention(model, image):
    """image (C, H, W) in the augmentor's own normalisation → (N,), by the definition."""
    vit = model.painter.encoder
    places, d = vit.grid[0] * vit.grid[1], vit.dim // vit.blocks[0].attn.heads
    x = torch.stack([(vit.cls_token + vit.pos_embed[:, :1])[0, 0], *(slow_token(model.painter, image, k) for k in range(places))])
    for block in list(vit.blocks)[:-1]:
        x = block(x[None])[0]
    last, heads = vit.blocks[-1], []
    qkv = last.norm1(x) @ last.attn.qkv.weight.T + last.attn.qkv.bias
    for h in range(vit.dim // d):
        query, keys = qkv[0, h * d:(h + 1) * d], qkv[:, vit.dim + h * d:vit.dim + (h + 1) * d]
        heads.append(torch.stack([query @ key / math.sqrt(d) for key in keys]).softmax(0)[1:])
    return torch.stack(heads).mean(0)

def slow_painting(model, image, kept):
    """image (C, H, W) in the augmentor's own normalisation, places that it sees → every patch (C, P, P) as decoded."""
    vit, decoder = model.painter.encoder, model.painter.decoder
    places = vit.grid[0] * vit.grid[1]
    seen = torch.stack([(vit.cls_token + vit.pos_embed[:, :1])[0, 0], *(slow_token(model.painter, image, k) for k in kept)])
    latent = decoder.decoder_embed(vit.norm(vit.blocks(seen[None])))[0]
    rows = [latent[0], *(latent[1 + kept.index(k)] if k in kept else decoder.mask_token[0, 0] for k in range(places))]
    painted = decoder.decoder_norm(decoder.decoder_blocks((torch.stack(rows) + decoder.decoder_pos_embed[0])[None]))[0, 1:]
    return [decoder.decoder_pred(row).view(vit.patch, vit.patch, -1).permute(2, 0, 1) for row in painted]

def one_line(errors):
    """The only line on stderr."""
    assert re.fullmatch(r"mra\.py: error: .+\n", errors), errors
    return errors

def equal(one, two):
    """Every leaf of two trees, bit for bit."""
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(
        torch.equal(leaf, two[name]) if torch.is_tensor(leaf) else leaf == two[name] for name, leaf in one.items())

def assert_same_run(one, two, *parts):
    """Checkpoints equal bit for bit in these parts, logs in all but times, and the pictures."""
    assert all(equal(saved(one)[part], saved(two)[part]) for part in parts)
    facts = [[{name: line[name] for name in line if name not in ("images_per_s", "seconds")} for line in log_of(out)]
             for out in (one, two)]
    assert facts[0] == facts[1]
    assert not Path(one, "augmentation.png").exists() or (
        Path(one, "augmentation.png").read_bytes() == Path(two, "augmentation.png").read_bytes())

def interrupt(patch, folder, save, end, ask=False):
    """The run in `folder` saves after `save` steps and ends at once after `end`, or (`ask`) is sent SIGTERM then."""
    after = common.Run.after_step

    def after_step(run):
        if run.out == str(folder):
            run.look = 0 if run.step in (save, end) else math.inf
            run.due = 0 if run.step == save else math.inf
            if run.step == end and ask:
                os.kill(os.getpid(), signal.SIGTERM)
            elif run.step == end:
                raise KeyboardInterrupt
        after(run)
    patch.setattr(common.Run, "after_step", after_step)

def count_steps(patch):
    """→ a list that fills with the name of each run that makes a step."""
    after, seen = common.Run.after_step, []
    patch.setattr(common.Run, "after_step", lambda run: (seen.append(Path(run.out).name), after(run)))
    return seen

# ---------------------------------------------------------------------------------------------------------- the augmentation

@pytest.mark.parametrize("how", [{}, OTHER, UNIT])
@pytest.mark.parametrize("grid, channels", [((4, 4), 3), ((3, 5), 1)])
def test_exactly_as_many_patches_are_painted_as_the_ratio_says_and_the_others_are_the_same_bits(grid, channels, how):
    how = {name: value[:channels] if isinstance(value, tuple) else value for name, value in how.items()}
    images = normal(pictures(6, grid, channels), how.get("mean", MEAN), how.get("std", STD))
    places = grid[0] * grid[1]
    for strategy, ratio in itertools.product(mra.STRATEGIES, (0.1, 0.25, 0.4, 0.5, 0.75, 0.9)):
        before = images.clone()
        augmented = tiny(grid, channels, strategy=strategy, mask_ratio=ratio, **how)(images)
        assert augmented.shape == images.shape and augmented.dtype == images.dtype
        assert (changed(images, augmented).sum(1) == places - int(places * (1 - ratio))).all()
        assert torch.equal(images, before)                                               # not in place

def test_attention_equals_a_slow_formula():
    for how in ({}, OTHER):
        model, pixels = tiny((3, 4), dtype=torch.float64, **how), pictures(5, (3, 4), dtype=torch.float64)
        found = model.attention(normal(pixels, **how))
        assert found.shape == (5, 12) and (found > 0).all() and (found.sum(1) < 1).all()     # the rest is the class token's
        wanted = torch.stack([slow_attention(model, image) for image in normal(pixels)])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)         # returned as float32

@pytest.mark.parametrize("strategy", ["low", "high"])
def test_low_hides_what_is_least_attended_to_and_high_what_is_most(strategy):
    model, images = tiny((4, 6), strategy=strategy), normal(pictures(8, (4, 6)))
    hidden = changed(images, model(images))
    for image, mask in zip(images, hidden):
        attention = slow_attention(model, image)
        if strategy == "low":
            assert attention[mask].max() <= attention[~mask].min()
        else:
            assert attention[mask].min() >= attention[~mask].max()
    assert len(hidden.unique(dim=0)) > 1                                                 # pictures differ
    assert torch.equal(hidden, changed(images, model(images)))                           # and nothing is random

def test_random_hides_other_patches_of_each_picture_and_in_each_call():
    model, images = tiny((4, 6), strategy="random"), normal(pictures(1, (4, 6)).repeat(8, 1, 1, 1))
    both = torch.cat([changed(images, model(images)), changed(images, model(images))])
    assert len(both.unique(dim=0)) == 16                                                 # two alike are unlikely, and seeded

@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("how", [{}, OTHER, UNIT])
def test_what_is_painted_equals_the_transformers_step_by_step(how, whole):
    model, pixels = tiny((3, 4), dtype=torch.float64, whole=whole, **how), pictures(4, (3, 4), dtype=torch.float64)
    images = normal(pixels, **how)
    augmented = model(images)
    for image, own, result in zip(images, normal(pixels), augmented):
        order = slow_attention(model, own).argsort().tolist()
        hidden = order[:12 - 7]                                                          # int(12 · 0.6) = 7 are kept
        painting = slow_painting(model, own, sorted(set(range(12)) - set(hidden)))
        for place, (before, after) in enumerate(zip(cut(image), cut(result))):
            if place in hidden or whole:
                wanted = pixels_of(painting[place]).clamp(0, 255)
                found = pixels_of(after, **how) if how else pixels_of(after)
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)             # of 255; the prediction was float32
            else:
                assert torch.equal(after, before)

def test_with_whole_every_patch_comes_from_the_decoder():
    images = normal(pictures(4))
    augmented = tiny(whole=True)(images)
    assert changed(images, augmented).all()
    hidden = changed(images, tiny()(images))
    for whole, part, mask in zip(augmented, tiny()(images), hidden):
        assert all(torch.equal(*both) for both, painted in zip(zip(cut(whole), cut(part)), mask) if painted)

def test_one_normalisation_or_another_leads_to_the_same_pixels():
    pixels, found = pictures(6), []
    for how in ({}, OTHER, UNIT, dict(mean=0, std=1), dict(mean=torch.tensor(MEAN), std=list(STD))):
        found.append(pixels_of(tiny(**how)(normal(pixels, **how) if how else normal(pixels)), **how))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-2)                   # of 255, float32 through ten layers

@pytest.mark.parametrize("how", [{}, OTHER, UNIT])
def test_a_wild_decoder_still_paints_valid_pixels(how):
    model = tiny(**how)
    with torch.no_grad():
        model.painter.decoder.decoder_pred.weight *= 1e4
    images = normal(pictures(6), **how)
    augmented = pixels_of(model(images), **how)
    assert augmented.isfinite().all() and augmented.min() > -1e-3 and augmented.max() < 255 + 1e-3     # a float's digits of 255
    painted = augmented[(augmented - pixels_of(images, **how)).abs() > 1]
    assert (painted < 1e-3).any() and (painted > 255 - 1e-3).any()                       # it was wild
    if how is UNIT:
        assert model(images).min() >= 0 and model(images).max() <= 1                     # exactly

def test_nothing_of_the_augmentor_learns_and_a_classifier_behind_it_does():
    model, images = tiny(), normal(pictures(4)).requires_grad_()
    net = nn.Sequential(model, nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    augmented = model(images)
    assert not augmented.requires_grad and not augmented.is_inference()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    F.cross_entropy(net(images), torch.arange(4)).backward()
    assert net[2].weight.grad.abs().max() > 0 and images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    optimizer.step()
    assert equal(dict(model.state_dict()), before)

def test_training_mode_around_it_changes_nothing():
    model, images = tiny(), normal(pictures(4))
    augmented = model(images)
    assert torch.equal(nn.Sequential(model).train()(images), augmented)

def test_apply_0_changes_nothing_and_one_half_every_second_picture_as_a_whole():
    images = normal(pictures(400))
    assert torch.equal(tiny(apply=0.0)(images), images) and torch.equal(tiny(apply=0.0, whole=True)(images), images)
    hidden, other = (changed(images, tiny(apply=0.5)(images)).sum(1) for _ in range(2))
    assert set(hidden.tolist()) == {0, 16 - 9}                                           # int(16 · 0.6) = 9
    assert abs((hidden > 0).sum() - 200) < 40                                            # four standard errors of 10
    model = tiny(apply=0.5)
    assert (changed(images, model(images)).any(1) != changed(images, model(images)).any(1)).any()    # each call anew

def test_half_precision_pictures_stay_so_and_keep_their_bits():
    images = normal(pictures(4)).bfloat16()
    augmented = tiny()(images)
    assert augmented.dtype == torch.bfloat16 and (changed(images, augmented).sum(1) <= 7).all()
    images = normal(pictures(4))
    with torch.autocast("cpu", torch.bfloat16):
        augmented = tiny()(images)
    assert augmented.dtype == torch.float32 and (changed(images, augmented).sum(1) == 7).all()

@pytest.mark.parametrize("names", ["none", "mra", "cutout", "mra+cutout"])
def test_labels_stay_and_cutout_drops_a_quarter_after_mra(names):
    images, labels, calls = normal(pictures(8)), torch.arange(8), []
    paint = lambda x: (calls.append(x), x + 1)[1]
    change, augment = mra.augmentation(argparse.Namespace(augment=names, classes=range(8)), paint)
    found, same = augment(images, labels)
    assert same is labels and change is None and len(calls) == ("mra" in names)
    wanted = images + 1 if "mra" in names else images
    for image, result in zip(wanted, found):
        gone = (result == 0).all(0)
        assert gone.sum() == (64 if "cutout" in names else 0) and torch.equal(result[:, ~gone], image[:, ~gone])
        if "cutout" in names:
            rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
            assert len(rows) == len(columns) == 8 and gone[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
    assert "cutout" not in names or len((found == 0).all(1).unique(dim=0)) > 1           # each picture its own

@pytest.mark.parametrize("names", ["cutmix", "mixup", "mra+cutmix", "cutmix+mixup"])
def test_mixed_pictures_have_the_labels_of_both(names):
    images, labels = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16), torch.arange(8)
    _, augment = mra.augmentation(argparse.Namespace(augment=names, classes=range(8)), lambda x: x)
    found, shares = augment(images, labels)
    assert shares.shape == (8, 8) and shares.sum(1).tolist() == pytest.approx([1] * 8)
    torch.testing.assert_close(found.mean((1, 2, 3)), shares @ torch.arange(8.0))        # of a picture's pixels, too

def test_randaugment_changes_single_pictures_of_whole_pixels():
    change, augment = mra.augmentation(argparse.Namespace(augment="randaugment", classes=range(8)), None)
    images = pictures(6).byte()
    results = torch.stack([change(image) for image in images])
    assert results.dtype == torch.uint8 and changed(images, results).any()
    assert torch.equal(augment(images, None)[0], images)

@pytest.mark.parametrize("again", [False, True])
def test_the_augmentation_and_its_training_compile_to_one_graph_each(again, one_graph):
    images, scores = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    one_graph(lambda: tiny(apply=0.5), lambda augment: augment(images), again)
    one_graph(lambda: tiny().painter.train().requires_grad_(), lambda model: model(images, scores)[0], again)

# ------------------------------------------------------------------------------------------------------------------- loading

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run on scenes, its baseline and augmentor with it → its folder, stdout."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        mra.main([*ALONE, "--out", str(out)])
    return out, output.getvalue()

@pytest.fixture(scope="module")
def augmentor(uninterrupted):
    return uninterrupted[0].parent / f"mra-augmentor-scenes-{COUNT}" / "augmentor.pt"

def test_with_crops_the_last_weights_are_measured_and_the_augmentor_is_trained_as_without(uninterrupted, tmp_path, cli):
    shutil.copytree(uninterrupted[0].parent, tmp_path / "there")
    code, output, errors = cli(*ALONE, "--crops", 3, "--no-baseline", "--out", tmp_path / "there" / "crops")
    assert code == 0 and not errors and "first the augmentor" not in output                 # the one that is there will do
    epoch, end = [line for line in log_of(tmp_path / "there" / "crops") if "top1" in line][-2:]
    assert epoch["step"] == end["step"] == 2 * 3 * PER_EPOCH and epoch["top1"] == end["top1"]

def test_three_lines_are_enough(augmentor):
    images = torch.rand(2, 3, 32, 32)
    augment = mra.MRA.load(augmentor, mean=0, std=255)
    augmented = augment(images)
    assert (changed(images, augmented, 8).sum(1) == 16 - 9).all() and augmented.min() >= 0 and augmented.max() <= 1

def test_a_runs_augmentor_is_loaded_with_its_normalisation(augmentor):
    file = torch.load(augmentor, weights_only=True)
    model = mra.MRA.load(augmentor, strategy="high", mask_ratio=0.25)
    assert equal(dict(model.painter.encoder.state_dict()), file["encoder"])
    assert equal(dict(model.painter.decoder.state_dict()), file["decoder"])
    images = normal(255 * torch.rand(4, 3, 32, 32), *(file["args"][name] for name in ("mean", "std")))
    other = mra.MRA.load(str(augmentor), strategy="high", mask_ratio=0.25, **OTHER)
    pixels = pixels_of(images, *(file["args"][name] for name in ("mean", "std")))
    results = pixels_of(model(images), *(file["args"][name] for name in ("mean", "std"))), pixels_of(
        other(normal(pixels, **OTHER)), **OTHER)
    torch.testing.assert_close(*results, rtol=0, atol=1e-2)                              # of 255, float32
    assert (changed(images, model(images), 8).sum(1) == 4).all()

def test_a_mae_without_norm_pixels_is_an_augmentor_and_one_with_them_is_refused(tmp_path, cli):
    words = [*SMALL, *"--limit 32 --epochs 1 --batch 16 --bank 0 --device cpu".split()]
    for switch in ("--no-norm-pixels", "--norm-pixels"):
        assert cli(*words, switch, "--out", tmp_path / switch, script=mae)[0] == 0
    model = mra.MRA.load(tmp_path / "--no-norm-pixels" / "last.pt", **UNIT)
    assert equal(dict(model.painter.encoder.state_dict()), saved(tmp_path / "--no-norm-pixels")["encoder"])
    images = torch.rand(3, 3, 32, 32)
    assert (changed(images, model(images), 8).sum(1) == 7).all()
    with pytest.raises(common.Problem, match="last.pt predicts.*normalised.*no-norm-pixels"):
        mra.MRA.load(tmp_path / "--norm-pixels" / "last.pt")

def released(path, **more):
    encoder = common.ViT(32, 8, 3, dim=64, depth=1, heads=1)
    decoder = common.Decoder(encoder, 32, 1, 16)
    shake(encoder), shake(decoder)
    torch.save({"model": {**encoder.state_dict(), **decoder.state_dict()}, **more}, path)
    return encoder, decoder

def test_a_released_file_is_an_augmentor_of_imagenets_normalisation(tmp_path):
    encoder, decoder = released(tmp_path / "mae.pt")
    model = mra.MRA.load(tmp_path / "mae.pt", **UNIT)
    assert equal(dict(model.painter.encoder.state_dict()), dict(encoder.state_dict()))
    assert equal(dict(model.painter.decoder.state_dict()), dict(decoder.state_dict()))
    images, mean, std = torch.rand(2, 3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = encoder.attention_map(normal(images, mean, std)).mean(1)
    torch.testing.assert_close(model.attention(images), wanted, rtol=1e-3, atol=0)       # the same normalisation but for rounding

@pytest.mark.parametrize("args", [argparse.Namespace(norm_pix_loss=True), dict(norm_pixels=True)])
def test_a_file_that_says_it_predicts_normalised_pixels_is_refused(args, tmp_path):
    released(tmp_path / "mae.pt", args=args)
    with pytest.raises(common.Problem, match="no picture"):
        mra.MRA.load(tmp_path / "mae.pt")
    released(tmp_path / "mae.pt", args=argparse.Namespace(norm_pix_loss=False))
    mra.MRA.load(tmp_path / "mae.pt")

def test_for_another_size_positions_are_resized(augmentor):
    model = mra.MRA.load(augmentor, 64, **UNIT)
    assert model.painter.encoder.grid == model.painter.decoder.grid == (8, 8)
    images = torch.rand(2, 3, 64, 64)
    assert (changed(images, model(images), 8).sum(1) == 64 - 38).all()
    there, here = torch.load(augmentor, weights_only=True), model.painter
    for old, new in ((there["encoder"]["pos_embed"], here.encoder.pos_embed),
                     (there["decoder"]["decoder_pos_embed"], here.decoder.decoder_pos_embed)):
        square = old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        wanted = F.interpolate(square, (8, 8), mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(new[:, 1:], wanted)
    with pytest.raises(common.Problem, match="30.*8"):
        mra.MRA.load(augmentor, 30)

# ------------------------------------------------------------------------------------------------------ samples and losses

@pytest.mark.parametrize("classes, each, imbalance", [(10, 500, 10), (10, 500, 100), (100, 500, 100), (11, 200, 100), (3, 7, 50),
                                                      (2, 1000, 1000), (7, 64, 64)])
def test_a_long_tail_has_exactly_the_usual_counts(classes, each, imbalance):
    labels = torch.arange(classes).repeat(each)[torch.randperm(classes * each)]
    kept = mra.long_tail(labels, imbalance, 0)
    assert len(kept.unique()) == len(kept)
    counts = labels[kept].bincount(minlength=classes).tolist()
    for c, found in enumerate(counts):                                                   # the largest n ≤ each · imb^(−c / (K−1))
        fits = lambda n: n ** (classes - 1) * imbalance ** c <= each ** (classes - 1)    # noqa: B023
        wanted = next(n for n in range(each, -1, -1) if fits(n))
        assert found == max(1, wanted), c
    assert counts[0] == each and counts[-1] == max(1, each // imbalance)

def test_the_seed_decides_what_a_long_tail_keeps_and_imbalance_1_keeps_all():
    labels = torch.arange(4).repeat(50)
    one, same, other = (mra.long_tail(labels, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and set(one.tolist()) != set(other.tolist())
    assert sorted(mra.long_tail(labels, 1.0, 0).tolist()) == list(range(200))
    sparse = torch.tensor([0] * 30 + [2] * 30)                                           # a class without pictures
    assert sparse[mra.long_tail(sparse, 10, 0)].bincount().tolist() == [30, 0, 3]

@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.95])
def test_fixmatchs_loss_equals_a_loop(threshold):
    weak, strong = 2 * torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    total, many = 0.0, 0
    for a, b in zip(weak.tolist(), strong.tolist()):
        chances = [math.exp(value) / sum(map(math.exp, a)) for value in a]
        if max(chances) >= threshold:
            many += 1
            total -= math.log(math.exp(b[chances.index(max(chances))]) / sum(map(math.exp, b)))
    loss, share = mra.fixmatch_loss(weak, strong, threshold)
    assert loss.item() == pytest.approx(total / 40, rel=1e-6) and share.item() == pytest.approx(many / 40)
    assert threshold in (0.0, 0.3) or 0 < many < 40

def test_fixmatchs_gradient_goes_through_the_strong_view_of_sure_pictures_alone():
    weak, strong = torch.tensor([[9.0, 0, 0], [1.0, 0, 0]], requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    loss, share = mra.fixmatch_loss(weak, strong)
    loss.backward()
    assert weak.grad is None and share == 0.5
    assert strong.grad[0].tolist() == pytest.approx([(1 / 3 - 1) / 2, 1 / 6, 1 / 6]) and not strong.grad[1].any()

def test_at_the_threshold_a_picture_counts():
    weak = torch.tensor([[0.0, 0.0], [200.0, 0.0], [0.0, 1.0]])                           # sure to 0.5, 1 and 0.73
    for threshold, many in ((0.5, 3), (0.51, 2), (1.0, 1)):
        loss, share = mra.fixmatch_loss(weak, torch.zeros(3, 2), threshold)
        assert share.item() == pytest.approx(many / 3) and loss.item() == pytest.approx(many / 3 * math.log(2))
    assert mra.fixmatch_loss(weak[:1], torch.zeros(1, 2), 0.9)[0] == 0                   # none counts: 0, not NaN

def test_the_unlabelled_batches_are_so_many_times_as_large_and_shared_alike():
    def plan(rank=0, world=1, times=7, count=100, first=0, **how):
        run = types.SimpleNamespace(args=types.SimpleNamespace(batch=4, epochs=3, seed=7, crops=1), rank=rank, world=world,
                                    micro=1, accumulate=4 // world)
        batches = common.Batches(range(count), run, 8, 0.5, times=times, **how)
        return batches, steps(batches.plan(first), 4 // world)
    (batches, alone), ranks = plan(), [plan(rank, 4)[1] for rank in range(4)]
    assert batches.per_epoch == 100 // 28 and len(alone) == 9
    assert [[micro for part in step for micro in part] for step in zip(*ranks, strict=True)] == alone
    assert all(len(index) == 7 for step in alone for index, _ in step)
    for epoch in range(3):                                                               # none twice in an epoch
        seen = [i for step in alone[3 * epoch:3 * epoch + 3] for index, _ in step for i in index]
        assert len(set(seen)) == len(seen) == 84
    few, longer = plan(times=1, count=12, steps=20)
    assert few.per_epoch == 3 and len(longer) == 20                                      # as often as is needed
    assert sorted(i for step in longer[3:6] for index, _ in step for i in index) == list(range(12))
    assert plan(times=1, count=12, steps=20, first=7)[1] == longer[7:]

# --------------------------------------------------------------------------------------------------------------- few-shot

def uneven(counts=(9, 12, 30, 9, 20, 11)):
    """Labels of classes of so many pictures, numbered 3, 5, 7 …, shuffled."""
    labels = torch.cat([torch.full((count,), 3 + 2 * k) for k, count in enumerate(counts)])
    return labels[torch.randperm(len(labels))]

def test_episodes_ask_about_pictures_they_do_not_show():
    labels = uneven()
    support, query = mra.episodes(labels, 4, 2, 7, 50, seed=3)
    assert support.shape == (50, 4, 2) and query.shape == (50, 4, 7)
    for shown, asked in zip(support, query):
        numbers = [*shown.flatten().tolist(), *asked.flatten().tolist()]
        assert len(set(numbers)) == 4 * 9                                                # no picture twice
        of_support, of_query = labels[shown], labels[asked]
        assert (of_support == of_support[:, :1]).all() and (of_query == of_support[:, :1]).all()
        assert len(of_support[:, 0].unique()) == 4
    assert len({tuple(sorted(labels[shown[:, 0]].tolist())) for shown in support}) > 5   # other classes
    assert len(support.flatten(1).unique(dim=0)) == 50
    assert set(labels[support].flatten().tolist()) == set(labels.tolist())

def test_the_seed_decides_the_episodes_and_torchs_does_not():
    labels = uneven()
    one = mra.episodes(labels, 3, 1, 5, 10, seed=0)
    torch.manual_seed(5)
    same, other = (mra.episodes(labels, 3, 1, 5, 10, seed=seed) for seed in (0, 1))
    assert all(torch.equal(*both) for both in zip(one, same)) and not torch.equal(one[0], other[0])

@pytest.mark.parametrize("ways, shots, queries, says", [(7, 1, 2, "7 classes.*6 classes left"), (6, 1, 9, "1 \\+ 9"),
                                                        (3, 5, 5, "5 \\+ 5.*smallest with 9")])
def test_too_few_classes_or_pictures_for_episodes_are_a_problem(ways, shots, queries, says):
    mra.episodes(uneven(), 6, 1, 8, 2, 0)                                                # just enough
    with pytest.raises(common.Problem, match=says):
        mra.episodes(uneven(), ways, shots, queries, 2, 0)

def clouds(count, ways, shots, queries, dim=6, noise=0.8, dtype=torch.float64):
    """Features of length 1 around random centres → support, query."""
    centres = torch.randn(count, ways, 1, dim, dtype=dtype)
    return F.normalize(centres + noise * torch.randn(count, ways, shots + queries, dim, dtype=dtype), dim=-1).split(
        [shots, queries], dim=2)

def test_nearest_centroid_equals_a_loop():
    support, query = clouds(20, 4, 3, 7)
    slow = []
    for shown, asked in zip(support, query):
        right = 0
        for k, pictures_of in enumerate(asked):
            for x in pictures_of:
                distances = [((x - sum(of_class) / 3) ** 2).sum().item() for of_class in shown]
                right += distances.index(min(distances)) == k
        slow.append(right / 28)
    assert mra.nearest_centroid(support, query).tolist() == pytest.approx(slow)
    assert 0.3 < sum(slow) / 20 < 0.95

def newton(x, y, ways):
    """One episode's logistic regression: cross entropies' sum + half the squared weights, bias free → loss, weights, bias."""
    dim, D = x.shape[1], x.shape[1] + 1
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    def loss(flat):
        both = flat.view(D, ways)
        return F.cross_entropy(ones @ both, y, reduction="sum") + both[:dim].square().sum() / 2
    flat = torch.zeros(D * ways, dtype=x.dtype)
    for _ in range(20):
        slope, bend = torch.autograd.functional.jacobian(loss, flat), torch.autograd.functional.hessian(loss, flat)
        flat = flat - torch.linalg.pinv(bend) @ slope                                    # biases may all move together
    assert torch.autograd.functional.jacobian(loss, flat).norm() < 1e-9
    return loss(flat).item(), *flat.view(D, ways).split([dim, 1])

def test_logistic_regression_equals_newtons_method_episode_by_episode(monkeypatch):
    support, query = (part.float() for part in clouds(5, 3, 4, 10))
    real, solved = torch.optim.LBFGS, []
    monkeypatch.setattr(torch.optim, "LBFGS", lambda unknown, **how: (solved.extend(unknown), real(unknown, **how))[1])
    with torch.no_grad():                                                                # as an evaluation calls it
        right = mra.logistic_regression(support, query)
    (weights, bias), y = solved, torch.arange(3).repeat_interleave(4)
    for k in range(5):
        x, asked = support[k].flatten(0, 1).double(), query[k].flatten(0, 1).double()
        best, w, b = newton(x, y, 3)
        found = F.cross_entropy((x @ weights[k].double() + bias[k].double()), y, reduction="sum") + weights[k].square().sum() / 2
        assert best - 1e-4 < found.item() < best + 1e-3 * best                           # float32, stopped by its own rule
        scores = asked @ w + b
        sure = scores.topk(2).values.diff(dim=1).abs()[:, 0] > 1e-2                      # a near tie may fall either way
        hits = scores.argmax(1) == torch.arange(3).repeat_interleave(10)
        assert abs(right[k].item() - hits.float().mean().item()) <= (~sure).sum() / 30 + 1e-6
    assert not right.requires_grad and 0.4 < right.mean() <= 1

def test_of_classes_numbers_anew_and_leaves_the_original_alone():
    data = common.Scenes(40, 16)
    images, labels, masks = data.images.clone(), data.labels.clone(), data.masks.clone()
    part = mra.of_classes(data, [2, 5, 9])
    where = torch.tensor([k for k in range(40) if labels[k] in (2, 5, 9)])
    assert part.classes == [list(common.SHAPES)[k] for k in (2, 5, 9)] and len(part) == 12
    assert part.labels.tolist() == [(2, 5, 9).index(label) for label in labels[where].tolist()]
    assert torch.equal(part.images, images[where]) and torch.equal(part.masks, masks[where])
    assert len(data) == 40 and data.classes == list(common.SHAPES)
    assert all(torch.equal(*both) for both in ((data.images, images), (data.labels, labels), (data.masks, masks)))

# ------------------------------------------------------------------------------------------------------------- classifiers

def test_conv4_sees_colours_or_grey_and_its_head_gets_its_features():
    for channels, size in ((3, 32), (1, 28), (3, 64)):
        net, images = mra.Classifier("conv4", 7, channels, size).eval(), torch.randn(2, channels, size, size)
        features = net.features(images)
        assert features.shape == (2, 64) and net(images).shape == (2, 7)
        torch.testing.assert_close(net(images), features @ net.head.weight.T + net.head.bias)
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.modules()) == 4

@pytest.mark.parametrize("name, width", [("resnet18", 512), ("mobilenet_v3_small", 1024), ("vit_b_16", 768), ("vgg11", 4096),
                                         ("densenet121", 1024), ("swin_t", 768), ("convnext_tiny", 768),
                                         ("efficientnet_b0", 1280)])
@pytest.mark.parametrize("channels", [3, 1])
def test_torchvisions_classifiers_go_by_name(name, width, channels):
    with torch.device("meta"):                                                           # shapes alone
        net = mra.Classifier(name, 7, channels, 64).eval()
        images = torch.zeros(2, channels, 64, 64)
        assert net.features(images).shape == (2, width) and net(images).shape == (2, 7)
        assert net.head.out_features == 7 and net.head.in_features == width

def test_it_is_torchvisions_net_and_grey_is_three_times_the_same():
    grey, net = mra.Classifier("mobilenet_v3_small", 7, 1, 32).eval(), mra.Classifier("mobilenet_v3_small", 7, 3, 32).eval()
    plain = torchvision.models.mobilenet_v3_small(num_classes=7).eval()
    for mine in (grey, net):
        plain.classifier[3] = nn.Identity()
        plain.load_state_dict(mine.body.state_dict())                                    # strict
        plain.classifier[3] = mine.head
        images = torch.randn(2, 3 if mine is net else 1, 32, 32)
        assert torch.equal(mine(images), plain(images if mine is net else torch.cat([images] * 3, dim=1)))

@pytest.mark.parametrize("name, near", [("resnet81", "resnet18"), ("conv5", "conv4"), ("vit_b16", "vit_b_16"),
                                        ("qqqq", "resnet18")])
def test_an_unknown_classifier_is_a_problem_that_suggests(name, near):
    with pytest.raises(common.Problem, match=f"{name}.*{near}"):
        mra.Classifier(name, 7, 3, 32)

@pytest.mark.parametrize("name, size", [("vit_b_16", 40), ("alexnet", 32)])
def test_a_classifier_that_cannot_take_the_size_is_a_problem(name, size):
    with pytest.raises(common.Problem, match=f"{name}.*{size}"), torch.device("meta"):
        mra.Classifier(name, 7, 3, size)(torch.zeros(2, 3, size, size))

@pytest.mark.parametrize("strategy", mra.STRATEGIES)
def test_exactly_the_share_of_patches_is_dropped_by_the_order_of_attention(strategy):
    model, images = tiny((4, 6)), normal(pictures(5, (4, 6)))
    attention, before = model.attention(images), None
    scores = mra.STRATEGIES[strategy](attention)
    for share in (0, 0.1, 0.25, 0.5, 0.9):
        result = mra.drop(model, images, scores, share)
        gone = torch.tensor([[not patch.any() for patch in cut(image)] for image in result])
        assert (gone.sum(1) == round(share * 24)).all()
        for image, seen, mask, look in zip(images, result, gone, attention):
            assert all(torch.equal(*both) for both, away in zip(zip(cut(image), cut(seen)), mask) if not away)
            if mask.any() and strategy == "low":
                assert look[mask].max() <= look[~mask].min()
            if mask.any() and strategy == "high":
                assert look[mask].min() >= look[~mask].max()
        assert before is None or (gone | ~before).all()                                  # what is gone stays gone
        assert share or torch.equal(result, images)
        before = gone
    if strategy == "random":
        images = images[:1].repeat(8, 1, 1, 1)
        found = mra.drop(model, images, mra.STRATEGIES[strategy](model.attention(images)), 0.5)
        assert len((found == 0).all(1).unique(dim=0)) == 8

def test_classes_are_grouped_by_how_many_pictures_they_had():
    counts, right, asked = (150, 101, 100, 50, 20, 19, 1), (9, 5, 4, 8, 6, 2, 1), (10, 10, 8, 10, 10, 8, 10)
    confusion = torch.zeros(7, 7, dtype=torch.long)
    for k in range(7):
        confusion[k, k], confusion[k, (k + 1) % 7] = right[k], asked[k] - right[k]
    train = types.SimpleNamespace(labels=torch.arange(7).repeat_interleave(torch.tensor(counts)), classes=range(7))
    group = lambda train: mra.by_size(types.SimpleNamespace(result=lambda: (0, 0, confusion)), train)
    wanted = {"many_shot": (0.9 + 0.5) / 2, "medium_shot": (0.5 + 0.8 + 0.6) / 3, "few_shot": (0.25 + 0.1) / 2}
    assert group(train) == pytest.approx(wanted)
    confusion[6] = 0                                                                     # of which nothing is known
    assert group(train) == pytest.approx(wanted | {"few_shot": 0.25})
    train.labels = torch.arange(7).repeat(30)
    assert group(train).keys() == {"medium_shot"}                                        # none without classes, no NaN

# --------------------------------------------------------------------------------------------------------------- runs, whole

def test_a_run_leaves_what_the_design_says(uninterrupted, augmentor):
    out, output = uninterrupted
    names = {"last.pt", "log.jsonl", "args.json"}
    assert {path.name for path in out.iterdir()} == names | {"best.pt", "augmentation.png", "baseline"}
    assert {path.name for path in (out / "baseline").iterdir()} == names | {"best.pt", "result.pt"}
    assert {path.name for path in augmentor.parent.iterdir()} == names | {"augmentor.pt"}
    lines, plain = log_of(out), log_of(out / "baseline")
    assert [(line["epoch"], line["step"]) for line in epochs_of(out)] == [(1, PER_EPOCH), (2, 2 * PER_EPOCH)]
    assert len(losses(out / "baseline")) == 2 and losses(out) != losses(out / "baseline")
    assert len(losses(augmentor.parent)) == 1 and epochs_of(augmentor.parent)[0]["step"] == FIRST
    assert lines[-1]["top1"] == lines[2]["top1"] and lines[-1]["top1_without_mra"] == plain[-1]["top1"]
    assert lines[2]["best_top1"] == max(line["top1"] for line in epochs_of(out)) and len(lines[2]["class_accuracy"]) == 10
    assert f"without MRA {plain[-1]['top1']:.3f}, with MRA {lines[-1]['top1']:.3f}" in output and str(augmentor) in output
    assert json.loads((out / "args.json").read_text())["classes"] == list(common.SHAPES)
    assert {"classifier", "optimizer", "step", "args"} <= saved(out).keys()
    best = torch.load(out / "best.pt", weights_only=True)
    mra.Classifier("conv4", 10, 3, 32).load_state_dict(best["classifier"])               # strict
    assert best["top1"] == lines[2]["best_top1"]

def test_how_much_foreground_is_kept_equals_a_loop(uninterrupted, augmentor):
    kept = next(line["foreground_kept"] for line in log_of(uninterrupted[0]) if "foreground_kept" in line)
    val = common.open_data(size=32, limit=COUNT)[1]
    index = torch.linspace(0, COUNT - 1, COUNT).long()
    args = saved(uninterrupted[0])["args"]
    model = mra.MRA.load(augmentor, mean=args["mean"], std=args["std"])
    attention, total, left = model.attention(val.normalise(val.images[index])), 0.0, dict(low=0.0, high=0.0)
    for mask, look in zip(val.masks[index], attention.tolist()):
        there = [patch.float().mean().item() for patch in cut(mask[None], 8)]
        order, total = sorted(range(16), key=lambda place: look[place]), total + sum(there)      # noqa: B023
        left["low"] += sum(there[place] for place in order[7:])                          # of 16 patches 9 stay
        left["high"] += sum(there[place] for place in order[:9])
    for name in left:
        assert kept[name] == pytest.approx(left[name] / total, abs=1e-4)                 # sums in float32
    assert kept["random"] == pytest.approx(9 / 16, abs=0.05)                             # some three standard errors

def test_the_pictures_show_what_is_kept_and_what_is_painted(augmentor, tmp_path, cli, monkeypatch):
    sheets = []
    monkeypatch.setattr(mra, "save_sheet", lambda path, rows: sheets.append(rows) or common.save_sheet(path, rows))
    code, _, errors = cli(*RUN, "--epochs", 1, "--no-baseline", "--augmentor", augmentor, "--out", tmp_path / "run")
    assert code == 0 and not errors
    rows = sheets[0]
    assert len({images.shape for images in rows.values()}) == 1 and len(rows) == 2 + 3 * 3 + 3
    for ratio in (0.2, 0.4, 0.6, 0.8):
        for strategy in mra.STRATEGIES if ratio == 0.4 else ("low",):
            title = f"{strategy}{' attention' * (strategy != 'random')}, {ratio:.0%}"
            gone = changed(rows["original"], rows[f"{title}: augmented"], 8)
            assert (gone.sum(1) == 16 - int(16 * (1 - ratio))).all()
            if ratio == 0.4:
                assert torch.equal(gone, changed(rows["original"], rows[f"{title}: hidden"], 8))
                painting = changed(rows[f"{title}: reconstruction"], rows[f"{title}: augmented"], 8)
                assert not (painting & gone).any()
    look = torch.stack([torch.stack([patch[0, 0, 0] for patch in cut(image, 8)]) for image in rows["attention"]])
    gone = changed(rows["original"], rows["low attention, 40%: augmented"], 8)
    assert (look.amax(1) == 255).all() and all(light[mask].max() <= light[~mask].min() for light, mask in zip(look, gone))
    sheet = torchvision.io.decode_image(str(tmp_path / "run" / "augmentation.png"))
    assert sheet.shape[1] >= 14 * 128 and sheet.shape[2] >= 10 * 128

def test_the_augmentor_is_kept_and_serves_the_next_run(uninterrupted, augmentor, cli, monkeypatch):
    """Beside the first run, and with its seed, the second is the same."""
    before, out = augmentor.read_bytes(), uninterrupted[0].parent / "second"
    monkeypatch.setattr(mra, "pretrain", lambda args: pytest.fail("trained again"))
    code, output, errors = cli(*ALONE, "--no-baseline", "--out", out)
    assert code == 0 and not errors and "first the augmentor" not in output and augmentor.read_bytes() == before
    assert equal(saved(out)["classifier"], saved(uninterrupted[0])["classifier"]) and losses(out) == losses(uninterrupted[0])
    assert all("top1_without_mra" not in line for line in log_of(out)) and not (out / "baseline").exists()
    code, _, errors = cli(*RUN, "--no-baseline", "--augmentor-epochs", 2, "--out", uninterrupted[0].parent / "third")
    assert code == 2 and "another epochs" in one_line(errors) and augmentor.read_bytes() == before

def test_another_seed_trains_another_classifier(uninterrupted, augmentor, tmp_path, cli):
    flags = ["--epochs", 1, "--no-baseline", "--augmentor", augmentor, "--seed", 1]
    assert cli(*RUN, *flags, "--out", tmp_path / "run")[0] == 0
    assert losses(tmp_path / "run")[0] != losses(uninterrupted[0])[0]

FEW = "--limit 80 --labels 6 --epochs 1".split()                                         # 2 steps

def test_every_augmentation_runs_and_trains_in_its_own_way(augmentor, tmp_path, cli):
    found, names = {}, [*mra.AUGMENTS, "mra+cutmix"]
    for name in names:
        out = tmp_path / name
        words = ["--augment", name, *["--augmentor", augmentor] * ("mra" in name)]
        code, _, errors = cli(*RUN, *FEW, "--no-baseline", *words, "--out", out)
        assert code == 0 and not errors
        assert (out / "augmentation.png").exists() == ("mra" in name)
        (found[name],) = losses(out)
        assert math.isfinite(found[name])
    assert len(set(found.values())) == len(names) == 7

def test_every_option_of_the_augmentation_reaches_the_training(augmentor, tmp_path, cli):
    found = {}
    for flags in ("", "--apply 0", "--apply 0.5", "--whole", "--mask-strategy high", "--mask-ratio 0.75", "--precision bf16"):
        code, _, errors = cli(*RUN, *FEW, "--no-baseline", "--augmentor", augmentor, *flags.split(), "--out", tmp_path / flags)
        assert code == 0 and not errors
        (found[flags],) = losses(tmp_path / flags)
    assert len(set(found.values())) == 7

def test_apply_0_is_training_without(uninterrupted, augmentor, tmp_path, cli):
    assert cli(*RUN, "--no-baseline", "--augmentor", augmentor, "--apply", 0, "--out", tmp_path / "run")[0] == 0
    assert equal(saved(tmp_path / "run")["classifier"], saved(uninterrupted[0] / "baseline")["classifier"])

def test_a_long_tail_tells_many_medium_and_few(tmp_path, cli):
    out = tmp_path / "run"
    code, output, errors = cli(*RUN, *"--limit 1200 --labels 120 --imbalance 10 --augment none --epochs 1".split(), "--out", out)
    assert code == 0 and not errors
    counts, line = [int(120 * 10 ** (-c / 9) + 1e-9) for c in range(10)], log_of(out)[-1]
    assert f"learn from {sum(counts)} pictures" in output and "many_shot" in output
    for name, group in (("many", range(0, 1)), ("medium", range(1, 8)), ("few", range(8, 10))):
        assert line[f"{name}_shot"] == pytest.approx(np.mean([line["class_accuracy"][k] for k in group]))
    assert counts[0] > 100 >= counts[1] and counts[7] >= 20 > counts[8]

def test_grey_pictures_work_in_every_part(tmp_path, cli):
    raw, rng = tmp_path / "data" / "FashionMNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for name, count in (("train", 60), ("t10k", 30)):
        for kind, values in (("images-idx3", rng.integers(0, 256, (count, 28, 28), np.uint8)),
                             ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = np.array([0x0800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())
    words = "--data fashion-mnist --decoder-dim 32 --decoder-depth 1 --epochs 1 --augmentor-epochs 1 --batch 20".split()
    out = tmp_path / "run"
    code, _, errors = cli(*words, *"--device cpu --augment mra+cutmix --baseline --root".split(), tmp_path / "data", "--out", out)
    assert code == 0 and not errors and (out / "augmentation.png").exists()
    assert common.vit_of(tmp_path / "mra-augmentor-fashion-mnist" / "augmentor.pt")["channels"] == 1
    assert log_of(out)[-1].keys() == {"task", "top1", "top1_without_mra"}
    assert json.loads((out / "baseline" / "args.json").read_text())["augment"] == "cutmix"
    assert not any("foreground_kept" in line for line in log_of(out))                    # nobody knows it

def test_a_folder_of_classes_works(augmentor, tmp_path, cli):
    data = class_folders(tmp_path / "data", 8, 4)
    code, _, errors = cli("--data", data, *RUN, *"--limit 24 --labels 4 --batch 6 --micro-batch 6 --epochs 1".split(),
                          "--augmentor", augmentor, "--out", tmp_path / "run")
    assert code == 0 and not errors and (tmp_path / "run" / "augmentation.png").exists()
    assert log_of(tmp_path / "run")[1]["task"] == "supervised"

def test_semi_supervised_learning_counts_sure_pictures_and_measures_the_mean(augmentor, tmp_path, cli):
    out = tmp_path / "run"
    code, output, errors = cli(*SEMI, "--augmentor", augmentor, "--threshold", 0, "--ema", 0, "--baseline", "--out", out)
    assert code == 0 and not errors and "--augment randaugment" in output
    assert {"classifier", "mean", "model", "optimizer"} <= saved(out).keys()
    assert equal(saved(out)["classifier"], saved(out)["model"])                          # of a mean that keeps nothing
    for line in epochs_of(out):
        assert line["sure"] == 1 and 0 < line["unlabelled_loss"] < line["loss"]
    assert [line["step"] for line in epochs_of(out)] == [PER_EPOCH, 2 * PER_EPOCH]       # 80 pictures in steps of 7 · 2
    assert {"top1", "top1_without_mra"} <= log_of(out)[-1].keys() and (out / "augmentation.png").exists()

@pytest.mark.parametrize("names", ["mra", "randaugment"])
def test_the_weak_view_judges_and_only_the_strong_one_is_augmented(names, augmentor, tmp_path, cli, monkeypatch):
    seen, views, judged, painted = [], mra.Classifier.forward, mra.fixmatch_loss, []
    monkeypatch.setattr(mra.Classifier, "forward", lambda net, images: seen.append((images, views(net, images))) or seen[-1][1])
    monkeypatch.setattr(mra, "fixmatch_loss", lambda *scores: painted.append(scores) or judged(*scores))
    words = ["--augment", names, *["--augmentor", augmentor] * (names == "mra"), "--no-baseline", "--epochs", 1]
    code, _, errors = cli(*SEMI, *words, "--threshold", 0.3, "--out", tmp_path / "run")
    assert code == 0 and not errors
    images, scores = seen[0]
    known, weak, strong = images.split([1, 7, 7])                                        # micro-batches of 1 and 7
    assert torch.equal(painted[0][0], scores[1:8]) and torch.equal(painted[0][1], scores[8:]) and painted[0][2] == 0.3
    if names == "mra":
        args = saved(tmp_path / "run")["args"]
        paint = mra.MRA.load(augmentor, mean=args["mean"], std=args["std"])
        torch.testing.assert_close(strong, paint(weak), rtol=0, atol=1e-4)               # float32, other batches
    assert all(not torch.equal(*both) for both in zip(weak, strong))

@pytest.mark.parametrize("unlabelled, micro", [(7, 16), (1, 64), (300, 1)])
def test_a_micro_batch_counts_the_pictures_that_each_labelled_one_brings(unlabelled, micro, tmp_path, monkeypatch):
    monkeypatch.setattr(mra, "labelled", lambda args, run, all_: (_ for _ in ()).throw(InterruptedError(run.micro)))
    with pytest.raises(InterruptedError) as stopped:
        mra.main(f"--task semi --batch 64 --unlabelled {unlabelled} --device cpu --out {tmp_path / 'run'}".split())
    assert stopped.value.args == (micro,)                                                # at most 256 pictures, one at least

def test_the_mean_of_the_weights_moves_by_its_share(augmentor, tmp_path, cli):
    words = [*SMALL, *"--task semi --limit 40 --labels 2 --batch 2 --unlabelled 7 --warmup 0 --no-baseline --device cpu".split(),
             "--augmentor", augmentor]
    seen = []
    for ema in (0.0, 1.0, 0.75):
        assert cli(*words, "--epochs", 1, "--ema", ema, "--out", tmp_path / f"{ema}")[0] == 0
        seen.append(saved(tmp_path / f"{ema}"))
    assert seen[0]["step"] == 2 and equal(seen[0]["model"], seen[1]["model"]) and equal(seen[1]["model"], seen[2]["model"])
    for name, last in seen[0]["classifier"].items():                                     # step 2's; at 1.0 step 1's stay
        wanted = 0.75 * seen[1]["classifier"][name] + 0.25 * last
        if last.is_floating_point():
            torch.testing.assert_close(seen[2]["classifier"][name], wanted, rtol=0, atol=1e-6)   # float32

def test_few_shot_learning_reports_means_and_intervals(augmentor, tmp_path, cli, monkeypatch):
    found, out, given = {}, tmp_path / "run", []
    for judge in (mra.nearest_centroid, mra.logistic_regression):
        def spy(support, query, judge=judge):
            given.append((support, query))
            assert query.shape[:3] == (40, 3, 4) and support.shape[2] in (3, 6)          # 1 or 2 shots, each with two copies
            torch.testing.assert_close(support.norm(dim=-1), torch.ones(support.shape[:3]))
            right = judge(support, query)
            found[f"{judge.__name__}_{support.shape[2] // 3}"] = right.tolist()
            return right
        spy.__name__ = judge.__name__
        monkeypatch.setattr(mra, judge.__name__, spy)
    code, output, errors = cli(*FEWSHOT, "--augmentor", augmentor, "--no-baseline", "--out", out)
    assert code == 0 and not errors and "3-way 1-shot, nearest_centroid" in output
    line = next(line for line in log_of(out) if "held_out" in line)
    assert len(found) == 4 and len(line["held_out"]) == 5
    for name, right in found.items():
        mean, spread = sum(right) / 40, 1.96 * np.std(right, ddof=1) / math.sqrt(40)
        assert line[name] == pytest.approx([mean, spread], rel=1e-5)                     # float32
        assert "{:.4f} ± {:.4f}".format(*line[name]) in output
    base = saved(out)["args"]["classes"]
    assert not set(base) & set(line["held_out"]) and set(base) | set(line["held_out"]) == set(common.SHAPES)
    assert saved(out)["classifier"]["head.weight"].shape == (5, 64) and line["top1"] == line["nearest_centroid_2"][0]

    net = mra.Classifier("conv4", 5, 3, 32).eval()
    net.load_state_dict(saved(out)["classifier"])
    val, (train, _) = common.open_data(size=32, limit=COUNT)[1], common.open_data(size=32, limit=COUNT)
    val.mean, val.std = train.mean, train.std
    with torch.no_grad():
        plain = nn.functional.normalize(net.features(val.normalise(val.images)), dim=-1)    # pictures as they are
    as_it_is = lambda x: torch.cdist(x.flatten(0, -2), plain).amin(1).view(x.shape[:-1]) < 1e-3     # lengths are 1, in float32
    for support, query in given:
        first, *copies = support.unflatten(2, (-1, 3)).unbind(3)                         # each shot's three views
        assert as_it_is(query).all() and as_it_is(first).all() and len(copies) == 2
        assert not as_it_is(torch.cat(copies)).any() and ((copies[0] - copies[1]).norm(dim=-1) > 1e-3).all()

def test_occlusion_of_nothing_is_the_plain_accuracy(uninterrupted, augmentor, tmp_path, cli):
    out = tmp_path / "run"
    code, _, errors = cli("--task", "occlusion", *ANY, *"--batch 80 --micro-batch 80".split(), "--augmentor", augmentor,
                          "--compare", uninterrupted[0] / "best.pt", "--out", out)
    assert code == 0 and not errors
    (line,) = log_of(out)
    best = max(line["top1"] for line in epochs_of(uninterrupted[0]))
    for strategy in mra.STRATEGIES:
        (curve,) = line[strategy].values()
        assert len(curve) == 10 and curve[0] == best and len(set(curve)) > 1
    best = torch.load(uninterrupted[0] / "best.pt", weights_only=True)
    net = mra.Classifier("conv4", 10, 3, 32).eval()
    net.load_state_dict(best["classifier"])
    val, own = common.open_data(size=32, limit=COUNT)[1], {name: best["args"][name] for name in ("mean", "std")}
    model = mra.MRA.load(augmentor, **own)
    val.mean, val.std = (torch.tensor(numbers)[:, None, None] for numbers in own.values())
    images = val.normalise(val.images)
    for strategy in ("low", "high"):
        (curve,) = line[strategy].values()
        for tenth in (3, 7):
            seen = images.clone()
            for image, attention in zip(seen, model.attention(images)):
                order = attention.argsort(descending=strategy == "high")
                for place in order[:round(16 * tenth / 10)].tolist():
                    image[:, place // 4 * 8:place // 4 * 8 + 8, place % 4 * 8:place % 4 * 8 + 8] = 0
            with torch.no_grad():
                assert curve[tenth] == (net(seen).argmax(1) == val.labels).double().mean().item()
    sheet = torchvision.io.decode_image(str(out / "occlusion.png"))
    assert sheet.shape[2] > 3 * 300 and sheet.float().std() > 10

def test_each_classifier_sees_occluded_pictures_normalised_as_in_its_training(uninterrupted, augmentor, tmp_path, cli):
    """One that wants pixels as they are, and undoes that in its first convolution, is the same classifier."""
    best = torch.load(uninterrupted[0] / "best.pt", weights_only=True)
    mean, std = (torch.tensor(best["args"][name]) for name in ("mean", "std"))
    best["args"] |= dict(mean=[0.0] * 3, std=(2 * std).tolist())
    best["classifier"]["body.0.weight"] *= 2                                             # no bias: only the contrast is undone
    torch.save(best, tmp_path / "other.pt")
    best["args"] |= dict(mean=mean.tolist())
    torch.save(best, tmp_path / "same.pt")
    code, _, errors = cli("--task", "occlusion", *ANY, "--augmentor", augmentor, "--out", tmp_path / "run", "--compare",
                          uninterrupted[0] / "best.pt", tmp_path / "same.pt", tmp_path / "other.pt")
    assert code == 0 and not errors
    for strategy in mra.STRATEGIES:
        plain, same, other = log_of(tmp_path / "run")[0][strategy].values()
        assert plain == same != other

# ------------------------------------------------------------------------------------------------- killed, stopped, in parallel

def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(uninterrupted, augmentor, tmp_path, cli):
    """Saved in the middle of an epoch and killed in the next: then the log is ahead of the checkpoint."""
    out, save = tmp_path / "run", PER_EPOCH - 2
    shutil.copytree(augmentor.parent, tmp_path / augmentor.parent.name)
    finish(start(out, *ALONE, end=(save, PER_EPOCH + 2, signal.SIGKILL)), -signal.SIGKILL)
    assert saved(out)["step"] == save and [line["step"] for line in log_of(out)] == [PER_EPOCH]
    code, _, errors = cli("--resume", "--out", out)                                      # with the options of before
    assert code == 0 and not errors
    assert_same_run(uninterrupted[0], out, "classifier", "optimizer")
    assert_same_run(uninterrupted[0] / "baseline", out / "baseline", "classifier", "optimizer")

@pytest.mark.parametrize("where, save, end", [("baseline", 3, PER_EPOCH + 2), ("augmentor", 2, FIRST - 1)])
def test_killed_in_the_baseline_or_the_augmentor_resuming_goes_on(where, save, end, uninterrupted, augmentor, tmp_path,
                                                                         cli, monkeypatch):
    out = tmp_path / "run"
    folder = out / "baseline" if where == "baseline" else tmp_path / augmentor.parent.name
    with monkeypatch.context() as patch:
        interrupt(patch, folder, save, end)
        assert cli(*ALONE, "--out", out)[0] == 130
    assert saved(folder)["step"] == save
    seen = count_steps(monkeypatch)
    code, _, errors = cli("--resume", "--out", out)                                      # with the options of before
    assert code == 0 and not errors
    assert seen.count("run") == 2 * PER_EPOCH and seen.count("baseline") == 2 * PER_EPOCH - save * (where == "baseline")
    assert seen.count(augmentor.parent.name) == (0 if where == "baseline" else FIRST - save)       # which comes first
    assert_same_run(uninterrupted[0], out, "classifier", "optimizer")
    assert_same_run(uninterrupted[0] / "baseline", out / "baseline", "classifier", "optimizer")
    assert equal(*(saved(root / augmentor.parent.name) | dict(args=0, seconds=0) for root in (uninterrupted[0].parent, tmp_path)))

@pytest.mark.parametrize("where", ["baseline", "augmentor", "augmentor, no baseline", "run"])
def test_a_run_that_is_stopped_goes_on_as_it_says(where, augmentor, tmp_path, cli, monkeypatch):
    out, name = tmp_path / "run", augmentor.parent.name
    words = [*ALONE, "--epochs", 1, *["--no-baseline"] * (where in ("augmentor, no baseline", "run")), "--out", out]
    folder = {"baseline": out / "baseline", "run": out}.get(where, tmp_path / name)
    if where == "run":
        shutil.copytree(augmentor.parent, tmp_path / name)
    with monkeypatch.context() as patch:
        interrupt(patch, folder, None, 2, ask=True)
        code, output, errors = cli(*words)
    assert code == 128 + signal.SIGTERM and not errors and "stopped and saved" in output
    assert saved(folder)["step"] == 2
    code, _, errors = cli(*words, *["--resume"] * ("--resume goes on" in output))
    assert code == 0 and not errors
    assert len(losses(out)) == 1 and len(losses(tmp_path / name)) == 1 and (tmp_path / name / "augmentor.pt").exists()

def test_semi_supervised_learning_killed_goes_on_to_the_same_weights(augmentor, tmp_path, cli, monkeypatch):
    words = [*SEMI, "--augmentor", augmentor, "--no-baseline", "--threshold", 0.2]
    assert cli(*words, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, tmp_path / "run", 3, PER_EPOCH + 2)
        assert cli(*words, "--out", tmp_path / "run")[0] == 130
    assert saved(tmp_path / "run")["step"] == 3
    code, _, errors = cli("--task", "semi", "--resume", "--out", tmp_path / "run")
    assert code == 0 and not errors
    assert_same_run(tmp_path / "whole", tmp_path / "run", "classifier", "mean", "model", "optimizer")

def test_a_finished_run_resumed_changes_nothing(uninterrupted, augmentor, tmp_path, cli, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted[0], out), shutil.copytree(augmentor.parent, tmp_path / augmentor.parent.name)
    contents = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "args.json"}
    before, seen = contents(), count_steps(monkeypatch)
    code, output, errors = cli("--resume", "--out", out)
    assert code == 0 and not errors and not seen and "with MRA" in output and contents() == before

def test_a_run_resumed_for_longer_says_that_its_baseline_was_not(uninterrupted, augmentor, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted[0], out), shutil.copytree(augmentor.parent, tmp_path / augmentor.parent.name)
    code, output, errors = cli("--resume", "--epochs", 3, "--out", out)
    assert code == 0 and not errors and "result.pt is taken as it is, made with another epochs" in output
    assert len(losses(out)) == 3 and len(losses(out / "baseline")) == 2

def test_a_finished_few_shot_run_resumed_says_the_same(augmentor, tmp_path, cli, monkeypatch):
    assert cli(*FEWSHOT, "--augmentor", augmentor, "--no-baseline", "--out", tmp_path / "run")[0] == 0
    before, seen = (tmp_path / "run" / "log.jsonl").read_text(), count_steps(monkeypatch)
    code, _, errors = cli("--task", "fewshot", "--resume", "--out", tmp_path / "run")
    assert code == 0 and not errors and not seen and (tmp_path / "run" / "log.jsonl").read_text() == before

def test_two_processes_train_what_one_does(uninterrupted, augmentor, tmp_path):
    out = tmp_path / "run"
    output, _ = finish(start(out, *RUN, "--no-baseline", "--augmentor", augmentor, processes=2))
    assert "batches of 2 × 1 × 12" in output and "batches of 1 × 2 × 12" in uninterrupted[1]
    one, two = saved(uninterrupted[0])["classifier"], saved(out)["classifier"]
    for name in one:
        if "running" not in name and "tracked" not in name:                              # each process has its BatchNorm's own
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)          # sums in another order, in float32
    for line, other in zip(epochs_of(uninterrupted[0]), epochs_of(out), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5) and other["lr"] == line["lr"]
    assert (out / "augmentation.png").exists() and sum("foreground_kept" in line for line in log_of(out)) == 1

def test_two_processes_learn_from_few_labels_and_occlude_as_one_does(uninterrupted, augmentor, tmp_path, cli):
    words = [*SEMI, "--epochs", 1, "--no-baseline", "--augmentor", augmentor, "--threshold", 0.2]
    assert cli(*words, "--out", tmp_path / "one")[0] == 0
    finish(start(tmp_path / "two", *words, processes=2))
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    for name, value in one["model"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-5)     # sums in another order, in float32
    for name in ("loss", "unlabelled_loss", "sure"):
        assert epochs_of(tmp_path / "two")[0][name] == pytest.approx(epochs_of(tmp_path / "one")[0][name], rel=1e-5)

    words = ["--task", "occlusion", *ANY, "--augmentor", augmentor, "--compare", uninterrupted[0] / "best.pt"]
    assert cli(*words, "--out", tmp_path / "curves")[0] == 0
    finish(start(tmp_path / "both", *words, processes=2))
    (one,), (two,) = log_of(tmp_path / "curves"), log_of(tmp_path / "both")
    assert one["low"] == two["low"] and one["high"] == two["high"] and one["random"] != one["low"]

def test_overwrite_starts_the_baseline_again_too(tmp_path, cli, monkeypatch):
    words = [*ALONE, *"--limit 40 --labels 2 --batch 4 --micro-batch 4 --epochs 1 --out".split(), tmp_path / "run"]
    assert cli(*words)[0] == 0
    code, _, errors = cli(*words)
    assert code == 2 and re.search("--resume.*--overwrite", one_line(errors))
    code, _, errors = cli(*words, "--overwrite", "--epochs", 2)
    assert code == 0 and not errors and len(losses(tmp_path / "run" / "baseline")) == len(losses(tmp_path / "run")) == 2

def test_a_baseline_of_pictures_of_another_size_is_not_taken(augmentor, tmp_path, cli):
    words = [*RUN, *"--limit 40 --labels 2 --batch 4 --micro-batch 4 --epochs 1 --out".split(), tmp_path / "run", "--augmentor",
             augmentor]
    assert cli(*words)[0] == 0
    code, output, errors = cli(*words, "--overwrite", "--size", 48)
    assert code == 0 and not errors and saved(tmp_path / "run" / "baseline")["args"]["size"] == 48

def test_without_mra_its_patches_are_not_asked_for(tmp_path, cli):
    words = "--limit 40 --labels 2 --batch 4 --micro-batch 4 --epochs 1 --augment none --no-baseline --size 30".split()
    code, output, errors = cli(*RUN, *words, "--out", tmp_path / "run")
    assert code == 0 and not errors and "supervised: top-1" in output

def test_an_augmentors_own_patches_must_leave_some_visible(augmentor, tmp_path, cli):
    words = ["--patch", 4, "--mask-ratio", 0.95, "--no-baseline", "--augmentor", augmentor]
    code, _, errors = cli(*RUN, *words, "--out", tmp_path / "run")
    assert code == 2 and "one of the 16 patches visible" in one_line(errors)        # 64, were they of --patch

def test_resuming_another_classifier_is_refused_and_loses_nothing(uninterrupted, augmentor, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted[0], out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    flags = ["--classifier", "mobilenet_v3_small", "--no-baseline", "--augmentor", augmentor]
    code, _, errors = cli("--resume", "--out", out, *flags)
    assert code == 2 and "last.pt" in one_line(errors)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

# ---------------------------------------------------------------------------------------------------------------- bad input

BAD = {  # what is wrong: options after the usual ones, and what the line must say
    "a comparison without what is compared": ("--augment cutout --baseline", "--baseline compares with and without mra"),
    "an augmentor of normalised pixels": ("--augmentor {tmp}/normalised.pt", "normalised.pt predicts.*--no-norm-pixels"),
    "an augmentor of grey pictures": ("--augmentor {tmp}/grey.pt", "1 channel.*have 3"),
    "an augmentor that is not there": ("--augmentor {tmp}/nowhere.pt", "nowhere.pt"),
    "an augmentor cut off": ("--augmentor {tmp}/cut.pt", "cut.pt is cut off"),
    "an augmentor of something else": ("--augmentor {tmp}/other.pt", "other.pt has no encoder"),
    "an augmentor without a decoder": ("--augmentor {tmp}/half.pt", "half.pt has no decoder"),
    "an augmentor whose patch does not divide": ("--augmentor {tmp}/odd.pt", "32.*5"),
    "a size that does not divide": ("--size 30", "30.*8"),
    "a misspelt augmentation": ("--augment mra+cutmx", "cutmx.*did you mean cutmix"),
    "none and another": ("--augment none+mra", "none\\+mra: none, or some of"),
    "no augmentation": ("--augment=", "--augment : none, or some of"),
    "an augmentation of nothing": ("--augment mra+", "--augment mra\\+"),
    "fewshot without a shot": ("--task fewshot --shots 0 5", "--shots 0"),
    "semi with cutmix": ("--task semi --augment mra+cutmix", "semi.*cutmix"),
    "semi with mixup": ("--task semi --augment mixup", "semi.*mixup"),
    "semi with too few pictures": ("--task semi --labels 30", "not --labels 30 pictures of each class: disc 16"),
    "too few pictures": ("--labels 30", "not --labels 30 pictures of each class: disc 16"),
    "fewshot with too few classes": ("--task fewshot --ways 6", "6 classes.*5 classes left"),
    "fewshot with too few pictures": ("--task fewshot --ways 3 --queries 30", "30 pictures.*16.*--queries"),
    "fewshot with too few held out": ("--task fewshot --ways 3 --held-out 2", "3 classes.*2 classes left"),
    "fewshot with none to learn from": ("--task fewshot --ways 3 --queries 4 --held-out 10", "--held-out"),
    "occlusion of nothing": ("--task occlusion", "--compare"),
    "occlusion of no checkpoint": ("--task occlusion --compare {tmp}/words.pt", "words.pt.*no checkpoint"),
    "occlusion of no classifier": ("--task occlusion --compare {augmentor}", "augmentor.pt is no classifier"),
    "occlusion of other classes": ("--task occlusion --compare {tmp}/two.pt", "two.pt is no classifier of these"),
    "an unknown classifier": ("--classifier resnet81", "resnet81.*did you mean resnet18"),
    "an unlabelled folder": ("--data {tmp}/pictures", "labelled"),
    "an imbalance below 1": ("--imbalance 0.5", "imbalance"),
    "a threshold above 1": ("--threshold 2", "threshold"),
    "a probability above 1": ("--apply 1.5", "apply"),
    "mask ratio 0": ("--mask-ratio 0", "mask-ratio"),
    "mask ratio 1": ("--mask-ratio 1", "mask-ratio"),
    "mask ratio nan": ("--mask-ratio nan", "mask-ratio"),
    "no visible patch": ("--mask-ratio 0.95", "visible"),
    "an unknown strategy": ("--mask-strategy lowest", "lowest"),
    "an unknown task": ("--task classify", "classify"),
    "an imbalance for semi": ("--task semi --imbalance 10", "--imbalance does .*--task supervised"),
    "shots for a classifier": ("--shots 3", "--shots does .*--task fewshot"),
    "an augmentor of nothing": ("--augment cutmix --augmentor x.pt", "--augmentor does .*--augment mra"),
    "labels for occlusion": ("--task occlusion --labels 5", "--labels does .*--task supervised or semi or fewshot"),
    "a strategy for nothing": ("--augment cutmix --mask-strategy high", "--mask-strategy does .*--augment mra"),
    "one way": ("--task fewshot --ways 1", "ways"),
    "epochs for an augmentor that is given": ("--augmentor-epochs 2", "--augmentor-epochs does .*without --augmentor"),
    "no epochs for the augmentor": ("--augmentor-epochs 0", "augmentor-epochs"),
    "nothing to resume": ("--resume", "resume.*last.pt"),
}

@pytest.fixture(scope="module")
def wrong(augmentor, tmp_path_factory):
    """A folder of files that are not what is asked for."""
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "pictures").mkdir()
    paint_folder(tmp / "pictures", 4)
    for name, size, patch, channels in (("odd", 30, 5, 3), ("grey", 32, 8, 1)):
        encoder = common.ViT(size, patch, channels, dim=64, depth=1, heads=1)
        torch.save({"model": encoder.state_dict() | common.Decoder(encoder, 32, 1, 16).state_dict()}, tmp / f"{name}.pt")
    whole = torch.load(augmentor, weights_only=True)
    torch.save(whole | {"args": whole["args"] | {"norm_pixels": True}}, tmp / "normalised.pt")
    torch.save({"encoder": whole["encoder"], "args": whole["args"]}, tmp / "half.pt")
    (tmp / "cut.pt").write_bytes(augmentor.read_bytes()[:100_000])
    (tmp / "words.pt").write_text("words")
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, tmp / "other.pt")
    torch.save({"classifier": mra.Classifier("conv4", 2, 3, 32).state_dict(), "args": dict(
        size=32, channels=3, classes=["red", "blue"], classifier="conv4", augment="mra")}, tmp / "two.pt")
    return tmp

@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(what, wrong, augmentor, tmp_path, cli):
    options, says = BAD[what]
    words = ANY if "occlusion" in options else [*ANY, "--no-baseline", "--classifier", "conv4"]
    words = [*words, *["--labels", 12] * ("--task" not in options)]
    if not re.search("--augment[ =]", options) or "mra" in options:
        words = [*words, "--augmentor", augmentor]
    code, _, errors = cli(*words, "--out", tmp_path / "out", *options.format(tmp=wrong, augmentor=augmentor).split())
    assert code == 2 and re.search(says, one_line(errors)), errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]                  # so that the next try may begin

@pytest.mark.parametrize("flags, says", [("--labels 12 --classifier resnet81", "resnet18"),
                                         ("--labels 12 --classifier resnet81 --no-baseline", "resnet18"),
                                         ("--labels 12 --augmentor nowhere.pt", "nowhere.pt"),
                                         ("--task occlusion --compare nowhere.pt", "nowhere.pt")])
def test_a_mistake_is_found_before_anything_is_trained(flags, says, tmp_path, cli, monkeypatch):
    for name in ("pretrain", "learn"):
        monkeypatch.setattr(mra, name, lambda *arguments: pytest.fail("trained first"))
    code, _, errors = cli(*ANY, "--out", tmp_path / "out", *flags.split())
    assert code == 2 and says in one_line(errors)

def test_overwrite_spares_what_is_read(uninterrupted, augmentor, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted[0], out)
    shutil.copy(augmentor, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    code, _, errors = cli(*RUN, "--augmentor", out / "augmentor.pt", "--overwrite", "--out", out)
    assert code == 2 and re.search("--overwrite.*augmentor.pt", one_line(errors))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

def test_overwrite_spares_the_classifiers_that_occlusion_compares(uninterrupted, augmentor, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted[0], out)
    code, _, errors = cli("--task", "occlusion", *ANY, "--augmentor", augmentor, "--compare", out / "best.pt", "--overwrite",
                          "--out", out)
    assert code == 2 and re.search("--overwrite.*best.pt", one_line(errors)) and (out / "best.pt").exists()

def test_a_real_process_says_one_line_and_exits_with_two(tmp_path):
    output, errors = finish(start(tmp_path / "out", "--augment", "cutmx"), 2)
    assert "cutmx" in one_line(errors) and not output

@pytest.mark.parametrize("words, wanted", [
    ("", dict(model="nano", size=64, patch=8, classifier="conv4", labels=50, baseline=True, mask_ratio=0.4, apply=1.0,
              whole=False, mask_strategy="low", augment="mra", weight_decay=1e-4)),
    ("--task semi", dict(labels=25, weight_decay=5e-4, unlabelled=7, threshold=0.95, baseline=True)),
    ("--task fewshot", dict(labels=None, ways=5, shots=[1, 5], episodes=600, queries=15)),
    ("--data fashion-mnist", dict(model="nano", size=28, patch=4, classifier="conv4", labels=None, baseline=False)),
    ("--data /pictures", dict(model="light", size=224, patch=16, classifier="resnet50", epochs=100, batch=256, lr=0.1,
                              weight_decay=1e-4, decoder_dim=192, decoder_depth=2, baseline=False, labels=None)),
    ("--data /pictures --task semi", dict(ema=0.999, classifier="resnet50")),
    ("--weight-decay 0.01", dict(weight_decay=0.01))])
def test_the_data_and_the_task_choose_the_recipe(words, wanted, monkeypatch):
    seen = []
    for task in mra.TASKS:
        monkeypatch.setitem(mra.TASKS, task, seen.append)
    mra.main(words.split())
    assert {name: getattr(seen[0], name) for name in wanted} == wanted
    assert seen[0].out == "runs/mra" + (f"-{seen[0].task}" if "--task" in words else "")

def test_every_option_of_the_design_is_there_and_help_is_grouped(cli):
    code, output, _ = cli("--help")
    assert code == 0
    words = """--data --root --out --model --size --patch --epochs --batch --micro-batch --lr --warmup --weight-decay --workers
               --seed --precision --compile --resume --overwrite --device --limit --crop --mask-ratio --mask-strategy --apply
               --whole --augmentor --augmentor-epochs --task --augment --baseline --classifier --labels --imbalance --unlabelled
               --threshold --ema --held-out --ways --shots --queries --episodes --copies --compare"""
    assert all(re.search(rf"{word}\b", output) for word in words.split())
    assert len(re.findall(r"^\w+:$", output, re.MULTILINE)) >= 5
