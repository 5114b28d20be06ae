"""Mixed Autoencoder for Self-supervised Visual Representation Learning (Chen et al.; arXiv 2303.17152).

Mixing pictures helps supervised learning, so why not masked autoencoders? Because there a hidden patch is nothing at all, and a
patch of another picture in its place is something: mixed naively, reconstruction gets easier and features get worse. The cure is
a second task, homologous recognition: find out which patches of the mixture come from the same picture. Every query may attend
only to the few keys most similar to it, so it had better choose its own picture's, and a contrastive loss tells whether it did.
Four pictures share the places of one: the encoder works on as many tokens as MAE's does on its visible quarters.

    4 images ─► a quarter of the places each, ─► N tokens ─► ENCODER, each query ─► un-mix ─► DECODER ─► pixels ─► loss, on what
    (B,C,H,W)   none twice (B,n,D)               (B/4,N,D)   sees its top n keys    (B,n,D)   (B,N,·)              was not its own
                                                                    └─► contrastive loss: same picture or not?

    python mixedae.py                                           on two CPU cores, nothing to download
    python mixedae.py --data fashion-mnist --epochs 3           a small torchvision data set
    torchrun --nproc_per_node=8 mixedae.py --data /imagenet     the paper's recipe, ViT-B/16
    python mae.py --task probe --init runs/mixedae/last.pt      what the encoder is worth: it is a plain ViT

Measured, first command (2 cores of an AMD EPYC, torch 2.15, seed 0): 4 min 14 s; of a query's chosen keys 0.60 0.70 0.75 0.59 are
of its own picture, block by block (with one thread 0.61 0.73 0.74 0.85), before training 0.53, by chance 0.25; as an encoder it
is worth less than MAE's at this scale (README).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from common import (TRUE_CONTRAST, Attention, Batches, Problem, Run, adamw, build, entry, fit, load_data, patchify, pixel_loss,
                    save_sheet, settings, shared_options, take, unpatchify, with_contrast)

# ------------------------------------------------------------------------------------------------------------------ mixing

def share_places(noise, n, group, turns=1):
    """noise (G, N) → shuffle (turns·B, N): how the pictures of each group divide its N places among themselves.

    The first n of a picture's row are the places it owns, the others follow; in a group no place is owned twice. With `turns`
    everything comes that many times, and each time the pictures pass their places on to the next: after N/n turns each of them
    has owned every place once (the full mode; our reading). Rows are in the order turn, group, picture.
    """
    order = noise.argsort(dim=1)                                                            # (G, N) all places, at random
    each = [[order.roll(-n * (turn + member), dims=1) for member in range(group)] for turn in range(turns)]
    return torch.stack([torch.stack(rows, dim=1) for rows in each]).flatten(0, 2)

class HomologousAttention(Attention):
    """Self-attention in which a query sees only the `top` keys most similar to it, and the class token; in every block (after the
    paper).

    The class token itself sees every key (our choice). Which keys are chosen has no gradient, so that is found without one, and
    the attention among the chosen is the usual fused kernel. With top = None it is plain attention, of the same parameters.
    So a head may settle on the keys of one wrong picture, and the loss hardly pulls it back. Under the usual start, where q·k of
    two equal tokens is as often negative as positive, that is a lottery; hence `copy_keys`.
    `accuracy` (H,) is the share of chosen keys that are of the query's own picture, if every `top` tokens in turn are of one.
    """

    top = accuracy = None

    @torch.no_grad()
    def choose(self, q, k):
        """Queries and keys (B, H, 1+N, D/H) → each patch's chosen patches (B, H, N, top). Raises Problem if N < top."""
        if q.shape[2] <= self.top:
            raise Problem(f"a query cannot choose {self.top} keys among {q.shape[2] - 1} patches")
        return (q[:, :, 1:] @ k[:, :, 1:].transpose(-2, -1)).topk(self.top, sorted=False).indices

    def seen(self, chosen):
        """(B, H, N, top) → (B, H, 1+N, 1+N), true where a query sees a key."""
        tokens = chosen.shape[2] + 1
        seen = torch.zeros(*chosen.shape[:2], tokens, tokens, dtype=torch.bool, device=chosen.device)
        seen[:, :, 1:].scatter_(-1, chosen + 1, True)
        seen[:, :, 0], seen[:, :, :, 0] = True, True
        return seen

    def forward(self, x):
        if self.top is None:
            return super().forward(x)
        q, k, v = self.split(x)                                                             # (B, H, 1+N, D/H)
        chosen = self.choose(q, k)                                                          # (B, H, N, top)
        own = torch.arange(chosen.shape[2], device=x.device)[:, None] // self.top           # (N, 1) whose token it is
        self.accuracy = (chosen // self.top == own).float().mean((0, 2, 3))                 # (H,)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.seen(chosen)).transpose(1, 2).flatten(2))

    def weights(self, x, first=None):
        """(B, 1+N, D) → (B, H, 1+N, 1+N): who looks where, with zeros where a query does not see a key."""
        q, k, _ = self.split(x)
        hidden = ~self.seen(self.choose(q, k)) if self.top else torch.zeros((), dtype=torch.bool, device=x.device)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)[:, :, :first]

