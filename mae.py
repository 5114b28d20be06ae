"""Masked Autoencoders Are Scalable Vision Learners
He, Chen, Xie, Li, Dollár, Girshick, 2021, https://arxiv.org/abs/2111.06377

Cut an image into patches and hide three quarters of them. The encoder, a vision transformer, sees only the
patches that are left. A small decoder gets the encoder's output, with one learned token in the place of
every hidden patch, and predicts the hidden pixels. So much is hidden that interpolating between neighbours
does not work: the encoder has to understand what it is looking at. That understanding is the product; the
decoder is thrown away. And because the encoder, the heavy part, computes on a quarter of the tokens,
pre-training is about three times as fast as with all of them (paper; here 2.4).

    images ──► patches ─┬─► visible 25 % ─► ENCODER ─► latent ─┬─► in order ─► DECODER ─► predicted ─► loss on
    (B,C,H,W)  (B,N,D)  │   (B,n,D)         heavy   (B,1+n,D)  │   (B,1+N,d)   light      (B,N,P·P·C)  hidden
                        └─► hidden 75 % ─► a mask token for each                                       patches

B images of C channels and H×W pixels, N patches of P×P pixels, n of them visible; a token has D numbers in
the encoder, d in the decoder.

    python mae.py                                          # scenes drawn by this project, minutes on a CPU
    python mae.py --data fashion-mnist --out runs/fashion  # a torchvision dataset
    python mae.py --data ~/photos --out runs/photos        # a folder of images
    torchrun --nproc_per_node=8 mae.py --data /imagenet    # the paper's recipe; also --model large
    python mae.py --task finetune --init runs/mae/last.pt  # evaluate it; also probe, knn, segment

Measured with the first command, seed 0, on two cores of an AMD EPYC: 3 min 16 s; a linear classifier on the
frozen encoder's mean patch token has accuracy 0.61 (untrained encoder: 0.22, chance: 0.10).

Details that matter
 1. Positions are added before patches are dropped. Afterwards nothing would say where a visible patch was.
 2. Patches are chosen by ranking random numbers, so every image keeps exactly n = int(N · 0.25) of them,
    rounded down as in MAE's code: a dense batch, without padding.
 3. The encoder never sees mask tokens. With them it is three times as slow, and worse: 84.2 instead of
    84.9 % accuracy, fine-tuned (table 1c).
 4. The loss is the mean over hidden patches only. Visible ones are easy to copy and teach nothing.
 5. The target is each patch normalised by its own mean and variance (table 1d); as in MAE's code the variance
    is unbiased, plus 1e-6. The small presets predict plain pixels [not in the paper].
 6. The peak learning rate is --lr × batch / 256: 2.4e-3 for the paper's batch of 4096. Weight decay spares
    biases, norms, class token and mask token [not in the paper].
 7. LayerNorm's eps is 1e-6, as in MAE's code and timm. PyTorch's default is 1e-5.
 8. The patch projection is initialised like a linear layer over a patch's pixels, not as a convolution.
 9. Crop and flip are the only augmentations (in the small presets flip alone). Colour jitter hurts (table
    1e); hiding patches is augmentation enough.
10. Every step seeds its random numbers with (seed, step). So a resumed run ends with the same weights as an
    uninterrupted one (almost the same on a GPU, where sums have no fixed order) [not in the paper]. A run
    saves OUT/last.pt every 30 s, or less often if saving would take more than 2 % of the time. --resume
    continues from it; later steps are repeated. (Repeat --out and --task; all other options come from the
    checkpoint.)
11. A fine-tuned classifier uses the mean of the patch tokens, then a new norm. The linear probe uses the
    class token, in the small presets the mean patch token [not in the paper].
12. --task segment reads the last four blocks through one convolution, or with --head conv three
    [not in the paper]; the paper uses UperNet.
"""

import argparse
import math
import pathlib
from dataclasses import dataclass

from common import (                                                  # before torch: sets an OpenMP variable
    VITS, Decoder, ImageFolder, InMemoryImages, Run, UserError, ViT, batches, decay_groups, entry,
    evenly_spaced, gather_tokens, is_image, labels_of, learning_rate, load_decoder, load_encoder,
    load_for_run, load_tensors, number, open_data, parse_args, patchify, prepare_data, read_checkpoint,
    read_image, save_image_rows, say, shared_options, to_pixels, training_plan, unpatchify)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributed as dist
from torch import nn
from torchvision.datasets import OxfordIIITPet, VOCSegmentation
from torchvision.transforms import RandomErasing, v2

# -------------------------------------------------------------------------------------------------- masking
# Each masking strategy gives every patch a number. The n patches with the lowest numbers stay visible, so all
# strategies hide the same number of patches in every image.

def random_noise(batch, grid, device):
    """→ (B, N): every patch is as likely to be hidden as any other (section 3). The paper's choice and best
    (table 1f)."""
    return torch.rand(batch, math.prod(grid), device=device)


def grid_noise(batch, grid, device):
    """→ (B, N): of every 2×2 patches the upper left one stays (figure 6). If more have to stay, random others
    are added; if fewer, a random choice of these stays [not in the paper]."""
    noise = random_noise(batch, grid, device).unflatten(1, grid)      # (B, h, w)
    noise[:, ::2, ::2] -= 1                                           # lower than all others
    return noise.flatten(1)


