"""common.py against slow formulas written here, timm and transformers; its files against damage; its images
against odd ones."""

import argparse
import contextlib
import errno
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
from common import (
    Decoder,
    Run,
    Scenes,
    UserError,
    ViT,
    batches,
    decay_groups,
    labels_of,
    learning_rate,
    load_decoder,
    load_encoder,
    parse_args,
    patchify,
    prepare_data,
    save_image_rows,
    shared_options,
    sincos_positions,
    evenly_spaced,
    to_pixels,
    training_plan,
    unpatchify,
)

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

TINY = dict(img_size=24, patch_size=4, embed_dim=32, depth=2, num_heads=4)


def shake(module, by=0.1):
    """Random weights everywhere, also in norms and positions: what starts as 0 or 1 hides mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.eval()


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize(
    "channels, height, width, patch", [(1, 8, 8, 1), (3, 12, 20, 4), (5, 9, 3, 3), (2, 7, 14, 7)]
)
def test_patches_equal_a_slow_loop_and_go_back(channels, height, width, patch):
    images = torch.randn(2, channels, height, width)
    slow = []
    for image in images:
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                square = image[:, top:top + patch, left:left + patch]
                slow.append(square.permute(1, 2, 0).flatten())                # row, column, channel
    slow = torch.stack(slow).unflatten(0, (2, -1))
    assert torch.equal(patchify(images, patch), slow)
    assert torch.equal(unpatchify(slow, patch, (height, width)), images)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="8, 16"):                      # as many patches, in another grid
        ViT((16, 8), 4, embed_dim=8, depth=1, num_heads=2)(torch.randn(1, 3, 8, 16))
    with pytest.raises(UserError):
        ViT((8, 10), 4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(UserError):
        ViT(8, 4, embed_dim=16, depth=1, num_heads=3)
    with pytest.raises(UserError):
        sincos_positions(18, (2, 2))


@pytest.mark.parametrize("dim, rows, columns", [(8, 3, 3), (16, 2, 5), (20, 7, 1)])
def test_positions_follow_the_formula(dim, rows, columns):
    slow = []
    for row in range(rows):
        for column in range(columns):
            angles = [[place / 10000 ** (4 * k / dim) for k in range(dim // 4)] for place in (column, row)]
            slow.append([wave(angle) for half in angles for wave in (math.sin, math.cos) for angle in half])
    close(sincos_positions(dim, (rows, columns)), torch.tensor(slow), 1e-6)


# ------------------------------------------------------------------------------------------------ transformer


def test_attention_weights_give_the_fused_output():
    attention, x = shake(common.Attention(24, 3)), torch.randn(2, 7, 24)
    weights = attention.attention_weights(x)
    # Head by head, with the rows of the qkv layer that belong to it.
    value = (x @ attention.qkv.weight[48:].T + attention.qkv.bias[48:]).unflatten(2, (3, 8))
    heads = [weights[:, k] @ value[:, :, k] for k in range(3)]
    close(attention(x), attention.proj(torch.cat(heads, dim=2)))


def test_attention_map_is_the_last_blocks_row_of_the_class_token():
    vit = shake(ViT((8, 12), 4, embed_dim=16, depth=3, num_heads=2))
    seen = []
    vit.blocks[-1].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 8, 12)
    vit(images)
    close(vit.attention_map(images), vit.blocks[-1].attn.attention_weights(seen[0])[:, :, 0, 1:])


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("size, channels", [(24, 3), ((12, 20), 5)])
def test_vit_equals_timms_with_the_same_arguments(pool, size, channels):
    timm = pytest.importorskip("timm")
    vit = shake(ViT(**TINY | dict(img_size=size, in_chans=channels, num_classes=7, global_pool=pool)))
    theirs = timm.models.vision_transformer.VisionTransformer(**vit.config).eval()
    theirs.load_state_dict(vit.state_dict())
    images = torch.randn(2, channels, *common.to_pair(size))
    close(vit(images), theirs(images))
    if pool == "token":
        wanted = theirs.forward_intermediates(images, indices=2, norm=True, intermediates_only=True)
        close(vit.feature_map(images, last=2), torch.cat(wanted, dim=1))
        close(vit.feature_map(images), wanted[-1])
    else:
        tokens = theirs.forward_features(images)[:, 1:]
        close(vit.feature_map(images).flatten(2).mT, theirs.fc_norm(tokens))


def test_a_new_vit_has_the_papers_initialisation():
    vit = ViT(img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=4)
    bound = math.sqrt(6 / (8 * 8 * 3 + 96))  # the projection seen as a linear layer
    assert 0.98 * bound < vit.patch_embed["proj"].weight.abs().max() <= bound
    for layer, fans in ((vit.blocks[0].attn.qkv, 4 * 96), (vit.blocks[0].mlp.fc1, 5 * 96)):
        bound = math.sqrt(6 / fans)
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert 0.01 < vit.cls_token.std() < 0.03 and not vit.patch_embed["proj"].bias.any()
    assert not vit.pos_embed.requires_grad and not vit.pos_embed[:, 0].any()
    close(vit.pos_embed[0, 1:], sincos_positions(96, (4, 4)))


def test_drop_path_drops_whole_images_more_in_deeper_blocks_and_never_in_evaluation():
    vit = shake(ViT(8, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.4))
    x = torch.randn(1, 5, 16).expand(2000, -1, -1)
    for block, rate in zip(vit.blocks, (0.0, 0.2, 0.4)):
        plain = block.eval()(x)
        assert torch.equal(plain[0], plain[-1])
        with torch.no_grad():
            both = (block.train()(x) == x).flatten(1).all(dim=1).float().mean().item()
        assert both == pytest.approx(rate**2, abs=5 * math.sqrt(rate**2 / 2000))


def test_exports_have_a_free_batch_size():
    vit = shake(ViT(**TINY))
    images, more = torch.randn(2, 3, 24, 24), torch.randn(5, 3, 24, 24)
    free = {"images": {0: torch.export.Dim("B")}}
    exported = torch.export.export(vit, (images,), dynamic_shapes=free)
    close(exported.module()(more), vit(more))


def test_checkpointed_blocks_have_the_same_gradients_and_keep_less(tmp_path):
    images, found, kept = torch.randn(4, 3, 24, 24), [], []
    for flags in ((), ("--checkpoint-blocks",)):
        torch.manual_seed(0)
        model = (
            run_of(tmp_path / str(flags), *flags)
            .wrap(ViT(**TINY | dict(depth=4, drop_path_rate=0.5)))
            .train()
        )
        torch.manual_seed(1)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(images).square().sum()
        loss.backward()
        kept.append(sum(saved.values()))
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    close(*found, 0)
    assert kept[1] < kept[0] / 3


# ----------------------------------------------------------------------------------------- weights in and out


def hugging_face(kind):
    """transformers' ViTMAEForPreTraining, ViTModel or ViTForImageClassification with random weights; its
    LayerNorm's eps is ours."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=24,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    if "MAE" in kind:
        sizes |= dict(
            decoder_hidden_size=16,
            decoder_num_hidden_layers=3,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            mask_ratio=0.75,
        )
    config = getattr(transformers, "ViTMAEConfig" if "MAE" in kind else "ViTConfig")(**sizes)
    model = getattr(transformers, kind)(config)
    return shake(model)


