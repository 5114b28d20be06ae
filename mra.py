"""Masked Autoencoders are Robust Data Augmentors
Haohang Xu, Shuangrui Ding, Xiaopeng Zhang, Hongkai Xiong, Qi Tian, 2022, https://arxiv.org/abs/2206.04846

Augmentations made by hand are mild: a flip, a crop. Here a small masked autoencoder, trained once without
labels, makes stronger ones. It hides a part of a training image and predicts the hidden pixels from the
rest; the classifier is trained on the result. What to hide is decided by the autoencoder's attention: the
patches that its class token attends to least. So the object should stay, and with it the label. The painted
background is not a new one. The decoder is deterministic and was trained on squared error, so it paints the
mean of all that could be there: a blurred version of the same background. The classifier then cannot rely on
details of the background.

    images ──┬──► ENCODER, all patches ──► attention ──► hide the least ──┐       visible: as they were
    (B,C,H,W)│    frozen, 4 blocks         (B,N)         attended 40 %    │                  │
             └──► patches ────────────────► visible 60 % ─► ENCODER ─► DECODER ─► hidden ────┴─► CLASSIFIER
                  (B,N,D)                   (B,n,D)         (B,1+n,D)  (B,N,P·P·C)   (B,C,H,W)

    python mra.py                             # scenes: what MRA does to images, and does the class stay?
    python mra.py --augment mra --baseline --out runs/two    # a classifier trained with MRA, and one without
    python mra.py --data fashion-mnist --labels 50 --augment mra cutmix --out runs/fashion     # both
    python mra.py --labels 1000 --imbalance 100 --augment mra --out runs/tail    # a long tail
    python mra.py --task semi                 # few labels, many images; also --task fewshot
    torchrun --nproc_per_node=8 mra.py --data /imagenet          # the paper's ResNet-50

Measured with the first command, seeds 0, 1 and 2, on one thread (of an AMD EPYC, seeds 1 and 2 of an Intel
Xeon): a classifier trained without MRA, tested on images with 40 % of the patches painted.

    patches painted        accuracy             probability of the       part of the objects
                                                true class               left visible
    none                   0.944 0.921 0.926    0.901 0.856 0.868        1
    low: least attended    0.923 0.793 0.900    0.865 0.705 0.828        0.89 0.48 0.97
    random                 0.691 0.757 0.706    0.622 0.654 0.619        0.59 0.59 0.59
    high: most attended    0.285 0.536 0.382    0.245 0.456 0.319        0.20 0.63 0.15

So the class survives best if the patches that are attended to most stay. But whether these show the object
depends on the augmentor. The mean attention, one map for all images, leaves 0.93 0.83 0.94 of the objects
visible: more than "low" with two of these seeds (detail 7).

Training on painted images did not help on whole images. CIFAR-10, 25 labels per class, a classifier that
over-fits, seeds 0, 1 and 2: 0.386 0.357 0.412 without MRA, 0.383 0.340 0.410 with --augment mra --apply 0.5.
It helped where patches are missing, the least attended first: 250 labels per class, half of the patches gone,
seeds 0 to 5: 0.354 0.328 0.358 0.329 0.422 0.426 without MRA, 0.399 0.391 0.405 0.413 0.504 0.456 with it.
Scenes with a mark on the background that misleads, seeds 0, 1 and 2: 0.824 0.692 0.773 without MRA, 0.735
0.607 0.588 with it, 0.878 0.828 0.841 with the true object in place of attention. So the idea holds, but the
attention of so small an augmentor does not find objects reliably. notebooks/mra.ipynb says what was run.

Details that matter
 1. The augmentor predicts pixels as they are, not normalised: its output is an image [not in the paper].
 2. Attention is computed with all patches visible: in the last block, from the class token, averaged over
    heads. The encoder then runs again on the visible patches alone, so that the decoder cannot copy what is
    hidden.
 3. Visible patches keep their pixels [not in the paper]. The loss was on hidden ones only, so the decoder's
    output for visible ones was never trained: see "reconstruction" in OUT/augmentation.png.
 4. Predictions can leave the range of pixels and are clipped to 0 … 255 [not in the paper].
 5. MRA works after crop and flip, on the device, on many images at once, without gradients.
 6. The augmentor in OUT/augmentor is trained on the crops it will paint: the same --crop [not in the paper].
    Of small data it sees 60,000 images, rounded up to whole epochs: little for photographs. --task
    augmentor with more --epochs trains longer, and --augmentor PATH takes the result.
 7. Nothing in the loss ties the class token's attention to the object. Some heads attend to objects, others
    to the background, or to the same places in every image (as on CIFAR-10), and in a small augmentor their
    mean may prefer the background: then "low" hides the object. If the data have maps of their objects, the
    augmentor's training ends by printing how much of the objects stays visible.
 8. In FixMatch (--task semi) the strong view of an image is not the same crop as the weak view.
 9. FixMatch's loss is a mean over all unlabelled images. Those of which the classifier is unsure count as 0.
10. FixMatch evaluates the moving average of the weights, batch norm's statistics included.
"""

