"""How fast, side by side: python tests/benchmark.py [QUESTION …] [--model base] [--batch 8] [--json].

Every table is one run in which the candidates take turns, in another order each round, and every figure is a median. Ratios can
be compared with those of other machines, seconds cannot. FLOPs are those of the matrix products of the exact model; the limit
beside them is what one large product reaches here, in the same precision.

    step      a pre-training step (forward, backward, AdamW) beside transformers' ViTMAE, where that is installed
    paper     mask tokens in the encoder or not, a decoder of 8 blocks or 1 (MAE, table 2), for the last --model
    small     pictures of 28×28 that lie on the device: the real loop over the same steps on one batch that never changes
    input     JPEGs of 500×375 to crops of 224, for one core: ours, with 1, 2 and 4 crops of each, over PIL's; the limit: decoding
    methods   a step of MixedAE and AutoMAE over one of MAE; of a ResNet-50 with MRA over one without; for the first --model
    memory    what a picture takes, blocks kept or computed again, and the largest batch; the limit: blocks' inputs alone
    scaling   two processes on the CPU over one, and the share that exchanging gradients takes; eight GPUs, calculated
"""

import argparse, gc, itertools, json, os, statistics, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).parents[1]))
import automae, common, mae, mixedae, mra

def flops(vit, batch, decoder_dim=512, decoder_depth=8, encoded=None):
    """Multiplications and additions of the matrix products in a training step: three times those of a forward pass, twice where
    no input wants a gradient (the patches). `encoded`: tokens in the encoder, if not a quarter and the class token."""
    N, D, d, pixels = vit.grid[0] * vit.grid[1], vit.dim, decoder_dim, vit.patch ** 2 * vit.channels
    tokens, all_ = encoded or 1 + N // 4, 1 + N
    block = lambda tokens, dim: tokens * (24 * dim ** 2 + 4 * tokens * dim)              # qkv, proj, two of the MLP; attention
    inner = len(vit.blocks) * block(tokens, D) + 2 * tokens * D * d + decoder_depth * block(all_, d) + 2 * N * d * pixels
    return batch * (3 * inner + 2 * 2 * N * pixels * D)

class Bench:
    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.gpu, self.rows, self.ours = self.device.type == "cuda", [], {}
        args.model, args.batch = args.model or ["base", "large"][:1 + self.gpu], args.batch or (64 if self.gpu else 8)
        if self.gpu:
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64                                    # to Dynamo all models are one function

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu)

    def images(self, batch=None):
        return torch.randn(batch or self.args.batch, 3, 224, 224, device=self.device)

    def ready(self, model, compile=True):
        """→ the model on the device, there compiled in place."""
        if self.gpu and self.args.compile and compile:
            model.compile(dynamic=False)
        return model.to(self.device).train()

    def step(self, model, loss, optimizer=None, compile=True):
        """→ a function that does one training step; loss() → ()."""
        self.ready(model, compile)
        optimizer = optimizer or common.adamw(model, 0.05)

        def step():
            with self.autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    def clock(self, work, times=1):
        """→ seconds of one of so many calls, until the device, or all processes, are done with them."""
        wait = torch.cuda.synchronize if self.gpu else dist.barrier if dist.is_initialized() else lambda: None
        wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - start) / times

    def seconds(self, steps):
        """{name: function} → {name: median seconds}, in turns; on a GPU a turn is half a second or 20 calls."""
        found, names = {name: [] for name in steps}, list(steps)
        for work in steps.values():
            work()                                                                       # warms up, and compiles
        times = {name: max(1, min(20, int(0.5 / self.clock(work)))) if self.gpu else 1 for name, work in steps.items()}
        for turn in range(self.args.rounds):
            for name in names[turn % len(names):] + names[:turn % len(names)]:
                found[name].append(self.clock(steps[name], times[name]))
        return {name: statistics.median(times) for name, times in found.items()}

    def limit(self):
        """→ FLOP/s of one large matrix product."""
        side = 8192 if self.gpu else 2048
        one = torch.randn(side, side, device=self.device, dtype=torch.bfloat16 if self.gpu else torch.float32)
        return 2 * side ** 3 / self.seconds({"product": lambda: one @ one})["product"]

    def row(self, line, **row):
        """Prints and keeps a line of a table."""
        self.rows.append(row)
        print(f"  {line}", flush=True)

    def table(self, title, found, first, work=None, batch=None):
        """A table: each candidate's seconds for so many pictures, images/s, and speed as a share of the first one's."""
        print(f"\n{title}")
        limit, batch = self.limit() if work else None, batch or self.args.batch
        for name, seconds in found.items():
            row = dict(question=title, name=name, seconds=seconds, images_per_s=batch / seconds, speed=found[first] / seconds)
            line = f"{name:<44}{seconds * 1e3:>10.1f} ms{row['images_per_s']:>10.1f} images/s{row['speed']:>8.2f} ×"
            if work and work.get(name):
                row |= dict(flops=work[name], share_of_limit=work[name] / seconds / limit)
                line += f"   {work[name] / 1e9:8.0f} GFLOP, {row['share_of_limit']:.0%} of {limit / 1e9:.0f} GFLOP/s"
            self.row(line, **row)