def saved_as(style, model, folder):
    """Saves transformers' model in one of the ways in which such files are found → path."""
    from safetensors.torch import load_file

    path, state = folder / "pytorch_model.bin", model.state_dict()
    if style != "state_dict":                              # the names of a file, not those in memory
        model.save_pretrained(folder)
        if style == "safetensors":
            return str(folder / "model.safetensors")
        state = load_file(folder / "model.safetensors")
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("width, heads", [(128, 4), (192, 3), (512, 8), (1280, 16)])
def test_heads_that_a_file_does_not_name_follow_from_the_width(width, heads, tmp_path):
    encoder, path = ViT(8, 4, embed_dim=width, depth=1, num_heads=1), str(tmp_path / "release.pth")
    torch.save(encoder.state_dict() | Decoder(encoder, 32, 1, 1).state_dict(), path)
    found = load_encoder(path)
    assert found.num_heads == heads and load_decoder(path, found).config["num_heads"] == 16


HEADS = dict(num_heads=4)  # no file of theirs names them
STYLES = ["state_dict", "safetensors", "bin"]


@pytest.mark.parametrize("style", STYLES)
def test_hugging_faces_mae_has_our_loss_and_prediction(style, tmp_path):
    from mae import MAE

    theirs = hugging_face("ViTMAEForPreTraining")
    path = saved_as(style, theirs, tmp_path)
    encoder = load_encoder(path, **HEADS)
    model = MAE(encoder, load_decoder(path, encoder, num_heads=2))
    images, noise = torch.randn(2, 3, 24, 24), torch.rand(2, 36)
    for norm_pixels in (False, True):
        model.norm_pixels = theirs.config.norm_pix_loss = norm_pixels
        wanted = theirs(images, noise=noise)
        loss, prediction, mask = model(images, noise=noise)
        assert torch.equal(mask, wanted.mask)
        close(loss, wanted.loss)
        close(prediction, wanted.logits)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_hugging_faces_vit_has_our_features_and_logits(style, kind, tmp_path):
    theirs = hugging_face(kind)
    vit = load_encoder(saved_as(style, theirs, tmp_path), **HEADS).eval()
    images = torch.randn(2, 3, 24, 24)
    if kind == "ViTModel":
        close(vit(images), theirs(images).last_hidden_state[:, 0])
    else:
        close(vit(images), theirs(images).logits)


def timms(**options):
    timm = pytest.importorskip("timm")
    return shake(timm.models.vision_transformer.VisionTransformer(**TINY | dict(num_classes=5) | options))


@pytest.mark.parametrize("options", [dict(init_values=0.1), dict(qk_norm=True), dict(reg_tokens=2)])
def test_other_architectures_are_refused(options, tmp_path):
    torch.save(timms(**options).state_dict(), tmp_path / "timm.pth")
    with pytest.raises(UserError):
        load_encoder(str(tmp_path / "timm.pth"), **HEADS)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("style", ["timm", "release", "wrapped"])
def test_classifiers_of_timm_and_of_maes_release_come_whole(pool, style, tmp_path):
    """MAE's fine-tuned files hold {"model": …} with fc_norm and head, as timm's with global_pool="avg"."""
    theirs = timms(global_pool=pool)
    state = theirs.state_dict()
    if style == "release":
        state = {"model": state, "args": argparse.Namespace(model="vit_base", nb_classes=5), "epoch": 3}
    if style == "wrapped":
        state = {"state_dict": {"module." + name: tensor for name, tensor in state.items()}}
    torch.save(state, tmp_path / "timm.pth")
    vit = load_encoder(str(tmp_path / "timm.pth"), **HEADS).eval()
    images = torch.randn(2, 3, 24, 24)
    close(vit(images), theirs(images))
    features = load_encoder(str(tmp_path / "timm.pth"), num_classes=0, **HEADS).eval()
    close(features(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True))


