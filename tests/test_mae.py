"""mae.py: its masks, model and judges against slow formulas; its runs killed, stopped and resumed; its answers to bad input."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import automae
import common
import mae
import mixedae
import mra

ENDING = str(Path(__file__).with_name("ending.py"))
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}                               # sums in one order: runs repeat
SMALL = "--model nano --size 32 --patch 8 --decoder-dim 32 --decoder-depth 1 --decoder-heads 4".split()
QUICK = [*SMALL, *"--epochs 2 --batch 16 --lr 1e-2 --warmup 0.5 --workers 0 --device cpu".split()]   # on `pictures`, 8 steps
EPOCHS, STEPS, BATCH, LR, WARMUP = 3, 60, 32, 1e-3, 0.4                                  # on scenes, some six seconds
SCENES = [*SMALL, *f"--limit {STEPS * BATCH} --epochs {EPOCHS} --batch {BATCH} --micro-batch {BATCH // 2} --lr {LR} "
          f"--warmup {WARMUP} --save-every 0 --device cpu".split()]
TASK = "--epochs 3 --batch 16 --lr 1e-2 --warmup 0.5 --workers 0 --device cpu".split()  # of the three classes, 9 steps
FOLDER = [*SMALL, *"--epochs 30 --batch 16 --lr 1e-2 --warmup 1 --crop 0.5 --workers 2 --save-every 0 --device cpu".split()]

# ------------------------------------------------------------------------------------------------------------------ helpers

def tiny(grid=(4, 4), masking="random", norm_pixels=True, dtype=torch.float32):
    """A model of some thousand parameters for pictures of grid × 4 pixels."""
    torch.manual_seed(0)
    encoder = common.ViT((4 * grid[0], 4 * grid[1]), 4, 3, dim=16, depth=2, heads=2)
    return mae.MAE(encoder, common.Decoder(encoder, 8, 1, 2), norm_pixels, masking).to(dtype)

def masks_of(masking, grid, ratio, batch=16):
    """What MAE.forward hides: (B, h, w), 1 where hidden."""
    images = torch.zeros(batch, 3, 4 * grid[0], 4 * grid[1])
    with torch.no_grad():
        return tiny(grid, masking)(images, ratio)[2].unflatten(1, grid)

def cut(image, patch=4):
    """(C, H, W) → list of patches (C, P, P), row by row."""
    corners = [(y, x) for y in range(0, image.shape[1], patch) for x in range(0, image.shape[2], patch)]
    return [image[:, y:y + patch, x:x + patch] for y, x in corners]

def tensors(tree, name=""):
    """Every leaf of nested dictionaries and lists, by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {name: tree}
    return {path: leaf for key, value in items for path, leaf in tensors(value, f"{name}/{key}").items()}

def saved(out):
    return torch.load(Path(out, "last.pt"), weights_only=True)

def step_of(out):
    """The step in last.pt, 0 before there is one."""
    return saved(out)["step"] if Path(out, "last.pt").exists() else 0

def log_of(out):
    path = Path(out, "log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def epochs_of(out):
    return [line for line in log_of(out) if "loss" in line]

def losses(out):
    return [line["loss"] for line in epochs_of(out)]

def assert_same_training(one, two):
    """Weights and optimizer state equal bit for bit; the log has the same epochs, each once, with equal losses."""
    a, b = ({name: leaf for key in ("encoder", "decoder", "optimizer") if key in saved(out)
             for name, leaf in tensors(saved(out)[key], key).items()} for out in (one, two))
    assert a.keys() == b.keys() and len(a) > 300                                         # weights and two moments of each
    for name, leaf in a.items():
        assert torch.equal(leaf, b[name]) if torch.is_tensor(leaf) else leaf == b[name], name
    curves = [[(line["epoch"], line["step"], line["loss"], line["lr"]) for line in epochs_of(out)] for out in (one, two)]
    assert curves[0] == curves[1] and len({epoch for epoch, *_ in curves[0]}) == len(curves[0])

def assert_finite(out):
    for name, leaf in tensors(saved(out)).items():
        assert not torch.is_tensor(leaf) or leaf.isfinite().all(), name

def command(out, *flags, processes=1, script=mae, end=None):
    """The command line of a run in a process of its own, or in several through torchrun. `end`: (save, end, signal) for
    ending.py, and before them a folder if not `out`."""
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    if end:
        folder, *numbers = end if len(end) > 3 else (out, *end)
        launch += [ENDING, str(folder), *(str(int(number)) for number in numbers)]       # Python 3.10 writes signals out
    return [*launch, script.__file__, "--out", str(out), *map(str, flags)]

def start(out, *flags, **how):
    return subprocess.Popen(command(out, *flags, **how), env={**os.environ, **THREADS}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

def finish(process, code=0, seconds=120):
    """Waits for the end of a process and checks its exit code (None: any but 0) → stdout, stderr."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)                                       # with its workers
    assert process.returncode == code if code is not None else process.returncode, (process.returncode, output, errors)
    return output, errors

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 64 PNGs of 40×36, soft random colours of little contrast."""
    return paint_folder(tmp_path_factory.mktemp("pictures"), 64)

def paint_folder(root, count, seed=0, tint=(0, 0, 0), contrast=50):
    random = torch.Generator().manual_seed(seed)
    for i in range(count):
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 4, generator=random), (40, 36), mode="bilinear")[0]
        image = 100 + contrast * image + torch.tensor(tint)[:, None, None]
        torchvision.io.write_png(image.byte(), str(root / f"{i:03}.png"))
    return root

TINTS = {"red": (40, 0, 0), "green": (0, 40, 0), "blue": (0, 0, 40)}

def class_folders(root, train=16, val=6, **how):
    """train/ and val/ with pictures of three classes, each of its tint."""
    for part, count in (("train", train), ("val", val)):
        for k, (name, tint) in enumerate(TINTS.items()):
            (root / part / name).mkdir(parents=True)
            paint_folder(root / part / name, count, 10 * count + k, tint, **how)
    return root

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("labelled"))

@pytest.fixture(scope="module")
def trained(labelled, tmp_path_factory):
    """A model pre-trained on `labelled`, in moments → its folder."""
    mae.main(["--data", str(labelled), *QUICK, "--out", str(out := tmp_path_factory.mktemp("trained") / "run")])
    return out

@pytest.fixture(scope="module")
def tuned(labelled, trained, tmp_path_factory):
    """A classifier fine-tuned from `trained` → its folder."""
    mae.main(["--data", str(labelled), "--task", "finetune", "--init", f"{trained}/last.pt", *TASK,
              "--out", str(out := tmp_path_factory.mktemp("tuned") / "run")])
    return out

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run on scenes in a process of its own → its folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, *finish(start(out, *SCENES))

def one_line(errors):
    """The only line on stderr."""
    assert re.fullmatch(r"(mae|automae|mixedae)\.py: error: .+\n", errors), errors
    return errors

# -------------------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("masking", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 6), (7, 5), (1, 9)])
def test_every_picture_keeps_exactly_as_many_patches_as_the_ratio_says(masking, grid):
    for ratio in (0.25, 0.5, 0.6, 0.75, 0.88):
        mask = masks_of(masking, grid, ratio)
        assert set(mask.unique().tolist()) == {0, 1}
        assert ((mask == 0).sum((1, 2)) == int(grid[0] * grid[1] * (1 - ratio))).all()

@pytest.mark.parametrize("masking", ["random", "block"])
def test_masks_differ_between_pictures_and_between_calls(masking):
    model, images = tiny((8, 8), masking), torch.zeros(16, 3, 32, 32)
    first, second = model(images)[2], model(images)[2]
    assert len(torch.cat([first, second]).unique(dim=0)) == 32                           # two alike are unlikely, and seeded

def test_random_masks_are_uniform_over_places():
    torch.manual_seed(0)
    draws, grid, n = 6000, (3, 4), 3
    _, _, mask = common.keep_lowest(mae.MASKINGS["random"](draws, grid, "cpu"), n)
    count, expected = (mask == 0).sum(0).double(), draws * n / 12
    # Without replacement the counts vary by 1 − n/N less than a multinomial's: corrected, this is chi-square with 11 degrees.
    chi_square = ((count - expected) ** 2 / expected).sum() * 11 / (12 - n)
    assert 1.5 < chi_square < 40                                                         # outside: odds of some 1e-4 each

def test_random_masks_of_neighbours_are_independent():
    torch.manual_seed(0)
    _, _, mask = common.keep_lowest(mae.MASKINGS["random"](20_000, (4, 4), "cpu"), 4)
    both = ((mask[:, 5] == 0) & (mask[:, 6] == 0)).float().mean().item()
    assert both == pytest.approx(4 / 16 * 3 / 15, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))   # four standard errors

