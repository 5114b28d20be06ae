"""mixedae.py: mixing, attention and losses against slow loops; MAE as its special case; its runs; its answers to bad input."""

import functools
import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import common
import mae
import mixedae
from test_common import shake
from test_mae import (SMALL, assert_same_training, cut, epochs_of, finish, log_of, losses, one_line, saved, start,
                      tensors)

PER_EPOCH, PER_STEP = 8, 32                                                             # steps, pictures
RUN = [*SMALL, *f"--limit {PER_EPOCH * PER_STEP} --epochs 2 --batch {PER_STEP} --micro-batch {PER_STEP // 2} --lr 1e-2 "
       "--warmup 0.5 --device cpu".split()]                                             # 16 places; some two seconds
NANO = {name: value for name, value in common.VITS["nano"].items() if name != "patch"}
QUICK = [*SMALL, *"--limit 64 --epochs 2 --batch 16 --lr 1e-2 --warmup 0.5 --device cpu".split()]    # 8 steps

# ------------------------------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def tiny(grid=(4, 4), channels=3, dtype=torch.float32, **options):
    """A model of some thousand parameters, none of them 0 or 1, for pictures of grid × 4 pixels."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, channels, dim=16, depth=2, heads=2, attention=mixedae.HomologousAttention)
    return shake(mixedae.MixedAE(encoder, common.Decoder(encoder, 8, 1, 2), **options)).to(dtype)

def pictures(count, grid=(4, 4), channels=3, dtype=torch.float32):
    return torch.randn(count, channels, 4 * grid[0], 4 * grid[1], dtype=dtype)

def segment_of(model, member):
    """What is added to all tokens of a member: (D,), and 0 on average over the members."""
    vectors = model.segments["segment_token"][:, 0]
    return vectors[member] - sum(vectors) / len(vectors)

def identity(model):
    """The same model with an encoder that leaves tokens as they are."""
    model.encoder.blocks, model.encoder.norm = nn.Sequential(), nn.Identity()
    return model

def spy(model):
    """→ a list that fills with what reaches the decoder: its tokens and where they belong."""
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    return seen

def pixels_of(mask, patch=4, channels=3, size=(16, 16)):
    """mask (B, N) → the same for every pixel, bool (B, C, H, W)."""
    return common.unpatchify(mask[..., None].expand(-1, -1, patch**2 * channels), patch, size).bool()

def slow_token(model, image, place):
    """The token of one patch by hand: its pixels through the projection, and its position."""
    weight, bias = model.encoder.patch_embed["proj"].weight, model.encoder.patch_embed["proj"].bias
    return weight.flatten(1) @ cut(image)[place].flatten() + bias + model.encoder.pos_embed[0, 1 + place]

start = functools.partial(start, script=mixedae)

# ------------------------------------------------------------------------------------------------------------------- places

@pytest.mark.parametrize("places, n, group, turns", [(16, 4, 4, 1), (16, 4, 4, 4), (12, 6, 2, 2), (24, 3, 8, 8), (12, 3, 1, 1),
                                                     (12, 3, 1, 4), (12, 3, 2, 4), (6, 1, 6, 1)])
def test_the_shares_of_a_group_equal_a_slow_loop(places, n, group, turns):
    noise = torch.rand(3, places)
    shuffle, slow = mixedae.share_places(noise, n, group, turns), []
    for turn in range(turns):
        for values in noise.tolist():
            order = sorted(range(places), key=lambda place: values[place])
            for member in range(group):
                slow.append({order[(n * (turn + member) + i) % places] for i in range(n)})
    assert [set(row[:n]) for row in shuffle.tolist()] == slow
    assert all(sorted(row) == list(range(places)) for row in shuffle.tolist())           # the others follow, each once

@pytest.mark.parametrize("places, n, turns", [(16, 4, 1), (16, 4, 4), (12, 6, 2), (24, 3, 8), (15, 5, 3)])
def test_every_place_has_one_owner_in_each_turn_and_every_picture_owns_every_place_once(places, n, turns):
    group = places // n
    own = mixedae.share_places(torch.rand(5, places), n, group, turns)[:, :n].unflatten(0, (turns, 5, group))   # (T, G, M, n)
    everything = torch.arange(places)
    assert (own.transpose(0, 1).flatten(2).sort(-1).values == everything).all()          # in a turn, over the group
    if turns == group:
        assert (own.permute(1, 2, 0, 3).flatten(2).sort(-1).values == everything).all()  # over the turns, for each picture

def test_every_member_is_as_likely_to_own_any_place():
    draws, places, n, group = 6000, 12, 3, 4
    own = mixedae.share_places(torch.rand(draws, places), n, group)[:, :n].unflatten(0, (draws, group))
    for member in range(group):
        count, expected = own[:, member].flatten().bincount(minlength=places).double(), draws * n / places
        # Without replacement the counts vary by 1 − n/N less than a multinomial's: corrected, this is chi-square with 11 degrees.
        chi_square = ((count - expected) ** 2 / expected).sum() * 11 / (12 - n)
        assert 1.5 < chi_square < 40                                                     # outside: odds of some 1e-4 each

def test_near_places_are_as_often_of_one_picture_as_far_ones():
    draws, places, n, group = 20_000, 12, 3, 4
    own = mixedae.share_places(torch.rand(draws, places), n, group)[:, :n].unflatten(0, (draws, group))
    owner = torch.empty(draws, places, dtype=torch.long)
    owner.scatter_(1, own.flatten(1), torch.arange(group).repeat_interleave(n).expand(draws, -1))
    together = (owner[:, :, None] == owner[:, None]).double().mean(0)[~torch.eye(places, dtype=torch.bool)]
    share = (n - 1) / (places - 1)
    assert (together - share).abs().max() < 5 * math.sqrt(share * (1 - share) / draws)   # five standard errors, 66 pairs

def test_groups_and_calls_draw_their_own_places():
    model, images = tiny((4, 6)), pictures(4, (4, 6)).repeat(8, 1, 1, 1)
    first, second = model.mix(images)[1], model.mix(images)[1]
    assert len(torch.cat([first, second]).unique(dim=0)) == 64                           # two alike are unlikely, and seeded

# ---------------------------------------------------------------------------------------------------------- mixing, and back

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grid, members", [((4, 4), 4), ((2, 6), 2), ((6, 4), 8), ((3, 4), 3)])
def test_a_mixture_equals_a_loop_over_pictures_and_places(grid, members, channels):
    places, groups = grid[0] * grid[1], 2
    n = places // members
    model = tiny(grid, channels, torch.float64, members=members)
    images, noise = pictures(groups * members, grid, channels, torch.float64), torch.rand(groups, places)
    tokens, shuffle = model.mix(images, noise)
    assert tokens.shape == (groups, places, 16) and shuffle.shape == (groups * members, places)
    for g in range(groups):
        order, slow = noise[g].argsort().tolist(), []
        for place in range(places):
            member = order.index(place) // n
            slow.append(slow_token(model, images[g * members + member], place) + segment_of(model, member))
        found = tokens[g].tolist()
        for member in range(members):
            mine = shuffle[g * members + member, :n].tolist()
            assert set(mine) == set(order[n * member:n * member + n])
            for i, place in enumerate(mine):                                             # float64, sums in another order
                assert found[member * n + i] == pytest.approx(slow[place].tolist(), abs=1e-12)

@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("options", [dict(members=4), dict(members=2), dict(members=4, full=True), dict(members=4, group=1)])
def test_un_mixing_gives_every_picture_its_own_tokens_at_their_places(options, segments):
    grid = (4, 6)
    model = identity(tiny(grid, dtype=torch.float64, homologous=False, segments=segments, **options))
    images, seen = pictures(8, grid, dtype=torch.float64), spy(model)
    _, _, mask, _ = model(images)
    (latent, restore), turns = seen[0], model.turns
    n, group = 24 // options["members"], options.get("group", options["members"])
    assert latent.shape == (8 * turns, 1 + n, 16) and restore.shape == mask.shape == (8 * turns, 24)
    for row in range(8 * turns):
        added = segment_of(model, row % group) if segments else 0
        torch.testing.assert_close(latent[row, 0], model.encoder.cls_token[0, 0] + model.encoder.pos_embed[0, 0])
        owned = [place for place in range(24) if not mask[row, place]]
        assert sorted(restore[row].tolist()) == list(range(24)) and len(owned) == n
        for place in owned:
            wanted = slow_token(model, images[row % 8], place) + added
            torch.testing.assert_close(latent[row, 1 + restore[row, place]], wanted, rtol=0, atol=1e-12)    # as above

def test_all_pictures_of_a_group_get_its_class_token():
    model = tiny()
    seen = spy(model)
    model(pictures(8))
    classes = seen[0][0][:, 0].unflatten(0, (2, 4))
    assert torch.equal(classes, classes[:, :1].expand_as(classes)) and not torch.allclose(classes[0], classes[1], atol=1e-4)

# ---------------------------------------------------------------------------------------------------------------- attention

def attentions(top, dim=16, heads=2, dtype=torch.float64):
    """The homologous one, and a plain one of the same weights."""
    homologous, plain = shake(mixedae.HomologousAttention(dim, heads)).to(dtype), common.Attention(dim, heads).to(dtype)
    plain.load_state_dict(homologous.state_dict())                                       # strict
    homologous.top = top
    return homologous, plain

def slow_attention(attention, x):
    """Query by query and head by head → output (B, T, D), weights (B, H, T, T), accuracy (H,)."""
    (B, T, D), H, top = x.shape, attention.heads, attention.top
    weights, right, outputs, d = torch.zeros(B, H, T, T, dtype=x.dtype), [0] * H, [], D // H
    for b in range(B):
        qkv, columns = x[b] @ attention.qkv.weight.T + attention.qkv.bias, []
        for h in range(H):
            q, k, v = (qkv[:, part * D + h * d:part * D + (h + 1) * d] for part in range(3))
            rows = []
            for i in range(T):
                nearest = sorted(range(1, T), key=lambda j: -(q[i] @ k[j]).item())[:top]     # noqa: B023
                seen = [0, *nearest] if i else list(range(T))
                share = torch.stack([q[i] @ k[j] / math.sqrt(d) for j in seen]).softmax(0)
                rows.append(sum(part * v[j] for part, j in zip(share, seen)))
                weights[b, h, i, seen] = share.detach()
                right[h] += sum((j - 1) // top == (i - 1) // top for j in nearest) if i else 0
            columns.append(torch.stack(rows))
        outputs.append(torch.cat(columns, dim=1) @ attention.proj.weight.T + attention.proj.bias)
    return torch.stack(outputs), weights, [count / (B * (T - 1) * top) for count in right]

@pytest.mark.parametrize("top", [1, 2, 4, 8])
def test_homologous_attention_equals_a_loop_in_values_and_gradients(top):
    attention, _ = attentions(top)
    x, direction = (torch.randn(2, 9, 16, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    output, (slow, weights, accuracy) = attention(x), slow_attention(attention, x)
    torch.testing.assert_close(output, slow, rtol=0, atol=1e-10)                         # float64, sums in another order
    torch.testing.assert_close(attention.weights(x), weights, rtol=0, atol=1e-10)
    assert attention.accuracy.tolist() == pytest.approx(accuracy, abs=1e-6)              # a mean in float32
    wanted = [x, *attention.parameters()]
    for found, loop in zip(*(torch.autograd.grad((y * direction).sum(), wanted) for y in (output, slow))):
        torch.testing.assert_close(found, loop, rtol=0, atol=1e-10)

@pytest.mark.parametrize("top", [None, 8])
def test_without_a_choice_it_is_plain_attention(top):
    attention, plain = attentions(top)
    x, direction = (torch.randn(2, 9, 16, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(attention(x), plain(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(attention.weights(x), plain.weights(x), rtol=0, atol=1e-10)
    (attention(x) * direction).sum().backward(), (plain(x) * direction).sum().backward()
    for (name, p), q in zip(attention.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=name)
    assert not torch.allclose(attentions(4)[0](x), plain(x), atol=1e-3)                  # a choice does make a difference

def test_its_parameters_are_those_of_plain_attention():
    homologous, plain = mixedae.HomologousAttention(24, 3), common.Attention(24, 3)
    sizes = [{name: value.shape for name, value in module.state_dict().items()} for module in (homologous, plain)]
    assert sizes[0] == sizes[1]
    encoder, other = tiny().encoder, common.ViT(16, 4, 3, dim=16, depth=2, heads=2)
    other.load_state_dict(encoder.state_dict())                                          # strict: a plain ViT
    images = pictures(2)
    for block in encoder.blocks:
        block.attn.top = None
    assert torch.equal(encoder(images), other(images))

def test_weights_sum_to_one_and_are_zero_where_a_query_does_not_look():
    attention, _ = attentions(3, dtype=torch.float32)
    weights = attention.weights(torch.randn(5, 13, 16))
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2, 13))
    assert ((weights[:, :, 1:] > 0).sum(-1) == 4).all()                                  # three patches and the class token
    assert (weights[:, :, 0] > 0).all() and (weights[..., 0] > 0).all()                  # the class token sees all, all see it

@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "equal tokens", "equal tokens in bfloat16"])
def test_exactly_so_many_keys_are_chosen_in_low_precision_and_among_equals(kind):
    attention, _ = attentions(5, dtype=torch.bfloat16 if kind.endswith("bfloat16") else torch.float32)
    x = torch.randn(4, 21, 16)
    if kind.startswith("equal"):
        x = x[:, :1].repeat(1, 21, 1)                                                    # every key is as near as any other
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        x = x.to(attention.proj.weight.dtype)
        weights, output = attention.weights(x), attention(x)
        value = attention.split(x)[2]
        mixed = attention.proj((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))
    assert ((weights[:, :, 1:] > 0).sum(-1) == 6).all()
    assert output.isfinite().all()
    torch.testing.assert_close(output.float(), mixed.float(), rtol=0.05, atol=0.05)      # eight bits, some roundings in a row

@pytest.mark.parametrize("patches, top", [(4, 5), (4, 100), (1, 2)])
def test_more_keys_than_patches_is_a_problem(patches, top):
    attention, _ = attentions(top)
    for call in (attention, attention.weights):
        with pytest.raises(common.Problem, match=f"{top} keys.*{patches} patches"):
            call(torch.randn(2, 1 + patches, 16, dtype=torch.float64))

def test_accuracy_is_one_when_queries_find_their_own_and_zero_when_they_avoid_them():
    attention, _ = attentions(4)
    nn.init.zeros_(attention.qkv.bias), nn.init.zeros_(attention.qkv.weight)
    attention.qkv.weight.data[:16], attention.qkv.weight.data[16:32] = torch.eye(16), torch.eye(16)     # q = k = x
    x = torch.cat([torch.zeros(1, 8), torch.eye(8)[torch.arange(12) // 4]]).repeat(1, 2)[None].double()  # a picture, a direction
    attention(x)
    assert attention.accuracy.tolist() == [1, 1]
    attention.qkv.weight.data[16:24] *= -1                                               # the first head seeks the opposite
    attention(x)
    assert attention.accuracy.tolist() == [0, 1]

# --------------------------------------------------------------------------------------------------------- contrastive loss

@pytest.mark.parametrize("places, n, temperature", [(12, 3, 0.25), (8, 4, 0.25), (8, 2, 1.0), (6, 6, 0.25)])
def test_the_contrastive_loss_equals_the_double_sum(places, n, temperature):
    tokens = 3 * torch.randn(2, places, 5, dtype=torch.float64) + 1
    total, count = 0.0, 0
    for group in tokens:
        cosine = [[(a @ b / (a.norm() * b.norm())).item() for b in group] for a in group]
        for i in range(places):
            below = sum(math.exp(cosine[i][other] / temperature) for other in range(places) if other != i)
            mates = [j for j in range(places) if j // n == i // n and j != i]
            total -= sum(math.log(math.exp(cosine[i][j] / temperature) / below) for j in mates) / len(mates)
            count += 1
    found = mixedae.contrastive_loss(tokens, n, *([temperature] if temperature != 0.25 else []))
    assert found.item() == pytest.approx(total / count, abs=1e-5) and found.shape == ()  # which it computes in float32

def test_the_contrastive_loss_is_lowest_when_a_pictures_tokens_agree_and_pictures_do_not():
    loss = lambda tokens: mixedae.contrastive_loss(tokens[None], 3).item()
    alike = torch.eye(8)[torch.arange(12) // 3]                                          # each picture a direction of its own
    expected = math.log(2 * math.exp(4) + 9) - 4                                         # two mates at 1, nine others at 0
    assert loss(alike) == pytest.approx(expected, abs=1e-5)
    assert loss(alike) < loss(torch.randn(12, 8)) < loss(torch.eye(8)[torch.arange(12) % 4])
    assert loss(torch.ones(12, 8)) == pytest.approx(math.log(11), abs=1e-5)              # nothing to tell apart

def test_the_contrastive_loss_does_not_depend_on_the_length_of_tokens():
    tokens = torch.randn(2, 8, 6)
    scaled = mixedae.contrastive_loss(tokens * torch.rand(2, 8, 1).add(0.1).mul(30), 2)
    torch.testing.assert_close(scaled, mixedae.contrastive_loss(tokens, 2), rtol=1e-5, atol=0)   # float32

@pytest.mark.parametrize("tokens", [torch.randn(2, 8, 6), torch.zeros(2, 8, 6), torch.ones(2, 8, 6), 1e4 * torch.randn(2, 8, 6),
                                    torch.randn(2, 8, 6).bfloat16()], ids=["usual", "zero", "equal", "large", "bfloat16"])
def test_the_contrastive_loss_has_a_finite_gradient(tokens):
    loss = mixedae.contrastive_loss(tokens.requires_grad_(), 4)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and tokens.grad.isfinite().all()

def test_a_step_down_its_gradient_lowers_the_contrastive_loss():
    tokens = torch.randn(2, 8, 6, requires_grad=True)
    before = mixedae.contrastive_loss(tokens, 4)
    before.backward()
    assert mixedae.contrastive_loss(tokens.detach() - 0.1 * tokens.grad, 4) < before

# ----------------------------------------------------------------------------------------------------------------- segments

@pytest.mark.parametrize("options", [dict(members=4), dict(members=2), dict(members=4, full=True)])
def test_a_segment_is_shared_within_a_picture_and_differs_between_pictures(options):
    model, images, noise = tiny(dtype=torch.float64, **options), pictures(8, dtype=torch.float64), torch.rand(8, 16)
    members = options["members"]
    noise = noise[:8 // members]
    with torch.no_grad():
        mixed = model.mix(images, noise)[0]
        model.segments.clear()
        added = (mixed - model.mix(images, noise)[0]).unflatten(1, (members, -1))        # (G, M, n, D)
    torch.testing.assert_close(added, added[:1, :, :1].expand_as(added), rtol=0, atol=1e-12)     # a sum and a difference
    vectors = added[0, :, 0]
    assert torch.pdist(vectors).min() > 0.05                                             # of lengths around 0.4

def test_segments_start_small_and_different():
    torch.manual_seed(0)
    encoder = common.ViT(16, 4, 3, dim=256, depth=1, heads=2, attention=mixedae.HomologousAttention)
    segment = mixedae.MixedAE(encoder, common.Decoder(encoder, 8, 1, 2)).segments["segment_token"]
    assert segment.shape == (4, 1, 256) and segment.std().item() == pytest.approx(0.1, rel=0.1)      # of 1024 numbers, 4.5 σ
    assert torch.pdist(segment[:, 0]).min() > 1.6                                        # √512 · 0.1 = 2.3

def test_segments_learn_and_do_not_decay():
    model = tiny()
    model(pictures(8))[0].backward()
    (segment,) = model.segments.parameters()
    assert (segment.grad.flatten(1).abs().amax(1) > 1e-6).all()                          # each of the four vectors
    groups = [group for group in common.adamw(model, 0.05).param_groups if any(p is segment for p in group["params"])]
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0 and groups[0]["lr_scale"] == 1

def test_without_segments_there_are_none():
    model = tiny(segments=False)
    assert not list(model.segments.parameters()) and not any("segment" in name for name in model.state_dict())
    assert len(list(tiny().segments.parameters())) == 1

# --------------------------------------------------------------------------------------------------- MAE as a special case

@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("members", [2, 4, 8])
def test_with_everything_off_and_groups_of_one_it_is_mae_number_for_number(members, norm_pixels):
    model = tiny((4, 6), norm_pixels=norm_pixels, members=members, segments=False, homologous=False, contrastive=0, group=1)
    encoder = common.ViT((16, 24), 4, 3, dim=16, depth=2, heads=2)
    other = mae.MAE(encoder, common.Decoder(encoder, 8, 1, 2), norm_pixels)
    other.load_state_dict(model.state_dict())                                            # strict
    images, noise = pictures(5, (4, 6)), torch.rand(5, 24)
    loss, prediction, mask, facts = model(images, noise)
    their_loss, their_prediction, their_mask = other(images, 1 - 1 / members, noise)
    assert torch.equal(mask, their_mask) and facts.keys() == {"reconstruction_loss"}
    torch.testing.assert_close(loss, their_loss, rtol=0, atol=1e-6)                      # float32, the same sums
    torch.testing.assert_close(prediction, their_prediction, rtol=0, atol=1e-6)
    loss.backward(), their_loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6, msg=name)

def test_naive_mixing_is_not_mae():
    naive = tiny(segments=False, homologous=False, contrastive=0)
    images, noise = pictures(4), torch.rand(1, 16)
    alone = tiny(segments=False, homologous=False, contrastive=0, group=1)
    every = torch.stack([noise[0].argsort().roll(-4 * member).argsort() for member in range(4)]).float()
    assert torch.equal(naive(images, noise)[2], alone(images, every)[2])                 # the same places are visible
    assert not torch.allclose(naive(images, noise)[1], alone(images, every)[1], atol=1e-3)

# ---------------------------------------------------------------------------------------------------------------- full mode

@pytest.mark.parametrize("members", [2, 4, 8])
def test_in_full_mode_each_picture_is_painted_from_each_of_its_parts(members):
    model, images = tiny(members=members, full=True), pictures(16)
    tokens, shuffle = model.mix(images)
    _, prediction, mask, _ = model(images)
    assert tokens.shape == (16, 16, 16)                                                  # as many sequences as pictures
    assert shuffle.shape == mask.shape == (16 * members, 16) and prediction.shape == (16 * members, 16, 48)
    assert ((1 - mask).unflatten(0, (members, 16)).sum(0) == 1).all()                    # visible once, at every place
    assert (mask.sum(1) == 16 - 16 // members).all()

@pytest.mark.parametrize("members", [2, 4])
def test_the_full_loss_is_the_mean_over_assignments_passed_on(members):
    full, compose = tiny(members=members, full=True), tiny(members=members)
    images, noise, turns = pictures(8), torch.rand(8 // members, 16), []
    compose.load_state_dict(full.state_dict())
    for turn in range(members):
        order = noise.argsort(dim=1).roll(-turn * 16 // members, dims=1)
        turns.append(compose(images, order.argsort(dim=1).float()))                      # noise that sorts into this order
    loss, prediction, mask, facts = full(images, noise)
    assert torch.equal(mask, torch.cat([each[2] for each in turns]))
    torch.testing.assert_close(prediction, torch.cat([each[1] for each in turns]), rtol=0, atol=1e-5)    # float32
    torch.testing.assert_close(loss, torch.stack([each[0] for each in turns]).mean(), rtol=1e-5, atol=0)
    for name, value in facts.items():
        torch.testing.assert_close(value, torch.stack([each[3][name] for each in turns]).mean(0), rtol=1e-5, atol=0)

# ---------------------------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("members, full", [(2, False), (4, False), (8, False), (4, True)])
def test_shapes_masks_and_facts(members, full):
    model, images = tiny((4, 6), members=members, full=full), pictures(16, (4, 6))
    loss, prediction, mask, facts = model(images)
    rows, n = 16 * (members if full else 1), 24 // members
    assert loss.shape == () and prediction.shape == (rows, 24, 48) and mask.shape == (rows, 24)
    assert set(mask.unique().tolist()) == {0, 1} and (mask.sum(1) == 24 - n).all()
    assert facts.keys() == {"reconstruction_loss", "contrastive_loss", "topk_accuracy"}
    assert facts["topk_accuracy"].shape == (2,) and (facts["topk_accuracy"] >= 0).all() and (facts["topk_accuracy"] <= 1).all()
    assert loss.item() == pytest.approx((facts["reconstruction_loss"] + 0.1 * facts["contrastive_loss"]).item(), rel=1e-6)
    repeated = images.repeat(rows // 16, 1, 1, 1)
    wanted = common.pixel_loss(repeated, prediction, mask, 4, True)
    assert facts["reconstruction_loss"].item() == pytest.approx(wanted.item(), rel=1e-6)

def test_under_autocast_the_contrastive_loss_is_still_of_float32():
    model, seen = tiny((4, 6)), []
    model.encoder.norm.register_forward_hook(lambda module, arguments, latent: seen.append(latent))
    with torch.autocast("cpu", torch.bfloat16):
        facts = model(pictures(8, (4, 6)))[3]
    assert facts["contrastive_loss"].item() == mixedae.contrastive_loss(seen[0][:, 1:], 6).item()

def test_the_facts_are_of_the_encoders_tokens():
    model, seen = tiny((4, 6), contrastive=0.3), []
    model.encoder.norm.register_forward_hook(lambda module, arguments, latent: seen.append(latent))
    inputs = []
    for block in model.encoder.blocks:
        block.attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    loss, _, _, facts = model(pictures(8, (4, 6)))
    assert facts["contrastive_loss"].item() == pytest.approx(mixedae.contrastive_loss(seen[0][:, 1:], 6).item(), rel=1e-6)
    assert loss.item() == pytest.approx((facts["reconstruction_loss"] + 0.3 * facts["contrastive_loss"]).item(), rel=1e-6)
    assert all(block.attn.top == 6 for block in model.encoder.blocks)
    for found, block, x in zip(facts["topk_accuracy"], model.encoder.blocks, inputs):    # (H,) averaged over heads
        accuracy = slow_attention(block.attn, x.detach())[2]
        assert found.item() == pytest.approx(sum(accuracy) / 2, abs=1e-6)

@pytest.mark.parametrize("off, gone", [(dict(homologous=False), "topk_accuracy"), (dict(contrastive=0), "contrastive_loss")])
def test_what_is_off_is_left_out(off, gone):
    model, images, noise = tiny(**off), pictures(8), torch.rand(2, 16)
    loss, _, _, facts = model(images, noise)
    usual = tiny()(images, noise)
    assert facts.keys() == usual[3].keys() - {gone} and loss != usual[0]
    assert all((block.attn.top is None) == ("homologous" in off) for block in model.encoder.blocks)

def test_the_encoder_never_sees_pixels_that_a_picture_does_not_own_and_the_loss_does():
    model, images, noise = tiny(norm_pixels=False), pictures(8), torch.rand(2, 16)
    latent = spy(model)
    loss, prediction, mask, _ = model(images, noise)
    hidden = pixels_of(mask)
    assert hidden.float().mean() == 0.75
    other_loss, other_prediction, _, _ = model(torch.where(hidden, 9 * torch.randn_like(images), images), noise)
    assert torch.equal(latent[0][0], latent[1][0]) and torch.equal(prediction, other_prediction)
    assert not torch.isclose(loss, other_loss, rtol=0.1)
    visible_changed = model(torch.where(hidden, images, images + 1), noise)[1]
    assert ((visible_changed - prediction).abs().amax(dim=(1, 2)) > 1e-3).all()          # far above rounding, in every picture

@pytest.mark.parametrize("full", [False, True])
def test_a_group_shares_a_sequence_and_groups_do_not_touch(full):
    model, images, noise = tiny(full=full), pictures(12), torch.rand(3, 16)
    before, changed = model(images, noise)[1], images.clone()
    changed[5] += 3 * torch.randn_like(changed[5])                                       # of the second group
    moved = (model(changed, noise)[1] - before).abs().amax((1, 2)).unflatten(0, (-1, 3, 4))      # (turns, G, M)
    assert (moved[:, 1] > 1e-4).all()                                                    # the other pictures of its group, too
    assert (moved[:, [0, 2]] < 1e-6).all()                                               # another batch may sum in another order

@pytest.mark.parametrize("options", [{}, dict(full=True), dict(contrastive=0), dict(homologous=False), dict(norm_pixels=False),
                                     dict(members=2), dict(group=1, segments=False)])
def test_gradients_reach_every_parameter_but_the_positions(options):
    model = tiny(**options)
    model(pictures(8))[0].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            for part in parameter.grad.chunk(3) if name.endswith("qkv.weight") else ():  # queries, keys and values
                assert part.abs().max() > 1e-7, name

def test_noise_decides_and_without_it_torchs_seed_does():
    model, images = tiny(), pictures(8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(images)[1])
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2], atol=1e-3)

def test_some_steps_lower_the_loss():
    model, images = tiny(), pictures(8)
    optimizer, noise, curve = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), torch.rand(2, 16), []
    for _ in range(30):
        loss, _, _, facts = model(images, noise)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        curve.append([loss.item(), facts["reconstruction_loss"].item(), facts["contrastive_loss"].item()])
    assert all(last < first for first, last in zip(curve[0], curve[-1]))

@pytest.mark.parametrize("again", [False, True])
def test_the_model_compiles_to_one_graph(again, one_graph):
    images = pictures(4)
    one_graph(tiny, lambda model: sum((1 + k) * part.sum() for k, part in enumerate(model(images)[3].values())), again)

# ---------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("count, options", [(7, {}), (2, {}), (8, dict(members=16, group=3)), (9, dict(full=True))])
def test_pictures_that_do_not_fill_their_groups_are_a_problem(count, options):
    model = tiny((4, 8), **options)
    for call in (model, model.mix):
        with pytest.raises(common.Problem, match=f"{count} pictures.*groups of {options.get('group', 4)}"):
            call(pictures(count, (4, 8)))

@pytest.mark.parametrize("grid, members", [((3, 3), 4), ((2, 2), 4), ((4, 4), 3), ((4, 4), 32), ((7, 7), 2)])
def test_places_that_do_not_divide_among_the_members_are_a_problem(grid, members):
    with pytest.raises(common.Problem, match=f"{grid[0] * grid[1]} patches.*{members} pictures"):
        tiny(grid, members=members)

BAD = {  # what is wrong: options after the usual ones, and what the line must say
    "fewer pictures than a group": ("--limit 3", "a group wants 4 different pictures, and there are 3"),
    "crops that leave fewer pictures than a group": ("--crops 8", "groups of 4 different pictures.*--crops"),
    "a ratio of no whole group": ("--mix-ratio 0.3", "mix-ratio 0.3"),
    "a ratio above a half": ("--mix-ratio 0.75", "mix-ratio 0.75"),
    "ratio 0": ("--mix-ratio 0", "mix-ratio 0"),
    "ratio 1": ("--mix-ratio 1", "mix-ratio 1"),
    "ratio 2": ("--mix-ratio 2", "mix-ratio 2"),
    "ratio -0.25": ("--mix-ratio -0.25", "mix-ratio -0.25"),
    "ratio nan": ("--mix-ratio nan", "mix-ratio nan"),
    "ratio inf": ("--mix-ratio inf", "mix-ratio inf"),
    "a ratio of a tiny share": ("--mix-ratio 1e-9", "mix-ratio 1e-09"),
    "a word for the ratio": ("--mix-ratio quarter", "quarter"),
    "places that do not divide": ("--size 24", "9 patches.*4 pictures"),
    "a place for each picture": ("--size 16", "4 patches.*4 pictures"),
    "more members than places": ("--mix-ratio 0.03125 --batch 32", "16 patches.*32 pictures"),
    "a micro-batch that is no whole group": ("--batch 12 --micro-batch 6", "6.*groups of 4.*--micro-batch"),
    "a batch that is no whole group": ("--batch 6", "6.*groups of 4"),
    "a larger group": ("--batch 12 --micro-batch 4 --mix-ratio 0.125", "4.*groups of 8"),
    "a weight of no loss": ("--no-contrastive --contrastive-weight 0.5", "--contrastive-weight does nothing here"),
    "an unknown mixing": ("--mixing blend", "blend"),
    "an option of mae.py": ("--mask-ratio 0.5", "mask-ratio"),
    "a size that does not divide": ("--size 30", "30.*8"),
    "nothing to resume": ("--resume", "resume.*last.pt"),
}

@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(what, tmp_path, cli):
    options, says = BAD[what]
    with pytest.raises(common.Problem, match=says):
        mixedae.main([*QUICK, "--out", str(tmp_path / "out"), *options.split()])
    code, _, errors = cli(*QUICK, "--out", tmp_path / "out", *options.split())
    assert code == 2 and re.search(says, one_line(errors)), errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]                  # so that the next try may begin

@pytest.mark.parametrize("ratio, members", [("0.5", 2), ("0.3333", 3), ("0.33333334", 3), ("0.25", 4), ("0.125", 8)])
def test_a_ratio_says_how_many_pictures_are_mixed(ratio, members, monkeypatch):
    seen = []
    monkeypatch.setattr(mixedae, "pretrain", seen.append)
    mixedae.main(["--mix-ratio", ratio])
    assert seen[0].members == members

def test_a_real_process_says_one_line_and_exits_with_two(tmp_path):
    output, errors = finish(start(tmp_path / "out", "--mix-ratio", 0.3), 2)
    assert "--mix-ratio 0.3" in one_line(errors) and not output

@pytest.mark.parametrize("words, wanted", [
    ("", dict(model="nano", size=64, patch=8, norm_pixels=False, members=4, mixing="compose", contrastive_weight=0.1)),
    ("--data fashion-mnist", dict(model="nano", size=32, patch=4, members=4)),
    ("--data fashion-mnist --size 64", dict(size=64, patch=8)),
    ("--data cifar10", dict(size=32, patch=4)),
    ("--data /pictures", dict(model="base", size=224, patch=16, norm_pixels=True, epochs=800, batch=4096, lr=1.5e-4, warmup=40.0,
                              crop=0.2, weight_decay=0.05, decoder_dim=512, decoder_depth=8, decoder_heads=16))])
def test_the_data_chooses_the_recipe(words, wanted, monkeypatch):
    seen = []
    monkeypatch.setattr(mixedae, "pretrain", seen.append)
    mixedae.main(words.split())
    assert {name: getattr(seen[0], name) for name in wanted} == wanted
    places = (seen[0].size // seen[0].patch) ** 2
    assert places % 4 == 0 and seen[0].out == "runs/mixedae"
    assert seen[0].segments and seen[0].homologous_attention and seen[0].contrastive

# --------------------------------------------------------------------------------------------------------------- runs, whole

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run on scenes in a process of its own → its folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, *finish(start(out, *RUN))

def test_a_run_leaves_what_the_design_says(uninterrupted):
    out, output, errors = uninterrupted
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.jsonl", "args.json", "mixture.png"}
    assert not errors and "\r" not in output
    assert sum(line.startswith("epoch ") for line in output.splitlines()) == 2
    assert json.loads((out / "args.json").read_text())["members"] == 4
    assert [(line["epoch"], line["step"]) for line in log_of(out)] == [(1, PER_EPOCH), (2, 2 * PER_EPOCH)]
    for line in log_of(out):
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + 0.1 * line["contrastive_loss"], rel=1e-5)
        assert 0 < line["reconstruction_loss"] < 10 and 0 < line["contrastive_loss"] < 10
        assert len(line["topk_accuracy"]) == 4 and all(0.1 < share < 1 for share in line["topk_accuracy"])   # chance: 0.25
    assert losses(out)[1] < losses(out)[0]

def test_the_picture_is_a_png_of_a_sensible_size(uninterrupted):
    path = uninterrupted[0] / "mixture.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    sheet = torchvision.io.decode_image(str(path))
    assert 4 * 128 <= sheet.shape[1] <= 4 * 128 * 1.5 and 4 * 128 <= sheet.shape[2] <= 4 * 128 * 1.5     # four rows of four
    for row in sheet.chunk(4, dim=1):
        assert row.float().std() > 10                                                    # something is drawn in each

def test_a_checkpoint_is_plain_tensors_and_its_encoder_a_plain_vit(uninterrupted):
    checkpoint = saved(uninterrupted[0])                                                 # weights_only=True
    assert {"encoder", "decoder", "segments", "optimizer", "step", "args"} <= checkpoint.keys()
    assert checkpoint["step"] == 2 * PER_EPOCH and checkpoint["args"]["mix_ratio"] == 0.25
    assert checkpoint["segments"].keys() == {"segment_token"} and checkpoint["segments"]["segment_token"].shape == (4, 1, 128)
    encoder = common.ViT(32, 8, 3, **NANO)
    encoder.load_state_dict(checkpoint["encoder"])                                       # strict
    common.Decoder(encoder, 32, 1, 4).load_state_dict(checkpoint["decoder"])
    learned = sum(not name.endswith("pos_embed") for part in ("encoder", "decoder", "segments") for name in checkpoint[part])
    assert len(checkpoint["optimizer"]["state"]) == learned
    (start_segments,) = mixedae.MixedAE(*fresh(), members=4).segments.parameters()
    assert not torch.allclose(checkpoint["segments"]["segment_token"], start_segments, atol=1e-3)    # they did learn

def fresh():
    """Encoder and decoder as RUN starts with them."""
    args = common.fit(common.settings(mixedae.options(), lambda args, kind: mixedae.PRESETS[kind], RUN))
    args.channels = 3
    return common.build(args, mixedae.HomologousAttention)

def test_mae_judges_the_encoder_unchanged(uninterrupted, tmp_path, cli, monkeypatch):
    make, found = mae.features, []
    monkeypatch.setattr(mae, "features", lambda *arguments: found.append(make(*arguments)) or found[-1])
    code, output, errors = cli("--task", "knn", "--init", uninterrupted[0] / "last.pt", "--limit", 128, "--device", "cpu",
                               "--out", tmp_path / "knn", script=mae)
    assert code == 0 and not errors and "left out" not in output and "new:" not in output
    assert 0 < log_of(tmp_path / "knn")[-1]["top1"] < 1
    encoder = common.ViT(32, 8, 3, **NANO)                                               # with plain attention
    encoder.load_state_dict(saved(uninterrupted[0])["encoder"])
    train, (bank, labels) = common.open_data(size=32, limit=128)[0], found[0]
    with torch.no_grad():
        args = saved(uninterrupted[0])["args"]                                           # of the pictures it was trained on
        train.mean, train.std = (torch.tensor(args[name])[:, None, None] for name in ("mean", "std"))
        wanted = encoder.encode(encoder.embed(train.normalise(train.images)))[:, 1:].mean(1)
    distance, same = torch.cdist(bank, wanted, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert sorted(same.tolist()) == list(range(128)) and torch.equal(labels, train.labels[same])     # in some order
    assert distance.max() < 1e-4                                                         # float32, batches of another size

@pytest.mark.parametrize("save, kill", [(PER_EPOCH - 2, PER_EPOCH + 2)])
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(uninterrupted, tmp_path, cli, save, kill):
    """Saved in the middle of an epoch and killed in the next: then the log is ahead of the checkpoint."""
    out = tmp_path / "run"
    finish(start(out, *RUN, end=(save, kill, signal.SIGKILL)), -signal.SIGKILL)
    assert saved(out)["step"] == save and [line["step"] for line in log_of(out)] == [PER_EPOCH]
    code, _, errors = cli("--resume", "--out", out)                                      # with the options of before
    assert code == 0 and not errors
    assert_same_training(uninterrupted[0], out)
    one, two = (tensors(saved(folder)["segments"]) for folder in (uninterrupted[0], out))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    facts = [[{name: line[name] for name in line if name not in ("images_per_s", "seconds")} for line in log_of(folder)]
             for folder in (uninterrupted[0], out)]
    assert facts[0] == facts[1]
    assert (out / "mixture.png").read_bytes() == (uninterrupted[0] / "mixture.png").read_bytes()

def test_two_processes_train_what_one_does(uninterrupted, tmp_path):
    out = tmp_path / "run"
    finish(start(out, *RUN, processes=2))
    one, two = saved(uninterrupted[0]), saved(out)
    for part in ("encoder", "decoder", "segments"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=1e-5)              # sums in another order, in float32
    for line, other in zip(epochs_of(uninterrupted[0]), epochs_of(out)):
        for name in ("loss", "reconstruction_loss", "contrastive_loss"):
            assert other[name] == pytest.approx(line[name], rel=1e-5)
        # A sum in another order may turn a near tie: of some 16,000 choices in an epoch and head a few at most.
        assert other["topk_accuracy"] == pytest.approx(line["topk_accuracy"], abs=1e-3)
        assert (other["epoch"], other["step"], other["lr"]) == (line["epoch"], line["step"], line["lr"])

def test_a_small_run_repeats_and_the_seed_changes_it(tmp_path, cli):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, _, errors = cli(*QUICK, "--seed", seed, "--out", tmp_path / name)
        assert code == 0 and not errors
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert torch.equal(*(saved(tmp_path / name)["segments"]["segment_token"] for name in "ab"))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")

FLAGS = {  # flags: what they take from the log, and what the model is
    "": ((), dict(turns=1, group=4, own=4, homologous=True, contrastive=0.1, norm_pixels=False)),
    "--no-segments": ((), dict(homologous=True, contrastive=0.1)),
    "--no-homologous-attention": (("topk_accuracy",), dict(homologous=False, contrastive=0.1)),
    "--no-contrastive": (("contrastive_loss",), dict(homologous=True, contrastive=0)),
    "--no-segments --no-homologous-attention --no-contrastive": (("topk_accuracy", "contrastive_loss"), dict(contrastive=0)),
    "--mixing full": ((), dict(turns=4, group=4, own=4)),
    "--mix-ratio 0.5": ((), dict(turns=1, group=2, own=8)),
    "--mix-ratio 0.125 --mixing full": ((), dict(turns=8, group=8, own=2)),
    "--contrastive-weight 0.5": ((), dict(contrastive=0.5)),
    "--norm-pixels": ((), dict(norm_pixels=True)),
    "--precision bf16": ((), dict(homologous=True)),
}

@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_runs_and_leaves_out_what_it_should(flags, tmp_path, cli, monkeypatch):
    draw, models = mixedae.draw, []
    monkeypatch.setattr(mixedae, "draw", lambda model, *others: (models.append(model), draw(model, *others)))
    code, _, errors = cli(*QUICK, *flags.split(), "--out", tmp_path / "run")
    assert code == 0 and not errors
    left_out, expected = FLAGS[flags]
    facts = {"reconstruction_loss", "contrastive_loss", "topk_accuracy"}
    for line in log_of(tmp_path / "run"):
        assert facts & line.keys() == facts - set(left_out)
        weighted = line["reconstruction_loss"] + expected.get("contrastive", 0.1) * line.get("contrastive_loss", 0)
        assert line["loss"] == pytest.approx(weighted, rel=1e-5) and 0 < line["loss"] < 20
    assert len(losses(tmp_path / "run")) == 2
    checkpoint, model = saved(tmp_path / "run"), models[0]
    assert {name: getattr(model, name) for name in expected} == expected
    assert [block.attn.top for block in model.encoder.blocks] == [model.own if "topk_accuracy" not in left_out else None] * 4
    segment = checkpoint["segments"].get("segment_token")
    assert segment is None if "--no-segments" in flags else segment.shape == (model.group, 1, 128)
    sheet = torchvision.io.decode_image(str(tmp_path / "run" / "mixture.png"))
    assert sheet.shape[1] >= 4 * 128 and sheet.shape[2] >= max(4, model.group) * 128

def test_flags_train_to_different_losses(tmp_path, cli):
    """Full mode, no segments and plain attention all change what is computed from the first step on."""
    curves = {}
    for name, flags in {"usual": "", "full": "--mixing full", "segments": "--no-segments",
                        "attention": "--no-homologous-attention"}.items():
        assert cli(*QUICK, "--epochs", 1, *flags.split(), "--out", tmp_path / name)[0] == 0
        curves[name] = losses(tmp_path / name)[0]
    assert len(set(curves.values())) == 4

@pytest.mark.parametrize("flags", ["", "--norm-pixels", "--no-homologous-attention", "--mix-ratio 0.125"])
def test_the_picture_shows_the_mixture_of_the_pictures(flags, tmp_path, cli, monkeypatch):
    sheets = []
    monkeypatch.setattr(mixedae, "save_sheet", lambda path, rows: sheets.append(list(rows.values())))
    code, _, errors = cli(*QUICK, "--epochs", 1, *flags.split(), "--out", tmp_path / "run")
    assert code == 0 and not errors
    members = 8 if "ratio" in flags else 4
    originals, shown, mixture, painted = ([cut(image, 8) for image in row] for row in sheets[0])
    (mixed, owner, plain, top), colours = mixture[:4], [set() for _ in range(members)]
    assert len(originals) == members
    for place in range(16):
        owners = [k for k in range(members) if torch.equal(shown[k][place], originals[k][place])]
        assert len(owners) == 1                                                          # nothing is owned twice or by none
        assert torch.equal(mixed[place], originals[owners[0]][place])
        for k in range(members):
            assert k in owners or shown[k][place].flatten(1).unique(dim=1).shape[1] == 1     # grey
            assert torch.equal(painted[k][place], originals[k][place]) == (k in owners)
        assert owner[place].flatten(1).unique(dim=1).shape[1] == 1                       # one flat colour
        colours[owners[0]].add(tuple(owner[place][:, 0, 0].tolist()))
        assert (plain[place] <= mixed[place]).all()                                      # light on the mixture
        if flags == "--no-homologous-attention":
            assert (top[place] == 255).all()                                             # there is no TopK: left empty
        else:
            assert (top[place] <= mixed[place]).all()
    assert all(len(each) == 1 for each in colours) and len(set.union(*colours)) == members
    assert not all(torch.equal(a, b) for a, b in zip(plain, top))

@pytest.mark.parametrize("flags", ["--mix-ratio 0.5", "--no-segments", "--decoder-depth 2"])
def test_resuming_another_model_is_refused_and_loses_nothing(flags, tmp_path, cli):
    out = tmp_path / "run"
    assert cli(*QUICK, "--epochs", 1, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, errors = cli("--resume", "--out", out, *flags.split())
    assert code == 2 and "last.pt" in one_line(errors)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

def test_every_option_of_the_design_is_there_and_help_is_grouped(cli):
    code, output, _ = cli("--help")
    assert code == 0
    words = """--data --root --out --model --size --patch --epochs --batch --micro-batch --lr --warmup --weight-decay --workers
               --seed --precision --compile --resume --overwrite --device --limit --crop --norm-pixels --mixing --mix-ratio
               --no-segments --no-homologous-attention --no-contrastive --contrastive-weight"""
    assert all(re.search(rf"{word}\b", output) for word in words.split())
    assert len(re.findall(r"^\w+:$", output, re.MULTILINE)) >= 4

# ------------------------------------------------------------------------------------------------------- what the issue asks

@pytest.mark.parametrize("homologous", [True, False])
def test_keys_start_as_copies_of_queries_if_they_are_chosen_by_likeness(homologous, tmp_path, monkeypatch):
    monkeypatch.setattr(mixedae, "MixedAE", lambda encoder, *rest: (_ for _ in ()).throw(InterruptedError(encoder)))
    with pytest.raises(InterruptedError) as stopped:
        mixedae.main([*RUN, "--out", str(tmp_path)] + ["--no-homologous-attention"] * (not homologous))
    (encoder,), (plain, _) = stopped.value.args, fresh()                                 # everything else is as MAE's
    for name, value in plain.state_dict().items():
        if name.endswith("qkv.weight") and homologous:
            queries, keys, values = encoder.state_dict()[name].chunk(3)
            assert torch.equal(queries, keys)
            assert torch.equal(queries, value.chunk(3)[0]) and torch.equal(values, value.chunk(3)[2])
        else:
            assert torch.equal(encoder.state_dict()[name], value), name

@pytest.mark.slow
def test_on_scenes_the_best_block_finds_its_own_pictures_patches_and_less_so_without_segments(tmp_path):
    best = {}
    for name, flags in (("whole", []), ("without segments", ["--no-segments"])):
        mixedae.main(["--out", str(tmp_path / name), *flags])
        best[name] = [max(line["topk_accuracy"]) for line in epochs_of(Path(tmp_path, name))]
    assert best["whole"][-1] > 0.8                                                       # one thread (two: 0.75), untrained 0.53
    assert best["without segments"][-1] < best["whole"][-1] - 0.1