def block_noise(batch, grid, device, rectangles=24):
    """→ (B, N): large rectangles are hidden, one after another, until the ratio is met (figure 6, after
    BEiT)."""
    # Like BEiT's, a rectangle covers 8 to 40 % of the patches, and its sides are in a ratio of 0.3 to
    # 1/0.3. It may reach over the border [not in the paper].
    rows, columns = grid
    u, v, y, x = torch.rand(4, batch, rectangles, 1, 1, device=device)
    area = rows * columns * (0.08 + 0.32 * u)
    aspect = 0.3 ** (2 * v - 1)
    height, width = (area * aspect).sqrt(), (area / aspect).sqrt()
    row = torch.arange(rows, device=device)[:, None] + 0.5
    column = torch.arange(columns, device=device) + 0.5
    inside_rows = (row - rows * y).abs() < height / 2
    inside_columns = (column - columns * x).abs() < width / 2
    covered = inside_rows & inside_columns                            # (B, rectangles, h, w)

    # Earlier rectangles get higher numbers, so they are hidden first. The one that would hide too much is
    # hidden only in part: its first patches in reading order stay visible, so the count is exact
    # [not in the paper].
    priority = (covered.cumsum(dim=1) > 0).sum(dim=1).flatten(1)      # (B, N), 0 where no rectangle is
    order = torch.linspace(0, 0.9, rows * columns, device=device)     # below 1: only breaks ties
    return priority + order


MASKINGS = {"random": random_noise, "grid": grid_noise, "block": block_noise}


def hide(noise, num_visible):
    """noise (B, N) → ids_keep (B, n), ids_restore (B, N), mask (B, N): of every image the n = num_visible
    patches with the lowest noise are kept. mask is 1 where a patch is hidden. Raises UserError if none would
    be visible, or none hidden."""
    if not 0 < num_visible < noise.shape[1]:
        raise UserError(f"{num_visible} of {noise.shape[1]} patches would be visible: change the mask ratio")
    # argsort by noise shuffles the patches, visible ones first. The argsort of a permutation is its inverse:
    # ids_restore[i] is the place of patch i in the shuffled order. Without it neither the decoder nor the
    # loss would know which prediction belongs to which patch. For example, noise .9 .1 .5 gives ids_shuffle
    # 1 2 0 and ids_restore 2 0 1.
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= num_visible).float()
    return ids_shuffle[:, :num_visible], ids_restore, mask


# ---------------------------------------------------------------------------------------------------- model

class MAE(nn.Module):
    """A masked autoencoder (section 3, figure 1): a heavy encoder that sees only the visible patches, and a
    light decoder that predicts the pixels of the hidden ones."""

    def __init__(self, encoder, decoder, norm_pixels=True, masking="random"):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pixels = norm_pixels
        self.draw_noise = MASKINGS[masking]

    def forward(self, images, mask_ratio=0.75, noise=None, mask=None):
        """images (B, C, H, W) → loss (), prediction (B, N, P·P·C), mask (B, N) with 1 where a patch is
        hidden.

        noise (B, N): hide the patches where it is highest, instead of random ones. mask bool (B, N): hide
        the patches where it is True; every image needs as many. (1, N) is for all images. Raises UserError
        if the numbers of hidden patches differ, or if nothing or all would be hidden.
        """
        # Every patch becomes a token: a linear projection of its pixels plus a fixed code for its position
        # (detail 1).
        tokens = self.encoder.embed(images)                           # (B, N, D)

        # Choose what to hide. Ranking random numbers gives every image exactly n visible patches (detail 2).
        num_patches = tokens.shape[1]
        num_visible = int(num_patches * (1 - mask_ratio))
        if mask is not None:
            num_visible = num_patches - int(mask[0].sum())
            if (mask.sum(dim=1) != num_patches - num_visible).any():
                raise UserError("the mask has to hide equally many patches in every image")
            noise = mask.float()                                      # 0 where visible: the lowest stay
        elif noise is None:
            noise = self.draw_noise(images.shape[0], self.encoder.grid, images.device)
        noise = noise.expand(images.shape[0], -1)                     # (B, N)
        ids_keep, ids_restore, mask = hide(noise, num_visible)        # (B, n), (B, N), (B, N)

        # Hidden patches are dropped here: only the n tokens in ids_keep, a quarter of all, enter the encoder,
        # behind a class token. This line is where the paper's threefold speed-up comes from; no mask
        # token ever reaches the encoder (detail 3).
        latent = self.encoder.encode(gather_tokens(tokens, ids_keep))  # (B, 1+n, D), class token first

        # The decoder puts its mask token wherever a patch was hidden, brings all tokens back into the
        # image's order, and predicts the pixels of every patch.
        prediction = self.decoder(latent, ids_restore)                # (B, N, P·P·C)
        return self.loss(images, prediction, mask), prediction, mask

    def loss(self, images, prediction, mask):
        """Mean squared error over hidden patches only: predicting what the encoder has seen would teach it
        to copy."""
        target = patchify(images, self.encoder.patch_size).float()    # (B, N, P·P·C)
        if self.norm_pixels:
            # Ask for each patch relative to its own mean and contrast (detail 5). The paper finds better
            # features this way; the price is that a prediction alone is no longer a picture.
            mean = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(dim=-1)   # (B, N)
        return (error * mask).sum() / mask.sum()                      # detail 4

    @torch.no_grad()
    def reconstruct(self, images, mask_ratio=0.75):
        """images (B, C, H, W) → two copies: with hidden patches set to 0, and with hidden patches as
        predicted.

        With norm_pixels a prediction has no mean and contrast. They are taken from the true patch, which
        gives a part of the answer away: whoever shows such an image has to say so.
        """
        _, prediction, mask = self.forward(images, mask_ratio)
        patch_size, size = self.encoder.patch_size, self.encoder.img_size
        patches = patchify(images, patch_size)                        # (B, N, P·P·C)
        if self.norm_pixels:
            contrast = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * contrast + patches.mean(dim=-1, keepdim=True)
        mask = mask[..., None]                                        # (B, N, 1)
        masked = patches * (1 - mask)
        filled = masked + prediction * mask
        return unpatchify(masked, patch_size, size), unpatchify(filled, patch_size, size)


# ------------------------------------------------------------------------------------------------- training