@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (14, 10)])
def test_grid_masks_keep_the_upper_left_of_every_two_by_two(grid):
    visible = masks_of("grid", grid, 0.75) == 0
    for y in range(grid[0]):
        for x in range(grid[1]):
            assert (visible[:, y, x] == (y % 2 == 0 and x % 2 == 0)).all()

@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.75])
def test_block_masks_hide_compact_regions(ratio):
    def hidden_neighbours(mask):
        """Share of a hidden patch's neighbours, four at most, that are hidden as well."""
        pairs = [(mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])]
        both, either = (sum(join(a, b).sum().item() for a, b in pairs) for join in (torch.mul, torch.add))
        return 2 * both / either

    torch.manual_seed(0)
    block, random = (hidden_neighbours(masks_of(masking, (14, 14), ratio, batch=64)) for masking in ("block", "random"))
    assert random == pytest.approx(ratio, abs=0.03)                                      # independent places
    assert 1 - block < 0.6 * (1 - random)                                                # far fewer borders

def test_noise_keeps_the_patches_where_it_is_lowest():
    noise = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(24.0), (5, 1)), axis=1))
    _, _, mask = tiny((4, 6))(torch.randn(5, 3, 16, 24), 0.7, noise.float())
    np.testing.assert_array_equal(mask.numpy() == 0, noise.numpy() < 7)

# -------------------------------------------------------------------------------------------------------------------- model

def test_the_encoder_never_sees_hidden_pixels_and_the_loss_does():
    model, latent = tiny(norm_pixels=False), []
    model.decoder.register_forward_pre_hook(lambda module, arguments: latent.append(arguments[0]))
    images, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    loss, prediction, mask = model(images, 0.75, noise)
    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 48), 4, 16).bool()
    assert hidden.float().mean() == 0.75

    other_loss, other_prediction, _ = model(torch.where(hidden, 9 * torch.randn_like(images), images), 0.75, noise)
    assert torch.equal(latent[0], latent[1]) and torch.equal(prediction, other_prediction)
    assert not torch.isclose(loss, other_loss, rtol=0.1)

    visible_changed = model(torch.where(hidden, images, images + 1), 0.75, noise)[1]
    assert ((visible_changed - prediction).abs().amax(dim=(1, 2)) > 1e-3).all()          # far above rounding, in every picture

def test_one_visible_patch_moves_the_prediction_of_far_hidden_ones():
    model, images, noise = tiny(), torch.randn(1, 3, 16, 16), torch.arange(16.0)[None]
    before = model(images, 0.75, noise)[1]
    images[:, :, :4, :4] += 2                                                            # patch 0, which is visible
    assert ((model(images, 0.75, noise)[1] - before).abs().amax(-1) > 1e-5).all()        # at every place

@pytest.mark.parametrize("norm_pixels", [True, False])
def test_gradients_reach_every_parameter_but_the_positions(norm_pixels):
    model = tiny(norm_pixels=norm_pixels)
    model(torch.randn(4, 3, 16, 16))[0].backward()
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

def test_accumulated_gradients_equal_the_large_batchs(tmp_path):
    images, noise = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.rand(8, 16)
    gradients = []
    for micro in (8, 2, 1):
        args = SimpleNamespace(out=str(tmp_path / str(micro)), batch=8, micro_batch=micro, epochs=1, lr=1.0, warmup=0,
                               device="cpu", workers=0, resume=False, overwrite=False, precision=None, compile=False,
                               save_every=30.0, checkpoint_blocks=False)
        run, model = common.Run(args), tiny(dtype=torch.float64)
        assert run.accumulate == 8 // micro
        for part, scores in zip(images.split(micro), noise.split(micro)):
            run.backward(model(part, 0.75, scores)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    for other in gradients[1:]:                                                          # float64, but for the loss in float32
        assert (other - gradients[0]).norm() < 1e-6 * gradients[0].norm()

@pytest.mark.parametrize("again", [False, True])
def test_pre_training_and_fine_tuning_compile_to_one_graph_each(again, one_graph):
    images = torch.randn(4, 3, 16, 16)
    one_graph(lambda: tiny(masking="block").train(), lambda model: model(images)[0], again)
    vit = lambda: common.ViT(16, 4, 3, 16, 2, 2, classes=5, drop_path=0.5).train()
    one_graph(vit, lambda model: model(images).square().sum(), again)

@pytest.mark.parametrize("norm_pixels", [True, False])
def test_paint_leaves_visible_patches_alone_and_fills_hidden_ones(norm_pixels):
    model, images, noise = tiny(norm_pixels=norm_pixels), 3 * torch.randn(3, 3, 16, 16) + 5, torch.rand(3, 16)
    masked, painted = model.paint(images, 0.75, noise)
    with torch.no_grad():
        _, prediction, mask = model(images, 0.75, noise)
    for b in range(3):
        for i, (true, grey, fill) in enumerate(zip(cut(images[b]), cut(masked[b]), cut(painted[b]))):
            if not mask[b, i]:
                assert torch.equal(grey, true) and torch.equal(fill, true)
                continue
            expected = prediction[b, i].numpy().reshape(4, 4, 3).transpose(2, 0, 1).astype(float)
            if norm_pixels:
                pixels = true.numpy().astype(float)
                expected = expected * math.sqrt(((pixels - pixels.mean()) ** 2).sum() / 47 + 1e-6) + pixels.mean()
            assert not grey.any()
            np.testing.assert_allclose(fill.numpy(), expected, rtol=1e-4, atol=1e-5)     # float32 against float64

def test_paint_draws_no_gradients_and_the_masked_picture_does_not_leak():
    model, images, noise = tiny(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    masked, painted = model.paint(images, 0.75, noise)
    assert not painted.requires_grad
    assert torch.equal(model.paint(masked, 0.75, noise)[0], masked)

# ------------------------------------------------------------------------------------------------------------------- judges

def features_for_judges(classes=4, width=6, queries=40):
    """A bank of 150 with labels and queries with the truth; clouds that overlap."""
    random = np.random.default_rng(0)
    labels, truth = random.integers(classes, size=150), random.integers(classes, size=queries)
    centres = random.normal(size=(classes, width))
    bank, asked = (centres[of] + random.normal(size=(len(of), width)) * np.linspace(1, 3, width) for of in (labels, truth))
    return [torch.from_numpy(array) for array in (bank.astype(np.float32), labels, asked.astype(np.float32), truth)]

@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_equals_a_slow_loop(k):
    bank, labels, queries, _ = features_for_judges()
    expected = []
    for query in queries.numpy().astype(float):
        similarity = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in bank.numpy().astype(float)]
        votes = np.zeros(4)
        for i in sorted(range(150), key=lambda i: -similarity[i])[:k]:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        expected.append(votes)
    scores = mae.knn(bank, labels, queries, 4, k=k)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3)                      # exp of up to 14, of float32 cosines
    assert scores.argmax(1).tolist() == np.argmax(expected, 1).tolist() and len(scores.argmax(1).unique()) == 4

def test_knn_weighs_near_neighbours_more_than_many_far_ones():
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-0.1, 1.0]]), torch.tensor([0, 1, 1, 1])
    assert mae.knn(bank, labels, torch.tensor([[5.0, 0.5]]), 2).argmax(1).tolist() == [0]    # whatever its length

@pytest.mark.parametrize("ridge", [0.1, 10.0, 1000.0])
def test_the_linear_judge_is_ridge_regression(ridge):
    bank, labels, queries, truth = features_for_judges(classes=4, width=30, queries=500)
    x, q = (part.numpy().astype(float) for part in (bank, queries))
    mean, std = x.mean(0), x.std(0)
    x, q = (np.c_[(part - mean) / std, np.ones(len(part))] for part in (x, q))
    # Ridge regression as plain least squares: one more row √ridge · eᵢ → 0 for each weight.
    rows, targets = np.r_[x, math.sqrt(ridge) * np.eye(x.shape[1])], np.r_[np.eye(4)[labels.numpy()], np.zeros((x.shape[1], 4))]
    scores = q @ np.linalg.lstsq(rows, targets, rcond=None)[0]
    found = mae.linear(bank, labels, queries, 4, ridge)
    np.testing.assert_allclose(found.numpy(), scores, rtol=0, atol=1e-4)                 # of float32 features
    assert (found.argmax(1) == truth).float().mean() > 0.5                               # of four classes

def test_the_linear_judge_ignores_the_scale_and_place_of_a_feature():
    bank, labels, queries, _ = features_for_judges()
    scale, shift = torch.tensor([1e3, 1e-3, 1.0, 5.0, 0.2, 1.0]), torch.tensor([0.0, 1.0, -50.0, 0.0, 3.0, 0.0])
    moved = mae.linear(bank * scale + shift, labels, queries * scale + shift, 4).argmax(1)
    assert (moved == mae.linear(bank, labels, queries, 4).argmax(1)).float().mean() > 0.95   # float32 blurs 1e-3 beside 1

