"""Masked Autoencoders are Robust Data Augmentors (Xu, Li, Liu, Yang, Wang, Li; arXiv 2206.04846).

Augmentations made by hand are mild: a flip, a crop, another colour. MRA lets a small masked autoencoder, trained once without
labels, paint a part of each training picture anew. What it paints is like the picture and yet not in it. Which part? The frozen
encoder's own attention tells the object from its surroundings: the patches that its class token attends to least are hidden and
painted, so the object stays, its background is imagined afresh, and so does the label.

    images  ─┬─► ENCODER, all patches ─► attention ─► keep the most attended 60 % ─┐            kept patches as they were
    (B,C,H,W)│   frozen, 4 blocks        (B,H,N)      (B,n)                        │            │
             └─► patches ────────────────────────────────────────────► ENCODER ─► DECODER ─► painted ─► augmented ─► CLASSIFIER
                 (B,N,D)                                              (B,1+n,D)  (B,N,P·P·C)            (B,C,H,W)

    python mra.py                                              on two CPU cores, nothing to download: with and without MRA
    python mra.py --data fashion-mnist --labels 50 --augment mra+cutmix                     a small torchvision data set
    python mra.py --task semi --labels 4                       few labels, many pictures without; also --task fewshot, occlusion
    torchrun --nproc_per_node=8 mra.py --data /imagenet        the paper's recipe: ResNet-50, the augmentor trained first

Measured, first command (2 cores of an AMD EPYC, torch 2.15, seed 0): 5 min 53 s; accuracy 0.945 without MRA, 0.922 with it: on
scenes it does not help (README). `low` keeps 0.84 of the foreground as it was, `random` 0.59, `high` 0.28.
"""

import argparse, copy, difflib, os
from argparse import Namespace

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import distributed as dist, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from common import (Batches, Decoder, Judge, Problem, Run, ViT, adamw, build, check_ratio, decoder_of, entry, erase, fit,
                    keep_lowest, labelled, load_data, load_decoder, load_encoder, pixel_loss, read_checkpoint,
                    save_sheet, seed_of, settings, shared_options, take, unpatchify, visible, vit_of, weights_in)

# ------------------------------------------------------------------------------------------------------- masks, data and losses
# A strategy is a score for every patch, from attention (B, N); the lowest scores stay. `low` hides what is least attended to.

STRATEGIES = {"low": torch.neg, "high": lambda attention: attention, "random": torch.rand_like}

def long_tail(labels, imbalance, seed):
    """labels (M,) → picture numbers: of class c of K the share imbalance^(−c/(K−1)) stays, so that the first keeps all of its
    pictures and the last 1/imbalance (the usual protocol). At least one picture stays, `seed` decides which."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels, last, kept = labels[order], int(labels.max()), []
    for c in range(last + 1):
        found = order[labels == c]
        kept.append(found[:max(1, int(len(found) * imbalance ** (-c / max(1, last)) + 1e-9))])
    return torch.cat(kept)

def fixmatch_loss(weak, strong, threshold=0.95):
    """Logits (B, K) of two views → loss (), share of pictures that counted (): where the weak view is sure, its class is what the
    strong one should say. The mean is over all pictures, also those that do not count (FixMatch, 2001.07685)."""
    confidence, label = weak.detach().softmax(-1).max(-1)
    sure = (confidence >= threshold).float()
    return (F.cross_entropy(strong, label, reduction="none") * sure).mean(), sure.mean()

def episodes(labels, ways, shots, queries, count, seed):
    """labels (M,) → support (E, ways, shots) and query (E, ways, queries), picture numbers of `count` little tasks, in each of
    which no picture comes twice. Raises Problem when there are too few classes or pictures."""
    random, places = torch.Generator().manual_seed(seed), [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    if len(places) < ways or min(map(len, places)) < shots + queries:
        raise Problem(f"episodes of {ways} classes with {shots} + {queries} pictures each; there are {len(places)} classes left "
                      f"to test on, the smallest with {min(map(len, places), default=0)}: change --held-out, --ways or --queries")
    made = [torch.stack([places[c][torch.randperm(len(places[c]), generator=random)[:shots + queries]]
                         for c in torch.randperm(len(places), generator=random)[:ways].tolist()]) for _ in range(count)]
    return torch.stack(made).split([shots, queries], dim=2)

def nearest_centroid(support, query):
    """Features (E, ways, shots, D), (E, ways, queries, D), of length 1 → share of queries (E,) nearest to their class's mean."""
    distance = torch.cdist(query.flatten(1, 2), support.mean(2))                            # (E, ways·queries, ways)
    truth = torch.arange(query.shape[1], device=query.device).repeat_interleave(query.shape[2])
    return (distance.argmin(-1) == truth).float().mean(-1)

