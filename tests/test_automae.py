"""automae.py: masking against formulas and slow loops; who learns from what; MAE as its special case; its runs; bad input."""

import functools
import itertools
import json
import math
import os
import re
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import automae
import common
import mae
from test_common import shake
from test_mae import (SMALL, assert_same_training, cut, epochs_of, finish, log_of, losses, one_line, paint_folder,
                      saved, start, tensors)

PER_EPOCH, PER_STEP = 8, 32                                                             # steps, pictures
RUN = [*SMALL, *f"--limit {PER_EPOCH * PER_STEP} --epochs 2 --prior-epochs 1 --batch {PER_STEP} --micro-batch {PER_STEP // 4} "
       "--lr 1e-2 --warmup 0.5 --device cpu".split()]                                   # 16 places; some three seconds
QUICK = [*SMALL, *"--limit 64 --epochs 2 --batch 16 --lr 1e-2 --warmup 0.5 --device cpu".split()]    # 8 steps
NANO = {name: value for name, value in common.VITS["nano"].items() if name != "patch"}
FACTS = {"loss", "foreground_ratio", "hidden_foreground", "hidden_background"}           # what a line of the log has of masking
GUIDED, ADVERSARIAL = {"attention_ratio"}, {"generator_loss", "discriminator_loss", "generator_spread"}
PARTS = {"encoder", "decoder", "optimizer"}
LEARNED = {"generator", "discriminator", "discriminator_optimizer"}

# ------------------------------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def tiny(grid=(4, 4), dtype=torch.float32, **options):
    """A model of some thousand parameters, none of them 0 or 1, for pictures of grid × 4 pixels."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, 3, dim=16, depth=2, heads=2)
    return shake(automae.AutoMAE(encoder, common.Decoder(encoder, 8, 1, 2), **options)).to(dtype)

def twin(model, grid=(4, 4)):
    """mae.MAE with the same weights."""
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, 3, dim=16, depth=2, heads=2)
    other = mae.MAE(encoder, common.Decoder(encoder, 8, 1, 2), model.norm_pixels).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())                                            # strict
    return other

def hollow(grid=(4, 4), **options):
    """The same with nothing to compute, for many draws."""
    model = tiny(grid, **options)
    model.encoder.blocks, model.decoder.decoder_blocks = nn.Sequential(), nn.Sequential()
    return model

def pictures(count, grid=(4, 4), dtype=torch.float32):
    return torch.randn(count, 3, 4 * grid[0], 4 * grid[1], dtype=dtype)

def distributions(count, places, scale=1.0):
    return (scale * torch.randn(count, places)).softmax(-1)

def equal(one, two):
    """Trees of tensors and numbers, bit for bit."""
    one, two = tensors(one), tensors(two)
    return one.keys() == two.keys() and all(
        torch.equal(leaf, two[name]) if torch.is_tensor(leaf) else leaf == two[name] for name, leaf in one.items())

start = functools.partial(start, script=automae)

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run on scenes in a process of its own, prior included → its folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, *finish(start(out, *RUN))

@pytest.fixture(scope="module")
def prior(uninterrupted):
    """The words that spare a run to train its prior."""
    return ["--prior", str(uninterrupted[0] / "prior" / "prior.pt")]

# ------------------------------------------------------------------------------------------------- MAE as a special case

@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("grid, ratio", [((4, 4), 0.75), ((4, 6), 0.6)])
def test_with_nothing_highlighted_it_is_mae_number_for_number(grid, ratio, norm_pixels):
    model = tiny(grid, norm_pixels=norm_pixels)
    other, images, noise = twin(model, grid), pictures(32, grid), torch.rand(32, grid[0] * grid[1])
    found, theirs = model(images, torch.zeros_like(noise), noise, ratio), other(images, ratio, noise)
    for mine, wanted in zip(found, theirs, strict=True):                                 # loss, prediction, mask
        assert torch.equal(mine, wanted)
    found[0].backward(), theirs[0].backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad, q.grad), name

def test_the_mask_is_all_that_a_highlight_changes():
    model = tiny()
    other, images, noise, highlighted = twin(model), pictures(32), torch.rand(32, 16), automae.highlight(distributions(32, 16), 4)
    found, theirs = model(images, highlighted, noise), other(images, 0.75, noise + 0.5 * highlighted)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, theirs, strict=True))
    assert not torch.equal(found[2], other(images, 0.75, noise)[2])

@pytest.mark.parametrize("scores", ["usual", "large", "tiny", "negative"])
def test_the_multiplication_leaves_every_bit_of_the_tokens(scores, monkeypatch):
    """1 + score − score would not: a float's sum and difference round."""
    model, seen, choose = tiny((8, 8)), [], automae.take
    monkeypatch.setattr(automae, "take", lambda tokens, keep: seen.append(tokens) or choose(tokens, keep))
    images, noise = pictures(64, (8, 8)), torch.rand(64, 64)
    noise = {"usual": noise, "large": 1e9 * noise, "tiny": 1e-9 * noise, "negative": -3 * noise}[scores]
    model(images, automae.highlight(distributions(64, 64).requires_grad_(), 16), noise)
    assert torch.equal(seen[0], model.encoder.embed(images))

# ------------------------------------------------------------------------------------------------------------------ hiding

@pytest.mark.parametrize("factor", [0.5, 0.1, 3.0])
def test_the_gradient_of_a_highlight_is_the_token_times_its_gradient(factor):
    """Of MAE's own tokens, at visible places; hidden ones have none."""
    model = tiny((4, 6), torch.float64, mask_factor=factor)
    other, images, noise = twin(model, (4, 6)), pictures(8, (4, 6), torch.float64), torch.rand(8, 24, dtype=torch.float64)
    highlighted = automae.highlight(distributions(8, 24), 6).double().requires_grad_()
    loss, _, mask = model(images, highlighted, noise)
    loss.backward()

    embed, tokens = other.encoder.embed, []
    other.encoder.embed = lambda images: tokens.append(embed(images)) or tokens[0].retain_grad() or tokens[0]
    their_loss, _, their_mask = other(images, 0.75, noise + factor * highlighted.detach())
    their_loss.backward()
    assert torch.equal(mask, their_mask)
    for b, i in itertools.product(range(8), range(24)):
        wanted = sum(token * slope for token, slope in zip(tokens[0][b, i].tolist(), tokens[0].grad[b, i].tolist()))
        assert highlighted.grad[b, i].item() == pytest.approx(factor * wanted, abs=1e-12)    # float64, sums in another order
        assert (highlighted.grad[b, i] == 0).item() == bool(mask[b, i])

