"""mra.py: painting, losses, long tails and episodes against slow formulas; its tasks as short runs."""

import argparse
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import mae
import mra
from conftest import log_of

OWN = dict(mean=[120.0, 100.0, 90.0], std=[60.0, 50.0, 70.0])          # the augmentor's normalisation
UNIT = dict(mean=[0, 0, 0], std=[255, 255, 255])                       # images of 0 … 1
SHORT = "--size 16 --patch 4 --limit 60 --batch 6 --epochs 2 --workers 0 --device cpu".split()


def tiny(grid=(4, 4), scale=0.3, **options):
    """An MRA of some thousand random parameters for images of grid × 4 pixels."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, 3, embed_dim=16, depth=2, num_heads=2)
    decoder = common.Decoder(encoder, 8, 1, 2)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.data += scale * torch.randn(parameter.shape)
    encoder.mean, encoder.std = OWN["mean"], OWN["std"]
    return mra.MRA(encoder, decoder, **options)


def random_images(count=6, grid=(4, 4)):
    """Random pixels → images as the augmentor's are normalised."""
    return normalise(torch.randint(0, 256, (count, 3, 4 * grid[0], 4 * grid[1])), **OWN)


def normalise(pixels, mean, std):
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def pixels_of(images, mean, std):
    return images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)


def cut(image):
    """image (C, H, W) → its patches in reading order, by loops."""
    _, height, width = image.shape
    return [image[:, y:y + 4, x:x + 4] for y in range(0, height, 4) for x in range(0, width, 4)]


def changed(before, after):
    """bool (B, N): patches in which any pixel is another."""
    rows = [[not torch.equal(*pair) for pair in zip(cut(a), cut(b))] for a, b in zip(before, after)]
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------- the augmentation

def attention_of(model, image):
    """image (C, H, W), in the augmentor's normalisation → (N,): from the class token, the mean over heads."""
    return model.autoencoder.encoder.attention_map(image[None])[0].mean(dim=0)


@pytest.mark.parametrize("strategy", mra.STRATEGIES)
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75])
def test_a_strategy_hides_the_right_patches_and_the_others_keep_their_bits(strategy, ratio):
    model, images = tiny((4, 6), mask_strategy=strategy, mask_ratio=ratio), random_images(6, (4, 6))
    before = images.clone()
    hidden = changed(images, model(images))
    assert torch.equal(images, before) and (hidden.sum(1) == 24 - int(24 * (1 - ratio))).all()
    for image, mask in zip(images, hidden):
        attention = attention_of(model, image)
        if strategy == "low":
            assert attention[mask].max() <= attention[~mask].min()
        if strategy == "high":
            assert attention[mask].min() >= attention[~mask].max()
    again = changed(images, model(images))
    assert torch.equal(hidden, again) != (strategy == "random")


def test_hidden_patches_are_what_the_decoder_says_clipped_to_pixels():
    model, images = tiny(scale=0.6), random_images()
    outside = 0
    for image, result in zip(images, model(images)):
        order = attention_of(model, image).argsort(descending=True).tolist()
        keep, vit = order[:9], model.autoencoder.encoder                      # int(16 · 0.6) = 9 stay visible
        tokens = vit.embed(image[None])[:, keep]
        restore = torch.tensor(order).argsort()[None]
        painted = model.autoencoder.decoder(vit.encode(tokens), restore)[0]   # (N, P·P·C)
        for place, (old, new) in enumerate(zip(cut(image), cut(result))):
            if place in keep:
                assert torch.equal(old, new)
                continue
            wanted = pixels_of(painted[place].view(4, 4, 3).permute(2, 0, 1), **OWN)
            outside += ((wanted < 0) | (wanted > 255)).sum()
            torch.testing.assert_close(pixels_of(new, **OWN), wanted.clamp(0, 255), rtol=0, atol=0.01)
    assert outside > 20                                                       # so clipping was needed


