"""What the four scripts share: patches, a vision transformer, data, and a run. Whoever copies a script takes this file along.

What two of them need stands here, MAE's hiding and its loss included; what one paper adds stands in its script. Letters in
shapes: B batch, N patches, n visible patches, D width, H heads, P patch side, C channels, T tokens, M pictures in a data set.
"""

import difflib, hashlib, json, math, multiprocessing, os, signal, sys, time, zipfile
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections import OrderedDict
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont  # comes with torchvision
from torch import distributed as dist, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

class Problem(ValueError):
    """A user's mistake or bad luck: on the command line one line on stderr, no traceback."""

# ----------------------------------------------------------------------------------------------------------------- patches

def pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)

def grid_of(size, patch):
    """(height, width) in pixels → (rows, columns) of patches. Raises Problem when the patches do not fit."""
    if size[0] % patch or size[1] % patch:
        raise Problem(f"a size of {size[0]}×{size[1]} pixels does not divide into patches of {patch}×{patch}")
    return size[0] // patch, size[1] // patch

def patchify(images, patch):
    """(B, C, H, W) → (B, N, P·P·C): patches row by row; inside a patch the order is row, column, channel."""
    h, w = grid_of(images.shape[2:], patch)
    x = images.unflatten(3, (w, patch)).unflatten(2, (h, patch))                            # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

def unpatchify(patches, patch, size):
    """(B, N, P·P·C) → (B, C, H, W), the inverse of `patchify`. `size`: the picture's side or (H, W), in pixels."""
    x = patches.unflatten(2, (patch, patch, -1)).unflatten(1, grid_of(pair(size), patch))   # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

def sincos_positions(dim, grid):
    """The fixed 2-D sine-cosine table (h·w, dim): its first half tells the column, its second the row (MAE, section 3). Each half
    holds sin, then cos, of place / 10000^(k / (dim/4)) for k = 0 … dim/4 − 1. Raises Problem unless dim divides by 4."""
    if dim % 4:
        raise Problem(f"sine-cosine positions need a width that divides by 4, not {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T      # 2 × (N,)
    angles = [place[:, None] * frequency for place in (column, row)]                        # 2 × (N, dim/4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()

def take(tokens, index):
    """tokens (B, N, D), index (B, n) → (B, n, D): each picture its own choice of tokens."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))

def visible(places, mask_ratio):
    """→ how many of so many patches stay visible: int(N·(1 − mask_ratio)), as in MAE's code."""
    return int(places * (1 - mask_ratio))

def keep_lowest(scores, n):
    """scores (B, N) → keep (B, n), restore (B, N), mask (B, N): the n lowest scores stay visible, in every picture exactly n.
    `restore` brings tokens in the order visible, hidden back to their places; `mask` is 1 where hidden, 0 where visible."""
    shuffle = scores.argsort(dim=1)                                                         # lowest score first
    restore = shuffle.argsort(dim=1)                                                        # the inverse permutation
    return shuffle[:, :n], restore, (restore >= n).float()

def pixel_loss(images, prediction, mask, patch, norm_pixels):
    """(B, C, H, W), (B, N, P·P·C), (B, N) → (): mean squared error over the hidden patches only (MAE, section 3). With
    `norm_pixels` the target is each patch normalised by its own mean and (unbiased) variance."""
    target = patchify(images, patch).float()
    if norm_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction.float() - target).square().mean(-1)                                 # (B, N)
    return (error * mask).sum() / mask.sum()

TRUE_CONTRAST = ", each hidden patch with its true mean and contrast"                       # for captions of what this makes:

def with_contrast(prediction, patches):
    """Both (B, N, P·P·C) → the prediction with each true patch's mean and contrast: makes a picture of what `norm_pixels` learns,
    and gives part of the answer away."""
    return prediction * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)

# ------------------------------------------------------------------------------------------------------------- transformer

VITS = {
    "nano": dict(dim=128, depth=4, heads=4, patch=8),                                       # ours, for a laptop's CPU
    "light": dict(dim=384, depth=4, heads=6, patch=16),                                     # ours, MRA's augmentor
    "tiny": dict(dim=192, depth=12, heads=3, patch=16),
    "small": dict(dim=384, depth=12, heads=6, patch=16),
    "base": dict(dim=768, depth=12, heads=12, patch=16),
    "large": dict(dim=1024, depth=24, heads=16, patch=16),
    "huge": dict(dim=1280, depth=32, heads=16, patch=14),
}

class Attention(nn.Module):
    """Multi-head self-attention (B, T, D) → (B, T, D) in one fused kernel."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise Problem(f"a width of {dim} does not divide into {heads} heads")
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x):
        """(B, T, D) → queries, keys, values, each (B, H, T, D/H)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))

    def weights(self, x, first=None):
        """(B, T, D) → (B, H, T, T): who looks where, for those who want to see it, or only where the `first` so many look. Each
        row sums to 1."""
        q, k, _ = self.split(x)
        return (q[:, :, :first] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)

class Block(nn.Module):
    """Pre-norm transformer block (B, T, D) → (B, T, D). While training, each of its two branches is left out for a whole picture
    with probability `drop_path`, and scaled up when it stays. With `again` it keeps only x for the backward pass, and computes
    the rest a second time: a step takes about a third longer, and most of the memory is free."""

    again = False

    def __init__(self, dim, heads, drop_path=0.0, attention=Attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop = torchvision.ops.StochasticDepth(drop_path, "row")

    def forward(self, x):
        return checkpoint(self.branches, x, use_reentrant=False) if self.again else self.branches(x)

    def branches(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

def start_weights(module):
    """MAE's start: Xavier-uniform linear layers, the patch projection seen as one of them, and zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)

def fixed_positions(dim, grid):
    """→ positions (1, 1+N, dim) that do not learn, the class token's first."""
    table = torch.cat([torch.zeros(1, dim), sincos_positions(dim, grid)])                   # the class token's row is zero
    return nn.Parameter(table[None], requires_grad=False)                                   # (1, 1+N, D)

class ViT(nn.Module):
    """Vision transformer with timm's parameter names, in the two halves a masked autoencoder needs: `embed` makes every patch a
    token, `encode` runs the blocks over whichever tokens are left. `size` is the pictures' side or (height, width) in pixels.

    `vit(images)` gives the class token (`pool="cls"`) or the normalised mean of the patch tokens (`pool="mean"`), or with
    `classes` a linear head's logits. Raises Problem when size and patch, or dim and heads, do not divide.
    """

    def __init__(self, size=224, patch=16, channels=3, dim=768, depth=12, heads=12, classes=0, pool="cls", drop_path=0.0,
                 attention=Attention):
        super().__init__()
        self.size, self.patch, self.channels, self.dim, self.pool = pair(size), patch, channels, dim, pool
        self.grid = grid_of(self.size, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = fixed_positions(dim, self.grid)
        rates = torch.linspace(0, drop_path, depth).tolist()                                # deeper blocks are dropped more
        self.blocks = nn.Sequential(*(Block(dim, heads, rate, attention) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, classes) if classes else nn.Identity()
        self.apply(start_weights)

    def embed(self, images):
        """(B, C, H, W) → (B, N, D): a token with its position for every patch, no class token."""
        return self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]

    def with_class(self, tokens):
        """(B, n, D) → (B, 1+n, D): the class token in front."""
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1), tokens], dim=1)

    def encode(self, tokens):
        """(B, n, D) → (B, 1+n, D): class token in front, all blocks, final norm. `tokens` may be any subset of the patches."""
        return self.norm(self.blocks(self.with_class(tokens)))

    def forward(self, images):
        """(B, C, H, W) → features (B, D), or logits (B, classes)."""
        x = self.encode(self.embed(images))
        return self.head(self.fc_norm(x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1)))

    def attention_map(self, images, every=False):
        """(B, C, H, W) → (B, H, N): the last block's attention from the class token to the patches; with `every` that of all
        blocks one after the other, (B, depth·H, N)."""
        x, maps = self.with_class(self.embed(images)), []
        for k, block in enumerate(self.blocks):
            x = self.blocks[k - 1](x) if k else x                                           # (B, 1+N, D) as this block gets it
            if every or k == len(self.blocks) - 1:
                maps.append(block.attn.weights(block.norm1(x), 1)[:, :, 0, 1:])
        return torch.cat(maps, dim=1)

