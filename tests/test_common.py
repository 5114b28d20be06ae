"""common.py against slow formulas written here, torch, timm and transformers."""

import argparse
import contextlib
import copy
import errno
import math
import os
import pickle
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, features
from torch import nn

import common
from common import (
    VITS, Attention, Batches, Block, Decoder, Pictures, Problem, Run, ViT, adamw, crop_weights, draw_scenes, folder, keep_lowest,
    load_decoder, load_encoder, Scenes, open_data, patchify, pixel_loss, random_crops, read_checkpoint, save_sheet, schedule,
    seed_of, settings, sincos_positions, take, unpatchify, vit_of, weights_in, write_whole,
)

CPU = types.SimpleNamespace(device=torch.device("cpu"), workers=0)      # as much of a Run as data needs

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def shake(module, by=0.1, positions=False):
    """Random weights everywhere, norms and biases too: what starts as 0 or 1 hides mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad or positions:
                p.add_(by * torch.randn_like(p))
    return module

def assert_near(found, wanted, tolerance, name=None):
    """The difference's length is below a share of what is wanted: large and small numbers err by a float's digits alike."""
    assert found.shape == wanted.shape, name
    assert (found - wanted).norm() <= tolerance * wanted.norm() and wanted.norm() > 0, name

# ----------------------------------------------------------------------------------------------------------------- patches

SHAPES = [(1, 8, 8, 1), (3, 12, 20, 4), (5, 9, 3, 3), (3, 7, 14, 7), (2, 5, 6, 1)]

@pytest.mark.parametrize("channels, height, width, patch", SHAPES)
def test_unpatchify_undoes_patchify(channels, height, width, patch):
    images = torch.randn(2, channels, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, height * width // patch**2, patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch, (height, width)), images)

@pytest.mark.parametrize("channels, height, width, patch", SHAPES)
def test_patches_go_row_by_row_and_inside_them_row_column_channel(channels, height, width, patch):
    images = torch.randn(2, channels, height, width)
    slow = [[[images[b, c, top + y, left + x].item() for y in range(patch) for x in range(patch) for c in range(channels)]
             for top in range(0, height, patch) for left in range(0, width, patch)] for b in range(2)]
    assert torch.equal(patchify(images, patch), torch.tensor(slow))

def test_unpatchify_takes_one_number_for_a_square():
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(unpatchify(patchify(images, 4), 4, 8), images)

@pytest.mark.parametrize("size", [(10, 8), (8, 10)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(Problem, match="does not divide"):
        patchify(torch.zeros(1, 3, *size), 4)
    with pytest.raises(Problem, match="does not divide"):
        unpatchify(torch.zeros(1, 4, 48), 4, size)
    with pytest.raises(Problem, match="does not divide"):
        ViT(size, 4, dim=16, depth=1, heads=2)

@pytest.mark.parametrize("dim, rows, columns", [(8, 3, 3), (16, 2, 5), (20, 7, 1), (4, 1, 4)])
def test_positions_follow_the_formula_element_by_element(dim, rows, columns):
    quarter, slow = dim // 4, []
    for row in range(rows):
        for column in range(columns):
            angles = [[place / 10000 ** (k / quarter) for k in range(quarter)] for place in (column, row)]
            slow.append([wave(angle) for half in angles for wave in (math.sin, math.cos) for angle in half])
    torch.testing.assert_close(sincos_positions(dim, (rows, columns)), torch.tensor(slow), atol=1e-6, rtol=0)

def test_positions_need_a_width_that_divides_by_four():
    with pytest.raises(Problem, match="divides by 4"):
        sincos_positions(18, (2, 2))

def test_take_picks_each_pictures_own_tokens():
    tokens, index = torch.randn(3, 6, 4), torch.tensor([[5, 0], [1, 1], [2, 4]])
    slow = torch.stack([torch.stack([tokens[b, i] for i in row]) for b, row in enumerate(index.tolist())])
    assert torch.equal(take(tokens, index), slow)

@pytest.mark.parametrize("n", [1, 3, 7, 11])
def test_keep_lowest_keeps_exactly_the_lowest_and_restore_brings_all_back(n):
    scores, tokens = torch.rand(5, 12), torch.randn(5, 12, 3)
    keep, restore, mask = keep_lowest(scores, n)
    assert keep.shape == (5, n) and mask.dtype == torch.float32
    for b in range(5):
        assert set(keep[b].tolist()) == set(np.argsort(scores[b].numpy())[:n].tolist())
        hidden = [i for i in scores[b].argsort().tolist() if i not in keep[b].tolist()]
        assert mask[b].tolist() == [0.0 if i in keep[b].tolist() else 1.0 for i in range(12)]
        order = torch.tensor(keep[b].tolist() + hidden)
        assert torch.equal(take(tokens[b:b + 1, order], restore[b:b + 1])[0], tokens[b])

def test_keep_lowest_keeps_the_exact_count_when_scores_are_equal():
    keep, _, mask = keep_lowest(torch.zeros(4, 16), 5)
    assert all(len(set(row)) == 5 for row in keep.tolist()) and mask.sum(1).tolist() == [11.0] * 4

@pytest.mark.parametrize("norm_pixels", [False, True])
def test_pixel_loss_equals_a_loop_over_hidden_patches(norm_pixels):
    images, prediction = torch.rand(2, 3, 8, 12), torch.randn(2, 6, 48)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1]]).float()
    errors = []
    for b, n in mask.nonzero().tolist():
        row, column = divmod(n, 3)
        target = images[b, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4].permute(1, 2, 0).double().numpy().ravel()
        if norm_pixels:
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        errors.append(np.mean((prediction[b, n].double().numpy() - target) ** 2))
    assert pixel_loss(images, prediction, mask, 4, norm_pixels).item() == pytest.approx(np.mean(errors), rel=1e-5)

def test_pixel_loss_ignores_visible_patches():
    images, prediction, mask = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 48), torch.tensor([[0.0, 1, 1, 0]])
    before = pixel_loss(images, prediction, mask, 4, True)
    prediction[0, [0, 3]] += 100
    assert pixel_loss(images, prediction, mask, 4, True) == before
    prediction[0, 1] += 100
    assert pixel_loss(images, prediction, mask, 4, True) > before

# ------------------------------------------------------------------------------------------------------------- transformer

def slow_attention(attention, x):
    """The textbook's, head by head, in numpy → output (T, D), weights (H, T, T)."""
    qkv, D, H = attention.qkv(x).detach().numpy(), x.shape[1], attention.heads
    outputs, maps = [], []
    for h in range(H):
        q, k, v = (qkv[:, part * D + h * D // H:part * D + (h + 1) * D // H] for part in range(3))
        logits = np.exp(q @ k.T / math.sqrt(D // H))
        maps.append(logits / logits.sum(1, keepdims=True))
        outputs.append(maps[-1] @ v)
    return attention.proj(torch.from_numpy(np.concatenate(outputs, 1))), torch.from_numpy(np.stack(maps))

def test_attention_equals_the_textbooks_and_its_weights_sum_to_one():
    attention, x = shake(Attention(24, 3)).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    for b in range(2):
        output, weights = slow_attention(attention, x[b])
        torch.testing.assert_close(attention(x)[b], output)
        torch.testing.assert_close(attention.weights(x)[b], weights)
    torch.testing.assert_close(attention.weights(x).sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))

def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(Problem, match="heads"):
        Attention(16, 3)

def test_drop_path_is_off_in_evaluation():
    block, x = shake(Block(16, 2, drop_path=0.9)).eval(), torch.randn(8, 5, 16)
    plain = Block(16, 2)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x), plain.eval()(x))

def test_drop_path_drops_whole_pictures_and_scales_up_what_stays():
    block, x = shake(Block(16, 2, drop_path=0.5)), torch.randn(1, 5, 16)
    with torch.no_grad():
        attended, mixed = x + 2 * block.attn(block.norm1(x)), lambda y: y + 2 * block.mlp(block.norm2(y))
        wanted = torch.cat([x, attended, mixed(x), mixed(attended)])    # neither branch, one, the other, both
        found = block.train()(x.expand(1000, -1, -1))
    distance = (found[:, None] - wanted).abs().amax((2, 3))
    assert (distance.amin(1) < 1e-5).all()
    counts = distance.argmin(1).bincount(minlength=4)
    assert ((counts - 250).abs() < 70).all()                            # 5 standard deviations of a binomial, 13.7

def test_drop_path_keeps_the_expectation():
    block, x = shake(Block(16, 2, drop_path=0.3)), torch.randn(1, 5, 16)
    nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)    # one branch: the other is not linear
    with torch.no_grad():
        change = block.train()(x.expand(4000, -1, -1)).mean(0) - x[0]
        expected = block.eval()(x)[0] - x[0]
    share = (change / expected).flatten()
    assert share.std() < 1e-3 and abs(share.mean() - 1) < 5 * math.sqrt(0.3 / 0.7 / 4000)

