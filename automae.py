"""Improving Masked Autoencoders by Learning Where to Mask
Haijian Chen, Wendong Zhang, Yunbo Wang, Xiaokang Yang, 2023, https://arxiv.org/abs/2303.06583

A masked autoencoder hides patches at random, as if all of them taught equally much. They do not: empty background is too easy
to predict, and hiding patches of objects more often gives better features. AutoMAE learns, image by image, which ones.

A frozen, already trained transformer gives hints: its attention is high where something is. A small generator turns the
attention into a probability for each patch, from which a mask is drawn. Two forces train the generator. A discriminator
compares its masks with random boxes, because objects are compact, and pulls it towards masks that look like one. The loss of
reconstruction flows back through the drawn mask, and keeps the task from becoming impossible. In the end only the encoder
counts; it is a plain vision transformer.

    images ──► frozen ViT ──► attention ──► GENERATOR ──► probability ──► + Gumbel noise ──► soft mask ──► DISCRIMINATOR:
    (B,C,H,W)                 (B,heads,N)                 (B,N)                              (B,N) │       a box, or not?
       │                                                                                           ▼
       └──► MAE (see mae.py) hides the patches with the highest scores ◄── score = random noise + 0.5 · its n highest

    python automae.py                                        # scenes drawn by this project: minutes on a CPU
    python automae.py --data fashion-mnist --epochs 3        # a torchvision dataset
    torchrun --nproc_per_node=8 automae.py --data /imagenet --prior runs/mae/last.pt        # the paper's recipe, ViT-B
    python mae.py --task probe --init runs/automae/last.pt   # what is the encoder worth? --masking random to compare

Measured with the first command, seeds 0, 1, 2: TODO.

Details that matter
1. No layer of the discriminator has a bias. With biases it can answer ½ to everything, and then the generator is not pushed.
2. The discriminator's loss is a sum: (D(box) − 1)² + D(mask)². Only the score, no sigmoid; every weight is spectrally normed.
3. In a step the discriminator learns first, on masks without gradient. Then it is frozen, and encoder, decoder and generator
   learn from the reconstruction plus 0.2 · (D(mask) − 1)².
4. Gumbel noise is drawn twice a step: once for the discriminator, once for the autoencoder and the generator.
5. Highlighted are as many patches as stay visible, n, not as many as are hidden.
6. Highlighted patches are hidden more often, not surely: 0.5 is added to their random noise from 0 to 1.
7. Sorting has no gradient. Two steps let it pass: the n highest of the soft mask count as 1, but with the gradient of the
   soft mask; and every token is multiplied by a 1 that has the gradient of its score.
8. A box covers 40 to 160 of 196 patches, is 4 to 10 wide, and raises uniform noise by 0.5; a softmax over the patches follows.
9. The prior is a masked autoencoder that was trained before (800 epochs of ViT-B in the authors' code), never this one.
"""

import argparse
import os

from common import (  # before torch: it sets how threads wait
    VITS, Decoder, Run, UserError, ViT, batches, decay_groups, entry, gather_tokens, learning_rate, load_decoder,
    load_encoder, number, parse_args, patchify, prepare_data, save_image_rows, shared_options, spread, to_pixels,
    training_plan, unpatchify)

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# ------------------------------------------------------------------------------------------------------------ masking

