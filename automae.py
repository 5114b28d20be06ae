"""Improving Masked Autoencoders by Learning Where to Mask (Chen et al.; arXiv 2303.06583).

Patches differ in what they tell, so hiding all of them alike wastes effort on empty background. AutoMAE learns, picture by
picture, which patches to hide. A frozen transformer's attention says where something is; a small generator turns that into a
probability for each patch; a discriminator pulls it towards masks that look like an object's box; and the reconstruction loss,
which reaches the generator through the sampled mask, keeps the task from becoming impossible. Highlighted patches are hidden more
often. The encoder and decoder are MAE's, and only they remain in the end.

    images ─► frozen ViT ─► attention ─► GENERATOR ─► probability ─► Gumbel ─► guide ─┬─► DISCRIMINATOR: like a box, or not?
    (B,C,H,W)               (B,H,N)                   (B,N)                    (B,N)  │
    └────────────────────────────────────────► MAE, hiding by score = noise + guide ◄─┘─► loss on hidden patches

    python automae.py                                       on two CPU cores, nothing to download
    python automae.py --data fashion-mnist --epochs 3       a small torchvision data set
    torchrun --nproc_per_node=8 automae.py --data /imagenet --prior runs/mae/last.pt        the paper's recipe, ViT-B/16
    python mae.py --task probe --init runs/automae/last.pt  what the encoder is worth: it is a plain ViT

Measured, first command (2 cores of an AMD EPYC, torch 2.15): 3 min 50 s; in the end foreground is 3.2, 3.5, 3.5, 2.8 times (seeds
0 to 3) as likely to be highlighted as background. About 1.9 of it is where objects tend to lie, the rest a look at the picture.
"""

import argparse
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from common import (TRUE_CONTRAST, Batches, Problem, Run, ViT, adamw, build, check_ratio, entry, fit, keep_lowest, load_data,
                    load_encoder, patchify, pixel_loss, save_sheet, settings, shared_options, take, unpatchify, visible, vit_of,
                    weights_in, with_contrast)

# ----------------------------------------------------------------------------------------------------------------- masking

class Prior(nn.Module):
    """A frozen, pre-trained ViT: images (B, C, H, W) → where its last block's class token looks, (B, H, N), without gradient;
    with `every` the maps of all blocks, (B, depth·H, N). `maps` is how many come out. `scale` and `shift` (C, 1, 1) bring images
    to the normalisation it was trained with."""

    def __init__(self, vit, every=False, scale=1.0, shift=0.0):
        super().__init__()
        self.vit, self.every = vit.eval().requires_grad_(False), every
        self.maps = vit.blocks[0].attn.heads * (len(vit.blocks) if every else 1)
        self.register_buffer("scale", torch.as_tensor(scale), persistent=False)
        self.register_buffer("shift", torch.as_tensor(shift), persistent=False)

    @torch.no_grad()
    def forward(self, images):
        return self.vit.attention_map(images * self.scale + self.shift, self.every)

class Generator(nn.Module):
    """Attention (B, H, N) → log-probability of being highlighted for each patch (B, N), by two convolutions."""

    def __init__(self, heads, grid):
        super().__init__()
        self.grid, half = grid, max(1, heads // 2)
        self.layers = nn.Sequential(nn.Conv2d(heads, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, 1, 3, padding=1))
        for layer in (self.layers[0], self.layers[2]):                                      # else the ReLU may be shut: ours
            nn.init.zeros_(layer.bias)

    def forward(self, attention):
        attention = attention * attention.shape[-1]                                         # 1 on average (our choice)
        return self.layers(attention.unflatten(-1, self.grid)).flatten(1).float().log_softmax(-1)

class Discriminator(nn.Module):
    """Distribution over patches (B, N) → scores (B, ·), high where it looks like a box. Two strided convolutions
    for 14×14 patches; on small grids fewer of them are strided, so that at least one score comes out (our choice). With `matched`
    distributions it sees them × N, about 1, not 1/N, where it can hardly tell anything (our choice)."""

    def __init__(self, grid, matched=False):
        super().__init__()
        self.grid, layers, sides, self.scale = grid, [], list(grid), grid[0] * grid[1] if matched else 1
        for inputs, outputs in ((1, 16), (16, 32)):
            size, stride = (4, 2) if min(sides) >= 6 else (3, 1)
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, size, stride, padding=1)), nn.LeakyReLU(0.2)]
            sides = [(side - size + 2) // stride + 1 for side in sides]                     # 14 → 7 → 3, and 1 in the end
        size = min(3, *sides)
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(32, 1, size)))

    def forward(self, guide):
        with torch.autocast(guide.device.type, enabled=False):                              # bf16 knows 1/N too coarsely
            return self.layers(self.scale * guide.unflatten(-1, self.grid)[:, None]).flatten(1)