@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_choose_the_same_labelled_pictures_every_time(pool):
    torch.manual_seed(0)
    labels = torch.arange(600)
    labels[::3] = -1                                                                     # not labelled
    data = common.Pictures(torch.randint(256, (600, 3, 8, 8), dtype=torch.uint8), labels, [str(i) for i in range(600)])
    encoder = common.ViT(8, 4, 3, dim=16, depth=1, heads=2).eval()
    run = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))
    args = SimpleNamespace(size=8, pool=pool)
    first, numbers = mae.features(encoder, data, run, args, 300)
    torch.manual_seed(99)                                                                # whatever was drawn in between
    second, again = mae.features(encoder, data, run, args, 300)
    assert torch.equal(numbers, again) and torch.equal(first, second)
    assert len(set(numbers.tolist())) == 300 and (numbers >= 0).all() and not (numbers % 3 == 0).any()
    assert numbers.float().mean().item() == pytest.approx(300, abs=4 * 173 / math.sqrt(300))    # from everywhere
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(data.normalise(data.images[numbers])))     # a label's own picture
        expected = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)                    # other batch size, float32
    for count in (10_000, None):
        assert len(mae.features(encoder, data, run, args, count)[1]) == 400              # all that have a label

def test_lars_equals_its_formula_and_goes_on_from_its_state():
    random = np.random.default_rng(0)
    start = [random.normal(size=size) for size in ((3, 4), (2, 3), (3,), (4, 2), (2, 2, 2))]
    start[1][:] = 0                                                                      # no length: its gradient as it is
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in start]
    optimizer, speeds = mae.LARS(weights, trust=0.02, momentum=0.8), [0 * w for w in start]
    for step, lr in enumerate((0.3, 0.1, 0.7, 0.2)):
        slopes = [random.normal(size=w.shape) * (0 if k == 3 and step in (0, 2) else 1) for k, w in enumerate(start)]
        for k, (w, g) in enumerate(zip(start, slopes)):
            length, slope = np.sqrt((w ** 2).sum()), np.sqrt((g ** 2).sum())
            rate = 0.02 * length / slope if w.ndim > 1 and length > 0 and slope > 0 else 1
            speeds[k] = 0.8 * speeds[k] + rate * g
            start[k] = w - lr * speeds[k]
            weights[k].grad = torch.tensor(g)
        if step == 2:                                                                    # as after --resume
            state, optimizer = optimizer.state_dict(), mae.LARS(weights)
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for w, parameter in zip(start, weights):
            np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-12, atol=1e-15)
    assert np.abs(start[1]).min() > 0 and np.abs(start[3]).min() > 0

@pytest.mark.parametrize("classes", [2, 4, 5, 12])
def test_tally_equals_a_loop(classes):
    random = np.random.default_rng(classes)
    scores, labels = random.normal(size=(50, classes)), random.integers(classes, size=50)
    confusion, five = np.zeros((classes, classes), int), 0
    for row, truth in zip(scores, labels):
        confusion[truth, row.argmax()] += 1
        five += truth in sorted(range(classes), key=lambda k: -row[k])[:5]
    found = mae.tally(torch.tensor(scores), torch.tensor(labels))
    np.testing.assert_array_equal(found[0].numpy(), confusion)
    assert found[1].tolist() == [five] and (five == 50) == (classes <= 5)

@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_measure_every_labelled_picture_once_and_add_up(world, monkeypatch):
    torch.manual_seed(0)
    labels = torch.randint(-1, 7, (101,))                                                # −1: not labelled
    data = common.Pictures(torch.randint(256, (101, 3, 8, 8), dtype=torch.uint8), labels, "abcdefg")
    model, seen, shares = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(192, 7)), [], []
    watch = model.register_forward_pre_hook(lambda module, given: seen.extend(given[0].flatten(1)))
    monkeypatch.setattr(common.dist, "all_reduce", lambda total: shares.append(total.clone()))
    for rank in range(world):
        run = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False), rank=rank,
                              world=world, micro=8)
        found = mae.measure(model.train(), data, run, SimpleNamespace(size=8))
        assert model.training                                                            # goes on as before
    watch.remove()
    images, confusion, five = data.normalise(data.images)[labels >= 0], np.zeros((7, 7), int), 0
    with torch.no_grad():
        for truth, row in zip(labels[labels >= 0].tolist(), model.eval()(images).tolist()):  # without dropout
            confusion[truth, np.argmax(row)] += 1
            five += row[truth] in sorted(row)[2:]
    each = {tuple(image.tolist()) for image in seen}
    assert len(seen) == len(each) == len(images) and each == {tuple(image.tolist()) for image in images.flatten(1)}
    if world == 1:
        assert found[:2] == (np.trace(confusion) / len(images), five / len(images)) and not shares
        np.testing.assert_array_equal(found[2].numpy(), confusion)
    else:
        np.testing.assert_array_equal(sum(shares[::2]).numpy(), confusion)
        assert sum(shares[1::2]).tolist() == [five] and len(shares) == 2 * world

# ------------------------------------------------------------------------------------------------------------- classifiers

def classifier_args(task, **options):
    return SimpleNamespace(**dict(task=task, size=8, patch=4, channels=3, vit=dict(dim=16, depth=3, heads=2), pool="mean",
                                  drop_path=0.0, train_blocks=None, seed=0) | options)

def learning(vit):
    return {name for name, p in vit.named_parameters() if p.requires_grad}

@pytest.mark.parametrize("pool, norm", [("mean", "fc_norm"), ("cls", "norm")])
def test_what_learns_in_each_task(pool, norm):
    assert learning(mae.classifier(classifier_args("probe", pool=pool), 5)) == {"head.1.weight", "head.1.bias"}
    vit = mae.classifier(classifier_args("finetune", pool=pool), 5)
    everything = {name for name, _ in vit.named_parameters()}
    assert learning(vit) == everything and "pos_embed" in everything
    for blocks in range(4):
        wanted = {name for name in everything if name.split(".")[0] in (norm, "head")
                  or name.startswith("blocks.") and int(name.split(".")[1]) >= 3 - blocks}
        assert learning(mae.classifier(classifier_args("finetune", pool=pool, train_blocks=blocks), 5)) == wanted
    with pytest.raises(common.Problem, match="--train-blocks 4.* 3"):
        mae.classifier(classifier_args("finetune", train_blocks=4), 5)

@pytest.mark.parametrize("task, std", [("probe", 0.01), ("finetune", 2e-5)])
def test_heads_start_small_and_the_seed_decides_them(task, std):
    one, two, other = (mae.classifier(classifier_args(task, seed=seed), 1000).state_dict() for seed in (3, 3, 4))
    name = "head.1" if task == "probe" else "head"
    weight = one[f"{name}.weight"]
    assert weight.std().item() == pytest.approx(std, rel=0.03)                           # 16,000 numbers: 5 standard errors
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(16_000) and not one[f"{name}.bias"].any()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not torch.equal(weight, other[f"{name}.weight"])

def test_a_probe_stands_behind_a_batch_norm_without_weights():
    head = mae.classifier(classifier_args("probe"), 5).head
    x = torch.randn(64, 16) * 5 + 3
    normal = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(x), normal @ head[1].weight.T + head[1].bias, rtol=1e-4, atol=1e-6)
    assert head[0].eps == 1e-6 and not list(head[0].parameters())

RECIPES = {  # the paper's tables 9 to 11 and section A.1: what --data FOLDER chooses
    "--task finetune": dict(model="base", lr=5e-4, layer_decay=0.65, drop_path=0.1, epochs=100, batch=1024, warmup=5.0, crop=0.08,
                            min_lr=1e-6, label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9, erasing=0.25, pool="mean",
                            size=224, weight_decay=0.05),
    "--task finetune --model large": dict(lr=1e-3, layer_decay=0.75, drop_path=0.2, epochs=50, batch=1024, label_smoothing=0.1),
    "--task finetune --model huge": dict(lr=1e-3, layer_decay=0.75, drop_path=0.3, epochs=50, batch=1024),
    "--task probe": dict(lr=0.1, epochs=90, batch=16384, warmup=10.0, pool="cls", drop_path=0.0, label_smoothing=0.0, mixup=None,
                         cutmix=None, randaugment=None, erasing=None, layer_decay=1.0, min_lr=0.0),
    "--task probe --model large": dict(lr=0.1, epochs=50),
    "--task probe --model huge --epochs 7": dict(lr=0.1, epochs=7),
    "--task finetune --lr 3 --mixup 0": dict(lr=3.0, mixup=0.0, cutmix=1.0),
    "": dict(lr=1.5e-4, epochs=800, batch=4096, warmup=40.0, norm_pixels=True, min_lr=0.0),
}