def test_apply_is_the_probability_that_an_image_changes_as_a_whole():
    images = random_images(400)
    assert torch.equal(tiny(apply=0.0)(images), images)
    model = tiny(apply=0.5)
    counts = changed(images, model(images)).sum(1)
    assert set(counts.tolist()) == {0, 7} and abs((counts > 0).sum() - 200) < 40
    assert not torch.equal(counts, changed(images, model(images)).sum(1))


@pytest.mark.parametrize("other", [UNIT, dict(mean=[110.0, 130.0, 80.0], std=[40.0, 70.0, 55.0])])
def test_another_normalisation_gives_the_same_pixels(other):
    pixels = pixels_of(random_images(), **OWN)
    wanted = pixels_of(tiny()(normalise(pixels, **OWN)), **OWN)
    found = pixels_of(tiny(**other)(normalise(pixels, **other)), **other)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)              # of 255


def test_at_ratio_0_nothing_is_painted_and_at_1_everything():
    images = random_images()
    assert torch.equal(tiny(mask_ratio=0.0)(images), images)
    assert changed(images, tiny(mask_ratio=1.0)(images)).all()


def test_no_gradient_and_nothing_learns():
    model, images = tiny(), random_images().requires_grad_()
    assert not model(images).requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_augmentor_is_mae_with_plain_pixels():
    model, images, noise = tiny().autoencoder, random_images(3), torch.rand(3, 16)
    wanted = mae.MAE(model.encoder, model.decoder, norm_pixels=False)(images, noise=noise)
    torch.testing.assert_close(model(images, noise), wanted)


def test_images_of_another_size_are_refused_and_positions_resized(tmp_path):
    for images in (random_images(2, (6, 6)), random_images(2)[:, :1]):
        with pytest.raises(common.UserError, match=r"\(16, 16\)"):
            tiny()(images)
    with pytest.raises(common.UserError, match="channels"):
        tiny(mean=[120.0], std=[60.0])
    model = tiny()
    encoder, decoder = model.autoencoder.encoder, model.autoencoder.decoder
    parts = dict(encoder=encoder.state_dict(), decoder=decoder.state_dict())
    args = dict(vit=encoder.config, decoder=decoder.config, **OWN)
    torch.save(parts | dict(args=args), tmp_path / "last.pt")
    images = random_images()
    assert torch.equal(mra.MRA.load(f"{tmp_path}/last.pt", **OWN)(images), tiny()(images))
    images = random_images(2, (8, 8))
    larger = mra.MRA.load(f"{tmp_path}/last.pt", img_size=32)
    assert (changed(images, larger(images)).sum(1) == 64 - 38).all()


@pytest.mark.parametrize("args", [dict(norm_pixels=True), argparse.Namespace(norm_pix_loss=True)])
def test_a_file_that_predicts_normalised_pixels_is_refused(args, tmp_path):
    encoder = tiny().autoencoder.encoder.state_dict()
    torch.save(dict(encoder=encoder, args=args), tmp_path / "mae.pt")
    with pytest.raises(common.UserError, match="normalised"):
        mra.MRA.load(f"{tmp_path}/mae.pt")


def test_dropping_follows_the_strategy_and_nothing_is_dropped_at_zero():
    images = random_images(4)
    model = tiny(mask_ratio=0.0, mask_strategy="high")
    assert torch.equal(model.drop(images), images)
    model.mask_ratio = 0.3
    for image, result in zip(images, model.drop(images)):
        gone = torch.tensor([not patch.any() for patch in cut(result)])
        attention = attention_of(model, image)
        assert gone.sum() == 5 and attention[gone].min() >= attention[~gone].max()


# ----------------------------------------------------------------------------------------- samples and losses