def test_a_block_computed_again_has_the_same_gradients_and_keeps_only_its_input():
    torch.manual_seed(0)
    blocks, start = shake(torch.nn.Sequential(*(Block(16, 2, drop_path=0.5) for _ in range(3)))), torch.randn(6, 5, 16)
    found, kept = [], []
    for again in (False, True):
        for block in blocks:
            block.again = again
        x, saved = start.clone().requires_grad_(), []
        torch.manual_seed(1)                                                                # which pictures lose which branch
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = blocks(x).square().sum()
        kept.append(sum({t.data_ptr(): t.nbytes for t in saved}.values()))
        blocks.zero_grad()
        loss.backward()
        found.append([loss.detach(), x.grad, *(p.grad.clone() for p in blocks.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)                                      # the very same operations
    assert kept[1] < kept[0] / 5

def test_deeper_blocks_are_dropped_more_and_the_first_never():
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, drop_path_rate=0.3)
    x, ours = torch.randn(1, 3, 16).expand(3000, -1, -1), ViT(8, 4, dim=16, depth=4, heads=2, drop_path=0.3)
    for block, other in zip(shake(ours).train().blocks, theirs.blocks):
        kept = (block(x) == x).flatten(1).all(1).float().mean().item()  # both branches dropped
        rate = getattr(other.drop_path1, "drop_prob", 0.0)
        assert kept == pytest.approx(rate**2, abs=5 * math.sqrt(rate**2 / 3000))

def timms(pool, classes, **sizes):
    timm = pytest.importorskip("timm")
    options = dict(global_pool="avg", fc_norm=True) if pool == "mean" else {}
    sizes = sizes or dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
    return shake(timm.create_model("vit_base_patch16_224", num_classes=classes, **sizes, **options)).eval()

@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_equals_timms_and_each_loads_the_others_weights(pool, tmp_path):
    theirs, ours = timms(pool, 10), shake(ViT(32, 8, dim=64, depth=2, heads=4, classes=10, pool=pool)).eval()
    images, sizes = torch.randn(3, 3, 32, 32), lambda model: {name: x.shape for name, x in model.state_dict().items()}
    assert sizes(ours) == sizes(theirs)
    with torch.no_grad():
        assert not torch.allclose(ours(images), theirs(images), atol=0.1)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
        torch.save(shake(theirs, positions=True).state_dict(), tmp_path / "timm.pth")       # as timm's users save it
        line = load_encoder(ours, tmp_path / "timm.pth")
        assert "left out" not in line and "new" not in line and "resized" not in line
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
        bare = ViT(32, 8, dim=64, depth=2, heads=4, pool=pool).eval()                       # features: the head stays behind
        assert "left out: head" in load_encoder(bare, tmp_path / "timm.pth")
        wanted = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        torch.testing.assert_close(bare(images), wanted, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_encoder_of_ours_goes_into_timm_strictly_apart_from_the_head(pool):
    ours, theirs = shake(ViT(32, 8, dim=64, depth=2, heads=4, pool=pool), positions=True).eval(), timms(pool, 10)
    images, head = torch.randn(3, 3, 32, 32), {f"head.{name}": value for name, value in theirs.head.state_dict().items()}
    theirs.load_state_dict(ours.state_dict() | head, strict=True)
    bare = timms(pool, 0)
    bare.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(bare(images), ours(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(images), theirs.head(ours(images)), atol=1e-5, rtol=1e-5)

def transformers_mae(**sizes):
    """→ transformers' model with random weights everywhere, positions too; unless told otherwise 24×24 pictures, patches of 4."""
    transformers = pytest.importorskip("transformers")
    sizes = sizes or dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=24,
                          patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
                          decoder_intermediate_size=64)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(layer_norm_eps=1e-6, mask_ratio=0.75, **sizes))
    return shake(model.train(), 0.02 if model.config.hidden_size > 500 else 0.1, positions=True)

def released(tensors):
    """Tensors by transformers' ViTMAE names → by those in MAE's released files, queries, keys and values in one."""
    swaps = {"vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.embeddings.cls_token": "cls_token",
             "vit.embeddings.position_embeddings": "pos_embed", "vit.layers.": "blocks.", "vit.layernorm": "norm",
             "decoder.decoder_layers.": "decoder_blocks.", "decoder.": "", "layernorm_before": "norm1",
             "layernorm_after": "norm2", "attention.o_proj": "attn.proj", "attention.q_proj": "attn.qkv"}
    found = {}
    for name, value in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            value = torch.cat([tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        for theirs, files in swaps.items():
            name = name.replace(theirs, files)
        found[name] = value
    return found

def as_released(state, args):
    return {"model": state}

def as_mae_trains(state, args):
    """What MAE's own code saves while it trains."""
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 7, "scaler": {},
            "args": argparse.Namespace(model="mae_vit", input_size=224, blr=1.5e-4, **args)}

def as_ours(state, args):
    decoder = {name: value for name, value in state.items() if name.startswith(("decoder_", "mask_token"))}
    return {"encoder": {name: value for name, value in state.items() if name not in decoder}, "decoder": decoder,
            "step": 3, "args": {"data": None, **args}}

def as_wrapped(state, args):
    return {"state_dict": {f"module.{name}": value for name, value in state.items()}}

def as_it_is(state, args):
    return state

LAYOUTS = [as_released, as_mae_trains, as_ours, as_wrapped, as_it_is]

@pytest.mark.parametrize("size, layout", [("base", as_released)] + [("small", layout) for layout in LAYOUTS])
def test_a_file_gives_transformers_mae_in_loss_prediction_mask_and_gradients(size, layout, tmp_path):
    from mae import MAE
    theirs = transformers_mae(**dict(image_size=224) if size == "base" else {})
    torch.save(layout(released(theirs.state_dict()), {}), path := tmp_path / "pretrained.pth")
    encoder = ViT() if size == "base" else ViT(24, 4, dim=32, depth=2, heads=4)
    decoder = Decoder(encoder) if size == "base" else Decoder(encoder, dim=16, depth=2, heads=2)
    assert str(path) in load_encoder(encoder, path) and str(path) in load_decoder(decoder, path)
    ours, count = MAE(encoder, decoder).train(), encoder.grid[0] * encoder.grid[1]
    images, noise = torch.randn(2, 3, *encoder.size), torch.rand(2, count)
    for norm_pixels in (False, True):
        ours.norm_pixels = theirs.config.norm_pix_loss = norm_pixels
        wanted, (loss, prediction, mask) = theirs(images, noise=noise), ours(images, noise=noise)
        assert torch.equal(mask, wanted.mask) and (mask == 0).sum(1).tolist() == [count // 4] * 2
        torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=0)
        assert_near(prediction, wanted.logits, 1e-5)
        theirs.zero_grad(), ours.zero_grad()
        wanted.loss.backward(), loss.backward()
        slopes = released({name: p.grad for name, p in theirs.named_parameters() if p.requires_grad})
        mine = {name.partition(".")[2]: p.grad for name, p in ours.named_parameters() if p.requires_grad}
        assert mine.keys() == slopes.keys() and len(mine) == (252 if size == "base" else 60)
        for name, slope in slopes.items():                             # sums over hundreds of tokens, in another order
            assert_near(mine[name], slope, 1e-5, name)

@pytest.mark.parametrize("side", [8, 24])
def test_square_positions_are_those_of_transformers_mae(side):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                               intermediate_size=8, image_size=side, patch_size=4))
    model.embeddings.patch_embeddings.projection._is_hf_initialized = False      # else version 5 leaves the table at zero
    model.embeddings.initialize_weights()
    table = model.embeddings.position_embeddings[0]
    assert table.abs().max() > 0.5
    torch.testing.assert_close(sincos_positions(32, (side // 4, side // 4)), table[1:].detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ViT(side, 4, dim=32, depth=1, heads=2).pos_embed[0], table, rtol=0, atol=1e-6)

@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pictures_may_be_oblong_and_have_any_number_of_channels(channels):
    vit = shake(ViT((12, 20), 4, channels, dim=16, depth=2, heads=2)).eval()
    images = torch.randn(2, channels, 12, 20)
    weight = vit.patch_embed["proj"].weight.permute(0, 2, 3, 1).flatten(1)      # in patchify's order
    tokens = patchify(images, 4) @ weight.T + vit.patch_embed["proj"].bias + sincos_positions(16, (3, 5))
    torch.testing.assert_close(vit.embed(images), tokens, rtol=1e-5, atol=1e-5)
    assert vit(images).shape == (2, 16)
    decoder = shake(Decoder(vit, dim=8, depth=1, heads=2))
    keep, restore, _ = keep_lowest(torch.rand(2, 15), 4)
    assert decoder(vit.encode(take(tokens, keep)), restore).shape == (2, 15, 16 * channels)

def test_features_are_the_class_token_or_the_normalised_mean_of_the_patches():
    images = torch.randn(2, 3, 8, 8)
    vit = shake(ViT(8, 4, dim=16, depth=1, heads=2)).eval()
    assert torch.equal(vit(images), vit.encode(vit.embed(images))[:, 0])
    vit = shake(ViT(8, 4, dim=16, depth=1, heads=2, pool="mean")).eval()
    torch.testing.assert_close(vit(images), vit.fc_norm(vit.encode(vit.embed(images))[:, 1:].mean(1)))

def test_attention_map_is_the_class_tokens_softmax_row_in_the_last_block():
    vit, images = shake(ViT((8, 12), 4, dim=16, depth=3, heads=2)).eval(), torch.randn(2, 3, 8, 12)
    found = vit.attention_map(images)
    assert found.shape == (2, 2, 6)
    seen = {}
    vit.blocks[-1].norm1.register_forward_hook(lambda module, given, output: seen.update(x=output.detach()))
    vit(images)
    for b in range(2):
        _, weights = slow_attention(vit.blocks[-1].attn, seen["x"][b])
        torch.testing.assert_close(found[b], weights[:, 0, 1:], rtol=1e-4, atol=1e-6)

def test_encode_takes_any_subset_in_any_order():
    vit, images, order = shake(ViT(16, 4, dim=16, depth=2, heads=2)).eval(), torch.randn(2, 3, 16, 16), torch.randperm(16)
    tokens = vit.embed(images)
    plain, turned = vit.encode(tokens), vit.encode(tokens[:, order])
    torch.testing.assert_close(turned[:, 0], plain[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned[:, 1:], plain[:, 1:][:, order], rtol=1e-4, atol=1e-5)
    few = vit.encode(tokens[:, order[:3]])
    alone = torch.cat([vit.encode(tokens[b:b + 1, order[:3]]) for b in range(2)])
    assert few.shape == (2, 4, 16) and not torch.allclose(few[:, 0], plain[:, 0], atol=1e-3)
    torch.testing.assert_close(few, alone, rtol=1e-4, atol=1e-5)

def test_decoder_puts_visible_tokens_and_mask_tokens_in_their_places():
    encoder = ViT(8, 4, dim=8, depth=1, heads=2)
    decoder, seen = shake(Decoder(encoder, dim=8, depth=1, heads=2)), {}
    decoder.decoder_blocks[0].register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    latent, (keep, restore, _) = torch.randn(1, 3, 8), keep_lowest(torch.tensor([[0.9, 0.1, 0.8, 0.2]]), 2)
    decoder(latent, restore)
    assert keep.tolist() == [[1, 3]]
    places = [None, 0, None, 1]                                         # patches 1 and 3 are visible
    for n, place in enumerate(places):
        token = decoder.mask_token[0, 0] if place is None else decoder.decoder_embed(latent[0, 1 + place])
        torch.testing.assert_close(seen["x"][0, 1 + n], token + sincos_positions(8, (2, 2))[n])

# ----------------------------------------------------------------------------------------------------------------- loading

VIT = dict(size=16, patch=4, channels=3, dim=16, depth=2, heads=2)

def vit_file(tmp_path, args=None, **options):
    """→ a file with the weights of a ViT like VIT, as timm's users save it or, with `args`, as our runs do; and that ViT."""
    vit = shake(ViT(**VIT | options), positions=True)
    torch.save(vit.state_dict() if args is None else {"encoder": vit.state_dict(), "args": args}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth", vit

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_its_options(layout, tmp_path):
    vit = ViT(**VIT)
    state = released(transformers_mae().state_dict()) | vit.state_dict()
    torch.save(layout(state, {"norm_pix_loss": True}), path := tmp_path / "a.pth")
    found, args = weights_in(path)
    assert all(torch.equal(found[name], value) for name, value in vit.state_dict().items())
    assert args.get("norm_pix_loss") == (True if layout in (as_mae_trains, as_ours) else None)
    found, _ = weights_in(path, "decoder")
    assert torch.equal(found["decoder_blocks.1.mlp.fc1.bias"], state["decoder_blocks.1.mlp.fc1.bias"])

@pytest.mark.parametrize("name", VITS)
def test_the_usual_encoders_are_known_by_their_shapes(name, tmp_path):
    wanted = dict(size=4 * VITS[name]["patch"], channels=3, **VITS[name])
    state = {"patch_embed.proj.weight": torch.zeros(wanted["dim"], 3, wanted["patch"], wanted["patch"]),
             "pos_embed": torch.zeros(1, 17, wanted["dim"])}
    state |= {f"blocks.{k}.norm1.bias": torch.zeros(wanted["dim"]) for k in range(wanted["depth"])}
    torch.save(state, tmp_path / "a.pth")
    assert vit_of(tmp_path / "a.pth") == wanted

@pytest.mark.parametrize("wanted", [dict(size=24, patch=8, channels=1, dim=192, depth=3, heads=3),
                                    dict(size=20, patch=5, channels=5, dim=16, depth=1, heads=1)])
def test_another_width_has_heads_of_64_and_our_files_say_their_own(wanted, tmp_path):
    assert vit_of(vit_file(tmp_path, **wanted)[0]) == wanted
    ours = wanted | dict(heads=2)
    assert vit_of(vit_file(tmp_path, args=dict(size=wanted["size"], vit=dict(heads=2)), **ours)[0]) == ours

@pytest.mark.parametrize("source, size, change", [(16, 32, "4×4 to 8×8"), (32, 16, "8×8 to 4×4"), (20, (12, 32), "5×5 to 3×8")])
def test_positions_are_resized_by_torchs_bicubic_and_the_class_row_stays(source, size, change, tmp_path):
    path, there = vit_file(tmp_path, size=source)
    vit = ViT(**VIT | dict(size=size))
    assert f"positions resized from {change}" in load_encoder(vit, path)
    (old,), (new,), side = there.pos_embed.detach(), vit.pos_embed, source // 4
    wanted = [F.interpolate(old[1:, d].view(1, 1, side, side), vit.grid, mode="bicubic").flatten() for d in range(16)]
    assert torch.equal(new[0], old[0])
    torch.testing.assert_close(new[1:], torch.stack(wanted, 1), rtol=0, atol=1e-6)
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, there.blocks[1].mlp.fc2.weight)

def test_positions_of_the_same_grid_stay_as_they_are(tmp_path):
    for size in (16, (8, 24)):
        path, there = vit_file(tmp_path, size=size)
        vit = ViT(**VIT | dict(size=size))
        assert "resized" not in load_encoder(vit, path)
        assert torch.equal(vit.pos_embed, there.pos_embed) and not vit.pos_embed.requires_grad

def test_a_decoders_positions_are_resized_too(tmp_path):
    there = shake(Decoder(ViT(**VIT), 8, 1, 2), positions=True)
    torch.save({"model": there.state_dict()}, tmp_path / "a.pth")
    decoder = Decoder(ViT(**VIT | dict(size=32)), 8, 1, 2)
    assert "4×4 to 8×8" in load_decoder(decoder, tmp_path / "a.pth")
    assert torch.equal(decoder.decoder_pos_embed[:, 0], there.decoder_pos_embed[:, 0])
    assert torch.equal(decoder.decoder_pred.weight, there.decoder_pred.weight)

def test_positions_that_are_no_square_cannot_be_resized(tmp_path):
    with pytest.raises(Problem, match="vit.pth.*6 positions"):
        load_encoder(ViT(**VIT), vit_file(tmp_path, size=(8, 12))[0])

@pytest.mark.parametrize("size", [(8, 32), (32, 8)])
def test_a_square_of_positions_does_not_pass_for_an_oblong_of_as_many(size, tmp_path):
    vit = ViT(**VIT | dict(size=size))
    assert "positions resized from 4×4" in load_encoder(vit, vit_file(tmp_path)[0])

@pytest.mark.parametrize("options, says", [
    (dict(patch=8), r"patch 8 \(here 4\)"), (dict(channels=1), r"channels 1 \(here 3\)"), (dict(dim=24), r"dim 24 \(here 16\)"),
    (dict(depth=3), r"depth 3 \(here 2\)"), (dict(heads=4, args={"vit": {"heads": 4}}), r"heads 4 \(here 2\)"),
    (dict(patch=8, dim=24, depth=1), r"patch 8 \(here 4\), dim 24 \(here 16\), depth 1 \(here 2\)")])
def test_an_encoder_of_other_sizes_is_refused_with_both_numbers(options, says, tmp_path):
    path, vit = vit_file(tmp_path, **options)[0], ViT(**VIT)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    with pytest.raises(Problem, match=f"vit.pth.*{says}.*it wants") as error:
        load_encoder(vit, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())

def swin():
    timm = pytest.importorskip("timm")
    return timm.models.SwinTransformer(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4).state_dict()

OTHERS = {
    "a resnet": lambda vit: {f"layer1.0.{name}": value for name, value in nn.Conv2d(3, 8, 3).state_dict().items()},
    "a swin transformer": lambda vit: swin(),
    "a transformer for video": lambda vit: vit | {"patch_embed.proj.weight": torch.zeros(16, 3, 2, 4, 4)},
    "layer scale": lambda vit: vit | {"blocks.0.ls1.gamma": torch.ones(16)},
    "a wider mlp": lambda vit: vit | {"blocks.1.mlp.fc1.weight": torch.zeros(80, 16)},
    "no biases": lambda vit: {name: value for name, value in vit.items() if not name.endswith("qkv.bias")},
    "register tokens": lambda vit: vit | {"reg_token": torch.zeros(1, 4, 16)},
    "no positions": lambda vit: {name: value for name, value in vit.items() if name != "pos_embed"},
    "nothing": lambda vit: {},
    "a name for a model": lambda vit: {"model": "vit_base"},
}

@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_kind_of_model_is_refused_in_one_line(what, tmp_path):
    vit = ViT(**VIT)
    torch.save(OTHERS[what](vit.state_dict()), tmp_path / "other.pth")
    with pytest.raises(Problem, match="other.pth") as error:
        load_encoder(vit, tmp_path / "other.pth")
    assert "\n" not in str(error.value)
    assert what != "layer scale" or "blocks.0.ls1.gamma" in str(error.value)

@pytest.mark.parametrize("change", [dict(dim=12), dict(depth=2), "channels"])
def test_a_decoder_of_other_sizes_is_refused(change, tmp_path):
    there = ViT(**VIT | (dict(channels=1) if change == "channels" else {}))
    torch.save({"model": Decoder(there, **dict(dim=8, depth=1, heads=2) | (change if isinstance(change, dict) else {})
                                 ).state_dict()}, tmp_path / "a.pth")
    with pytest.raises(Problem, match="a.pth does not fit"):
        load_decoder(Decoder(ViT(**VIT), 8, 1, 2), tmp_path / "a.pth")
    with pytest.raises(Problem, match="vit.pth has no decoder"):
        load_decoder(Decoder(ViT(**VIT), 8, 1, 2), vit_file(tmp_path)[0])

@pytest.mark.parametrize("classes", [10, 5, 0])
def test_a_head_of_other_size_starts_afresh_and_one_of_the_same_is_read(classes, tmp_path):
    path, there = vit_file(tmp_path, classes=10)
    vit = ViT(**VIT, classes=classes)
    before, line = vit.head.weight.clone() if classes else None, load_encoder(vit, path)
    assert ("left out: head" in line) == (classes != 10) and ("new: head" in line) == (classes == 5)
    assert not classes or torch.equal(vit.head.weight, there.head.weight if classes == 10 else before)
    assert torch.equal(vit.norm.bias, there.norm.bias) and torch.equal(vit.cls_token, there.cls_token)

@pytest.mark.parametrize("there, here, names", [("cls", "mean", ("norm", "fc_norm")), ("mean", "cls", ("fc_norm", "norm"))])
def test_another_last_norm_starts_afresh_and_is_told(there, here, names, tmp_path):
    vit = ViT(**VIT, pool=here)
    line = load_encoder(vit, vit_file(tmp_path, pool=there)[0])
    assert f"left out: {names[0]}" in line and f"new: {names[1]}" in line
    fresh = vit.fc_norm if here == "mean" else vit.norm
    assert torch.equal(fresh.weight, torch.ones(16)) and torch.equal(fresh.bias, torch.zeros(16))

# --------------------------------------------------------------------------------------------------------------------- run

def test_schedule_climbs_in_a_line_then_falls_half_a_cosine():
    for step in range(10):
        assert schedule(step, 10, 110) == pytest.approx((step + 1) / 10)
    for step in (10, 35, 60, 85, 110):
        assert schedule(step, 10, 110) == pytest.approx(math.cos(math.pi / 2 * (step - 10) / 100) ** 2, abs=1e-12)
    assert schedule(0, 0, 50) == 1 and schedule(50, 0, 50) == pytest.approx(0, abs=1e-12)

@pytest.mark.parametrize("warmup", [0.5, 2.5, 468.5])
def test_a_warm_up_of_part_of_a_step_does_not_pass_the_peak(warmup):
    shares = [schedule(step, warmup, 1000) for step in range(1000)]
    assert 0 < min(shares) and max(shares) <= 1 and shares.index(max(shares)) <= warmup + 1

def test_adamw_decays_matrices_only():
    encoder = ViT(8, 4, dim=16, depth=1, heads=2, classes=3, pool="mean")
    model = nn.ModuleDict({"encoder": encoder, "decoder": Decoder(encoder, dim=8, depth=1, heads=2)})
    optimizer = adamw(model, 0.05, betas=(0.9, 0.999))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay.get(p) for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    for name, value in found.items():
        owner = modules[name.rpartition(".")[0]]
        if "pos_embed" in name:
            assert value is None, f"{name} is trained"
        else:
            weight = name.endswith(".weight") and isinstance(owner, (nn.Linear, nn.Conv2d))
            assert value == (0.05 if weight else 0.0), name
    assert found["encoder.cls_token"] == found["decoder.mask_token"] == found["encoder.fc_norm.weight"] == 0.0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)

@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_each_layer_learns_at_its_share_of_the_rate(pool, decay):
    vit = ViT(8, 4, dim=16, depth=11, heads=2, classes=3, pool=pool)    # blocks 1 and 10 must not be taken for each other
    vit.pos_embed.requires_grad_(True)
    layer = {vit.cls_token: 0, vit.pos_embed: 0} | dict.fromkeys(vit.patch_embed.parameters(), 0)
    for k, block in enumerate(vit.blocks):
        layer |= dict.fromkeys(block.parameters(), k + 1)
    for module in (vit.norm, vit.fc_norm, vit.head):
        layer |= dict.fromkeys(module.parameters(), 12)
    optimizer = adamw(vit, 0.05, layer_decay=decay)
    update(optimizer, step=3, warmup=0, total=9, lr=0.5, batch=64)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == layer.keys() == set(vit.parameters())
    matrices = {module.weight for module in vit.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for name, p in vit.named_parameters():
        rate = 0.5 * 64 / 256 * math.cos(math.pi / 2 * 3 / 9) ** 2 * decay ** (12 - layer[p])
        assert groups[p]["lr"] == pytest.approx(rate, rel=1e-9), name
        assert groups[p]["weight_decay"] == (0.05 if p in matrices else 0.0), name

def update(optimizer, step, warmup, total, lr, batch, **more):
    """One step of an optimizer at the rate of a place in a run → that rate."""
    args = types.SimpleNamespace(lr=lr, batch=batch, warmup=warmup / 10, **more)            # warm-up in epochs of 10 steps
    run = types.SimpleNamespace(args=args, step=step, total=total, per_epoch=10,
                                scaler=torch.amp.GradScaler("cpu", enabled=False))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    Run.update(run, optimizer)
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    return run.lr

@pytest.mark.parametrize("floor", [None, 0.0, 0.02])
def test_the_learning_rate_climbs_to_its_peak_and_falls_to_the_floor(floor):
    peak, low, more = 0.8 * 32 / 256, floor or 0.0, {} if floor is None else dict(min_lr=floor)
    for step in (0, 7, 19, 20, 21, 60, 119, 120):
        weight = nn.Parameter(torch.zeros(1))
        found = update(torch.optim.SGD([weight], lr=9.0), step, 20, 120, 0.8, 32, **more)
        cosine = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - 20) / 100))
        wanted = peak * (step + 1) / 20 if step < 20 else cosine
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12) and weight.item() == pytest.approx(-wanted, rel=1e-5, abs=1e-9)