class Generator(nn.Module):
    """Attention of the prior (B, heads, N) → log-probability (B, N) that a patch gets highlighted (section 3.2). It mixes
    the heads and looks at each patch's neighbours, nothing else: it has some hundred parameters."""

    def __init__(self, num_heads, grid, gain=1.0):
        super().__init__()
        self.grid = grid
        self.gain = gain
        half = max(1, num_heads // 2)
        self.layers = nn.Sequential(
            nn.Conv2d(num_heads, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, 1, 3, padding=1),
        )

    def forward(self, attention):
        x = self.layers(self.gain * attention.unflatten(2, self.grid))      # (B, 1, h, w)
        return x.flatten(1).float().log_softmax(dim=1)


def gumbel_softmax(log_probability, uniform):
    """log_probability (B, N), uniform random numbers (B, N) → soft mask (B, N), which sums to 1: a random draw that keeps its
    gradient (1611.01144). Its highest entry is patch i with exactly the probability of patch i; temperature 1."""
    gumbel = -(-uniform.log()).log()
    return (log_probability + gumbel).softmax(dim=1)


def highlight(soft_mask, n):
    """soft_mask (B, N) → 1 at its n highest entries, else 0. The gradient passes straight through to the soft mask, as if
    it had not been rounded (detail 7)."""
    highest = soft_mask.topk(n, dim=1).indices
    hard = torch.zeros_like(soft_mask).scatter(1, highest, 1.0)
    return hard + (soft_mask - soft_mask.detach())


class Discriminator(nn.Module):
    """Soft mask (B, N) → scores (B, 1 or more): near 1 if it looks like a box, near 0 if like the generator's (section 3.2).
    Spectral norm keeps every layer's largest gain at 1, so that scores change gently. No biases (detail 1)."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid
        # 14×14 patches become 7×7, 3×3 and one score. Smaller grids get a border for the last layer [not in the paper].
        border = int(min(grid) < 12)
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(1, 16, 4, stride=2, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(32, 1, 3, padding=border, bias=False)),
        )

    def forward(self, soft_mask):
        return self.layers(soft_mask.unflatten(1, (1, *self.grid))).flatten(1)


def random_boxes(batch, grid, device):
    """→ (B, N), each row sums to 1: what the discriminator takes for real, a rectangle of random size and place in noise
    (detail 8). Its limits grow with the grid [not in the paper]."""
    h, w = grid
    smallest, largest = round(40 / 196 * h * w), round(160 / 196 * h * w)
    narrowest = max(1, round(4 / 14 * w))
    area = torch.randint(smallest, largest + 1, (batch, 1, 1), device=device)
    width = torch.randint(narrowest, w - narrowest + 1, (batch, 1, 1), device=device)
    height = (area / width).ceil().clamp(max=h)
    x, y = torch.rand(2, batch, 1, 1, device=device)
    left = (x * (w - width + 1)).floor()
    top = (y * (h - height + 1)).floor()
    row = torch.arange(h, device=device)[:, None]
    column = torch.arange(w, device=device)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)    # (B, h, w)
    noise = torch.rand(batch, h, w, device=device)
    return (0.5 * inside + noise).flatten(1).softmax(dim=1)


def object_boxes(masks, grid):
    """Foreground masks (B, H, W) → (B, N): 1 for the patches in the box around an image's foreground, else 0."""
    covered = F.adaptive_max_pool2d(masks.float(), grid)                    # (B, h, w)

    def span(line):                                                         # 1 from the first 1 to the last
        return torch.minimum(line.cummax(dim=1).values, line.flip(1).cummax(dim=1).values.flip(1))

    rows, columns = span(covered.amax(dim=2)), span(covered.amax(dim=1))    # (B, h), (B, w)
    return (rows[:, :, None] * columns[:, None]).flatten(1)


def hide(noise, visible):
    """noise (B, N) → ids_keep (B, n), ids_restore (B, N), mask (B, N), as in mae.py: the `visible` patches with the lowest
    noise are kept, mask is 1 where a patch is hidden. Raises UserError if none would be visible, or none hidden."""
    if not 0 < visible < noise.shape[1]:
        raise UserError(f"{visible} of {noise.shape[1]} patches visible: the mask ratio has to leave some and hide some")
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= visible).float()
    return ids_shuffle[:, :visible], ids_restore, mask


# -------------------------------------------------------------------------------------------------------------- model