@pytest.mark.parametrize("classes, count, imbalance", [(10, 500, 100), (3, 7, 50), (100, 500, 10)])
def test_a_long_tail_has_the_usual_counts(classes, count, imbalance):
    targets = torch.arange(classes * count) % classes
    data = common.InMemoryImages(torch.zeros(len(targets), 1, 1, 1), targets, range(classes))
    ids = mra.labelled_ids(data, classes, imbalance=imbalance)
    for k in range(classes):
        # The largest n with n ≤ count · imbalance^(−k/(K−1)), in whole numbers.
        wanted = 1
        while (wanted + 1) ** (classes - 1) * imbalance ** k <= count ** (classes - 1):
            wanted += 1
        assert (targets[ids] == k).sum() == wanted


def test_labelled_images_are_chosen_class_by_class():
    data = common.InMemoryImages(torch.zeros(90, 3, 4, 4, dtype=torch.uint8), torch.arange(90) % 3, "abc")
    data.targets[:30] = -1
    ids = mra.labelled_ids(data, 3, labels=7)
    assert data.targets[ids].bincount().tolist() == [7, 7, 7] and len(ids.unique()) == 21
    assert data.targets[mra.labelled_ids(data, 2)].bincount().tolist() == [20, 20]
    assert not torch.equal(ids, mra.labelled_ids(data, 3, labels=7))
    with pytest.raises(common.UserError, match="20 images"):
        mra.labelled_ids(data, 3, labels=21)


def test_classes_are_grouped_by_their_training_images():
    accuracy, counts = torch.tensor([0.9, 0.5, 0.25, 1.0, 0.0]), torch.tensor([101, 100, 20, 19, 1])
    wanted = dict(many_shot=0.9, medium_shot=0.375, few_shot=0.5)
    assert mra.by_size(accuracy, counts) == pytest.approx(wanted)
    assert mra.by_size(accuracy, counts.clamp(min=50)).keys() == {"many_shot", "medium_shot"}


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.95])
def test_fixmatchs_loss_equals_a_loop(threshold):
    weak, strong = 2 * torch.randn(40, 5), torch.randn(40, 5).requires_grad_()
    total, sure = 0.0, 0
    for a, b in zip(weak.tolist(), strong.tolist()):
        chances = [math.exp(value) / sum(map(math.exp, a)) for value in a]
        if max(chances) >= threshold:
            sure += 1
            total -= math.log(math.exp(b[chances.index(max(chances))]) / sum(map(math.exp, b)))
    weak.requires_grad_()
    loss, part = mra.fixmatch_loss(weak, strong, threshold)
    assert loss.item() == pytest.approx(total / 40, rel=1e-5) and part.item() == pytest.approx(sure / 40)
    loss.backward()
    assert weak.grad is None and strong.grad.any(1).sum() == sure             # the weak view is the teacher


def test_the_average_of_weights_equals_its_definition():
    average, model = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)         # weights of 1, means of 0
    model.weight.data.normal_()
    model(3 + torch.randn(4, 3))
    mra.update_average(average, model, 0.9)
    torch.testing.assert_close(average.weight.data, 0.9 + 0.1 * model.weight.data)
    torch.testing.assert_close(average.running_mean, 0.1 * model.running_mean)


def test_episodes_repeat_no_image_and_ask_about_their_classes():
    labels = torch.arange(6).repeat_interleave(torch.tensor([9, 12, 30, 9, 20, 11]))
    labels = 3 + 2 * labels[torch.randperm(len(labels))]
    support, query = mra.episodes(labels, 4, 2, 7, 50)
    assert support.shape == (50, 4, 2) and query.shape == (50, 4, 7)
    for shown, asked in zip(support, query):
        numbers = torch.cat([shown, asked], dim=1)
        assert len(numbers.unique()) == 36
        assert (labels[numbers] == labels[numbers[:, :1]]).all() and len(labels[numbers[:, 0]].unique()) == 4
    assert len(support.flatten(1).unique(dim=0)) == 50 and len(labels[support].unique()) == 6
    for ways, shots in ((7, 1), (3, 5)):
        with pytest.raises(common.UserError, match="--held-out"):
            mra.episodes(labels, ways, shots, 5, 1)