# ------------------------------------------------------------------------------------------------------------------ scenes

def test_scenes_depend_on_seed_and_index_alone():
    images, labels, masks = draw_scenes(torch.arange(40), 32, seed=1)
    for index in (torch.tensor([7]), torch.tensor([39, 3, 7, 7]), torch.arange(39, -1, -3)):
        again = draw_scenes(index, 32, seed=1)
        assert all(torch.equal(part, whole[index]) for part, whole in zip(again, (images, labels, masks)))
    data = Scenes(220, 32, seed=1, first=250)                          # drawn in more than one go
    assert torch.equal(data.images[5], draw_scenes(torch.tensor([255]), 32, seed=1)[0][0])
    assert torch.equal(data.masks[210], draw_scenes(torch.tensor([460]), 32, seed=1)[2][0])

def test_scenes_differ_by_seed_and_by_index():
    index = torch.arange(60)
    one, two = (draw_scenes(index, 16, seed)[0].flatten(1) for seed in (0, 1))
    assert len(torch.cat([one, two]).unique(dim=0)) == 120

def test_scenes_labels_go_round_and_classes_are_balanced():
    labels = draw_scenes(torch.tensor([0, 9, 10, 25, (1 << 40) + 7]), 16)[1]
    assert labels.tolist() == [i % 10 for i in (0, 9, 10, 25, (1 << 40) + 7)]
    train, val = open_data(size=8)
    assert len(train.classes) == 10 and len(set(train.classes)) == 10
    for data in (train, val):
        assert data.labels.bincount().tolist() == [len(data) // 10] * 10

def test_training_and_validation_scenes_never_share_one():
    train, val = open_data(size=16)
    everything = torch.cat([train.images, val.images]).flatten(1).numpy()
    assert len({row.tobytes() for row in everything}) == len(train) + len(val)

def test_open_data_passes_seed_and_limit_on():
    train, val = open_data(size=(8, 16), seed=5, limit=30)
    assert len(train) == len(val) == 30 and train.size == (8, 16)
    assert torch.equal(train.images[:30], draw_scenes(torch.arange(30), (8, 16), seed=5)[0])

@pytest.mark.parametrize("size", [32, 96, (32, 64), (48, 24), 20])
def test_the_object_has_its_share_of_the_picture_and_stands_out(size):
    images, _, masks = draw_scenes(torch.arange(200), size)
    H, W = (size, size) if isinstance(size, int) else size
    assert images.shape == (200, 3, H, W) and images.dtype == torch.uint8
    assert masks.shape == (200, H, W) and masks.dtype == torch.bool
    share = masks.float().sum((1, 2)) / min(H, W) ** 2                  # of the square that the picture's short side spans
    assert 0.1 < share.min() and share.max() < 0.45 and 0.15 < share.mean() < 0.3
    inside = (images * masks[:, None]).sum((2, 3)) / masks.sum((1, 2))[:, None]
    outside = (images * ~masks[:, None]).sum((2, 3)) / (~masks).sum((1, 2))[:, None]
    assert (inside - outside).abs().amax(1).min() > 40                  # of 255; pure chance would come near 0

def test_objects_stand_in_different_places():
    masks = draw_scenes(torch.arange(200), 32)[2].float()
    place = torch.arange(32.0)
    centres = torch.stack([(masks.sum(axis) * place).sum(1) / masks.sum((1, 2)) for axis in (1, 2)], 1)
    assert (centres.std(0) > 1).all() and ((centres.mean(0) - 15.5).abs() < 1).all()

def test_pixels_alone_do_not_tell_the_classes():
    """Least squares, with the ridge that serves it best: a data set it can solve would need no representation."""
    (x, labels, _), (q, truth, _) = draw_scenes(torch.arange(3000), 32), draw_scenes(torch.arange(50_000, 51_000), 32)
    mean, targets = x.float().mean(0).flatten(), F.one_hot(labels, 10) - 0.1
    x, q = ((part.flatten(1) - mean) / 255 for part in (x, q))
    best, gram = 0, x @ x.T
    for ridge in (100, 1000, 5000):
        votes = q @ x.T @ torch.linalg.solve(gram + ridge * torch.eye(3000), targets)
        best = max(best, (votes.argmax(1) == truth).float().mean().item())
    assert 0.1 < best < 0.45

# ------------------------------------------------------------------------------------------------------------------- crops

@pytest.mark.parametrize("source, size", [((24, 24), (24, 24)), ((24, 40), (11, 17)), ((16, 12), (40, 30)),
                                          ((30, 20), (13, 41))])
def test_a_full_window_equals_torchs_antialiased_bicubic_resize(source, size):
    images = torch.randint(0, 256, (3, 2, *source), dtype=torch.uint8)
    rows, columns = (crop_weights(torch.zeros(3), torch.full((3,), float(n)), n, m) for n, m in zip(source, size))
    found = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    wanted = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)        # of 255, float32 sums