def of_size(name, **how):
    vit = common.VITS[name]
    return common.ViT(224, vit["patch"], 3, vit["dim"], vit["depth"], vit["heads"], **how)

def autoencoder(name, kind=mae.MAE, **decoder):
    torch.manual_seed(0)
    encoder = of_size(name)
    return kind(encoder, common.Decoder(encoder, **decoder))

def learned(*models):
    return sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)

def ours(bench, name):
    """→ our pre-training step, its pictures, and its FLOPs."""
    model, images = autoencoder(name), bench.images()
    return bench.step(model, lambda: model(images)[0]), images, flops(model.encoder, len(images))

def step(bench):
    for name in bench.args.model:
        vit, (own, images, work) = common.VITS[name], ours(bench, name)
        steps = {"ours": own}
        try:
            from transformers import ViTMAEConfig, ViTMAEForPreTraining
            other = ViTMAEForPreTraining(ViTMAEConfig(
                hidden_size=vit["dim"], num_hidden_layers=vit["depth"], num_attention_heads=vit["heads"], patch_size=vit["patch"],
                intermediate_size=4 * vit["dim"], norm_pix_loss=True))
            for way in ("eager", "compiled")[:1 + bench.gpu]:
                net = other if way == "eager" else torch.compile(other, dynamic=False)
                steps[f"transformers' ViTMAE, {way}"] = bench.step(
                    other, lambda net=net, images=images: net(images).loss, compile=False)
        except ImportError:
            print("transformers is not installed: nothing to compare with")
        found = bench.seconds(steps)
        bench.ours[name] = found["ours"]                                                 # for `scaling`
        bench.table(f"pre-training step, ViT-{name}, batch {len(images)}", found, "ours", dict.fromkeys(steps, work))

class Unmasked(mae.MAE):
    """As much work as with mask tokens in the encoder: it sees every place, and so does the loss."""

    def forward(self, images):
        latent = self.encoder.encode(self.encoder.embed(images))                         # (B, 1+N, D)
        B, N = len(latent), latent.shape[1] - 1
        prediction = self.decoder(latent, torch.arange(N, device=latent.device).expand(B, -1))
        return common.pixel_loss(images, prediction, torch.ones(B, N, device=latent.device), self.encoder.patch, True),

def paper(bench):
    steps, work, images, name = {}, {}, bench.images(), bench.args.model[-1]
    for title, kind, depth in (("mask tokens in the encoder, 8 blocks", Unmasked, 8), ("without, 8 blocks", mae.MAE, 8),
                               ("without, 1 block", mae.MAE, 1)):
        model = autoencoder(name, kind, depth=depth)
        steps[title] = bench.step(model, lambda model=model: model(images)[0])
        work[title] = flops(model.encoder, len(images), decoder_depth=depth,
                            encoded=model.encoder.pos_embed.shape[1] if kind is Unmasked else None)
    bench.table(f"the paper's speed-up, ViT-{name} (paper: ViT-L 2.8 and 3.7 times, ViT-H 3.5 and 4.1)", bench.seconds(steps),
                "mask tokens in the encoder, 8 blocks", work)