import copy

from common import (                                                  # before torch: sets an OpenMP variable
    VITS, Decoder, ImageFolder, Run, Scenes, UserError, ViT, batches, decay_groups, entry, evenly_spaced,
    gather_tokens, label_objects, labels_of, learning_rate, load_decoder, load_encoder, number, parse_args,
    patchify, prepare_data, read_checkpoint, run_in_folder, save_image_rows, say, shared_options, to_pixels,
    training_plan, unpatchify)

import torch
import torch.nn.functional as F
import torchvision
from torch import distributed as dist
from torch import nn
from torchvision.models import list_models
from torchvision.transforms import v2

# -------------------------------------------------------------------------------------------------- masking
# A strategy turns attention (B, N) into a number for every patch. The n patches with the lowest numbers stay
# visible, so every strategy hides equally many in each image.

STRATEGIES = {
    "low": torch.neg,               # hides what is attended to least, the background: the paper's choice
    "random": torch.rand_like,      # hides any patches, as MAE does
    "high": torch.positive          # hides what is attended to most, the object
}


def hide(noise, mask_ratio):
    """noise (B, N) → ids_keep (B, n), ids_restore (B, N), mask (B, N): of every image this fraction of the
    patches is hidden, those with the highest noise. mask is 1 where a patch is hidden."""
    num_visible = int(noise.shape[1] * (1 - mask_ratio))              # n
    # argsort by noise shuffles the patches, visible ones first. The argsort of a permutation is its inverse:
    # ids_restore[i] is the place of patch i in the shuffled order. Without it predictions could not be put in
    # their places.
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= num_visible).float()
    return ids_shuffle[:, :num_visible], ids_restore, mask


# ---------------------------------------------------------------------------------------------------- model