def test_whole_crops_equal_torchs_resize_up_to_a_flip():
    images = torch.randint(0, 256, (40, 3, 20, 28), dtype=torch.uint8)
    found, _ = random_crops(images, None, (16, 16), 1.0)
    wanted = F.interpolate(images.float(), (16, 16), mode="bicubic", antialias=True)
    straight = (found - wanted).abs().amax((1, 2, 3)) < 2e-3
    flipped = (found - wanted.flip(3)).abs().amax((1, 2, 3)) < 2e-3
    assert (straight ^ flipped).all() and 8 <= flipped.sum() <= 32      # 4 standard deviations around 20

def test_a_window_of_whole_pixels_at_its_own_size_is_a_slice():
    line, start = torch.rand(20), torch.tensor([0.0, 3.0, 12.0])
    weights = crop_weights(start, torch.full((3,), 8.0), 20, 8)
    for k, first in enumerate((0, 3, 12)):
        torch.testing.assert_close(weights[k] @ line, line[first:first + 8])
    torch.testing.assert_close(crop_weights(torch.rand(5) * 9, torch.rand(5) * 10 + 1, 20, 7).sum(-1), torch.ones(5, 7))

def test_whole_crops_keep_all_pixels_and_flip_about_half():
    images = torch.randint(0, 256, (400, 1, 6, 8), dtype=torch.uint8)
    found, _ = random_crops(images, None, (6, 8), 1.0)
    same = (found - images).abs().amax((1, 2, 3)) < 1e-3
    flipped = (found - images.flip(3)).abs().amax((1, 2, 3)) < 1e-3
    assert (same | flipped).all() and 150 <= flipped.sum() <= 250       # 5 standard deviations around 200

@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
def test_masks_follow_their_pictures(scale):
    masks = draw_scenes(torch.arange(64), 32)[2]
    images = (masks[:, None] * 255).to(torch.uint8)
    crops, moved = random_crops(images, masks, (24, 20), scale)
    assert moved.shape == (64, 24, 20) and moved.dtype == torch.bool
    sure = (crops[:, 0] - 127.5).abs() > 1                              # float sums may fall either way on the border itself
    assert sure.float().mean() > 0.99 and torch.equal(moved[sure], (crops[:, 0] > 127.5)[sure])

@pytest.mark.parametrize("scale", [0.2, 0.6, 0.9])
def test_crops_take_at_least_their_share_and_stay_inside_at_every_place(scale):
    ramp = torch.arange(64.0)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])
    crops, _ = random_crops(images.expand(500, -1, -1, -1), None, (64, 64), scale)
    middle = crops[:, :, 24:40, 24:40]                                  # away from borders a cubic kernel keeps straight lines
    width, height = (middle[:, 0, 8, -1] - middle[:, 0, 8, 0]).abs() / 15, (middle[:, 1, -1, 8] - middle[:, 1, 0, 8]) / 15
    share, aspect = width * height, width / height
    assert scale - 1e-3 < share.min() < scale + 0.1 and share.max() <= 1 + 1e-3
    assert 0.74 < aspect.min() and aspect.max() < 1.34
    x, y = middle[:, 0, 7:9, 7:9].mean((1, 2)), middle[:, 1, 7:9, 7:9].mean((1, 2))
    for centre, side in ((x, width), (y, height)):
        assert (centre - 32 * side > -0.6).all() and (centre + 32 * side < 63.6).all()      # pixel 0 reaches from −0.5 to 0.5
    assert (crops[:, 0, 32, -1] < crops[:, 0, 32, 0]).float().mean().item() == pytest.approx(0.5, abs=0.12)