@torch.enable_grad()
def logistic_regression(support, query):
    """As `nearest_centroid`, by logistic regression with a penalty of half the squared weights, all episodes at once."""
    (E, ways, shots, D), many = support.shape, query.shape[2]
    x, y = support.flatten(1, 2), torch.arange(ways, device=support.device).repeat_interleave(shots).repeat(E)
    weights, bias = (torch.zeros(E, size, ways, device=x.device, requires_grad=True) for size in (D, 1))
    solver = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        total = F.cross_entropy((x @ weights + bias).flatten(0, 1), y, reduction="sum") + weights.square().sum() / 2
        total.backward()
        return total

    solver.step(loss)
    truth = torch.arange(ways, device=x.device).repeat_interleave(many)
    return ((query.flatten(1, 2) @ weights + bias).argmax(-1) == truth).float().mean(-1)

# ------------------------------------------------------------------------------------------------------------------- model

class Autoencoder(nn.Module):
    """MAE's: hides patches, encodes the rest, paints. Its targets are pixels as they are, since a picture is to come out (our
    choice)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images, scores, mask_ratio=0.75):
        """images (B, C, H, W), scores (B, N) → loss (), prediction (B, N, P·P·C), mask (B, N), 1 where hidden."""
        keep, restore, mask = keep_lowest(scores, visible(scores.shape[1], mask_ratio))       # (B, n), (B, N), (B, N)
        latent = self.encoder.encode(take(self.encoder.embed(images), keep))                # (B, 1+n, D) only what is visible
        prediction = self.decoder(latent, restore)                                          # (B, N, P·P·C) every place
        return pixel_loss(images, prediction, mask, self.encoder.patch, False), prediction, mask

class MRA(nn.Module):
    """A data augmentation: images (B, C, H, W) → images. Needs no labels, learns nothing, and leaves no gradient behind.

    Of each picture N − visible(N, mask_ratio) patches are painted anew: with `low` those that the frozen encoder's class token
    attends to least, with `high` most, with `random` any. The others stay as they were (our choice), or with `whole` are painted
    too. It happens to each picture with probability `apply`. `mean` and `std` (C,) say how images are normalised, in pixels 0 …
    255: nothing for the augmentor's own normalisation, 0 and 255 for images of 0 … 1. Results are valid pixels again.
    """

    def __init__(self, encoder, decoder, strategy="low", mask_ratio=0.4, apply=1.0, whole=False, mean=None, std=None, own=(0, 1)):
        super().__init__()
        check_ratio(Namespace(size=encoder.size, patch=encoder.patch, mask_ratio=mask_ratio))
        self.painter = Autoencoder(encoder, decoder).eval().requires_grad_(False)
        self.strategy, self.mask_ratio, self.probability, self.whole = STRATEGIES[strategy], mask_ratio, apply, whole
        own = [torch.as_tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in own]
        mean, std = (mine if given is None else torch.as_tensor(given, dtype=torch.float32).view(-1, 1, 1)
                     for given, mine in zip((mean, std), own))
        into = dict(scale=std / own[1], shift=(mean - own[0]) / own[1], low=-mean / std, high=(255 - mean) / std)
        for name, value in into.items():
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def load(cls, path, size=None, **how):
        """→ an MRA from a checkpoint of this script, of `mae.py --no-norm-pixels`, or of MAE's release. For pictures of another
        `size` its positions are resized. Raises Problem for one that predicts normalised pixels: those make no picture."""
        args, there = weights_in(path)[1], vit_of(path)
        if args.get("norm_pixels", args.get("norm_pix_loss")):
            raise Problem(f"{path} predicts pixels normalised patch by patch, which make no picture: train one with "
                          "mae.py --no-norm-pixels, or leave --augmentor out")
        encoder = ViT(**there | dict(size=size or there["size"]))
        decoder = Decoder(encoder, **decoder_of(path))
        load_encoder(encoder, path), load_decoder(decoder, path)
        own = [args.get(name) or usual for name, usual in (("mean", (123.675, 116.28, 103.53)), ("std", (58.395, 57.12, 57.375)))]
        return cls(encoder, decoder, own=own, **how)

    def attention(self, images):
        """images (B, C, H, W) → (B, N): the last block's attention from the class token, mean over the heads."""
        encoder = self.painter.encoder
        if images.shape[1:] != (encoder.channels, *encoder.size):
            raise Problem(f"the augmentor is for pictures of {(encoder.channels, *encoder.size)}, not {tuple(images.shape[1:])}: "
                          "load it with size=…")
        return self.painter.encoder.attention_map(images * self.scale + self.shift).float().mean(1)

    def spread(self, values):
        """(B, N) → (B, 1, H, W): every patch in its one value."""
        encoder = self.painter.encoder
        return unpatchify(values[..., None].expand(-1, -1, encoder.patch ** 2), encoder.patch, encoder.size)

    def paint(self, images, scores, mask_ratio):
        """images (B, C, H, W), scores (B, N) → what the autoencoder makes of the lowest scores, valid pixels (B, C, H, W), and
        mask (B, N), 1 where it did not see them."""
        _, painted, mask = self.painter(images * self.scale + self.shift, scores, mask_ratio)
        painted = unpatchify(painted.float(), self.painter.encoder.patch, self.painter.encoder.size)
        return ((painted - self.shift) / self.scale).clamp(self.low, self.high).to(images.dtype), mask

    @torch.no_grad()
    def forward(self, images):
        attention = self.attention(images)                                                  # (B, N)
        painted, mask = self.paint(images, self.strategy(attention), self.mask_ratio)       # (B, C, H, W), (B, N)
        anew = torch.rand(len(images), 1, device=images.device) < self.probability          # (B, 1) this picture at all?
        return torch.where(self.spread(anew & (mask.bool() | self.whole)), painted, images)