def test_nearest_centroid_equals_a_loop():
    centres = torch.randn(20, 4, 1, 6)
    support, query = F.normalize(centres + 0.8 * torch.randn(20, 4, 10, 6), dim=-1).split([3, 7], dim=2)
    for found, shown, asked in zip(mra.nearest_centroid(support, query), support, query):
        right = 0
        for k in range(4):
            for x in asked[k]:
                distances = [(x - sum(members) / 3).norm().item() for members in shown]
                right += distances.index(min(distances)) == k
        assert found.item() == pytest.approx(right / 28)


@pytest.mark.parametrize("augment", ["none", "mra cutout", "cutmix", "mixup"])
def test_augmentations_change_what_they_name_and_labels_follow(augment):
    args = argparse.Namespace(augment=augment.split(), num_classes=8)
    images = 1 + torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16)
    found, labels = mra.augment(args, lambda images: 2 * images, images, torch.arange(8))
    if augment in ("cutmix", "mixup"):
        torch.testing.assert_close(found.mean((1, 2, 3)), labels @ (1 + torch.arange(8.0)))
        assert torch.equal(mra.augment(args, None, images)[0], images)             # no labels, no mixing
    elif augment == "none":
        assert torch.equal(found, images)
    else:
        assert ((found == 0).sum((1, 2, 3)) == 3 * 64).all() and ((found == 2 * images) | (found == 0)).all()


@pytest.mark.parametrize("name, channels", [
    ("conv4", 2), ("conv4", 1), ("mobilenet_v3_small", 1), ("resnet18", 3)])
def test_classifiers_by_name(name, channels):
    model = mra.new_classifier(argparse.Namespace(classifier=name, num_classes=7, in_chans=channels)).eval()
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)


def args_of(out, *words):
    """→ args for images of one channel, normalised by 100 and 50, of five classes."""
    args = common.parse_args(mra.options(), "mra", mra.preset, [*SHORT, "--out", str(out), *words])
    args.mean, args.std, args.num_classes = [100.0], [50.0], 5
    return args


def test_evaluate_equals_a_count(tmp_path):
    images, labels = torch.randint(256, (300, 1, 16, 16)).byte(), torch.randint(5, (300,))
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(256, 5)).train()
    ids = torch.randperm(300)[:270]                                    # two batches
    data, run = common.InMemoryImages(images, labels, range(5)), common.Run(args_of(tmp_path))
    result, per_class = mra.evaluate(model, data, ids, run)
    chances, labels = model[2]((images[ids].flatten(1) - 100.0) / 50).softmax(dim=1), labels[ids]
    right = (chances.argmax(dim=1) == labels).float()
    assert result["confidence"] == pytest.approx(chances.gather(1, labels[:, None]).mean().item(), rel=1e-4)
    assert result["top1"] == pytest.approx(right.mean().item())
    assert per_class.tolist() == pytest.approx([right[labels == k].mean().item() for k in range(5)])


def test_episodes_are_of_the_classes_held_out(tmp_path, monkeypatch):
    """Images of these are always the same, all others are noise. Every second episode is made to fail."""
    labels, noise = torch.arange(400) % 10, torch.randint(256, (400, 1, 16, 16)).byte()
    images = torch.where((labels >= 5)[:, None, None, None], noise[labels], noise)
    run = common.Run(args_of(tmp_path, "--augment", "none"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 5))
    accuracy = mra.nearest_centroid
    monkeypatch.setattr(mra, "nearest_centroid", lambda *views: accuracy(*views) * (torch.arange(600) % 2))
    result = mra.evaluate_episodes(model, None, common.InMemoryImages(images, labels, range(10)), 5, run)
    assert result["shots_1"] == result["top1"] == 0.5
    assert result["interval_1"] == pytest.approx(1.96 * 0.5 / math.sqrt(600), rel=1e-2)


# -------------------------------------------------------------------------------------------------- the tasks