def test_the_gradient_reaches_the_generator_through_the_choice():
    model = tiny(generator=automae.Generator(8, (4, 4)))
    guide = F.gumbel_softmax(model.generator(torch.rand(8, 8, 16)), tau=1.0)
    model(pictures(8), automae.highlight(guide, 4), torch.rand(8, 16))[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

SCORES = {
    "usual": lambda b, n: (torch.rand(b, n), (torch.rand(b, n) < 0.3).float()),
    "all equal": lambda b, n: (torch.ones(b, n), torch.zeros(b, n)),
    "few values": lambda b, n: (torch.randint(2, (b, n)).float(), torch.ones(b, n)),
    "huge": lambda b, n: (1e30 * torch.randn(b, n), torch.ones(b, n)),
    "infinite": lambda b, n: (torch.rand(b, n), torch.where(torch.rand(b, n) < 0.5, torch.inf, 0.0)),
}

@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("grid, ratio", [((4, 4), 0.75), ((4, 6), 0.6), ((7, 7), 0.88), ((2, 2), 0.5), ((8, 8), 0.1)])
def test_exactly_as_many_patches_stay_visible_as_the_ratio_says(grid, ratio, kind):
    model, places = hollow(grid), grid[0] * grid[1]
    noise, highlighted = SCORES[kind](16, places)
    mask = model(pictures(16, grid), highlighted, noise, ratio)[2]
    assert set(mask.unique().tolist()) == {0, 1}
    assert ((mask == 0).sum(1) == int(places * (1 - ratio))).all()

@pytest.mark.parametrize("factor", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("lit", [1, 4, 9])
def test_what_is_highlighted_is_hidden_more_often_but_never_surely(lit, factor):
    """Against the exact probability. A patch of noise x is visible when fewer than n of the others score less."""
    draws, places, n, cells = 8000, 16, 4, 400                                           # smooth: right to 1e-5

    def visible(mine):
        """For a patch that is highlighted (1) or not (0), by the midpoint rule over its own noise."""
        total = 0.0
        for cell in range(cells):
            score = (cell + 0.5) / cells + factor * mine
            below = {kind: min(1.0, max(0.0, score - factor * kind)) for kind in (0, 1)}
            others = {1: lit - mine, 0: places - lit - (1 - mine)}
            one, zero = ([math.comb(count, k) * below[kind] ** k * (1 - below[kind]) ** (count - k)
                          for k in range(min(n, count + 1))] for kind, count in ((1, others[1]), (0, others[0])))
            total += sum(one[j] * zero[k] for j in range(len(one)) for k in range(len(zero)) if j + k < n)
        return total / cells

    chance = [visible(0), visible(1)]
    assert lit * chance[1] + (places - lit) * chance[0] == pytest.approx(n, abs=1e-3)    # the formula itself
    assert 0 < chance[1] < chance[0] < 1
    highlighted = (torch.arange(places) % 16 < lit).float().roll(3).expand(draws, -1)
    mask = hollow(mask_factor=factor)(pictures(1).expand(draws, -1, -1, -1), highlighted, torch.rand(draws, places))[2]
    for place, share in enumerate((1 - mask).mean(0).tolist()):
        wanted = chance[int(highlighted[0, place])]
        assert share == pytest.approx(wanted, abs=4.5 * math.sqrt(wanted * (1 - wanted) / draws))    # standard errors, 16 places
    assert (1 - mask)[:, highlighted[0] == 1].sum() > 0 or draws * lit * chance[1] < 20

# --------------------------------------------------------------------------------------------------------------- highlight

@pytest.mark.parametrize("scale", [0, 0.01, 1, 30])
@pytest.mark.parametrize("places, n", [(16, 4), (196, 49), (4, 1), (24, 24)])
def test_highlight_is_one_at_the_n_highest_places_bit_for_bit(places, n, scale):
    guide = distributions(200, places, scale)
    found = automae.highlight(guide, n)
    assert set(found.unique().tolist()) <= {0.0, 1.0} and (found.sum(1) == n).all()
    for row, values in zip(found.tolist(), guide.tolist()):
        assert min(v for v, lit in zip(values, row) if lit) >= max((v for v, lit in zip(values, row) if not lit), default=0)

@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_gradient_of_highlight_is_the_guides_own(n):
    guide, direction = distributions(5, 16).requires_grad_(), torch.randn(5, 16)
    (automae.highlight(guide, n) * direction).sum().backward()
    assert torch.equal(guide.grad, direction)

# ------------------------------------------------------------------------------------------------------------------- boxes

GRIDS = [(14, 14), (8, 8), (7, 7), (4, 6), (2, 2)]

def drawn_boxes(batch, grid, monkeypatch):
    """→ the distributions (B, h, w), and their rectangles, found by taking off the noise that was drawn: (B, h, w) bool."""
    draws, rand = [], torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **how: draws.append(rand(*shape, **how)) or draws[-1])
        found = automae.boxes(batch, grid, torch.device("cpu"))
    assert found.shape == (batch, grid[0] * grid[1])
    noise = next(draw for draw in reversed(draws) if draw.numel() == found.numel()).reshape(found.shape)
    level = found.double().log() - noise
    lowest, highest = level.amin(1, keepdim=True), level.amax(1, keepdim=True)
    torch.testing.assert_close(highest - lowest, torch.full_like(lowest, 0.5), rtol=0, atol=1e-5)    # logarithms of floats
    inside = level > (lowest + highest) / 2
    torch.testing.assert_close(level, torch.where(inside, highest, lowest), rtol=0, atol=1e-5)
    return found.unflatten(1, grid), inside.unflatten(1, grid)

def rectangles(inside):
    """(B, h, w) bool → [(top, left, height, width)], sure that each is a whole rectangle."""
    found = []
    for picture in inside:
        rows, columns = picture.any(1).nonzero()[:, 0].tolist(), picture.any(0).nonzero()[:, 0].tolist()
        found.append((rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1))
        assert picture.sum() == found[-1][2] * found[-1][3]
    return found

def expected_sides(grid, cells=300, half=False):
    """The probability of each (height, width), written out, over a fine grid of the two numbers that decide it."""
    count, (rows, columns) = Counter(), grid
    for i, j in itertools.product(range(cells), repeat=2):
        area = rows * columns * (40 + 120 * (i + 0.5) / cells) / (392 if half else 196)
        height = max(1, round(rows * (4 + 6 * (j + 0.5) / cells) / 14))
        count[height, min(columns, math.ceil(area / height))] += 1
    return {sides: times / cells**2 for sides, times in count.items()}

@pytest.mark.parametrize("grid", GRIDS)
def test_boxes_are_distributions_with_noise_everywhere(grid, monkeypatch):
    found, inside = drawn_boxes(2000, grid, monkeypatch)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2000), rtol=0, atol=1e-5)   # float32
    assert (found > 0).all()
    logs = found.log()
    # Inside 0.5 … 1.5 and outside 0 … 1, all less the same number: so says any pair of places.
    least, most = (torch.where(where, logs, fill) for where, fill in ((inside, torch.inf), (inside, -torch.inf)))
    low, high = (torch.where(where, logs, fill) for where, fill in ((~inside, torch.inf), (~inside, -torch.inf)))
    spread = lambda up, down: (up.amax((1, 2)) - down.amin((1, 2))).max()
    assert spread(most, least) <= 1 + 1e-4 and spread(high, low) <= 1 + 1e-4 and spread(most, low) <= 1.5 + 1e-4
    assert spread(high, least) <= 0.5 + 1e-4
    means = [(logs * where).sum((1, 2)) / where.sum((1, 2)) for where in (inside, ~inside)]
    # A picture's two means are off by less than 0.29 · √2 on average, of 2000 pictures: five standard errors are 0.046.
    assert (means[0] - means[1]).mean().item() == pytest.approx(0.5, abs=0.046)
    assert len(found.flatten(1).unique(dim=0)) == 2000

@pytest.mark.parametrize("grid", GRIDS)
def test_the_sides_of_boxes_come_as_often_as_a_slow_count_says(grid, monkeypatch):
    draws = 4000
    sides = Counter((height, width) for _, _, height, width in rectangles(drawn_boxes(draws, grid, monkeypatch)[1]))
    wanted = expected_sides(grid)
    for one in sides.keys() | wanted.keys():
        chance = wanted.get(one, 0.0)                                                    # a count of cells is right to some 0.002
        assert sides[one] / draws == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / draws) + 0.003), one
    for power in ((1, 0), (0, 1), (1, 1)):                                               # mean height, width and area
        size = lambda one, power=power: one[0] ** power[0] * one[1] ** power[1]
        mean, square = (sum(chance * size(one) ** k for one, chance in wanted.items()) for k in (1, 2))
        error = math.sqrt(max(0.0, square - mean**2) / draws)
        assert sum(map(size, sides.elements())) / draws == pytest.approx(mean, abs=4.5 * error + 1e-3 * mean)