def prepare(args, run, train=None, val=None, **options):
    """→ the encoder of --init, or a new one, and the training and validation dataset. options: arguments of
    ViT. Writes size, patch, in_chans, mean, std and vit into args. Raises UserError if encoder and images
    do not fit."""
    if args.init is not None:
        encoder = load_for_run(args.init, args, **options)
    train, val = prepare_data(args, run, train, val, open_maps if args.task == "segment" else open_data)
    torch.manual_seed(args.seed)
    if args.init is None:
        encoder = ViT(args.size, args.patch, args.in_chans, **VITS[args.model], **options)
    args.vit = encoder.config
    return encoder, train, val


def pretrain(args, train=None, val=None):
    """Pre-trains a masked autoencoder. args: from `parse`. train, val: datasets of your own, instead of
    --data. Each needs __len__ and __getitem__(i) → (uint8 tensor (C, H, W), label): any number of channels,
    square or not, and label −1 where it is unknown. For example
    `mae.pretrain(mae.parse(["--out", "runs/mine"]), train)`; size, mean and std are then taken from the data.
    """
    run = Run(args)
    # num_classes=0: no classifier's head. "token": `encode` ends with the norm, which "avg" would move behind
    # the mean.
    encoder, train, val = prepare(args, run, train, val, num_classes=0, global_pool="token")
    decoder = Decoder(encoder, **args.decoder)                        # sizes from PRESETS
    if args.init is not None:
        try:
            decoder = load_decoder(args.init, encoder)
        except UserError as error:
            say(f"the decoder starts anew: {error}")
    args.decoder = decoder.config
    # With --init, --norm-pixels is not taken from the file.
    model = MAE(encoder, decoder, args.norm_pixels, args.masking)
    # Moves the model to the device, compiles it if it is large, and adds DDP under torchrun. With the other
    # arguments of `forward`, here mask_ratio, it also measures how well a GPU is used ("mfu" in the log).
    wrapped = run.wrap(model, args.mask_ratio)
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)

    # From here on the run writes into --out. With --resume it continues where the checkpoint stands.
    ids = evenly_spaced(len(train), args.limit)
    run.start(len(ids), encoder=encoder, decoder=decoder, optimizer=optimizer, scaler=run.scaler)
    loader = batches(train, training_plan(ids, run), run, train=True)
    for step in run.steps():
        # Linear warm-up for --warmup epochs, then cosine decay to zero (detail 6). The paper's recipe: 1.9e-7
        # in step 0, 2.4e-3 at the end of warm-up, practically 0 in the last step.
        peak = args.lr * args.batch / 256
        lr = learning_rate(step, peak, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One step sees --batch images. A process takes its part in micro-batches, and the gradients add up.
        for i in range(run.accumulate):
            # (b, C, H, W), cropped, flipped, normalised; `batches` also sets torch's seed (detail 10).
            images, _ = next(loader)
            wrapped.require_backward_grad_sync = i == run.accumulate - 1  # DDP averages gradients once a step
            with run.autocast:
                loss, _, _ = wrapped(images, args.mask_ratio)
            run.scaler.scale(loss / run.accumulate).backward()
            run.log(loss=loss)

        # Without fp16 the scaler does nothing, and this is an ordinary optimizer step.
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        run.log(lr=lr)
        if val is not None and run.should_evaluate(step, num_images=min(500, len(val))):
            run.log(val_loss=validation_loss(model, val, run))

    if run.rank == 0:
        draw(model, val or train, run)
        report(encoder, train, val, run)


@torch.no_grad()
def validation_loss(model, val, run):
    """→ the loss on up to 500 images that are not trained on, every time the same ones with the same
    masks."""
    ids = evenly_spaced(len(val), 500)
    losses = []
    # A plan says which images make up each batch, and its seed.
    plan = [(part, seed) for seed, part in enumerate(ids.split(run.micro_batch))]
    for images, _ in batches(val, plan, run):
        with run.autocast:                                            # `.forward` skips torch.compile
            loss, _, _ = model.forward(images, run.args.mask_ratio)
        losses.append(loss * len(images) / len(ids))
    return sum(losses).item()


def draw(model, dataset, run):
    """Writes OUT/reconstruction.png: images, what the encoder sees of them, and what the decoder makes of
    that."""
    args = run.args
    images, _ = next(batches(dataset, [(evenly_spaced(len(dataset), 10), args.seed)], run))
    masked, filled = model.eval().reconstruct(images, args.mask_ratio)
    note = " (hidden patches with their true mean and contrast)" if model.norm_pixels else ""
    save_image_rows(f"{args.out}/reconstruction.png", {
        "image": to_pixels(images, args),
        f"{1 - args.mask_ratio:.0%} visible": to_pixels(masked, args),
        "reconstruction" + note: to_pixels(filled, args),
    })


# ==========================================================================================================
# The method ends here. The rest evaluates an encoder, ours or any other: nearest neighbours, a linear probe,
# fine-tuning, segmentation. At the end stand the defaults and options, those of pre-training included.
# ==========================================================================================================

def labelled_ids(dataset, limit=None, seed=0, per_class=None):
    """→ indices (m,) of at most `limit` labelled images in random order; with per_class, of exactly that
    many of each class, class by class. Raises UserError if a class has fewer, or if there is only one."""
    labels = labels_of(dataset or []).cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order] >= 0][:limit]
    classes, counts = labels[order].unique(return_counts=True)
    if len(classes) < 2:
        raise UserError("this needs labelled images of two or more classes, in train/CLASS and val/CLASS, "
                        "without images beside these folders")
    if per_class:
        if counts.min() < per_class:
            raise UserError(f"--labels {per_class}: the smallest class has {counts.min()} images")
        order = torch.cat([order[labels[order] == k][:per_class] for k in classes])
    return order