class Classifier(nn.Module):
    """images (B, C, H, W) → logits (B, K), by one of torchvision's classifiers, or `conv4`: four convolutions, a slim form
    of few-shot learning's usual net (ours). Features are what its last linear layer gets. Raises Problem for any other name."""

    def __init__(self, name, classes, channels, size):
        super().__init__()
        self.grey = channels == 1 and name != "conv4"
        known = [model for model in torchvision.models.list_models(module=torchvision.models)
                 if not model.startswith(("squeezenet", "googlenet", "inception"))]         # no linear layer; several answers
        if name not in ("conv4", *known):
            near = difflib.get_close_matches(name, ["conv4", *known], 1) or ["conv4, resnet18, resnet50, vit_b_16 …"]
            raise Problem(f"--classifier {name} is none that can be used here; did you mean {near[0]}?")
        try:
            if name == "conv4":
                blocks = [[nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
                           nn.MaxPool2d(2)] for inputs, outputs in ((channels, 32), (32, 32), (32, 64), (64, 64))]
                self.body = nn.Sequential(*sum(blocks, []), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
            else:
                how = {"image_size": size} if name.startswith("vit_") else {}
                self.body = torchvision.models.get_model(name, num_classes=classes, **how)
            self.body.eval()(torch.zeros(1, 3 if self.grey else channels, size, size))
        except (AssertionError, RuntimeError) as error:
            raise Problem(f"--classifier {name} takes no pictures of {size} pixels ({str(error)[:80]}): change one of them")
        last = [place for place, layer in self.body.train().named_modules() if isinstance(layer, nn.Linear)][-1]
        self.head = self.body.get_submodule(last)
        self.body.set_submodule(last, nn.Identity())

    def features(self, images):
        return self.body(images.expand(-1, 3, -1, -1) if self.grey else images)             # (B, D)

    def forward(self, images):
        return self.head(self.features(images))

# ---------------------------------------------------------------------------------------------------------------- training

def pretrain(args):
    """Trains the augmentor: MAE with pixel targets (our choice) and three quarters hidden, as in the paper."""
    run = Run(args)
    train, _ = load_data(args, run)
    encoder, decoder = build(args)
    optimizer = adamw(model := Autoencoder(encoder, decoder), args.weight_decay)
    wrapped, places = run.wrap(model), encoder.grid[0] * encoder.grid[1]                    # device, torch.compile, DDP
    run.keep(encoder=encoder, decoder=decoder, optimizer=optimizer)                         # in last.pt
    run.introduce(model, train)

    batches = Batches(train, run, args.size, args.crop)
    for step in run.steps(batches.per_epoch):
        for images, _, _ in batches.at(step):                                               # (b, C, H, W) a micro-batch
            with run.autocast():
                loss, _, _ = wrapped(images, torch.rand(len(images), places, device=run.device))
            run.backward(loss)
            run.log(loss=loss)
        run.update(optimizer)
    run.put("augmentor.pt", encoder=encoder.state_dict(), decoder=decoder.state_dict(), args=vars(args))

def make_augmentor(args, run):
    """→ the MRA for this data: --augmentor, or one trained before, or now, on all its pictures (of scenes always those of
    seed 0) and without labels. That is kept beside the other runs, for all of them."""
    path = args.augmentor
    if not path:
        name = os.path.basename((args.data or "scenes").rstrip("/")) + f"-{args.limit}" * bool(args.limit)
        folder = os.path.join(os.path.dirname(args.out), f"mra-augmentor-{name}")
        light = args.light | dict(out=folder, seed=0, mean=None, weight_decay=0.05, norm_pixels=False, micro_batch=None, crops=1,
                                  views=1)
        first = Namespace(**vars(args) | light)
        first.epochs = args.augmentor_epochs or first.epochs

        def make(first):
            run.say(f"first the augmentor, {first.epochs} epochs; kept in {folder}/augmentor.pt")
            pretrain(first)

        path = run.prepare(first, "augmentor.pt", ("data", "size", "patch", "vit", "decoder_dim", "decoder_depth",
                                                   "decoder_heads", "epochs", "batch", "lr"), make)
    mra = run.in_turn(lambda: MRA.load(path, args.size, strategy=args.mask_strategy, mask_ratio=args.mask_ratio, apply=args.apply,
                                     whole=args.whole, mean=args.mean, std=args.std))
    if mra.painter.encoder.channels != args.channels:
        raise Problem(f"the augmentor is for pictures of {mra.painter.encoder.channels} channel(s), these have {args.channels}")
    return run.wrap(mra)

AUGMENTS = ("none", "mra", "cutout", "cutmix", "mixup", "randaugment")

def augmentation(args, mra):
    """→ change, of single uint8 pictures (C, H, W), or None, and augment, of images (b, C, H, W) and labels (b,) on the device:
    what --augment names; RandAugment, then MRA, then what cuts or mixes. All come after crop and flip. Cutout is a square of half
    a side, mixup's alpha 0.2 (our choice)."""
    names = args.augment.split("+")
    mixes = [mix(alpha=alpha, num_classes=len(args.classes)) for name, mix, alpha in (
        ("cutmix", v2.CutMix, 1.0), ("mixup", v2.MixUp, 0.2)) if name in names]

    def augment(images, labels):
        images = mra(images) if "mra" in names else images
        if "cutout" in names:
            images = erase(images, 1.0, (0.25, 0.25), 1.0, noise=False)
        return v2.RandomChoice(mixes)(images, labels) if mixes else (images, labels)        # mixed labels are (b, K)

    return v2.RandAugment(2, 9, num_magnitude_bins=11) if "randaugment" in names else None, augment

def set_up(args, run):
    """→ MRA or None; with --baseline what the same task comes to without it, in OUT/baseline, or None; classifier; optimizer."""
    torch.manual_seed(args.seed)
    model = Classifier(args.classifier, len(args.classes), args.channels, args.size).to(memory_format=torch.channels_last)
    if run.micro < 2 and args.task != "semi" and any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        raise Problem("BatchNorm needs two pictures at once: a larger --batch or --micro-batch")
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)
    names, plain = args.augment.split("+"), None
    mra = make_augmentor(args, run) if "mra" in names else None
    if args.baseline and mra:
        rest = "+".join(sorted({*names} - {"mra"})) or {"semi": "randaugment"}.get(args.task, "none")
        first = Namespace(**vars(args) | dict(augment=rest, baseline=False, out=f"{args.out}/baseline"))
        run.say(f"for comparison without MRA, --augment {rest}:")
        plain = read_checkpoint(run.prepare(first, "result.pt", (
            "task", "augment", "data", "limit", "labels", "size", "classifier", "seed", "epochs", "batch", "lr", "warmup", "crop",
            "crops", "weight_decay", "imbalance", "unlabelled", "threshold", "ema", "held_out", "ways", "shots", "queries",
            "episodes", "copies"),
            lambda first: run.put("baseline/result.pt", result=TASKS[args.task](first), args=vars(first))))["result"]
    run.say(f"--augment {args.augment}:")
    return mra, plain, model, optimizer