@pytest.mark.parametrize("grid", GRIDS)
def test_boxes_keep_the_papers_limits_scaled_with_the_grid(grid, monkeypatch):
    rows, columns = grid
    for top, left, height, width in rectangles(drawn_boxes(2000, grid, monkeypatch)[1]):
        assert 0 <= top <= rows - height and 0 <= left <= columns - width
        assert max(1, round(rows * 4 / 14)) <= height <= max(1, round(rows * 10 / 14))
        area = height * width                                                            # the width is rounded up, and cut off
        assert area < rows * columns * 160 / 196 + height
        assert area >= min(rows * columns * 40 / 196, height * columns)

@pytest.mark.parametrize("grid", GRIDS)
def test_boxes_lie_at_every_place_alike(grid, monkeypatch):
    places, count, along = {}, Counter(), ([], [])
    for top, left, height, width in rectangles(drawn_boxes(6000, grid, monkeypatch)[1]):
        count[height, width] += 1
        places.setdefault((height, width), (set(), set()))
        for axis, at, free in ((0, top, grid[0] - height + 1), (1, left, grid[1] - width + 1)):
            places[height, width][axis].add(at)
            along[axis].append((at + 0.5) / free)
    for (height, width), seen in places.items():
        if count[height, width] > 200:                                                   # to miss one of 11: odds of 6e-8
            assert seen == (set(range(grid[0] - height + 1)), set(range(grid[1] - width + 1)))
    for axis in along:                                                                   # five standard errors
        assert sum(axis) / len(axis) == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(axis)))
    assert len(places) > (1 if grid == (2, 2) else 5)

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, call, types, arguments=(), options=None):
        self.count = getattr(self, "count", 0) + 1
        return call(*arguments, **(options or {}))

def test_boxes_take_as_many_calls_for_a_batch_as_for_one():
    counts = []
    for batch in (1, 64):
        with Calls() as calls:
            automae.boxes(batch, (14, 14), torch.device("cpu"))
        counts.append(calls.count)
    assert counts[0] == counts[1] > 10

def test_matched_boxes_carry_the_guides_own_noise_and_are_half_as_large(monkeypatch):
    torch.manual_seed(0)
    draws, grid = 4000, (14, 14)
    with monkeypatch.context() as patch:
        patch.setattr(F, "gumbel_softmax", lambda logits, tau: logits / tau)
        plain = automae.boxes(draws, grid, torch.device("cpu"), matched=True)            # before the noise
    assert set(plain.flatten().tolist()) == {0.0, 4.0}
    sides, wanted = Counter(), expected_sides(grid, half=True)
    for _, _, height, width in rectangles(plain.unflatten(1, grid) > 0):
        sides[height, width] += 1
    assert sides.keys() <= wanted.keys()
    for one, chance in wanted.items():
        assert sides[one] / draws == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / draws) + 0.003), one
    found = automae.boxes(draws, grid, torch.device("cpu"), matched=True)
    torch.testing.assert_close(found.sum(1), torch.ones(draws), rtol=0, atol=1e-5)
    spread = automae.boxes(draws, grid, torch.device("cpu")).log().std(1)
    assert (found.log().std(1) > 1.2).all() and (spread < 0.5).all()                     # Gumbel's deviation is 1.28

@pytest.mark.parametrize("matched, scale", [(False, 1), (True, 16)])
def test_matched_the_discriminator_sees_ones_on_average(matched, scale):
    torch.manual_seed(0)
    discriminator, guide = automae.Discriminator((4, 4), matched).eval(), distributions(6, 16)
    wanted = discriminator.layers((scale * guide).view(6, 1, 4, 4)).flatten(1)
    torch.testing.assert_close(discriminator(guide), wanted, rtol=0, atol=0)

# ----------------------------------------------------------------------------------------------------------- discriminator

def convolutions(discriminator):
    return [layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)]

def test_the_discriminator_of_the_paper():
    discriminator = automae.Discriminator((14, 14))
    one, two, three = convolutions(discriminator)
    assert [tuple(layer.weight.shape) for layer in (one, two, three)] == [(16, 1, 4, 4), (32, 16, 4, 4), (1, 32, 3, 3)]
    assert one.stride == two.stride == (2, 2) and three.stride == (1, 1)
    assert discriminator(distributions(5, 196)).shape == (5, 1)

def test_the_discriminator_equals_its_formula():
    discriminator = automae.Discriminator((14, 14)).eval()                               # without power iterations
    shake(discriminator, 0.5)
    x = guide = 30 * distributions(6, 196)
    x = x.unflatten(1, (14, 14))[:, None]
    for layer in convolutions(discriminator):
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        x = torch.where(x > 0, x, 0.2 * x) if layer.out_channels > 1 else x              # and no sigmoid
    torch.testing.assert_close(discriminator(guide), x.flatten(1), rtol=1e-5, atol=1e-6)  # float32
    slopes = [layer.negative_slope for layer in discriminator.modules() if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.2, 0.2] and ((x < 0).any() or (x > 1).any())
    with torch.autocast("cpu", torch.bfloat16):                                          # which it would do badly with
        torch.testing.assert_close(discriminator(guide), x.flatten(1), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("grid", [(2, 2), (2, 7), (3, 3), (4, 4), (4, 6), (5, 5), (6, 6), (7, 7), (8, 8), (9, 8), (10, 10),
                                  (12, 12), (14, 14), (15, 13), (16, 16), (28, 28), (32, 20), (2, 32)])
def test_the_discriminator_has_a_score_for_every_grid_and_sees_every_place(grid):
    discriminator = shake(automae.Discriminator(grid).eval(), 0.5)
    guide = distributions(3, grid[0] * grid[1]).requires_grad_()
    scores = discriminator(guide)
    assert scores.ndim == 2 and len(scores) == 3 and scores.shape[1] >= 1
    scores.square().sum().backward()
    assert (guide.grad.abs().amax(0) > 0).all()

@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (2, 2)])
def test_spectral_norms_are_one(grid):
    discriminator = shake(automae.Discriminator(grid), 2.0)                              # far from 1
    for _ in range(200):                                                                 # a power iteration each
        discriminator(distributions(2, grid[0] * grid[1]))
    discriminator.eval()
    for layer in convolutions(discriminator):                                            # whose error shrinks slowly
        assert 0.98 < torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() < 1.02

def test_the_discriminators_loss_and_what_it_sees():
    seen, scores = [], torch.randn(10, 3)

    def discriminator(guides):
        seen.append(guides)
        return scores + 0 * guides.sum()

    guide = distributions(5, 24).requires_grad_()
    loss = automae.discriminator_loss(discriminator, guide, (4, 6))
    wanted = (sum((s - 1) ** 2 for s in scores[:5].flatten().tolist()) + sum(s**2 for s in scores[5:].flatten().tolist())) / 30
    assert loss.item() == pytest.approx(wanted, rel=1e-5)                                # float32
    assert torch.equal(seen[0][5:], guide.detach()) and not seen[0].requires_grad and not loss.requires_grad
    torch.testing.assert_close(seen[0][:5].sum(1), torch.ones(5))
    assert (seen[0][:5].log().amax(1) - seen[0][:5].log().amin(1) <= 1.5 + 1e-4).all()   # boxes

@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4)])
def test_the_discriminator_learns_to_tell_boxes_from_peaks(grid):
    discriminator, places = automae.Discriminator(grid), grid[0] * grid[1]
    optimizer, curve = torch.optim.Adam(discriminator.parameters(), 1e-2, betas=(0.9, 0.95)), []
    for _ in range(200):
        guide = distributions(64, places, 5)                                             # with peaks
        loss = automae.discriminator_loss(discriminator, guide, grid)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        curve.append(loss.item())
    assert sum(curve[-10:]) / 10 < 0.21                                                  # 0.25: half of both for everything

# --------------------------------------------------------------------------------------------------------------- generator