def class_names(dataset):
    """→ the names of a dataset's classes; of a dataset without names their numbers."""
    names = getattr(dataset, "classes", None)
    if names is None or not len(names):
        names = range(int(labels_of(dataset).max()) + 1)
    return [str(name) for name in names]


def in_parts(ids, size=100):
    """→ a plan for `batches`: `size` images at a time."""
    return [(part, 0) for part in ids.split(size) if len(part)]


@torch.no_grad()
def extract_features(encoder, images, pool):
    """images (B, C, H, W) → features (B, D): the mean patch token [not in the paper], or for pool "token"
    the class token."""
    tokens = encoder.encode(encoder.embed(images)).float()            # (B, 1+N, D)
    if pool == "token":
        return tokens[:, 0]
    return encoder.fc_norm(tokens[:, 1:].mean(dim=1))


def knn(features, labels, queries, num_classes, k=20, temperature=0.07):
    """features (M, D), labels (M,), queries (Q, D) → scores (Q, num_classes): a vote of the k nearest by
    cosine, each with weight exp(cosine / temperature) [not in the paper]."""
    features = F.normalize(features).T                                # (D, M)
    scores = []
    for part in F.normalize(queries).split(250):                      # all Q × M cosines might not fit
        similarity, nearest = (part @ features).topk(min(k, len(labels)))
        votes = torch.zeros(len(part), num_classes, device=part.device)
        scores.append(votes.scatter_add(1, labels[nearest], (similarity / temperature).exp()))
    return torch.cat(scores)


def linear(features, labels, queries, num_classes, ridge=10.0):
    """Like `knn`, but with the linear map that fits the one-hot labels best (least squares): a linear probe
    in closed form, which takes a second [not in the paper]."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    x, queries = [((part - mean) / std).cpu().double() for part in (features, queries)]
    targets = F.one_hot(labels.cpu(), num_classes).double()           # (M, K)

    # Ridge regression: the penalty keeps weights small where the data say little about them. The bias has
    # the same penalty; as features have mean 0, it does not depend on the weights.
    bias = targets.sum(dim=0) / (len(x) + ridge)
    penalty = ridge * torch.eye(x.shape[1])
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ targets)    # (D, K)
    return (queries @ weights + bias).float().to(labels.device)


def all_features(encoder, dataset, ids, run):
    """→ features (m, D), as --pool says, and labels (m,) of these images."""
    encoder.eval()
    parts = []
    for images, labels in batches(dataset, in_parts(ids), run):
        with run.autocast:
            parts.append((extract_features(encoder, images, run.args.pool), labels))
    return map(torch.cat, zip(*parts))


def feature_accuracy(classifier, encoder, train, ids, val, val_ids, run):
    """→ how often `knn` or `linear`, fitted to the frozen features of the training images `ids`, is right for
    the validation images val_ids."""
    features, labels = all_features(encoder, train, ids, run)
    queries, truth = all_features(encoder, val, val_ids, run)
    scores = classifier(features, labels, queries, int(labels.max()) + 1)
    return (scores.argmax(dim=1) == truth).float().mean().item()


def report(encoder, train, val, run):
    """Says how well a linear classifier does with the frozen features of 6,000 images (or --limit), and with
    those of an encoder that was not trained."""
    args = run.args
    try:
        val_ids = labelled_ids(val, args.limit or 3000)
        ids = labelled_ids(train, args.limit or 6000)
    except UserError:
        return say("the data have no labels, or no validation images: the features are not evaluated")
    torch.manual_seed(args.seed)
    untrained = ViT(**encoder.config).to(run.device)
    after, before = [feature_accuracy(linear, vit, train, ids, val, val_ids, run)
                     for vit in (encoder, untrained)]
    say(f"a linear classifier on the frozen features of {len(ids)} images: accuracy {after:.3f}, "
        f"an untrained encoder's {before:.3f}, by chance {1 / len(class_names(train)):.3f}")
    run.write_log(step=run.step, linear_trained=after, linear_untrained=before)


@torch.no_grad()
def lars(optimizer, _args, _kwargs, trust=0.001):
    """Turns SGD with momentum into the LARS of the linear probe (appendix A.1, after 1708.03888): before a
    step, the gradient of a weight matrix is rescaled to length trust · |w|, so that every matrix moves by the
    same part of its own length."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.ndim > 1:                                    # biases take their gradient as it is
                length = parameter.grad.norm().clamp(min=1e-12)
                parameter.grad *= trust * parameter.norm() / length


def layer_scale(name, depth, layer_decay):
    """→ the factor of a parameter's learning rate in fine-tuning: layer_decay^(depth + 1 − layer), so that
    early layers learn more slowly (appendix A.1). Layer 0 is the patch embedding, class token and positions;
    layer k+1 is block k."""
    layer = depth + 1
    if name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    elif name.startswith(("patch_embed", "cls_token", "pos_embed")):
        layer = 0
    return layer_decay ** (depth + 1 - layer)


def replace_head(args, vit):
    """Gives a ViT a new head, and freezes what --task does not train. With --eval the ViT stays as
    it is. Raises UserError if it then has no head for so many classes."""
    num_classes = len(args.classes)
    if args.eval:
        if vit.num_classes != num_classes or vit.classes not in (None, args.classes):
            raise UserError(
                f"{args.init} is no classifier of these classes (of a probe take best.pt): train one first, "
                f"without --eval")
        return
    probe = args.task == "probe"
    head = nn.Linear(vit.embed_dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.01 if probe else 2e-5)
    nn.init.zeros_(head.bias)
    vit.config["num_classes"] = num_classes

    # The probe trains the head alone, behind a BatchNorm that has no weights. Fine-tuning trains everything,
    # or with --train-blocks k the last k blocks, the norm and the head (section 4.3; tokens and the rest stay
    # as they are [not in the paper]).
    vit.requires_grad_(not probe and args.train_blocks is None)
    if probe:
        head = nn.Sequential(nn.BatchNorm1d(vit.embed_dim, affine=False, eps=1e-6), head)
    elif args.train_blocks is not None:
        for module in (*vit.blocks[::-1][:args.train_blocks], vit.norm, vit.fc_norm):
            module.requires_grad_(True)
    vit.head = head