def test_the_same_seed_gives_the_same_crops_and_each_picture_its_own():
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(8, -1, -1, -1)
    crops = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        crops.append(random_crops(images, None, (12, 12), 0.3)[0])
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    assert len(crops[0].flatten(1).unique(dim=0)) == 8

# -------------------------------------------------------------------------------------------------------- pictures in memory

def some_pictures(count=30, channels=3, size=(12, 16), masks=True):
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8)
    images[:, 0] //= 2                                                  # so that channels differ
    return Pictures(images, torch.arange(count) % 3, "abc", images[:, 0] > 60 if masks else None)

@pytest.mark.parametrize("channels", [1, 3, 5])
def test_normalised_pictures_have_mean_zero_and_variance_one_in_each_channel(channels):
    data = some_pictures(channels=channels)
    x = data.normalise(data.images).double().numpy()
    assert data.channels == channels and data.size == (12, 16)
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-3)

def test_pictures_of_one_colour_do_not_become_infinite():
    data = Pictures(torch.full((4, 1, 8, 8), 9, dtype=torch.uint8), torch.zeros(4).long(), "a")
    assert data.normalise(data.images).abs().max() < 1e-4

def test_a_stream_without_scale_gives_pictures_whole_and_in_order():
    data, index = some_pictures(), torch.tensor([4, 0, 29])
    batches = list(data.stream([(index, 1), (torch.tensor([7]), 2)], CPU, (12, 16)))
    images, labels, masks = batches[0]
    wanted = (data.images[index].double().numpy() - data.images.double().numpy().mean((0, 2, 3))[:, None, None])
    wanted /= data.images.double().numpy().std((0, 2, 3), ddof=1)[:, None, None]
    np.testing.assert_allclose(images.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [1, 0, 2] and torch.equal(masks, data.masks[index])
    assert [len(batch[0]) for batch in batches] == [3, 1]

def test_a_stream_without_scale_resizes_pictures_and_their_masks():
    data, index = some_pictures(), torch.arange(5)
    data.masks = (torch.arange(16) < 8).expand(30, 12, 16)              # the left half
    images, _, masks = next(data.stream([(index, 1)], CPU, (6, 10)))
    wanted = F.interpolate(data.images[index].float(), (6, 10), mode="bicubic", antialias=True)
    torch.testing.assert_close(images, data.normalise(wanted))
    assert masks.dtype == torch.bool and torch.equal(masks, (torch.arange(10) < 5).expand(5, 6, 10))

def test_a_stream_with_scale_is_decided_by_each_batchs_seed_and_seeds_what_follows():
    data, plan = some_pictures(), [(torch.arange(6), 11), (torch.arange(6), 12), (torch.arange(6), 11)]
    after, batches = [], []
    for batch in data.stream(plan, CPU, 8, scale=0.4):
        batches.append(batch)
        after.append(torch.rand(3))                                     # a model's masks
        torch.rand(5)
    assert all(batch[0].shape == (6, 3, 8, 8) and batch[2].shape == (6, 8, 8) for batch in batches)
    assert torch.equal(batches[0][0], batches[2][0]) and not torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(after[0], after[2]) and not torch.equal(after[0], after[1])

def test_several_crops_of_pictures_in_memory_come_round_after_round_with_labels_and_masks():
    data, index = some_pictures(), torch.tensor([3, 9, 4, 20])
    images, labels, masks = next(data.stream([(index, 5)], CPU, 8, scale=0.3, crops=3))
    assert images.shape == (12, 3, 8, 8) and masks.shape == (12, 8, 8)
    assert labels.tolist() == data.labels[index].tolist() * 3 and len(images.flatten(1).unique(dim=0)) == 12
    whole, twice, _ = next(data.stream([(index, 5)], CPU, data.size, crops=2))
    assert torch.equal(whole[:4], whole[4:]) and torch.equal(twice[:4], twice[4:])          # uncropped ones are alike

def test_pictures_without_masks_stream_none():
    assert next(some_pictures(masks=False).stream([(torch.arange(2), 0)], CPU, 8, 0.5))[2] is None

def test_pick_keeps_pictures_with_their_labels_and_masks():
    data = some_pictures()
    whole, index = copy.deepcopy(data), torch.tensor([29, 3, 4])
    data.pick(index)
    assert len(data) == 3 and data.labels.tolist() == [2, 0, 1] and data.classes == ["a", "b", "c"]
    assert torch.equal(data.images, whole.images[index]) and torch.equal(data.masks, whole.masks[index])
    assert torch.equal(next(data.stream([(torch.tensor([1]), 0)], CPU, (12, 16)))[0], whole.normalise(whole.images[[3]]))
    data.pick(slice(None))
    assert len(data) == 3

def test_pick_keeps_the_boxes_of_scenes_beside_their_masks():
    data, index = Scenes(20, 16), torch.tensor([7, 2])
    boxes = data.boxes.clone()
    data.pick(index)
    assert torch.equal(data.boxes, boxes[index])

@pytest.mark.parametrize("count", [1, 4])
def test_few_keeps_as_many_of_each_class_as_asked_and_the_seed_says_which(count):
    numbers, found = torch.arange(30), []
    for seed in (0, 0, 1):
        data = Pictures(numbers.byte()[:, None, None, None].expand(-1, 1, 4, 4), numbers % 3, "abc")
        torch.manual_seed(len(found))                                   # whatever was drawn before
        data.few(count, seed)
        found.append(sorted(data.images[:, 0, 0, 0].tolist()))
        assert data.labels.bincount().tolist() == [count] * 3
        assert (data.images[:, 0, 0, 0] % 3 == data.labels).all() and len(set(found[-1])) == 3 * count
    assert found[0] == found[1] != found[2] and found[0] != list(range(3 * count))

def test_too_few_pictures_of_a_class_are_told_with_their_number():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, -1, -1, -1])
    data = Pictures(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), labels, ["cat", "dog", "eel"])
    with pytest.raises(Problem, match="3 pictures.*dog 2, eel 0") as error:
        data.few(3, 0)
    assert "cat" not in str(error.value) and len(data) == 9

def test_few_takes_no_picture_without_a_label():
    data = Pictures(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, -1, -1]).repeat(10), "ab")
    data.few(10, 3)
    assert data.labels.tolist() == [0] * 10 + [1] * 10

def test_validation_pictures_are_normalised_as_those_of_training():
    train, val = open_data(size=8, limit=20)
    assert torch.equal(train.mean, val.mean) and torch.equal(train.std, val.std)

def test_a_change_comes_after_the_crop_picture_by_picture():
    data, seen = some_pictures(), []

    def change(image):
        assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)
        seen.append(torch.rand(1).item())                               # drawn from the batch's seed
        return 255 - image if len(seen) % 2 else image
    plan = [(torch.arange(6), 11)]
    plain, = data.stream(plan, CPU, 8, scale=1.0)
    changed, = data.stream(plan, CPU, 8, scale=1.0, change=change)
    pixels = [(images * data.std + data.mean).clamp(0, 255) for images in (plain[0], changed[0])]
    torch.testing.assert_close(pixels[1][1::2], pixels[0][1::2], rtol=0, atol=0.51)         # rounded to whole numbers
    torch.testing.assert_close(pixels[1][::2], 255 - pixels[0][::2], rtol=0, atol=0.51)
    assert len(set(seen)) == 6 and torch.equal(changed[1], plain[1]) and torch.equal(changed[2], plain[2])
    list(data.stream(plan, CPU, 8, scale=1.0, change=change))
    assert seen[6:] == seen[:6]
    list(data.stream(plan, CPU, 8, change=change))                      # whole pictures, for judging, stay as they are
    assert len(seen) == 12

# ---------------------------------------------------------------------------------------------------------- pictures in files

COLOURS = {"red": (220, 30, 40), "green": (20, 180, 60), "blue": (40, 50, 200)}

def paint(path, colour="red", mode="RGB", size=(20, 24), **how):
    image = Image.new("RGB", size, COLOURS.get(colour, colour)).convert(mode)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        image.save(file, **{"format": "PNG", **how})

def colours(data, run=CPU, size=16, scale=None):
    """What a stream gives of all pictures: mean colours 0 … 255 (M, 3), and labels."""
    images, labels, masks = next(data.stream([(torch.arange(len(data)), 0)], run, size, scale))
    assert masks is None and images.shape[1:] == (3, size, size)
    return (images * data.std + data.mean).mean((2, 3)), labels.tolist()

def refused(*words, name):
    with pytest.raises(Problem) as error:
        open_data(str(name))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)

@pytest.fixture
def classes(tmp_path):
    """train/ and val/ with a folder for each of three colours; val lacks the first."""
    for colour in COLOURS:
        for k in range(4):
            paint(tmp_path / "train" / colour / f"{k}.png", colour)
    for colour in ("green", "red"):
        paint(tmp_path / "val" / colour / "x.png", colour)
    return tmp_path

def test_class_folders_give_sorted_classes_and_the_same_numbers_in_val(classes):
    train, val = open_data(str(classes))
    assert train.classes == val.classes == ["blue", "green", "red"] and len(train) == 12 and len(val) == 2
    for data in (train, val):
        means, labels = colours(data)
        wanted = torch.tensor([COLOURS[data.classes[label]] for label in labels]).float()
        torch.testing.assert_close(means, wanted, rtol=0, atol=0.6)     # PNG is exact, resizing rounds
    assert sorted(labels) == [1, 2]

def test_without_train_there_is_no_validation(tmp_path):
    for colour in COLOURS:
        paint(tmp_path / colour / "0.png", colour)
    train, val = open_data(str(tmp_path))
    assert val is None and train.classes == ["blue", "green", "red"] and colours(train)[1] == [0, 1, 2]

def test_a_flat_folder_and_one_with_pictures_beside_its_folders_are_unlabelled(tmp_path):
    paint(tmp_path / "a" / "0.png"), paint(tmp_path / "b" / "0.png")
    assert folder(tmp_path).labels.tolist() == [0, 1]
    paint(tmp_path / "0.png")
    data = folder(tmp_path)
    assert data.labels.tolist() == [-1] * 3 and data.classes == []
    (tmp_path / "flat").mkdir()
    paint(tmp_path / "flat" / "only" / "0.png")
    assert folder(tmp_path / "flat").labels.tolist() == [-1]            # one folder makes no classes