class AutoMAE(nn.Module):
    """A masked autoencoder that hides some patches more often than others (figure 2). Which ones, says `masking`: learned
    (the paper's method), attention (where the prior looks most), boxes (the object's box, the paper's motivating
    experiment) or random (MAE)."""

    def __init__(self, encoder, decoder, generator=None, norm_pixels=True, masking="learned", mask_factor=0.5):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.generator = generator
        self.norm_pixels = norm_pixels
        self.masking = masking
        self.mask_factor = mask_factor

    def forward(self, images, hint, uniform, mask_ratio=0.75):
        """images (B, C, H, W), uniform random numbers (2, B, N) → loss (), prediction (B, N, P·P·C), mask (B, N) with 1 where
        a patch is hidden, soft mask (B, N) or None. hint is what the masking looks at: attention (B, heads, N), boxes
        (B, N), or None for random masking."""
        noise, gumbel_noise = uniform
        visible = int(noise.shape[1] * (1 - mask_ratio))

        # Choose what to highlight: n patches of a random draw from the generator's distribution (details 4, 5 and 7).
        soft_mask = None
        highlighted = hint
        if self.masking == "learned":
            soft_mask = gumbel_softmax(self.generator(hint), gumbel_noise)
            highlighted = highlight(soft_mask, visible)
        elif self.masking == "attention":
            highlighted = highlight(hint.mean(dim=1), visible)
        elif self.masking == "random":
            highlighted = torch.zeros_like(noise)

        # Rank the patches by a random number plus a bonus for what is highlighted, and hide those at the top (detail 6).
        score = noise + self.mask_factor * highlighted                      # (B, N)
        ids_keep, ids_restore, mask = hide(score.detach(), visible)         # (B, n), (B, N), (B, N)

        # Multiply the tokens by 1, but by a 1 whose gradient is that of the score. A visible token that would rather be
        # longer raises its score, and so the chance that it is hidden the next time: this is how the loss of
        # reconstruction speaks to the generator (detail 7).
        tokens = self.encoder.embed(images)                                 # (B, N, D)
        one = 1 + (score - score.detach())
        tokens = tokens * one[..., None]

        # From here on it is MAE: the encoder sees the visible patches, the decoder predicts the pixels of all.
        latent = self.encoder.encode(gather_tokens(tokens, ids_keep))       # (B, 1+n, D), class token first
        prediction = self.decoder(latent, ids_restore)                      # (B, N, P·P·C)
        return self.loss(images, prediction, mask), prediction, mask, soft_mask

    def loss(self, images, prediction, mask):
        """MAE's: mean squared error over hidden patches only."""
        target = patchify(images, self.encoder.patch_size).float()          # (B, N, P·P·C)
        if self.norm_pixels:
            mean = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(dim=-1)         # (B, N)
        return (error * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------------------------------- training

def load_prior(args, run, train, val):
    """→ the frozen ViT whose attention guides the masks: from --prior, or else a plain masked autoencoder that is trained
    here in OUT/prior [not in the paper]. Raises UserError if it has other patches than the images."""
    if args.prior is None:
        if args.prior_updates is None:
            raise UserError(f"--masking {args.masking} needs --prior, a pre-trained ViT. To make one: "
                            f"python mae.py --data {args.data}; then give --prior runs/mae/last.pt")
        out = f"{args.out}/prior"
        goes_on = os.path.exists(f"{out}/last.pt") and (args.resume or not args.overwrite)
        changes = dict(out=out, masking="random", epochs=None, updates=args.prior_updates, resume=goes_on,
                       overwrite=not goes_on)
        run.print(f"first a plain masked autoencoder, whose attention will guide the masks; in {out}")
        pretrain(argparse.Namespace(**(vars(args) | changes)), train, val)
        if run.world > 1:                                                   # until process 0 has written it
            dist.barrier()
    prior = load_encoder(args.prior or f"{out}/last.pt", img_size=args.size)
    if prior.patch_size != args.patch:
        raise UserError(f"the prior has patches of {prior.patch_size} pixels: give --patch {prior.patch_size}")
    return prior.eval().requires_grad_(False)


def pretrain(args, train=None, val=None):
    """Pre-trains an encoder. args: from `parse_args`. train, val: datasets of your own, instead of --data."""
    run = Run(args)
    train, val = prepare_data(args, run, train, val)
    learned = args.masking == "learned"
    prior = load_prior(args, run, train, val) if args.masking in ("learned", "attention") else None

    torch.manual_seed(args.seed)
    if args.init is None:
        size = VITS[args.model] | dict(patch_size=args.patch)
        encoder = ViT(img_size=args.size, in_chans=args.in_chans, **size)
        decoder = Decoder(encoder, **args.decoder)
    else:
        encoder = load_encoder(args.init, img_size=args.size)
        decoder = load_decoder(args.init, encoder)
    args.vit, args.decoder = encoder.config, decoder.config
    places = encoder.grid[0] * encoder.grid[1]
    generator = None
    if learned:
        generator = Generator(prior.config["num_heads"], encoder.grid, places if args.scale_attention else 1.0)
    model = AutoMAE(encoder, decoder, generator, args.norm_pixels, args.masking, args.mask_factor)
    wrapped = run.wrap(model)                                               # on the device; compiled; DDP
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    parts = dict(encoder=encoder, decoder=decoder, optimizer=optimizer, scaler=run.scaler)
    groups = optimizer.param_groups
    if prior is not None:
        prior.forward = prior.attention_map                                 # so that this is what gets compiled
        run.wrap(prior)
    if learned:
        discriminator = Discriminator(encoder.grid)
        wrapped_discriminator = run.wrap(discriminator)
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.9, 0.95), fused=True)
        parts |= dict(generator=generator, discriminator=discriminator, discriminator_optimizer=discriminator_optimizer)
        groups = groups + discriminator_optimizer.param_groups

    ids = spread(len(train), args.limit)
    run.start(len(ids), **parts)
    loader = batches(train, training_plan(ids, run), run, train=True)
    for step in run.steps():
        # Up in a straight line for --warmup epochs, then down half a cosine to zero, for both optimizers alike.
        peak = args.lr * args.batch / 256
        lr = learning_rate(step, peak, args.warmup * run.steps_per_epoch, run.total_steps)
        for group in groups:
            group["lr"] = lr

        # First the discriminator (detail 3): boxes should score 1, masks of the generator 0. One step sees --batch images,
        # a process its part of them in micro-batches, whose gradients add up.
        micro_batches = []
        for i in range(run.accumulate):
            images, _, masks = next(loader)                                 # (b, C, H, W), cropped, flipped, normalised
            uniform = torch.rand(3, len(images), places, device=run.device)
            with torch.no_grad(), run.autocast:
                hint = look(args.masking, prior, images, masks, encoder.grid)
            micro_batches.append((images, masks, hint, uniform[:2]))
            if learned:
                with torch.no_grad(), run.autocast:
                    soft_mask = gumbel_softmax(generator(hint), uniform[2])     # a draw of its own (detail 4)
                boxes = random_boxes(len(images), encoder.grid, run.device)
                wrapped_discriminator.require_backward_grad_sync = i == run.accumulate - 1
                real, fake = wrapped_discriminator(torch.cat([boxes, soft_mask])).chunk(2)
                loss = (real - 1).square().mean() + fake.square().mean()    # detail 2
                run.scaler.scale(loss / run.accumulate).backward()
                run.log(discriminator_loss=loss)
        if learned:
            run.scaler.step(discriminator_optimizer)
            discriminator_optimizer.zero_grad()
            discriminator.requires_grad_(False)                             # from here on it only judges

        # Then encoder, decoder and generator, on the same images: reconstruct well, and look like a box.
        for i, (images, masks, hint, uniform) in enumerate(micro_batches):
            wrapped.require_backward_grad_sync = i == run.accumulate - 1    # DDP averages gradients once a step
            with run.autocast:
                loss, _, mask, soft_mask = wrapped(images, hint, uniform, args.mask_ratio)
            run.log(loss=loss)
            if learned:
                generator_loss = (discriminator(soft_mask) - 1).square().mean()
                run.log(generator_loss=generator_loss)
                loss = loss + args.adversarial_weight * generator_loss
            run.scaler.scale(loss / run.accumulate).backward()
            if masks is not None:
                run.log(**foreground_facts(model, hint, mask, masks))

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        if learned:
            discriminator.requires_grad_(True)
        run.log(lr=lr)

    if run.rank == 0:
        draw(model.eval(), prior, val or train, run)
        if learned:
            report(model, prior, val or train, run)