@pytest.fixture(scope="module")
def augmentor(tmp_path_factory):
    """An augmentor, trained for two steps."""
    out = tmp_path_factory.mktemp("augmentor")
    few = "--task augmentor --limit 20 --batch 10 --epochs 1".split()
    mra.main([*SHORT, *few, "--out", f"{out}/run"])
    return f"{out}/run/last.pt"


TASKS = {
    "supervised": "--augment mra --labels 6 --baseline",
    "semi": "--labels 2 --batch 2 --baseline",
    "fewshot": "--limit 200 --baseline",                                     # 20 images of each class
}


@pytest.fixture(scope="module")
def runs(augmentor, tmp_path_factory):
    """A finished run of each task that trains a classifier."""
    out = tmp_path_factory.mktemp("runs")
    for task, options in TASKS.items():
        words = [*SHORT, "--task", task, "--augmentor", augmentor, "--out", f"{out}/{task}", *options.split()]
        mra.main(words)
    return out


def test_the_augmentor_is_drawn_and_judged(augmentor):
    out = augmentor.removesuffix("/last.pt")
    kept = log_of(out)[-1]["object_kept"]
    assert {"low, 40%", "random, 40%", "high, 40%", "mean map, 40%"} <= kept.keys()
    assert common.Image.open(f"{out}/augmentation.png").width > 1280


@pytest.mark.parametrize("attends_to", ["objects", "background", "places"])
def test_attention_that_misses_the_objects_is_said(attends_to, augmentor, monkeypatch, tmp_path, capsys):
    objects = F.avg_pool2d(common.Scenes(250, 16).masks[:, None].float(), 4).flatten(1)  # (250, 16)
    objects += 0.01 * torch.rand(250, 16)
    places = objects.mean(0) + 0.3 * torch.rand(250, 16)                      # where most objects are
    attention = dict(objects=objects, background=-objects, places=places)[attends_to]
    monkeypatch.setattr(mra.MRA, "attention", lambda model, images: attention)
    args = argparse.Namespace(**(torch.load(augmentor)["args"] | dict(out=str(tmp_path), overwrite=True)))
    mra.draw(mra.MRA.load(augmentor), common.Scenes(250, 16), common.Run(args))
    kept = log_of(tmp_path)[-1]["object_kept"]
    assert abs(kept["random, 40%"] - 9 / 16) < 0.05
    assert ("--seed" in capsys.readouterr().out) == (attends_to != "objects")     # advice
    if attends_to == "objects":
        assert kept["low, 40%"] > 0.9


def test_every_task_ends_with_its_result_and_the_baselines(runs):
    for task in TASKS:
        end, plain = log_of(runs / task)[-1], log_of(runs / task / "baseline")[-1]
        assert end["task"] == task and end["top1_without_mra"] == plain["top1"]
        assert json.load(open(runs / task / "baseline" / "args.json"))["augment"] == [
            "randaugment" if task == "semi" else "none"]
        one, two = (torch.load(runs / task / out / "last.pt")["classifier"] for out in ("", "baseline"))
        assert not all(torch.equal(one[name], two[name]) for name in one)
    few = log_of(runs / "fewshot")[-1]
    assert few["top1"] == few["shots_5"] > 0.2 and few["interval_1"] > 0


def test_fixmatchs_views_are_other_crops_of_the_same_images(augmentor, tmp_path, monkeypatch):
    real, plans = mra.batches, []

    def spy(dataset, plan, run, **options):
        seen = []
        plans.append(seen)
        return real(dataset, (seen.append(part) or part for part in plan), run, **options)

    monkeypatch.setattr(mra, "batches", spy)
    monkeypatch.setattr(mra, "UNLABELLED_RATIO", 3)
    words = "--task semi --labels 2 --batch 2 --epochs 1 --augmentor".split()
    mra.main([*SHORT, *words, augmentor, "--out", f"{tmp_path}/run"])
    labelled, weak, strong = plans[:3]
    assert len(labelled) == len(weak) == len(strong) == 60 // 3 // 2
    assert all(len(ids) == 2 for ids, _ in labelled)
    for one, two in zip(weak, strong):
        assert len(one[0]) == 6 and torch.equal(one[0], two[0]) and one[1] != two[1]