class Decoder(nn.Module):
    """MAE's light decoder, with the released names; grid, patch, channels and input width come from the encoder (section 3).

    decoder(latent (B, 1+n, D), restore (B, N)) → (B, N, P·P·C): one learned token stands in for every hidden patch, all tokens
    return to their places, a few narrow blocks follow, and a linear layer paints the pixels.
    """

    def __init__(self, encoder, dim=512, depth=8, heads=16):
        super().__init__()
        self.grid, self.decoder_embed = encoder.grid, nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.decoder_pos_embed = fixed_positions(dim, encoder.grid)
        self.decoder_blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, encoder.patch ** 2 * encoder.channels)
        self.apply(start_weights)

    def forward(self, latent, restore):
        x = self.decoder_embed(latent)                                                      # (B, 1+n, d)
        hidden = self.mask_token.expand(len(x), restore.shape[1] - x.shape[1] + 1, -1)      # (B, N−n, d)
        patches = take(torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1), restore)           # (B, N, d) each in its place
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed                  # (B, 1+N, d)
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)[:, 1:]))          # (B, N, P·P·C)

# -------------------------------------------------------------------------------------------------------------------- data

box = lambda x, y, a, b: torch.maximum(x.abs() - a, y.abs() - b)
SHAPES = {  # inside where f(x, y) < 0, in units of the object's radius, y pointing down
    "disc": lambda x, y: torch.hypot(x, y) - 0.82,
    "square": lambda x, y: box(x, y, 0.74, 0.74),
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.54,
    "star": lambda x, y: torch.stack([math.sin(a) * x + math.cos(a) * y for a in (0, 1.257, 2.513, 3.770, 5.027)]
                                     ).topk(2, dim=0).values[1] - 0.36,                     # inside four of five half-planes
    "cross": lambda x, y: torch.minimum(box(x, y, 0.3, 0.95), box(x, y, 0.95, 0.3)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.66).abs() - 0.21,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.7 - torch.hypot(x - 0.48, y)),
    "heart": lambda x, y: torch.minimum(0.707 * (x.abs() + y.abs()) - 0.57, torch.hypot(x.abs() - 0.4, y + 0.4) - 0.57),
    "arrow": lambda x, y: torch.minimum(torch.maximum(y - 0.1, 0.71 * (x.abs() - y) - 0.66), box(x, y - 0.4, 0.28, 0.5)),
    "bowtie": lambda x, y: torch.maximum(0.78 * (y.abs() - 0.8 * x.abs()) - 0.08, x.abs() - 0.88),
}

def draw_scenes(index, size=64, seed=0):
    """Scenes number `index` (B,) → images uint8 (B, 3, H, W), labels (B,) = index mod 10, foreground masks bool (B, H, W). One
    of ten shapes in any colour, texture, size, tilt (±30°) and place, over slow waves of colour and thin stray lines. A scene
    depends on (seed, index, size) alone."""
    (H, W), label = pair(size), index % 10
    side = min(H, W)                                                                        # the unit of length
    numbers = np.stack([np.random.default_rng([seed, i]).random(64, np.float32) for i in index.tolist()], axis=1)
    numbers = iter(torch.from_numpy(numbers)[..., None, None])                              # 64 of (B, 1, 1)
    rand = lambda low=0.0, high=1.0: low + (high - low) * next(numbers)
    colour = lambda low=0.0, high=1.0: torch.stack([rand(low, high) for _ in range(3)], 1)  # (B, 3, 1, 1)

    def wave(x, y, low, high):                                                              # low…high periods per unit
        turn, periods = rand(0, 6.283), 6.283 * rand(low, high)
        return torch.sin(x * (periods * turn.cos()) + (y * (periods * turn.sin()) + rand(0, 6.283)))

    X, Y = (torch.arange(W) + 0.5 - W / 2)[None] / side, (torch.arange(H) + 0.5 - H / 2)[:, None] / side
    ground = colour(0.1, 0.9)
    image = ground + (wave(X, Y, 0.3, 1.0) + wave(X, Y, 0.3, 1.0))[:, None] * colour(-0.1, 0.1)
    for _ in range(4):                                                                      # stray lines
        turn, shift, width = rand(0, 3.1416), rand(-0.45, 0.45), rand(0.006, 0.014)
        distance = (X * turn.cos() + (Y * turn.sin() - shift)).abs_()
        image.lerp_(colour(), distance.mul_(-side).add_(width * side + 0.5).clamp_(0, 1)[:, None])

    radius, turn = rand(0.3, 0.42), rand(-0.52, 0.52)
    x, y = (axis + rand(-1, 1) * (span / side / 2 - 0.9 * radius) for axis, span in ((X, W), (Y, H)))
    cos, sin = turn.cos() / radius, turn.sin() / radius
    x, y = x * cos + y * sin, y * cos - x * sin                                             # (B, H, W) the object's own frame
    distance = torch.empty_like(x)
    for k, shape in enumerate(SHAPES.values()):
        distance[label == k] = shape(x[label == k], y[label == k])
    cover = distance.mul_(-side * radius).add_(0.5).clamp_(0, 1)                            # 1 inside, a border one pixel soft
    bright, tint = ground.mean(1, keepdim=True), colour()                                   # lighter or darker than the ground
    tint = 0.8 * (tint - tint.mean(1, keepdim=True)) + bright + (1 - 2 * (bright > 0.5)) * rand(0.35, 0.55)[:, None]
    image.lerp_(tint + (wave(x, y, 0.5, 2.5) * rand(0, 0.12))[:, None], cover[:, None])
    return image.clamp_(0, 1).mul_(255).round_().byte(), label, cover > 0.5

class Pictures:
    """A data set in memory: images uint8 (M, C, H, W), labels (M,) with −1 for unknown, class names, each channel's mean and std
    (0 … 255) and, where they are known, foreground masks bool (M, H, W)."""

    def __init__(self, images, labels, classes, masks=None):
        self.images, self.labels, self.classes, self.masks = images, labels, list(classes), masks
        self.channels, self.size, few = images.shape[1], tuple(images.shape[2:]), images[:5_000].float()
        self.mean, self.std = few.mean((0, 2, 3))[:, None, None], few.std((0, 2, 3))[:, None, None].clamp(min=1)

    def __len__(self):
        return len(self.labels)

    def pick(self, index):
        """Keeps only the pictures of these numbers (M',)."""
        for name in ("images", "labels", "masks", "boxes"):
            if getattr(self, name, None) is not None:
                setattr(self, name, getattr(self, name)[index])

    def few(self, count, seed):
        """Keeps `count` pictures of each class, which ones is decided by `seed`. Raises Problem when a class has fewer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[order]
        each = [order[labels == k][:count] for k in range(len(self.classes))]
        if short := [f"{name} {len(found)}" for name, found in zip(self.classes, each) if len(found) < count]:
            raise Problem(f"there are not --labels {count} pictures of each class: {', '.join(short[:5])}")
        self.pick(torch.cat(each))

    def normalise(self, images):
        """Pixels 0 … 255 (B, C, H, W) → float with about zero mean and unit variance, on their device."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() - self.mean) / self.std

    def stream(self, plan, run, size, scale=None, change=None, crops=1):
        """Yields a batch for each (picture numbers (b,), seed) of the plan, on the run's device: images (b, C, h, w) normalised,
        labels (b,), masks (b, h, w) or None. With `scale`, the smallest share of the area that a random crop takes, torch is
        given the seed first, so that crops and whatever the model draws next repeat; without, the pictures come whole. `change`
        (uint8 (C, h, w) → the same) comes after the crop, picture by picture. With `crops` all come so many times, one round
        after the other, each time cropped anew; the batch is as many times larger."""
        for name in ("images", "labels", "masks"):                                          # the whole set moves to the device
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).to(run.device))
        for index, seed in plan:
            index = index.to(run.device, non_blocking=True).repeat(crops)
            images, masks = self.images[index], None if self.masks is None else self.masks[index]
            if scale:
                torch.manual_seed(seed)
                images, masks = random_crops(images, masks, pair(size), scale)
                if change:
                    images = torch.stack([change(image) for image in images.round().clamp(0, 255).byte()])
            elif pair(size) != self.size:
                resize = lambda x: F.interpolate(x.float(), size, mode="bicubic", antialias=True)
                images, masks = resize(images), None if masks is None else resize(masks[:, None])[:, 0] > 0.5
            yield self.normalise(images), self.labels[index], masks