@pytest.mark.parametrize("words", RECIPES)
def test_on_a_folder_of_pictures_every_task_follows_the_paper(words, tmp_path):
    args = vars(common.settings(mae.options(), mae.preset, ["--data", "/pictures", *words.split()]))
    assert {name: args[name] for name in RECIPES[words]} == RECIPES[words]

@pytest.mark.parametrize("name", ["base", "large", "huge"])
def test_a_file_chooses_the_recipe_of_its_size(name, tmp_path):
    vit, words = common.VITS[name], ["--data", "/pictures", "--task", "finetune"]
    state = {"patch_embed.proj.weight": torch.zeros(vit["dim"], 3, vit["patch"], vit["patch"]),
             "pos_embed": torch.zeros(1, 257, vit["dim"])}
    torch.save(state | {f"blocks.{k}.norm1.bias": torch.zeros(1) for k in range(vit["depth"])}, tmp_path / "a.pth")
    said, found = (vars(common.settings(mae.options(), mae.preset, [*words, *more]))
                   for more in (["--model", name], ["--init", str(tmp_path / "a.pth")]))
    for option in ("lr", "layer_decay", "drop_path", "epochs", "batch", "mixup", "pool"):
        assert found[option] == said[option], option
    assert found["vit"] == {part: vit[part] for part in ("dim", "depth", "heads")} and found["size"] == 16 * vit["patch"]

@pytest.mark.parametrize("flags", ["--layer-decay 1.1", "--drop-path -0.1", "--label-smoothing 2", "--erasing 1.5", "--mixup -1",
                                   "--cutmix -1", "--mixup nan", "--min-lr -1", "--labels 0", "--train-blocks -1",
                                   "--randaugment 31", "--drop-path nan", "--randaugment -1"])
def test_options_of_evaluation_have_bounds(flags):
    with pytest.raises(common.Problem, match=f"{flags.split()[0]} must"):
        common.settings(mae.options(), mae.preset, ["--task", "finetune", *flags.split()])

# ------------------------------------------------------------------------------------------------------------ a run, whole

def test_a_run_leaves_what_the_design_says(uninterrupted):
    out, output, errors = uninterrupted
    assert {path.name for path in out.iterdir()} == {"last.pt", "log.jsonl", "args.json", "reconstruction.png"}
    assert not errors and "\r" not in output
    assert sum(line.startswith("epoch ") for line in output.splitlines()) == EPOCHS
    *epochs, judged = log_of(out)
    assert [(line["epoch"], line["step"]) for line in epochs] == [(e, e * STEPS) for e in range(1, EPOCHS + 1)]
    assert all(line["images_per_s"] > 0 for line in epochs)
    assert 0 < epochs[0]["seconds"] < epochs[1]["seconds"] < epochs[2]["seconds"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    accuracies = [judged[f"{judge}_{when}"] for judge in ("knn", "linear") for when in ("trained", "untrained")]
    assert all(0 <= value <= 1 for value in accuracies) and len(set(accuracies)) > 1
    assert json.loads((out / "args.json").read_text())["batch"] == BATCH
    sheet = torchvision.io.decode_image(str(out / "reconstruction.png"))
    assert sheet.shape[0] == 3 and sheet.float().std() > 10                              # something is drawn

def test_the_learning_rate_follows_the_schedule(uninterrupted):
    warmup, total = WARMUP * STEPS, EPOCHS * STEPS
    for line in log_of(uninterrupted[0])[:-1]:
        step = line["step"] - 1                                                          # the last one of the epoch
        share = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        assert line["lr"] == pytest.approx(LR * BATCH / 256 * share, rel=1e-6)

def test_a_checkpoint_is_plain_tensors_and_loads_into_the_same_model(uninterrupted):
    checkpoint = saved(uninterrupted[0])                                                 # weights_only=True
    assert {"encoder", "decoder", "optimizer", "step", "args"} <= checkpoint.keys()
    assert checkpoint["step"] == EPOCHS * STEPS and checkpoint["args"]["model"] == "nano"
    sizes = {name: value for name, value in common.VITS["nano"].items() if name != "patch"}
    encoder = common.ViT(32, 8, 3, **sizes)
    encoder.load_state_dict(checkpoint["encoder"])                                       # strict
    common.Decoder(encoder, 32, 1, 4).load_state_dict(checkpoint["decoder"])
    assert len(checkpoint["optimizer"]["state"]) == sum(p.requires_grad for p in encoder.parameters()) + sum(
        not name.endswith("pos_embed") for name in checkpoint["decoder"])

def test_a_finished_run_resumed_changes_nothing(tmp_path, cli):
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / "pictures" / part / name).mkdir(parents=True)
        paint_folder(tmp_path / "pictures" / part / name, 16)
    for flags in (["--data", tmp_path / "pictures", *QUICK], ["--resume"]):
        code, output, errors = cli("--out", tmp_path / "run", *flags)
        assert code == 0 and not errors and re.search(r"knn.*\d\.\d", output)
        assert [line.get("epoch") for line in log_of(tmp_path / "run")] == [1, 2, 2]     # the accuracies once, at the end
        assert "knn_trained" in log_of(tmp_path / "run")[-1] and step_of(tmp_path / "run") == 4

# ------------------------------------------------------------------------------------------- killed, stopped, and resumed

def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(uninterrupted, tmp_path):
    """Saved in the middle of an epoch and killed in the next: then the log is ahead of the checkpoint."""
    out = tmp_path / "run"
    finish(start(out, *SCENES, end=(STEPS - 10, STEPS + 10, signal.SIGKILL)), -signal.SIGKILL)
    assert step_of(out) == STEPS - 10 and [line["step"] for line in log_of(out)] == [STEPS]
    output, errors = finish(start(out, "--resume"))                                      # with the options of before
    assert not errors
    assert_same_training(uninterrupted[0], out)
    assert log_of(out)[-1].keys() == log_of(uninterrupted[0])[-1].keys()                 # and the accuracies at its end

def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start_with_its_options(pictures, tmp_path, cli):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert cli("--data", pictures, *QUICK, "--out", whole)[0] == 0
    out.mkdir()
    (out / "args.json").write_bytes((whole / "args.json").read_bytes())                  # which is written first
    code, _, errors = cli("--data", pictures, *QUICK, "--out", out)
    assert code == 2 and "--resume" in one_line(errors)
    code, _, errors = cli("--resume", "--out", out)
    assert code == 0 and not errors
    assert_same_training(whole, out)
    (out / "last.pt").unlink()
    (out / "args.json").write_text('{"data": ')
    code, _, errors = cli("--resume", "--out", out)
    assert code == 2 and "args.json is cut off" in one_line(errors)

def test_a_run_on_a_folder_stopped_twice_resumes_to_the_same_weights_bit_for_bit(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    paint_folder(images, 160)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    for step, number, flags in ((13, signal.SIGTERM, ["--data", images, *FOLDER]), (25, signal.SIGINT, ["--resume"])):
        output, errors = finish(start(out, *flags, end=(0, step, number)), 128 + number)
        assert f"step {step} " in output.splitlines()[-1] and "--resume" in output.splitlines()[-1] and not errors
        assert step_of(out) == step
    finish(start(out, "--resume"))
    finish(start(whole, "--data", images, *FOLDER))
    assert_same_training(whole, out)

def test_two_processes_stopped_and_resumed_train_what_one_does(uninterrupted, tmp_path):
    out = tmp_path / "run"
    output, _ = finish(start(out, *SCENES, processes=2, end=(0, STEPS + 10, signal.SIGTERM)), None)
    assert output.count("--resume") == 1                                                 # said by one of them
    assert step_of(out) == STEPS + 10

    finish(start(out, "--resume", processes=2))
    assert {path.name for path in out.iterdir()} == {path.name for path in uninterrupted[0].iterdir()}
    one, two = saved(uninterrupted[0]), saved(out)
    for part in ("encoder", "decoder"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=1e-5)              # sums in another order, in float32
    one, two = epochs_of(uninterrupted[0]), epochs_of(out)
    assert [(line["epoch"], line["lr"]) for line in one] == [(line["epoch"], line["lr"]) for line in two]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)

# ------------------------------------------------------------------------------------------------------------ single options