def look(masking, prior, images, masks, grid):
    """→ what the masking looks at: see `AutoMAE.forward`. Raises UserError if boxes are wanted and there are no masks."""
    if prior is not None:
        return prior(images)                                                # (B, heads, N)
    if masking == "boxes":
        if masks is None:
            raise UserError("--masking boxes needs data with masks of the foreground, as the scenes have")
        return object_boxes(masks, grid)                                    # (B, N)
    return None


# --------------------------------------------------------------------------------------------------- what was learned

def weighted_mean(values, weights):
    return (values * weights).sum() / weights.sum()


def foreground_ratio(values, foreground):
    """Both (B, N) → how many times as high the values are, on average, on the foreground as on the background."""
    return weighted_mean(values, foreground) / weighted_mean(values, 1 - foreground)


@torch.no_grad()
def foreground_facts(model, hint, mask, masks):
    """→ for the log: where the masking hides and highlights, measured with foreground masks bool (B, H, W)."""
    foreground = F.adaptive_avg_pool2d(masks.float(), model.encoder.grid).flatten(1)     # (B, N), the part of a patch
    facts = dict(hidden_foreground=weighted_mean(mask, foreground), hidden_background=weighted_mean(mask, 1 - foreground))
    if model.masking in ("learned", "attention"):
        facts["attention_ratio"] = foreground_ratio(hint.float().mean(dim=1), foreground)
    if model.masking == "learned":
        # Objects tend to lie in the middle. The mean map over all images knows that much without looking at any of them.
        probability = model.generator(hint).exp()
        facts["foreground_ratio"] = foreground_ratio(probability, foreground)
        facts["static_ratio"] = foreground_ratio(probability.mean(dim=0).expand_as(probability), foreground)
    return facts