class Scenes(Pictures):
    """The `count` scenes from number `first` on, as `Pictures` with masks, and with boxes (M, 4): left, top, right and bottom in
    pixels, the last two exclusive. 20,000 of 64×64 pixels are drawn in seconds."""

    def __init__(self, count, size=64, seed=0, first=0):
        chunks = torch.arange(first, first + count).split(200)                              # which fit the processor's cache
        images, labels, masks = map(torch.cat, zip(*(draw_scenes(chunk, size, seed) for chunk in chunks)))
        super().__init__(images, labels, SHAPES, masks)
        sides = [(line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)) for line in (masks.any(1), masks.any(2))]
        self.boxes = torch.stack([side for pair in zip(*sides) for side in pair], dim=1)

class Files(Pictures):
    """Picture files, decoded when they are needed by DataLoader workers; else as `Pictures`."""

    def __init__(self, paths, labels, classes):
        self.paths, self.labels, self.classes = np.array(list(map(os.fsencode, paths))), torch.as_tensor(labels), list(classes)
        self.channels, self.size, self.broken = 3, (224, 224), set()
        self.mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]                  # ImageNet's
        self.std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]

    def pick(self, index):
        super().pick(index)
        self.paths, self.broken = self.paths[index.numpy() if torch.is_tensor(index) else index], set()

    def read(self, i):
        """→ uint8 (3, H, W); grey, palette, alpha and CMYK become RGB. Raises RuntimeError or OSError for a broken picture."""
        data = torch.from_numpy(np.fromfile(os.fsdecode(self.paths[i]), np.uint8))          # read_file trips over odd names
        image = torchvision.io.decode_image(data, torchvision.io.ImageReadMode.RGB)
        image = image[0] if image.ndim == 4 else image                                      # the first of moving pictures
        return v2.functional.to_dtype(image, torch.uint8, scale=True)                       # from 16-bit PNG

    def __getitem__(self, key):
        """(i, seed) → what `transform` makes of picture i, `crops` times, its label, the seed, and i again if it was broken, else
        −1: then the next whole picture stands in for it."""
        i, seed = key
        for j in range(i, i + 20):
            try:
                image = self.read(j % len(self))
                break
            except (RuntimeError, OSError):
                image = torch.zeros(3, *self.size, dtype=torch.uint8)
        torch.default_generator.manual_seed(seed)                                           # torch.manual_seed takes half a ms
        views = torch.stack([self.transform(image) for _ in range(self.crops)])             # of one decoding
        return views, self.labels[j % len(self)], seed, -1 if i == j else i

    def stream(self, plan, run, size, scale=None, change=None, crops=1):
        smooth = dict(interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        edge = round(min(pair(size)) * (256 / 224 if min(pair(size)) <= 224 else 1))        # as in MAE's code
        whole = scale in (None, 1)                                                          # torchvision would cut off ends
        crop = v2.Resize(pair(size), **smooth) if whole else v2.RandomResizedCrop(pair(size), (scale, 1.0), **smooth)
        self.crops, self.transform = crops, v2.Compose(
            [crop, v2.RandomHorizontalFlip(), change or v2.Identity()] if scale else
            [v2.Resize(edge, **smooth), v2.CenterCrop(pair(size))])
        keys = ([(i, seed_of(seed, i)) for i in index.tolist()] for index, seed in plan)
        for images, labels, seeds, broken in torch.utils.data.DataLoader(
                self, batch_sampler=keys, num_workers=run.workers, pin_memory=run.device.type == "cuda",
                worker_init_fn=leave_signals):
            self.broken = self.broken | set(broken.tolist()) - {-1}                         # not |=, copies may share the set
            if len(self.broken) > 0.01 * len(self):
                print("unreadable:", *(os.fsdecode(self.paths[i]) for i in sorted(self.broken)), sep="\n  ", file=sys.stderr)
                raise Problem(f"{len(self.broken)} of {len(self)} pictures, over 1 %, could not be read: mend or remove those")
            torch.manual_seed(seeds[0].item())
            images = images.to(run.device, non_blocking=True).transpose(0, 1).flatten(0, 1)           # (crops·b, C, h, w)
            yield self.normalise(images), labels.to(run.device, non_blocking=True).repeat(crops), None

def leave_signals(worker):
    """Has a DataLoader's worker live on for a while when terminals and schedulers signal all processes: the run saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))

IN_MEMORY = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10",
             "cifar100": "CIFAR100", "stl10": "STL10"}                                      # our names: torchvision's
DECODED = {"imagenette": "Imagenette", "flowers102": "Flowers102", "food101": "Food101", "pets": "OxfordIIITPet"}
SPLITS = {"stl10": ("train+unlabeled", "test"), "imagenette": ("train", "val"), "pets": ("trainval", "test")}

def open_data(name=None, root="data", size=64, seed=0, limit=None):
    """→ [training set, validation set or None]. `name` as in --data: None draws scenes of `size` pixels, else a torchvision name
    (downloaded to `root`) or a folder. `limit`: only the first so many. Raises Problem for anything else, or no pictures."""
    if name is None:                                                                        # 24,000 scenes, drawn in seconds
        parts = [Scenes(min(20_000, limit or 20_000), size, seed), Scenes(min(4_000, limit or 4_000), size, seed, first=1 << 40)]
    elif name in IN_MEMORY or name in DECODED:
        parts = [torchvision_part(name, root, held_out) for held_out in (False, True)]
    elif os.path.isdir(os.path.join(name, "train")):
        train, val = folder(os.path.join(name, "train")), os.path.join(name, "val")
        parts = [train, folder(val, train.classes) if os.path.isdir(val) else None]
    elif os.path.exists(name):
        parts = [folder(name), None]
    else:
        near = difflib.get_close_matches(name.lower(), [*IN_MEMORY, *DECODED], 1)
        raise Problem(f"--data {name} is neither a folder nor a data set's name; " + (
            f"did you mean {near[0]}?" if near else f"the names are {', '.join([*IN_MEMORY, *DECODED])}"))
    for part in filter(None, parts):
        part.pick(slice(limit))
        part.mean, part.std = parts[0].mean, parts[0].std                                   # what a model is trained with
    return parts

def load_data(args, run):
    """→ training and validation set (or None) of --data. They are normalised as the pictures that --init was trained on, where
    that is known; what a checkpoint has to tell of them is put into args: channels, mean, std."""
    train, val = run.in_turn(lambda: open_data(args.data, args.root, args.size, args.seed, args.limit))
    for data in filter(None, (train, val) if getattr(args, "mean", None) else ()):
        data.mean, data.std = (torch.tensor(numbers)[:, None, None] for numbers in (args.mean, args.std))
    args.channels, args.mean, args.std = train.channels, train.mean.flatten().tolist(), train.std.flatten().tolist()
    return train, val

def torchvision_part(name, root, held_out):
    """→ the training or `held_out` pictures of a torchvision data set, downloaded if need be. Raises Problem if that fails."""
    split = {"split": SPLITS.get(name, ("train", "test"))[held_out]} if name in {*SPLITS, *DECODED} else {"train": not held_out}
    try:
        source = getattr(torchvision.datasets, (IN_MEMORY | DECODED)[name])(root, download=True, **split)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise Problem(f"{name} is not whole in {root}, and downloading it failed: {(str(error) or repr(error)).splitlines()[0]}")
    if name in DECODED:
        paths, labels = zip(*source._samples) if name == "imagenette" else (
            source._images if name == "pets" else source._image_files, source._labels)
        return Files(paths, labels, [name if isinstance(name, str) else name[0] for name in source.classes])     # or synonyms
    images = torch.as_tensor(source.data)
    images = images[:, None] if images.ndim == 3 else images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(source.targets if hasattr(source, "targets") else source.labels)
    return Pictures(images.contiguous(), labels.long(), source.classes)

def folder(root, classes=None):
    """All pictures below a folder, or one file → Files. Sub-folders are classes if there are several and hold all pictures."""
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    paths, seen = [root] * (os.path.isfile(root) and root.lower().endswith(kinds)), set()
    tops = ["."] * len(paths)                                                               # each one's uppermost folder
    for here, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(here) in seen:                                                  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith(".") and name.lower().endswith(kinds))
        paths += [os.path.join(here, name) for name in names]
        tops += [os.path.relpath(here, root).split(os.sep)[0]] * len(names)                 # "." is none
    if not paths:
        raise Problem(f"no .jpg, .jpeg, .png or .webp picture in {root} or below it")
    names = classes or sorted({*tops} if "." not in tops else ())
    number = {name: k for k, name in enumerate(names)} if len(names) > 1 else {}
    if classes and {*tops} - {*number}:
        lost = next(path for path, top in zip(paths, tops) if top not in number)
        raise Problem(f"{lost} is in no folder of the training set's classes: {', '.join(classes[:5])} …")
    return Files(paths, [number.get(top, -1) for top in tops], number)

def crop_weights(start, length, source, size):
    """Weights (B, size, source) that resample `length` pixels from `start` on, both (B,), to `size` pixels: Keys' cubic with
    a = −1/2, widened when it shrinks, as in torch's own antialiased bicubic resize."""
    step = (length / size)[:, None, None]
    centre = start[:, None, None] + step * (torch.arange(size, device=start.device) + 0.5)[:, None] - 0.5
    t = ((torch.arange(source, device=start.device) - centre) / step.clamp(min=1)).abs()
    weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, torch.where(t < 2, ((2.5 - 0.5 * t) * t - 4) * t + 2, 0.0))
    return weights / weights.sum(-1, keepdim=True)