def test_fixmatch_teaches_the_augmented_view_by_the_other(augmentor, tmp_path, monkeypatch):
    class Brightness(torch.nn.Module):
        """A classifier whose scores say which image it saw."""

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(10))

        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * self.scale

    def loss(weak, strong):
        seen.append((weak, strong))
        return 100 + 0 * strong.sum(), torch.tensor(1.0)

    seen = []
    monkeypatch.setattr(mra, "new_classifier", lambda args: Brightness())
    monkeypatch.setattr(mra, "fixmatch_loss", loss)
    monkeypatch.setattr(mra, "augment", lambda args, model, images, labels=None: (0 * images + 9, labels))
    words = "--task semi --labels 2 --batch 2 --epochs 1 --augmentor".split()
    mra.main([*SHORT, *words, augmentor, "--out", f"{tmp_path}/run"])
    assert seen and log_of(tmp_path / "run")[0]["loss"] > 100
    for weak, strong in seen:
        assert (strong == strong[0]).all() and not (weak == weak[0]).all()


def test_what_fixmatch_evaluates_is_the_average_of_weights(augmentor, tmp_path):
    words = "--task semi --labels 1 --batch 2 --limit 20 --epochs 1 --augmentor".split()
    mra.main([*SHORT, *words, augmentor, "--out", f"{tmp_path}/run"])
    saved = torch.load(tmp_path / "run" / "last.pt")
    (group,) = saved["optimizer"]["param_groups"]
    assert saved["step"] == 1 and group["lr"] == pytest.approx(0.5 * 2 / 256)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    torch.manual_seed(0)
    first = mra.new_classifier(argparse.Namespace(**saved["args"])).state_dict()
    for name, old in first.items():
        if name.endswith("weight"):
            new = saved["model"][name]
            torch.testing.assert_close(saved["classifier"][name], 0.99 * old + 0.01 * new)
            assert not torch.equal(new, old)


def test_a_long_tail_is_reported_by_size(augmentor, tmp_path, cli):
    words = ["--labels", 6, "--imbalance", 6, "--augment", "none", "--augmentor", augmentor]
    assert cli(*SHORT, *words, "--out", tmp_path)[0] == 0
    end = log_of(tmp_path)[-1]                                 # all classes are few; each has 6 to test on
    assert end["few_shot"] == pytest.approx(end["top1"])


def test_fewshot_never_trains_on_the_classes_it_is_tested_on(augmentor, tmp_path, monkeypatch):
    augment, seen = mra.augment, []
    monkeypatch.setattr(
        mra, "augment", lambda args, model, images, labels: seen.append(labels) or augment(
            args, model, images, labels))
    words = ["--task", "fewshot", "--limit", "200", "--epochs", "1", "--augment", "none"]
    scenes = common.Scenes(240, 16), common.Scenes(240, 16, first=1000)
    mra.main([*SHORT, *words, "--out", f"{tmp_path}/run"], *scenes)
    assert set(torch.cat(seen).tolist()) == set(range(5))
    assert not (tmp_path / "run" / "augmentor").exists()               # nothing would use it
    # Validation images of the classes held out are enough.
    train, val = scenes
    held_out = val.targets >= 5
    val = common.InMemoryImages(val.images[held_out], val.targets[held_out], val.classes)
    mra.main([*SHORT, *words, "--out", f"{tmp_path}/held-out"], train, val)
    assert log_of(tmp_path / "held-out")[-1]["shots_5"] == log_of(tmp_path / "run")[-1]["shots_5"]