def test_every_option_of_the_design_is_there_and_help_is_grouped(cli):
    code, output, _ = cli("--help")
    assert code == 0
    words = """--crops --checkpoint-blocks
               --data --root --out --model --size --patch --epochs --batch --micro-batch --lr --warmup --weight-decay --workers
               --seed --precision --compile --resume --overwrite --device --limit --mask-ratio --masking --norm-pixels --crop
               --task --init --eval --labels --train-blocks --pool --layer-decay --drop-path --mixup --cutmix --erasing --min-lr
               --randaugment --label-smoothing"""
    assert all(re.search(rf"{word}\b", output) for word in words.split())
    assert len(re.findall(r"^\w+:$", output, re.MULTILINE)) >= 4
    assert [mae.options().parse_args(flags).compile for flags in ([], ["--compile"], ["--no-compile"])] == [None, True, False]

def test_a_run_from_before_there_were_crops_goes_on_with_one_and_no_other(pictures, tmp_path, cli):
    whole, old = tmp_path / "whole", tmp_path / "old"
    assert cli("--data", pictures, *QUICK, "--out", whole)[0] == 0
    finish(start(old, "--data", pictures, *QUICK, end=(0, 4, signal.SIGTERM)), 128 + signal.SIGTERM)
    checkpoint = saved(old)
    del checkpoint["args"]["crops"]
    torch.save(checkpoint, old / "last.pt")
    code, _, errors = cli("--resume", "--crops", 2, "--out", old)
    assert code == 2 and "the run to resume has --crops 1, not 2" in one_line(errors)
    code, _, errors = cli("--resume", "--out", old)
    assert code == 0 and not errors
    assert_same_training(whole, old)

def test_a_small_run_repeats_and_the_seed_changes_it(pictures, tmp_path, cli):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, _, errors = cli("--data", pictures, *QUICK, "--seed", seed, "--out", tmp_path / name)
        assert code == 0 and not errors
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c") and len(losses(tmp_path / "a")) == 2

@pytest.mark.parametrize("flags", ["--masking block", "--masking grid", "--crop 0.5", "--mask-ratio 0.5", "--no-compile",
                                   "--micro-batch 4", "--limit 32", "--batch 128", "--decoder-depth 0", "--crops 2",
                                   "--checkpoint-blocks"])
def test_an_option_trains_to_another_finite_loss(pictures, tmp_path, cli, flags):
    plain, other = tmp_path / "plain", tmp_path / "other"
    for out, extra in (plain, []), (other, flags.split()):
        code, _, errors = cli("--data", pictures, *QUICK, "--crop", 1, *extra, "--out", out)
        assert code == 0 and not errors
    assert all(0 < loss < 10 for loss in losses(other)) and len(losses(other)) == 2
    same = ("--no-compile", "--checkpoint-blocks")                                       # as a CPU runs anyway; only memory
    assert (losses(plain) == losses(other)) == (flags in same)
    assert_finite(other)

def test_bf16_trains_close_to_fp32(pictures, tmp_path, cli):
    for precision in ("fp32", "bf16"):
        assert cli("--data", pictures, *QUICK, "--precision", precision, "--out", tmp_path / precision)[0] == 0
    fp32, bf16 = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert fp32 != bf16                                                                  # it did round
    assert bf16 == pytest.approx(fp32, rel=0.05)                                         # eight bits are 0.4 %, in eight steps

def test_normalised_pixels_weigh_a_flat_picture_like_any_other(pictures, tmp_path, cli):
    loss = {}
    for switch in ("--norm-pixels", "--no-norm-pixels"):
        assert cli("--data", pictures, *QUICK, "--lr", 0, "--crop", 1, switch, "--out", tmp_path / switch)[0] == 0
        loss[switch] = losses(tmp_path / switch)[0]
    images = torch.stack([torchvision.io.decode_image(str(path)) for path in sorted(pictures.iterdir())])
    power = common.Files([], [], []).normalise(images).square().mean().item()
    # Both start from one prediction p: E(p − t)² differs by the targets' power, 1 against that of the pixels, and by 2·E(p·t).
    assert loss["--norm-pixels"] - loss["--no-norm-pixels"] == pytest.approx(1 - power, abs=0.35)

# -------------------------------------------------------------------------------------------------------------- evaluation

def test_knn_measures_what_pre_training_did_at_its_end(uninterrupted, tmp_path, cli):
    judged = log_of(uninterrupted[0])[-1]
    flags = ["--task", "knn", "--limit", STEPS * BATCH, "--device", "cpu"]
    for name, words in (("trained", ["--init", uninterrupted[0] / "last.pt"]), ("untrained", SMALL)):
        code, output, errors = cli(*flags, *words, "--out", tmp_path / name)
        assert code == 0 and not errors
        line, = log_of(tmp_path / name)
        assert line["task"] == "knn" and 0 < line["top1"] <= line["top5"] <= 1
        assert line["top1"] == pytest.approx(judged[f"knn_{name}"], abs=1e-6)            # a mean in float32
        assert f"top-1 {line['top1']:.4f}" in output and len(line["class_accuracy"]) == 10

@pytest.mark.parametrize("task", ["probe", "finetune"])
@pytest.mark.parametrize("scratch", [False, True])
def test_a_classifier_trains_and_its_best_is_measured_again_the_same(task, scratch, labelled, trained, tmp_path, cli):
    words = SMALL if scratch else ["--init", trained / "last.pt"]
    out, again = tmp_path / "run", tmp_path / "again"
    code, output, errors = cli("--data", labelled, "--task", task, *words, *TASK, "--out", out)
    assert code == 0 and not errors
    assert {path.name for path in out.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "args.json"}
    *epochs, last = log_of(out)
    assert [line["epoch"] for line in epochs] == [1, 2, 3] and {line["top5"] for line in epochs} == {1}   # three classes
    assert last["task"] == task and last["top5"] == 1 and last["top1"] == epochs[-1]["top1"]
    best = torch.load(out / "best.pt", weights_only=True)
    assert last["best_top1"] == max(line["top1"] for line in epochs) == best["top1"]
    assert best["step"] == next(line["step"] for line in epochs if line["top1"] == best["top1"])     # the first of equals
    assert last["top1"] == pytest.approx(sum(last["class_accuracy"]) / 3, abs=1e-4)      # as many of each class
    table = [line.split() for line in output.splitlines()[-4:]]
    assert table[0] == ["truth", "blue", "green", "red"] and [int(row[1 + k]) / 6 for k, row in enumerate(table[1:])] == \
        pytest.approx(last["class_accuracy"], abs=1e-4)

    for group in saved(out)["optimizer"]["param_groups"]:
        if task == "probe":
            assert (group["trust"], group["momentum"]) == (0.001, 0.9)
        else:
            assert tuple(group["betas"]) == (0.9, 0.999) and group["weight_decay"] in (0.0, 0.05)

    code, _, errors = cli("--data", labelled, "--task", task, "--eval", *TASK, "--init", out / "best.pt", "--out", again)
    line, = log_of(again)
    assert code == 0 and not errors and line["top1"] == last["best_top1"] and line["task"] == task
    assert {path.name for path in again.iterdir()} == {"log.jsonl", "args.json"}

@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("flags", ["--task probe", "--task finetune --train-blocks 0", "--task finetune --train-blocks 1",
                                   "--task finetune"])
def test_what_does_not_learn_does_not_move(flags, pool, labelled, trained, tmp_path, cli):
    words = ["--data", labelled, *flags.split(), "--init", trained / "last.pt", *TASK, "--pool", pool]
    assert cli(*words, "--out", tmp_path)[0] == 0
    before, after = saved(trained)["encoder"], saved(tmp_path)["encoder"]
    moved = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    norm = {"norm.weight", "norm.bias"} & after.keys()                                   # the mean has a new one
    last = {name for name in before if name.startswith("blocks.3.")}
    assert moved == {"probe": set(), "0": norm, "1": norm | last, "finetune": before.keys() & after.keys()}[flags.split()[-1]]
    assert ("norm.weight" in after) == (pool == "cls")