def test_nested_pictures_belong_to_the_uppermost_folder(tmp_path):
    for name in ("x/1.png", "x/deep/er/2.png", "y/z/3.PNG", "y/z/4.jpeg"):
        paint(tmp_path / name)
    data = folder(tmp_path)
    assert data.classes == ["x", "y"] and sorted(data.labels.tolist()) == [0, 0, 1, 1]
    assert colours(data)[1] == data.labels.tolist()

def test_limit_uses_the_first_pictures_only(classes):
    train, val = open_data(str(classes), limit=5)
    assert len(train) == 5 and len(val) == 2
    assert colours(train)[1] == [0, 0, 0, 0, 1]

@pytest.mark.parametrize("index", [[7, 2, 11], [5]])
def test_files_are_picked_with_their_labels(index, classes):
    train, whole = open_data(str(classes))[0], open_data(str(classes))[0]
    train.pick(torch.tensor(index))
    assert len(train) == len(train.paths) == len(index) and train.paths.tolist() == [whole.paths[i] for i in index]
    assert colours(train)[1] == [i // 4 for i in index]

def test_few_of_files_keeps_as_many_of_each_class(classes):
    train, _ = open_data(str(classes))
    train.few(3, 0)
    assert train.labels.bincount().tolist() == [3, 3, 3] and len(set(train.paths.tolist())) == 9
    assert all(train.classes[label] in os.fsdecode(path) for path, label in zip(train.paths, train.labels))

def test_a_file_is_a_data_set_of_one(classes):
    data, val = open_data(str(classes / "train" / "red" / "0.png"))
    assert len(data) == 1 and val is None and data.labels.tolist() == [-1]
    torch.testing.assert_close(colours(data)[0], torch.tensor([COLOURS["red"]]).float(), rtol=0, atol=0.6)

KINDS = {
    "grey.png": ("L", {}), "bilevel.png": ("1", {}), "rgba.png": ("RGBA", {}), "greyalpha.png": ("LA", {}),
    "palette.png": ("P", {}), "rgb.jpg": ("RGB", dict(format="JPEG")), "grey.jpeg": ("L", dict(format="JPEG")),
    "cmyk.jpg": ("CMYK", dict(format="JPEG")), "progressive.JPG": ("RGB", dict(format="JPEG", progressive=True)),
    "lossy.webp": ("RGB", dict(format="WEBP")), "alpha.webp": ("RGBA", dict(format="WEBP", lossless=True)),
    "really-a-png.jpg": ("RGB", {}), "really-a-jpeg.png": ("RGB", dict(format="JPEG")),
    "transparent.png": ("P", dict(transparency=255)),
}

@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_becomes_rgb(name, tmp_path):
    mode, how = KINDS[name]
    if how.get("format") == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow cannot write webp")
    for k, colour in enumerate(COLOURS):
        paint(tmp_path / f"{k}-{name}", colour, mode, size=(32, 32), **how)
    data = folder(tmp_path)
    wanted = [np.array(Image.open(tmp_path / f"{k}-{name}").convert("RGB"), dtype=float).mean((0, 1)) for k in range(3)]
    np.testing.assert_allclose(colours(data)[0], wanted, rtol=0, atol=4)        # decoders differ by a few steps in lossy kinds
    assert not data.broken

@pytest.mark.parametrize("value", [0, 1000, 30_000, 65_535])
def test_a_grey_png_of_16_bits_keeps_its_brightness(value, tmp_path):
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "deep.png")
    data = folder(tmp_path)
    np.testing.assert_allclose(colours(data)[0], [[value / 257] * 3], rtol=0, atol=1.1)

def test_pictures_are_neither_turned_nor_mirrored(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :20], pixels[:20, 20:], pixels[20:, :20] = COLOURS["red"], COLOURS["green"], COLOURS["blue"]
    Image.fromarray(pixels).save(tmp_path / "corners.png")
    data = folder(tmp_path)
    image = next(data.stream([(torch.tensor([0]), 0)], CPU, 16))[0][0] * data.std + data.mean
    for y, x, colour in ((3, 3, "red"), (3, 12, "green"), (12, 3, "blue"), (12, 12, "black")):
        torch.testing.assert_close(image[:, y, x], torch.tensor(COLOURS.get(colour, (0, 0, 0))).float(), rtol=0, atol=3)

def test_names_may_be_any_bytes(tmp_path):
    paint(tmp_path / "ünïcode 画像 \n.png", "green")
    try:
        paint(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"), "red")
    except OSError:
        pytest.skip("this file system takes no such names")
    data = folder(tmp_path)
    assert len(data) == 2
    found = colours(data)[0]
    assert not data.broken
    np.testing.assert_allclose(sorted(found.tolist()), sorted([COLOURS["red"], COLOURS["green"]]), atol=0.6)

def test_hidden_files_and_other_kinds_of_file_are_left_alone(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        paint(tmp_path / name)
    for name in ("a/._0.png", "b/.hidden.jpg", "notes.txt", "a/movie.gif", "Thumbs.db", "a/png"):
        (tmp_path / name).write_bytes(b"nothing")
    assert folder(tmp_path).classes == ["a", "b"] and len(folder(tmp_path)) == 2

def test_hidden_folders_are_left_alone(tmp_path):
    for name in ("a/0.png", "b/0.png", ".ipynb_checkpoints/0.png", "a/.thumbnails/0.png"):
        paint(tmp_path / name)
    assert folder(tmp_path).classes == ["a", "b"] and len(folder(tmp_path)) == 2

def test_an_empty_class_folder_and_a_circle_of_links_do_no_harm(classes):
    (classes / "train" / "void").mkdir()
    (classes / "train" / "red" / "loop").symlink_to(classes / "train", target_is_directory=True)
    (classes / "train" / "blue" / "self").symlink_to(".", target_is_directory=True)
    train, _ = open_data(str(classes))
    assert train.classes == ["blue", "green", "red"] and len(train) == 12

def test_linked_class_folders_are_followed(classes, tmp_path):
    (tmp_path / "links").mkdir()
    for colour in COLOURS:
        (tmp_path / "links" / colour).symlink_to(classes / "train" / colour, target_is_directory=True)
    assert folder(tmp_path / "links").labels.bincount().tolist() == [4, 4, 4]

def test_a_folder_of_imagenets_size_is_read_in_seconds(tmp_path, monkeypatch):
    listing = [(f"{tmp_path}/n{k:08}", [], [f"{k}-{i}.JPEG" for i in range(1_000)]) for k in range(100)]
    monkeypatch.setattr(os, "walk", lambda root, followlinks: [(str(tmp_path), [], []), *listing])
    start = time.time()
    data = folder(tmp_path)
    assert time.time() - start < 20                                     # a step of the time for each pair would be minutes
    assert len(data) == 100_000 and len(data.classes) == 100 and data.labels.bincount().tolist() == [1_000] * 100

def test_a_moving_picture_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), COLOURS[colour]) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.jpg", "GIF", save_all=True, append_images=frames[1:])
    paint(tmp_path / "still.jpg", "green", format="JPEG")
    data = folder(tmp_path)
    np.testing.assert_allclose(colours(data)[0], [COLOURS["red"], COLOURS["green"]], atol=4)
    assert not data.broken

def test_a_copy_of_a_data_set_counts_its_own_broken_pictures(tmp_path):
    for k in range(150):
        paint(tmp_path / f"{k:03}.png", size=(8, 8))
    (tmp_path / "120.png").write_bytes(b"broken")
    whole = folder(tmp_path)
    part = copy.copy(whole)
    part.pick(torch.arange(8))
    list(whole.stream([(torch.tensor([119, 120]), 0)], CPU, 8))
    assert whole.broken == {120} and not part.broken
    list(part.stream([(torch.arange(8), 0)], CPU, 8))                   # 1 of 8 would be over 1 %
    again = copy.copy(whole)
    list(again.stream([(torch.tensor([3]), 0)], CPU, 8))
    again.pick(torch.arange(8))
    assert whole.broken == {120} and not again.broken                   # its numbers are others now

def test_no_crops_keep_the_whole_of_an_oblong_picture(tmp_path):
    pixels = np.zeros((20, 80, 3), np.uint8)
    pixels[:, :8], pixels[:, -8:] = COLOURS["red"], COLOURS["red"]      # both ends
    Image.fromarray(pixels).save(tmp_path / "oblong.png")
    data = folder(tmp_path)
    image = next(data.stream([(torch.tensor([0]), 0)], CPU, 20, scale=1.0))[0][0] * data.std + data.mean
    for x in (0, 19):
        torch.testing.assert_close(image[:, 10, x], torch.tensor(COLOURS["red"]).float(), rtol=0, atol=12)

def test_erasing_leaves_all_but_a_rectangle_as_it_was():
    images = torch.rand(4_000, 2, 20, 30) + 1
    found = common.erase(images, 0.25)
    changed = (found != images).all(1)                                  # (B, H, W) noise in all channels, each pixel's own
    assert torch.equal(changed, (found != images).any(1))
    share = changed.flatten(1).float().mean(1)
    hit = share > 0
    assert abs(hit.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4_000) ** 0.5
    assert 0.01 < share[hit].min() and share[hit].max() < 0.36 and abs(share[hit].mean() - 0.175) < 0.02       # 0.02 … 0.33
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(rows * columns, changed.flatten(1).sum(1))       # a rectangle
    aspect = rows[hit] / columns[hit]
    assert aspect.min() > 0.2 and aspect.max() < 4.5 and abs(aspect.log().median()) < 0.3       # 1/3.3 … 3.3, rounded
    noise = found[hit][changed[hit][:, None].expand(-1, 2, -1, -1)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    square = common.erase(images, 1.0, (0.25, 0.25), 1.0, noise=False)
    assert torch.equal((square == 0).flatten(1).sum(1), torch.full((4_000,), 2 * 12 * 12))      # √150 is 12.2

@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_process_that_saves_says_when_it_is_time(rank, monkeypatch):
    """The others do not know how long it took."""
    run, saves, told = Run.__new__(Run), [], []
    run.__dict__ |= dict(scaler=torch.amp.GradScaler(enabled=False), step=3, per_epoch=10, total=100, look=0, due=0, stop=0,
                         world=2, rank=rank, mark=(time.time() - 1, 0), sums={"loss": torch.ones(())}, notes={}, lr=0.1,
                         args=types.SimpleNamespace(batch=8, epochs=10), save=lambda: saves.append(run.step))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda facts: told.append(facts.tolist()))
    run.after_step()
    assert bool(saves) == (rank == 0) == (told[0][3] > 0)