def random_crops(images, masks, size, scale):
    """RandomResizedCrop and flip of a whole batch on its device, each picture in its own way: (B, C, H, W) → float (B, C, h, w),
    and masks, if any, alike. `scale` 1 keeps all of a picture. A crop is two matrix products, for its rows and its columns."""
    B, _, H, W = images.shape
    area, aspect, top, left, flip = torch.rand(5, B, device=images.device)
    area, aspect = H * W * (scale + (1 - scale) * area), (4 / 3) ** (2 * aspect - 1)
    w = (area / (area / aspect).sqrt().clamp(max=H)).clamp(max=W)                           # (B,) what fits, of this area
    h = area / w
    rows, columns = crop_weights(top * (H - h), h, H, size[0]), crop_weights(left * (W - w), w, W, size[1])
    columns = torch.where((flip < 0.5)[:, None, None], columns.flip(1), columns).transpose(1, 2)
    masks = None if masks is None else rows @ masks.float() @ columns > 0.5
    return rows[:, None] @ images.float() @ columns[:, None], masks

def erase(images, probability, area=(0.02, 0.33), aspect=3.3, noise=True):
    """RandomErasing of a whole batch on its device: images (B, C, H, W) → the same, in which a rectangle, of a share of the area
    between those two and `aspect` at most, is noise of each pixel's own, or 0, with this probability for each picture."""
    B, _, H, W = images.shape
    share, shape, top, left, chance = torch.rand(5, B, 1, 1, 1, device=images.device)
    share, shape = H * W * (area[0] + (area[1] - area[0]) * share), aspect ** (2 * shape - 1)
    h, w = (share * shape).sqrt().round().clamp(max=H), (share / shape).sqrt().round().clamp(max=W)
    top, left = (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor()
    row, column = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w) & (chance < probability)   # (B, 1, H, W)
    return torch.where(inside, torch.randn_like(images) if noise else 0.0, images)

