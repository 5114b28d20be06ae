"""How fast, side by side: python tests/benchmark.py [step] [paper] [methods] [--model base] [--batch 8] [--json].

Every table is one run in which the candidates take turns, in another order each round, and every figure is a median. Ratios can
be compared with those of other machines, seconds cannot. FLOPs are those of the matrix products of the exact model; the limit
beside them is what one large product reaches here, in the same precision.

    step      a pre-training step (forward, backward, AdamW) beside transformers' ViTMAE, where that is installed
    paper     mask tokens in the encoder or not, a decoder of 8 blocks or 1 (MAE, table 2)
    methods   a step of MixedAE and AutoMAE over one of MAE; of a ResNet-50 with MRA over one without
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
import automae
import common
import mae
import mixedae
import mra

def flops(vit, batch, visible, decoder_dim=512, decoder_depth=8, encoded=None):
    """Multiplications and additions of the matrix products in a training step: three times those of a forward pass, twice where
    no input wants a gradient (the patches). `encoded`: tokens in the encoder, if not the visible ones and the class token."""
    N, D, d, pixels = vit.grid[0] * vit.grid[1], vit.dim, decoder_dim, vit.patch ** 2 * vit.channels
    tokens, all_ = encoded or 1 + visible, 1 + N
    block = lambda tokens, dim: tokens * (24 * dim ** 2 + 4 * tokens * dim)              # qkv, proj, two of the MLP; attention
    inner = len(vit.blocks) * block(tokens, D) + 2 * tokens * D * d + decoder_depth * block(all_, d) + 2 * N * d * pixels
    return batch * (3 * inner + 2 * 2 * N * pixels * D)

class Bench:
    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.half, self.tables = self.device.type == "cuda", []
        if self.half:
            torch.set_float32_matmul_precision("high")

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def images(self, size=224):
        return torch.randn(self.args.batch, 3, size, size, device=self.device)

    def step(self, model, loss, optimizer=None):
        """→ a function that does one training step; loss() → ()."""
        model.to(self.device).train()
        if self.half and self.args.compile:
            model.compile(dynamic=False)
        optimizer = optimizer or common.adamw(model, 0.05)

        def step():
            with self.autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    def seconds(self, steps):
        """{name: function} → {name: median seconds}, in turns."""
        found, names = {name: [] for name in steps}, list(steps)
        for turn in range(-1, self.args.rounds):                                         # the first one warms up
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                if self.half:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(20 if self.half else 1):
                    steps[name]()
                if self.half:
                    torch.cuda.synchronize()
                if turn >= 0:
                    found[name].append((time.perf_counter() - start) / (20 if self.half else 1))
        return {name: statistics.median(times) for name, times in found.items()}

    def limit(self):
        """→ FLOP/s of one large matrix product."""
        side = 8192 if self.half else 2048
        one = torch.randn(side, side, device=self.device, dtype=torch.bfloat16 if self.half else torch.float32)
        return 2 * side ** 3 / self.seconds({"product": lambda: one @ one})["product"]

    def table(self, title, found, first, work=None):
        """Prints and keeps: each candidate's seconds, images/s, and speed as a share of the first one's."""
        print(f"\n{title}")
        limit = self.limit() if work else None
        for name, seconds in found.items():
            row = dict(question=title, name=name, seconds=seconds, images_per_s=self.args.batch / seconds,
                       speed=found[first] / seconds)
            line = f"  {name:<44}{seconds * 1e3:>10.1f} ms{row['images_per_s']:>10.1f} images/s{row['speed']:>8.2f} ×"
            if work and work.get(name):
                row |= dict(flops=work[name], share_of_limit=work[name] / seconds / limit)
                line += f"   {work[name] / 1e9:8.0f} GFLOP, {row['share_of_limit']:.0%} of {limit / 1e9:.0f} GFLOP/s"
            self.tables.append(row)
            print(line, flush=True)

def of_size(name, **how):
    vit = common.VITS[name]
    return common.ViT(224, vit["patch"], 3, vit["dim"], vit["depth"], vit["heads"], **how)

def step(bench):
    for name in bench.args.model:
        torch.manual_seed(0)
        encoder, images = of_size(name), bench.images()
        model = mae.MAE(encoder, common.Decoder(encoder))
        work = flops(encoder, len(images), int(encoder.grid[0] * encoder.grid[1] * 0.25))
        steps = {"ours": bench.step(model, lambda: model(images)[0])}                    # noqa: B023, used before the next
        try:
            from transformers import ViTMAEConfig, ViTMAEForPreTraining
            config = ViTMAEConfig(hidden_size=encoder.dim, num_hidden_layers=len(encoder.blocks), patch_size=encoder.patch,
                                  num_attention_heads=encoder.blocks[0].attn.heads, intermediate_size=4 * encoder.dim,
                                  norm_pix_loss=True)
            for way in ("eager", "compiled") if bench.half else ("eager",):
                other = ViTMAEForPreTraining(config)
                steps[f"transformers' ViTMAE, {way}"] = bench.step(other, lambda other=other: other(images).loss)   # noqa: B023
                if way == "compiled":
                    other.compile()
        except ImportError:
            print("transformers is not installed: nothing to compare with")
        bench.table(f"pre-training step, ViT-{name}, batch {len(images)}", bench.seconds(steps), "ours",
                    dict.fromkeys(steps, work))

def paper(bench):
    for name in bench.args.model:
        steps, work, images = {}, {}, bench.images()
        for title, mask_ratio, depth in (("mask tokens in the encoder, 8 blocks", 0, 8), ("without, 8 blocks", 0.75, 8),
                                         ("without, 1 block", 0.75, 1)):
            torch.manual_seed(0)
            encoder = of_size(name)
            model, places = mae.MAE(encoder, common.Decoder(encoder, depth=depth)), encoder.grid[0] * encoder.grid[1]
            if mask_ratio:
                loss = lambda model=model: model(images)[0]                              # noqa: B023
            else:                                                                        # as much work as with mask tokens there
                def loss(model=model, places=places):
                    restore = torch.arange(places, device=images.device).expand(len(images), -1)     # noqa: B023
                    latent = model.encoder.encode(model.encoder.embed(images))           # noqa: B023
                    mask = torch.ones(len(images), places, device=images.device)         # noqa: B023
                    return common.pixel_loss(images, model.decoder(latent, restore), mask, model.encoder.patch, True)   # noqa: B023
            steps[title] = bench.step(model, loss)
            work[title] = flops(encoder, len(images), int(places * 0.25), decoder_depth=depth,
                                encoded=None if mask_ratio else 1 + places)
        bench.table(f"the paper's speed-up, ViT-{name} (paper: ViT-L 2.8 and 3.7 times, ViT-H 3.5 and 4.1)", bench.seconds(steps),
                    "mask tokens in the encoder, 8 blocks", work)

def methods(bench):
    steps, images, name = {}, bench.images(), bench.args.model[0]
    encoder = of_size(name)
    plain = mae.MAE(encoder, common.Decoder(encoder))
    steps["MAE"] = bench.step(plain, lambda: plain(images)[0])
    for title, how in (("MixedAE, naive mixing", dict(segments=False, homologous=False, contrastive=0)), ("MixedAE", {})):
        encoder = of_size(name, attention=mixedae.HomologousAttention)
        mixed = mixedae.MixedAE(encoder, common.Decoder(encoder), **how)
        steps[title] = bench.step(mixed, lambda mixed=mixed: mixed(images)[0])
    encoder, prior = of_size(name), automae.Prior(of_size(name)).to(bench.device)
    places, generator = encoder.grid[0] * encoder.grid[1], automae.Generator(encoder.blocks[0].attn.heads, encoder.grid)
    auto = automae.AutoMAE(encoder, common.Decoder(encoder), generator=generator)

    def guided():
        noise = torch.rand(len(images), places, device=bench.device)
        _, guide = automae.propose("learned", generator, prior(images), None, noise, encoder.grid, places // 4)
        return auto(images, automae.highlight(guide, places // 4), noise)[0]

    steps["AutoMAE without its discriminator"] = bench.step(auto, guided)
    steps["  of that the prior"] = lambda: prior(images)
    bench.table(f"methods, ViT-{name}, batch {len(images)}", bench.seconds(steps), "MAE")

    light = common.VITS["light"]
    encoder = common.ViT(224, 16, 3, light["dim"], light["depth"], light["heads"])
    augment = mra.MRA(encoder, common.Decoder(encoder, 192, 2, 3), own=([0] * 3, [1] * 3)).to(bench.device)
    labels, steps = torch.randint(1000, (len(images),), device=bench.device), {}
    for title, change in (("ResNet-50", lambda images: images), ("ResNet-50 with MRA", augment)):
        net = torchvision.models.resnet50().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        steps[title] = bench.step(net, lambda net=net, change=change: F.cross_entropy(net(change(images)), labels), optimizer)
    bench.table("a classifier's step with MRA", bench.seconds(steps), "ResNet-50")

def main():
    questions = {"step": step, "paper": paper, "methods": methods}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"{', '.join(questions)} (all)")
    parser.add_argument("--model", nargs="+", default=["base"], choices=common.VITS, help="sizes of ViT (base)")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step, a multiple of 4 (8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (5)")
    parser.add_argument("--device", help="cuda, cpu (cuda if there is one)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="on GPUs: do not compile our models")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON in the end")
    args = parser.parse_args()
    if wrong := [name for name in args.questions if name not in questions]:
        parser.error(f"no question {wrong[0]}: there are {', '.join(questions)}")
    if args.batch % 4:
        parser.error("--batch must divide into MixedAE's groups of four")
    bench = Bench(args)
    where = torch.cuda.get_device_name() if bench.half else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, {'bf16' if bench.half else 'fp32'}")
    for name in args.questions or questions:
        questions[name](bench)
    if args.json:
        print(json.dumps(dict(where=where, torch=torch.__version__, rows=bench.tables)))

if __name__ == "__main__":
    main()