def test_a_pretrained_release_and_a_checkpoint_of_ours_come_back_as_they_were(tmp_path):
    from mae import MAE

    vit = shake(ViT(**TINY | dict(num_heads=8, in_chans=2)))
    decoder = shake(Decoder(vit, embed_dim=16, depth=1, num_heads=4))
    release = {
        "model": vit.state_dict() | decoder.state_dict(),
        "args": argparse.Namespace(input_size=24),
        "epoch": 7,
    }
    ours = dict(
        encoder=vit.state_dict(),
        decoder=decoder.state_dict(),
        step=3,
        args=dict(
            vit=vit.config, decoder=decoder.config, classes=["a", "b"], mean=[1.0, 2.0], std=[3.0, 4.0]
        ),
    )
    images, noise = torch.randn(2, 2, 24, 24), torch.rand(2, 36)
    wanted = MAE(vit, decoder)(images, noise=noise)
    for name, content, heads in (("release", release, (dict(num_heads=8), HEADS)), ("ours", ours, ({}, {}))):
        path = str(tmp_path / name)
        torch.save(content, path)
        encoder = load_encoder(path, **heads[0])
        close(MAE(encoder, load_decoder(path, encoder, **heads[1]))(images, noise=noise), wanted, 1e-6)
    assert encoder.config == vit.config
    assert (encoder.classes, encoder.mean, encoder.std) == (["a", "b"], [1, 2], [3, 4])


def test_oblong_positions_are_not_taken_for_square_ones(tmp_path):
    size, path = (144, 256), str(tmp_path / "oblong.pth")  # 9×16 patches, as many as 12×12
    vit = ViT(size, 16, embed_dim=32, depth=1, num_heads=4)
    torch.save({name: tensor.bfloat16() for name, tensor in vit.state_dict().items()}, path)
    assert load_encoder(path, **HEADS).img_size == size
    # A learned table does not say so; the file's options may.
    shake(vit)
    torch.save(dict(encoder=vit.state_dict(), args=dict(vit=vit.config)), path)
    found = load_encoder(path)
    assert found.img_size == size and torch.equal(found.pos_embed, vit.pos_embed)


def test_learned_square_positions_are_resized_to_an_oblong_grid_of_as_many_patches(tmp_path):
    vit, path = shake(ViT(96, 8, embed_dim=32, depth=1, num_heads=4)), str(tmp_path / "square.pth")
    torch.save(vit.state_dict(), path)                                # 12×12 patches, and 9×16 are asked for
    found = load_encoder(path, img_size=(72, 128), **HEADS)
    close(found.pos_embed, common.resize_positions(vit.pos_embed, (12, 12), (9, 16)))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "encoder.", "model.encoder.", "backbone."])
