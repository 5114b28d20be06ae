"""mixedae.py: mixing, attention and losses against slow loops; MAE as its special case; its runs."""

import argparse
import math
import os
import signal

import pytest
import torch
from torch import nn

import common
import mae
import mixedae
from conftest import log_of

RUN = ("--size 16 --patch 4 --limit 64 --epochs 2 --batch 16 --micro-batch 8 --lr 1e-2 --warmup 0.5 "
       "--device cpu").split()                                              # 8 steps of 16 images
NAIVE = dict(segments=False, homologous=False, contrastive_weight=0.0)


def tiny(grid=(4, 4), dtype=torch.float64, **options):
    """A model for images of grid × 4 pixels, with no parameter at a value where mistakes would not show."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, embed_dim=16, depth=2, num_heads=2)
    model = mixedae.MixedAE(encoder, common.Decoder(encoder, 8, 1, 2), **options)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def draw_images(count, grid=(4, 4)):
    return torch.randn(count, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- mixing

@pytest.mark.parametrize("places, members, turns", [(16, 4, 1), (16, 4, 4), (24, 8, 8), (15, 3, 1)])
def test_every_place_has_exactly_one_owner(places, members, turns):
    visible = places // members
    noise = torch.rand(3, places)
    ids_keep, ids_restore, mask = mixedae.divide_places(noise, members, visible, turns)
    owned = (1 - mask).unflatten(0, (turns, 3, members))                    # (turns, G, M, N)
    assert (owned.sum(dim=2) == 1).all()                                    # one owner, in each turn
    if turns == members:
        assert (owned.sum(dim=0) == 1).all()                                # each image, each place, once
    for row in range(len(mask)):
        assert sorted(ids_restore[row].tolist()) == list(range(places))
        assert ids_keep[row].tolist() == [ids_restore[row].tolist().index(i) for i in range(visible)]
        assert set(ids_keep[row].tolist()) == set((mask[row] == 0).nonzero()[:, 0].tolist())

    # In the first turn, member m owns the m-th part of the places as sorted by noise.
    for group in range(3):
        order = noise[group].argsort().tolist()
        for member in range(members):
            wanted = order[visible * member:visible * (member + 1)]
            assert ids_keep[group * members + member].tolist() == wanted


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("members, full", [(4, False), (2, False), (4, True)])
def test_un_mixing_gives_each_image_its_tokens_back(members, full, segments):
    """With an encoder that leaves tokens as they are, the decoder gets patch, position and segment of each
    place."""
    grid = (4, 6)
    model = tiny(grid, members=members, full=full, segments=segments, homologous=False)
    encoder = model.encoder
    for block in encoder.blocks:
        for parameter in (*block.attn.proj.parameters(), *block.mlp[-1].parameters()):
            nn.init.zeros_(parameter)
    encoder.norm = nn.Identity()
    calls = []
    model.decoder.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    images = draw_images(8, grid)
    _, _, mask, values = model(images)
    latent, ids_restore = calls[0]
    assert latent.shape == (8 * model.turns, 1 + 24 // members, 16)

    mixture = latent[:, 1:].unflatten(0, (-1, members)).flatten(1, 2)       # (G, N, D), member after member
    wanted = mixedae.contrastive_loss(model.projector(mixture), 24 // members)
    torch.testing.assert_close(values["contrastive_loss"], wanted)

    tokens = encoder.embed(images)
    vectors = model.segments["segment_token"][:, 0] if segments else torch.zeros(members, 16)
    for row in range(len(latent)):
        segment = vectors[row % members] - vectors.mean(dim=0)
        torch.testing.assert_close(latent[row, 0], (encoder.cls_token + encoder.pos_embed)[0, 0])
        for place in (mask[row] == 0).nonzero()[:, 0]:
            wanted = tokens[row % 8, place] + segment
            torch.testing.assert_close(latent[row, 1 + ids_restore[row, place]], wanted)


def test_groups_do_not_touch_and_hidden_pixels_only_reach_the_loss():
    model, images, noise = tiny(norm_pixels=False), draw_images(12), torch.rand(3, 16)
    loss, prediction, mask, _ = model(images, noise)
    changed = images.clone()
    changed[5] += 1
    moved = (model(changed, noise)[1] - prediction).abs().amax(dim=(1, 2)).unflatten(0, (3, 4))
    assert (moved[1] > 1e-6).all() and moved[[0, 2]].max() == 0             # all of its group, no others

    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 48), 4, 16).bool()
    other_loss, same, _, _ = model(torch.where(hidden, images + 1, images), noise)
    assert torch.equal(same, prediction) and abs(other_loss - loss) > 0.1


# -------------------------------------------------------------------------------------------------- attention

def homologous(visible, dim=16):
    plain = common.Attention(dim, 2).double()
    attention = mixedae.HomologousAttention(plain, visible, visible).double()
    assert attention.state_dict().keys() == plain.state_dict().keys()
    return attention, plain


@pytest.mark.parametrize("visible", [2, 4])
def test_topk_and_its_accuracy_equal_a_loop(visible):
    attention, _ = homologous(visible)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    found = attention(x)
    q, k, v = attention.project(x)
    right = total = 0
    mixed = torch.zeros_like(v)
    for b in range(2):
        for head in range(2):
            for i in range(9):
                scores = [(q[b, head, i] @ k[b, head, j]).item() / math.sqrt(8) for j in range(9)]
                top = sorted(range(1, 9), key=lambda j: -scores[j])[:visible]
                keys = [0, *top] if i else range(9)
                weights = [math.exp(scores[j]) for j in keys]
                mixed[b, head, i] = sum(w * v[b, head, j] for w, j in zip(weights, keys)) / sum(weights)
                others = [j for j in top if j != i] if i else []
                right += sum((j - 1) // visible == (i - 1) // visible for j in others)
                total += len(others)
    torch.testing.assert_close(found, attention.proj(mixed.transpose(1, 2).flatten(2)))
    assert attention.accuracy.item() == pytest.approx(right / total)


def test_with_all_keys_it_is_plain_attention():
    attention, plain = homologous(8)
    assert {*attention.parameters()} == {*plain.parameters()}               # shared, not copied
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(x), plain(x))
    assert attention.accuracy == 1


# ----------------------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("places, visible, temperature", [(12, 3, 0.25), (8, 4, 1.0), (6, 2, 0.25)])
def test_the_contrastive_loss_equals_the_double_sum(places, visible, temperature):
    tokens = 3 * torch.randn(2, places, 5) + 1
    total = 0.0
    for group in tokens:
        cosine = [nn.functional.cosine_similarity(token[None], group).tolist() for token in group]
        for i in range(places):
            below = sum(math.exp(cosine[i][m] / temperature) for m in range(places) if m != i)
            mates = [j for j in range(places) if j // visible == i // visible and j != i]
            total -= sum(math.log(math.exp(cosine[i][j] / temperature) / below) for j in mates) / len(mates)
    found = mixedae.contrastive_loss(tokens, visible, temperature)
    assert found.item() == pytest.approx(total / (2 * places), rel=1e-5)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 8, 6), 1e4 * torch.randn(2, 8, 6)], ids=["zero", "large"])
def test_the_contrastive_loss_and_its_gradient_are_finite_and_float32(tokens):
    tokens = tokens.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixedae.contrastive_loss(tokens, 4)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and tokens.grad.isfinite().all()
    torch.testing.assert_close(loss, mixedae.contrastive_loss(tokens.float(), 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("members", [2, 4])
def test_with_groups_of_one_it_is_mae_number_for_number(members, norm_pixels):
    model = tiny(members=members, norm_pixels=norm_pixels, segments=False, contrastive_weight=0.0)
    images, noise = draw_images(8), torch.rand(8, 16)
    model.members = 1                                                       # each owns n places, as before
    reference = mae.MAE(model.encoder, model.decoder, norm_pixels)
    wanted, prediction, mask = reference(images, 1 - 1 / members, noise)
    loss, found, found_mask, values = model(images, noise)
    assert torch.equal(found_mask, mask) and loss == values["reconstruction_loss"]
    torch.testing.assert_close(found, prediction)
    torch.testing.assert_close(loss, wanted)


def test_full_mixing_is_the_mean_over_assignments_passed_on():
    full, compose = tiny(full=True), tiny()
    images, noise = draw_images(8), torch.rand(2, 16)
    losses = []
    for turn in range(4):
        order = noise.argsort(dim=1).roll(-4 * turn, dims=1)
        losses.append(compose(images, order.argsort(dim=1))[0])             # noise that sorts into this order
    torch.testing.assert_close(full(images, noise)[0], sum(losses) / 4)


@pytest.mark.parametrize("options", [{}, dict(full=True), dict(members=2), NAIVE])
def test_every_parameter_learns_and_the_loss_is_the_sum(options):
    model = tiny(**options)
    loss, prediction, mask, values = model(draw_images(8))
    loss.backward()
    for name, parameter in model.named_parameters():
        unused = options is NAIVE and name.startswith("projector")
        assert unused or not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    assert prediction.shape == (*mask.shape, 48) and len(mask) == 8 * model.turns
    weight = 0.0 if options is NAIVE else 0.1
    torch.testing.assert_close(loss, values["reconstruction_loss"] + weight * values["contrastive_loss"])


@pytest.mark.parametrize("flags", [[], ["--checkpoint-blocks"]])
def test_a_training_step_compiles_to_one_graph(flags, tmp_path):
    images, found = draw_images(8), []
    for compiled in (False, True):
        model = tiny()
        run = ["--no-compile", "--out", str(tmp_path / "run"), *RUN, *flags]
        args = common.parse_args(mixedae.options(), "mixedae", lambda args, kind: mixedae.SMALL, run)
        common.Run(args).wrap(model)
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        loss, _, _, values = model(images)
        loss.backward()
        found.append([values["topk_accuracy"], *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    mixedae.main([*RUN, "--out", str(out)])
    return out


def test_a_run_writes_its_log_checkpoint_and_images(finished):
    lines = log_of(finished)
    assert len(lines) == 2 and lines[-1]["step"] == 8
    for line in lines:
        wanted = line["reconstruction_loss"] + 0.1 * line["contrastive_loss"]
        assert line["loss"] == pytest.approx(wanted, rel=1e-5)
        assert len(line["topk_accuracy"]) == 4 and all(0 < part < 1 for part in line["topk_accuracy"])
    checkpoint = common.read_checkpoint(f"{finished}/last.pt")
    assert checkpoint["segments"]["segment_token"].shape == (4, 1, 128)
    for group in checkpoint["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(common.learning_rate(7, 1e-2 * 16 / 256, 1.6, 8))
        assert group["betas"] == (0.9, 0.95)
    assert (finished / "mixture.png").stat().st_size > 1000

    encoder = common.load_encoder(f"{finished}/last.pt")
    assert encoder.config == checkpoint["args"]["vit"]
    torch.testing.assert_close(encoder.state_dict(), checkpoint["encoder"], rtol=0, atol=0)
    common.load_decoder(f"{finished}/last.pt", encoder)


def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(finished, tmp_path, cli, monkeypatch):
    """Stopped in the middle of an epoch, as by a cluster that wants its machine back."""
    schedule = mixedae.learning_rate

    def stop(step, *others):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *others)

    monkeypatch.setattr(mixedae, "learning_rate", stop)
    assert cli(*RUN, "--out", tmp_path)[0] == 128 + signal.SIGTERM
    assert common.read_checkpoint(f"{tmp_path}/last.pt")["step"] == 1
    monkeypatch.setattr(mixedae, "learning_rate", schedule)
    assert cli("--resume", "--out", tmp_path)[0] == 0
    one, two = (common.read_checkpoint(f"{folder}/last.pt") for folder in (finished, tmp_path))
    for part in ("encoder", "decoder", "segments", "projector"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, two[part][name]), name
    for line, other in zip(log_of(finished), log_of(tmp_path), strict=True):
        assert {**line, "seconds": 0, "images_per_s": 0} == {**other, "seconds": 0, "images_per_s": 0}


def test_one_step_equals_one_by_hand(tmp_path):
    """Of two micro-batches. After one step Adam's moving average is a tenth of the gradient."""
    mixedae.main([*RUN, "--limit", "16", "--epochs", "1", "--out", f"{tmp_path}/found"])
    found = common.read_checkpoint(f"{tmp_path}/found/last.pt")
    run = common.Run(argparse.Namespace(**found["args"] | dict(out=f"{tmp_path}/hand")))
    train, _ = common.prepare_data(run.args, run)
    run.start(16)
    torch.manual_seed(0)
    encoder = common.ViT(16, 4, embed_dim=128, depth=4, num_heads=4)
    model = mixedae.MixedAE(encoder, common.Decoder(encoder, 64, 1, 4), norm_pixels=False)
    learned = [p for group in common.decay_groups(model, 0.05) for p in group["params"]]
    plan = common.training_plan(torch.arange(16), run)
    gradients = [torch.autograd.grad(model(images)[0] / 2, learned)
                 for images, _ in common.batches(train, plan, run, train=True)]
    for state, wanted in zip(found["optimizer"]["state"].values(), map(sum, zip(*gradients)), strict=True):
        torch.testing.assert_close(state["exp_avg"], 0.1 * wanted, rtol=1e-3, atol=1e-8)