def conclude(result, plain, mra, data, run, args):
    """Draws what MRA does to pictures, and says what it changed → result."""
    if mra and run.rank == 0:
        draw(mra, data, run, args)
    if plain is not None:
        run.say(f"accuracy without MRA {plain:.3f}, with MRA {result:.3f}")
        run.write(task=args.task, top1=result, top1_without_mra=plain)
    return result

def learn(wrapped, optimizer, batches, augment, run, judge=None):
    """Trains a classifier on augmented pictures."""
    for step in run.steps(batches.per_epoch):
        for images, labels, _ in batches.at(step):                                          # (b, C, H, W), (b,) a micro-batch
            with run.autocast():
                images, labels = augment(images, labels)                                    # MRA leaves labels as they are
                loss = F.cross_entropy(wrapped(images), labels)
            run.backward(loss)
            run.log(loss=loss)
        run.update(optimizer)
        if judge:
            judge.after_step(step)

def supervised(args):
    """--task supervised: a classifier on labelled pictures, all or --labels of each class, or a long tail (--imbalance)."""
    run = Run(args)
    train, val = labelled(args, run, args.labels)
    if args.imbalance > 1:
        train.pick(long_tail(train.labels, args.imbalance, args.seed))
    mra, plain, model, optimizer = set_up(args, run)
    wrapped = run.wrap(model)
    run.keep(classifier=model, optimizer=optimizer)
    run.introduce(model, train)
    change, augment = augmentation(args, mra)
    batches = Batches(train, run, args.size, args.crop, change)
    judge = Judge(model, val, run, args, batches.per_epoch, classifier=model)
    learn(wrapped, optimizer, batches, augment, run, judge)
    result = judge.finish(**by_size(judge, train) if args.imbalance > 1 else {})
    return conclude(result, plain, mra, val, run, args)

