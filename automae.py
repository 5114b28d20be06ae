"""Improving Masked Autoencoders by Learning Where to Mask
Haijian Chen, Wendong Zhang, Yunbo Wang, Xiaokang Yang, 2023, https://arxiv.org/abs/2303.06583

A masked autoencoder hides patches at random, as if all of them taught equally much. They do not: empty
background is too easy to predict, and in the paper hiding patches of objects more often gives better
features. AutoMAE learns which ones, image by image. A frozen transformer, trained before, gives a hint: its
attention is often high on objects. A small generator turns it into a probability for each patch, from which a
mask is drawn. Two forces train the generator. A discriminator compares its masks with random boxes, because
objects are compact, and pulls it towards masks that look like a box. And the gradient of the reconstruction
loss flows back through the drawn mask, which, says the paper, keeps the task from getting too hard (here it
changes next to nothing). In the end only the encoder counts; it is a plain vision transformer.

    images ──► frozen ViT ──► attention ──► GENERATOR ──► probability ──► soft mask ──► DISCRIMINATOR: a box?
    (B,C,H,W)                 (B,heads,N)                 (B,N)           (B,N) drawn
       │                                                                  │ its n highest are highlighted
       └──► MAE hides patches by score = random noise + 0.5 · highlighted ──► loss on hidden patches

    python automae.py                                           # scenes drawn here: minutes on a CPU
    python automae.py --data fashion-mnist --out runs/fashion   # a torchvision dataset
    torchrun --nproc_per_node=8 automae.py --data /imagenet --prior runs/mae/last.pt    # the paper's recipe
    python mae.py --task probe --init runs/automae/last.pt      # evaluate the encoder

Measured in the last epoch, seeds 0 to 5 (on the scenes of seed 0, given as train=), one thread of an Intel
Xeon:

    generator's probability, objects over background         6.5  3.2  3.0  2.8  4.3  2.7
    the same, for its mean map over a batch                  3.1  2.9  2.8  2.9  3.1  2.8

The mean map knows only where objects tend to lie. So with seeds 0 and 4 looking at the individual image
helps; with the others the generator learns hardly more than that map. This depends on the prior: with seed 0
one head attends 9 times as much to objects as to background, with the others no head more than 3.3 times.
(An AMD EPYC sums in another order, which matters as much as another seed: there seed 0 ends with 4.5.)

The reconstruction's gradient changes next to nothing: without it the first ratio is 6.6, 3.2 and 3.0 (seeds
0 to 2).

Features do not get better: a linear classifier on the mean patch token reaches 0.456 ± 0.042 (mean and
standard deviation over these six seeds), with random masks (--masking random) 0.453 ± 0.061, with true boxes
0.220 ± 0.004 (seeds 0 to 2), no better than before training. True boxes hide nearly the whole object. In a
scene the background says nothing about the object's shape, so, we think, nothing teaches the encoder about
shapes, and scenes cannot test the paper's claim about boxes. Learned masks hide 0.82 to 0.87 of the object
and 0.71 to 0.73 of the background, and do no such harm.

Details that matter
1. No layer of the discriminator has a bias. With biases it can answer ½ to everything, and then nothing
   pushes the generator.
2. The discriminator's loss is a sum, (D(box) − 1)² + D(mask)². D is a plain score without a sigmoid, and
   all its weights are spectrally normalised.
3. In each step the discriminator learns first, on masks without gradient. Then it is frozen, and encoder,
   decoder and generator learn together from the reconstruction plus 0.2 · (D(mask) − 1)².
4. Gumbel noise is drawn twice a step: for the discriminator, and for the autoencoder and the generator.
5. n patches are highlighted, as many as stay visible, not as many as get hidden.
6. 0.5 is added to the random noise, from 0 to 1, of highlighted patches. If three quarters are hidden, that
   hides practically all of them. What is left to chance is which patches are highlighted, and
   which two thirds of the others are hidden as well.
7. Sorting has no gradient. Two tricks let one pass: the n highest of the soft mask become 1, but keep the
   soft mask's gradient; and every token is multiplied by a 1 that has the gradient of its score.
8. On a grid of 14×14, a box is 4 to 10 wide, and as high as an area of 40 to 160 patches makes it. Above 14
   it is cut off, so more than half of the boxes reach from top to bottom. Noise from 0 to 1, plus 0.5 in
   the box, goes through a softmax over all patches. The limits scale with the grid [not in the paper].
9. The prior is a masked autoencoder of the encoder's size, trained first (paper: 800 epochs), then frozen.
"""