def plain_state(module):
    """→ a module's parameters. A probe's BatchNorm and linear layer become one linear layer, as every ViT has
    it."""
    state = module.state_dict()
    if "head.1.weight" in state:
        # W (x − mean) / σ + b is linear in x: weight W / σ, bias b − W mean / σ.
        mean, variance = state.pop("head.0.running_mean"), state.pop("head.0.running_var")
        weight, bias = state.pop("head.1.weight"), state.pop("head.1.bias")
        del state["head.0.num_batches_tracked"]
        state["head.weight"] = weight * (variance + 1e-6).rsqrt()
        state["head.bias"] = bias - state["head.weight"] @ mean
    return state


@torch.no_grad()
def evaluate(model, dataset, ids, run):
    """→ top-1 and top-5 accuracy of a classifier, or mean IoU (intersection over union), pixel accuracy and
    IoU per class of a `Segmenter`, over the images `ids`. The IoU of a class is the number of pixels that
    have it in truth and prediction, divided by the number that have it in either; the mean is over classes
    that occur in truth or prediction."""
    num_classes = len(run.args.classes)
    is_segmenter = isinstance(model, Segmenter)
    # `.forward` skips torch.compile, which would compile anew for each batch size.
    predict = model.eval().forward
    transform = None
    batch_size = 100
    k = min(5, num_classes)
    if is_segmenter:
        # `predict` resizes images itself, so they are not cropped. Files differ in size and form no batch.
        predict = model.predict
        transform = v2.Identity()
        batch_size = 100 if isinstance(dataset, InMemoryImages) else 1
        k = 1

    # Every process takes its part of the images, so that none is counted twice.
    plan = in_parts(ids[run.rank::run.world_size], batch_size)
    counts = torch.zeros(4, num_classes, dtype=torch.long, device=run.device)
    for images, labels in batches(dataset, plan, run, transform=transform):
        with run.autocast:
            predictions = predict(images).topk(k, dim=1).indices      # (b, k, …), the best first
        # How often is each class the truth, the prediction, both, and among the k best?
        known = labels >= 0
        among_best = labels[(predictions == labels[:, None]).any(dim=1)]
        labels, predictions = labels[known], predictions[:, 0][known]
        hits = labels[labels == predictions]
        counts += torch.stack(
            [x.bincount(minlength=num_classes) for x in (labels, predictions, hits, among_best)])
    if run.world_size > 1:
        dist.all_reduce(counts)
    truth, predicted, correct, among_best = counts
    accuracy = correct.sum() / truth.sum()
    if not is_segmenter:
        top5 = among_best.sum() / truth.sum()
        return dict(top1=accuracy.item(), top5=top5.item())
    union = truth + predicted - correct
    iou = correct / union.clamp(min=1)
    mean = iou[union > 0].mean()
    return dict(mean_iou=mean.item(), pixel_accuracy=accuracy.item(), class_iou=iou.tolist())


def finish(run, result):
    """Says and logs the result of a task."""
    texts = [f"{name} {value:.4f}" for name, value in result.items() if name != "class_iou"]
    if "top1" in result:
        texts.append(f"by chance {1 / len(run.args.classes):.4f}")
    say(f"{run.args.task}: {', '.join(texts)}")
    run.write_log(step=run.step, task=run.args.task, **result)


def erase(images, probability):
    """Random erasing: in some of the images (b, C, H, W) a rectangle becomes noise, in place."""
    for image in images:
        if torch.rand(()) < probability:
            # v2.RandomErasing would draw the noise on the CPU, and the GPU would have to wait for it.
            y, x, h, w, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
            if h < image.shape[1]:                                    # else no rectangle fitted in ten tries
                image[:, y:y + h, x:x + w].normal_()