def seed_of(*numbers):
    """Whole numbers → one seed, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")

class Batches:
    """The pictures of every step, a function of (seed, step, place in the global batch) alone: a run goes on anywhere, and the
    micro-batches are the same whether one process takes four in turn or four processes take one each. A step takes `times` as
    many as --batch says; there are `steps`, if that is given, else --epochs epochs. With --crops an epoch still takes every
    picture once, but in so many crops, so it has as many times the steps. Raises Problem when micro-batches do not divide by
    --crops."""

    def __init__(self, data, run, size, scale, change=None, times=1, steps=None):
        crops = run.args.crops
        if run.micro % crops:
            raise Problem(f"micro-batches of {run.micro} do not divide by --crops {crops}: change --batch or --micro-batch")
        self.data, self.run, self.view, self.batches = data, run, (size, scale, change, crops), None
        self.batch, self.micro = run.args.batch * times // crops, run.micro * times // crops          # different pictures
        self.per_epoch = max(1, len(data) // self.batch)                                    # a smaller last batch is left out
        self.steps = steps or run.args.epochs * self.per_epoch

    def plan(self, first):
        """This process's micro-batches from a step on: picture numbers (b,) and a seed for each."""
        seed, share = self.run.args.seed, self.micro * self.run.accumulate
        for step in range(first, self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if place == 0 or step == first:
                order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
            start = place * self.batch + self.run.rank * share
            for i, index in enumerate(order[torch.arange(start, start + share) % len(order)].split(self.micro)):
                yield index, seed_of(seed, step, self.run.rank * self.run.accumulate + i)

    def at(self, step):
        """Yields this process's micro-batches of a step, as `Pictures.stream` does."""
        self.batches = self.batches or self.data.stream(self.plan(step), self.run, *self.view)
        for _ in self.run.each(range(self.run.accumulate)):
            yield next(self.batches)

def save_sheet(path, rows):
    """Writes a PNG: under each title in `rows` its uint8 pictures (n, C, H, W) side by side; all rows of one shape."""
    strips = []
    for title, images in rows.items():
        images = F.interpolate(images.expand(-1, 3, -1, -1).float(), scale_factor=max(1, 128 // images.shape[-1])).byte().cpu()
        strip = torch.cat([*F.pad(images, (4, 0, 24, 4), value=255)], dim=2)                # (3, h, w)
        strip = F.pad(strip, (0, max(0, 8 * max(map(len, rows)) + 8 - strip.shape[2])), value=255)         # room for the titles
        strips.append(Image.fromarray(strip.permute(1, 2, 0).numpy()))
        ImageDraw.Draw(strips[-1]).text((4, 4), title, "black", ImageFont.load_default(15))
    sheet = np.concatenate([np.asarray(strip) for strip in strips])
    Image.fromarray(sheet).save(path)

# -------------------------------------------------------------------------------------------------------------- checkpoints

def read_checkpoint(path, whole=False):
    """→ the dictionary in a checkpoint file, on the CPU; runs no code in it. Unless `whole` is asked for, tensors are read when
    they are used. Raises Problem if there is none or it is broken."""
    if os.path.isdir(path):
        raise Problem(f"{path} is a folder: name the checkpoint in it, last.pt say")
    try:
        with torch.serialization.safe_globals([Namespace]):                                 # MAE's code saves its options as one
            lazy = not whole and zipfile.is_zipfile(path)                                   # not so the oldest kind of file
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except FileNotFoundError:
        raise Problem(f"there is no checkpoint {path}")
    except Exception as error:                                                              # zip, pickle, end of file …
        raise Problem(f"{path} is cut off or is no checkpoint ({type(error).__name__})")
    if not isinstance(saved, dict):
        raise Problem(f"{path} is no checkpoint: it holds a {type(saved).__name__}")
    return saved

def write_whole(path, write):
    """Writes a file so that a kill or a full disk leaves the old one: beside it, flushed to the disk, then renamed."""
    try:
        with open(f"{path}.part", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(f"{path}.part"):
            os.remove(f"{path}.part")
        raise Problem(f"could not write {path}: {error}" + ("; the one before it is whole" if os.path.exists(path) else ""))

SIGNS = {"encoder": {"patch_embed.proj.weight": 4, "pos_embed": 3},                         # tensors and their dimensions
         "decoder": {"decoder_embed.weight": 2, "decoder_pos_embed": 3}}

def weights_in(path, part="encoder"):
    """→ the encoder's or decoder's tensors by name, and the options or {}, from a file of this project, MAE's release or timm."""
    saved = read_checkpoint(path)
    args, state = saved.get("args"), next((saved[name] for name in (part, "model", "state_dict")
                                           if isinstance(saved.get(name), dict)), saved)
    state = {str(name).removeprefix("module."): value for name, value in state.items() if torch.is_tensor(value)}
    for name, ndim in SIGNS[part].items():
        if name not in state or state[name].ndim != ndim:
            kinds = "this project, MAE's release or timm's VisionTransformer" if part == "encoder" else "pre-training"
            raise Problem(f"{path} has no {part} of {kinds}: it lacks a {ndim}-dimensional {name}")
    return state, vars(args) if isinstance(args, Namespace) else args if isinstance(args, dict) else {}

def vit_of(path):
    """→ what the encoder in a checkpoint is, as `ViT` takes it: size, patch, channels, dim, depth, heads. Where the file does not
    say, pictures are square and heads as in `VITS`, else 64 wide."""
    state, args = weights_in(path)
    (dim, channels, patch, _), places = state["patch_embed.proj.weight"].shape, state["pos_embed"].shape[1] - 1
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    usual = next((vit["heads"] for vit in VITS.values() if (vit["dim"], vit["depth"]) == (dim, depth)), max(1, dim // 64))
    return dict(size=args.get("size") or math.isqrt(places) * patch, patch=patch, channels=channels, dim=dim, depth=depth,
                heads=(args.get("vit") or {}).get("heads", usual))

def decoder_of(path):
    """→ what the decoder in a checkpoint is, as `Decoder` takes it: dim, depth, heads (16 where the file does not say)."""
    state, args = weights_in(path, "decoder")
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
    return dict(dim=len(state["decoder_embed.weight"]), depth=depth, heads=args.get("decoder_heads", 16))

def fill(module, state, path, table, grid, args, free):
    """Puts tensors into a module; resizes its position `table` to `grid`, as MAE does for other sizes; → what was done."""
    own, told, places = module.state_dict(), [], state[table].shape[1] - 1
    old = grid_of(pair(args["size"]), args["patch"]) if "size" in args and "patch" in args else (math.isqrt(places),) * 2
    if old[0] * old[1] != places and places != grid[0] * grid[1]:
        raise Problem(f"{path} has {places} positions beside the class token's, not a square of them: these cannot be resized")
    if old[0] * old[1] == places and old != tuple(grid):                                    # else taken to be the same oblong
        square = state[table][:, 1:].unflatten(1, old).permute(0, 3, 1, 2).float()          # (1, D, h, w)
        square = F.interpolate(square, grid, mode="bicubic").flatten(2).transpose(1, 2)
        state = state | {table: torch.cat([state[table][:, :1], square], dim=1)}
        told = [f"positions resized from {old[0]}×{old[1]} to {grid[0]}×{grid[1]}"]
    fits = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    for verb, names in (("left out", state.keys() - fits), ("new", own.keys() - fits)):
        if strange := sorted(name for name in names if not name.startswith(free)):
            raise Problem(f"{path} does not fit this model: {verb} would be {', '.join(strange[:4])} …")
        told += [f"{verb}: {', '.join(sorted({name.split('.')[0] for name in names}))}"] * bool(names)
    module.load_state_dict(fits, strict=False)
    return "; ".join([f"{len(fits)} tensors from {path}", *told])

def load_encoder(vit, path):
    """Fills a ViT from a checkpoint of this project (any method), of MAE's release or of timm. → a line that says what was left
    out, what keeps its fresh start (a head of other size, say), and whether positions were resized. Raises Problem when the
    file is none of these, or its encoder has another patch, channel count, width, depth or number of heads."""
    state, args = weights_in(path)
    there, here = vit_of(path), dict(patch=vit.patch, channels=vit.channels, dim=vit.dim, depth=len(vit.blocks),
                                     heads=vit.blocks[0].attn.heads)
    if wrong := [name for name in here if here[name] != there[name] and (name != "heads" or "vit" in args)]:
        raise Problem(f"{path} holds an encoder with " + ", ".join(f"{name} {there[name]} (here {here[name]})" for name in wrong)
                      + "; it wants " + ", ".join(f"{name} {value}" for name, value in there.items() if name != "size"))
    return fill(vit, state, path, "pos_embed", vit.grid, args, ("head.", "norm.", "fc_norm.", "decoder_", "mask_token"))

def load_decoder(decoder, path):
    """The same for a decoder; its encoder's weights in the same file are left out. Its blocks, width and patch must agree."""
    state, args = weights_in(path, "decoder")
    state = {name: value for name, value in state.items() if name.startswith(("decoder_", "mask_token"))}
    return fill(decoder, state, path, "decoder_pos_embed", decoder.grid, args, ())

# --------------------------------------------------------------------------------------------------------------------- run

def shared_options(script, description, paper=None):
    """→ a parser with the options that mean the same in all scripts, and a way to add a script's own to each of its groups. Their
    help names MAE's values, or those of `paper`."""
    usual = dict(epochs=800, batch=4096, lr=1.5e-4, warmup=40, weight_decay=0.05, decayed="weight matrices", crop=0.2,
                 model="base", decoder_dim=512, decoder_depth=8, decoder_heads=16) | (paper or {})
    parser = ArgumentParser(script, description=f"{description} What is left out comes from a preset: scenes (no --data), small "
                            "(torchvision's small sets) or imagenet. In brackets: the paper's value, or the default.")
    add = {name: parser.add_argument_group(name).add_argument for name in ("data", "model", "training", "run")}
    add["data"]("--data", type=lambda name: name.rstrip("/") or name,
                help="a torchvision name (fashion-mnist, cifar10, stl10, imagenette …) or a folder; left out: scenes")
    add["data"]("--root", default="data", help="folder that torchvision downloads to (data)")
    add["data"]("--limit", type=int, help="only the first so many pictures, for a quick try")
    add["data"]("--size", type=int, help="side of the pictures in pixels (224)")
    add["data"]("--crop", type=float, help=f"smallest share of a picture's area that a crop takes, 1: no crops ({usual['crop']})")
    add["data"]("--crops", type=int, default=1, help="crops of each decoded picture: so many times the samples (1)")
    add["data"]("--workers", type=int, help="processes that decode pictures, for each training process (its cores, at most 16)")
    add["model"]("--model", choices=VITS, help="size of the encoder ({model})".format(**usual))
    add["model"]("--patch", type=int, help="side of a patch in pixels (16, huge 14; pictures below 104 pixels 8, below 52 4)")
    add["model"]("--decoder-dim", type=int, help="width of the decoder ({decoder_dim})".format(**usual))
    add["model"]("--decoder-depth", type=int, help="blocks of the decoder ({decoder_depth})".format(**usual))
    add["model"]("--decoder-heads", type=int, help="attention heads of the decoder ({decoder_heads})".format(**usual))
    add["training"]("--epochs", type=int, help=f"times that every picture is seen ({usual['epochs']})")
    add["training"]("--batch", type=int, help=f"pictures a step, over all processes together ({usual['batch']})")
    add["training"]("--micro-batch", type=int, help="pictures a process takes at once; gradients add up (at most 256)")
    add["training"]("--lr", type=float, help="peak learning rate for a batch of 256; × batch / 256 ({lr:g})".format(**usual))
    add["training"]("--warmup", type=float, help=f"epochs of linear warm-up ({usual['warmup']})")
    add["training"]("--weight-decay", type=float, default=0.05, help="of {decayed} ({weight_decay:g})".format(**usual))
    add["training"]("--seed", type=int, default=0, help="decides weights, order, crops and masks (0)")
    add["run"]("--out", help="folder for last.pt, log.jsonl, args.json and pictures (runs/SCRIPT, with --task runs/SCRIPT-TASK)")
    add["run"]("--resume", action="store_true", help="go on from OUT/last.pt, with its options where none are given")
    add["run"]("--overwrite", action="store_true", help="start again in a folder that holds a run")
    add["run"]("--save-every", type=float, default=30.0, help="seconds between checkpoints, at least (30)")
    add["run"]("--checkpoint-blocks", action=BooleanOptionalAction, default=False, help="less memory: a transformer's blocks are "
               "computed again in the backward pass (off)")
    add["run"]("--device", help="cuda, cpu … (cuda if there is one)")
    add["run"]("--precision", choices=("bf16", "fp16", "fp32"), help="of matrix products (bf16 on GPUs that have it; CPUs fp32)")
    add["run"]("--compile", action=BooleanOptionalAction, help="torch.compile the model (on GPUs)")
    return parser, add

def settings(parser, preset, arguments=None, only=()):
    """Parses the command line. What it leaves open comes from the run to resume, else from `preset(args, kind)`, a dictionary for
    the kind of data: scenes, small or imagenet. `--out` is runs/<script>, and with a --task runs/<script>-<task>. `only` names
    options that do something only with some values of another, (that one, its values, their names), and else are refused."""
    def refuse(message):
        raise Problem(f"{message} (--help lists the options)")

    parser.error = refuse
    args = parser.parse_args(arguments)
    task, usual, script = getattr(args, "task", ""), parser.get_default("task") or "", os.path.splitext(parser.prog)[0]
    out = os.path.normpath(args.out or f"runs/{script}" + f"-{task}" * (task != usual) + "-eval" * getattr(args, "eval", False))
    if args.resume and args.overwrite:
        refuse("--resume goes on with a run and --overwrite drops it: give one of them")
    old = {}
    if args.resume and os.path.exists(f"{out}/last.pt"):
        old = read_checkpoint(f"{out}/last.pt").get("args", {})
    elif args.resume and os.path.exists(f"{out}/args.json"):                                # stopped before its first checkpoint
        try:
            with open(f"{out}/args.json") as file:
                old = json.load(file)
        except ValueError:
            refuse(f"{out}/args.json is cut off: start again with --overwrite")
    if old.get("script", script) != script:
        refuse(f"{out} holds a run of {old['script']}.py: name another --out")
    if old:
        parser.set_defaults(**{name: value for name, value in old.items() if name not in ("resume", "overwrite", "out")})
        args = parser.parse_args(arguments)
        for name in ("task", "init", "data", "limit", "labels", "size", "batch", "crops", "seed", "weight_decay", "layer_decay",
                     "imbalance", "unlabelled", "held_out"):
            was, now = parser.get_default(name), getattr(args, name, None)
            if now != was:
                refuse(f"the run to resume has --{name.replace('_', '-')} {was}, not {now}: leave it out")
    for option, values, names in only:
        for name in names.split() if not {*str(getattr(args, option)).split("+")} & {*values.split()} else ():
            if getattr(args, name) != parser.get_default(name):
                goes = f"with --{option} " + " or ".join(values.split()).replace("True", "")
                refuse(f"--{name.replace('_', '-')} does nothing here: it goes "
                       + (f"without --{option}" if values == "None" else goes.rstrip()))
    kind = "scenes" if args.data is None else "small" if args.data in IN_MEMORY else "imagenet"
    given = {name: value for name, value in vars(args).items() if value is not None} | dict(out=out, script=script)
    args = Namespace(**vars(args) | ({} if old else preset(args, kind)) | given)
    least = dict(limit=1, crops=1, size=1, patch=1, epochs=1, batch=1, micro_batch=1, decoder_dim=4, decoder_heads=1,
                 decoder_depth=0, labels=1, train_blocks=0, workers=0, seed=0, lr=0, min_lr=0, warmup=0, weight_decay=0,
                 save_every=0, bank=0, mixup=0, cutmix=0, contrastive_weight=0, adversarial_weight=0, mask_factor=0,
                 prior_epochs=1, augmentor_epochs=1, imbalance=1, unlabelled=1, held_out=1, ways=2, queries=1, episodes=2,
                 copies=0)
    if not 0 <= (getattr(args, "randaugment", None) or 0) <= 10:
        refuse(f"--randaugment must lie between 0 and 10, not {args.randaugment}")
    read = [getattr(args, name, None) for name in ("init", "prior", "augmentor")]
    for path in filter(None, [*read, *getattr(args, "compare", [])]):
        if args.overwrite and os.path.dirname(os.path.realpath(path)) == os.path.realpath(out):
            refuse(f"--overwrite would remove {path}: name another --out")
    shares = ("crop", "layer_decay", "drop_path", "label_smoothing", "erasing", "apply", "threshold", "ema")
    for name, value in vars(args).items():
        if name in least and value is not None and not least[name] <= value < 2 ** 63:
            refuse(f"--{name.replace('_', '-')} must be at least {least[name]} and finite, not {value}")
        if name in shares and value is not None and not 0 <= value <= 1 or name == "crop" and value == 0:
            refuse(f"--{name.replace('_', '-')} must lie between 0 and 1, not {value}")
    return args

def fit(args):
    """→ args with the size, patch and width that the options leave open. Raises Problem for a patch larger than the picture."""
    args.size = args.size or {"stl10": 96}.get(args.data, 32 if "cifar" in args.data else 28)
    if args.model:                                                                          # else `vit` came from a checkpoint
        args.vit = {part: VITS[args.model][part] for part in ("dim", "depth", "heads")}
        args.patch = args.patch or next((p for p in (4, 8) if args.size // p <= 12), VITS[args.model]["patch"])
    if args.patch > args.size:
        raise Problem(f"--patch {args.patch} is larger than the pictures, {args.size} pixels")
    return args

def check_ratio(args):
    """Raises Problem unless --mask-ratio leaves some patches visible and hides some."""
    places = math.prod(grid_of(pair(args.size), args.patch))
    if not (0 < args.mask_ratio < 1 and 0 < visible(places, args.mask_ratio) < places):
        raise Problem(f"--mask-ratio {args.mask_ratio} must lie between 0 and 1, leave one of the {places} patches visible and "
                      "hide one")

def build(args, attention=Attention):
    """→ encoder and decoder as the options say, with the weights that --seed gives."""
    torch.manual_seed(args.seed)
    encoder = ViT(args.size, args.patch, args.channels, **args.vit, attention=attention)
    return encoder, Decoder(encoder, args.decoder_dim, args.decoder_depth, args.decoder_heads)

def schedule(step, warmup, total):
    """Share of the peak learning rate at a step: up in a straight line over `warmup` steps, then down half a cosine to 0."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

def adamw(model, weight_decay, betas=(0.9, 0.95), layer_decay=1.0):
    """Fused AdamW that does not decay biases, norms, tokens and positions. (MAE's released code spares what is 1-D, so it does
    decay its tokens, which are 3-D.) With `layer_decay` a ViT's earlier layers learn more slowly: embeddings and tokens are layer
    0, block k is k + 1, norm and head depth + 1, and a layer's rate is layer_decay ** (depth + 1 − layer) of the full one."""
    groups, top = {}, len(getattr(model, "blocks", ())) + 1
    for name, p in model.named_parameters():
        layer = (int(name.split(".")[1]) + 1 if name.startswith("blocks.") else
                 0 if name.startswith(("patch_embed", "cls_token", "pos_embed")) else top)
        spared = p.ndim < 2 or name.endswith(("_token", "pos_embed"))
        if p.requires_grad:
            groups.setdefault((layer, spared), dict(params=[], lr_scale=layer_decay ** (top - layer),
                                                    weight_decay=0.0 if spared else weight_decay))["params"].append(p)
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=betas, fused=True)

class Run:
    """What a training loop needs around it: processes, device, precision, learning rate, log, checkpoints. The loop stays the
    script's. Reads from `args`: out resume overwrite device precision compile checkpoint_blocks size batch micro_batch epochs lr
    min_lr (if there is one) warmup workers save_every. Raises Problem when these do not fit together, or when the folder holds
    a run already."""

    def __init__(self, args):
        env = lambda name, default: int(os.environ.get(name, default))                      # torchrun's
        self.args, self.out, self.rank, self.world = args, args.out, env("RANK", 0), env("WORLD_SIZE", 1)
        self.local, here, gpus = env("LOCAL_RANK", 0), env("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        kind = args.device or ("cuda" if gpus else "cpu")
        if ":" in kind:
            raise Problem(f"--device {kind}: say {kind.split(':')[0]}; CUDA_VISIBLE_DEVICES picks among GPUs")
        if kind == "cuda" and here > gpus:
            raise Problem(f"{here} process(es) for {gpus} GPU(s): lower --nproc_per_node, or use --device cpu")
        try:
            if kind not in ("cpu", "cuda", "mps", "xpu"):
                raise RuntimeError
            self.device = torch.empty(0, device=f"cuda:{self.local}" if kind == "cuda" else kind).device
        except (RuntimeError, AssertionError, NotImplementedError):
            raise Problem(f"there is no device {kind} here: leave --device out, or say cuda or cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")                                      # TF32 where it is fp32
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=2))
        best = "fp32" if kind != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.precision, self.workers = args.precision or best, args.workers
        self.scaler = torch.amp.GradScaler(kind, enabled=self.precision == "fp16")
        if self.workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self.workers = min(16, cores // here)
        share, rest = divmod(args.batch, self.world)
        if rest:
            raise Problem(f"--batch {args.batch} is for all processes together and does not divide among {self.world} processes")
        most = max(1, min(share, 256 // getattr(args, "views", 1)))                         # FixMatch's bring others with them
        self.micro = args.micro_batch or max(m for m in range(1, most + 1) if share % m == 0)
        self.accumulate = share // self.micro
        if self.accumulate * self.micro != share:
            raise Problem(f"--batch {args.batch} is {share} pictures a process, which --micro-batch {self.micro} does not divide")
        self.step, self.seconds, self.stop, self.sums, self.notes, self.kept, self.wrapped = 0, 0.0, 0, {}, {}, {}, []
        self.data = None
        if self.rank == 0:
            self.claim()
        args.resume = args.resume and os.path.exists(f"{self.out}/last.pt")                 # else from the start, as it was meant

    def claim(self):
        """Raises Problem when the folder holds a run that is neither to be resumed nor overwritten."""
        there = [name for name in ("last.pt", "best.pt", "log.jsonl", "args.json") if os.path.exists(f"{self.out}/{name}")]
        if self.args.resume and "last.pt" not in there and there != ["args.json"]:
            raise Problem(f"nothing to resume: there is no {self.out}/last.pt")
        if there and not (self.args.resume or self.args.overwrite):
            raise Problem(f"{self.out} holds a run: " + "go on with --resume, " * ("last.pt" in there or there == ["args.json"])
                          + "start again with --overwrite, or name another --out")
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise Problem(f"--out {self.out} is a file: name a folder")
        os.makedirs(self.out, exist_ok=True)

    def in_turn(self, make):
        """→ make(), called on each machine by one process before the others: it may download or write something."""
        if self.local:
            dist.barrier()
        made = make()
        if self.world > 1 and not self.local:
            dist.barrier()
        return made

    def say(self, text, **how):
        """Prints, from process 0 alone."""
        if self.rank == 0:
            print(text, flush=True, **how)

    def note(self, **values):
        """Adds values to the epoch's line in log.jsonl as they are."""
        self.notes |= values

    def aside(self, work):
        """→ work(), whose time does not count in images_per_s."""
        start = time.time()
        done = work()
        self.mark = (self.mark[0] + time.time() - start, self.mark[1])
        return done

    def write(self, **record):
        """Appends one JSON object to log.jsonl, from process 0 alone."""
        if self.rank == 0:
            with open(f"{self.out}/log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def introduce(self, model, data):
        """Says what is about to be trained, on what and how."""
        learns, self.data = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6, data
        self.say(f"{learns:.3g} M parameters learn from {len(data)} pictures of {self.args.size} pixels a side on {self.world} × "
                 f"{self.device.type} in {self.precision}, batches of {self.world} × {self.accumulate} × {self.micro}")
        if len(data) < self.args.batch:
            self.say(f"--batch {self.args.batch} is more than there are pictures, each is seen several times a step: try a "
                     "smaller one")
        if self.args.warmup >= self.args.epochs:
            self.say(f"--warmup {self.args.warmup:g} epochs are all of {self.args.epochs}: the learning rate only rises")

    def put(self, name, **things):
        """Writes things to OUT/name, from process 0 alone."""
        if self.rank == 0:
            write_whole(f"{self.out}/{name}", lambda file: torch.save(things, file))

    def autocast(self):
        kind = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.precision != "fp32")

    def wrap(self, model):
        """Moves a model to the device, compiles it in place (names stay) and, if it learns, wraps it in DDP under torchrun."""
        model.to(self.device)
        for part in model.modules() if self.args.checkpoint_blocks else ():
            if isinstance(part, Block):
                part.again = True
        if self.args.compile or (self.args.compile is None and self.device.type == "cuda"):
            torch._dynamo.config.recompile_limit = 64                                       # which counts all models together
            # blocks may note something for the log, to no harm also when they are computed again
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
            model.compile(dynamic=False)
        if self.world > 1 and any(p.requires_grad for p in model.parameters()):
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.wrapped.append(model)
        return model

    def keep(self, **things):
        """Names what a checkpoint holds: models and optimizers. With --resume they are read back here; without, what an older run
        left in the folder goes now, when nothing can be refused any more."""
        self.kept = things | ({"scaler": self.scaler} if self.scaler.is_enabled() else {})
        if self.args.resume:
            saved = read_checkpoint(f"{self.out}/last.pt", whole=True)
            try:
                for name, thing in self.kept.items():
                    if name != "scaler" or name in saved:                                   # it was another precision then
                        thing.load_state_dict(saved[name])
                self.step, self.seconds, sums = saved["step"], saved["seconds"], saved["sums"]
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise Problem(f"{self.out}/last.pt does not fit this model: {' '.join(str(error).split())[:180]}")
            self.sums = {name: value.to(self.device) for name, value in sums.items()}
        self.begin()

    def begin(self):
        """From here on the folder is this run's: writes args.json and, without --resume, removes what an older run left."""
        for name in ("last.pt", "best.pt", "log.jsonl") if self.rank == 0 and not self.args.resume else ():
            if os.path.exists(f"{self.out}/{name}"):
                os.remove(f"{self.out}/{name}")
        if self.rank == 0:
            write_whole(f"{self.out}/args.json", lambda file: file.write(json.dumps(vars(self.args), indent=1).encode()))

    def prepare(self, first, result, names, make):
        """Sees to it that another run, with the options `first`, has left the file `result` in its folder: make(first) starts it,
        or goes on with it. → the file's path. Raises Problem when what is there was made with others of these options (`names`),
        unless --overwrite drops the folder with this run's own; a run that is resumed takes what there is."""
        first.resume = False
        for path in (f"{first.out}/{result}", f"{first.out}/last.pt"):
            if os.path.exists(path):
                old = read_checkpoint(path).get("args", {})
                wrong = [name for name in names if name in old and old[name] != getattr(first, name)]
                if wrong and not (self.args.resume or self.args.overwrite and first.out.startswith(f"{self.out}{os.sep}")):
                    raise Problem(f"{first.out} holds a run with another {', '.join(wrong)}: remove it, or name another --out")
                if not wrong or self.args.resume:
                    if path.endswith(result):
                        if wrong:
                            self.say(f"{path} is taken as it is, made with another {', '.join(wrong)}")
                        return path
                    first.resume = True
                    break
        first.overwrite = not first.resume
        self.begin()
        if self.world > 1:
            dist.barrier()                                                                  # all have seen what there is
        make(first)
        if self.world > 1:
            dist.barrier()                                                                  # it is written
        return f"{first.out}/{result}"

    def steps(self, per_epoch):
        """Yields the steps still to do. Between them: log, progress line, checkpoints. SIGTERM and Ctrl-C save, then stop."""
        self.per_epoch, self.total, self.start = per_epoch, self.args.epochs * per_epoch, time.time()
        self.mark, self.look, self.due = (self.start, self.step), self.step, self.start + self.args.save_every
        if self.rank == 0 and os.path.exists(log := f"{self.out}/log.jsonl"):               # a killed run may have logged further
            whole = [line for line in open(log) if line.endswith("}\n") and '"loss"' in line]
            lines = [line for line in whole if json.loads(line)["step"] <= self.step]
            write_whole(log, lambda file: file.write("".join(lines).encode()))

        def asked(number, frame, patience=2):
            if not self.stop:
                self.stop, self.asked = number, time.monotonic()
                self.say("\nsaving after this step, then stopping; a second time stops at once")
            elif time.monotonic() > self.asked + patience:                                  # a scheduler and torchrun may both
                raise KeyboardInterrupt                                                     # send what was meant as one

        before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.step < self.total:
                yield self.step
                self.step += 1
                self.after_step()
            if broken := getattr(self.data, "broken", None):
                self.say(f"{len(broken)} unreadable pictures were replaced by their neighbours")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self):
        """Log, progress and checkpoint: it looks at step `look`, about a second later, saves when it is `due`, and measures speed
        since `mark`, (time, step) at the epoch's start. A stop that was asked for raises SystemExit with 128 + the signal."""
        if self.scaler.is_enabled():
            self.scaler.update()
        ends, done, now = self.step % self.per_epoch == 0, (self.step - 1) % self.per_epoch + 1, time.time()
        if not ends and self.step < self.look:
            return
        # About once a second and at an epoch's end the processes put together what they know, so that all decide alike.
        pace = (now - self.mark[0]) / (self.step - self.mark[1])                            # seconds a step
        due = self.rank == 0 and now > self.due                                             # it alone knows how long saving took
        facts = torch.tensor([self.sums["loss"].item() / done, pace, self.stop, due])
        if self.world > 1:
            dist.all_reduce(facts)
        loss, pace, stop, due = (facts / self.world).tolist()
        self.look = self.step + max(1, round(1 / pace))
        if not math.isfinite(loss):
            raise Problem(f"the loss is {loss} at step {self.step}: try a lower --lr, a longer --warmup or --precision fp32; "
                          f"{self.out}/last.pt, if there is one, is from before")
        speed, left, shown = self.args.batch / pace, round((self.total - self.step) * pace), sys.stdout.isatty()
        if ends or shown:
            line = (f"epoch {self.step / self.per_epoch:.{0 if ends else 1}f}/{self.args.epochs}  step {self.step}/{self.total}  "
                    f"loss {loss:.4f}  lr {self.lr:.1e}  {speed:.0f} images/s  "
                    f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left" + "".join(
                        f"  {name} {value:.3f}" for name, value in self.notes.items() if isinstance(value, float)))
            self.say("\r" + f"{line}  "[:os.get_terminal_size().columns - 1] if shown else line, end="\n" if ends else "")
        if ends or stop or due:                                                             # what is saved is the mean of all
            for value in self.sums.values() if self.world > 1 else ():
                dist.all_reduce(value.div_(self.world))
        if ends:
            self.write(step=self.step, epoch=self.step // self.per_epoch,
                       **{name: (value / done).tolist() for name, value in self.sums.items()},
                       **self.notes, lr=self.lr, images_per_s=round(speed, 1), seconds=round(self.seconds + now - self.start, 1))
            self.sums, self.notes, self.mark = {}, {}, (now, self.step)
        if stop or due or self.step == self.total:
            self.save()
        if stop:
            self.say(f"stopped and saved at step {self.step} of {self.total}; the same command with --resume goes on")
            if self.world > 1:
                dist.all_reduce(facts)                                                      # none leaves before all is written
            raise SystemExit(128 + (self.stop or signal.SIGTERM))

    def each(self, things):
        """Yields a step's micro-batches, of which only the last one's backward pass exchanges gradients."""
        for i, thing in enumerate(things):
            for model in self.wrapped:
                model.require_backward_grad_sync = i + 1 == len(things)
            yield thing

    def backward(self, loss):
        """Adds a micro-batch's share to the gradients: over a step they become the mean over the global batch."""
        self.scaler.scale(loss / self.accumulate).backward()

    def log(self, **values):
        """Adds a micro-batch's values, tensors of any shape, to the epoch's means, without waiting for the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float() / self.accumulate

    def update(self, optimizer):
        """One optimizer step at this step's learning rate: base × batch / 256 × `schedule`, each group's × its lr_scale."""
        warmup, floor = self.args.warmup * self.per_epoch, getattr(self.args, "min_lr", 0.0)
        share = schedule(self.step, warmup, self.total)
        self.lr = self.args.lr * self.args.batch / 256 * share + floor * (1 - share) * (self.step >= warmup)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        self.scaler.step(optimizer)
        optimizer.zero_grad()

    def check(self):
        """Raises Problem when weights are no longer finite."""
        models = [thing for thing in self.kept.values() if isinstance(thing, nn.Module)]
        if not all(p.isfinite().all() for model in models for p in model.parameters()):
            raise Problem(f"weights are not finite at step {self.step}: try a lower --lr; {self.out}/last.pt is from before")

    def save(self):
        """Process 0 writes last.pt, unless weights are no longer finite. At most 2 % of the time goes into saving."""
        start = time.time()
        self.check()
        state = {name: thing.state_dict() for name, thing in self.kept.items()}
        state |= dict(step=self.step, seconds=self.seconds + start - self.start, sums=self.sums, args=vars(self.args))
        self.put("last.pt", **state)
        self.due = time.time() + max(self.args.save_every, 50 * (time.time() - start))

def entry(main):
    """Runs a script's main. A Problem, Ctrl-C, a full disk or GPU end it with one line on stderr and an exit code."""
    code, message, rank = 2, None, int(os.environ.get("RANK", 0))
    sys.stdout.reconfigure(errors="replace")                                                # for terminals without × or …
    try:
        main()
        code = 0
    except (Problem, OSError) as error:
        message = error
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: try --checkpoint-blocks, or a lower --micro-batch (other random draws, same batch)"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as stop:
        code = stop.code or 0
    except RuntimeError as error:
        if not rank or "peer" not in str(error):                                            # another process ended and said why
            raise
    if workers := multiprocessing.active_children():                                        # of a DataLoader that was interrupted
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
    if message:
        time.sleep(3 * (rank > 0))                                                          # time for process 0 to say the same
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    if dist.is_initialized():
        if not code:
            dist.all_reduce(torch.zeros(1))                                                 # leave together: process 0 may draw
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)                                                                      # gloo's threads may abort a sys.exit
    sys.exit(code)

# -------------------------------------------------------------------------------------------------------------- evaluation

def labelled(args, run, few=None, all_=False):
    """→ training and validation set, each with labels; of the first only `few` pictures of each class, if that is given, or with
    `all_` also those without a label. Raises Problem when there are no two classes to tell apart."""
    train, val = load_data(args, run)
    if val is None or len(set(train.labels.tolist()) - {-1}) < 2:
        raise Problem(f"--task {args.task} needs labelled pictures of two classes or more: train/CLASS/… and val/CLASS/… in a "
                      f"folder, or a torchvision name" + f"; --limit {args.limit} leaves these only" * bool(args.limit))
    if not all_:
        train.pick((train.labels >= 0).nonzero()[:, 0])
    if few:
        train.few(few, args.seed)
    args.classes = [str(name) for name in train.classes]
    return train, val

def tally(scores, labels):
    """Scores (b, K), labels (b,) → confusion (K, K), truth in rows and answers in columns, and how often (1,) the truth was among
    the five highest scores (of all K where there are fewer)."""
    classes = scores.shape[1]
    highest = scores.topk(min(5, classes)).indices                                          # (b, 5)
    confusion = torch.bincount(labels * classes + highest[:, 0], minlength=classes ** 2).view(classes, classes)
    return confusion, (highest == labels[:, None]).sum().view(1)

@torch.no_grad()
def measure(model, data, run, args):
    """→ top-1, top-5, confusion (K, K) over a data set. Each process takes its own pictures, so that none is counted twice."""
    for part in model.buffers() if run.world > 1 else ():                                   # each process has its own BatchNorm's
        dist.broadcast(part, 0)
    model.eval()
    index = torch.arange(len(data))[data.labels.cpu() >= 0][run.rank::run.world]
    sums = [torch.zeros(size, dtype=torch.long, device=run.device) for size in ((len(data.classes), len(data.classes)), (1,))]
    for images, labels, _ in data.stream(((part, 0) for part in index.split(run.micro) if len(part)), run, args.size):
        with run.autocast():
            scores = model(images)
        for total, part in zip(sums, tally(scores, labels)):
            total += part
    for total in sums if run.world > 1 else ():
        dist.all_reduce(total)
    model.train()
    return *(part.sum().item() / sums[0].sum().item() for part in (sums[0].diag(), sums[1])), sums[0]

def finish(top1, top5, confusion, classes, run, args, **more):
    """Says and logs an evaluation's result: a confusion table for up to 20 classes, else the classes most often wrong."""
    names, seen = [str(name)[:9] for name in classes], confusion.sum(1).tolist()
    right = [hits / all_ if all_ else None for hits, all_ in zip(confusion.diag().tolist(), seen)]
    run.say(f"{args.task}: top-1 {top1:.4f}, top-5 {top5:.4f} of {confusion.sum()} pictures" + "".join(
        f", {name} {value:.4f}" for name, value in more.items()))
    if len(names) <= 20:
        run.say("\n".join(f"{name:>10}" + "".join(f"{cell:>10}" for cell in row) for name, row in
                          [("truth", names), *zip(names, confusion.tolist())]))
    else:
        worst = sorted((share, name) for share, name in zip(right, names) if share is not None)[:5]
        run.say("least often right: " + ", ".join(f"{name} {share:.2f}" for share, name in worst))
    if not all(seen):
        run.say("no validation pictures of: " + ", ".join(name for name, pictures in zip(names, seen) if not pictures))
    run.write(step=run.step, task=args.task, top1=top1, top5=top5, **more, class_accuracy=right)

class Judge:
    """Measures a classifier as it learns, keeps the best one in OUT/best.pt, and says in the end what came out."""

    def __init__(self, model, data, run, args, per_epoch, **parts):
        self.model, self.data, self.run, self.args, self.per_epoch, self.parts = model, data, run, args, per_epoch, parts
        self.pause, self.found = max(1, len(data) // (per_epoch * args.batch)), None        # epochs between validations
        self.best = -1.0
        if args.resume and os.path.exists(f"{run.out}/best.pt"):
            self.best = read_checkpoint(f"{run.out}/best.pt")["top1"]

    def after_step(self, step):
        """Measures at the end of an epoch, or of several where epochs are short."""
        epoch, rest = divmod(step + 1, self.per_epoch)
        if rest == 0 and (epoch % self.pause == 0 or epoch == self.args.epochs):
            self.run.check()                                                                # best.pt never holds a NaN
            self.found = self.run.aside(lambda: measure(self.model, self.data, self.run, self.args))
            self.run.note(top1=self.found[0], top5=self.found[1])
            if self.found[0] > self.best:
                self.best = self.found[0]
                parts = {name: part.state_dict() for name, part in self.parts.items()}
                self.run.put("best.pt", **parts, top1=self.best, step=step + 1, args=vars(self.args))

    def result(self):
        """→ top-1, top-5 and confusion of the last measurement."""
        self.found = self.found or measure(self.model, self.data, self.run, self.args)
        return self.found

    def finish(self, **more):
        """Says and logs it, and → top-1."""
        finish(*self.result(), self.data.classes, self.run, self.args, best_top1=self.best, **more)
        return self.result()[0]