import argparse

from common import (                                                  # before torch: sets an OpenMP variable
    VITS, Decoder, Run, UserError, ViT, batches, decay_groups, entry, evenly_spaced, gather_tokens,
    label_objects, learning_rate, load_encoder, load_for_run, number, parse_args, patchify, prepare_data,
    run_in_folder, save_image_rows, say, shared_options, to_pixels, training_plan, unpatchify)

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

# -------------------------------------------------------------------------------------------------- masking

def make_generator(num_heads, grid):
    """→ a module: attention of the prior (B, heads, N) → log-probability (B, N) of each patch. The higher
    it is, the more often the patch gets highlighted (section 3.2). The generator mixes the heads and looks at
    a patch's neighbours, zeros beyond the border: 709 parameters for ViT-B."""
    return nn.Sequential(
        nn.Unflatten(2, grid),                                        # (B, heads, h, w)
        nn.Conv2d(num_heads, num_heads // 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(num_heads // 2, 1, 3, padding=1),
        nn.Flatten(),
        nn.LogSoftmax(dim=1)
    )


def highlight(soft_mask, n):
    """soft_mask (B, N) → 1 at its n highest entries, else 0. A straight-through estimator: the gradient is
    soft_mask's own (detail 7)."""
    hard = torch.zeros_like(soft_mask).scatter(1, soft_mask.topk(n).indices, 1.0)
    return hard + (soft_mask - soft_mask.detach())


def make_discriminator(grid):
    """→ a module: soft mask (B, N) → scores (B, 1 or more), near 1 for a random box, near 0 for a mask of the
    generator (section 3.2). Spectral norm divides the weights of a layer by their largest singular
    value, so that scores change gently. No biases (detail 1)."""
    # 14×14 patches become 7×7, 3×3, and one score. With a side below 12 patches the last layer needs
    # padding, with one below 4 the second layer needs more of it [not in the paper].
    padding = int(min(grid) < 12)
    return nn.Sequential(
        nn.Unflatten(1, (1, *grid)),                                  # (B, 1, h, w)
        spectral_norm(nn.Conv2d(1, 16, 4, 2, 1, bias=False)),         # kernel 4×4, stride 2, padding 1
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(16, 32, 4, 2, 1 + (min(grid) < 4), bias=False)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(32, 1, 3, padding=padding, bias=False)),
        nn.Flatten()
    )


def random_boxes(batch, grid, device):
    """→ (B, N), each row sums to 1: the discriminator's "real" examples, each a rectangle of random size and
    place, plus noise (detail 8)."""
    h, w = grid
    narrowest = round(4 / 14 * w)
    u, v, x, y = torch.rand(4, batch, 1, device=device)
    area = h * w * (39 + 121 * u) / 196                               # rounded up: 40 to 160 of 14×14
    width = (narrowest + v * (w - 2 * narrowest + 1)).floor()         # from narrowest to w − narrowest
    height = (area / width).ceil().clamp(max=h)

    place = torch.arange(h * w, device=device)
    row = place // w - (y * (h - height + 1)).floor()                 # (B, N), counted from the box's corner
    column = place % w - (x * (w - width + 1)).floor()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    noise = torch.rand(batch, h * w, device=device)
    return (noise + 0.5 * inside).softmax(dim=1)


def object_boxes(masks, grid):
    """Foreground masks (B, H, W) → (B, N): 1 where both the row and the column of a patch have foreground
    somewhere, else 0. For an object in one piece that is the box around it."""
    covered = F.adaptive_max_pool2d(masks.float(), grid)              # (B, h, w)
    rows = covered.amax(dim=2, keepdim=True)
    columns = covered.amax(dim=1, keepdim=True)
    return (rows * columns).flatten(1)


def hide(noise, num_visible):
    """noise (B, N) → ids_keep (B, n), ids_restore (B, N), mask (B, N), as in mae.py: the n = num_visible
    patches with the lowest noise are kept; mask is 1 where a patch is hidden."""
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= num_visible).float()
    return ids_shuffle[:, :num_visible], ids_restore, mask


# ---------------------------------------------------------------------------------------------------- model