def small(bench):
    count, batch = (60_000, 512) if bench.gpu else (256, 64)
    with tempfile.TemporaryDirectory() as folder:
        args = common.fit(common.settings(mae.options(), mae.preset, [                   # at an lr that noise survives
            *"--data fashion-mnist --model tiny --patch 4 --epochs 10000 --warmup 100 --lr 1e-4 --save-every 1e9".split(),
            *f"--batch {batch} --micro-batch {batch} --device {bench.device.type} --out {folder}/run".split(),
            *["--no-compile"] * (not bench.args.compile)]))
        run, args.channels = common.Run(args), 1
        run.say = lambda *text, **how: None
        data = common.Pictures(torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8), torch.zeros(count).long(), range(10))
        optimizer = common.adamw(model := mae.MAE(*mae.build(args), args.norm_pixels, args.masking), args.weight_decay)
        wrapped = run.wrap(model)
        run.keep(encoder=model.encoder, decoder=model.decoder, optimizer=optimizer)
        batches = common.Batches(data, run, args.size, args.crop)
        steps, same = run.steps(batches.per_epoch), data.normalise(data.images[:batch].to(run.device))

        def learn(images):
            with run.autocast():
                loss, _, _ = wrapped(images, args.mask_ratio)
            run.backward(loss)
            run.log(loss=loss)
            run.update(optimizer)

        def real():                                                                      # the loop of mae.py, for an epoch
            for step in itertools.islice(steps, batches.per_epoch):
                for images, _, _ in batches.at(step):
                    learn(images)

        def constant():
            for _ in range(batches.per_epoch):
                learn(same)

        names, seen = ("the real loop", "the same on one batch that never changes"), batches.per_epoch * batch
        work = flops(model.encoder, seen, args.decoder_dim, args.decoder_depth)
        found = bench.seconds(dict(zip(names, (real, constant))))
        steps.close()
    title = f"small data: an epoch of {seen} pictures of 28×28, ViT-tiny, patch 4, batch {batch}"
    bench.table(title, found, names[0], dict.fromkeys(names, work), seen)
    epoch, share = found[names[0]] * 60_000 / seen, found[names[1]] / found[names[0]]
    bench.row(f"60,000 pictures: {epoch:.1f} s (aim on a GPU: 2 s); {share:.0%} of the time is computing (at most 100 %)",
              question=title, name="60,000 pictures", seconds=epoch, computing=share)