@torch.no_grad()
def report(model, prior, dataset, run, count=1000):
    """Says how much more often the generator highlights objects than background, where the data have masks."""
    hints, all_masks = [], []
    plan = [(ids, 0) for ids in spread(len(dataset), count).split(250)]
    for images, _, masks in batches(dataset, plan, run):
        if masks is None:
            return run.print("whether objects are highlighted is not measured: the data have no masks of them")
        hints.append(prior(images))
        all_masks.append(masks)
    hint, masks = torch.cat(hints), torch.cat(all_masks)
    facts = foreground_facts(model, hint, torch.ones_like(hint[:, 0]), masks)
    ratio, static = facts["foreground_ratio"].item(), facts["static_ratio"].item()
    run.print(f"objects are highlighted {ratio:.1f} times as often as background (by chance 1.0; {static:.1f} of it is where "
              "objects tend to lie)")
    run.write_log(step=run.step, foreground_ratio=ratio, static_ratio=static)


@torch.no_grad()
def draw(model, prior, dataset, run, count=10):
    """Writes OUT/masks.png: images, what guided the masks, the masks, and what the decoder makes of them."""
    args, patch_size = run.args, model.encoder.patch_size
    images, _, masks = next(batches(dataset, [(spread(len(dataset), count), args.seed)], run))
    hint = look(args.masking, prior, images, masks, model.encoder.grid)
    patches = patchify(images, patch_size)                                  # (B, N, P·P·C)
    uniform = torch.rand(2, *patches.shape[:2], device=run.device)
    _, prediction, mask, _ = model.forward(images, hint, uniform, args.mask_ratio)
    if model.norm_pixels:
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * deviation + patches.mean(dim=-1, keepdim=True)
    mask = mask[..., None]                                                  # (B, N, 1)

    def pixels(patches):
        return to_pixels(unpatchify(patches, patch_size, model.encoder.img_size), args)

    def brightness(values):
        """(B, N) → grey images, white where an image's highest value is."""
        values = (255 * values / values.amax(dim=1, keepdim=True))[..., None].expand_as(patches)
        return unpatchify(values, patch_size, model.encoder.img_size).byte().cpu()

    rows = {"image": pixels(patches)}
    if prior is not None:
        rows["attention of the prior"] = brightness(hint.mean(dim=1))
    if model.generator is not None:
        rows["probability by the generator"] = brightness(model.generator(hint).exp())
    note = " (hidden patches with their true mean and contrast)" if model.norm_pixels else ""
    rows[f"{1 - args.mask_ratio:.0%} visible"] = pixels(patches * (1 - mask))
    rows["reconstruction" + note] = pixels(patches * (1 - mask) + prediction * mask)
    save_image_rows(f"{args.out}/masks.png", rows)
    run.print(f"images: {args.out}/masks.png")


# ------------------------------------------------------------------------------------------------------- command line

# Defaults by kind of data. "imagenet" is the paper's recipe; the others take minutes on a CPU [not in the paper].
SMALL = dict(model="nano", decoder=dict(embed_dim=64, depth=2, num_heads=4), norm_pixels=False, crop=1.0, updates=1250,
             prior_updates=1250, scale_attention=True, batch=32, lr=1.6e-2, warmup=0.4)
IMAGENET = dict(model="base", size=[224], decoder=dict(embed_dim=512, depth=8, num_heads=16), norm_pixels=True, crop=0.2,
                epochs=800, scale_attention=False, batch=4096, lr=1.5e-4, warmup=40.0)


def preset(args, kind):
    """→ the defaults for a kind of data."""
    if kind == "imagenet":
        return IMAGENET | dict(patch=VITS[args.model or "base"]["patch_size"])
    return SMALL


def options():
    """→ automae.py's parser."""
    parser = shared_options("Pre-trains a masked autoencoder that learns where to mask.")
    fraction = number(float, 0, 1)
    add = parser.add_argument_group("automae").add_argument
    add("--masking", choices=("learned", "attention", "boxes", "random"), default="learned", help="what is hidden more often: "
        "what the generator says, what the prior attends to, the object's true box, nothing (paper: learned)")
    add("--mask-ratio", type=fraction, default=0.75, help="part of the patches that is hidden (paper: 0.75)")
    add("--mask-factor", type=number(float, 0), default=0.5, help="what is added to the random numbers of highlighted "
        "patches; 0 is random masking, 1 hides them surely (paper: 0.5)")
    add("--adversarial-weight", type=number(float, 0), default=0.2, help="weight of looking like a box (paper: 0.2)")
    add("--prior", help="checkpoint of the ViT that gives the attention; left out: a small one is trained first (paper: MAE)")
    add("--prior-updates", type=number(int, 1), help="steps of that training")
    add("--norm-pixels", action=argparse.BooleanOptionalAction, help="predict normalised patches (paper: yes)")
    return parser


def main(arguments=None):
    pretrain(parse_args(options(), "automae", preset, arguments))


if __name__ == "__main__":
    entry(main)