@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("grid", [(4, 6), (2, 2), (14, 14)])
def test_the_generator_equals_its_formula_and_is_normalised(heads, grid):
    generator = shake(automae.Generator(heads, grid))
    first, second = (layer for layer in generator.modules() if isinstance(layer, nn.Conv2d))
    half = max(1, heads // 2)
    assert first.weight.shape == (half, heads, 3, 3) and second.weight.shape == (1, half, 3, 3)
    attention = distributions(5, heads * grid[0] * grid[1]).unflatten(1, (heads, -1))
    found = generator(attention)
    scaled = attention * grid[0] * grid[1]                                               # 1 on average, our choice
    x = F.conv2d(scaled.unflatten(2, grid), first.weight, first.bias, padding=1).clamp(min=0)
    x = F.conv2d(x, second.weight, second.bias, padding=1).flatten(1)
    torch.testing.assert_close(found, x - x.exp().sum(1, keepdim=True).log(), rtol=0, atol=1e-5)    # float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5), rtol=0, atol=1e-5)
    assert found.shape == (5, grid[0] * grid[1]) and found.std() > 0

def test_the_generators_probability_moves_with_the_attention():
    generator = shake(automae.Generator(3, (14, 14)), 0.3)
    blob = torch.zeros(1, 3, 14, 14)
    blob[:, :, 4:7, 4:7] = torch.rand(1, 3, 3, 3)
    here, there, nothing = (generator(x.flatten(2)).unflatten(1, (14, 14))
                            for x in (blob, blob.roll((2, 3), (2, 3)), torch.zeros_like(blob)))
    here, there = here - nothing, there - nothing                                        # borders see padding
    assert here.std() > 0.01
    torch.testing.assert_close(here.roll((2, 3), (1, 2)), there, rtol=0, atol=1e-5)      # float32

@pytest.mark.parametrize("heads", [4, 12])
def test_the_generator_starts_alive_whatever_the_seed(heads):
    """A ReLU that is 0 for all it sees learns nothing ever again: every picture would get the same mask."""
    attention = distributions(32, heads * 64).unflatten(1, (heads, 64)) * heads          # each head's sums to about 1
    for seed in range(100):
        torch.manual_seed(seed)
        generator = automae.Generator(heads, (8, 8))
        (generator(attention) * torch.randn(32, 64)).sum().backward()
        assert all(p.grad.abs().max() > 0 for p in generator.parameters() if p.ndim > 1), seed

def test_the_generators_logarithms_are_float32_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        found = automae.Generator(4, (14, 14))(distributions(3, 4 * 196).unflatten(1, (4, 196)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3), rtol=0, atol=1e-5)

# ------------------------------------------------------------------------------------------------------------------- prior

def test_the_prior_is_a_vits_attention_without_gradient():
    vit = shake(common.ViT((16, 24), 4, 3, dim=16, depth=3, heads=2, drop_path=0.5), 0.3)
    frozen = automae.Prior(vit.train())
    images = pictures(4, (4, 6)).requires_grad_()
    found = frozen(images)
    assert not any(p.requires_grad for p in frozen.parameters()) and not any(part.training for part in vit.modules())
    assert found.shape == (4, 2, 24) and not found.requires_grad
    assert torch.equal(found, vit.attention_map(images).detach()) and torch.equal(found, frozen(images))
    assert (found > 0).all() and (found.sum(-1) < 1).all()                               # the class token keeps the rest

def test_every_blocks_attention_is_that_of_a_vit_cut_off_after_it():
    vit = shake(common.ViT((16, 24), 4, 3, dim=16, depth=3, heads=2), 0.3)
    frozen, images = automae.Prior(vit, every=True), pictures(4, (4, 6))
    found = frozen(images)
    assert found.shape == (4, frozen.maps, 24) == (4, 6, 24) and not found.requires_grad
    for k in range(3):
        shorter = common.ViT((16, 24), 4, 3, dim=16, depth=k + 1, heads=2)
        shorter.load_state_dict({name: value for name, value in vit.state_dict().items() if name in shorter.state_dict()})
        torch.testing.assert_close(found[:, 2 * k:2 * k + 2], shorter.attention_map(images), rtol=0, atol=1e-6)
    assert automae.Prior(vit).maps == 2

def test_a_prior_sees_pictures_as_it_was_trained_to(tmp_path):
    vit, pixels = shake(common.ViT((16, 16), 4, 3, dim=16, depth=2, heads=1), 0.3), 255 * torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([10.0, 20, 30]), torch.tensor([40.0, 50, 60])
    told = dict(mean=mean.tolist(), std=std.tolist(), size=16, patch=4, vit=dict(dim=16, depth=2, heads=1))
    run = SimpleNamespace(say=lambda text: None)
    for args, own in ((told, (mean, std)), ({}, (torch.tensor([100.0] * 3), torch.tensor([70.0] * 3)))):
        torch.save({"encoder": vit.state_dict(), "args": args}, tmp_path / "prior.pt")   # the second does not say
        options = SimpleNamespace(prior=tmp_path / "prior.pt", size=16, patch=4, channels=3, attention="last", mean=[100.0] * 3,
                                  std=[70.0] * 3)
        prior = automae.make_prior(options, None, run)
        wanted = vit.attention_map((pixels - own[0].view(3, 1, 1)) / own[1].view(3, 1, 1))
        torch.testing.assert_close(prior((pixels - 100) / 70), wanted, rtol=1e-4, atol=1e-6)

# ----------------------------------------------------------------------------------------------------------------- propose

def objects(count, size=(32, 48)):
    """Foreground masks (B, H, W): scattered blobs, so that objects have gaps."""
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for picture in masks:
        for _ in range(int(torch.randint(1, 4, ()))):
            top, left = int(torch.randint(size[0] - 6, ())), int(torch.randint(size[1] - 6, ()))
            picture[top:top + int(torch.randint(1, 7, ())), left:left + int(torch.randint(1, 7, ()))] = True
    return masks

def test_boxes_are_proposed_from_the_rows_and_columns_that_an_object_spans():
    masks, grid = objects(40), (4, 6)
    probability, guide = automae.propose("boxes", None, None, masks, torch.rand(40, 24), grid, 6)
    gaps = 0
    for picture, found, chance in zip(masks, guide, probability):
        touched = [part.any().item() for part in cut(picture[None], 8)]
        rows, columns = ({part(place, 6) for place in range(24) if touched[place]} for part in (int.__floordiv__, int.__mod__))
        slow = [float(min(rows) <= place // 6 <= max(rows) and min(columns) <= place % 6 <= max(columns)) for place in range(24)]
        assert found.tolist() == slow and chance.tolist() == pytest.approx([lit / sum(slow) for lit in slow])
        gaps += len(rows) < max(rows) - min(rows) + 1
    assert gaps                                                                          # rows between parts count, too

def test_a_picture_without_an_object_has_no_box_and_spoils_no_average():
    """As a crop may leave it."""
    masks = objects(4)
    masks[1] = False
    nothing = automae.propose("boxes", None, None, masks[1:2], torch.rand(1, 24), (4, 6), 6)[0]
    facts = automae.foreground_facts(nothing, torch.rand(1, 2, 24), torch.ones(1, 24), masks[1:2], (4, 6))
    assert all(fact.isfinite() for fact in facts.values())                               # a whole micro-batch without one
    probability, guide = automae.propose("boxes", None, None, masks, torch.rand(4, 24), (4, 6), 6)
    assert (guide[1] == 0).all() and probability.isfinite().all()
    facts = automae.foreground_facts(probability, None, torch.ones(4, 24), masks, (4, 6))
    assert all(fact.isfinite() for fact in facts.values())

def test_attention_proposes_the_places_of_the_highest_mean():
    attention = distributions(20, 3 * 24).unflatten(1, (3, 24))
    probability, guide = automae.propose("attention", None, attention, None, torch.rand(20, 24), (4, 6), 6)
    for heads, found, chance in zip(attention, guide, probability):
        mean = [sum(heads[:, place].tolist()) / 3 for place in range(24)]
        best = sorted(range(24), key=lambda place: -mean[place])[:6]
        assert [place for place in range(24) if found[place] == 1] == sorted(best) and found.sum() == 6
        assert chance.tolist() == pytest.approx(mean, rel=1e-5)

def test_random_masking_highlights_nothing():
    probability, guide = automae.propose("random", None, None, None, torch.rand(5, 24), (4, 6), 6)
    assert (guide == 0).all() and guide.shape == (5, 24) and torch.equal(probability, torch.full((5, 24), 1 / 24))

def test_learned_masking_draws_from_the_generators_probability():
    """The highest place of a Gumbel softmax is a draw from the distribution itself."""
    generator, draws = shake(automae.Generator(2, (4, 4)), 0.3), 20_000
    attention = 3 * torch.rand(1, 2, 16).expand(draws, -1, -1)
    probability, guide = automae.propose("learned", generator, attention, None, torch.rand(draws, 16), (4, 4), 4)
    wanted = generator(attention[:1]).exp()[0].tolist()
    assert not probability.requires_grad and guide.requires_grad
    assert probability[0].tolist() == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(guide.sum(1), torch.ones(draws), rtol=0, atol=1e-5)
    shares = (guide.argmax(1).bincount(minlength=16) / draws).tolist()
    for share, chance in zip(shares, wanted):
        assert share == pytest.approx(chance, abs=4.5 * math.sqrt(chance * (1 - chance) / draws))    # standard errors
    assert len(guide[:100].unique(dim=0)) == 100                                         # each picture its own draw

@pytest.mark.parametrize("again", [False, True])
def test_the_model_its_judge_and_the_prior_compile_to_one_graph_each(again, one_graph):
    images, noise, guide = torch.randn(4, 3, 16, 16), torch.rand(4, 16), torch.rand(4, 16, requires_grad=True)
    one_graph(tiny, lambda model: model(images, automae.highlight(guide, 4), noise)[0], again)
    one_graph(lambda: automae.Discriminator((4, 4)).eval(), lambda discriminator: discriminator(noise).square().sum(), again)
    one_graph(lambda: automae.Prior(common.ViT(16, 4, 3, 16, 2, 2), every=True), lambda prior: prior(images), again)

# --------------------------------------------------------------------------------------------------------- foreground facts

def test_foreground_facts_equal_a_loop_over_patches():
    masks, probability, attention = objects(9), distributions(9, 24), distributions(9, 3 * 24).unflatten(1, (3, 24))
    mask = (torch.rand(9, 24) < 0.75).float()
    found = automae.foreground_facts(probability, attention, mask, masks, (4, 6))
    sums = Counter()
    for b in range(9):
        for place, part in enumerate(cut(masks[b][None], 8)):
            there = part.float().mean().item()
            for side, share in (("foreground", there), ("background", 1 - there)):
                sums[side] += share
                sums["probability", side] += share * probability[b, place].item()
                sums["hidden", side] += share * mask[b, place].item()
                sums["attention", side] += share * attention[b, :, place].mean().item()
                sums["static", side] += share * probability[:, place].mean().item()      # one mask for all
    mean = lambda what, side: sums[what, side] / sums[side]
    wanted = {"foreground_ratio": mean("probability", "foreground") / mean("probability", "background"),
              "attention_ratio": mean("attention", "foreground") / mean("attention", "background"),
              "static_ratio": mean("static", "foreground") / mean("static", "background"),
              "hidden_foreground": mean("hidden", "foreground"), "hidden_background": mean("hidden", "background")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name                # float32
    assert "attention_ratio" not in automae.foreground_facts(probability, None, mask, masks, (4, 6))

def test_of_a_uniform_probability_the_foreground_ratio_is_one():
    even, attention = torch.full((9, 24), 1 / 24), torch.full((9, 2, 24), 0.03)
    found = automae.foreground_facts(even, attention, torch.ones(9, 24), objects(9), (4, 6))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(dict.fromkeys(found, 1.0), rel=1e-5)

# ------------------------------------------------------------------------------------------------------- who learns from what

LEARNERS = ("encoder", "decoder", "generator", "discriminator")

def watch(monkeypatch):
    """Looks on at a run: what each optimizer's step moves, what has a gradient then, where reconstruction's gradient goes."""
    seen = SimpleNamespace(parts={}, steps=[], gradients=[], masks=[], noise=[], highlighted=[], loss=None, scores=None)
    weights = lambda: {name: [p.detach().clone() for p in seen.parts[name].parameters()] for name in LEARNERS}
    keep, update, backward = common.Run.keep, common.Run.update, common.Run.backward
    forward, judge = automae.AutoMAE.forward, automae.Discriminator.forward

    def keep_them(run, **things):
        seen.parts = things
        keep(run, **things)

    def forward_and_look(model, images, highlighted, noise, mask_ratio=0.75):
        found = forward(model, images, highlighted, noise, mask_ratio)
        if torch.is_grad_enabled():
            seen.loss = found[0]
            for name, value in dict(highlighted=highlighted.detach(), noise=noise, masks=found[2]).items():
                getattr(seen, name).append(value)
        return found

    def judge_and_look(discriminator, guide):
        seen.scores = judge(discriminator, guide)
        return seen.scores

    def backward_and_look(run, loss):
        if seen.loss is not None:
            slopes = []
            for one in (seen.loss, loss):
                found = torch.autograd.grad(one, list(seen.parts["generator"].parameters()), retain_graph=True, allow_unused=True)
                slopes.append(None if all(part is None for part in found) else torch.cat([part.flatten() for part in found]))
            fooled = (seen.scores - 1).square().mean()
            weight = run.args.adversarial_weight
            assert loss.item() == pytest.approx((seen.loss + weight * fooled).item(), rel=1e-5)      # float32
            seen.gradients.append(slopes)
            seen.loss = None
        backward(run, loss)

    def update_and_look(run, optimizer):
        name = next(name for name, part in seen.parts.items() if part is optimizer)
        before, slopes = weights(), {part for part in LEARNERS for p in seen.parts[part].parameters()
                                     if p.grad is not None and p.grad.abs().max() > 0}
        update(run, optimizer)
        after = weights()
        moved = {part for part in LEARNERS if not all(map(torch.equal, before[part], after[part]))}
        seen.steps.append((name, slopes, moved))

    monkeypatch.setattr(common.Run, "keep", keep_them)
    monkeypatch.setattr(common.Run, "update", update_and_look)
    monkeypatch.setattr(common.Run, "backward", backward_and_look)
    monkeypatch.setattr(automae.AutoMAE, "forward", forward_and_look)
    monkeypatch.setattr(automae.Discriminator, "forward", judge_and_look)
    return seen

@pytest.mark.parametrize("flags", ["", "--two-stage", "--adversarial-weight 0"])
def test_each_step_moves_only_what_it_should_and_gradients_go_where_they_should(flags, prior, tmp_path, cli, monkeypatch):
    seen = watch(monkeypatch)
    code, _, errors = cli(*QUICK, *prior, "--micro-batch", 8, *flags.split(), "--out", tmp_path / "run")
    assert code == 0 and not errors
    rest = {"encoder", "decoder", "generator"}
    assert seen.steps == [("discriminator_optimizer", {"discriminator"}, {"discriminator"}), ("optimizer", rest, rest)] * 8
    assert len(seen.gradients) == 16                                                     # micro-batches
    for reconstruction, both in seen.gradients:
        assert (reconstruction is None) == (flags == "--two-stage")                      # not reached: exactly zero
        assert both.abs().max() > 0
        if flags == "--adversarial-weight 0":
            torch.testing.assert_close(both, reconstruction, rtol=1e-5, atol=1e-12)      # float32
        elif flags == "":
            assert reconstruction.abs().max() > 0 and not torch.allclose(both, reconstruction, rtol=1e-3)
    for highlighted, noise, mask in zip(seen.highlighted, seen.noise, seen.masks):
        assert (highlighted.sum(1) == 4).all() and ((mask == 0).sum(1) == 4).all()
        wanted = common.keep_lowest(noise + 0.5 * highlighted, 4)[2]
        assert torch.equal(mask, wanted)
    assert len(torch.cat(seen.noise).unique(dim=0)) == 128                               # two epochs of 64 pictures
    assert len(torch.cat(seen.masks).unique(dim=0)) > 100                                # of 1820: a few alike by chance

def test_with_two_stages_and_no_adversary_the_generator_learns_nothing(prior, tmp_path, cli, monkeypatch):
    seen = watch(monkeypatch)
    assert cli(*QUICK, *prior, "--two-stage", "--adversarial-weight", 0, "--weight-decay", 0, "--out", tmp_path / "run")[0] == 0
    assert {part for name, _, moved in seen.steps for part in moved if name == "optimizer"} == {"encoder", "decoder"}

def test_the_prior_never_changes(prior, tmp_path, cli, monkeypatch):
    made, make = [], automae.make_prior
    monkeypatch.setattr(automae, "make_prior", lambda *arguments: made.append(make(*arguments)) or made[-1])
    assert cli(*QUICK, *prior, "--out", tmp_path / "run")[0] == 0
    assert not any(part.training for part in made[0].vit.modules()) and all(p.grad is None for p in made[0].parameters())
    assert equal(made[0].vit.state_dict(), common.read_checkpoint(prior[1])["encoder"])

# --------------------------------------------------------------------------------------------------------------- runs, whole

def test_a_run_leaves_what_the_design_says(uninterrupted):
    out, output, errors = uninterrupted
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.jsonl", "args.json", "masks.png", "prior"}
    assert (out / "prior" / "prior.pt").exists()
    assert not errors and "\r" not in output and re.search("first a plain MAE, 1 epoch.*prior.pt", output)
    assert sum(line.startswith("epoch ") for line in output.splitlines()) == 3           # the prior's is one
    assert json.loads((out / "args.json").read_text())["masking"] == "learned"
    assert [(line["epoch"], line["step"]) for line in log_of(out)] == [(1, PER_EPOCH), (2, 2 * PER_EPOCH)]
    for line in log_of(out):
        assert FACTS | GUIDED | ADVERSARIAL <= line.keys()
        assert all(0 < line[name] < 10 for name in FACTS | GUIDED | ADVERSARIAL)
        assert 0.7 < line["hidden_foreground"] < 0.9 and 0.6 < line["hidden_background"] < 0.8       # 0.75 of all
    assert losses(out)[1] < losses(out)[0]

def test_the_picture_is_a_png_of_a_sensible_size(uninterrupted):
    path = uninterrupted[0] / "masks.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    sheet = torchvision.io.decode_image(str(path))
    assert 5 * 128 <= sheet.shape[1] <= 5 * 128 * 1.5 and 10 * 128 <= sheet.shape[2] <= 10 * 128 * 1.5    # five rows of ten
    for row in sheet.chunk(5, dim=1):
        assert row.float().std() > 10                                                    # something is drawn in each

def test_a_checkpoint_is_plain_tensors_and_its_encoder_a_plain_vit(uninterrupted):
    checkpoint = saved(uninterrupted[0])                                                 # weights_only=True
    assert PARTS | LEARNED | {"step", "args"} <= checkpoint.keys() and checkpoint["step"] == 2 * PER_EPOCH
    encoder = common.ViT(32, 8, 3, **NANO)
    encoder.load_state_dict(checkpoint["encoder"])                                       # strict
    common.Decoder(encoder, 32, 1, 4).load_state_dict(checkpoint["decoder"])
    automae.Generator(16, (4, 4)).load_state_dict(checkpoint["generator"])               # four heads in four blocks
    discriminator = automae.Discriminator((4, 4))
    discriminator.load_state_dict(checkpoint["discriminator"])
    learned = sum(not name.endswith("pos_embed") for part in ("encoder", "decoder", "generator") for name in checkpoint[part])
    assert len(checkpoint["optimizer"]["state"]) == learned
    assert len(checkpoint["discriminator_optimizer"]["state"]) == len(list(discriminator.parameters()))
    for name in ("optimizer", "discriminator_optimizer"):
        groups = checkpoint[name]["param_groups"]
        assert all(tuple(group["betas"]) == (0.9, 0.95) for group in groups)
        assert {round(group["lr"] / groups[0]["lr"], 6) for group in groups} == ({1.0, 0.2} if name == "optimizer" else {1.0})
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == checkpoint["discriminator_optimizer"]["param_groups"][0]["lr"]

@pytest.mark.parametrize("kind, share, scale", [("paper", 1.0, 1), ("matched", 0.2, 16)])
def test_pseudo_masks_choose_boxes_scale_and_the_generators_pace(kind, share, scale, prior, tmp_path, cli, monkeypatch):
    drawn, made, boxes, judge = set(), [], automae.boxes, automae.Discriminator
    monkeypatch.setattr(automae, "boxes", lambda *given: drawn.add(given[3]) or boxes(*given))
    monkeypatch.setattr(automae, "Discriminator", lambda *given: made.append(judge(*given)) or made[-1])
    code, _, errors = cli(*QUICK, *prior, "--epochs", 1, "--pseudo-masks", kind, "--out", tmp_path / "run")
    assert code == 0 and not errors
    assert drawn == {kind == "matched"} and [one.scale for one in made] == [scale]
    groups = saved(tmp_path / "run")["optimizer"]["param_groups"]
    assert {round(group["lr"] / groups[0]["lr"], 6) for group in groups} == {1.0, share}

@pytest.mark.parametrize("task", ["knn", "reconstruct"])
def test_mae_goes_on_with_the_encoder_unchanged(task, uninterrupted, tmp_path, cli):
    code, output, errors = cli("--task", task, "--init", uninterrupted[0] / "last.pt", "--limit", 64, "--device", "cpu",
                               "--out", tmp_path / "run", script=mae)
    assert code == 0 and not errors and "left out" not in output and "new:" not in output
    assert task != "knn" or 0 < log_of(tmp_path / "run")[-1]["top1"] < 1

FLAGS = {  # flags: what the log and the checkpoint have beyond the usual, the rows of the picture, and what the model is
    "": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=0.5, norm_pixels=False)),
    "--masking attention": (GUIDED, set(), 4, dict(mask_factor=0.5, generator=None)),
    "--masking boxes": (set(), set(), 3, dict(mask_factor=0.5, generator=None)),
    "--masking random": (set(), set(), 3, dict(generator=None)),
    "--two-stage": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=0.5)),
    "--mask-factor 1": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=1.0)),
    "--adversarial-weight 0.1": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=0.5)),
    "--pseudo-masks paper --attention last": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=0.5)),
    "--norm-pixels --mask-ratio 0.5": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(norm_pixels=True)),
    "--precision bf16": (GUIDED | ADVERSARIAL, LEARNED, 5, dict(mask_factor=0.5)),
    "--masking boxes --crop 0.1": (set(), set(), 3, dict(generator=None)),
}