def contrastive_loss(tokens, n, temperature=0.25):
    """tokens (G, N, D), every n in turn of one picture → (): for each token, the cross-entropy of finding the others of its
    picture among all others by cosine similarity (the temperature is after the paper)."""
    tokens = F.normalize(tokens.float(), dim=-1)
    similarity = tokens @ tokens.transpose(1, 2) / temperature                              # (G, N, N)
    picture = torch.arange(tokens.shape[1], device=tokens.device) // n                      # (N,)
    itself = torch.eye(len(picture), dtype=torch.bool, device=tokens.device)
    others = similarity.masked_fill(itself, -torch.inf).logsumexp(-1, keepdim=True)         # (G, N, 1)
    positive = ((picture[:, None] == picture) & ~itself).float()                            # (N, N) as many in every row
    return ((others - similarity) * positive).sum() / (len(tokens) * positive.sum())

# ------------------------------------------------------------------------------------------------------------------- model

class MixedAE(nn.Module):
    """A masked autoencoder whose encoder sees the visible patches of several pictures in one sequence.

    A picture owns 1/members of the places, and as many pictures share a sequence (or `group` of them, the other places are
    empty; 1, without what follows, is MAE). With `full` each picture owns every place once, for `members` times the work.
    What tells the pictures apart: `segments`, a learned vector for each member, `homologous` attention, and the contrastive
    loss, weighted by `contrastive`. Without all three this is naive mixing. Raises Problem unless the places divide among the
    members.
    """

    def __init__(self, encoder, decoder, norm_pixels=True, members=4, full=False, segments=True, homologous=True, contrastive=0.1,
                 group=None):
        super().__init__()
        self.encoder, self.decoder, self.norm_pixels = encoder, decoder, norm_pixels
        self.homologous, self.contrastive = homologous, contrastive
        self.places, self.group, self.turns = encoder.grid[0] * encoder.grid[1], group or members, members if full else 1
        if self.places % members or self.places == members or self.group > members:
            raise Problem(f"{self.places} patches do not divide among {members} pictures, two or more for each: change --size, "
                          "--patch or --mix-ratio")
        self.own = self.places // members                                                   # n
        # Our choice between 0.02, MAE's usual start, with which the first epoch goes as without any, and 0.5, with which more
        # keys are chosen rightly but the encoder is worth less without segments (README).
        self.segments = nn.ParameterDict({"segment_token": 0.1 * torch.randn(self.group, 1, encoder.dim)} if segments else {})
        for block in encoder.blocks:
            if homologous and not isinstance(block.attn, HomologousAttention):
                raise Problem("the encoder is to be a ViT(…, attention=HomologousAttention)")
            block.attn.top = self.own if homologous else None

    def mix(self, images, noise=None):
        """images (B, C, H, W) → tokens (G, M·n, D), a sequence a group, and shuffle (B, N), a picture's own n places first.
        B is a multiple of the group; each group divides its places by `noise` (G, N), if it is given. In full mode, members times
        as many of both. Raises Problem when the groups do not come out even."""
        if len(images) % self.group:
            raise Problem(f"{len(images)} pictures do not divide into groups of {self.group}")
        noise = torch.rand(len(images) // self.group, self.places, device=images.device) if noise is None else noise
        shuffle = share_places(noise, self.own, self.group, self.turns)                     # (B, N)
        tokens = self.encoder.embed(images).repeat(self.turns, 1, 1)                        # (B, N, D) mixed as tokens (ours)
        tokens = take(tokens, shuffle[:, :self.own]).unflatten(0, (-1, self.group))         # (G, M, n, D) each its own places
        if self.segments:
            segment = self.segments["segment_token"]                                        # (M, 1, D) one for each picture
            tokens = tokens + (segment - segment.mean(0))                                   # 0 on average, as later (ours)
        return tokens.flatten(1, 2), shuffle

    def forward(self, images, noise=None):
        """→ loss (), prediction (B, N, P·P·C), mask (B, N), 1 at places not its own, and facts for the log; see `mix`. In
        full mode B stands for members times as many pictures."""
        tokens, shuffle = self.mix(images, noise)                                           # (G, N, D), (B, N)
        restore, images = shuffle.argsort(dim=1), images.repeat(self.turns, 1, 1, 1)        # (B, N), (B, C, H, W)
        mask = (restore >= self.own).float()                                                # (B, N)
        latent = self.encoder.encode(tokens)                                                # (G, 1+N, D) all pictures at once
        own = latent[:, 1:].unflatten(1, (self.group, -1)).flatten(0, 1)                    # (B, n, D) un-mixed
        own = torch.cat([latent[:, :1].repeat_interleave(self.group, dim=0), own], dim=1)   # (B, 1+n, D) its class token: ours
        prediction = self.decoder(own, restore)                                             # (B, N, P·P·C) every place
        loss = pixel_loss(images, prediction, mask, self.encoder.patch, self.norm_pixels)
        facts = {"reconstruction_loss": loss}
        if self.contrastive:
            with torch.autocast(latent.device.type, enabled=False):
                facts["contrastive_loss"] = contrastive_loss(latent[:, 1:], self.own)
            loss = loss + self.contrastive * facts["contrastive_loss"]
        if self.homologous:
            facts["topk_accuracy"] = torch.stack([block.attn.accuracy.mean() for block in self.encoder.blocks])     # chance: n/N
        return loss, prediction, mask, facts

# ---------------------------------------------------------------------------------------------------------------- training

def copy_keys(encoder):
    """Starts keys as copies of queries: what is most similar to a token is then what is most like it (our choice)."""
    for block in encoder.blocks:
        queries, keys, _ = block.attn.qkv.weight.data.chunk(3)
        keys.copy_(queries)

def pretrain(args):
    """Mixes, reconstructs, and in the end draws."""
    run = Run(args)
    if run.micro % args.members or run.micro // args.crops < args.members:
        raise Problem(f"micro-batches of {run.micro} do not divide into groups of {args.members} different pictures: change "
                      "--batch, --micro-batch or --crops")
    train, val = load_data(args, run)
    if len(train) < args.members:
        raise Problem(f"a group wants {args.members} different pictures, and there are {len(train)}")
    encoder, decoder = build(args, HomologousAttention)
    if args.homologous_attention:
        copy_keys(encoder)
    optimizer = adamw(model := MixedAE(encoder, decoder, args.norm_pixels, args.members, args.mixing == "full", args.segments,
                                       args.homologous_attention, args.contrastive_weight * args.contrastive), args.weight_decay)
    wrapped = run.wrap(model)                                                               # device, torch.compile, DDP
    run.keep(encoder=encoder, decoder=decoder, segments=model.segments, optimizer=optimizer)         # in last.pt
    run.introduce(model, train)

    batches = Batches(train, run, args.size, args.crop)
    for step in run.steps(batches.per_epoch):
        for images, _, _ in batches.at(step):                                               # (b, C, H, W) a micro-batch
            with run.autocast():
                loss, _, _, facts = wrapped(images)
            run.backward(loss)
            run.log(loss=loss, **facts)
        run.update(optimizer)

    if run.rank == 0:
        draw(model, val or train, run, args)

@torch.no_grad()
def draw(model, data, run, args):
    """Writes OUT/mixture.png: a group and its patches; its mixture, whose places are whose, and where the middle patch looks,
    before and after TopK, in the block that chooses best; the reconstructions."""
    encoder, count = model.eval().encoder, args.members
    images, *_ = next(data.stream([(torch.linspace(0, len(data) - 1, count).long(), 0)], run, args.size))
    torch.manual_seed(args.seed)
    noise = torch.rand(1, model.places, device=run.device)
    _, prediction, mask, facts = model.forward(images, noise)                               # not compiled for this one batch
    tokens, shuffle = model.mix(images, noise)
    patches, visible, places = patchify(images, args.patch), 1 - mask[:count, :, None], shuffle[:count, :model.own].flatten()
    prediction = prediction[:count]
    if args.norm_pixels:
        prediction = with_contrast(prediction, patches)
    pixels = lambda x: (unpatchify(x, args.patch, args.size) * data.std + data.mean).clamp(0, 255).expand(-1, 3, -1, -1)

    (h, w), best = encoder.grid, facts["topk_accuracy"].argmax() if model.homologous else len(encoder.blocks) - 1
    block, query = encoder.blocks[best], places == h // 2 * w + w // 2                     # (N,) true at the middle patch
    x = block.norm1(encoder.blocks[:best](encoder.with_class(tokens[:1])))                  # (1, 1+N, D)
    mixture, views = pixels((patches * visible).sum(0, keepdim=True)), []
    for weights in (Attention.weights(block.attn, x), *([block.attn.weights(x)] * model.homologous)):
        light = torch.zeros(model.places, device=run.device)
        light[places] = weights[0, :, 1:, 1:].mean(0)[query][0]                             # token by token → place by place
        light = (light / light.max()).sqrt()[None, :, None].expand(-1, -1, args.patch ** 2)
        views.append(mixture * unpatchify(light, args.patch, args.size))
    hue = torch.arange(count, device=run.device)[:, None] / count + torch.arange(3, device=run.device) / 3      # (M, 3)
    owner = (visible * (127 + 127 * torch.cos(6.283 * hue))[:, None]).sum(0, keepdim=True).repeat(1, 1, args.patch ** 2)
    topk = ", TopK" * model.homologous
    rows = {"pictures": pixels(patches), "what each of them shows": pixels(patches * visible),
            f"mixture, whose place, attention of the middle patch (block {int(best) + 1}): all keys{topk}":
                torch.cat([mixture, unpatchify(owner, args.patch, args.size), *views]),
            "reconstructions" + TRUE_CONTRAST * args.norm_pixels: pixels(patches * visible + prediction * (1 - visible))}
    wide = max(4, count)
    save_sheet(f"{run.out}/mixture.png", {
        title: torch.cat([row, row.new_full((wide - len(row), *row.shape[1:]), 255)]).byte() for title, row in rows.items()})
    run.say(f"pictures: {run.out}/mixture.png")

# ------------------------------------------------------------------------------------------------------------ command line

PRESETS = {  # what --data selects, for every option left open; imagenet is MAE's recipe, as in the paper; the others are ours
    "scenes": dict(model="nano", size=64, patch=8, decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                   epochs=5, batch=32, lr=1.6e-2, warmup=0.4),
    "small": dict(model="nano", decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                  epochs=50, batch=64, lr=8e-3, warmup=0.5),
    "imagenet": dict(model="base", size=224, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pixels=True, crop=0.2,
                     epochs=800, batch=4096, lr=1.5e-4, warmup=40.0),
}

def options():
    parser, add = shared_options("mixedae.py", "Pre-trains a mixed autoencoder.")
    switch = argparse.BooleanOptionalAction
    add["model"]("--mixing", choices=("compose", "full"), default="compose", help="each picture once, or 1 / ratio times, so "
                 "that it owns every place once: as many times the work (compose)")
    add["model"]("--mix-ratio", type=float, default=0.25, help="share of the places a picture owns; 1 / it are mixed (0.25)")
    add["model"]("--segments", action=switch, default=True, help="add a vector to all tokens of one picture (on)")
    add["model"]("--homologous-attention", action=switch, default=True, help="a query sees only its most similar keys (on)")
    add["model"]("--contrastive", action=switch, default=True, help="learn which tokens are of one picture (on)")
    add["model"]("--contrastive-weight", type=float, default=0.1, help="weight of that loss (0.1, after the paper)")
    add["model"]("--norm-pixels", action=switch, help="predict each patch normalised by its own mean and contrast (on)")
    return parser

ONLY = (("contrastive", "True", "contrastive_weight"),)  # options that do something with these values of another only

def main(arguments=None):
    args = settings(options(), lambda args, kind: PRESETS[kind], arguments, ONLY)
    args.size = args.size or (32 if args.data != "stl10" else None)                         # 28 pixels: 7×7 patches, not even
    args = fit(args)
    args.members = round(1 / max(1e-6, args.mix_ratio))
    if args.members < 2 or not abs(args.members * args.mix_ratio - 1) < 0.02:               # 0.33 is a third, nan is nothing
        raise Problem(f"--mix-ratio {args.mix_ratio} must be one half, a third, a quarter …: its inverse is the size of a group")
    pretrain(args)

if __name__ == "__main__":
    entry(main)