def boxes(batch, grid, device, matched=False):
    """→ (B, N): distributions that look as wanted. One rectangle a picture, 40 to 160 of 196 patches large, with a
    height from 4 to all but 4 of 14 rows (scaled with the grid; rounded, so the first and last come half as often), at a random
    place; 0.5 in it, plus noise, through a softmax.

    Guides have Gumbel's noise, whose spikes alone give them away, whatever the generator does. `matched` (ours) gives boxes
    the same noise, stands them out of it by 4 instead of 0.5, and lets them cover half as much, 20 to 80 of 196."""
    area, height, top, left = torch.rand(4, batch, 1, 1, device=device)
    area, least = grid[0] * grid[1] * (40 + 120 * area) / (392 if matched else 196), grid[0] * 4 / 14
    height = (least + height * (grid[0] - 2 * least)).round().clamp(min=1)
    width = (area / height).ceil().clamp(max=grid[1])
    top, left = (top * (grid[0] - height + 1)).floor(), (left * (grid[1] - width + 1)).floor()
    row, column = torch.arange(grid[0], device=device)[:, None], torch.arange(grid[1], device=device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)       # (B, h, w)
    if matched:
        return F.gumbel_softmax(4.0 * inside.flatten(1), tau=1.0)
    return (0.5 * inside + torch.rand(batch, *grid, device=device)).flatten(1).softmax(-1)

def highlight(guide, n):
    """guide (B, N) → 1 at its n highest places, else 0; the gradient goes to the guide as if that were the guide itself."""
    hard = torch.zeros_like(guide).scatter_(1, guide.topk(n, dim=1).indices, 1.0)
    return hard - guide.detach() + guide

# ------------------------------------------------------------------------------------------------------------------- model

class AutoMAE(nn.Module):
    """A masked autoencoder that hides what a guide highlights more often than the rest."""

    def __init__(self, encoder, decoder, norm_pixels=True, generator=None, mask_factor=0.5):
        super().__init__()
        self.encoder, self.decoder, self.norm_pixels = encoder, decoder, norm_pixels
        self.generator, self.mask_factor = generator, mask_factor

    def forward(self, images, highlighted, noise, mask_ratio=0.75):
        """images (B, C, H, W), highlighted and noise (B, N) → loss (), prediction (B, N, P·P·C), mask (B, N), 1 where hidden.

        Of every picture `visible(N, mask_ratio)` patches stay visible, those of lowest score. The tokens are multiplied by 1, but
        by a 1 whose gradient goes to the score: that is how the loss tells the generator what it did.
        """
        score = noise + self.mask_factor * highlighted                                      # (B, N)
        keep, restore, mask = keep_lowest(score.detach(), visible(score.shape[1], mask_ratio))      # (B, n), (B, N), (B, N)
        tokens = self.encoder.embed(images)                                                 # (B, N, D) patches with positions
        tokens = tokens * (1 + (score - score.detach()))[..., None]                         # (B, N, D) the same values
        latent = self.encoder.encode(take(tokens, keep))                                    # (B, 1+n, D) only what is visible
        prediction = self.decoder(latent, restore)                                          # (B, N, P·P·C) every place
        return pixel_loss(images, prediction, mask, self.encoder.patch, self.norm_pixels), prediction, mask

# ---------------------------------------------------------------------------------------------------------------- training