@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_runs_and_logs_what_it_should(flags, prior, tmp_path, cli, monkeypatch):
    draw, models, sheets, save = automae.draw, [], [], automae.save_sheet
    monkeypatch.setattr(automae, "draw", lambda model, *others: (models.append(model), draw(model, *others)))
    monkeypatch.setattr(automae, "save_sheet", lambda path, rows: (sheets.append(rows), save(path, rows)))
    given = [] if "random" in flags or "boxes" in flags else prior                       # these look at none
    code, _, errors = cli(*QUICK, *given, *flags.split(), "--out", tmp_path / "run")
    assert code == 0 and not errors
    facts, parts, rows, expected = FLAGS[flags]
    for line in log_of(tmp_path / "run"):
        assert line.keys() & (FACTS | GUIDED | ADVERSARIAL) == FACTS | facts
        assert all(math.isfinite(line[name]) and line[name] >= 0 for name in FACTS | facts) and line["loss"] > 0
    assert len(losses(tmp_path / "run")) == 2
    assert saved(tmp_path / "run").keys() & (PARTS | LEARNED) == PARTS | parts
    assert {name: getattr(models[0], name) for name in expected} == expected
    assert len(sheets[0]) == rows
    originals, visible, painted = ([cut(image, 8) for image in list(sheets[0].values())[row]] for row in (0, -2, -1))
    for original, shown, filled in zip(originals, visible, painted):
        seen = [place for place in range(16) if torch.equal(shown[place], original[place])]
        assert len(seen) == (8 if "ratio" in flags else 4)
        assert all(torch.equal(filled[place], original[place]) for place in seen)
        for place in {*range(16)} - {*seen}:
            assert shown[place].flatten(1).unique(dim=1).shape[1] == 1                   # grey