class AutoMAE(nn.Module):
    """A masked autoencoder that hides some patches more often than others (section 3, figure 2)."""

    def __init__(self, encoder, decoder, generator=None, norm_pixels=True, mask_ratio=0.75, mask_factor=0.5):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.generator = generator
        self.norm_pixels = norm_pixels
        self.mask_factor = mask_factor
        self.num_patches = encoder.grid[0] * encoder.grid[1]          # N
        self.num_visible = max(1, int(self.num_patches * (1 - mask_ratio)))  # n

    def forward(self, images, hint):
        """images (B, C, H, W) → loss (), prediction (B, N, P·P·C), mask (B, N) with 1 where a patch is
        hidden, soft mask (B, N); without a generator the last is the hint.

        hint: attention for the generator (B, heads, N); without a generator, (B, N) with 1 for patches to
        highlight and 0 for others, or the number 0 to highlight none.
        """
        # The generator gives every patch a log-probability (section 3.2). Gumbel-softmax adds noise and
        # normalises: a random soft mask that keeps the gradient. A patch gets the highest entry with exactly
        # the probability that the generator gives it. The n highest are highlighted (details 5 and 7).
        soft_mask = highlighted = hint
        if self.generator is not None:
            soft_mask = F.gumbel_softmax(self.generator(hint).float())
            highlighted = highlight(soft_mask, self.num_visible)

        # Rank patches by a random number, as MAE does, plus a bonus for the highlighted ones. The patches at
        # the top are hidden (detail 6).
        noise = torch.rand(len(images), self.num_patches, device=images.device)
        score = noise + self.mask_factor * highlighted                # (B, N)
        ids_keep, ids_restore, mask = hide(score, self.num_visible)

        # Multiply every token by a 1 whose gradient goes to the score: this is how the reconstruction loss
        # reaches the generator (detail 7). With this sign, the authors', the score of a visible token rises
        # if a larger token would lower the loss, and then its patch is hidden more often.
        one = 1 + (score - score.detach())
        tokens = self.encoder.embed(images) * one[..., None]          # (B, N, D)

        # From here on all is as in MAE: the encoder sees visible patches, the decoder predicts hidden pixels.
        latent = self.encoder.encode(gather_tokens(tokens, ids_keep))  # (B, 1+n, D), class token first
        prediction = self.decoder(latent, ids_restore)                # (B, N, P·P·C)
        return self.loss(images, prediction, mask), prediction, mask, soft_mask

    def loss(self, images, prediction, mask):
        """MAE's: mean squared error over hidden patches only."""
        target = patchify(images, self.encoder.patch_size).float()    # (B, N, P·P·C)
        if self.norm_pixels:
            mean = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(dim=-1)   # (B, N)
        return (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------- training

def train_prior(args, run, train, val):
    """Trains a plain masked autoencoder, whose attention will give hints, by the same function and for as
    long as AutoMAE → its checkpoint, in OUT/prior."""
    # Once AutoMAE itself has begun, its prior is complete. Before that, an unfinished prior is trained to its
    # end; a finished one is used as it is, unless --epochs has grown.
    if not run.resumes:
        say(f"first a plain masked autoencoder, whose attention will guide the masks, in {args.out}/prior")
        run.clear("args.json")                                        # removes an older run from OUT
        run_in_folder(pretrain, args, "prior", train, val, masking="random")
    return f"{args.out}/prior/last.pt"


def find_hint(args, prior, images, labels, model):
    """→ what AutoMAE.forward asks for."""
    if args.masking == "learned":
        return prior(images).float()                                  # (B, heads, N)
    if args.masking == "attention":
        return highlight(prior(images).mean(dim=1), model.num_visible)  # (B, N)
    if args.masking == "random":
        return 0.0
    return object_boxes(labels > 0, model.encoder.grid)               # (B, N)


def pretrain(args, train=None, val=None):
    """Pre-trains an autoencoder. args: as `main` makes them. train, val: datasets of your own, instead of
    --data."""
    run = Run(args)
    encoder = prior = generator = None
    needs_prior = args.masking in ("learned", "attention")
    if args.prior and needs_prior:                                    # first: images are as in its training
        prior = load_for_run(args.prior, args)
    if args.init:                                                     # the decoder always starts anew
        encoder = load_for_run(args.init, args, num_classes=0, global_pool="token")
    train, val = map(label_objects, prepare_data(args, run, train, val))
    if args.masking == "boxes" and torch.as_tensor(train[0][1]).ndim < 2:
        raise UserError("--masking boxes needs maps of objects as labels; scenes have them")
    if needs_prior:
        prior = prior or load_encoder(train_prior(args, run, train, val))
        prior.forward = prior.attention_map                           # prior(images) → (B, heads, N)
        run.wrap(prior.eval().requires_grad_(False))
    torch.manual_seed(args.seed)
    encoder = encoder or ViT(args.size, args.patch, args.in_chans, **VITS[args.model])
    if prior and prior.grid != encoder.grid:
        raise UserError("--init and --prior have patches of different sizes")
    decoder = Decoder(encoder, **args.decoder)                        # sizes from SMALL or IMAGENET
    args.vit = encoder.config
    if args.masking == "learned":
        generator = make_generator(prior.config["num_heads"], encoder.grid)
        discriminator = make_discriminator(encoder.grid)
    model = AutoMAE(encoder, decoder, generator, args.norm_pixels, args.mask_ratio, args.mask_factor)
    wrapped = run.wrap(model)                                         # on the device; compiled; DDP
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    parts = dict(encoder=encoder, decoder=decoder, optimizer=optimizer, scaler=run.scaler)
    optimizers = [optimizer]
    if generator:
        wrapped_discriminator = run.wrap(discriminator)
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.9, 0.95), fused=True)
        optimizers.append(discriminator_optimizer)
        parts |= dict(generator=generator, discriminator=discriminator,
                      discriminator_optimizer=discriminator_optimizer)

    ids = evenly_spaced(len(train), args.limit)
    run.start(len(ids), **parts)
    loader = batches(train, training_plan(ids, run), run, train=True)
    for step in run.steps():
        # Linear warm-up for --warmup epochs, then cosine decay to zero.
        peak = args.lr * args.batch / 256
        lr = learning_rate(step, peak, run.warmup_steps, run.total_steps)
        for adam in optimizers:
            for group in adam.param_groups:
                group["lr"] = lr

        # One step sees --batch images. A process takes its part in micro-batches, and the gradients add up.
        for i in range(run.accumulate):
            is_last = i == run.accumulate - 1
            images, labels = next(loader)                             # (b, C, H, W); (b,) or maps (b, H, W)
            with torch.no_grad(), run.autocast:
                hint = find_hint(args, prior, images, labels, model)

            # First the discriminator (LSGAN): boxes should score 1, the generator's masks 0 (details 2 to 4).
            # It steps in the last micro-batch, before encoder, decoder and generator see that one, as in the
            # authors' code.
            if generator:
                fake = F.gumbel_softmax(generator(hint)).detach()
                real = random_boxes(len(images), encoder.grid, run.device)
                real_loss = (wrapped_discriminator(real) - 1).square().mean()
                fake_loss = wrapped_discriminator(fake).square().mean()
                discriminator_loss = real_loss + fake_loss
                run.scaler.scale(discriminator_loss / run.accumulate).backward()
                if is_last:
                    run.scaler.step(discriminator_optimizer)
                    discriminator_optimizer.zero_grad()

            # Then encoder, decoder and generator: reconstruct well, and draw masks that look like a box. The
            # gradient passes through the discriminator, but not into its weights: hence no DDP around it.
            wrapped.require_backward_grad_sync = is_last              # DDP averages gradients once a step
            with run.autocast:
                loss, _, mask, soft_mask = wrapped(images, hint)
            run.log(loss=loss)
            if generator:
                discriminator.requires_grad_(False)
                generator_loss = (discriminator(soft_mask) - 1).square().mean()
                discriminator.requires_grad_(True)
                run.log(generator_loss=generator_loss, discriminator_loss=discriminator_loss)
                loss = loss + args.adversarial_weight * generator_loss
            run.scaler.scale(loss / run.accumulate).backward()
            if labels.ndim == 3:
                run.log(**where_it_hides(model, hint, mask, labels > 0))

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        run.log(lr=lr)

    if run.rank == 0:
        draw(model, prior, val or train, run)
    last = run.history[-1]
    if "static_ratio" in last:
        say(
            f"the generator's probability is {last['foreground_ratio']:.1f} times as high on objects as on "
            f"the rest; that of one map for all images, which knows only where they tend to lie: "
            f"{last['static_ratio']:.1f}")