def test_names_may_begin_with_where_the_encoder_was(prefix, tmp_path):
    vit, path = shake(ViT(**TINY)), tmp_path / "prefixed.pth"
    torch.save({prefix + name: tensor for name, tensor in vit.state_dict().items()}, path)
    assert torch.equal(load_encoder(path, **HEADS).blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_averaged_weights_come_first_and_timms_mean_is_not_ours(tmp_path):
    last, average, path = shake(ViT(**TINY)), shake(ViT(**TINY)), tmp_path / "timm.pth.tar"
    options = argparse.Namespace(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    torch.save(dict(state_dict=last.state_dict(), state_dict_ema=average.state_dict(), args=options), path)
    found = load_encoder(path, **HEADS)
    assert torch.equal(found.cls_token, average.cls_token) and found.mean is None and found.std is None


@pytest.mark.parametrize("old, new", [(24, 36), ((24, 16), (20, 40))])
def test_positions_are_resized_as_timm_does(old, new, tmp_path):
    timm = pytest.importorskip("timm")
    vit, path = shake(ViT(**TINY | dict(img_size=old))), str(tmp_path / "own.pth")
    decoder = Decoder(vit, embed_dim=16, depth=1, num_heads=2)
    torch.save(dict(encoder=vit.state_dict(), decoder=decoder.state_dict(), args=dict(vit=vit.config)), path)
    encoder = load_encoder(path, img_size=new)
    decoder_new = load_decoder(path, encoder)
    for table, found in (
        (vit.pos_embed, encoder.pos_embed),
        (decoder.decoder_pos_embed, decoder_new.decoder_pos_embed),
    ):
        wanted = timm.layers.resample_abs_pos_embed(
            table, [*encoder.grid], [*vit.grid], interpolation="bicubic", antialias=False)
        close(found, wanted, 1e-6)
    assert encoder(torch.randn(1, 3, *common.to_pair(new))).shape == (1, 32)


@contextlib.contextmanager
def within(seconds):
    """Fails when the block takes longer, as waiting for the end of a pipe does."""

    def late(number, frame):
        pytest.fail(f"not done after {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(kind, folder):
    """→ the path of a checkpoint that has to be refused."""
    path, state = folder / "bad.pth", ViT(**TINY).state_dict()
    name = "blocks.1.mlp.fc1.weight"
    if kind == "nan":
        state[name][3, 3] = math.nan
    if kind == "integers":
        state[name] = state[name].long()
    if kind == "another shape":
        state[name] = state[name][:5]
    if kind == "a tensor missing":
        del state[name]
    torch.save(state, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "code":
        torch.save(state | {"x": Bomb(folder / "exploded")}, path)
    if kind == "old pickle with code":
        path.write_bytes(pickle.dumps({"x": Bomb(folder / "exploded")}))
    if kind == "a list":
        torch.save([1, 2], path)
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "integers",
        "another shape",
        "a tensor missing",
        "truncated",
        "empty",
        "code",
        "old pickle with code",
        "a list",
        "pipe",
    ],
)
def test_bad_checkpoints_are_refused_and_run_no_code(kind, tmp_path):
    path = damaged(kind, tmp_path)
    with within(20), pytest.raises(UserError):
        load_encoder(path)
    assert not (tmp_path / "exploded").exists()


def test_a_file_without_decoder_says_so(tmp_path):
    encoder = ViT(**TINY)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(UserError):
        load_decoder(tmp_path / "encoder.pth", encoder)


# ----------------------------------------------------------------------------------------------------- images


class Own:
    """A dataset as a user writes one: images uint8 (M, C, H, W), labels 0 and 1 in turn."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 2


def options(out, *flags):
    """→ args as a script has them, on a CPU, without worker processes, in batches of 8."""
    usual = dict(model="nano", epochs=2, batch=8, lr=1e-3, warmup=0.0, crop=1.0, workers=0, device="cpu")
    flags = [str(flag) for flag in ("--out", out, *flags)]
    return parse_args(shared_options("a test"), "test", lambda args, kind: usual, flags)


def run_of(out, *flags):
    return Run(options(out, *flags))


def opened(out, *flags, train=None, val=None):
    """→ run, training dataset, validation dataset."""
    run = run_of(out, *flags)
    return run, *prepare_data(run.args, run, train, val)


RAW = "--mean 0 0 0 --std 1 1 1".split()                              # pixels stay as they are


def one_batch(data, run, seed=0, train=False):
    """→ all images and labels of a dataset, as one batch."""
    return next(batches(data, [(torch.arange(len(data)), seed)], run, train=train))


def test_many_images_are_read_with_few_open_files(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/dev/fd"))) + 100             # the images come in 80 parts of two tensors
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        data = Own((torch.arange(8000) % 200).byte()[:, None, None, None].expand(-1, 3, 4, 4))
        _, train, _ = opened(tmp_path, "--data", "own", "--workers", 1, train=data)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(train) == 8000 and train.images[201].unique() == 1


def test_an_augmentation_for_8_bits_gets_8_bits_without_wrapping_around(tmp_path):
    args = options(tmp_path, "--crop", 0.5)
    args.size = (16, 16)
    image = torch.zeros(3, 40, 40)
    image[..., 20:] = 255.0                                           # interpolation overshoots beside it
    seen = []
    transform = common.view_transform(args, train=True, augment=lambda image: seen.append(image) or image)
    for _ in range(20):
        transform(common.tv_tensors.Image(image))
    assert len(seen) == 20
    for view in seen:
        assert view.dtype == torch.uint8
        low = view.float().mean(dim=(0, 1)).diff()
        assert (low >= -9).all() or (low <= 9).all()                  # from dark to bright or, flipped, back


@pytest.mark.parametrize("sides, size, patch", [
    ((28, 28), (28, 28), 4),
    ((64, 64), (64, 64), 8),
    ((98, 163), (96, 160), 8),
    ((240, 325), (240, 320), 16),
])
def test_size_and_patch_follow_from_the_images(sides, size, patch, tmp_path):
    run, *_ = opened(tmp_path, train=Own(torch.zeros(2, 3, *sides).byte()))
    assert (run.args.size, run.args.patch) == (size, patch)


@pytest.mark.parametrize("images", [
    torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3).byte(), torch.zeros(2, 8, 8).byte(),
    3 * torch.randn(2, 3, 8, 8)])
def test_images_of_another_layout_or_range_are_refused(images, tmp_path):
    with pytest.raises(UserError):
        opened(tmp_path, train=Own(images))


def test_classes_and_means_of_another_kind_are_refused(tmp_path):
    images = torch.full((4, 3, 8, 8), 9).byte()
    with pytest.raises(UserError, match="255"):
        opened(tmp_path, "--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2, train=Own(images))
    train = common.InMemoryImages(images, [0, 1, 2, 0], "abc")
    val = common.InMemoryImages(images, [0, 1, 1, 0], "bc")
    with pytest.raises(UserError, match="classes"):
        opened(tmp_path, train=train, val=val)


def test_a_folder_of_broken_images_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError):
        opened(tmp_path / "out", "--data", tmp_path)


LARGE = ["--size", 112]  # of more than 96 pixels: not read into memory at the start


def write_image(path, colour=100, size=(20, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).convert(mode).save(path)


def test_a_scene_depends_on_seed_and_number_alone_and_its_mask_shows_the_object():
    scenes, part = Scenes(20), Scenes(3, first=15)
    assert torch.equal(part.images, scenes.images[15:18]) and torch.equal(part.masks, scenes.masks[15:18])
    assert not torch.equal(Scenes(3, seed=1, first=15).images, part.images)
    assert scenes.targets.tolist() == [*range(10)] * 2 and len(scenes.classes) == 10
    for image, mask in zip(scenes.images.float(), scenes.masks):
        assert 0.05 < mask.float().mean() < 0.5
        assert (image[:, mask].mean() - image[:, ~mask].mean()).abs() > 30


def test_validation_scenes_are_no_training_scenes(tmp_path):
    _, train, val = opened(tmp_path, "--size", 32, "--limit", 50)
    assert len(train) == len(val) == 50
    assert not (train.images[:, None] == val.images).flatten(2).all(dim=2).any()


COLUMN, ROW = torch.arange(64).expand(64, 64), torch.arange(64)[:, None].expand(64, 64)
# Images in which a pixel's colour says where it was.
PLACES = torch.stack([4 * COLUMN, 4 * ROW, 0 * ROW]).byte().repeat(256, 1, 1, 1)


def places(dataset, seed, tmp_path, *flags, train=True):
    """→ the crop of each of 256 images: width and height (B,) as parts of the image's, negative if flipped,
    and the crops themselves."""
    run, train_set, _ = opened(tmp_path / "out", *RAW, *flags, train=dataset)
    images, _ = one_batch(train_set, run, seed, train)
    middle = images[:, :, 8:-8, 8:-8]
    return (
        middle[:, 0].diff(dim=2).mean(dim=(1, 2)) / 4,
        middle[:, 1].diff(dim=1).mean(dim=(1, 2)) / 4,
        images,
    )


@pytest.mark.parametrize("dataset", [common.InMemoryImages(PLACES, [0] * 256, ["a"]), Own(PLACES)])
def test_crops_lie_inside_the_image_and_flips_are_an_option(dataset, tmp_path):
    width, height, images = places(dataset, 5, tmp_path, "--crop", 0.3)
    area, aspect = width.abs() * height, width.abs() / height
    assert 0.28 < area.min() < 0.45 and 0.75 < area.max() < 1.02 and (height > 0).all()
    assert 0.72 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.37
    # Crops in memory are shared by eight images, so there are 32 of them.
    assert 0.25 <= (width < 0).float().mean() <= 0.75
    assert images.min() >= -3 and images.max() <= 255  # bicubic interpolation overshoots a little
    assert images[:, 0].amax(dim=(1, 2)).max() > 240 and images[:, 1].amin(dim=(1, 2)).min() < 12
    assert torch.equal(images, places(dataset, 5, tmp_path, "--crop", 0.3)[2])
    assert not torch.equal(images, places(dataset, 6, tmp_path, "--crop", 0.3)[2])
    assert (places(dataset, 5, tmp_path, "--crop", 0.3, "--no-flip")[0] > 0).all()
    # Smaller crops are cut from the whole image, not from the 56 of 64 pixels that evaluation sees.
    width, height, _ = places(Own(PLACES), 5, tmp_path, "--crop", 0.3, "--size", 32)
    assert (width.abs() * height).max() > 3.3                         # (56 / 32)² is 3.1


def test_validation_images_of_the_right_size_are_whole_and_others_seven_eighths(tmp_path):
    for dataset in (common.InMemoryImages(PLACES, [0] * 256, ["a"]), Own(PLACES)):
        assert torch.equal(places(dataset, 0, tmp_path, train=False)[2], PLACES.float())
    # 32 pixels show 56 of 64, those in the middle.
    width, height, images = places(Own(PLACES), 0, tmp_path, "--size", 32, train=False)
    close(width, torch.full((256,), 56 / 32), 0.02)
    close(height, width, 0.02)
    assert (images[:, :2].mean(dim=(2, 3)) - 126).abs().max() < 2.5


def test_validation_images_of_another_aspect_are_not_padded(tmp_path):
    images = torch.full((2, 3, 64, 64), 200).byte()
    run, data, _ = opened(tmp_path, "--size", 32, 64, *RAW, train=Own(images))
    images, _ = one_batch(data, run)
    close(images, torch.full((2, 3, 32, 64), 200.0), 0.01)


def test_maps_are_cropped_and_flipped_with_their_images(tmp_path):
    masks = Scenes(32).masks
    images = masks[:, None].repeat(1, 3, 1, 1).byte() * 255
    dataset = common.InMemoryImages(images, masks.byte(), ["background", "object"])
    run, data, _ = opened(tmp_path, *RAW, "--crop", 0.3, train=dataset)
    images, found = one_batch(data, run, train=True)
    # The image is interpolated, the mask is not: they may differ at the border of a shape.
    assert ((images[:, 1] > 127) == found).float().mean() > 0.98 and not torch.equal(found, masks)


def test_images_are_normalised_by_mean_and_std_and_to_pixels_goes_back(tmp_path):
    images = (torch.rand(12, 2, 16, 16) * torch.tensor([50, 200])[:, None, None]).byte()
    run, data, _ = opened(tmp_path, train=common.InMemoryImages(images, [0] * 12, ["a"]))
    assert run.args.in_chans == 2 and run.args.size == (16, 16)
    pixels = images.double().numpy()
    np.testing.assert_allclose(run.args.mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(run.args.std, pixels.std((0, 2, 3)), rtol=1e-2)
    found, _ = one_batch(data, run)
    close(found.mean(dim=(0, 2, 3)), torch.zeros(2), 1e-4)
    assert torch.equal(to_pixels(found, run.args), images)
    data.mean, data.std = pixels.mean((0, 2, 3)), torch.tensor([3.0, 4.0])
    run, _, _ = opened(tmp_path, train=data)
    assert json.loads(json.dumps(run.args.mean + run.args.std)) == [*data.mean, 3, 4]
    run, _, _ = opened(tmp_path, "--mean", 1, 2, "--std", 3, 4, train=data)
    assert (run.args.mean, run.args.std) == ([1, 2], [3, 4])
    with pytest.raises(UserError):
        opened(tmp_path, "--mean", 1, 2, 3, "--std", 3, 4, 5, train=data)


def test_folders_of_many_kinds_and_modes_are_read_and_what_is_skipped_is_counted(tmp_path):
    kinds = {
        "a.png": "RGBA",
        "b.jpg": "CMYK",
        "c.bmp": "RGB",
        "d.tif": "LA",
        "e.gif": "P",
        "f.webp": "RGB",
        "sub/g.png": "1",
    }
    for name, mode in kinds.items():
        write_image(tmp_path / name, mode=mode)
    for name in ("notes.txt", "more.txt", "sub/x.json"):
        (tmp_path / name).write_text("text")
    _, train, val = opened(tmp_path / "out", "--data", tmp_path, *LARGE)
    assert len(train) == 7 and val is None and set(labels_of(train).tolist()) == {-1}
    assert all(
        image.shape == (3, 24, 20) and image.dtype == torch.uint8 for image, _ in (train[i] for i in range(7))
    )
    close(train[2][0].float(), torch.tensor([100.0, 0, 0])[:, None, None].expand(3, 24, 20))
    assert train.skipped == {".txt": 2, ".json": 1}





@pytest.mark.parametrize("option, path", [
    ("init", "last.pt"), ("augmentor", "last.pt"), ("prior", "last.pt"), ("compare", "last.pt"),
    ("compare", "baseline/last.pt"), ("init", "other/last.pt")])
def test_overwriting_does_not_delete_what_a_run_reads(option, path, tmp_path):
    args = options(tmp_path, "--overwrite")
    inside, path = "other" not in path, str(tmp_path / path)
    setattr(args, option, [path] if option == "compare" else path)
    with pytest.raises(UserError) if inside else contextlib.nullcontext():
        Run(args)


def test_the_size_is_that_of_the_first_image_and_hidden_folders_are_no_classes(tmp_path):
    for k in range(5):
        path = tmp_path / "data" / "train" / "ab"[k % 2] / f"{k}.png"
        write_image(path, size=(10, 10) if k else (50, 60))
    (tmp_path / "data" / "train" / ".checkpoints").mkdir()
    run, train, _ = opened(tmp_path / "out", "--data", tmp_path / "data")
    assert run.args.size == (48, 48) and train.classes == ["a", "b"]


def test_a_run_of_other_data_or_options_does_not_go_on(tmp_path):
    run = run_of(tmp_path)
    run.start(8)
    run.save("last.pt", step=1, seconds=1.0, history=[], sums={})
    for change in ({}, dict(seed=5), dict(data="elsewhere"), dict(lr=2.0)):
        args = options(tmp_path, "--resume")
        vars(args).update(change)
        with pytest.raises(UserError) if change else contextlib.nullcontext():
            Run(args).start(8)


def test_sixteen_bit_images_keep_their_levels(tmp_path):
    levels = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    _, train, _ = opened(tmp_path / "out", "--data", tmp_path, *LARGE)
    image = train[0][0].double()
    assert image.shape == (3, 64, 64) and 0 <= image.min() and image.max() <= 255
    np.testing.assert_allclose(image[2].numpy() / image.max().item(), levels / levels.max(), atol=1e-6)


def peak_memory():
    """→ MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_eight_and_sixteen_bits_make_a_batch(workers, tmp_path):
    write_image(tmp_path / "a.png", size=(64, 64))
    Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(tmp_path / "b.png")
    run, data, _ = opened(tmp_path / "out", "--data", tmp_path, *RAW, "--workers", workers, *LARGE)
    try:
        images, _ = one_batch(data, run)
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()
    close(images[:, 0], torch.tensor([100.0, 255.0])[:, None, None].expand(2, 112, 112), 0.01)


@pytest.mark.parametrize("flags", [LARGE, ["--size", 32]])
def test_unreadable_images_are_replaced(flags, tmp_path):
    whole = tmp_path / "c.png"
    write_image(whole, colour=77)
    (tmp_path / "a.png").write_bytes(whole.read_bytes()[:60])
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "d.png").write_bytes(b"")
    os.mkfifo(tmp_path / "f.png")
    with within(10):
        run, train, _ = opened(tmp_path / "out", "--data", tmp_path, *RAW, *flags)
        images, _ = one_batch(train, run)
    assert len(train) == 4
    close(images, torch.tensor([77.0, 0, 0])[:, None, None].expand_as(images), 0.01)

def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS < 1e8                               # Pillow refuses twice as many
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        common.read_image(tmp_path / "a.png")


def test_an_image_with_nan_is_unreadable_too(tmp_path):
    pixels = np.full((8, 8), 3.0, np.float32)
    Image.fromarray(pixels).save(tmp_path / "b.tif")
    pixels[0, 0] = np.nan
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert (common.ImageFolder(str(tmp_path))[0][0] == 255).all()


@pytest.mark.parametrize("train", [True, False])
def test_a_long_thin_image_stays_small(train, tmp_path):
    write_image(tmp_path / "a.png", size=(1, 20_000))
    memory = peak_memory()
    run, data, _ = opened(tmp_path / "out", "--data", tmp_path, "--size", 224, "--crop", 0.2)
    images, _ = one_batch(data, run, train=train)
    assert images.shape == (1, 3, 224, 224) and images.isfinite().all()
    assert peak_memory() - memory < 300


def test_classes_of_folders_and_flat_validation_folders(tmp_path):
    for name in ("train/a", "train/b", "train/c", "val/c", "val/b"):
        write_image(tmp_path / name / "1.png")
    _, train, val = opened(tmp_path / "out", "--data", tmp_path, *LARGE)
    assert (
        labels_of(train).tolist() == [0, 1, 2]
        and labels_of(val).tolist() == [1, 2]
        and train.classes == list("abc")
    )
    write_image(tmp_path / "val/d/1.png")
    with pytest.raises(UserError):
        opened(tmp_path / "out", "--data", tmp_path)
    shutil.rmtree(tmp_path / "val")
    write_image(tmp_path / "val/1.png")
    _, train, val = opened(tmp_path / "out", "--data", tmp_path)
    assert labels_of(train).tolist() == [0, 1, 2] and labels_of(val).tolist() == [-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        opened(tmp_path / "out", "--data", tmp_path / "empty")


def plan_of(step=0, world=1, rank=0, accumulate=2, seed=0, count=20):
    """The plan over 20 images, 2 steps of 8 an epoch, 6 steps."""
    run = SimpleNamespace(
        step=step,
        total_steps=6,
        steps_per_epoch=2,
        world_size=world,
        rank=rank,
        accumulate=accumulate,
        micro_batch=8 // accumulate // world,
        args=SimpleNamespace(seed=seed),
    )
    return [(ids.tolist(), number) for ids, number in training_plan(torch.arange(count) * 3, run)]


def test_the_plan_is_a_function_of_seed_and_step():
    whole = plan_of()
    assert whole == plan_of() and whole[6:] == plan_of(step=3) and whole != plan_of(seed=1)
    for epoch in range(3):
        seen = [i for ids, _ in whole[4 * epoch : 4 * epoch + 4] for i in ids]
        assert len(set(seen)) == 16 and set(seen) <= set(range(0, 60, 3))
    assert len({number for _, number in whole}) == 12 and whole[0][0] != whole[4][0]
    # Two processes see in each step what one sees, with the same random numbers.
    parts = [plan_of(world=2, rank=rank, accumulate=1) for rank in (0, 1)]
    same = plan_of(accumulate=2)
    assert [pair for pairs in zip(*parts) for pair in pairs] == same


def test_evenly_spaced():
    assert evenly_spaced(10).tolist() == [*range(10)]
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    ids = evenly_spaced(40_000_000, 4_000_000)                       # float32 would round
    assert ids[-1] == 39_999_999 and len(ids.unique()) == 4_000_000


def test_images_above_224_pixels_are_seen_whole():
    columns = torch.arange(480.0).expand(3, 480, 480)
    assert common.center_crop(columns, (240, 240))[0, 0, 0] < 2
    assert 28 < common.center_crop(columns, (224, 224))[0, 0, 0] < 33          # 7/8: the first 30 are cut off


def test_torchvisions_parts_and_labels_have_several_names(monkeypatch):
    def by_split(root, split, download, transform):
        return split

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download, transform: train)
    monkeypatch.setattr(torchvision.datasets, "SVHN", by_split)
    monkeypatch.setattr(torchvision.datasets, "STL10", by_split)
    assert common.torchvision_datasets("cifar10", "data") == [True, False]
    assert common.torchvision_datasets("svhn", "data") == ["train", "test"]
    assert common.torchvision_datasets("stl10", "data") == ["train+unlabeled", "test"]
    for name in ("_labels", "labels", "targets"):
        theirs = torchvision.datasets.VisionDataset("")          # reading an image raises NotImplementedError
        setattr(theirs, name, [2, 0])
        assert labels_of(theirs).tolist() == [2, 0]


def test_labels_of():
    own = Own(torch.zeros(3, 1, 2, 2).byte())
    own.labels = {"cat": 0, "dog": 1}                          # counts in torchvision's datasets alone
    assert labels_of(own).tolist() == [0, 1, 0]
    many = common.InMemoryImages(torch.zeros(3, 1, 2, 2).byte(), torch.ones(3, 40), "ab")  # as in CelebA
    assert labels_of(many).tolist() == labels_of([(0, label) for label in many.targets]).tolist() == [-1] * 3


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_rows_of_images_are_written(channels, tmp_path):
    images = torch.full((3, channels, 64, 96), 40).byte()
    save_image_rows(tmp_path / "rows.png", {"one": images, "two": images + 100})
    pixels = np.asarray(Image.open(tmp_path / "rows.png").convert("L")).astype(int)
    assert (pixels == 40).sum() == (pixels == 140).sum() >= images[:, 0].numel()
    assert np.argwhere(pixels == 40)[:, 0].max() < np.argwhere(pixels == 140)[:, 0].min()


# -------------------------------------------------------------------------------------------------------- run


def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    rates = [learning_rate(step, 2.0, 10, 110, 0.5) for step in range(110)]
    line = [0.2 * k for k in range(1, 11)]
    cosine = [0.5 + 1.5 * (1 + math.cos(math.pi * k / 100)) / 2 for k in range(100)]
    assert rates == pytest.approx(line + cosine)
    assert learning_rate(109, 2.0, 10, 110) < 1e-3
    assert learning_rate(0, 2.0, 0, 5) == 2.0 and learning_rate(0, 2.0, 0.4, 5) == 2.0


def test_epochs_warm_up_and_evaluations_follow_from_the_number_of_steps(tmp_path):
    run = run_of(tmp_path)
    run.args.epochs, run.args.steps, run.args.warmup = None, 20, None
    run.start(50)  # 6 steps of 8, two images left over
    assert (run.args.epochs, run.total_steps) == (4, 24) and run.warmup_steps == pytest.approx(2.4)
    assert [step for step in range(24) if run.should_evaluate(step, num_images=48)] == [5, 11, 17, 23]
    assert [step for step in range(24) if run.should_evaluate(step, num_images=130)] == [17, 23]
    run.args.warmup, run.may_replace = 40, True
    run.start(50)
    assert run.warmup_steps == pytest.approx(24 / 5)


@pytest.mark.parametrize("batch, length, wanted", [
    (8, "steps", 0.02), (16, "steps", 0.02), (64, "steps", 0.005), (64, "epochs", 0.02)])
def test_the_peak_rate_of_small_presets_does_not_grow_with_the_batch(batch, length, wanted):
    preset = {"batch": 16, "lr": 0.02, length: 10}
    args = parse_args(shared_options("a test"), "test", lambda args, kind: preset, ["--batch", str(batch)])
    assert args.lr == pytest.approx(wanted) and preset["lr"] == 0.02


def test_every_weight_matrix_is_decayed_and_nothing_else():
    vit = ViT(**TINY | dict(num_classes=3)).requires_grad_(True)      # as in fine-tuning: positions, too
    vit.decoder = Decoder(vit, embed_dim=16, depth=1, num_heads=2)
    groups = decay_groups(vit, 0.05, lambda name: 0.1 if name.startswith("head") else 1.0)
    found = {id(p): (group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]}
    trained = [(name, p) for name, p in vit.named_parameters() if p.requires_grad]
    assert len(found) == sum(len(group["params"]) for group in groups) == len(trained)
    for name, parameter in trained:
        matrix = name.endswith("weight") and "norm" not in name
        assert found[id(parameter)] == (0.05 * matrix, 0.1 if name.startswith("head") else 1.0), name


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--batch", 300], (150, 2)),
        (["--batch", 12, "--micro-batch", 3], (3, 4)),
    ],
)
def test_a_batch_is_divided_into_micro_batches(flags, parts, tmp_path):
    run = run_of(tmp_path, *flags)
    assert (run.micro_batch, run.accumulate) == parts


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_folder_that_holds_a_model_alone_is_not_taken(name, tmp_path):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UserError):
        run_of(tmp_path)
    assert (tmp_path / name).read_bytes() == b"precious"
    run_of(tmp_path, "--overwrite").start()
    assert not (tmp_path / name).exists()