@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_pictures_than_processes_are_measured_once(rank, classes, monkeypatch):
    data = folder(str(classes))
    data.pick(torch.tensor([0]))
    run = types.SimpleNamespace(device=CPU.device, workers=0, rank=rank, world=2, micro=4, autocast=contextlib.nullcontext)
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: sums.append(total.sum().item()) or total.fill_(1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, len(data.classes)))
    common.measure(model, data, run, types.SimpleNamespace(size=16))
    assert sums[0] == (rank == 0)

def test_a_class_that_only_val_has_is_refused(classes):
    paint(classes / "val" / "violet" / "0.png")
    refused("classes", str(classes / "val" / "violet" / "0.png"), name=classes)          # which picture

def test_of_a_class_with_synonyms_the_first_is_its_name(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(_samples=[("a.jpg", 0), ("b.jpg", 1)], classes=[("tench", "Tinca tinca"), ("church",)])
    monkeypatch.setattr(torchvision.datasets, "Imagenette", lambda root, **how: fake)
    assert open_data("imagenette", root=tmp_path)[0].classes == ["tench", "church"]

def test_a_folder_without_pictures_is_refused(tmp_path, classes):
    (tmp_path / "empty").mkdir()
    refused("no .jpg", "empty", name=tmp_path / "empty")
    for file in (classes / "val").rglob("*.png"):
        file.unlink()
    refused("no .jpg", "val", name=classes)

def test_a_missing_path_is_refused_with_the_names_there_are(tmp_path):
    refused("neither a folder nor", "imagenette", "fashion-mnist", name=tmp_path / "nowhere")

@pytest.mark.parametrize("wrong, right", [("fashion_mnist", "fashion-mnist"), ("CIFAR10", "cifar10"),
                                          ("imagenete", "imagenette"), ("cifar-100", "cifar100")])
def test_a_misspelt_name_is_refused_with_the_nearest(wrong, right):
    refused(f"did you mean {right}?", name=wrong)

def break_picture(path, how):
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>404 Not Found</html>\n", "truncated": whole[:len(whole) // 2]}[how])

@pytest.fixture
def hundred(tmp_path):
    """100 noisy JPEGs in two folders, all of class 0 red, all of class 1 blue."""
    rng = np.random.default_rng(0)
    for k in range(100):
        colour = np.array(COLOURS["red" if k < 50 else "blue"])
        os.makedirs(tmp_path / ("a" if k < 50 else "b"), exist_ok=True)
        noise = rng.integers(-20, 20, (24, 24, 3))
        Image.fromarray((colour + noise).astype(np.uint8)).save(tmp_path / ("a" if k < 50 else "b") / f"{k:02}.jpg", quality=95)
    return tmp_path

@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
def test_a_broken_picture_is_replaced_by_another_and_counted(how, hundred):
    break_picture(hundred / "a" / "49.jpg", how)
    data = folder(hundred)
    means, labels = colours(data)
    assert data.broken == {49}
    assert labels == [0] * 49 + [1] * 51                                # the next one, with its own label
    assert (means[49] - means[50]).abs().max() == 0 and (means.argmax(1) == torch.tensor([0] * 49 + [2] * 51)).all()

@pytest.mark.parametrize("workers", [0, 2])
def test_over_one_percent_broken_stops_with_the_list_of_files(workers, hundred, capfd):
    for name, how in (("a/03.jpg", "text"), ("b/99.jpg", "truncated")):
        break_picture(hundred / name, how)
    data, run = folder(hundred), types.SimpleNamespace(device=CPU.device, workers=workers)
    with pytest.raises(Problem, match="2 of 100 pictures"):
        list(data.stream(((part, 0) for part in torch.arange(100).split(10)), run, 16))
    told = capfd.readouterr().err
    assert str(hundred / "a" / "03.jpg") in told and str(hundred / "b" / "99.jpg") in told and "04.jpg" not in told

def test_a_broken_picture_met_again_counts_once(hundred):
    break_picture(hundred / "b" / "70.jpg", "empty")
    data = folder(hundred)
    assert len(list(data.stream([(torch.tensor([70, 70, 71]), seed) for seed in range(5)], CPU, 16, 0.5))) == 5
    assert data.broken == {70}

def test_crops_of_files_do_not_depend_on_the_number_of_workers(hundred):
    data, plan = folder(hundred), [(torch.tensor([3, 50, 3]), 1), (torch.tensor([8, 9]), 2), (torch.tensor([3, 50, 3]), 1)]
    found = []
    for workers in (0, 2):
        run, batches = types.SimpleNamespace(device=CPU.device, workers=workers), []
        for images, labels, _ in data.stream(plan, run, (12, 16), 0.3):
            batches.append((images, labels, torch.rand(2)))             # what a model would draw next
        found.append(batches)
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    first, other, again = found[0]
    assert first[0].shape == (3, 3, 12, 16) and torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    assert not torch.equal(first[2], other[2])

def test_a_change_comes_after_the_crop_of_each_file_and_only_there(hundred):
    data, plan = folder(hundred), [(torch.tensor([3, 60]), 1)]
    invert = lambda image: 255 - image if image.dtype == torch.uint8 and image.shape == (3, 12, 16) else None
    plain, changed, whole = (next(data.stream(plan, CPU, (12, 16), *view))[0] * data.std + data.mean
                             for view in [(0.3,), (0.3, invert), (None, invert)])
    torch.testing.assert_close(changed, 255 - plain, rtol=0, atol=1e-3)
    assert whole[0].mean((1, 2)).argmax() == 0 and whole[1].mean((1, 2)).argmax() == 2      # red and blue, not inverted

def test_every_file_of_a_batch_is_cropped_in_its_own_way(hundred):
    for k in range(1, 8):
        (hundred / "a" / f"{k:02}.jpg").write_bytes((hundred / "a" / "00.jpg").read_bytes())
    images = next(folder(hundred).stream([(torch.arange(8), 1)], CPU, 12, 0.3))[0]
    assert len(images.flatten(1).unique(dim=0)) == 8

def test_several_crops_of_a_file_come_from_one_decoding_round_after_round(hundred):
    data, index, read = folder(hundred), torch.tensor([10, 60, 90]), []
    decode, data.read = data.read, lambda i: read.append(i) or decode(i)
    images, labels, _ = next(data.stream([(index, 1)], CPU, 12, 0.3, crops=4))
    assert read == [10, 60, 90] and images.shape == (12, 3, 12, 12) and labels.tolist() == [0, 1, 1] * 4
    assert len(images.flatten(1).unique(dim=0)) == 12                                       # no crop twice
    reds = [image[0].mean() > image[2].mean() for image in images]                          # class a is red, b is blue
    assert reds == [True, False, False] * 4
    assert torch.equal(images[:3], next(data.stream([(index, 1)], CPU, 12, 0.3))[0])        # the first round is as without

def test_crops_of_files_differ_by_seed_and_keep_labels(hundred):
    data, index = folder(hundred), torch.tensor([10, 60])
    one, two = data.stream([(index, 1), (index, 2)], CPU, 12, 0.3)
    assert not torch.equal(one[0], two[0]) and one[1].tolist() == two[1].tolist() == [0, 1]

# ------------------------------------------------------------------------------------------------------------- torchvision

@pytest.fixture
def fashion(tmp_path):
    """A tiny data set in the files that Fashion-MNIST comes in → its root, images and labels."""
    raw, rng, parts = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0), []
    raw.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())
        parts.append((images, labels))
    return tmp_path, parts

def test_fashion_mnist_is_read_from_root(fashion):
    root, parts = fashion
    for data, (images, labels) in zip(open_data("fashion-mnist", str(root), limit=8), parts):
        assert data.channels == 1 and data.size == (28, 28) and len(data) == 8 and len(data.classes) == 10
        assert np.array_equal(data.images[:, 0].numpy(), images[:8]) and data.labels.tolist() == labels[:8].tolist()
        assert data.images.dtype == torch.uint8 and data.masks is None
        found = next(data.stream([(torch.arange(8), 0)], CPU, 28))
        assert found[0].shape == (8, 1, 28, 28) and found[1].tolist() == labels[:8].tolist()