class Autoencoder(nn.Module):
    """A light masked autoencoder: MAE with an encoder of four blocks (section 3)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images, noise=None, mask_ratio=0.75):
        """images (B, C, H, W) → loss (), prediction (B, N, P·P·C), mask (B, N) with 1 where a patch is
        hidden. noise (B, N): hide the patches where it is highest, instead of random ones."""
        # As in mae.py: embed all patches, drop the hidden ones, encode the rest, predict every patch.
        tokens = self.encoder.embed(images)                           # (B, N, D)
        if noise is None:
            noise = torch.rand(tokens.shape[:2], device=images.device)
        ids_keep, ids_restore, mask = hide(noise, mask_ratio)         # (B, n), (B, N), (B, N)
        latent = self.encoder.encode(gather_tokens(tokens, ids_keep))  # (B, 1+n, D), class token first
        prediction = self.decoder(latent, ids_restore)                # (B, N, P·P·C)

        # The squared error of the pixels themselves (detail 1), over hidden patches only.
        target = patchify(images, self.encoder.patch_size)            # (B, N, P·P·C)
        error = (prediction - target).square().mean(-1)               # (B, N)
        return (error * mask).sum() / mask.sum(), prediction, mask


class MRA(nn.Module):
    """The augmentation: images (B, C, H, W) → images (B, C, H, W) with hidden patches painted. It is
    frozen, and no gradient passes through it.

    mask_strategy: which patches are hidden; mask_ratio: what fraction of all; apply: the probability that an
    image is augmented. mean, std: lists of C numbers, the normalisation of incoming images in pixel values
    0 … 255; by default that of the augmentor's training. For images of 0 … 1: [0, 0, 0] and [255, 255, 255].
    Raises UserError for images of another size, or with other channels, than the augmentor's.
    """

    def __init__(self, encoder, decoder, mask_strategy="low", mask_ratio=0.4, apply=1.0, mean=None,
                 std=None):
        super().__init__()
        self.autoencoder = Autoencoder(encoder, decoder).eval().requires_grad_(False)
        self.mask_strategy = mask_strategy
        self.mask_ratio = mask_ratio
        self.probability = apply                                      # `apply` is a method of every module

        # Images may be normalised in another way than the augmentor's were. MAE's files do not say how; it
        # was with ImageNet's mean and std, which are ImageFolder's.
        trained_mean = encoder.mean or ImageFolder.mean
        trained_std = encoder.std or ImageFolder.std
        numbers = [mean or trained_mean, std or trained_std, trained_mean, trained_std]
        if any(len(row) != encoder.in_chans for row in numbers):
            raise UserError(f"the augmentor is for images of {encoder.in_chans} channels")
        self.register_buffer("normalisation", torch.tensor(numbers)[..., None, None])  # (4, C, 1, 1)

    @classmethod
    def load(cls, path, img_size=None, **options):
        """→ an MRA from a checkpoint of this script, of mae.py --no-norm-pixels, or of MAE's release. For
        another img_size positions are resized. Raises UserError for a file whose predictions make no
        image."""
        encoder = load_encoder(path, img_size)
        if encoder.norm_pixels:
            raise UserError(f"{path} predicts normalised pixels, no image: use mae.py --no-norm-pixels")
        return cls(encoder, load_decoder(path, encoder), **options)

    def renormalise(self, images):
        """Images as they come in → normalised as in the augmentor's training."""
        mean, std, trained_mean, trained_std = self.normalisation     # (C, 1, 1) each
        return (images * std + mean - trained_mean) / trained_std

    def attention(self, images):
        """images (B, C, H, W) → (B, N): how much the class token attends to each patch (detail 2)."""
        encoder = self.autoencoder.encoder
        if images.shape[1:] != (encoder.in_chans, *encoder.img_size):
            raise UserError(f"the augmentor is for images of {encoder.in_chans} channels and "
                            f"{encoder.img_size} pixels, not for {tuple(images.shape)}")
        return encoder.attention_map(self.renormalise(images)).mean(1)

    def per_pixel(self, values):
        """(B, N), one value per patch → (B, 1, H, W), one per pixel."""
        encoder = self.autoencoder.encoder
        return F.interpolate(values.unflatten(1, (1, *encoder.grid)), encoder.img_size)

    def paint(self, images, noise, mask_ratio):
        """images (B, C, H, W), noise (B, N) → the decoder's prediction as images (B, C, H, W), and
        bool (B, 1, H, W), true in the hidden patches: those with the highest noise."""
        _, prediction, mask = self.autoencoder(self.renormalise(images), noise, mask_ratio)
        painted = unpatchify(prediction, self.autoencoder.encoder.patch_size, images.shape[2:])
        mean, std, trained_mean, trained_std = self.normalisation
        pixels = (painted * trained_std + trained_mean).clamp(0, 255)  # detail 4
        return (pixels - mean) / std, self.per_pixel(mask) > 0

    @torch.no_grad()
    def forward(self, images):
        # Where is the object? Look at the whole image once, and hide what is attended to least, or as the
        # strategy says. Then look at the visible patches alone, and paint the image (detail 2).
        noise = STRATEGIES[self.mask_strategy](self.attention(images))  # (B, N)
        painted, hidden = self.paint(images, noise, self.mask_ratio)  # (B, C, H, W), (B, 1, H, W)

        # Take the painted pixels where patches were hidden (detail 3), in images drawn with the probability
        # `apply`.
        hidden &= torch.rand(len(images), 1, 1, 1, device=images.device) < self.probability
        return torch.where(hidden, painted, images)

    def drop(self, images):
        """images (B, C, H, W) → the same with hidden patches in the mean colour, not painted, for --task
        occlusion."""
        noise = STRATEGIES[self.mask_strategy](self.attention(images))  # (B, N)
        _, _, mask = hide(noise, self.mask_ratio)
        return torch.where(self.per_pixel(mask) > 0, 0.0, images)


def new_classifier(args):
    """→ --classifier: one of torchvision's for one or three channels, or "conv4", four convolutions as in
    few-shot learning, but narrower [not in the paper]."""
    if args.classifier != "conv4":
        model = torchvision.models.get_model(args.classifier, num_classes=args.num_classes)
        return nn.Sequential(v2.RGB(), model)                         # makes three channels of one
    layers = []
    widths = (args.in_chans, 32, 32, 64, 64)
    for pair in zip(widths, widths[1:]):
        layers += [torchvision.ops.Conv2dNormActivation(*pair), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, args.num_classes))


# ----------------------------------------------------------------------------------------- one training step