def test_mixed_pictures_get_the_share_of_each_class_and_smoothing_after(trained, tmp_path, cli, monkeypatch):
    folder, real, seen = class_folders(tmp_path / "plain", contrast=0), mae.classifier, []

    def classifier(args, classes):
        vit = real(args, classes)
        vit.register_forward_pre_hook(lambda module, given: seen.append([given[0]]) if module.training else None)
        return vit

    def cross_entropy(scores, targets, **how):
        loss = whole(scores, targets, **how)
        seen[-1].extend([scores.detach(), targets, loss.detach()])
        return loss
    whole = torch.nn.functional.cross_entropy
    monkeypatch.setattr(mae, "classifier", classifier)
    monkeypatch.setattr(mae.F, "cross_entropy", cross_entropy)
    flags = "--mixup 0.8 --cutmix 1 --randaugment 0 --erasing 0 --label-smoothing 0.1".split()
    code, _, errors = cli("--data", folder, "--task", "finetune", "--init", trained / "last.pt", *TASK, *flags,
                          "--out", tmp_path / "out")
    assert code == 0 and not errors and len(seen) == 9
    tints = torch.tensor([TINTS[name] for name in sorted(TINTS)]).float() + 100
    colours, kinds = common.Files([], [], []).normalise(tints[:, :, None, None])[:, :, 0, 0], set()     # (K, C)
    for images, scores, targets, loss in seen:
        assert targets.shape == (16, 3) and ((targets > 0).sum(1) <= 2).all() and 0 <= targets.min()
        torch.testing.assert_close(targets.sum(1), torch.ones(16))
        torch.testing.assert_close(images.mean((2, 3)), targets @ colours, rtol=0, atol=1e-3)    # pictures of one colour
        smooth, log_share = 0.9 * targets + 0.1 / 3, scores.log_softmax(1)
        torch.testing.assert_close(loss, -(smooth * log_share).sum(1).mean(), rtol=1e-5, atol=0)
        kinds.add(bool((images.std((2, 3)) > 1e-3).any()))                               # cutmix leaves an edge, mixup none
    assert kinds == {True, False}

PLAIN = ["--task", "finetune", *TASK,
         *"--mixup 0 --cutmix 0 --erasing 0 --randaugment 0 --label-smoothing 0 --layer-decay 1 --drop-path 0 --crop 1".split()]

@pytest.fixture(scope="module")
def plain(labelled, trained, tmp_path_factory):
    """Fine-tuned with nothing of all that → its losses."""
    out = tmp_path_factory.mktemp("plain")
    mae.main(["--data", str(labelled), "--init", f"{trained}/last.pt", *PLAIN, "--out", str(out)])
    return losses(out)

@pytest.mark.parametrize("flags", ["--mixup 0.8", "--cutmix 1", "--erasing 1", "--randaugment 9", "--label-smoothing 0.1",
                                   "--layer-decay 0.5", "--drop-path 0.9", "--pool cls", "--train-blocks 1", "--min-lr 0.1",
                                   "--labels 4", "--crop 0.5", "--seed 1", "--no-compile"])
def test_an_option_of_fine_tuning_trains_to_another_finite_loss(flags, plain, labelled, trained, tmp_path, cli):
    code, _, errors = cli("--data", labelled, "--init", trained / "last.pt", *PLAIN, *flags.split(), "--out", tmp_path)
    assert code == 0 and not errors and all(0 < loss < 10 for loss in losses(tmp_path))
    assert (losses(tmp_path) == plain) == (flags == "--no-compile")                      # which is how a CPU runs anyway
    assert_finite(tmp_path)

def test_pictures_of_another_size_are_told_and_fine_tuned(labelled, trained, tmp_path, cli):
    code, output, errors = cli("--data", labelled, "--task", "finetune", "--init", trained / "last.pt", *TASK, "--size", 64,
                               "--out", tmp_path / "run")
    assert code == 0 and not errors and "positions resized from 4×4 to 8×8" in output
    assert saved(tmp_path / "run")["encoder"]["pos_embed"].shape == (1, 65, 128)

def test_two_processes_measure_what_one_does(uninterrupted, tmp_path, cli):
    flags = ["--task", "finetune", "--limit", 333, "--batch", 32, "--micro-batch", 16, "--device", "cpu"]
    code, _, _ = cli(*flags, "--init", uninterrupted[0] / "last.pt", "--epochs", 2, "--out", tmp_path / "run")
    assert code == 0
    flags += ["--eval", "--init", tmp_path / "run" / "best.pt"]
    output = cli(*flags, "--out", tmp_path / "one")[1]
    together, _ = finish(start(tmp_path / "two", *flags, processes=2))
    (one,), (two,) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert one == two and "of 333 pictures" in output
    assert output[output.index("finetune: top-1"):] == together[together.index("finetune: top-1"):]

def test_two_processes_measure_a_probe_as_it_is_saved(tmp_path, cli):
    words = ["--task", "probe", *SMALL, *"--limit 333 --batch 32 --micro-batch 16 --epochs 3 --device cpu".split()]
    finish(start(tmp_path / "two", *words, processes=2))
    assert cli(*words, "--init", tmp_path / "two" / "last.pt", "--eval", "--out", tmp_path / "one")[0] == 0
    assert log_of(tmp_path / "two")[-1]["class_accuracy"] == log_of(tmp_path / "one")[-1]["class_accuracy"]

def test_a_killed_fine_tuning_resumes_to_the_same_weights_bit_for_bit(uninterrupted, tmp_path, cli):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    flags = ["--task", "finetune", "--init", uninterrupted[0] / "last.pt", *"--limit 640 --epochs 3 --batch 32 --mixup 0.8 "
             "--cutmix 1 --erasing 0.2 --label-smoothing 0.1 --device cpu".split()]
    assert cli(*flags, "--out", whole)[0] == 0
    finish(start(out, *flags, end=(15, 30, signal.SIGKILL)), -signal.SIGKILL)            # best.pt is ahead of last.pt
    assert step_of(out) == 15 and (out / "best.pt").exists()
    output, errors = finish(start(out, "--resume"))
    assert not errors
    assert_same_training(whole, out)
    one, two = (torch.load(path / "best.pt", weights_only=True) for path in (whole, out))
    assert (one["top1"], one["step"]) == (two["top1"], two["step"]) and log_of(whole)[-1] == log_of(out)[-1]
    assert all(torch.equal(value, two["encoder"][name]) for name, value in one["encoder"].items())

@pytest.mark.parametrize("task", ["probe", "finetune"])
def test_a_finished_classifier_resumed_changes_nothing(task, labelled, trained, tmp_path, cli):
    words = ["--data", labelled, "--task", task, "--init", trained / "last.pt", *TASK]
    assert cli(*words, "--out", tmp_path)[0] == 0
    before = {name: content for name, content in contents(tmp_path).items() if name != "args.json"}
    code, output, errors = cli("--resume", "--out", tmp_path)
    assert code == 0 and not errors and f"{task}: top-1" in output
    assert {name: content for name, content in contents(tmp_path).items() if name != "args.json"} == before

DRAW = "--task reconstruct --device cpu --workers 0".split()

@pytest.mark.parametrize("switch, caption", [("--norm-pixels", "true mean and contrast"), ("--no-norm-pixels", "reconstruction")])
def test_a_reconstruction_is_the_one_pre_training_drew(switch, caption, labelled, tmp_path, cli, monkeypatch):
    titles, save = [], mae.save_sheet
    monkeypatch.setattr(mae, "save_sheet", lambda path, rows: (titles.append(list(rows)), save(path, rows)))
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    assert cli("--data", labelled, *QUICK, switch, "--out", run)[0] == 0
    code, output, errors = cli(*DRAW, "--init", run / "last.pt", "--data", labelled, "--out", drawn)
    assert code == 0 and not errors and "does not say" not in output
    assert (drawn / "reconstruction.png").read_bytes() == (run / "reconstruction.png").read_bytes()
    assert titles[0] == titles[1] and ("true mean" in titles[1][2]) == (switch == "--norm-pixels") and caption in titles[1][2]

def test_one_file_is_reconstructed(labelled, trained, tmp_path, cli, monkeypatch):
    sheets, save = [], mae.save_sheet
    monkeypatch.setattr(mae, "save_sheet", lambda path, rows: (sheets.append(rows), save(path, rows)))
    path = labelled / "train" / "red" / "003.png"
    code, _, errors = cli(*DRAW, "--init", trained / "last.pt", "--data", path, "--out", tmp_path)
    assert code == 0 and not errors and (tmp_path / "reconstruction.png").exists()
    original, masked, painted = sheets[0].values()
    assert original.shape == masked.shape == painted.shape == (1, 3, 32, 32)
    there = torchvision.io.decode_image(str(path)).float().mean((1, 2))
    torch.testing.assert_close(original.float().mean((0, 2, 3)), there, rtol=0, atol=4)  # its middle, resized
    patches = common.patchify((masked == original).float(), 8).mean(-1)
    assert (patches == 1).sum() == 4                                                     # of 16, a quarter stays
    seen = (patches == 1)[..., None]
    assert torch.equal(common.patchify(painted, 8) * seen, common.patchify(original, 8) * seen)
    assert not torch.equal(painted, original)