def test_a_download_that_fails_is_a_problem_in_one_line(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("Error downloading train-images:\nTried a, got:\nb")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", fail)
    with pytest.raises(Problem, match="fashion-mnist") as error:
        open_data("fashion-mnist", str(tmp_path))
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cut_off_data_set_is_a_problem(share, fashion):
    path = fashion[0] / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(Problem, match="fashion-mnist"):
        open_data("fashion-mnist", str(fashion[0]))

# ----------------------------------------------------------------------------------------------------------------- batches

def batches(count=64, rank=0, world=1, batch=16, micro=4, epochs=3, seed=7, crops=1):
    args = types.SimpleNamespace(batch=batch, epochs=epochs, seed=seed, crops=crops)
    run = types.SimpleNamespace(args=args, rank=rank, world=world, micro=micro, accumulate=batch // world // micro)
    return Batches(range(count), run, 8, 0.5)

def steps(plan, accumulate):
    """A plan → a list of steps, each a list of (picture numbers, seed)."""
    plan = [(index.tolist(), seed) for index, seed in plan]
    return [plan[k:k + accumulate] for k in range(0, len(plan), accumulate)]

@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_very_micro_batches_that_one_would_take(world):
    alone = steps(batches().plan(0), 4)
    ranks = [steps(batches(rank=rank, world=world).plan(0), 4 // world) for rank in range(world)]
    together = [[micro for part in step for micro in part] for step in zip(*ranks, strict=True)]
    assert len(alone) == 12 and together == alone

def test_every_epoch_takes_every_picture_once_in_a_new_order():
    plan, orders = steps(batches().plan(0), 4), []
    for epoch in range(3):
        orders.append([i for step in plan[4 * epoch:4 * epoch + 4] for index, _ in step for i in index])
        assert sorted(orders[-1]) == list(range(64)) != orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    seeds = [seed for step in plan for _, seed in step]
    assert len(set(seeds)) == len(seeds)

def test_a_batch_that_does_not_divide_the_pictures_leaves_the_rest_of_an_epoch_out():
    made = batches(count=70)
    assert made.per_epoch == 4
    for epoch in np.array_split([i for index, _ in made.plan(0) for i in index.tolist()], 3):
        assert len(set(epoch)) == 64 and max(epoch) < 70

@pytest.mark.parametrize("world", [1, 2])
def test_with_crops_an_epoch_takes_every_picture_once_in_as_many_times_the_steps(world):
    made = [batches(rank=rank, world=world, crops=2, micro=4) for rank in range(world)]
    assert all(part.per_epoch == 8 for part in made)                                        # 64 pictures, 8 a step, each twice
    plans = [list(part.plan(0)) for part in made]
    assert all(len(index) == 2 for plan in plans for index, _ in plan)
    share = [steps(plan, 4 // world) for plan in plans]
    order = [i for step in zip(*share) for part in step for index, _ in part for i in index]
    assert all(sorted(order[k:k + 64]) == list(range(64)) for k in (0, 64, 128)) and len(order) == 192

def test_micro_batches_that_do_not_divide_by_crops_are_a_problem():
    with pytest.raises(Problem, match="micro-batches of 4 do not divide by --crops 3"):
        batches(crops=3)

def test_fewer_pictures_than_a_batch_are_taken_more_than_once():
    plan = steps(batches(count=10, epochs=2).plan(0), 4)
    for step in plan:
        counts = np.bincount([i for index, _ in step for i in index], minlength=10)
        assert counts.sum() == 16 and counts.min() >= 1 and counts.max() <= 2
    assert len(plan) == 2

@pytest.mark.parametrize("first", [1, 4, 6, 11])
def test_a_plan_from_the_middle_is_the_tail_of_the_whole(first):
    for rank in range(2):
        made = batches(rank=rank, world=2)
        assert steps(made.plan(first), 2) == steps(made.plan(0), 2)[first:]

def test_plans_depend_on_the_seed_and_not_on_torchs():
    plan = steps(batches().plan(0), 4)
    torch.manual_seed(123)
    assert steps(batches().plan(0), 4) == plan != steps(batches(seed=8).plan(0), 4)

def test_seeds_differ_by_each_number_and_fit_torch():
    seeds = {seed_of(*numbers) for numbers in [(1, 2), (12,), (2, 1), (1, 2, 0), (0, 1, 2), (1,), (-1,)]}
    assert len(seeds) == 7 and all(0 <= seed < 1 << 62 for seed in seeds) and seed_of(1, 2) == seed_of(1, 2)
    torch.manual_seed(max(seeds))

# ------------------------------------------------------------------------------------------------------------- checkpoints

class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)

def test_a_checkpoint_in_torchs_oldest_format_comes_back(tmp_path):
    torch.save({"model": torch.arange(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pt")["model"], torch.arange(3))

def test_a_checkpoint_that_is_replaced_while_it_is_read_is_the_one_that_was_opened(tmp_path):
    torch.save({"model": torch.arange(100_000)}, tmp_path / "last.pt")
    saved = read_checkpoint(tmp_path / "last.pt")
    write_whole(str(tmp_path / "last.pt"), lambda file: torch.save({"model": torch.zeros(3)}, file))
    assert torch.equal(saved["model"], torch.arange(100_000))

def test_a_checkpoint_comes_back(tmp_path):
    torch.save({"w": torch.arange(3.0), "args": {"lr": 0.1, "data": None}}, tmp_path / "last.pt")
    saved = read_checkpoint(tmp_path / "last.pt")
    assert torch.equal(saved["w"], torch.arange(3.0)) and saved["args"] == {"lr": 0.1, "data": None}

@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "text", "list", "tensor", "folder", "pickle"])
def test_what_is_no_checkpoint_is_refused_in_one_line_with_its_name(kind, tmp_path):
    path = tmp_path / "bad.pt"
    torch.save({"w": torch.randn(1000)}, path)
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind in ("list", "tensor"):
        torch.save([1, 2] if kind == "list" else torch.zeros(2), path)
    elif kind != "missing":
        path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "text": b"hello, I am a text\n" * 9,
                          "pickle": pickle.dumps([1, 2])}[kind])
    with pytest.raises(Problem, match="bad.pt") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(save, tmp_path):
    save({"encoder": Trap(tmp_path / "sprung")}, tmp_path / "evil.pt")
    with pytest.raises(Problem, match="evil.pt"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()
    if save is torch.save:
        torch.load(tmp_path / "evil.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "evil.pt").read_bytes())
    assert (tmp_path / "sprung").exists()                               # the trap does work

def test_a_disk_that_fills_up_leaves_the_file_before_whole_and_nothing_else(tmp_path):
    def fill(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "last.pt", lambda file: file.write(b"old"))
    with pytest.raises(Problem, match="No space left.*the one before it is whole"):
        write_whole(tmp_path / "last.pt", fill)
    assert (tmp_path / "last.pt").read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]
    with pytest.raises(Problem) as error:
        write_whole(tmp_path / "first.pt", fill)
    assert "whole" not in str(error.value) and os.listdir(tmp_path) == ["last.pt"]
    write_whole(tmp_path / "last.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "last.pt").read_bytes() == b"new" and os.listdir(tmp_path) == ["last.pt"]

def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path, seen = tmp_path / "last.pt", []
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())
    write_whole(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"

# ------------------------------------------------------------------------------------------------------ sheets and settings

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width, count", [(32, 32, 3), (20, 40, 2), (160, 144, 1)])
def test_a_sheet_is_a_png_with_every_picture_in_its_place(channels, height, width, count, tmp_path):
    shape = (count, channels, height, width)
    rows = {title: torch.randint(0, 256, shape, dtype=torch.uint8) for title in ("original", "painted")}
    save_sheet(tmp_path / "sheet.png", rows)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.array(sheet.convert("RGB"))
    zoom = max(1, 128 // width)
    assert pixels.shape[0] >= 2 * zoom * height and pixels.shape[1] >= count * zoom * width
    assert pixels.shape[0] <= 2 * (zoom * height + 40) and pixels.shape[1] <= count * (zoom * width + 10)
    for r, images in enumerate(rows.values()):
        strip = pixels[r * len(pixels) // 2:(r + 1) * len(pixels) // 2]
        for image in images:                                            # enlarged by repeating pixels, somewhere in its strip
            large = image.expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
            windows = [strip[y:y + large.shape[0], x:x + large.shape[1]] for y in range(len(strip) - len(large) + 1)
                       for x in range(strip.shape[1] - large.shape[1] + 1) if (strip[y, x] == large[0, 0]).all()]
            assert any(np.array_equal(window, large) for window in windows)

def preset(args, kind):
    """What is left open, by the kind of data and by the task."""
    return PRESETS[kind] | ({"lr": 9.0, "labels": 7} if args.task == "probe" else {})

PRESETS = {"scenes": dict(lr=0.1, batch=32, size=64), "small": dict(lr=0.2, batch=64),
           "imagenet": dict(lr=0.3, batch=4096, size=224)}

def options(out):
    parser = argparse.ArgumentParser("mae.py")
    for name, kind in (("data", str), ("lr", float), ("batch", int), ("size", int), ("epochs", int), ("patch", int),
                       ("micro-batch", int), ("limit", int), ("labels", int), ("pool", str)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--out", default=out and str(out))
    parser.add_argument("--task", default="pretrain")
    parser.add_argument("--seed", type=int, default=0)
    return parser

def test_the_data_selects_a_preset_and_a_flag_wins(tmp_path):
    parse = lambda *words: settings(options(tmp_path), preset, words)
    assert (parse().lr, parse().batch, parse().size, parse().seed, parse().epochs) == (0.1, 32, 64, 0, None)
    assert parse("--data", "fashion-mnist").lr == parse("--data", "cifar10").lr == 0.2
    assert parse("--data", "/some/folder").lr == parse("--data", "imagenette").lr == 0.3
    mixed = parse("--data", "/some/folder", "--lr", "0.05", "--seed", "3")
    assert (mixed.lr, mixed.batch, mixed.seed) == (0.05, 4096, 3)
    assert parse("--lr", "0").lr == 0                                   # a zero is a value, not a gap

def test_resuming_takes_what_is_not_given_from_the_run_before(tmp_path):
    args = dict(data="mnist", lr=0.7, batch=48, size=28, seed=5, resume=False, overwrite=True, out="elsewhere")
    torch.save({"args": args}, tmp_path / "last.pt")
    resumed = settings(options(tmp_path), preset, ["--resume", "--lr", "0.9"])
    assert (resumed.data, resumed.lr, resumed.seed, resumed.size, resumed.batch) == ("mnist", 0.9, 5, 28, 48)
    assert resumed.resume and not resumed.overwrite and resumed.out == str(tmp_path)
    with pytest.raises(Problem, match="--batch 48, not 96"):                                # it decides what a step is
        settings(options(tmp_path), preset, ["--resume", "--batch", "96"])

@pytest.mark.parametrize("task, out", [("pretrain", "runs/mae"), ("probe", "runs/mae-probe"), ("knn", "runs/mae-knn")])
def test_each_task_has_its_folder_unless_one_is_named(task, out):
    assert settings(options(None), preset, ["--task", task]).out == out
    assert settings(options(None), preset, ["--task", task, "--out", "elsewhere"]).out == "elsewhere"

def test_the_task_decides_what_is_left_open(tmp_path):
    found = settings(options(tmp_path), preset, ["--task", "probe"])
    assert (found.lr, found.labels, found.batch) == (9.0, 7, 32)
    assert settings(options(tmp_path), preset, ["--task", "probe", "--labels", "2"]).labels == 2

@pytest.mark.parametrize("named", [True, False])
def test_resuming_remembers_the_task_and_its_options(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = vars(settings(options(None), preset, ["--task", "probe", "--labels", "4", "--pool", "cls"])) | {"vit": {"dim": 16}}
    os.makedirs("runs/mae-probe")
    torch.save({"args": args}, "runs/mae-probe/last.pt")
    words = ["--out", "runs/mae-probe"] if named else ["--task", "probe"]
    found = settings(options(None), lambda *_: pytest.fail("a preset, though everything is known"), ["--resume", *words])
    assert (found.task, found.labels, found.pool, found.lr, found.vit) == ("probe", 4, "cls", 9.0, {"dim": 16})
    assert found.out == "runs/mae-probe" and found.resume
    with pytest.raises(Problem, match="--labels 4, not 5"):
        settings(options(None), preset, ["--resume", *words, "--labels", "5"])
    with pytest.raises(Problem, match="--task probe, not finetune"):
        settings(options("runs/mae-probe"), preset, ["--resume", "--task", "finetune"])

@pytest.mark.parametrize("name", ["batch", "size", "epochs", "patch", "micro-batch", "limit", "labels"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_count_below_one_is_refused_by_its_name(name, value, tmp_path):
    with pytest.raises(Problem, match=f"--{name} must be at least 1"):
        settings(options(tmp_path), preset, [f"--{name}={value}"])

@pytest.mark.parametrize("words", [["--nonsense"], ["--batch", "many"], ["--lr"]])
def test_a_wrong_command_line_is_a_problem_and_no_exit(words, tmp_path):
    with pytest.raises(Problem, match="--help"):
        settings(options(tmp_path), preset, words)