def pipeline(bench, count=48):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    usual = T.Compose([T.RandomResizedCrop(224, (0.2, 1), interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
                       T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(common.draw_scenes(torch.arange(count), (375, 500))[0]):
            image = (image + 4 * torch.randn(375, 500)).clamp(0, 255).byte()             # grain: scenes alone decode too fast
            torchvision.io.write_jpeg(image, f"{folder}/{i}.jpg", quality=92)
        plain, paths = common.folder(folder), [f"{folder}/{i}.jpg" for i in range(count)]
        steps = {"PIL": lambda: [usual(Image.open(path).convert("RGB")) for path in paths]}
        for crops in (1, 2, 4):
            data, seeds = common.folder(folder), itertools.count()
            list(data.stream([], SimpleNamespace(workers=0, device=torch.device("cpu")), 224, 0.2, crops=crops))  # sets transform
            steps[f"ours, --crops {crops}"] = lambda data=data, seeds=seeds: [data[i, next(seeds)] for i in range(count)]
        steps["decoding alone"] = lambda: [plain.read(i) for i in range(count)]
        if bench.gpu:
            coded = [torchvision.io.read_file(path) for path in paths]
            decode = lambda: torchvision.io.decode_jpeg(coded, torchvision.io.ImageReadMode.RGB, device=bench.device)
            try:
                decode()
                steps["decoding alone, all at once on the GPU"] = decode
            except RuntimeError as error:
                print(f"torchvision does not decode on this GPU: {str(error).splitlines()[0]}")
        found, size = bench.seconds(steps), sum(map(os.path.getsize, paths)) / count / 1e3
    torch.set_num_threads(threads)
    samples = {name: count * int(name[-1]) if "--crops" in name else count for name in found}
    bench.table(f"input: JPEGs of 500×375, {size:.0f} kB, to crops of 224, one core, seconds a crop (aim: 2.1 × PIL)",
                {name: seconds / samples[name] for name, seconds in found.items()}, "PIL", batch=1)

def methods(bench):
    steps, images, name = {}, bench.images(), bench.args.model[0]
    encoder = of_size(name)
    plain = mae.MAE(encoder, common.Decoder(encoder))
    steps["MAE"] = bench.step(plain, lambda: plain(images)[0])
    for title, how in (("MixedAE, naive mixing", dict(segments=False, homologous=False, contrastive=0)), ("MixedAE", {})):
        encoder = of_size(name, attention=mixedae.HomologousAttention)
        mixed = mixedae.MixedAE(encoder, common.Decoder(encoder), **how)
        steps[title] = bench.step(mixed, lambda mixed=mixed: mixed(images)[0])
    encoder, prior = of_size(name), bench.ready(automae.Prior(of_size(name)))
    places, generator = encoder.grid[0] * encoder.grid[1], automae.Generator(encoder.blocks[0].attn.heads, encoder.grid)
    auto = automae.AutoMAE(encoder, common.Decoder(encoder), generator=generator)

    def guided():
        noise = torch.rand(len(images), places, device=bench.device)
        _, guide = automae.propose("learned", generator, prior(images), None, noise, encoder.grid, places // 4)
        return auto(images, automae.highlight(guide, places // 4), noise)[0]

    steps["AutoMAE without its discriminator"] = bench.step(auto, guided)
    steps["  of that the prior"] = bench.autocast()(lambda: prior(images))
    bench.table(f"methods, ViT-{name}, batch {len(images)}", bench.seconds(steps), "MAE")

    light = common.VITS["light"]
    encoder = common.ViT(224, 16, 3, light["dim"], light["depth"], light["heads"])
    augment = bench.ready(mra.MRA(encoder, common.Decoder(encoder, 192, 2, 3), own=([0] * 3, [1] * 3)))
    labels, steps = torch.randint(1000, (len(images),), device=bench.device), {}
    for title, change in (("ResNet-50", lambda images: images), ("ResNet-50 with MRA", augment)):
        net = torchvision.models.resnet50().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        steps[title] = bench.step(net, lambda net=net, change=change: F.cross_entropy(net(change(images)), labels), optimizer)
    bench.table("a classifier's step with MRA", bench.seconds(steps), "ResNet-50")

def kept(model, images):
    """→ bytes that a forward pass keeps for the backward pass: every storage once, parameters not counted."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(images)[0]                                                          # noqa: F841, keeps all of it alive
    return sum(storage.nbytes() for storage in found.values())

def peak(bench, model, images):
    """→ a step's peak in bytes, without Adam's two moments. Gradients are there from the start, as when they add up: else a small
    batch has its peak where the last of them are made, and the slope is wrong."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with bench.autocast():
            loss = model(images)[0]
        loss.backward()
    return torch.cuda.max_memory_allocated()

def memory(bench):
    few, many = bench.args.batch // 2, bench.args.batch
    room = torch.cuda.get_device_properties(bench.device).total_memory if bench.gpu else (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    title = f"memory of a picture, {'measured peak, not compiled' if bench.gpu else 'counted: what the backward pass needs'}"
    print(f"\n{title}")
    for name in bench.args.model:
        model, plain = autoencoder(name).to(bench.device), None
        blocks = [part for part in model.modules() if isinstance(part, common.Block)]
        vit, places = model.encoder, model.encoder.grid[0] * model.encoder.grid[1]
        least = 4 * (len(vit.blocks) * (1 + places // 4) * vit.dim + 8 * (1 + places) * 512)
        for again in (False, True):
            for block in blocks:
                block.again = again
            if not bench.gpu:
                blocks[-1].again = False                                                 # one at a time is there, and whole
            low, high = (peak(bench, model, bench.images(n)) if bench.gpu else kept(model, bench.images(n)) for n in (few, many))
            each = (high - low) / (many - few)
            fixed = high - many * each + (8 if bench.gpu else 16) * learned(model)       # weights, gradients, two moments
            plain, largest = plain or each, int((0.95 * room - fixed) / each)
            how = "blocks computed again" if again else "blocks kept"
            bench.row(f"{f'ViT-{name}, {how}':<44}{each / 1e6:>10.1f} MB{fixed / 1e9:>10.1f} GB fixed{plain / each:>9.2f} ×"
                      f"{largest:>8} fit in 95 % of {room / 1e9:.0f} GB, calculated" + f"; limit {least / 1e6:.1f} MB" * again,
                      question=title, name=f"ViT-{name}, {how}", bytes_per_picture=each, fixed_bytes=fixed, saving=plain / each,
                      largest_batch_calculated=largest, limit_bytes=least)

def worker(rank, folder, rounds, batch):
    """One of two processes, a thread each, wrapped as under torchrun; process 0 writes down what they found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    bench = Bench(argparse.Namespace(device="cpu", model=["small"], batch=batch, rounds=rounds, compile=False))
    alone, shared = (autoencoder("small", dim=256, depth=4) for _ in range(2))
    images, both = bench.images(), torch.nn.parallel.DistributedDataParallel(shared, gradient_as_bucket_view=True)
    one = bench.step(alone, lambda: alone(images)[0])
    two = bench.step(shared, lambda: both(images[rank::2])[0])

    def quiet():
        with both.no_sync():
            two()

    found = bench.seconds({"one process": (lambda: None) if rank else one, "two processes": two,
                           "two that do not exchange gradients": quiet})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()

def scaling(bench, batch=16):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder, bench.args.rounds, batch), nprocs=2)
        found = json.loads(Path(folder, "found.json").read_text())
    title = f"scaling: ViT-small, decoder 4 × 256, {batch} pictures a step in all, one CPU thread a process (limit: 2 ×)"
    bench.table(title, found, "one process", batch=batch)
    share = 1 - found["two that do not exchange gradients"] / found["two processes"]
    bench.row(f"exchanging gradients takes {share:.0%} of a step of two", question=title, name="exchange", share=share)
    title = f"eight GPUs, {bench.args.batch} pictures each: calculated, not measured, from an assumed 300 GB/s in an all-reduce"
    print(f"\n{title}")
    for name in ("base", "large", "huge"):
        vit = common.VITS[name]
        encoder = common.ViT(224, vit["patch"], 3, vit["dim"], 1, vit["heads"])          # one block stands for all
        size = 4 * (learned(encoder, common.Decoder(encoder)) + (vit["depth"] - 1) * learned(encoder.blocks))
        row = dict(question=title, name=f"ViT-{name}", gradient_bytes=size, exchange_seconds=2 * size * 7 / 8 / 300e9)
        line = f"{row['name']:<44}{row['exchange_seconds'] * 1e3:>10.1f} ms for {size / 1e6:.0f} MB of gradients"
        if bench.gpu and name in bench.args.model:
            seconds = bench.ours[name] = bench.ours.get(name) or bench.seconds({"ours": ours(bench, name)[0]})["ours"]
            row |= dict(step_seconds=seconds, efficiency=seconds / (seconds + row["exchange_seconds"]))
            line += (f", after a step of {seconds * 1e3:.1f} ms here: {8 * row['efficiency']:.2f} × one GPU if nothing overlaps "
                     f"(limit: 8 ×)")
        bench.row(line, **row)

def main():
    questions = {"step": step, "paper": paper, "small": small, "input": pipeline, "methods": methods, "memory": memory,
                 "scaling": scaling}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"{', '.join(questions)} (all)")
    parser.add_argument("--model", nargs="+", choices=common.VITS, help="sizes of ViT (base; on a GPU base large)")
    parser.add_argument("--batch", type=int, help="pictures a step, a multiple of 4 (8; on a GPU 64)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (5)")
    parser.add_argument("--device", help="cuda, cpu (cuda if there is one)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="on GPUs: do not compile our models")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON in the end")
    args = parser.parse_args()
    if wrong := [name for name in args.questions if name not in questions]:
        parser.error(f"no question {wrong[0]}: there are {', '.join(questions)}")
    bench = Bench(args)
    if args.batch % 4 or args.batch < 4:
        parser.error("--batch must divide into MixedAE's groups of four")
    where = torch.cuda.get_device_name() if bench.gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}, {'bf16' if bench.gpu else 'fp32'}")
    for name in args.questions or questions:
        try:
            questions[name](bench)
        except torch.OutOfMemoryError:
            print(f"\n{name}: the GPU's memory is full: lower --batch")
        if bench.gpu:                                                                    # the next one finds the GPU empty
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    if args.json:
        print(json.dumps(dict(where=where, torch=torch.__version__, rows=bench.rows)))

if __name__ == "__main__":
    main()