@torch.no_grad()
def where_it_hides(model, hint, mask, objects):
    """Foreground masks bool (B, H, W) → values for the log: the part of foreground and of background that is
    hidden; how many times as high the generator's probability and the prior's attention are on foreground."""
    foreground = F.adaptive_avg_pool2d(objects.float(), model.encoder.grid).flatten(1)   # (B, N), parts of 1

    def means(values):
        # 1e-6: perhaps no image has an object.
        return [(values * part).sum() / (part.sum() + 1e-6) for part in (foreground, 1 - foreground)]

    found = {}
    found["hidden_foreground"], found["hidden_background"] = means(mask)
    if model.generator:
        # Objects tend to lie in the middle. The mean map of a micro-batch knows that too, almost without
        # looking at the individual image.
        probability = model.generator(hint).exp()
        maps = dict(foreground_ratio=probability, static_ratio=probability.mean(0, keepdim=True),
                    attention_ratio=hint.mean(dim=1))
        for name, values in maps.items():
            inside, outside = means(values)
            found[name] = inside / outside
    return found


@torch.no_grad()
def draw(model, prior, dataset, run):
    """Writes OUT/masks.png: images; the same, faded where attention, then where the probability is low; what
    the encoder sees; what the decoder predicts (normalised patches, if norm_pixels)."""
    encoder, args = model.encoder, run.args
    images, labels = next(batches(dataset, [(evenly_spaced(len(dataset), 10), args.seed)], run))
    # `.forward` skips torch.compile, which would compile anew for this batch size.
    hint = find_hint(args, prior and prior.forward, images, labels, model)
    _, prediction, mask, _ = model.forward(images, hint)

    patches = patchify(images, encoder.patch_size)                    # (B, N, P·P·C)
    hidden = mask[..., None]                                          # (B, N, 1)
    rows = {"image": patches}
    if model.generator:
        maps = {"attention of the prior": hint.mean(dim=1), "probability": model.generator(hint).exp()}
        for title, values in maps.items():
            rows[title] = patches * F.normalize(values, torch.inf)[..., None]     # 1 where it is highest
    rows["visible"] = patches * (1 - hidden)
    rows["reconstruction"] = rows["visible"] + prediction * hidden
    save_image_rows(f"{args.out}/masks.png", {
        title: to_pixels(unpatchify(row, encoder.patch_size, encoder.img_size), args)
        for title, row in rows.items()})