@pytest.mark.parametrize("alike", [True, False])
def test_a_generator_that_treats_all_pictures_alike_is_told(alike, prior, tmp_path, cli, monkeypatch):
    """From outside: its attention replaced by one that differs much, its answer by one that does not at all."""
    forward = automae.Generator.forward
    monkeypatch.setattr(automae.Generator, "forward", lambda generator, attention: forward(
        generator, 0 * attention if alike else 1000 * (attention - 1 / 16)))
    code, output, errors = cli(*QUICK, *prior, "--lr", 1e-3, "--out", tmp_path / "run")
    assert code == 0 and not errors
    spread = [line["generator_spread"] for line in log_of(tmp_path / "run")]
    assert (max(spread) < 1e-5) if alike else (min(spread) > 0.1)                        # float32
    assert bool(re.search("generator.*same mask", output)) == alike

def test_masking_changes_what_is_hidden(tmp_path, cli):
    hidden = {}
    for masking in ("boxes", "random"):
        assert cli(*QUICK, "--masking", masking, "--epochs", 4, "--out", tmp_path / masking)[0] == 0
        lines = log_of(tmp_path / masking)
        hidden[masking] = [sum(line[f"hidden_{side}"] for line in lines) / 4 for side in ("foreground", "background")]
        ratio = [line["foreground_ratio"] for line in lines]
        assert min(ratio) > 1.3 if masking == "boxes" else ratio == pytest.approx([1] * 4, abs=1e-4)
    assert hidden["boxes"][0] > hidden["boxes"][1] + 0.05
    # 4 × 64 pictures, an object covers some 4 of 16 patches, with share 0.75 hidden: four standard errors are 0.055.
    assert hidden["random"] == pytest.approx([0.75, 0.75], abs=0.055)

