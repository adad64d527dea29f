"""A small ViT that learns Fashion-MNIST from a bigger one, all from the package itself.

Commands:  python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/teacher \\
               --config.recipes="()" --config.trainable=".*" --config.optim.lr=1e-3 \\
               --config.total_steps=400
           python -m vision_jax.main --config=configs/distill_vit_small.py
Hardware:  2 CPU cores, about 5 minutes each
Expected:  top-1 0.768, mean of 5 seeds, where the student alone has 0.740 and the teacher 0.838

The teacher, fine-tuned from the package's weights, has 6 blocks of width 128; the student has 3 of
width 64, and begins at random. Alone: --config.recipes="()".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field there is; set one on the command line with --config.FIELD=VALUE."""
    config = ConfigDict()
    config.task = "classification"
    config.seed = 0  # of initialization, data order, augmentation and dropout
    config.batch_size = 64  # images per update, over all devices
    config.total_steps = 1000  # updates
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # devices: -1 takes what is left
    config.sharding_rules = ()  # (path regex, mesh axes) before the default; see docs/training.md
    # Which parameters train besides adapters: regexes over whole paths. (".*",) is everything.
    config.trainable = (".*",)
    # What is on, each with the section of its name: lora, adversarial, distill.
    config.recipes = ("distill",)

    config.model = model = ConfigDict()
    # embedded:NAME, a .safetensors file, a folder in Hugging Face layout, hf://owner/name;
    # "" starts from random initialization.
    model.weights = ""
    model.allow_pickle = False  # read .pth and .bin files too (needs torch; only if you trust them)
    model.variant = "vit"  # such as "b/16", "resnet50"; "" takes the architecture from the weights
    model.arguments = (  # more of models/vit.py's ViT
        ("width", 64),
        ("depth", 3),
        ("num_heads", 2),
        ("mlp_width", 128),
        ("patch_size", 4),
        ("class_token", False),
        ("position_prefix", 0),
        ("pool", "avg"),
        ("norm_after_pool", True),
    )
    # Of bigger weights, what a smaller student keeps: ((row, indices or how many), ...)
    model.layers = ()  # such as (("block", 6),); () keeps all; docs/distillation.md
    model.width = 0  # of a narrower ViT, cut out of wider weights; 0 keeps theirs
    model.mlp_width = 0
    model.reinitialize = ("head/.*",)  # paths not taken from the weights: another set of classes
    model.drop = ()  # tensors of the weights to leave out on purpose: regexes over their own names
    model.image_size = 32  # pixels a side; 0 takes the weights' own
    model.mean = ()  # of the images in [0, 1], per channel; () takes the weights' own, or 0.5
    model.std = ()
    model.dtype = "float32"  # compute dtype; parameters are float32. bfloat16 on GPU and TPU
    model.dropout = 0.0
    model.drop_path = 0.0  # stochastic depth of the last block; grows linearly up to it
    model.freeze_norm = False  # BatchNorm keeps its running statistics in training
    model.remat = False  # recompute activations in the backward pass: less memory, more time
    model.scan = False  # one compiled block in a loop: quicker to compile, slightly slower to run

    config.lora = lora = ConfigDict()
    # Kernels that get an adapter: regexes over whole paths.
    lora.rules = ()
    lora.rank = 8
    lora.alpha = 16.0  # the update is scaled by alpha / rank
    lora.rank_stabilized = False  # by alpha / sqrt(rank) instead
    lora.dropout = 0.0  # on the adapter's input
    lora.dora = False  # train each output's magnitude too (DoRA)
    lora.qkv_parts = ""  # "q,v": adapters of their own for these parts of the fused qkv kernel
    lora.init_from = ""  # a folder with a PEFT adapter to start from, instead of rules

    config.adversarial = adversarial = ConfigDict()  # training on attacked images
    adversarial.method = "pgd"  # pgd, fast, free, trades, mart
    adversarial.norm = "linf"  # of perturbations: linf, l2
    adversarial.epsilon = 4 / 255  # their largest norm; images are in [0, 1]
    adversarial.steps = 3  # of each attack (fast and free have one)
    adversarial.step = 0.0  # its length as a share of epsilon; 0 takes the method's usual one
    adversarial.beta = 6.0  # weight of the divergence, of trades and mart
    adversarial.replays = 4  # updates a batch, of free
    adversarial.weight_epsilon = 0.0  # kernels are shifted too, by this share of their norm (AWP)
    adversarial.warmup_steps = 0  # epsilon grows linearly from 0 over them
    adversarial.watch = 200  # held-out images attacked in each evaluation; 0 for none

    config.distill = distill = ConfigDict()  # learning from teachers
    # Finished runs, or weights as in model.weights; "ema" is the student's own moving average.
    distill.teachers = ("runs/teacher",)
    distill.teacher_weights = ()  # of several teachers; () for equal ones
    distill.dtype = "float32"  # that teachers are kept and compute in: float32, bfloat16
    distill.logits = "soft"  # what is learned of them: soft, hard, decoupled, none
    distill.temperature = 4.0
    distill.weight = 1.0  # of the logits' loss; that of the labels has the rest of 1
    distill.token = False  # the teachers teach the distillation token, the labels the other (DeiT)
    # ((kind, layer, layer of the first teacher, weight), ...): hint, attention_transfer,
    # attention_maps, patch_tokens, relational_distance, relational_angle; docs/distillation.md
    distill.features = (("patch_tokens", "block_2", "block_5", 1.0),)
    distill.top_k = 0  # the teachers' best logits that are kept, for a smaller cache; 0 for all
    distill.cache = ""  # a file of what they say, written by --mode=teach; "" asks them

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # adamw, sgd, lars, lamb, lion, muon
    optim.lr = 3e-3
    optim.schedule = "cosine"  # cosine, linear, constant, step; after the warm-up
    optim.warmup_steps = 50
    optim.drop_at = 2 / 3  # share of the updates after which step falls to a tenth
    optim.weight_decay = 0.05  # on kernels and adapters, not on biases, norms and embeddings
    optim.b1 = 0.9
    optim.b2 = 0.999
    optim.momentum = 0.9  # sgd, lars, muon
    optim.clip_norm = 1.0  # largest global gradient norm; 0 turns clipping off
    optim.layer_decay = 1.0  # each earlier layer's rate is this times the next one's
    optim.rates = ()  # (path regex, factor of the rate); the first that matches counts
    optim.accumulate = 1  # micro-batches per update
    optim.ema_decay = 0.0  # moving average of what trains, used by evaluation; 0 for none

    config.data = data = ConfigDict()
    # embedded:NAME/SPLIT, a folder of class folders, a .csv or .jsonl of paths and labels,
    # tfds:NAME/SPLIT, cifar10:DIR/SPLIT
    data.train = "embedded:fashion_mnist/train"
    data.eval = "embedded:fashion_mnist/test"  # "" holds out a share of data.train
    data.holdout = 0.1  # that share
    data.subset = 0  # train on this many images only, the classes in equal parts; 0 takes all
    data.crop_pct = 1.0  # evaluation view: center crop of this share; 0 takes the weights' own
    data.interpolation = ""  # bicubic, bilinear, ...; "" takes the weights' own
    data.crop = "pad"  # training view: random_resized, pad (shift by 1/8) or none
    data.crop_scale = (0.08, 1.0)  # area of a random_resized crop, as a share of the image
    data.flip = True  # horizontally, half of the images
    data.threads = 2  # that decode images
    data.workers = 0  # processes that decode images; 0 uses threads alone
    data.max_damaged = 0.01  # stop when a larger share of the images can't be read

    config.augment = augment = ConfigDict()  # on the device
    augment.policy = "none"  # none, rand (RandAugment), trivial (TrivialAugment)
    augment.ops = 2  # of rand, per image
    augment.magnitude = 9  # of rand, 0 to 30
    augment.mixup = 0.0  # alpha; 0 turns it off
    augment.cutmix = 0.0
    augment.erasing = 0.0  # probability of random erasing
    augment.label_smoothing = 0.1

    config.evaluate = evaluate = ConfigDict()
    evaluate.every = 500  # updates, 0 for once an epoch; the end of training always evaluates
    evaluate.batch_size = 100
    evaluate.neighbors = (1, 20)  # of --mode=frozen: the k of nearest neighbours
    evaluate.shots = (1, 5, 10)  # and training images of each class
    evaluate.repeats = 5  # and random choices of them

    config.robustness = robustness = ConfigDict()  # of --mode=robustness, on a finished run
    robustness.images = 1_000  # evenly spread over the evaluation data; 0 takes all
    robustness.batch_size = 100
    robustness.norm = "linf"  # linf, l2 or l1: of what epsilons measure, in pixels from 0 to 1
    robustness.epsilons = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
    robustness.attacks = ("fgsm", "pgd")  # of fgsm, pgd, mifgsm, difgsm, apgd-ce, apgd-dlr
    robustness.steps = 20  # of each attack but fgsm
    robustness.restarts = 1
    robustness.autoattack = "off"  # standard, plus, rand; about 100 times PGD-20's time
    robustness.autoattack_epsilon = 8 / 255
    robustness.corruptions = ("all",)  # or some of the 15 (docs/robustness.md), or ()
    robustness.severities = (1, 2, 3, 4, 5)
    robustness.self_check = True  # look for signs of masked gradients, at the largest epsilon
    robustness.transfer_from = ""  # the workdir of another run, whose attacks are tried on this one

    config.checkpoint_every = 500  # updates; evaluations are checkpointed too
    config.log_every = 10  # updates between lines in metrics.jsonl
    return config