def make_prior(args, data, run):
    """→ the frozen ViT whose attention guides the masks: --prior, or on small data a plain MAE's, trained first and kept (our
    choice; the paper's is pre-trained on ImageNet)."""
    path = args.prior
    if not args.prior:
        if args.prior_epochs is None:
            raise Problem(f"--masking {args.masking} needs --prior, a pre-trained ViT, for its attention. To make one: "
                          f"python mae.py --data {args.data} --patch {args.patch}; then --prior runs/mae/last.pt")
        first = Namespace(**vars(args) | dict(masking="random", epochs=args.prior_epochs, out=f"{args.out}/prior"))

        def make(first):
            run.say(f"first a plain MAE, {first.epochs} epochs, whose attention guides the masks; kept in {first.out}/prior.pt")
            pretrain(first, data)

        path = run.prepare(first, "prior.pt", (
            "data", "size", "patch", "vit", "limit", "seed", "epochs", "batch", "lr", "warmup", "weight_decay", "crop",
            "crops", "mask_ratio", "decoder_dim", "decoder_depth", "decoder_heads", "norm_pixels"), make)
    prior = ViT(**vit_of(path) | dict(size=args.size))
    if prior.channels != args.channels:
        raise Problem(f"the prior is for pictures of {prior.channels} channel(s), these have {args.channels}")
    run.say(f"prior: {load_encoder(prior, path)}")
    if prior.grid != (args.size // args.patch,) * 2:
        raise Problem(f"the prior has patches of {prior.patch} pixels, {prior.grid[0]} in a row; use --patch {prior.patch}")
    told, tensor = weights_in(path)[1], lambda numbers: torch.tensor(numbers)[:, None, None]
    mean, std = tensor(args.mean), tensor(args.std)
    own = [tensor(told.get("mean") or args.mean), tensor(told.get("std") or args.std)]
    return Prior(prior, args.attention == "all", std / own[1], (mean - own[0]) / own[1])

def propose(masking, generator, attention, masks, noise, grid, n):
    """→ probability (b, N) for the log, and guide (b, N): with `learned` masking a random distribution over the patches, with a
    gradient; for the others 1 where it is highlighted, else 0: the n places of most attention, the object's box, or nothing."""
    if masking == "learned":
        logits = generator(attention)                                                       # (b, N) log-probability
        return logits.detach().exp(), F.gumbel_softmax(logits, tau=1.0)
    if masking == "attention":
        return attention.mean(1), highlight(attention.mean(1), n)
    if masking == "random":
        return torch.full_like(noise, 1 / noise.shape[1]), torch.zeros_like(noise)
    there = F.adaptive_max_pool2d(masks.float(), grid)                                      # (b, h, w) 1 where the object is
    lines = there.amax(2), there.amax(1)                                                    # its rows (b, h) and columns (b, w)
    spans = [torch.minimum(line.cummax(1).values, line.flip(1).cummax(1).values.flip(1)) for line in lines]
    box = (spans[0][:, :, None] * spans[1][:, None]).flatten(1)                             # rows × columns that it spans
    return box / box.sum(1, keepdim=True).clamp(min=1), box                                 # a crop may hold no object

def discriminator_loss(discriminator, guide, grid, matched=False):
    """Least squares: boxes should score 1, guides (b, N) should score 0."""
    scores = discriminator(torch.cat([boxes(len(guide), grid, guide.device, matched), guide.detach()]))
    real, fake = scores.chunk(2)
    return ((real - 1).square().mean() + fake.square().mean()) / 2

def foreground_facts(probability, attention, mask, masks, grid):
    """Probability (b, N), attention (b, H, N) or None, mask (b, N), foreground (b, h, w) → for the log: how much likelier
    foreground is than background, by the generator, by its mean over the batch (objects tend to lie in the middle, which needs no
    look at a picture) and by attention alone, and how much of each is hidden."""
    there = F.adaptive_avg_pool2d(masks.float(), grid).flatten(1)                           # (b, N) share of foreground
    mean = lambda x, where: (x * where).sum() / where.sum().clamp(min=1e-6)
    ratio = lambda x: mean(x, there) / mean(x, 1 - there).clamp(min=1e-6)                   # crops may hold no object
    facts = {"foreground_ratio": ratio(probability),
             "hidden_foreground": mean(mask, there), "hidden_background": mean(mask, 1 - there)}
    facts["static_ratio"] = ratio(probability.mean(0, keepdim=True).expand_as(probability))         # one mask for all pictures
    if attention is not None:
        facts["attention_ratio"] = ratio(attention.mean(1))
    return facts

def pretrain(args, data=None):
    """Hides, reconstructs, and in the end draws. With `data` it is the plain MAE for the prior, and draws nothing."""
    run = Run(args)
    train, val = data or load_data(args, run)
    if args.masking == "boxes" and getattr(train, "masks", None) is None:
        raise Problem("--masking boxes needs data that knows where its objects are: scenes")
    learned, matched, prior = args.masking == "learned", args.pseudo_masks == "matched", None
    if args.masking in ("learned", "attention"):
        prior = run.wrap(make_prior(args, (train, val), run))
    encoder, decoder = build(args)
    generator = Generator(prior.maps, encoder.grid) if learned else None
    discriminator = Discriminator(encoder.grid, matched) if learned else None
    model = AutoMAE(encoder, decoder, args.norm_pixels, generator, args.mask_factor)
    optimizer = adamw(nn.ModuleList([encoder, decoder]), args.weight_decay)
    for group in adamw(generator, args.weight_decay).param_groups if learned else ():       # ours: slower than its judge
        optimizer.add_param_group(group | dict(lr_scale=0.2 if matched else 1.0))
    wrapped, places = run.wrap(model), encoder.grid[0] * encoder.grid[1]                    # device, torch.compile, DDP
    if learned:
        wrapped_discriminator = run.wrap(discriminator)
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.9, 0.95), fused=run.device.type == "cuda")
        run.keep(encoder=encoder, decoder=decoder, generator=generator, discriminator=discriminator, optimizer=optimizer,
                 discriminator_optimizer=discriminator_optimizer)                           # in last.pt
    else:
        run.keep(encoder=encoder, decoder=decoder, optimizer=optimizer)
    run.introduce(model, train)

    batches, n = Batches(train, run, args.size, args.crop), visible(places, args.mask_ratio)
    for step in run.steps(batches.per_epoch):
        ready = []
        for images, _, masks in batches.at(step):                                           # (b, C, H, W) a micro-batch
            noise = torch.rand(len(images), places, device=run.device)                      # (b, N)
            with run.autocast():
                attention = prior(images) if prior else None                                # (b, H, N)
                probability, guide = propose(args.masking, generator, attention, masks, noise, encoder.grid, n)
            ready.append((images, masks, noise, attention, probability, guide))
            if learned:
                discriminator.train(len(ready) == 1)                                        # one power iteration a step
                with run.autocast():
                    loss = discriminator_loss(wrapped_discriminator, guide, encoder.grid, matched)
                run.backward(loss)
                run.log(discriminator_loss=loss)
        if learned:
            run.update(discriminator_optimizer)
            discriminator.eval().requires_grad_(False)                                      # from here on it only judges
        for images, masks, noise, attention, probability, guide in run.each(ready):
            highlighted = highlight(guide.detach() if args.two_stage else guide, n) if learned else guide
            with run.autocast():
                loss, _, mask = wrapped(images, highlighted, noise, args.mask_ratio)
                fooled = (discriminator(guide) - 1).square().mean() if learned else torch.zeros_like(loss)
            run.backward(loss + args.adversarial_weight * fooled)
            run.log(loss=loss)
            if learned:                                                                     # how much masks differ, 0: all alike
                run.log(generator_loss=fooled, generator_spread=places * probability.std(0, correction=0).mean())
            if masks is not None:
                run.log(**foreground_facts(probability, attention, mask, masks, encoder.grid))
        run.update(optimizer)
        if learned:
            discriminator.requires_grad_(True)

    if data:
        run.put("prior.pt", encoder=encoder.state_dict(), args=vars(args))
    elif run.rank == 0:
        draw(model, prior, val or train, run, args)