def test_a_small_run_repeats_and_the_seed_changes_it(prior, tmp_path, cli):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert cli(*QUICK, *prior, "--epochs", 1, "--seed", seed, "--out", tmp_path / name)[0] == 0
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert all(equal(*(saved(tmp_path / name)[part] for name in "ab")) for part in LEARNED)
    assert losses(tmp_path / "a") != losses(tmp_path / "c")

# ------------------------------------------------------------------------------------------------------------- making a prior

def test_a_prior_is_made_once_kept_and_made_anew_when_it_does_not_fit(tmp_path, cli):
    out, first = tmp_path / "run", "first a plain MAE"
    path = out / "prior" / "prior.pt"
    words = [*QUICK, "--limit", 32, "--epochs", 1, "--prior-epochs", 1, "--out", out]
    code, output, errors = cli(*words)
    assert code == 0 and not errors and first in output and str(path) in output
    before, written, weights = path.read_bytes(), path.stat().st_mtime_ns, saved(out)
    code, output, _ = cli(*words, "--overwrite")
    assert code == 0 and first not in output and str(path) in output
    assert path.read_bytes() == before and path.stat().st_mtime_ns == written
    assert all(equal(saved(out)[part], weights[part]) for part in PARTS | LEARNED)       # made or read, the same prior
    for change in (["--seed", 1], ["--size", 48], ["--prior-epochs", 2]):
        before = path.read_bytes()
        code, output, errors = cli(*words, "--overwrite", *change)
        assert code == 0 and not errors and first in output and path.read_bytes() != before
    assert len(losses(out / "prior")) == 2 and common.vit_of(path)["size"] == 32

def test_a_mae_of_mae_py_is_a_prior_and_so_is_one_of_another_size(tmp_path, cli):
    for size, more in ((32, ""), (64, "positions resized from 8×8 to 4×4")):
        vit = tmp_path / f"{size}" / "last.pt"
        assert cli(*QUICK, "--size", size, "--epochs", 1, "--bank", 0, "--out", vit.parent, script=mae)[0] == 0
        before = vit.read_bytes()
        code, output, errors = cli(*QUICK, "--epochs", 1, "--prior", vit, "--out", tmp_path / f"from {size}")
        assert code == 0 and not errors and str(vit) in output and more in output and "first a plain" not in output
        assert vit.read_bytes() == before and not (tmp_path / f"from {size}" / "prior").exists()

def test_a_folder_of_pictures_works_with_a_prior(prior, tmp_path, cli):
    (tmp_path / "pictures").mkdir()
    data = paint_folder(tmp_path / "pictures", 24)
    code, _, errors = cli("--data", data, *QUICK, "--limit", 24, "--batch", 8, "--workers", 0, *prior, "--out", tmp_path / "run")
    assert code == 0 and not errors and (tmp_path / "run" / "masks.png").exists()
    assert all(not line.keys() & (FACTS - {"loss"}) and ADVERSARIAL <= line.keys() for line in log_of(tmp_path / "run"))

# ------------------------------------------------------------------------------------------------- killed, stopped, in parallel

@pytest.mark.parametrize("where, save, kill", [("run", PER_EPOCH - 2, PER_EPOCH + 2), ("prior", 3, PER_EPOCH - 2)])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(uninterrupted, tmp_path, cli, monkeypatch, where, save, kill):
    """The run itself, when the log is ahead of the checkpoint, and the prior's training before it."""
    out = tmp_path / "run"
    folder = out if where == "run" else out / "prior"
    finish(start(out, *RUN, end=(folder, save, kill, signal.SIGKILL)), -signal.SIGKILL)
    assert saved(folder)["step"] == save
    after, steps = common.Run.after_step, Counter()
    monkeypatch.setattr(common.Run, "after_step", lambda run: steps.update([os.path.basename(run.out)]) or after(run))
    code, _, errors = cli("--resume", "--out", out)                                      # with the options of before
    assert code == 0 and not errors
    assert steps == ({"run": 2 * PER_EPOCH - save} if where == "run" else {"prior": PER_EPOCH - save, "run": 2 * PER_EPOCH})
    assert_same_training(uninterrupted[0], out)
    one, two = saved(uninterrupted[0]), saved(out)
    assert all(equal(one[part], two[part]) for part in LEARNED)
    facts = [[{name: line[name] for name in line if name not in ("images_per_s", "seconds")} for line in log_of(folder)]
             for folder in (uninterrupted[0], out)]
    assert facts[0] == facts[1]
    assert (out / "masks.png").read_bytes() == (uninterrupted[0] / "masks.png").read_bytes()

def test_a_run_stopped_in_the_priors_training_goes_on_as_it_says(tmp_path, cli, monkeypatch):
    words = [*QUICK, "--epochs", 1, "--prior-epochs", 2, "--out", tmp_path / "run"]
    after = common.Run.after_step

    def stop(run):
        if run.step == 2 and run.out.endswith("prior"):
            os.kill(os.getpid(), signal.SIGTERM)
        after(run)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "after_step", stop)
        code, output, errors = cli(*words)
    assert code == 128 + signal.SIGTERM and not errors and "stopped and saved" in output
    code, _, errors = cli(*words, *["--resume"] * ("--resume goes on" in output))
    assert code == 0 and not errors
    assert len(losses(tmp_path / "run")) == 1 and len(losses(tmp_path / "run" / "prior")) == 2