def by_size(judge, train):
    """→ accuracy on classes of many (over 100), medium and few (under 20) training pictures, as long-tail papers count."""
    confusion, counts = judge.result()[2].cpu(), torch.bincount(train.labels.cpu(), minlength=len(train.classes))
    right = confusion.diag() / confusion.sum(1).clamp(min=1)
    groups, tested = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}, confusion.any(1)
    return {f"{name}_shot": right[group & tested].mean().item() for name, group in groups.items() if (group & tested).any()}

def semi(args):
    """--task semi: FixMatch. A few pictures have labels; of the others, those the classifier is sure of teach it to say the same
    of a strong view, which MRA paints from the weak one."""
    args.views = 1 + 2 * args.unlabelled                                                    # pictures, for each labelled one
    run = Run(args)
    train, val = labelled(args, run, all_=True)
    taught = copy.copy(train)
    taught.pick((taught.labels >= 0).nonzero()[:, 0])
    taught.few(args.labels, args.seed)
    mra, plain, model, optimizer = set_up(args, run)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True).to(run.device)
    wrapped = run.wrap(model)
    run.keep(classifier=averaged.module, mean=averaged, model=model, optimizer=optimizer)           # the mean is what is measured
    run.introduce(model, train)

    change, augment = augmentation(args, mra)
    many = Batches(train, run, args.size, args.crop, times=args.unlabelled)
    few = Batches(taught, run, args.size, args.crop, steps=args.epochs * many.per_epoch)
    judge = Judge(averaged, val, run, args, many.per_epoch, classifier=averaged.module)
    for step in run.steps(many.per_epoch):
        for (images, labels, _), (weak, _, _) in zip(few.at(step), many.at(step)):          # (b, C, H, W), (u·b, C, H, W)
            strong = weak
            if change:                                                                      # RandAugment; FixMatch adds Cutout
                pixels = (weak * train.std + train.mean).round().clamp(0, 255).byte()
                strong = train.normalise(torch.stack([change(image) for image in pixels]))
            with run.autocast():                                                            # RandAugment's grids want fp32
                strong, _ = augment(strong, None)
                scores = wrapped(torch.cat([images, weak, strong])).split([len(images), len(weak), len(strong)])
                agreed, sure = fixmatch_loss(*scores[1:], args.threshold)                   # of (u·b, K), twice
                loss = F.cross_entropy(scores[0], labels) + agreed                          # of (b, K)
            run.backward(loss)
            run.log(loss=loss, unlabelled_loss=agreed, sure=sure)
        run.update(optimizer)
        averaged.update_parameters(model)
        judge.after_step(step)
    return conclude(judge.finish(), plain, mra, val, run, args)

def of_classes(data, chosen):
    """→ a copy of a data set with only these classes, numbered anew."""
    data, number = copy.copy(data), torch.full((len(data.classes),), -1)
    number[chosen] = torch.arange(len(chosen))
    data.pick((number[data.labels.cpu()] >= 0).nonzero()[:, 0])
    data.labels, data.classes = number[data.labels.cpu()], [data.classes[k] for k in chosen]
    return data