def fit(run, model, parts, train, ids, val, val_ids, augment=None, mixes=()):
    """Trains whatever requires gradients, on the images `ids`, and evaluates on val_ids: the loop of probe,
    fine-tuning and segmentation. parts: the modules that checkpoints hold. With --eval nothing is trained,
    only evaluated."""
    args = run.args
    wrapped = model.to(run.device) if args.eval else run.wrap(model)
    # The probe is trained with LARS, everything else with AdamW, early layers at a lower learning rate: what
    # they respond to, edges and colours, need not change much.
    if args.task == "probe":
        optimizer = torch.optim.SGD(model.head.parameters(), momentum=0.9)
        optimizer.register_step_pre_hook(lars)
    else:
        def scale(name):
            return layer_scale(name.removeprefix("encoder."), args.vit["depth"], args.layer_decay)

        groups = decay_groups(model, args.weight_decay, scale)
        optimizer = torch.optim.AdamW(groups, fused=True)             # PyTorch's betas are the recipe's

    if args.eval:
        args.epochs, ids = 0, ids[:0]                                 # the loop below has no step
    run.start(len(ids), **parts, optimizer=optimizer, scaler=run.scaler)
    loader = batches(train, training_plan(ids, run), run, train=True, augment=augment)
    result = None
    for step in run.steps():
        # The same schedule as in pre-training. With layer decay every layer has its own part of the rate.
        peak = args.lr * args.batch / 256
        lr = learning_rate(step, peak, run.warmup_steps, run.total_steps, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        for i in range(run.accumulate):
            images, labels = next(loader)                             # (b, C, H, W), (b,) or (b, H, W)
            # By default only in ImageNet fine-tuning: a rectangle becomes noise (random erasing); two images
            # and their labels are blended (mixup), or a piece of one replaces the other's (CutMix).
            if args.erasing:
                erase(images, args.erasing)
            if mixes:                                                 # labels become (b, K)
                images, labels = v2.RandomChoice(mixes)(images, labels)
            wrapped.require_backward_grad_sync = i == run.accumulate - 1
            with run.autocast:
                losses = F.cross_entropy(
                    wrapped(images), labels, reduction="none", label_smoothing=args.label_smoothing)
            # The loss is 0 where there is no label: divide by the fraction that has one. A map may have none.
            known = (labels != -100).float().mean()
            loss = losses.mean() / known.clamp(min=1e-9)
            run.scaler.scale(loss / run.accumulate).backward()
            run.log(loss=loss)

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        run.log(lr=lr)
        if run.should_evaluate(step, num_images=len(val_ids)):
            result = evaluate(model, val, val_ids, run)
            model.train()
            # OUT/best.pt keeps the weights that do best on validation images, by the first of the results.
            # OUT/last.pt has those of the last step.
            measure = next(iter(result))
            if all(result[measure] >= line.get(measure, 0.0) for line in run.history):
                states = {name: plain_state(part) for name, part in parts.items()}
                run.save("best.pt", **states, **result)
            run.log(**result)
    finish(run, result or evaluate(model, val, val_ids, run))


def classify(args, train=None, val=None):
    """--task probe and finetune: trains a classifier on an encoder, or from scratch; with --eval only
    evaluates the one in --init. --task knn: a vote of the 20 nearest training images, by the features of the
    frozen encoder. train, val: datasets of your own, as for `pretrain`; each class of val occurs in train."""
    run = Run(args)
    options = dict(global_pool=args.pool, drop_path_rate=args.drop_path)
    if args.eval or args.task == "knn":
        options = {}                                                  # the model stays as it is
    # The ViT is pre-trained, a classifier already (--eval), or new.
    model, train, val = prepare(args, run, train, val, **options)
    ids = labelled_ids(train, args.limit, args.seed, None if args.eval else args.labels)
    val_ids = labelled_ids(val, args.limit)
    args.classes = class_names(train)
    if args.task == "knn":
        run.start()
        model.to(run.device)
        return finish(run, dict(top1=feature_accuracy(knn, model, train, ids, val, val_ids, run)))
    replace_head(args, model)

    # RandAugment: two random operations, each applied with probability 1/2. The authors' code has two more,
    # makes some stronger, and varies the magnitude; torchvision's are [not in the paper].
    augment = None
    if args.randaugment:
        colour = [round(value) for value in args.mean]                # for corners that a rotation empties
        operation = v2.RandAugment(1, args.randaugment, 11, v2.InterpolationMode.BICUBIC, colour)
        maybe = v2.RandomApply([operation])
        # Through PIL, because torchvision rotates no tensor with bicubic interpolation.
        augment = v2.Compose([v2.ToPILImage(), maybe, maybe, v2.PILToTensor()])
    alphas = {v2.MixUp: args.mixup, v2.CutMix: args.cutmix}
    mixes = [mix(alpha=alpha, num_classes=len(args.classes)) for mix, alpha in alphas.items() if alpha]
    fit(run, model, dict(encoder=model), train, ids, val, val_ids, augment, mixes)


VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
person pottedplant sheep sofa train tvmonitor"""


@dataclass
class Maps:
    """Pairs (image file, file with the class of every pixel) as a dataset for segmentation. first_label: the
    value in the files that means class 0. If it is 1, then 0 means unknown, as 255 always does. Raises
    UserError for an unreadable file, a map of another size than its image, or a label beyond the
    classes."""

    pairs: list
    classes: list
    first_label: int
    mean, std = ImageFolder.mean, ImageFolder.std

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        path, map_path = self.pairs[i]
        try:
            image = read_image(path)
            labels = torch.from_numpy(np.array(Image.open(map_path)))
        except Exception as error:                                    # Pillow raises a dozen kinds
            raise UserError(f"{path} or its map {map_path} cannot be read: {error}")
        fits = labels.dtype == torch.uint8 and labels.shape == image.shape[1:]
        if not fits or (labels[labels < 255] >= self.first_label + len(self.classes)).any():
            raise UserError(
                f"{map_path} is not an 8-bit grey map of its image's size, or has more than the "
                f"{len(self.classes)} classes of the training maps")
        # In uint8, 0 − 1 is 255: unknown.
        return image, labels.where(labels == 255, labels - self.first_label)


def open_maps(args):
    """--data → training and validation dataset with maps: scenes, "voc" (2012), "pets", or a folder in
    ADE20K's layout: images/PART/NAME.jpg with annotations/PART/NAME.png, in which 0 means unknown. Raises
    UserError if there are no images."""
    if args.data is None:
        # In a scene the shape is an object of its class, and the rest is background, class 0.
        parts = []
        for scenes in open_data(args):
            maps = ((scenes.targets[:, None, None] + 1) * scenes.masks).byte()
            parts.append(InMemoryImages(scenes.images, maps, ["background", *scenes.classes]))
        return parts
    if args.data == "voc":
        # Asked to download, torchvision would unpack the archive anew every time.
        folder = pathlib.Path(args.root, "VOCdevkit/VOC2012")
        parts = [VOCSegmentation(args.root, image_set=part, download=not folder.exists())
                 for part in ("train", "val")]
        return [Maps([*zip(part.images, part.masks)], VOC.split(), 0) for part in parts]
    if args.data == "pets":
        names = ["pet", "background", "border"]
        parts = [OxfordIIITPet(args.root, part, "segmentation", download=True)
                 for part in ("trainval", "test")]
        return [Maps([*zip(part._images, part._segs)], names, 1) for part in parts]

    parts = []
    for part in ("training", "validation"):
        images = sorted(filter(is_image, pathlib.Path(args.data, "images", part).glob("*")))
        if not images:
            raise UserError(f"there is no image in {args.data}/images/{part}: segmentation needs images/ and "
                            f"annotations/, each with training/ and validation/")
        parts.append([(path, f"{args.data}/annotations/{part}/{path.stem}.png") for path in images])
    # The highest number in a training map says how many classes there are.
    counts = sum(np.array(Image.open(path).histogram()[:255]) for _, path in parts[0])
    classes = range(1, max([0, *counts.nonzero()[0]]) + 1)
    return [Maps(pairs, classes, 1) for pairs in parts]


class Segmenter(nn.Module):
    """An encoder that gives every pixel a class: images (B, C, H, W) → scores (B, K, H, W). head "linear":
    the patch tokens of the last four blocks go through BatchNorm and one 1×1 convolution, and the encoder is
    frozen. "conv": two up-convolutions lie between, and everything but positions is fine-tuned."""

    def __init__(self, encoder, num_classes, head):
        super().__init__()
        self.encoder = encoder
        width = min(4, len(encoder.blocks)) * encoder.embed_dim
        layers = [nn.BatchNorm2d(width, affine=False)]
        if head == "linear":
            encoder.requires_grad_(False)
        else:
            for _ in range(2):
                layers += [nn.ConvTranspose2d(width, 128, 2, stride=2), nn.GELU()]
                width = 128
        self.head = nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))

    def forward(self, images):
        scores = self.head(self.encoder.feature_map(images, last=4))
        return F.interpolate(scores, self.encoder.img_size, mode="bilinear")

    @torch.no_grad()
    def predict(self, images):
        """images (B, C, H, W), normalised and of any size → scores (B, K, H, W). An image is scaled, keeping
        its proportions, to just cover the encoder's img_size. Its longer side is then seen through several
        windows; where they overlap, scores are averaged."""
        height, width = self.encoder.img_size
        size = images.shape[2:]
        scale = max(height / size[0], width / size[1])
        H, W = [round(scale * side) for side in size]
        resized = F.interpolate(images, (H, W), mode="bicubic", antialias=True)

        # As few windows as cover everything, evenly spread: the first at the upper left corner, the last at
        # the lower right.
        total = resized.new_zeros(len(images), self.head[-1].out_channels, H, W)
        count = total.new_zeros(H, W)
        for y in evenly_spaced(H - height + 1, math.ceil(H / height)).tolist():
            for x in evenly_spaced(W - width + 1, math.ceil(W / width)).tolist():
                window = (..., slice(y, y + height), slice(x, x + width))
                total[window] += self.forward(resized[window])
                count[window] += 1
        return F.interpolate(total / count, size, mode="bilinear")


def load_segmenter(path, **overrides):
    """→ the `Segmenter` in a checkpoint of --task segment, ready for `predict` on normalised images, that is
    (pixels − mean) / std. Its encoder.mean and encoder.std (lists) and encoder.classes (names) come from the
    file. overrides: as for `load_encoder`. Raises UserError if there is none."""
    saved = read_checkpoint(path)
    if "head" not in saved:
        raise UserError(f"{path} holds no segmenter")
    encoder = load_encoder(path, **overrides)
    model = Segmenter(encoder, len(encoder.classes), saved["args"]["head"])
    load_tensors(model.head, saved["head"], path)
    return model.eval()


def segment(args, train=None, val=None):
    """--task segment: trains a head that gives every pixel a class; with --eval only evaluates the one in
    --init. train, val: datasets of your own, whose label is a map (H, W), with `classes`. Raises UserError if
    the one in --init is for other classes."""
    run = Run(args)
    # `feature_map` does not need the head of a classifier.
    encoder, train, val = prepare(args, run, train, val, num_classes=0, drop_path_rate=args.drop_path)
    if val is None:
        raise UserError("--task segment needs validation images with maps")
    args.classes = [str(name) for name in train.classes]
    if len(args.classes) < 2:
        raise UserError("the maps have fewer than two classes; in ADE20K's layout 0 means unknown")
    if not args.eval:
        model = Segmenter(encoder, len(args.classes), args.head)
    elif encoder.classes == args.classes:
        model = load_segmenter(args.init, img_size=args.size)
    else:
        raise UserError(f"{args.init} is no segmenter of these classes: train one first, without --eval")
    ids = evenly_spaced(len(train), args.labels or args.limit)
    val_ids = evenly_spaced(len(val), args.limit)
    fit(run, model, dict(encoder=model.encoder, head=model.head), train, ids, val, val_ids)
    if run.rank:
        return

    # Draw images, true classes and predicted classes. The colour of class k is k times a step per channel,
    # modulo 256, so classes look different.
    images, labels = next(batches(val, in_parts(evenly_spaced(len(val), 8)), run))
    answers = model.eval().predict(images).argmax(dim=1)
    steps = (67 + 46 * torch.arange(args.in_chans))[:, None, None]
    save_image_rows(f"{args.out}/segmentation.png", {
        "image": to_pixels(images, args),
        "truth": (labels[:, None].cpu() * steps).byte(),
        "prediction": (answers[:, None].cpu() * steps).byte(),
    })


def reconstruct(args, train=None, val=None):
    """--task reconstruct: draws what a pre-trained model makes of images."""
    run = Run(args)
    encoder, train, val = prepare(args, run, train, val)
    norm_pixels = args.norm_pixels if encoder.norm_pixels is None else encoder.norm_pixels
    model = MAE(encoder, load_decoder(args.init, encoder), norm_pixels, args.masking)
    run.start()
    draw(model.to(run.device), val or train, run)
    run.write_log(task=args.task)


TASKS = {
    "pretrain": pretrain,
    "knn": classify,
    "probe": classify,
    "finetune": classify,
    "segment": segment,
    "reconstruct": reconstruct,
}

# --------------------------------------------------------------------------------------------- command line

# Defaults by kind of data, task, --head, and model or width of the encoder; `preset` merges those that apply.
# "imagenet" is the paper's recipe (appendix A.1), except that fine-tuning follows the authors' FINETUNE.md,
# with another learning rate, layer decay, drop path and random erasing. Training from scratch uses the same
# values, without layer decay [not in the paper]; the paper trains longer, and differently. The probe's
# BatchNorm sees 512 images. The probe's crops are torchvision's: one that does not fit is drawn again
# [not in the paper]; the authors' code clips it. "scenes" is for scenes and all small data and takes minutes
# on a CPU [not in the paper]. `steps` counts unless `epochs` is set.
PRESETS = {
    "scenes": dict(
        model="nano",
        decoder=dict(embed_dim=64, depth=1, num_heads=4),
        norm_pixels=False, crop=1.0,
        steps=5000, batch=16, lr=2.4e-2,
    ),
    "scenes probe": dict(steps=800, batch=128, lr=80.0),
    "scenes finetune": dict(
        steps=3000, batch=64, lr=4e-3,
        layer_decay=0.75, drop_path=0.1,
    ),
    "imagenet": dict(
        model="base", size=[224], patch=16,
        decoder=dict(embed_dim=512, depth=8, num_heads=16),
        norm_pixels=True, crop=0.2,
        epochs=800, batch=4096, lr=1.5e-4, warmup=40.0,
    ),
    "imagenet huge": dict(patch=14),
    "imagenet probe": dict(
        epochs=90, batch=16384, micro_batch=512, lr=0.1, warmup=10.0,
        pool="token", crop=0.08,
    ),
    "imagenet finetune": dict(
        epochs=100, batch=1024, lr=5e-4, min_lr=1e-6, warmup=5.0,
        layer_decay=0.65, drop_path=0.1, label_smoothing=0.1,
        mixup=0.8, cutmix=1.0, randaugment=9, erasing=0.25, crop=0.08,
    ),
    "imagenet probe 1024": dict(epochs=50),                           # ViT-L, and 1280 is ViT-H
    "imagenet probe 1280": dict(epochs=50),
    "imagenet finetune 1024": dict(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "imagenet finetune 1280": dict(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.3),
    "segment": dict(epochs=None, steps=600, batch=32, lr=0.08, warmup=None),
    "segment conv": dict(lr=1.6e-2, layer_decay=0.75),
}


def preset(args, kind):
    """→ the defaults for a kind of data, and for the task and model in args."""
    task = args.task
    data = "imagenet" if kind == "imagenet" else "scenes"             # small data use the rows of scenes
    classifies = task in ("probe", "finetune")
    width = VITS[args.model or "base"]["embed_dim"]                   # the recipe depends on the encoder
    if data == "imagenet" and classifies and args.init is not None:
        width = load_encoder(args.init).embed_dim
    values = dict(min_lr=0.0)
    for row in (
        data,
        f"{data} {args.model}",
        f"{data} {task}",
        f"{data} {task} {width}",
        task,
        f"{task} {args.head}",
    ):
        values |= PRESETS.get(row, {})
    if args.init is None:
        values["layer_decay"] = 1.0                                   # from scratch: one rate for all layers
    else:
        values["size"] = None                                         # that of the encoder
    if args.labels and classifies and data == "scenes":
        values |= dict(batch=20, steps=1000)
    if args.data and task == "segment":
        values["crop"] = 0.25                                         # 1 would never show an image's border
    return values


def options():
    """→ mae.py's parser."""
    parser = shared_options("Pre-trains a masked autoencoder, or evaluates an encoder (--task).")
    fraction = number(float, 0, 1)
    add = parser.add_argument_group("mae").add_argument
    add("--task", choices=TASKS, default="pretrain", help="what to do")
    add("--mask-ratio", type=fraction, default=0.75, help="fraction of patches to hide (paper: 0.75)")
    add("--masking", choices=MASKINGS, default="random", help="which patches are hidden (paper: random)")
    add("--norm-pixels", action=argparse.BooleanOptionalAction, help="normalise the targets (paper: yes)")

    add = parser.add_argument_group("evaluating an encoder").add_argument
    add("--eval", action="store_true", help="only evaluate the classifier or segmenter in --init")
    add("--labels", type=number(int, 1), help="training images per class; segment: in total")
    add("--head", choices=("linear", "conv"), default="linear", help="segment: conv also trains the encoder")
    add("--train-blocks", type=number(int, 0), help="finetune: only this many last blocks, norm and head")
    add("--pool", choices=("token", "avg"), default="avg", help="feature: class token or mean patch token")
    add("--layer-decay", type=fraction, default=1.0, help="a layer's rate / the next layer's (authors: 0.65)")
    add("--randaugment", type=number(int, 0, 10), default=0, help="0: off; needs 1 or 3 channels (paper: 9)")
    for name, text in {
        "--drop-path": "probability to skip the last block (paper: 0.1)",
        "--label-smoothing": "fraction of a target spread over all classes (paper: 0.1)",
        "--mixup": "alpha of mixup (paper: 0.8)",
        "--cutmix": "alpha of cutmix; with both, one at random (paper: 1.0)",
        "--erasing": "probability that a rectangle becomes noise (authors: 0.25)",
    }.items():
        add(name, type=fraction, default=0.0, help=text)
    return parser


def parse(arguments=None):
    """A list of command-line options → args, for `pretrain` and the other tasks. None: those of the command
    line."""
    return parse_args(options(), "mae", preset, arguments)


def main(arguments=None):
    args = parse(arguments)
    if args.init is None and (args.eval or args.task in ("knn", "reconstruct")):
        raise UserError("--task knn, --task reconstruct and --eval need --init, a checkpoint")
    TASKS[args.task](args)


if __name__ == "__main__":
    entry(main)