def test_two_processes_that_add_up_two_train_what_one_does_that_adds_up_four(uninterrupted, tmp_path):
    out = tmp_path / "run"
    output, _ = finish(start(out, *RUN, processes=2))
    assert "batches of 1 × 4 × 8" in uninterrupted[1] and "batches of 2 × 2 × 8" in output
    one, two = saved(uninterrupted[0]), saved(out)
    for part in ("encoder", "decoder", "generator", "discriminator"):
        for name, value in tensors(one[part]).items():
            difference = (two[part][name[1:]] - value).abs()
            if part == "generator" and name == "/layers.2.bias":                         # no softmax feels it: rounding alone
                continue
            if name.endswith("qkv.bias"):                                                # keys: their gradient is rounding alone
                difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
            assert difference.max() < 1e-5, (part, name)                                 # sums in another order, in float32
    for line, other in zip(epochs_of(uninterrupted[0]), epochs_of(out), strict=True):
        for name in FACTS | GUIDED | ADVERSARIAL:
            assert other[name] == pytest.approx(line[name], rel=1e-5), name
        assert (other["epoch"], other["step"], other["lr"]) == (line["epoch"], line["step"], line["lr"])

# --------------------------------------------------------------------------------------------------------------- bad input

BAD = {  # what is wrong: options after the usual ones, and what the line must say
    "no prior for a folder": ("--data {pictures}", "--prior.*python mae.py --data {pictures} --patch 8.*--prior"),
    "no prior for a folder, by attention": ("--data {pictures} --masking attention", "--masking attention.*--prior"),
    "boxes where there are none": ("--data {pictures} --masking boxes", "--masking boxes.*scenes"),
    "a prior with another patch": ("--prior {tmp}/fine.pt", "--patch 4"),
    "a prior with a patch that does not divide": ("--prior {tmp}/odd.pt", "32.*5"),
    "a prior for grey pictures": ("--prior {tmp}/grey.pt", "channel"),
    "a prior that is not there": ("--prior {tmp}/nowhere.pt", "nowhere.pt"),
    "a prior cut off": ("--prior {tmp}/cut.pt", "cut.pt is cut off"),
    "a prior of something else": ("--prior {tmp}/other.pt", "other.pt has no encoder"),
    "an unknown masking": ("--masking stripes", "stripes"),
    "a factor below 0": ("--mask-factor -1", "mask-factor"),
    "a factor nan": ("--mask-factor nan", "mask-factor"),
    "a weight below 0": ("--adversarial-weight -0.1", "adversarial-weight"),
    "a prior that nothing looks at": ("--masking random --prior {tmp}/fine.pt", "--prior does .*--masking learned or attention"),
    "two stages without a generator": ("--masking random --two-stage", "--two-stage does .*goes with --masking learned"),
    "a box for a mask at random": ("--masking random --adversarial-weight 0.5", "--adversarial-weight does nothing here"),
    "an attention that guides nothing": ("--masking boxes --attention last", "--attention does .*learned or attention"),
    "a prior's epochs without one": ("--masking boxes --prior-epochs 2", "--prior-epochs does nothing here"),
    "epochs for a prior that is given": ("--prior {tmp}/fine.pt --prior-epochs 2", "--prior-epochs does .*without --prior"),
    "no epochs for the prior": ("--prior-epochs 0", "prior-epochs"),
    "mask ratio 1": ("--mask-ratio 1", "mask-ratio"),
    "mask ratio 0": ("--mask-ratio 0", "mask-ratio"),
    "mask ratio nan": ("--mask-ratio nan", "mask-ratio"),
    "no visible patch": ("--mask-ratio 0.95", "visible"),
    "a size that does not divide": ("--size 30", "30.*8"),
    "a batch that does not divide": ("--batch 16 --micro-batch 5", "16.*5"),
    "an option of mae.py": ("--bank 5", "bank"),
    "nothing to resume": ("--resume", "resume.*last.pt"),
}

@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(what, uninterrupted, tmp_path, cli):
    options, says = BAD[what]
    tmp = tmp_path / "in"
    (tmp / "pictures").mkdir(parents=True)
    paint_folder(tmp / "pictures", 2)
    for name, size, patch, channels in (("fine", 32, 4, 3), ("odd", 30, 5, 3), ("grey", 32, 8, 1)):
        torch.save({"model": common.ViT(size, patch, channels, dim=16, depth=1, heads=1).state_dict()}, tmp / f"{name}.pt")
    whole = (uninterrupted[0] / "last.pt").read_bytes()
    (tmp / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, tmp / "other.pt")
    paths = dict(tmp=tmp, pictures=tmp / "pictures")
    code, _, errors = cli(*QUICK, "--workers", 0, "--out", tmp_path / "out", *options.format(**paths).split())
    assert code == 2 and re.search(says.format(**paths), one_line(errors)), errors
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]        # so that the next try may begin

@pytest.mark.parametrize("flags", ["--decoder-depth 2", "--decoder-dim 64"])
def test_resuming_another_model_is_refused_and_loses_nothing(flags, prior, tmp_path, cli):
    out = tmp_path / "run"
    assert cli(*QUICK, *prior, "--epochs", 1, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, errors = cli("--resume", "--out", out, *flags.split())
    assert code == 2 and "last.pt" in one_line(errors)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

@pytest.mark.parametrize("words, wanted", [
    ("", dict(model="nano", size=64, patch=8, norm_pixels=False, prior_epochs=2, prior=None, pseudo_masks="matched",
              attention="all")),
    ("--data fashion-mnist", dict(model="nano", size=28, patch=4, prior_epochs=3)),
    ("--data /pictures", dict(model="base", size=224, patch=16, norm_pixels=True, epochs=800, batch=4096, lr=1.5e-4, warmup=40.0,
                              crop=0.2, weight_decay=0.05, decoder_dim=512, decoder_depth=8, decoder_heads=16,
                              prior_epochs=None, pseudo_masks="paper", attention="last"))])
def test_the_data_chooses_the_recipe_and_the_paper_is_the_default(words, wanted, monkeypatch):
    seen = []
    monkeypatch.setattr(automae, "pretrain", seen.append)
    automae.main(words.split())
    assert {name: getattr(seen[0], name) for name in wanted} == wanted
    paper = dict(masking="learned", mask_ratio=0.75, mask_factor=0.5, adversarial_weight=0.2, two_stage=False, out="runs/automae")
    assert {name: getattr(seen[0], name) for name in paper} == paper

def test_every_option_of_the_design_is_there_and_help_is_grouped(cli):
    code, output, _ = cli("--help")
    assert code == 0
    words = """--data --root --out --model --size --patch --epochs --batch --micro-batch --lr --warmup --weight-decay --workers
               --seed --precision --compile --resume --overwrite --device --limit --crop --norm-pixels --mask-ratio --masking
               --mask-factor --adversarial-weight --two-stage --prior --prior-epochs"""
    assert all(re.search(rf"{word}\b", output) for word in words.split())
    assert len(re.findall(r"^\w+:$", output, re.MULTILINE)) >= 4

# ------------------------------------------------------------------------------------------------------- what the issue asks

@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_scenes_the_generator_finds_objects_and_random_masks_do_not(seed, tmp_path):
    automae.main(["--seed", str(seed), "--out", str(tmp_path / "learned")])
    assert epochs_of(tmp_path / "learned")[-1]["foreground_ratio"] > 2
    automae.main(["--seed", str(seed), "--masking", "random", "--out", str(tmp_path / "random")])
    last = epochs_of(tmp_path / "random")[-1]
    assert last["foreground_ratio"] == pytest.approx(1, abs=0.02)
    assert last["hidden_foreground"] / last["hidden_background"] == pytest.approx(1, abs=0.02)