def test_pictures_to_draw_are_normalised_as_those_the_model_learned_from(labelled, trained, tmp_path, cli, monkeypatch):
    there, seen, paint = saved(trained), [], mae.MAE.paint
    there["args"] |= dict(mean=[100.0, 90.0, 80.0], std=[50.0, 40.0, 30.0])
    torch.save(there, tmp_path / "other.pt")
    monkeypatch.setattr(mae.MAE, "paint", lambda model, images, *more: (seen.append(images), paint(model, images, *more))[1])
    for name, path in (("usual", trained / "last.pt"), ("other", tmp_path / "other.pt")):
        assert cli(*DRAW, "--init", path, "--data", labelled, "--out", tmp_path / name)[0] == 0
    column = lambda numbers: torch.tensor(numbers)[:, None, None]
    pixels = common.Files([], [], [])
    pixels = seen[0] * pixels.std + pixels.mean
    torch.testing.assert_close(seen[1], (pixels - column([100.0, 90, 80])) / column([50.0, 40, 30]), rtol=0, atol=1e-4)

@pytest.mark.parametrize("flags, told", [([], True), (["--norm-pixels"], False), (["--no-norm-pixels"], False)])
def test_a_file_that_does_not_say_how_it_was_trained_is_drawn_with_a_word(flags, told, labelled, trained, tmp_path, cli):
    state = saved(trained)
    torch.save({"model": state["encoder"] | state["decoder"]}, tmp_path / "released.pth")
    words = ["--init", tmp_path / "released.pth", "--decoder-heads", 4, "--data", labelled, "--out", tmp_path / "out"]
    code, output, errors = cli(*DRAW, *words, *flags)
    assert code == 0 and not errors and ("does not say" in output) == told

@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pre_training_on_scenes_is_worth_its_time(seed, tmp_path):
    """Some five minutes a seed on two cores. Ten labels a class, and a probe on all of them."""
    finish(start(tmp_path / "run", "--seed", seed), seconds=1800)
    scratch = [f"--{name}={value}" for name, value in {"model": "nano", "size": 64, "patch": 8}.items()]
    found = {}
    for task, more in (("finetune", "--labels 10 --batch 20 --epochs 200".split()), ("probe", [])):
        for name, words in (("trained", ["--init", tmp_path / "run" / "last.pt"]), ("untrained", scratch)):
            finish(start(tmp_path / task / name, "--task", task, "--seed", seed, *more, *words), seconds=1800)
            found[task, name] = log_of(tmp_path / task / name)[-1]["top1"]
    assert found["finetune", "trained"] > found["finetune", "untrained"] + 0.03, found   # two standard errors are 0.02
    assert found["probe", "trained"] > found["probe", "untrained"] + 0.15, found

# ---------------------------------------------------------------------------------------------------------------- bad input

BAD = {  # what is wrong: options after the usual ones, and what the line must say
    "a path that is not there": ("--data {tmp}/nowhere", "nowhere"),
    "a file for a folder": ("--data {tmp}/file", "file"),
    "a folder without pictures": ("--data {tmp}/empty", "picture.*empty"),
    "a misspelt name": ("--data fashion-mnst", "fashion-mnist"),
    "a name that cannot be downloaded": ("--data mnist --root {tmp}/root", "mnist.*download"),
    "a size that does not divide": ("--size 30", "30.*8"),
    "a patch larger than the picture": ("--size 32 --patch 64", "64"),
    "mask ratio 0": ("--mask-ratio 0", "mask-ratio"),
    "mask ratio 1": ("--mask-ratio 1", "mask-ratio"),
    "mask ratio -1": ("--mask-ratio -1", "mask-ratio"),
    "mask ratio 1.5": ("--mask-ratio 1.5", "mask-ratio"),
    "mask ratio nan": ("--mask-ratio nan", "mask-ratio"),
    "no visible patch": ("--mask-ratio 0.999", "visible"),
    "an unknown option": ("--epoques 3", "epoques"),
    "an unknown model": ("--model giant", "giant"),
    "an unknown masking": ("--masking stripes", "stripes"),
    "a word for a number": ("--batch many", "many"),
    "no epochs": ("--epochs 0", "epochs"),
    "both at once": ("--resume --overwrite", "--overwrite"),
    "no batch": ("--batch 0", "batch"),
    "no pictures": ("--limit 0", "limit"),
    "a batch that does not divide": ("--batch 16 --micro-batch 5", "16.*5"),
    "a micro-batch larger than the batch": ("--batch 16 --micro-batch 32", "16.*32"),
    "no GPU": ("--device cuda", "GPU"),
    "an unknown device": ("--device abacus", "abacus"),
    "a decoder that does not divide into heads": ("--decoder-dim 30", "30"),
    "a decoder without heads": ("--decoder-heads 0", "head"),
    "crops of nothing": ("--crop 0", "crop"),
    "crops larger than the picture": ("--crop 1.5", "crop"),
    "less than no workers": ("--workers -1", "workers"),
    "a negative seed": ("--seed -1", "seed"),
    "an output below a file": ("--out {tmp}/file/below", "file"),
    "nothing to resume": ("--resume", "resume.*last.pt"),
}

@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(what, pictures, tmp_path, cli, monkeypatch):
    options, says = BAD[what]
    tmp = tmp_path / "in"
    (tmp / "empty" / "below").mkdir(parents=True)
    (tmp / "file").write_text("not a picture")
    (tmp / "empty" / "notes.txt").write_text("not a picture")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                                   # where nobody answers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, errors = cli("--data", pictures, *QUICK, "--out", tmp_path / "out", *options.format(tmp=tmp).split())
    assert code == 2 and re.search(says, one_line(errors)), errors
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]        # so that the next try may begin
    assert (tmp / "file").read_text() == "not a picture"

BAD_TASKS = {  # as above: options after --data and QUICK, and what the line must say
    "a checkpoint that is not there": ("--task finetune --init {tmp}/nowhere.pt", "no checkpoint .*nowhere.pt"),
    "a checkpoint cut off": ("--task probe --init {tmp}/cut.pt", "cut.pt is cut off"),
    "a folder for a checkpoint": ("--task knn --init {tmp}", "checkpoint"),
    "a checkpoint of something else": ("--task knn --init {tmp}/other.pt", "other.pt has no encoder"),
    "another patch": ("--task finetune --init {init} --patch 4", r"patch 8 \(here 4\)"),
    "another width": ("--task finetune --init {init} --model tiny", r"dim 128 \(here 192\), depth 4 \(here 12\)"),
    "other channels": ("--task probe --init {tmp}/grey.pt", r"channels 1 \(here 3\)"),
    "other channels to draw": ("--task reconstruct --init {tmp}/grey.pt", r"channels 1 \(here 3\)"),
    "a size that does not divide": ("--task finetune --init {init} --size 36", "36.*8"),
    "pictures without labels": ("--task finetune --data {pictures}", "--task finetune needs labelled"),
    "no pictures to validate": ("--task knn --data {labelled}/train", "--task knn needs labelled"),
    "more labels than there are": ("--task finetune --labels 17", "17 pictures.*blue 16"),
    "more blocks than there are": ("--task finetune --init {init} --train-blocks 99", "--train-blocks 99.* 4"),
    "a layer decay above 1": ("--task finetune --layer-decay 1.2", "--layer-decay"),
    "a magnitude beyond the scale": ("--task finetune --randaugment 40", "--randaugment"),
    "nothing to measure": ("--task finetune --eval", "--eval .*--init"),
    "nothing to measure in neighbours": ("--task knn --eval --init {init}", "--eval"),
    "no head to measure": ("--task finetune --eval --init {init}", "no whole finetune classifier"),
    "a head of another task": ("--task probe --pool mean --eval --init {tuned}", "no whole probe classifier"),
    "a head behind another norm": ("--task finetune --pool cls --eval --init {tuned}", "norm|pool"),
    "nothing to draw with": ("--task reconstruct", "reconstruct needs --init"),
    "no decoder to draw with": ("--task reconstruct --init {tuned}", "best.pt has no decoder"),
    "pre-training from a file": ("--init {init}", "--init does nothing here: it goes with --task knn or probe or"),
    "a mask for neighbours": ("--task knn --init {init} --mask-ratio 0.5", "--mask-ratio does .*--task pretrain or reconstruct"),
    "crops for neighbours": ("--task knn --init {init} --crops 2", "--crops does nothing here"),
    "layers that do not learn": ("--task probe --init {init} --layer-decay 0.7", "--layer-decay .*goes with --task finetune"),
    "a bank for a task": ("--task finetune --bank 10", "--bank .*goes with --task pretrain"),
    "an unknown task": ("--task guess", "guess"),
    "one picture at a time for a batch norm": ("--task probe --batch 1", "batch"),
}