def fewshot(args):
    """--task fewshot: learns some classes, then tells --ways others apart from --shots pictures each, in hundreds of episodes."""
    run = Run(args)
    train, val = labelled(args, run, args.labels)
    order = torch.randperm(len(train.classes), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = args.held_out or len(order) // 2
    if len(order) - held_out < 2:
        raise Problem(f"--held-out {held_out} of {len(order)} classes leaves none to tell apart in training: hold out fewer")
    train, val = of_classes(train, sorted(order[held_out:])), of_classes(val, sorted(order[:held_out]))
    tasks = {shots: episodes(val.labels, args.ways, shots, args.queries, args.episodes, args.seed) for shots in args.shots}
    args.classes = train.classes
    mra, plain, model, optimizer = set_up(args, run)
    wrapped = run.wrap(model)
    run.keep(classifier=model, optimizer=optimizer)
    run.introduce(model, train)
    change, augment = augmentation(args, mra)
    learn(wrapped, optimizer, Batches(train, run, args.size, args.crop, change), augment, run)

    model.eval()
    views, found = [[] for _ in range(1 + args.copies)], {}                                 # as they are, then as in training
    for k, view in enumerate(views):
        plan = ((part, seed_of(args.seed, k, i)) for i, part in enumerate(torch.arange(len(val)).split(250)))
        for images, _, _ in val.stream(plan, run, args.size, args.crop if k else None):
            with run.autocast(), torch.no_grad():
                images = mra.forward(images) if mra and k else images                       # not compiled: the last are fewer
                view.append(model.features(images).float().cpu())
    views = F.normalize(torch.stack([torch.cat(view) for view in views], dim=1), dim=-1)    # (M, views, D)
    for shots, (support, query) in tasks.items():
        support, query = views[support].flatten(2, 3), views[query][:, :, :, 0]             # (E, ways, shots·views, D)
        for method in (nearest_centroid, logistic_regression):
            name, right = method.__name__, method(support, query)                           # (E,)
            found[f"{name}_{shots}"] = mean, spread = right.mean().item(), 1.96 * right.std().item() / len(right) ** 0.5
            run.say(f"{args.ways}-way {shots}-shot, {name}: {mean:.4f} ± {spread:.4f} (95 %, {len(right)} episodes)")
    result = found[f"nearest_centroid_{max(tasks)}"][0]
    run.write(step=run.step, task=args.task, top1=result, held_out=val.classes, **found)
    return conclude(result, plain, mra, val, run, args)

def drop(mra, images, scores, share):
    """images (B, C, H, W), scores (B, N) → the same without a share of their patches, those of highest score: these become 0, the
    mean colour."""
    mask = keep_lowest(scores, scores.shape[1] - round(share * scores.shape[1]))[2]         # (B, N)
    return torch.where(mra.spread(mask) > 0, 0.0, images)

@torch.no_grad()
def occlusion(args):
    """--task occlusion: how the classifiers of --compare fall as patches are dropped from the pictures they are tested on: first
    those that the augmentor attends to least (`low`) or most (`high`), or any. All classifiers see the same."""
    run = Run(args)
    _, val = labelled(args, run)
    models = {}
    for path in args.compare:
        saved = read_checkpoint(path)
        old = saved.get("args", {})
        if "classifier" not in saved or not {"augment", "mean", "std"} <= old.keys() or any(
                old.get(name) != getattr(args, name) for name in ("size", "classes", "channels")):
            raise Problem(f"{path} is no classifier of these pictures: name the best.pt of a supervised or semi run on them")
        model = Classifier(old["classifier"], len(args.classes), args.channels, args.size)
        try:
            model.load_state_dict(saved["classifier"])
        except RuntimeError:
            raise Problem(f"{path} is not whole, or of another version: its weights are not a {old['classifier']}'s")
        mean, std = (torch.tensor(old[name])[:, None, None] for name in ("mean", "std"))    # its own
        into = [number.to(run.device) for number in (val.std / std, (val.mean - mean) / std)]
        models[f"{old['augment']} ({path})"] = model.eval().to(run.device), *into
    mra = make_augmentor(args, run)
    run.keep()                                                                              # no checkpoint, only args.json

    torch.manual_seed(args.seed + run.rank)
    right = torch.zeros(len(STRATEGIES), len(models), 10, device=run.device)
    index = torch.arange(len(val))[val.labels.cpu() >= 0]
    plan = [(part, k) for k, part in enumerate(index[run.rank::run.world].split(250))]
    for images, labels, _ in val.stream(plan, run, args.size):
        with run.autocast():
            attention = mra.attention(images)                                               # (b, N)
            for s, score in enumerate(STRATEGIES.values()):
                scores = score(attention)                                                   # (b, N)
                for tenth in range(10):
                    seen = drop(mra, images, scores, tenth / 10)
                    for m, (model, scale, shift) in enumerate(models.values()):
                        right[s, m, tenth] += (model(seen * scale + shift).argmax(1) == labels).sum()
    if run.world > 1:
        dist.all_reduce(right)
    right = (right.cpu().double() / len(index)).tolist()
    curves = {strategy: dict(zip(models, lines)) for strategy, lines in zip(STRATEGIES, right)}
    for strategy, lines in curves.items():
        for name, line in lines.items():
            run.say(f"{name}, {strategy}, 0 … 90 % dropped: " + " ".join(f"{top1:.3f}" for top1 in line))
    run.write(task=args.task, **curves)
    if run.rank == 0:
        save_curves(f"{run.out}/occlusion.png", curves)
        run.say(f"curves: {run.out}/occlusion.png")

TASKS = {"supervised": supervised, "semi": semi, "fewshot": fewshot, "occlusion": occlusion}

# ---------------------------------------------------------------------------------------------------------------- pictures

@torch.no_grad()
def draw(mra, data, run, args, count=10):
    """Writes OUT/augmentation.png: pictures, attention, and what MRA makes of them with each strategy and with several ratios.
    Where the data know their foreground, says and logs how much of it each strategy leaves as it was."""
    index = torch.linspace(0, len(data) - 1, min(250, len(data))).round().long()
    images, _, masks = next(data.stream([(index, 0)], run, args.size))
    torch.manual_seed(args.seed)
    pixels, stays = lambda x: (x[:count] * data.std + data.mean).clamp(0, 255).byte(), {}
    attention = mra.attention(images)                                                       # (B, N)
    light = mra.spread(attention / attention.amax(1, keepdim=True))[:count].expand(-1, args.channels, -1, -1)
    rows = {"original": pixels(images), "attention": (255 * light).byte()}
    for strategy, ratio in (*((name, args.mask_ratio) for name in STRATEGIES), ("low", 0.2), ("low", 0.6), ("low", 0.8)):
        painted, mask = mra.paint(images, STRATEGIES[strategy](attention), ratio)
        hidden, title = mra.spread(mask) > 0, f"{strategy}{' attention' * (strategy != 'random')}, {ratio:.0%}"
        if ratio == args.mask_ratio:
            rows |= {f"{title}: hidden": pixels(torch.where(hidden, 0.0, images)), f"{title}: reconstruction": pixels(painted)}
            if masks is not None:
                there = F.adaptive_avg_pool2d(masks.float(), mra.painter.encoder.grid).flatten(1)    # (B, N) share of foreground
                stays[strategy] = (((1 - mask) * there).sum() / there.sum()).item()
        rows[f"{title}: augmented"] = pixels(torch.where(hidden, painted, images))
    save_sheet(f"{run.out}/augmentation.png", rows)
    run.say(f"pictures: {run.out}/augmentation.png")
    if stays:
        run.say("foreground left as it was: " + ", ".join(f"{name} {share:.2f}" for name, share in stays.items()))
        run.write(task=args.task, foreground_kept=stays)

def save_curves(path, panels, side=360):
    """Writes a PNG: under each title lines {name: accuracies (0 … 1) at 0, 10 … 90 % dropped}, and below whose is which."""
    names, font = list(next(iter(panels.values()))), ImageFont.load_default(13)
    sheet = Image.new("RGB", (len(panels) * side, side + 20 * len(names)), "white")
    pen, hue = ImageDraw.Draw(sheet), lambda k: f"hsl({360 * k // len(names)}, 80%, 40%)"
    for p, (title, lines) in enumerate(panels.items()):
        at = lambda x, y, left=p * side: (left + 40 + x / 0.9 * (side - 60), 30 + (1 - y) * (side - 60))
        pen.text((p * side + 40, 6), f"{title}: accuracy, 0 … 90 % of the patches dropped", "black", font)
        for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            pen.line([at(0, tick), at(0.9, tick)], "lightgrey")
            pen.text((p * side + 12, at(0, tick)[1] - 8), f"{tick}", "black", font)
        for k, line in enumerate(lines.values()):
            pen.line([at(tenth / 10, y) for tenth, y in enumerate(line)], hue(k), 3)
    for k, name in enumerate(names):
        pen.text((40, side - 8 + 20 * k), name, hue(k), font)
    sheet.save(path)

# ------------------------------------------------------------------------------------------------------------ command line

NANO = dict(model="nano", decoder_dim=64, decoder_depth=2, decoder_heads=4, classifier="conv4", crop=0.5)

PRESETS = {  # what --data selects, for every option left open; `light` is for the augmentor. Of imagenet the classifier's are the
             # paper's, but for the warm-up, and the rest ours
    "scenes": NANO | dict(size=64, patch=8, labels=50, epochs=60, batch=50, lr=0.5, warmup=2.0,
                          light=dict(epochs=3, batch=32, lr=1.6e-2, warmup=0.4, crop=1.0)),
    "small": NANO | dict(epochs=30, batch=128, lr=0.2, warmup=1.0,
                         light=dict(epochs=5, batch=64, lr=8e-3, warmup=0.5, crop=1.0)),
    "imagenet": dict(model="light", size=224, patch=16, decoder_dim=192, decoder_depth=2, decoder_heads=3, classifier="resnet50",
                     epochs=100, batch=256, lr=0.1, warmup=5.0, crop=0.08,
                     light=dict(epochs=200, batch=4096, lr=1.5e-4, warmup=40.0, crop=0.2)),
    "semi": dict(labels=25, epochs=4, batch=16, lr=0.5, warmup=0.2, ema=0.99, weight_decay=5e-4),
    "semi imagenet": dict(labels=100, epochs=300, batch=1024, lr=0.03, ema=0.999, weight_decay=3e-4),
    "fewshot": dict(labels=None, epochs=4, batch=50, lr=0.2, warmup=0.2),
    "fewshot imagenet": dict(),
}

def preset(args, kind):
    return dict(mean=None, weight_decay=1e-4, ema=0.999) | PRESETS[kind] | PRESETS.get(
        f"{args.task} {kind}", PRESETS.get(args.task, {})) | dict(baseline=kind == "scenes" and "mra" in args.augment)

def options():
    parser, add = shared_options("mra.py", "Trains a classifier on pictures that a masked autoencoder augments.", dict(
        epochs=100, batch=256, lr=0.1, warmup="5, ours", weight_decay=1e-4, decayed="all weights", crop=0.08,
        model="light, ours", decoder_dim="192, ours", decoder_depth="2, ours", decoder_heads="3, ours"))
    parser.set_defaults(weight_decay=None)
    switch = argparse.BooleanOptionalAction
    add["model"]("--mask-ratio", type=float, default=0.4, help="share of the patches that is painted anew (0.4, after the paper)")
    add["model"]("--mask-strategy", choices=STRATEGIES, default="low", help="which: those of low or high attention, or any (low)")
    add["model"]("--apply", type=float, default=1.0, help="probability that a picture is augmented (1, our choice)")
    add["model"]("--whole", action=switch, default=False,
                 help="kept patches too come from the decoder, which never learned them (off)")
    add["model"]("--augmentor", help="checkpoint of the masked autoencoder; left out: one is trained for this data, and kept")
    add["model"]("--augmentor-epochs", type=int, help="epochs of its training (3 on scenes); --model, --patch and --decoder-… "
                 "say what it is, --epochs, --batch, --lr and --warmup are the classifier's")

    task = parser.add_argument_group("task").add_argument
    task("--task", choices=TASKS, default="supervised", help="what to do (supervised)")
    task("--augment", default="mra", help=f"augmentations beside crop and flip, joined by +: {', '.join(AUGMENTS)} (mra)")
    task("--baseline", action=switch, help="first train the same without MRA (semi: with RandAugment) to compare (on: scenes)")
    task("--classifier", help="conv4, or a torchvision classifier: resnet50, vit_b_16 … (resnet50)")
    task("--labels", type=int, help="labelled pictures of each class (all; supervised scenes 50; semi 25, of folders 100)")
    task("--imbalance", type=float, default=1.0, help="supervised: the first class has so many times the last one's pictures (1)")
    task("--unlabelled", type=int, default=7, help="semi: unlabelled pictures for each labelled one (7)")
    task("--threshold", type=float, default=0.95, help="semi: how sure the classifier must be of a picture (0.95)")
    task("--ema", type=float, help="semi: share of the mean of the weights that a step keeps (0.999)")
    task("--held-out", type=int, help="fewshot: classes that are kept for the test (half of them)")
    task("--ways", type=int, default=5, help="fewshot: classes of an episode (5)")
    task("--shots", type=int, nargs="+", default=[1, 5], help="fewshot: labelled pictures of each (1 5)")
    task("--queries", type=int, default=15, help="fewshot: test pictures of each (15)")
    task("--episodes", type=int, default=600, help="fewshot: how many (600)")
    task("--copies", type=int, default=5, help="fewshot: views of each labelled picture that join it, cropped, flipped and "
         "painted by MRA as in training (5, our choice)")
    task("--compare", nargs="+", default=[], help="occlusion: best.pt of the classifiers")
    return parser

ONLY = (  # options that do something with these values of another only
    ("task", "supervised", "imbalance"),
    ("task", "supervised semi fewshot",
     "augment baseline classifier labels crop crops mask_ratio mask_strategy apply whole"),
    ("task", "semi", "unlabelled threshold ema"),
    ("task", "fewshot", "held_out ways shots queries episodes copies"),
    ("task", "occlusion", "compare"),
    ("augment", "mra", "mask_ratio mask_strategy apply whole augmentor augmentor_epochs"),
    ("augmentor", "None", "augmentor_epochs"),
)

def main(arguments=None):
    args = fit(settings(options(), preset, arguments, ONLY))
    for name in args.augment.split("+"):
        if name not in AUGMENTS or name == "none" and args.augment != "none":
            near = difflib.get_close_matches(name, AUGMENTS, 1)
            raise Problem(f"--augment {args.augment}: " + (f"did you mean {near[0]}?" if near and name != "none" else
                          f"none, or some of {', '.join(AUGMENTS[1:])} joined by +"))
    if args.baseline and "mra" not in args.augment.split("+") and not args.resume:
        raise Problem(f"--baseline compares with and without mra, which --augment {args.augment} leaves out")
    if args.task == "semi" and {"cutmix", "mixup"} & {*args.augment.split("+")}:
        raise Problem("--task semi compares two views of one picture: no cutmix or mixup there")
    if args.task == "fewshot" and min(args.shots) < 1:
        raise Problem(f"--shots {min(args.shots)}: an episode needs a labelled picture of each class")
    if args.task == "occlusion" and not args.compare:
        raise Problem("--task occlusion needs --compare, the best.pt of one classifier or several")
    if "mra" in args.augment.split("+") and not args.augmentor:
        check_ratio(args)
    TASKS[args.task](args)

if __name__ == "__main__":
    entry(main)