def test_a_checkpoint_alone_is_resumed_with_its_options(tmp_path):
    run = run_of(tmp_path / "run", "--batch", 4, "--seed", 3)
    run.start(8)
    run.save("last.pt", step=1, seconds=1.0, history=[], sums={})
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "last.pt", tmp_path / "copy")
    args = options(tmp_path / "copy", "--resume")
    assert (args.resume, args.batch, args.seed) == (True, 4, 3)
    run = Run(args)
    run.start(8)
    assert run.step == 1 and (tmp_path / "copy" / "last.pt").exists()


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path):
    one, other = run_of(tmp_path), run_of(tmp_path)
    one.start()
    with pytest.raises((UserError, OSError)):
        other.start()


def too_large(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_disk(monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    return monkeypatch.undo


@pytest.mark.parametrize("break_disk", [too_large, full_disk])
def test_a_write_that_fails_leaves_the_checkpoint_before_it(break_disk, tmp_path, monkeypatch):
    run = run_of(tmp_path)
    run.start()
    run.save("last.pt", weights=torch.ones(3))
    before = (tmp_path / "last.pt").read_bytes()
    mend = break_disk(monkeypatch)
    try:
        with pytest.raises(UserError):
            run.save("last.pt", weights=torch.zeros(100_000))
    finally:
        mend()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert torch.equal(common.read_checkpoint(str(tmp_path / "last.pt"))["weights"], torch.ones(3))


def test_a_closed_terminal_does_not_end_a_run(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Closed())
    common.say("nobody reads this")
    common.say("nor this")


def test_presets_go_by_number_and_size_of_images(tmp_path):
    kinds = []

    def look(*flags):
        parse_args(
            shared_options("a test"),
            "test",
            lambda args, kind: kinds.append(kind) or {},
            ["--data", str(tmp_path / "data"), *flags],
        )

    # As often with ImageNet, the images lie elsewhere, behind a link.
    folder = tmp_path / "elsewhere"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder)
    image = folder / "1.png"
    write_image(image, size=(128, 128))
    look()
    for i in range(49_999):
        os.link(image, folder / f"copy{i}.png")             # one image under many names
    (folder / "notes.txt").touch()                          # files of other kinds do not count
    look()
    os.link(image, folder / "one more.png")
    look()
    look("--limit", "100")
    write_image(tmp_path / "new.png", size=(32, 32))
    image.write_bytes((tmp_path / "new.png").read_bytes())
    look()
    write_image(tmp_path / "data" / "overview.png", size=(640, 480))
    look()
    assert kinds == ["small", "small", "imagenet", "small", "small", "small"]


@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_without_random_crops_training_sees_whole_images_or_mirrors_of_them(size, tmp_path):
    images = (torch.rand(20, 3, *size) * 255).byte()
    for number, dataset in enumerate((common.InMemoryImages(images, [0] * 20, ["a"]), Own(images))):
        run, data, _ = opened(tmp_path / str(number), *RAW, train=dataset)
        seen, _ = one_batch(data, run, train=True)
        same = (seen == images).flatten(1).all(dim=1)
        mirrored = (seen == images.flip(3)).flatten(1).all(dim=1)
        assert (same | mirrored).all() and same.any() and mirrored.any()


def test_a_script_of_ones_own_ends_when_a_worker_fails(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import sys, torch, mae\n"
        "class Broken(torch.utils.data.Dataset):\n"
        "    mean, std = [1.0], [1.0]\n"
        "    def __len__(self):\n"
        "        return 40\n"
        "    def __getitem__(self, i):\n"
        "        assert i != 13, 'number 13 is broken'\n"
        "        return torch.zeros(1, 128, 128, dtype=torch.uint8), -1\n"
        "if __name__ == '__main__':\n"
        "    words = '--size 128 --epochs 1 --batch 4 --workers 2 --device cpu'.split()\n"
        "    mae.pretrain(mae.parse([*words, '--out', sys.argv[1]]), Broken())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent)}
    words = [sys.executable, script, tmp_path / "out"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "number 13 is broken" in ended.stderr