@pytest.mark.parametrize("what", BAD_TASKS)
def test_bad_input_to_a_task_gets_one_line_and_writes_nothing(what, pictures, labelled, trained, tuned, tmp_path, cli):
    options, says = BAD_TASKS[what]
    whole, vit = (trained / "last.pt").read_bytes(), common.ViT(32, 8, 1, dim=128, depth=4, heads=4)
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    torch.save({"model": vit.state_dict() | common.Decoder(vit, 32, 1, 4).state_dict()}, tmp_path / "grey.pt")
    options = options.format(tmp=tmp_path, init=trained / "last.pt", tuned=tuned / "best.pt", pictures=pictures,
                             labelled=labelled)
    code, _, errors = cli("--data", labelled, *QUICK, "--out", tmp_path / "out", *options.split())
    assert code == 2 and re.search(says, one_line(errors)), errors
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]        # so that the next try may begin

@pytest.mark.parametrize("batch", [33, 1])
def test_a_batch_that_does_not_divide_among_the_processes_is_refused(batch, pictures, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(common.dist, "init_process_group", lambda *arguments, **options: None)
    code, _, errors = cli("--data", pictures, *QUICK, "--batch", batch, "--out", tmp_path / "out")
    assert code == 2 and re.search(rf"--batch {batch}.*2 process", one_line(errors))
    assert not (tmp_path / "out" / "args.json").exists()

def test_more_processes_than_gpus_are_refused(pictures, tmp_path, cli, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, errors = cli("--data", pictures, *QUICK, "--device", "cuda", "--out", tmp_path / "out")
    assert code == 2 and re.search("2 process.*1 GPU", one_line(errors))

def test_a_real_process_says_one_line_and_exits_with_two(tmp_path):
    output, errors = finish(start(tmp_path / "out", "--data", "nowhere/at/all"), 2)
    assert "nowhere/at/all" in one_line(errors) and not output

@pytest.fixture
def finished(pictures, tmp_path, cli):
    """A folder that holds a run."""
    assert cli("--data", pictures, *QUICK, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"

def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}

def test_a_folder_that_holds_a_run_is_not_overwritten_silently(finished, pictures, cli):
    before = contents(finished)
    code, _, errors = cli("--data", pictures, *QUICK, "--out", finished)
    assert code == 2 and re.search("--resume.*--overwrite", one_line(errors)) and contents(finished) == before
    code, _, errors = cli("--data", pictures, *QUICK, "--out", finished, "--overwrite", "--epochs", 1)
    assert code == 0 and not errors and len(losses(finished)) == 1 and saved(finished)["step"] == 4

@pytest.mark.parametrize("what", ["a path that is not there", "a folder without pictures", "a size that does not divide",
                                  "a decoder that does not divide into heads", "a batch that does not divide"])
def test_a_mistake_beside_overwrite_loses_nothing(what, finished, pictures, tmp_path, cli):
    before = contents(finished)
    (tmp_path / "empty").mkdir()
    options = BAD[what][0].format(tmp=tmp_path).split()
    code, _, errors = cli("--data", pictures, *QUICK, "--out", finished, "--overwrite", *options)
    assert code == 2 and one_line(errors)
    assert contents(finished) == before

@pytest.mark.parametrize("what", ["cut off", "empty", "text", "of something else", "a list"])
def test_a_bad_checkpoint_is_named_and_left_as_it_is(what, finished, pictures, cli):
    path = finished / "last.pt"
    whole = path.read_bytes()
    if what in ("of something else", "a list"):
        torch.save({"model": {}} if what == "of something else" else [1, 2], path)
    else:
        path.write_bytes({"cut off": whole[:len(whole) // 2], "empty": b"", "text": b"nothing of the kind\n" * 99}[what])
    before = contents(finished)
    code, _, errors = cli("--data", pictures, *QUICK, "--resume", "--out", finished)
    assert code == 2 and "last.pt" in one_line(errors) and contents(finished) == before

def test_resuming_a_run_of_another_script_is_refused_and_loses_nothing(finished, cli):
    before = contents(finished)
    for script in (automae, mixedae, mra):
        code, _, errors = cli("--resume", "--out", finished, script=script)
        assert code == 2 and re.search("error: .* holds a run of mae.py.*--out", errors) and errors.count("\n") == 1
        assert contents(finished) == before

@pytest.mark.parametrize("flags", ["--model tiny", "--patch 4", "--decoder-depth 2"])
def test_resuming_another_model_is_refused_and_loses_nothing(flags, finished, cli):
    before = contents(finished)
    code, _, errors = cli("--resume", "--out", finished, *flags.split())
    assert code == 2 and "last.pt" in one_line(errors) and contents(finished) == before

# --------------------------------------------------------------------------------------------------------------- bad luck

def full_disk(monkeypatch, out, saves):
    """Lets the first `saves` checkpoints through; later ones meet a full disk, half of them written."""
    whole, count = torch.save, [0]

    def save(state, file):
        count[0] += 1
        if count[0] > saves:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        whole(state, file)
    monkeypatch.setattr(torch, "save", save)

@pytest.mark.parametrize("disk", ["a failing writer", "a small tmpfs"])
def test_a_disk_that_fills_leaves_the_last_good_checkpoint(disk, pictures, tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(out)]               # holds one checkpoint of 10 MB, not two
    mounted = disk == "a small tmpfs" and os.name == "posix" and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if not mounted:                                                                  # without root the other way again
            full_disk(monkeypatch, out, saves=1)
        code, _, errors = cli("--data", pictures, *QUICK, "--epochs", 300, "--save-every", 0, "--out", out)
        assert code == 2 and "last.pt" in one_line(errors)
        assert_finite(out)
        assert 0 < step_of(out) < 1200
        assert {path.name for path in out.iterdir()} <= {"last.pt", "log.jsonl", "args.json"}    # no half-written one beside it
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=True)

@pytest.mark.parametrize("lr", ["1e6", "1e-2"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(lr, pictures, tmp_path, cli, monkeypatch):
    out, log = tmp_path / "out", common.Run.log
    if lr == "1e-2":                                                                     # else it comes by itself
        monkeypatch.setattr(common.Run, "log", lambda run, loss: log(run, loss=loss * (math.nan if run.step == 9 else 1)))
    code, _, errors = cli("--data", pictures, *QUICK, "--epochs", 20, "--save-every", 0, "--out", out, "--lr", lr)
    assert code == 2 and re.search("the loss is nan.*--lr" if lr == "1e-2" else "--lr", one_line(errors))
    assert lr == "1e6" or 0 < step_of(out) <= 9 and len(losses(out)) == 2
    if (out / "last.pt").exists():
        assert_finite(out)
    assert all(math.isfinite(loss) for loss in losses(out))

def test_weights_that_are_not_finite_are_not_saved(pictures, tmp_path, cli, monkeypatch):
    out, update = tmp_path / "out", common.Run.update

    def spoil(run, optimizer):
        update(run, optimizer)
        if run.step == 9:
            run.kept["decoder"].mask_token.data.fill_(math.nan)
    monkeypatch.setattr(common.Run, "update", spoil)
    monkeypatch.setattr(common.Run, "log", lambda run, loss: run.sums.update(loss=torch.ones(())))       # which does not see it
    code, _, errors = cli("--data", pictures, *QUICK, "--epochs", 20, "--save-every", 0, "--out", out)
    assert code == 2 and "weights are not finite at step" in one_line(errors)
    assert_finite(out)

def test_a_run_resumed_in_half_precision_starts_its_scale_anew(finished, cli):
    code, _, errors = cli("--resume", "--epochs", 3, "--precision", "fp16", "--out", finished)
    assert code == 0 and not errors and len(losses(finished)) == 3 and saved(finished)["scaler"]["scale"] > 0
    code, _, errors = cli("--resume", "--epochs", 4, "--precision", "fp32", "--out", finished)
    assert code == 0 and not errors and "scaler" not in saved(finished)

def test_a_warm_up_as_long_as_the_run_is_mentioned(pictures, tmp_path, cli):
    for epochs, said in ((1, True), (2, False)):
        code, output, _ = cli("--data", pictures, *QUICK, "--epochs", epochs, "--warmup", 1, "--out", tmp_path / str(epochs))
        assert code == 0 and ("--warmup 1 epochs are all of 1" in output) == said

def test_too_many_unreadable_pictures_stop_the_run_with_their_list(pictures, tmp_path, cli):
    images = tmp_path / "pictures"
    images.mkdir()
    for path in pictures.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "017.png").write_bytes(b"")
    (images / "042.png").write_bytes((pictures / "042.png").read_bytes()[:99])
    code, _, errors = cli("--data", images, *QUICK, "--out", tmp_path / "out")
    *listed, last = errors.splitlines()
    assert code == 2 and last.startswith("mae.py: error: ") and "1 %" in last
    assert {"017.png", "042.png"} >= {Path(line.strip()).name for line in listed if line.endswith(".png")} != set()
    assert "Traceback" not in errors