def test_without_an_augmentor_one_is_trained_first_and_not_twice(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(mra.PRESETS, "scenes augmentor", dict(steps=3, batch=10, lr=0.01))
    words = [*SHORT, "--labels", "6", "--epochs", "1", "--out", tmp_path / "run"]
    code, output, errors = cli(*words)
    assert code == 0 and not errors and (tmp_path / "run" / "augmentation.png").exists()
    end = log_of(tmp_path / "run")[-1]
    for name in mra.STRATEGIES:
        assert {f"top1_painted_{name}", f"confidence_painted_{name}"} <= end.keys()
    made = (tmp_path / "run" / "augmentor" / "last.pt").read_bytes()
    (tmp_path / "run" / "last.pt").unlink()                            # as if it had died after the augmentor
    assert cli(*words)[0] == 2 and cli("--resume", "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "augmentor" / "last.pt").read_bytes() == made
    assert log_of(tmp_path / "run")[-1] == end


@pytest.mark.parametrize("task", ["supervised", "semi"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(task, runs, augmentor, tmp_path, monkeypatch):
    words = [*SHORT, "--task", task, "--augmentor", augmentor, "--out", f"{tmp_path}/run"]
    words += [word for word in TASKS[task].split() if word != "--baseline"]
    after = common.Run.after_step

    def stop(run):
        if run.step == (15 if task == "supervised" else 5):    # of 20, after a first evaluation; of 8
            run.signal = 15
        after(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Run, "after_step", stop)
        mra.main(words)
    mra.main(["--task", task, "--resume", "--out", f"{tmp_path}/run"])
    one, two = torch.load(runs / task / "last.pt"), torch.load(tmp_path / "run" / "last.pt")
    for part in ("classifier", "model"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    end = log_of(tmp_path / "run")[-1]
    assert end == {name: value for name, value in log_of(runs / task)[-1].items() if name in end}


def test_occlusion_at_zero_is_the_accuracy(runs, augmentor, tmp_path, cli):
    paths = [runs / "supervised" / "last.pt", runs / "semi" / "last.pt", runs / "supervised" / "last.pt"]
    words = [*SHORT, "--task", "occlusion", "--augmentor", augmentor, "--out", tmp_path, "--compare", *paths]
    code, _, errors = cli(*words)
    assert code == 0 and not errors
    lines = log_of(tmp_path)
    assert [line["strategy"] for line in lines] == 3 * list(mra.STRATEGIES)
    assert lines[:3] == lines[6:]                                             # also what is dropped at random
    assert cli(*words[:-2], "--overwrite")[0] == 0 and log_of(tmp_path) == lines[:3]
    for line in lines:
        task = line["compare"].split("/")[-2]
        assert len(line["accuracy"]) == 10
        assert line["accuracy"][0] == pytest.approx(log_of(runs / task)[-1]["top1"], abs=1e-4)


@pytest.mark.parametrize("options, says", [
    ("--labels 30", "--labels 30"), ("--task occlusion", "--compare"),
    ("--task occlusion --compare {file}", "last.pt"), ("--augmentor nowhere.pt", "nowhere.pt"),
    ("--task fewshot --held-out 4", "--held-out"),
    ("--init {file}", "--init")])
def test_bad_input_gets_one_line(options, says, augmentor, tmp_path, cli):
    words = options.format(file=augmentor).split()
    words = words if "nowhere" in options else [*words, "--augmentor", augmentor]
    code, _, errors = cli(*SHORT, "--labels", 6, "--out", tmp_path / "out", *words)
    assert code == 2 and says in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "out" / "last.pt").exists()                        # said before training


def test_a_classifier_is_evaluated_in_bf16_on_images_that_are_all_painted(augmentor, tmp_path, cli):
    words = ["--labels", 6, "--augmentor", augmentor, "--precision", "bf16", "--out", tmp_path / "out"]
    assert cli(*SHORT, *words, "--apply", 0)[0] == 0                          # none in training
    end = log_of(tmp_path / "out")[-1]
    assert end["confidence_painted_high"] != end["confidence"]