@torch.no_grad()
def draw(model, prior, data, run, args, count=10):
    """Writes OUT/masks.png: pictures, what guided the mask, the mask, and the reconstruction."""
    index = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    images, _, masks = next(data.stream([(index, 0)], run, args.size))
    torch.manual_seed(args.seed)
    noise, grid = torch.rand(len(images), model.encoder.grid[0] * model.encoder.grid[1], device=run.device), model.encoder.grid
    n, rows, attention = visible(noise.shape[1], args.mask_ratio), {}, prior.forward(images) if prior else None
    shown = lambda x: (x / x.amax(1, keepdim=True))[..., None].expand(-1, -1, args.patch ** 2 * args.channels) * 255
    probability, guide = propose(args.masking, model.eval().generator, attention, masks, noise, grid, n)
    if prior:
        rows["attention of the prior"] = shown(attention.mean(1))
    if model.generator:
        rows["probability by the generator"] = shown(probability)
        if (probability.std(0, correction=0) * noise.shape[1]).mean() < 0.01:
            run.say("the generator gives every picture the same mask: try another --lr, --adversarial-weight or a longer prior")
    highlighted = highlight(guide, n) if model.generator else guide
    _, prediction, mask = model.forward(images, highlighted, noise, args.mask_ratio)        # not compiled for this one batch
    patches, mask = patchify(images, args.patch), mask[..., None]                           # (B, N, P·P·C), (B, N, 1)
    if args.norm_pixels:
        prediction = with_contrast(prediction, patches)
    pixels = lambda x: patchify((unpatchify(x, args.patch, args.size) * data.std + data.mean).clamp(0, 255), args.patch)
    rows = {"original": pixels(patches), **rows, f"{1 - args.mask_ratio:.0%} visible": pixels(patches * (1 - mask)),
            "reconstruction" + TRUE_CONTRAST * args.norm_pixels: pixels(patches * (1 - mask) + prediction * mask)}
    save_sheet(f"{run.out}/masks.png", {title: unpatchify(row, args.patch, args.size).byte() for title, row in rows.items()})
    run.say(f"pictures: {run.out}/masks.png")