def train_step(run, model, optimizer, loader, loss_of):
    """What the augmentor's and the classifiers' training loops do in each step: --batch images from the
    loader, one update of the weights. loss_of(images (b, C, H, W), labels (b,)) → loss ()."""
    # Linear warm-up for --warmup epochs, then cosine decay to zero.
    lr = learning_rate(run.step, run.args.lr * run.args.batch / 256, run.warmup_steps, run.total_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr

    # A process takes its part of the batch in micro-batches, and the gradients add up.
    for i in range(run.accumulate):
        images, labels = next(loader)                                 # cropped, flipped, normalised
        model.require_backward_grad_sync = i == run.accumulate - 1    # DDP averages gradients once a step
        with run.autocast:
            loss = loss_of(images, labels)
        run.scaler.scale(loss / run.accumulate).backward()
        run.log(loss=loss)

    # Without fp16 the scaler does nothing, and this is an ordinary optimizer step.
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad()
    run.log(lr=lr)


# ----------------------------------------------------------------------------------- training the augmentor

def pretrain(args, train=None, val=None):
    """--task augmentor: trains the masked autoencoder, without labels, and draws what it does to images.
    args: as `main` makes them. train, val: datasets of your own, instead of --data, as all tasks take them:
    `main([…], train=…, val=…)`."""
    run = Run(args)
    train, val = prepare_data(args, run, train, val)
    torch.manual_seed(args.seed)
    encoder = ViT(args.size, args.patch, args.in_chans, **VITS[args.model])
    # Half as wide as the encoder, and of two blocks [not in the paper].
    decoder = Decoder(encoder, encoder.embed_dim // 2, 2, encoder.num_heads)
    args.vit, args.decoder = encoder.config, decoder.config
    model = Autoencoder(encoder, decoder)
    wrapped = run.wrap(model)                                         # on the device; compiled; DDP
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)

    ids = evenly_spaced(len(train), args.limit)
    run.start(len(ids), encoder=encoder, decoder=decoder, optimizer=optimizer, scaler=run.scaler)
    loader = batches(train, training_plan(ids, run), run, train=True)  # detail 6
    for _ in run.steps():
        # As MAE does, the autoencoder hides 75 % of the patches at random [from memory]. wrapped(…)[0] is the
        # loss.
        train_step(run, wrapped, optimizer, loader, lambda images, labels: wrapped(images)[0])
    if run.rank == 0:
        draw(MRA.load(f"{args.out}/last.pt").to(run.device), val or train, run)


@torch.no_grad()
def draw(mra, dataset, run):
    """Writes OUT/augmentation.png: images, attention, and what MRA makes of them, by strategy. If the
    data have maps of their objects, prints and logs how much of them stays visible."""
    args = run.args
    images, labels = next(batches(label_objects(dataset), [(evenly_spaced(len(dataset), 250), 0)], run))
    attention = mra.attention(images)                                 # (B, N)
    faded = images * mra.per_pixel(F.normalize(attention, torch.inf))  # 1 where it is highest
    rows = {"image": images, "attention: the image fades where it is low": faded}

    # One map for all images knows where objects mostly are. Attention has to do better (detail 7).
    noises = {name: strategy(attention) for name, strategy in STRATEGIES.items()}
    noises["mean map"] = -attention.mean(0).expand_as(attention)
    kept = {}
    for name, noise in noises.items():
        case = f"{name}, {args.mask_ratio:.0%}"
        painted, hidden = mra.paint(images, noise, args.mask_ratio)
        rows[f"{case}: hidden"] = torch.where(hidden, 0.0, images)
        rows[f"{case}: reconstruction"] = painted
        rows[f"{case}: augmented"] = torch.where(hidden, painted, images)
        if labels.ndim == 3:                                          # maps of the objects
            kept[case] = 1 - hidden[:, 0][labels > 0].float().mean().item()
            say(f"{case} hidden: {kept[case]:.2f} of the objects stays visible")
    save_image_rows(f"{args.out}/augmentation.png", {
        title: to_pixels(view[:10], args) for title, view in rows.items()})
    if kept:
        run.write_log(object_kept=kept)
        low, random, _, mean_map = kept.values()
        if low < max(random, mean_map):
            say("attention keeps no more of the objects than chance, or than one map for all images: "
                "train the augmentor longer, or with another --seed")


def make_augmentor(args, run, train, val):
    """→ the MRA of --augmentor, or of one that is trained on these data, in OUT/augmentor."""
    if args.augmentor is None:
        say(f"the augmentor comes first, in {args.out}/augmentor")
        run.clear("args.json")                                        # removes an older run from OUT
        run_in_folder(pretrain, args, "augmentor", train, val, **args.recipe)
        args.augmentor = f"{args.out}/augmentor/last.pt"
    return run.wrap(MRA.load(
        args.augmentor,
        args.size,
        mask_strategy=args.mask_strategy,
        mask_ratio=args.mask_ratio,
        apply=args.apply,
        mean=args.mean,
        std=args.std))


# ------------------------------------------------------------------------------------ training a classifier

def labelled_ids(dataset, classes, limit=None, labels=None, imbalance=1):
    """→ indices (m,) of images, class by class, at random within each: of the first `classes` classes all
    images among `limit`, or exactly `labels` of each, or a long tail. Raises UserError if there are too few,
    or no labels."""
    targets = labels_of(dataset or [])
    if (targets < 1).all():                                           # −1: unknown; class 0 alone is no task
        raise UserError("this needs folders train/CLASS and val/CLASS, or a torchvision name; "
                        "without labels there is --task augmentor")
    candidates = evenly_spaced(len(targets), limit)
    candidates = candidates[torch.randperm(len(candidates))]
    ids = []
    for k in range(classes):
        members = candidates[targets[candidates] == k][:labels]
        if labels and len(members) < labels:
            raise UserError(f"--labels {labels}: class number {k} (the first is 0) has {len(members)} images")
        # A long tail, as most papers cut it: class k keeps the part imbalance^(−k/(classes−1)) of its images,
        # at least one. If classes are equally large, the first has `imbalance` times as many as the last. The
        # 1e-9 is for rounding: a part that is 9.999… by rounding errors must become 10.
        part = imbalance ** (-k / (classes - 1))
        ids.append(members[:max(1, int(len(members) * part + 1e-9))])
    return torch.cat(ids)


def by_size(accuracy, counts):
    """Accuracy and number of training images of each class (K,) → mean accuracy of the classes with many
    images (over 100), medium, and few (under 20), as papers on long tails report it."""
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    return {
        f"{name}_shot": accuracy[group].nanmean().item()
        for name, group in groups.items()
        if (group & ~accuracy.isnan()).any()                          # has a class with validation images
    }


def augment(args, mra, images, labels=None):
    """images (b, C, H, W), labels (b,) → both, augmented as --augment says, but without RandAugment, which
    has to come before images are normalised. Mixed labels are (b, K); without labels nothing is mixed. Cutout
    is a square of half a side, mixup's alpha is 0.2 [not in the paper]."""
    if "mra" in args.augment:
        images = mra(images)                                          # detail 5
    if "cutout" in args.augment:
        cutout = v2.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
        images = torch.stack([cutout(image) for image in images])
    mixes = []
    if "cutmix" in args.augment:
        mixes.append(v2.CutMix(num_classes=args.num_classes))
    if "mixup" in args.augment:
        mixes.append(v2.MixUp(alpha=0.2, num_classes=args.num_classes))
    if mixes and labels is not None:                                  # FixMatch's views are not mixed
        images, labels = v2.RandomChoice(mixes)(images, labels)
    return images, labels


UNLABELLED_RATIO = 7                                 # FixMatch's μ: unlabelled images per labelled one


def fixmatch_loss(weak, strong, threshold=0.95):
    """Scores of two views (B, K) → loss (), part of the images that count (). Where the classifier is
    sure of the weak view, the class it finds there is the target for the strong view (FixMatch,
    2001.07685, equation 4; its threshold)."""
    confidence, pseudo_labels = weak.softmax(-1).max(-1)
    sure = (confidence >= threshold).float()                          # a comparison passes no gradient
    errors = F.cross_entropy(strong, pseudo_labels, reduction="none")
    return (errors * sure).mean(), sure.mean()                        # detail 9


@torch.no_grad()
def update_average(average, model, ema):
    """average ← ema · average + (1 − ema) · model, in place, statistics of batch norm included (detail
    10)."""
    for old, new in zip(average.state_dict().values(), model.state_dict().values()):
        if old.is_floating_point():
            old.lerp_(new, 1 - ema)


def classify(args, train=None, val=None):
    """Trains a classifier → its accuracy, on all validation images or in episodes.

    --task supervised: on augmented images, all that have labels, --labels of each class, or a long tail
    (--imbalance). --task semi: FixMatch, which learns from --labels images of each class, and from all
    images without their labels. --task fewshot: as supervised, but without the last --held-out classes,
    which are then recognised from one or five images each.
    """
    run = Run(args)
    train, val = prepare_data(args, run, train, val)
    args.num_classes = classes = int(labels_of(train).max()) + 1
    semi, fewshot = args.task == "semi", args.task == "fewshot"
    if fewshot:
        classes -= args.held_out or max(WAYS, classes // 2)
        if classes < 2 <= args.num_classes:
            raise UserError(f"--held-out: {classes} of {args.num_classes} classes would be left to train on "
                            f"(by default half are held out, at least {WAYS})")
    torch.manual_seed(args.seed)
    ids = labelled_ids(train, classes, args.limit, args.labels, args.imbalance)
    val_ids = labelled_ids(val, classes, args.limit)
    if fewshot:                                                       # too few? say so before training
        labels = labels_of(val)
        episodes(labels[labels >= classes], WAYS, 5, count=1)
    # On scenes or with --augmentor, MRA is evaluated even if it is not trained with, but not in episodes.
    needed = "mra" in args.augment or (not fewshot and (args.augmentor or isinstance(train, Scenes)))
    mra = make_augmentor(args, run, train, val) if needed else None
    rand_augment = v2.RandAugment(2, 9, num_magnitude_bins=11) if "randaugment" in args.augment else None

    torch.manual_seed(args.seed)
    model = new_classifier(args)
    wrapped = run.wrap(model)
    evaluated = copy.deepcopy(model) if semi else model               # FixMatch: a moving average (detail 10)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)

    all_ids = evenly_spaced(len(train), args.limit)
    run.start(
        len(all_ids) // UNLABELLED_RATIO if semi else len(ids),
        classifier=evaluated, model=model, optimizer=optimizer, scaler=run.scaler)
    loader = batches(train, training_plan(ids, run), run, train=True, augment=None if semi else rand_augment)
    # A step sees --batch labelled images. FixMatch adds UNLABELLED_RATIO times as many without labels, in two
    # views. The strong view has another seed, so it is another crop (detail 8). `v2.Identity()`, like
    # RandAugment, makes `batches` crop images one by one, not eight alike.
    if semi:
        strong_plan = ((part, seed + 1) for part, seed in training_plan(all_ids, run, UNLABELLED_RATIO))
        weak_loader = batches(train, training_plan(all_ids, run, UNLABELLED_RATIO), run, train=True)
        strong_loader = batches(train, strong_plan, run, train=True, augment=rand_augment or v2.Identity())

    def loss_of(images, labels):
        if not semi:
            images, labels = augment(args, mra, images, labels)       # MRA leaves the labels as they are
            return F.cross_entropy(wrapped(images), labels)

        # FixMatch. Labelled images are only cropped and flipped; the strong views are augmented. One forward
        # pass for all three, so that batch norm sees them together.
        weak, _ = next(weak_loader)                                   # (u·b, C, H, W)
        strong, _ = augment(args, mra, next(strong_loader)[0])
        scores = wrapped(torch.cat([images, weak, strong]))
        weak, strong = scores[len(images):].chunk(2)
        unlabelled_loss, sure = fixmatch_loss(weak, strong)
        run.log(unlabelled_loss=unlabelled_loss, sure=sure)
        return F.cross_entropy(scores[:len(images)], labels) + unlabelled_loss

    for step in run.steps():
        train_step(run, wrapped, optimizer, loader, loss_of)
        if semi:
            update_average(evaluated, model, args.ema)
        if len(val_ids) and run.should_evaluate(step, num_images=len(val_ids)):
            result, _ = evaluate(evaluated, val, val_ids, run)
            run.log(top1=result["top1"])
            model.train()

    if mra:
        mra.probability = 1.0                                         # from here on it paints every image
    if fewshot:
        result = evaluate_episodes(evaluated, mra, val, classes, run)
        classes = WAYS                                                # among so many an episode chooses
    else:
        result, per_class = evaluate(evaluated, val, val_ids, run)
        if args.imbalance > 1:
            result |= by_size(per_class, labels_of(train)[ids].bincount(minlength=classes))
        if mra:
            # Does MRA keep the class of an image? Then a classifier trained without it stays sure.
            if run.rank == 0:
                draw(mra, val, run)
            for strategy in STRATEGIES:
                mra.mask_strategy = strategy
                painted, _ = evaluate(evaluated, val, val_ids, run, mra.forward)
                result |= {f"{name}_painted_{strategy}": value for name, value in painted.items()}
    if args.baseline and "mra" in args.augment:
        # FixMatch needs a strong view. Without MRA it is RandAugment's, as in the original, but of fixed
        # strength and without Cutout [not in the paper].
        rest = [name for name in args.augment if name != "mra"] or ["randaugment" if semi else "none"]
        result["top1_without_mra"] = run_in_folder(classify, args, "baseline", train, val, augment=rest)
    say(f"{args.task}, --augment {' '.join(args.augment)}, accuracy by chance {1 / classes:.3f}:")
    say(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    run.write_log(step=run.step, task=args.task, **result)
    return result["top1"]


# ---------------------------------------------------------------------------------- evaluating a classifier

@torch.no_grad()
def evaluate(model, dataset, ids, run, transform=lambda images: images):
    """A classifier, and a transform of its images → accuracy "top1" and "confidence" (mean probability of the
    true class), and the accuracy of each class (K,), over all images and processes."""
    model.eval()
    totals = torch.zeros(3, run.args.num_classes, device=run.device)
    plan = [(part, 0) for part in ids[run.rank::run.world_size].split(250)]
    for images, labels in batches(dataset, plan, run):
        with run.autocast:
            probability = model.forward(transform(images)).float().softmax(1)  # (b, K)
        correct = probability.argmax(1) == labels
        confidence = probability.gather(1, labels[:, None])[:, 0]
        totals.index_add_(1, labels, torch.stack([correct, confidence, torch.ones_like(confidence)]))
    if run.world_size > 1:
        dist.all_reduce(totals)
    top1, confidence, _ = (totals.sum(1) / len(ids)).tolist()
    return dict(top1=top1, confidence=confidence), (totals[0] / totals[2]).cpu()


WAYS = 5                                              # classes of an episode, as in most papers on few labels


def episodes(labels, ways, shots, queries=15, count=600):
    """labels (M,) → support (E, ways, shots) and query (E, ways, queries): image indices of `count` small
    tasks. No image comes twice in a task. Raises UserError if there are too few classes or images."""
    members = (labels == labels.unique()[:, None]).float()            # (K, M), 1 where image m is of class k
    if len(members) < ways or members.sum(1).min() < shots + queries:
        raise UserError(f"{len(members)} classes held out are too few or too small: episodes need {ways}, "
                        f"each with {shots} + {queries} validation images; --held-out says how many")
    tasks = []
    for _ in range(count):
        classes = torch.randperm(len(members))[:ways]
        # Drawn without replacement, with equal probability for all images of a class.
        tasks.append(torch.multinomial(members[classes], shots + queries))
    return torch.stack(tasks).split([shots, queries], dim=2)


def nearest_centroid(support, query):
    """support (E, ways, shots, D), query (E, ways, queries, D), features of length 1 → accuracy (E,): a
    query belongs to the class whose mean feature is nearest."""
    distance = torch.cdist(query, support.mean(2)[:, None])           # (E, ways, queries, ways)
    truth = torch.arange(query.shape[1])[:, None]                     # (ways, 1)
    return (distance.argmin(-1) == truth).float().mean((1, 2))


@torch.no_grad()
def evaluate_episodes(model, mra, dataset, first, run):
    """→ mean accuracy of 600 episodes and half its 95 % interval, with one labelled image of each class and
    with five; top1 is the accuracy with five. The classes are those from `first` on, which the classifier
    was not trained on."""
    # Features are what the last linear layer receives.
    last = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
    model.eval().set_submodule(last, nn.Identity())
    labels = labels_of(dataset)
    ids = (labels >= first).nonzero()[:, 0]
    labels = labels[ids]

    # With MRA every support image is joined by one augmented version [not in the paper].
    features = []
    for images, _ in batches(dataset, [(part, run.args.seed) for part in ids.split(250)], run):
        views = [images]
        if mra:
            views.append(mra.forward(images))
        features.append(torch.stack([F.normalize(model.forward(view)).cpu() for view in views], 1))
    features = torch.cat(features)                                    # (M, 1 or 2 views, D)

    result = {}
    for shots in (1, 5):
        torch.manual_seed(run.args.seed)                              # the same episodes for all classifiers
        support, query = episodes(labels, WAYS, shots)
        # (E, ways, shots · views, D) and (E, ways, queries, D) → (E,)
        accuracy = nearest_centroid(features[support].flatten(2, 3), features[query, 0])
        result["top1"] = result[f"shots_{shots}"] = accuracy.mean().item()
        result[f"interval_{shots}"] = 1.96 * accuracy.std().item() / len(accuracy) ** 0.5
    return result


def occlusion(args, train=None, val=None):
    """--task occlusion: logs how the accuracy of the classifiers of --compare falls when 0, 10 … 90 % of
    the patches are dropped: those attended to least come first ("low"), or those attended to most
    ("high"), or any."""
    if not (args.compare and args.augmentor):
        raise UserError("--task occlusion needs --compare, the last.pt of classifiers, and --augmentor")
    run = Run(args)
    train, val = prepare_data(args, run, train, val)
    run.start()
    for path in args.compare:
        saved = read_checkpoint(path)
        if "classifier" not in saved or saved["args"]["size"] != args.size:
            raise UserError(f"{path} holds no classifier (name the last.pt of --task supervised or semi), "
                            f"or one for another --size")
        for name in ("classifier", "num_classes", "mean", "std"):
            setattr(args, name, saved["args"][name])
        torch.manual_seed(args.seed)                                  # the same images for all classifiers
        val_ids = labelled_ids(val, args.num_classes, args.limit)
        model = new_classifier(args).to(run.device)
        model.load_state_dict(saved["classifier"])
        mra = make_augmentor(args, run, train, val)
        for strategy in STRATEGIES:
            mra.mask_strategy = strategy
            curve = []
            for tenth in range(10):
                mra.mask_ratio = tenth / 10
                result, _ = evaluate(model, val, val_ids, run, mra.drop)
                curve.append(round(result["top1"], 4))
            say(f"{path}, {strategy}, 0 … 90 % dropped: {curve}")
            run.write_log(task=args.task, compare=path, strategy=strategy, accuracy=curve)


TASKS = {
    "supervised": classify,
    "semi": classify,
    "fewshot": classify,
    "occlusion": occlusion,
    "augmentor": pretrain
}

# --------------------------------------------------------------------------------------------- command line

# Defaults by kind of data and task; `preset` says which rows count. "imagenet" has the paper's classifier and
# its training [from memory]. All else is [not in the paper], including the augmentor's recipe: MAE's, for 200
# epochs. `ema` is the factor of the old weights in FixMatch's moving average.
PRESETS = {
    "scenes": dict(
        model="nano", crop=0.5,
        classifier="conv4", steps=600, batch=50, lr=0.5, weight_decay=1e-4,
        ema=0.99),
    "scenes augmentor": dict(steps=1875, batch=32, lr=1.6e-2, weight_decay=0.05),
    "supervised scenes": dict(labels=50, augment=["none"]),
    "small": dict(steps=2000),
    "scenes semi": dict(labels=25, steps=700, batch=16, weight_decay=5e-4),
    "imagenet": dict(
        model="light", crop=0.08, size=[224],
        classifier="resnet50", epochs=100, batch=256, lr=0.1, weight_decay=1e-4, warmup=5.0,
        ema=0.999),
    "imagenet augmentor": dict(
        epochs=200, batch=4096, lr=1.5e-4, warmup=40.0, weight_decay=0.05),
    "imagenet semi": dict(
        labels=100, epochs=300, batch=1024, micro_batch=16, lr=0.03, weight_decay=3e-4)
}


def preset(args, kind):
    """→ the defaults for a kind of data and the task in args. `recipe` holds those of the augmentor that has
    to be trained first: options for the classifier's training do not count for it."""
    # Small data use the rows of scenes, except "supervised scenes". Later rows override earlier ones.
    base = "imagenet" if kind == "imagenet" else "scenes"
    values = {}
    for row in (base, kind, f"{base} {args.task}", f"{args.task} {kind}"):
        values |= PRESETS.get(row, {})
    recipe = dict(task="augmentor", epochs=None, warmup=None, micro_batch=None)
    return values | dict(recipe=recipe | PRESETS[f"{base} augmentor"])


def options():
    """→ mra.py's parser."""
    parser = shared_options("Augments images with a masked autoencoder, and trains classifiers on them.")
    count, fraction = number(int, 1), number(float, 0, 1)
    add = parser.add_argument_group("mra").add_argument
    add("--task", choices=TASKS, default="supervised", help="what to do")
    add("--mask-ratio", type=fraction, default=0.4,
        help="fraction of patches to paint (paper: 0.4 [from memory])")
    add("--mask-strategy", choices=STRATEGIES, default="low",
        help="hide patches of low or high attention, or any (paper: low)")
    add("--apply", type=fraction, default=1.0,
        help="probability that MRA paints an image (1 is [not in the paper])")
    add("--augmentor", help="a masked autoencoder's checkpoint; left out: one is trained in OUT/augmentor")
    add("--augment", nargs="+", choices=("none", "mra", "cutout", "cutmix", "mixup", "randaugment"),
        default=["mra"], help="for training images, one or several (default for scenes, supervised: none)")
    add("--baseline", action="store_true", help="then do the same without MRA, in OUT/baseline")
    others = list_models(torchvision.models, exclude=["googlenet", "inception*"])  # these return two results
    add("--classifier", choices=["conv4", *others], metavar="NAME",
        help="conv4, or one of torchvision's (paper: resnet50)")
    add("--labels", type=count, help="labelled images of each class")
    add("--imbalance", type=count, default=1,
        help="long tail: images of the first class over those of the last")
    add("--held-out", type=count, help="fewshot: classes not trained on; left out: half, at least five")
    add("--compare", nargs="+", default=[], help="occlusion: last.pt of the classifiers")
    return parser


def main(arguments=None, train=None, val=None):
    """arguments: a list of options; None: those of the command line. train, val: as for `pretrain`."""
    # Datasets of your own get the defaults of small data.
    args = parse_args(
        options(),
        "mra",
        lambda args, kind: preset(args, "small" if train else kind),
        arguments)
    if args.init:
        raise UserError("mra.py takes no --init: a trained masked autoencoder is --augmentor")
    TASKS[args.task](args, train, val)


if __name__ == "__main__":
    entry(main)