def test_mixing_with_segments_alone_attends_to_all_and_learns_from_pixels(tmp_path, cli):
    flags = ["--no-homologous-attention", "--contrastive-weight", 0, "--epochs", 1]
    assert cli(*RUN, *flags, "--out", tmp_path)[0] == 0
    line = log_of(tmp_path)[-1]
    assert line["loss"] == line["reconstruction_loss"]
    assert line["topk_accuracy"] == pytest.approx([3 / 15] * 4)             # of 15 other keys
    assert common.read_checkpoint(f"{tmp_path}/last.pt")["segments"]


def test_full_mixing_of_eighths_runs_and_says_its_chance_value(tmp_path, cli):
    flags = ["--mixing", "full", "--mix-ratio", 0.125, "--norm-pixels", "--no-segments", "--epochs", 1]
    code, output, errors = cli(*RUN, *flags, "--out", tmp_path)
    assert code == 0 and not errors
    best = max(log_of(tmp_path)[-1]["topk_accuracy"])
    last = output.splitlines()[-1]
    assert f"{best:.2f}" in last and "0.07" in last                         # chance is (2 − 1) / (16 − 1)
    assert not common.read_checkpoint(f"{tmp_path}/last.pt")["segments"]


def test_init_continues_from_an_encoder(finished, cli, tmp_path):
    # Without --size and --patch: they are the encoder's.
    assert cli(*RUN[4:], "--init", finished / "last.pt", "--lr", 0, "--out", tmp_path)[0] == 0
    one, two = (common.read_checkpoint(f"{out}/last.pt")["encoder"] for out in (finished, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("flags, number", [
    ("--batch 6 --micro-batch 6", "4"), ("--mix-ratio 0.5 --micro-batch 1", "2"),   # images in a group
    ("--mix-ratio 0.3", "0.3"), ("--size 12", "9")])                        # patches
def test_what_does_not_divide_is_one_clear_line(flags, number, tmp_path, cli):
    code, _, errors = cli(*RUN, *flags.split(), "--out", tmp_path / "run")
    assert code == 2 and number in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_the_image_shows_each_images_places(finished, tmp_path, cli, monkeypatch):
    sheets = []
    monkeypatch.setattr(mixedae, "save_image_rows", lambda path, rows: sheets.append(rows))
    assert cli(*RUN, "--epochs", 1, "--out", tmp_path)[0] == 0
    cut = {title: common.patchify(row.float(), 4) for title, row in sheets[0].items()}
    shown = (cut["its places in the mixture"] - cut["image"]).abs().amax(dim=2) <= 1     # (M, N), rounding
    kept = (cut["reconstruction"] - cut["image"]).abs().amax(dim=2) <= 1
    assert len(cut) == 5 and (shown.sum(dim=1) >= 4).all() and (shown.sum(dim=0) >= 1).all()
    assert (kept | ~shown).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_in_16_bits(precision, tmp_path, cli):
    assert cli(*RUN, "--epochs", 1, "--precision", precision, "--out", tmp_path)[0] == 0