# --------------------------------------------------------------------------------------------- command line

# Defaults by kind of data, for the prior as well. ImageNet gets the paper's recipe. Scenes and small data
# take minutes on a CPU [not in the paper].
SMALL = dict(
    model="nano",
    decoder=dict(embed_dim=64, depth=1, num_heads=4),
    norm_pixels=False,
    crop=1.0,
    steps=2500,
    batch=16,
    lr=2.4e-2)
IMAGENET = dict(
    model="base",
    decoder={},                                                       # `Decoder`'s defaults are MAE's
    norm_pixels=True,
    size=[224],
    crop=0.2,
    epochs=800,
    batch=4096,
    lr=1.5e-4,
    warmup=40.0)


def options():
    """→ automae.py's parser."""
    parser = shared_options("Pre-trains a masked autoencoder that learns where to mask.")
    add = parser.add_argument_group("automae").add_argument
    add("--masking", choices=("learned", "attention", "boxes", "random"), default="learned",
        help="what to hide more often: the generator's choice (paper), the prior's, true boxes, or nothing")
    add("--mask-ratio", type=number(float, 0.01, 0.99), default=0.75,
        help="fraction of patches to hide (paper: 0.75)")
    add("--mask-factor", type=float, default=0.5, help="bonus of highlighted patches (paper: 0.5)")
    add("--adversarial-weight", type=float, default=0.2, help="weight of the box loss (paper: 0.2)")
    add("--prior", help="checkpoint whose attention guides the masks; None: trained first (paper: MAE, 800 "
        "epochs)")
    add("--norm-pixels", action=argparse.BooleanOptionalAction,
        help="predict normalised patches (paper: yes)")
    return parser


def main(arguments=None, train=None, val=None):
    """arguments: a list of options; None: those of the command line. train, val: as for `pretrain`."""
    pretrain(parse_args(
        options(),
        "automae",
        lambda args, kind: IMAGENET if kind == "imagenet" else SMALL,
        arguments), train, val)


if __name__ == "__main__":
    entry(main)