# ------------------------------------------------------------------------------------------------------------ command line

PRESETS = {  # what --data selects, for every option left open; imagenet is the paper's recipe, the others are ours
    "scenes": dict(model="nano", size=64, patch=8, decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                   pseudo_masks="matched", attention="all", prior_epochs=2, epochs=2, batch=32, lr=1.6e-2, warmup=0.4),
    "small": dict(model="nano", decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                  pseudo_masks="matched", attention="all", prior_epochs=3, epochs=50, batch=64, lr=8e-3, warmup=0.5),
    "imagenet": dict(model="base", size=224, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pixels=True, crop=0.2,
                     pseudo_masks="paper", attention="last", epochs=800, batch=4096, lr=1.5e-4, warmup=40.0),
}

def options():
    parser, add = shared_options("automae.py", "Pre-trains a masked autoencoder that learns where to mask.")
    switch = argparse.BooleanOptionalAction
    add["model"]("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (0.75)")
    add["model"]("--masking", choices=("learned", "attention", "boxes", "random"), default="learned", help="what is hidden more "
                 "often: what the generator says, what the prior attends to, the object's true box, nothing (learned)")
    add["model"]("--mask-factor", type=float, default=0.5, help="how much more often: added to noise of 0 … 1 (0.5)")
    add["model"]("--norm-pixels", action=switch, help="predict each patch normalised by its own mean and contrast (on)")
    add["model"]("--adversarial-weight", type=float, default=0.2, help="weight of looking like a box, for the generator (0.2)")
    add["model"]("--pseudo-masks", choices=("paper", "matched"), help="the discriminator's boxes: the paper's, or, for small "
                 "pictures and short runs, clearer ones with the guides' own noise, × N, and a slower generator (paper)")
    add["model"]("--attention", choices=("last", "all"), help="blocks of the prior whose attention guides the masks (last)")
    add["model"]("--two-stage", action=switch, default=False, help="the generator learns from the discriminator alone (off)")
    add["model"]("--prior", help="checkpoint with the pre-trained ViT for the attention (MAE, ViT-B, 800 epochs)")
    add["model"]("--prior-epochs", type=int, help="epochs of the plain MAE that is trained first when there is no --prior "
                 "(2 on scenes, 3 on small sets)")
    return parser

ONLY = (  # options that do something with these values of another only
    ("masking", "learned", "two_stage adversarial_weight pseudo_masks"),
    ("masking", "learned attention", "prior prior_epochs attention"),
    ("masking", "learned attention boxes", "mask_factor"),
    ("prior", "None", "prior_epochs"),
)

def main(arguments=None):
    args = fit(settings(options(), lambda args, kind: PRESETS[kind], arguments, ONLY))
    check_ratio(args)
    pretrain(args)

if __name__ == "__main__":
    entry(main)
